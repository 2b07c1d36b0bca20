// Counts words with containers, sorts them, and survives an exception of its own and one of the library's.
#include <algorithm>
#include <iostream>
#include <map>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

struct Guard {
    const char *name;
    explicit Guard(const char *name) : name(name) { std::cout << "enter " << name << "\n"; }
    ~Guard() { std::cout << "leave " << name << "\n"; }
};

static Guard at_program_start("program");

class Empty : public std::runtime_error {
  public:
    Empty() : std::runtime_error("nothing to count") {}
};

static std::map<std::string, int> count(const std::string &text) {
    Guard guard("count");
    std::map<std::string, int> counts;
    std::istringstream words(text);
    for (std::string word; words >> word;)
        ++counts[word];
    if (counts.empty())
        throw Empty();
    return counts;
}

int main(int argc, char **argv) {
    std::string text = "the quick brown fox jumps over the lazy dog and the dog sleeps";
    for (int i = 1; i < argc; i++)
        text += std::string(" ") + argv[i];

    auto counts = count(text);
    std::vector<std::pair<std::string, int>> sorted(counts.begin(), counts.end());
    std::stable_sort(sorted.begin(), sorted.end(), [](auto &a, auto &b) { return a.second > b.second; });
    for (auto &[word, times] : sorted)
        if (times > 1)
            std::cout << word << ": " << times << "\n";

    try {
        count("");
    } catch (const Empty &error) {
        std::cout << "caught: " << error.what() << "\n";
    }
    try {
        std::cout << sorted.at(1000).first;
    } catch (const std::out_of_range &) {
        std::cout << "caught: out of range, from the library\n";
    }
    return 3;
}

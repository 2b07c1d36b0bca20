// Thread-local objects with constructors and destructors, and those of the C++ runtime.
#include <cstdio>
#include <future>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>

struct Counted {
    const char *name;
    int uses = 0;
    explicit Counted(const char *name) : name(name) { std::printf("begin %s\n", name); }
    ~Counted() { std::printf("end %s after %d\n", name, uses); }
};

thread_local Counted counted("counted");
thread_local std::string text = "text";
std::once_flag once;

int main() {
    std::call_once(once, [] { std::puts("once"); });
    std::thread([] {
        counted.uses++;
        text += " of a thread";
        std::puts(text.c_str());
    }).join();
    auto future = std::async(std::launch::async, []() -> int { throw std::logic_error("thrown in a thread"); });
    try {
        future.get();
    } catch (const std::exception &error) {
        std::puts(error.what());
    }
    counted.uses = 5;
    std::puts(text.c_str());
    return 3;
}

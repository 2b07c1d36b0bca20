extern int common_in_both[10];
int common_in_both[10];
int number_of_other __attribute__((section(".data.retained"))) = 77;
int weak_here(void) { return 2; }
__attribute__((weak)) int weak_there(void) { return 5; }
__attribute__((visibility("hidden"))) int hidden_there = 6;
__attribute__((section("numbers"), used)) static const int here = 12;
int both(void) { return common_in_both[9]; }
const char *string_there(void) { return "a string that is in both"; }

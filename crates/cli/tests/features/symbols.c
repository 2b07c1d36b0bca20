// Symbols of every binding and visibility, common, weak, with versions; sections by name; merged strings.
#include <stdio.h>
#include <string.h>

int common_in_both[10];
extern int number_of_other;
__attribute__((weak)) int weak_here(void) { return 1; }
__attribute__((weak)) int absent(void);
__attribute__((visibility("protected"))) int protected_here = 3;
__attribute__((visibility("hidden"))) extern int hidden_there;
__attribute__((visibility("internal"))) int internal_here = 4;
int weak_there(void);
int both(void);
const char *string_there(void);
extern const int __start_numbers[], __stop_numbers[];
__attribute__((section("numbers"), used)) static const int here = 30;
__asm__(".symver old_memcpy, memcpy@GLIBC_2.2.5");
void *old_memcpy(void *to, const void *from, size_t size);

int main(void) {
    char copy[6];
    old_memcpy(copy, "older", 6);
    int total = 0;
    for (const int *number = __start_numbers; number < __stop_numbers; number++)
        total += *number;
    common_in_both[9] = 9;
    printf("%d %d %d %d %d %d\n", weak_here(), weak_there(), absent == 0, both(), protected_here, hidden_there);
    printf("%d %d %s %d\n", internal_here, total, copy, number_of_other);
    printf("%d\n", strcmp(string_there(), "a string that is in both") + strcmp("a string that is in both", string_there()));
    return 0;
}

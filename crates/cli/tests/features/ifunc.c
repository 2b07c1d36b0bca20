// Functions that are chosen when the program is linked, called, compared and taken the address of.
#include <stdio.h>

static int one(void) { return 1; }
static int two(void) { return 2; }
static void *pick(void) { return two; }
int chosen(void) __attribute__((ifunc("pick")));
static int hidden(void) __attribute__((ifunc("pick")));
int (*functions[])(void) = {chosen, one};
int (*address_in_other(void))(void);

__attribute__((target_clones("avx2", "default"))) int sum(const int *numbers, int count) {
    int total = 0;
    for (int i = 0; i < count; i++)
        total += numbers[i];
    return total;
}

int main(void) {
    int numbers[] = {1, 2, 3, 4};
    printf("%d %d %d %d\n", chosen(), functions[0](), hidden(), sum(numbers, 4));
    return address_in_other()();
}

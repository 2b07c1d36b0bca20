// Zeros of more than a gigabyte.
#include <stdio.h>

static char zeros[1200ul << 20];
char others[300ul << 20];

int main(void) {
    long total = 0;
    zeros[1199ul << 20] = 1;
    others[299ul << 20] = 2;
    for (unsigned long i = 0; i < sizeof zeros; i += 16 << 20)
        total += zeros[i];
    for (unsigned long i = 0; i < sizeof others; i += 1 << 20)
        total += others[i];
    printf("%ld %d\n", total, zeros[1199ul << 20]);
    return 4;
}

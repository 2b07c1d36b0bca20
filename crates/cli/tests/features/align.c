// Alignments above a page, and zeros that take gigabytes of addresses.
#include <stdint.h>
#include <stdio.h>

static char zeros[100] __attribute__((aligned(65536)));
char content[10] __attribute__((aligned(262144))) = "x";
const char constant[10] __attribute__((aligned(8192))) = "y";
static char huge[(1ul << 31) + 4096];

int main(void) {
    volatile char *last = &huge[1ul << 31];
    *last = 7;
    printf("%d %d %d %d\n", (int)((uintptr_t)zeros % 65536), (int)((uintptr_t)content % 262144),
           (int)((uintptr_t)constant % 8192), *last);
    return 0;
}

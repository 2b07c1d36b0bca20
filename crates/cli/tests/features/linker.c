// Names that linkers define.
#include <elf.h>
#include <stdint.h>
#include <stdio.h>

extern char _end[], end[], edata[], _edata[], etext[], __bss_start[], __executable_start[];
extern const Elf64_Ehdr __ehdr_start;
extern void *_GLOBAL_OFFSET_TABLE_[];
typedef void (*Function)(void);
extern Function __init_array_start[], __init_array_end[], __fini_array_start[], __fini_array_end[];
extern Function __preinit_array_start[], __preinit_array_end[];
extern int __start_nothing[] __attribute__((weak));
int zeros[100000];
int data = 5;
static volatile int runs;

__attribute__((constructor)) static void begin(void) { runs++; }

static uintptr_t address(const volatile void *pointer) { return (uintptr_t)pointer; }

int main(void) {
    printf("%d %d\n", address(&zeros) < address(_end), address(main) < address(etext));
    printf("%d %d\n", address(main) > address(__executable_start), address(_end) == address(end));
    printf("%d %d %c\n", address(_edata) == address(edata), address(__start_nothing) == 0, __ehdr_start.e_ident[1]);
    int found = 0;
    for (Function *function = __init_array_start; function < __init_array_end; function++)
        found |= *function == begin;
    printf("%d %d %d\n", found, runs, address(_GLOBAL_OFFSET_TABLE_) != 0);
    return __preinit_array_end - __preinit_array_start + (__fini_array_end < __fini_array_start);
}

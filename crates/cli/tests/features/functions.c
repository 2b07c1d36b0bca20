// Addresses of functions of the C library: in code and in data, compared with those that another object sees; weak ones.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef int (*Put)(const char *);
Put put_of_other(void);
Put table[] = {puts, (Put)strlen};
extern int absent(const char *) __attribute__((weak));
extern size_t strnlen(const char *, size_t) __attribute__((weak));

static int compare(const void *one, const void *other) { return strcmp(*(char *const *)one, *(char *const *)other); }

int main(void) {
    Put put = puts;
    put("called by its address");
    const char *words[] = {"b", "c", "a"};
    qsort(words, 3, sizeof *words, compare);
    printf("%s%s%s %d\n", words[0], words[1], words[2], table[1]("four"));
    printf("%d %d %d %d\n", put == put_of_other(), put == table[0], absent == 0, strnlen != 0);
    return 3;
}

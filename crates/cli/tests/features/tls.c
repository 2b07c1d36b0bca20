// Thread-local variables with and without values, in several sections, seen by threads, and shared with another object.
#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>

__thread int with_value = 42;
static __thread long local = 7;
__thread char zeros[3000];
__thread char in_another_section __attribute__((section(".tdata.more"))) = 'x';
extern __thread int of_other;
int *address_in_other(void);

static void *run(void *name) {
    printf("%s: %d %ld %d %c %d\n", (char *)name, with_value, local, zeros[2999], in_another_section, of_other);
    with_value++, local++, zeros[2999]++, in_another_section++, of_other++;
    errno = ENOENT;
    printf("%d %ld %d %c %d %d %d\n", with_value, local, zeros[2999], in_another_section, of_other, errno == ENOENT,
           address_in_other() == &of_other);
    return 0;
}

int main(void) {
    with_value = 1;
    for (int i = 0; i < 3; i++) {
        pthread_t thread;
        pthread_create(&thread, 0, run, "thread");
        pthread_join(thread, 0);
    }
    run("main");
    const char *tunables = getenv("GLIBC_TUNABLES"), *own = getenv("FARLINK_OLD_GLIBC_TUNABLES");
    printf("%s %s\n", tunables ? tunables : "none", own ? own : "none");
    return with_value;
}

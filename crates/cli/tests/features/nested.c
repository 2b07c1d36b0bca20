// A pointer to a nested function: code on the stack.
#include <pthread.h>
#include <stdio.h>

static int apply(int (*function)(int), int x) { return function(x); }

static void *run(void *start) {
    int add(int x) { return x + *(int *)start; }
    printf("%d\n", apply(add, 5));
    return 0;
}

int main(int argc, char **argv) {
    (void)argv;
    pthread_t thread;
    pthread_create(&thread, 0, run, &argc);
    pthread_join(thread, 0);
    run(&argc);
    return 0;
}

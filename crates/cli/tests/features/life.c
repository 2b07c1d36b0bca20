// Beginning and end, children, signals.
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <spawn.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

extern char **environ;

__attribute__((constructor(101))) static void first(void) { puts("first"); }
__attribute__((constructor(65000))) static void second(void) { puts("second"); }
__attribute__((constructor)) static void third(void) { puts("third"); }
__attribute__((destructor(101))) static void last(void) { puts("last"); }
__attribute__((destructor)) static void before_last(void) { puts("before last"); }
static void preinit(int argc, char **argv, char **env) { printf("preinit %d %d\n", argc, argv[0] && env[0]); }
__attribute__((section(".preinit_array"), used)) static void (*entry)(int, char **, char **) = preinit;
static void old_begin(void) { puts("old begin"); }
static void old_end(void) { puts("old end"); }
__attribute__((section(".ctors.64000"), used)) static void (*old_entry)(void) = old_begin;
__attribute__((section(".dtors.64000"), used)) static void (*old_exit)(void) = old_end;

// Fragments of functions, which start-up files begin and end natively.
__attribute__((used)) static void from_init(void) { puts("init"); }
__attribute__((used)) static void from_fini(void) { puts("fini"); }
__asm__(".pushsection .init, \"ax\"\n call from_init\n.popsection\n"
        ".pushsection .fini, \"ax\"\n call from_fini\n.popsection\n");

static void at_exit(void) { puts("at exit"); }
static void before_fork(void) { puts("before fork"); }
static volatile int signalled;
static void note(int number) { signalled = number; }
static jmp_buf target;
static void jump(int number) { longjmp(target, number); }

int main(void) {
    atexit(at_exit);
    pthread_atfork(before_fork, 0, 0);
    struct stat about;
    int status;
    printf("%d\n", stat("/", &about));
    fflush(stdout);
    pid_t child = fork();
    if (child == 0) {
        puts("child");
        fflush(stdout);
        _exit(3);
    }
    waitpid(child, &status, 0);
    printf("%d\n", WEXITSTATUS(status));
    signal(SIGUSR1, note);
    raise(SIGUSR1);
    signal(SIGUSR2, jump);
    if (setjmp(target) == 0)
        raise(SIGUSR2);
    char *arguments[] = {"false", 0};
    printf("%d %d\n", signalled == SIGUSR1, posix_spawnp(&child, "false", 0, 0, arguments, environ));
    waitpid(child, &status, 0);
    printf("%d %s\n", WEXITSTATUS(status), getenv("GLIBC_TUNABLES") ? "set" : "unset");
    fflush(stdout);
    if (fork() == 0)
        execlp("echo", "echo", "executed", (char *)0);
    wait(&status);
    exit(42);
}

// What a process that was not made by the C library's fork could have wrong: each check gives 0, or the line that fails.
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/rseq.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#define CHECK(condition) \
    if (!(condition)) return __LINE__

static volatile sig_atomic_t seen_by;

static void on_signal(int signal) {
    (void)signal;
    seen_by = gettid();
}

static int signals(void) {
    struct sigaction action = {.sa_handler = on_signal};
    CHECK(sigaction(SIGUSR1, &action, 0) == 0);
    seen_by = 0;
    CHECK(raise(SIGUSR1) == 0 && seen_by == gettid());
    seen_by = 0;
    CHECK(pthread_kill(pthread_self(), SIGUSR1) == 0 && seen_by == gettid());
    struct sched_param param;
    int policy;
    CHECK(pthread_getschedparam(pthread_self(), &policy, &param) == 0 && policy == sched_getscheduler(0));
    return 0;
}

static void *try_other(void *mutex) {
    long locked = pthread_mutex_trylock(mutex), unlocked = pthread_mutex_unlock(mutex);
    return (void *)(locked == EBUSY && unlocked == EPERM ? 0L : 1L);
}

static int mutexes(void) {
    pthread_mutexattr_t attributes;
    pthread_mutex_t mutex;
    pthread_t other;
    void *wrong;
    int kinds[] = {PTHREAD_MUTEX_RECURSIVE, PTHREAD_MUTEX_ERRORCHECK};
    for (int i = 0; i < 2; i++) {
        CHECK(pthread_mutexattr_init(&attributes) == 0 && pthread_mutexattr_settype(&attributes, kinds[i]) == 0);
        CHECK(pthread_mutex_init(&mutex, &attributes) == 0);
        CHECK(pthread_mutex_lock(&mutex) == 0 && mutex.__data.__owner == gettid());
        CHECK(pthread_mutex_lock(&mutex) == (i == 0 ? 0 : EDEADLK));
        CHECK(pthread_create(&other, 0, try_other, &mutex) == 0 && pthread_join(other, &wrong) == 0 && !wrong);
        CHECK(pthread_mutex_unlock(&mutex) == 0);
        CHECK(pthread_mutex_unlock(&mutex) == (i == 0 ? 0 : EPERM));
    }
    return 0;
}

static int restartable_sequences(void) {
    if (__rseq_size == 0) return 0;
    volatile struct rseq *area = (struct rseq *)((char *)__builtin_thread_pointer() + __rseq_offset);
    cpu_set_t all, one;
    CHECK(sched_getaffinity(0, sizeof all, &all) == 0);
    for (int cpu = 0; cpu < CPU_SETSIZE; cpu++) {
        if (!CPU_ISSET(cpu, &all)) continue;
        CPU_ZERO(&one);
        CPU_SET(cpu, &one);
        CHECK(sched_setaffinity(0, sizeof one, &one) == 0);
        CHECK(area->cpu_id == (unsigned)cpu && sched_getcpu() == cpu);
    }
    CHECK(sched_setaffinity(0, sizeof all, &all) == 0);
    return 0;
}

static int children(void) {
    pid_t child = fork();
    CHECK(child >= 0);
    if (child == 0) _exit(signals() == 0 && mutexes() == 0 && getpid() == gettid() ? 42 : 1);
    int status;
    CHECK(waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 42);
    return 0;
}

int check(void) {
    int line = signals();
    if (line == 0) line = mutexes();
    if (line == 0) line = restartable_sequences();
    if (line == 0) line = children();
    return line;
}

int main(int argc, char **argv) {
    const char *what = argc > 1 ? argv[1] : "";
    if (!strcmp(what, "check")) {
        CHECK(gettid() == getpid());
        return check();
    }
    if (!strcmp(what, "abort")) abort();
    if (!strcmp(what, "raise")) raise(SIGTERM);
    if (!strcmp(what, "exit")) exit(5);
    return -1;
}

static const char *log_path;

static void at_exit(void) {
    FILE *log = fopen(log_path, "a");
    fputs("the end\n", log);
}

int leave(const char *path) {
    log_path = strdup(path);
    return atexit(at_exit);
}

void *abort_there(void *none) {
    (void)none;
    abort();
}

// What a hardened executor may not do, as a bit each.
int escape(int sibling, int parent) {
    long page = sysconf(_SC_PAGESIZE);
    char *code = (char *)((long)&escape & -page);
    int done = 0;
    if (kill(sibling, 0) == 0) done |= 1;
    if (kill(parent, 0) == 0) done |= 2;
    if (mprotect(code, page, PROT_READ | PROT_WRITE) == 0) done |= 4;
    code = (char *)((long)&abort & -page);
    if (mprotect(code, page, PROT_READ | PROT_WRITE) == 0) done |= 8;
    if (mmap(0, page, PROT_READ | PROT_EXEC, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0) != MAP_FAILED) done |= 16;
    FILE *memory = fopen("/proc/self/mem", "r+");
    if (memory) done |= 32;
    char path[64];
    snprintf(path, sizeof path, "/proc/%d/mem", sibling);
    if (fopen(path, "r")) done |= 64;
    return done;
}

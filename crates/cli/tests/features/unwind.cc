// Unwinding: through frames and objects, out of signal handlers, for cancelled threads, to be looked at only.
#include <csignal>
#include <cstdio>
#include <cstring>
#include <pthread.h>
#include <stdexcept>
#include <unistd.h>
#include <unwind.h>

void call(void (*function)());
extern const char __start_throwing[], __stop_throwing[];

struct Scope {
    const char *name;
    ~Scope() { std::printf("end of %s\n", name); }
};

static _Unwind_Reason_Code count(_Unwind_Context *, void *frames) {
    ++*static_cast<int *>(frames);
    return _URC_NO_REASON;
}

__attribute__((noinline)) static int depth(int frames) {
    int result = 0;
    if (frames == 0)
        _Unwind_Backtrace(count, &result);
    else
        result = depth(frames - 1);
    asm volatile("" : "+r"(result));
    return result;
}

static void *wait_forever(void *) {
    Scope scope{"a cancelled thread"};
    for (;;)
        pause();
}

static void throw_from_signal(int) { throw std::runtime_error("thrown by a signal handler"); }

// In a section that is put together with that of the other object.
__attribute__((section("throwing"), used)) static void throw_through_object() {
    Scope scope{"a function"};
    throw std::runtime_error("thrown through another object");
}

int main() {
    std::printf("%d %d\n", depth(20) - depth(10), __stop_throwing > __start_throwing);
    pthread_t thread;
    void *result;
    pthread_create(&thread, nullptr, wait_forever, nullptr);
    usleep(50000);
    pthread_cancel(thread);
    pthread_join(thread, &result);
    std::printf("%d\n", result == PTHREAD_CANCELED);
    try {
        call(throw_through_object);
    } catch (const std::exception &error) {
        std::puts(error.what());
    }
#ifndef __clang__
    // Other compilers take it that a load cannot throw.
    struct sigaction action;
    std::memset(&action, 0, sizeof action);
    action.sa_handler = throw_from_signal;
    action.sa_flags = SA_NODEFER;
    sigaction(SIGSEGV, &action, nullptr);
    try {
        Scope scope{"a fault"};
        *reinterpret_cast<volatile int *>(16) = 1;
    } catch (const std::exception &error) {
        std::puts(error.what());
    }
#endif
    try {
        try {
            throw 5;
        } catch (int) {
            throw;
        }
    } catch (int number) {
        return number;
    }
}

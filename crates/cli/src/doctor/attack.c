/* Programs that try to get out of a hardened executor: to make code, to change code, to reach the controller.
 *
 * main(i) makes the attempt of that number and returns 0 if it was refused, 1 if it went through, 2 if it is of no use
 * here. The table below is also read as text, for the names: a row is a line. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/personality.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/shm.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

enum { PAGE = 4096 };
static char data[3 * PAGE] __attribute__((aligned(PAGE)));
static const unsigned char code[] = {0xb8, 0x2a, 0, 0, 0, 0xc3}; /* mov $42, %eax; ret */

__attribute__((noinline)) int victim(void) { return 41; }

static char *page_of(const void *at) { return (char *)((uintptr_t)at & ~(uintptr_t)(PAGE - 1)); }
static int went(int through) { return through ? 1 : 0; }

static int code_writable_and_executable(void) {
    return went(mprotect(page_of((void *)victim), PAGE, PROT_READ | PROT_WRITE | PROT_EXEC) == 0);
}
static int code_writable(void) { return went(mprotect(page_of((void *)victim), PAGE, PROT_READ | PROT_WRITE) == 0); }
static int data_executable(void) { return went(mprotect(page_of(data + PAGE), PAGE, PROT_READ | PROT_EXEC) == 0); }
static int stack_executable(void) {
    char here;
    return went(mprotect(page_of(&here), PAGE, PROT_READ | PROT_WRITE | PROT_EXEC) == 0);
}
static int anonymous(int prot) { return went(mmap(NULL, PAGE, prot, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0) != MAP_FAILED); }
static int map_writable_and_executable(void) { return anonymous(PROT_READ | PROT_WRITE | PROT_EXEC); }
static int map_executable(void) { return anonymous(PROT_READ | PROT_EXEC); }

static int map_code_of(int fd) {
    if (fd < 0 || write(fd, code, sizeof code) != sizeof code) return 0;
    void *at = mmap(NULL, PAGE, PROT_READ | PROT_EXEC, MAP_PRIVATE, fd, 0);
    close(fd);
    return went(at != MAP_FAILED);
}
static int map_file(void) {
    char name[] = "/tmp/farlink-attack-XXXXXX";
    int fd = mkstemp(name);
    unlink(name);
    return map_code_of(fd);
}
static int map_nameless_file(void) { return map_code_of(memfd_create("attack", 0)); }
static int map_nameless_file_that_is_no_program(void) { return map_code_of(memfd_create("attack", 8)); }
static int library(void) { return went(dlopen("libanl.so.1", RTLD_NOW) || dlopen("libresolv.so.2", RTLD_NOW)); }
static int system_v_memory(void) {
    int id = shmget(IPC_PRIVATE, PAGE, IPC_CREAT | 0700);
    if (id < 0) return 0;
    void *at = shmat(id, NULL, SHM_EXEC);
    shmctl(id, IPC_RMID, NULL);
    return went(at != (void *)-1);
}
static int reading_executes(void) { return went(personality(READ_IMPLIES_EXEC) != -1); }
static int unmap_code(void) { return went(munmap(page_of((void *)victim), PAGE) == 0); }
static int data_over_code(void) {
    int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED;
    return went(mmap(page_of((void *)victim), PAGE, PROT_READ | PROT_WRITE, flags, -1, 0) != MAP_FAILED);
}
static int move_code(void) {
    return went(mremap(page_of((void *)victim), PAGE, PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, data + PAGE) != MAP_FAILED);
}
static int second_view_of_code(void) {
    char *view = mremap(page_of((void *)victim), 0, PAGE, MREMAP_MAYMOVE);
    return went(view != MAP_FAILED && mprotect(view, PAGE, PROT_READ | PROT_WRITE) == 0);
}
static int other_pages_for_code(void) {
    return went(syscall(SYS_remap_file_pages, page_of((void *)victim), PAGE, 0, 64, 0) == 0);
}
static int zeros_for_code(void) { return went(madvise(page_of((void *)victim), PAGE, MADV_REMOVE) == 0); }
static int write_own_memory(void) {
    int fd = open("/proc/self/mem", O_RDWR);
    return went(fd >= 0 && pwrite(fd, code, sizeof code, (off_t)(uintptr_t)victim) == sizeof code);
}
static int write_library(void) {
    int fd = open("/proc/self/mem", O_RDWR);
    return went(fd >= 0 && pwrite(fd, code, 1, (off_t)(uintptr_t)dlsym(RTLD_DEFAULT, "abs")) == 1);
}

/* Calls f with every descriptor of memory that is shared with the controller, open or opened again to be written. */
static int each_object(int (*f)(int)) {
    char path[64], target[64];
    for (int fd = 3; fd < 200; fd++) {
        snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
        ssize_t len = readlink(path, target, sizeof target - 1);
        if (len < 0) continue;
        target[len] = 0;
        /* That of the report is for this process to write. */
        if (!strstr(target, "memfd:farlink") || lseek(fd, 0, SEEK_END) < 16 << 20) continue;
        if (f(fd)) return 1;
        int again = open(path, O_RDWR);
        if (again >= 0 && f(again)) return 1;
    }
    return 0;
}
static int map_to_write(int fd) {
    return mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0) != MAP_FAILED;
}
static int write_to(int fd) { return pwrite(fd, code, sizeof code, 0) == sizeof code; }
static int cut(int fd) { return ftruncate(fd, 0) == 0; }
static int grow(int fd) { return ftruncate(fd, (off_t)1 << 40) == 0; }
static int punch(int fd) { return fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, PAGE) == 0; }
static int map_shared_code_to_write(void) { return each_object(map_to_write); }
static int write_shared_code(void) { return each_object(write_to); }
static int cut_shared_memory(void) { return each_object(cut); }
static int grow_shared_memory(void) { return each_object(grow); }
static int punch_shared_memory(void) { return each_object(punch); }

/* Descriptors of memory through the list of mappings, which a privileged user can open. */
static int mappings_as_files(void) {
    char path[128];
    uintptr_t start = (uintptr_t)page_of((void *)victim);
    FILE *maps = fopen("/proc/self/maps", "r");
    unsigned long from = 0, to = 0;
    while (maps && fscanf(maps, "%lx-%lx%*[^\n]", &from, &to) == 2 && !(from <= start && start < to)) ;
    if (maps) fclose(maps);
    snprintf(path, sizeof path, "/proc/self/map_files/%lx-%lx", from, to);
    int fd = open(path, O_RDWR);
    return went(fd >= 0 && (map_to_write(fd) || write_to(fd)));
}

static int other_program(void) {
    pid_t pid = fork();
    if (pid == 0) {
        execl("/bin/true", "true", (char *)NULL);
        execl("/usr/bin/true", "true", (char *)NULL);
        _exit(9);
    }
    int status;
    waitpid(pid, &status, 0);
    return went(WIFEXITED(status) && WEXITSTATUS(status) == 0);
}
static int trace_controller(void) {
    if (ptrace(PTRACE_ATTACH, getppid(), NULL, NULL) != 0) return 0;
    waitpid(getppid(), NULL, 0);
    ptrace(PTRACE_DETACH, getppid(), NULL, NULL);
    return 1;
}
static int is_refused(void) { return errno == EPERM || errno == EACCES || errno == ENOSYS; }
static int write_controller(void) {
    struct iovec own = {data, 8}, other = {data, 8};
    return went(process_vm_writev(getppid(), &own, 1, &other, 1, 0) >= 0 || !is_refused());
}
static int read_controller(void) {
    struct iovec own = {data, 8}, other = {data, 8};
    return went(process_vm_readv(getppid(), &own, 1, &other, 1, 0) >= 0 || !is_refused());
}
static int open_controller(const char *what, int flags) {
    char path[64];
    snprintf(path, sizeof path, "/proc/%d/%s", getppid(), what);
    return went(open(path, flags) >= 0);
}
static int controllers_memory_to_write(void) { return open_controller("mem", O_RDWR); }
static int controllers_memory_to_read(void) { return open_controller("mem", O_RDONLY); }
static int controllers_descriptors(void) {
    int pidfd = syscall(SYS_pidfd_open, getppid(), 0);
    return went(pidfd >= 0 && syscall(SYS_pidfd_getfd, pidfd, 0, 0) >= 0);
}
static int controllers_files(void) { return open_controller("fd/0", O_RDONLY); }
static int signal_controller(void) { return went(kill(getppid(), SIGCONT) == 0); }
static int system_calls_past_the_filter(void) {
    char parameters[128] = {0};
    return went(syscall(425 /* io_uring_setup */, 4, parameters) >= 0);
}
static int system_calls_of_32_bits(void) {
    long result = 20; /* getpid */
    __asm__ volatile("int $0x80" : "+a"(result) : : "memory", "r8", "r9", "r10", "r11");
    return went((int)result > 0);
}
static int fresh_proc(void) {
    if (mkdtemp(strcpy(data, "/tmp/farlink-attack-XXXXXX")) == NULL) return 0;
    long result = syscall(SYS_mount, "proc", data, "proc", 0, NULL);
    if (result == 0) syscall(SYS_umount2, data, 2);
    rmdir(data);
    return went(result == 0);
}
static int new_privileges(void) { return went(prctl(PR_SET_NO_NEW_PRIVS, 0, 0, 0, 0) == 0); }

/* Sends a message to the controller over the connection: a result of a call that nobody made. The controller's answer to
 * that is what counts. */
static int forged(uint64_t length, uint64_t opcode, uint64_t sequence) {
    uint64_t frame[4] = {length, opcode, sequence, 0};
    for (int fd = 3; fd < 64; fd++) {
        struct sockaddr_un address;
        socklen_t size = sizeof address;
        if (getsockname(fd, (struct sockaddr *)&address, &size) == 0 && address.sun_family == AF_UNIX)
            if (send(fd, frame, sizeof frame, MSG_NOSIGNAL) == sizeof frame) pause();
    }
    return 2;
}
static int forged_result(void) { return forged(32, 2, 1u << 30); }
static int forged_setup(void) { return forged(32, 0, 0); }
static int forged_length(void) { return forged(UINT64_MAX, 2, 0); }

static const struct {
    const char *name;
    int (*attempt)(void);
} attempts[] = {
    {"code: make it writable and executable", code_writable_and_executable},
    {"code: make it writable", code_writable},
    {"code: unmap it", unmap_code},
    {"code: map data over it", data_over_code},
    {"code: move it", move_code},
    {"code: a second view that is writable", second_view_of_code},
    {"code: other pages of the object in its place", other_pages_for_code},
    {"code: zeros in its place", zeros_for_code},
    {"code: write it through /proc/self/mem", write_own_memory},
    {"code: write a library's through /proc/self/mem", write_library},
    {"code: open its mapping as a file", mappings_as_files},
    {"new code: make data executable", data_executable},
    {"new code: make the stack executable", stack_executable},
    {"new code: map memory that is writable and executable", map_writable_and_executable},
    {"new code: map memory that is executable", map_executable},
    {"new code: map a file", map_file},
    {"new code: map a file without a name", map_nameless_file},
    {"new code: map a file without a name that is no program", map_nameless_file_that_is_no_program},
    {"new code: load a library", library},
    {"new code: shared memory of System V", system_v_memory},
    {"new code: have all that is readable be executable", reading_executes},
    {"new code: run another program", other_program},
    {"shared memory: map code to write", map_shared_code_to_write},
    {"shared memory: write code through a descriptor", write_shared_code},
    {"shared memory: cut it off", cut_shared_memory},
    {"shared memory: make it longer", grow_shared_memory},
    {"shared memory: take pages out", punch_shared_memory},
    {"controller: trace it", trace_controller},
    {"controller: write its memory", write_controller},
    {"controller: read its memory", read_controller},
    {"controller: open its memory to write", controllers_memory_to_write},
    {"controller: open its memory to read", controllers_memory_to_read},
    {"controller: take its descriptors", controllers_descriptors},
    {"controller: open its files", controllers_files},
    {"controller: send it a signal", signal_controller},
    {"filter: system calls by io_uring", system_calls_past_the_filter},
    {"filter: system calls of 32 bits", system_calls_of_32_bits},
    {"filter: another /proc", fresh_proc},
    {"filter: new privileges again", new_privileges},
    {"connection: forge a result", forged_result},
    {"connection: begin the session again", forged_setup},
    {"connection: a message without end", forged_length},
};

enum { COUNT = sizeof attempts / sizeof *attempts };

int main(int argc, char **argv) {
    (void)argc;
    int index = atoi(argv[1]);
    memset(data, 1, sizeof data);
    if (index < 0 || index >= COUNT) return 3;
    return attempts[index].attempt();
}

// What the machine itself charges.   floor_peer SECTION OBJDIR [EXECUTOR...]
// SECTION: rtt, asleep, mem, bulk, proc, publish, minlink, cmd
#include "common.h"
#include <atomic>
#include <dlfcn.h>
#include <elf.h>
#include <fcntl.h>
#include <immintrin.h>
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <spawn.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <thread>
#include <unordered_map>
extern char **environ;

static int futexWait(std::atomic<uint32_t> *A, uint32_t V) {
  return syscall(SYS_futex, A, FUTEX_WAIT, V, nullptr, nullptr, 0);
}
static void futexWake(std::atomic<uint32_t> *A) {
  syscall(SYS_futex, A, FUTEX_WAKE, 1, nullptr, nullptr, 0);
}

struct Shared {
  alignas(64) std::atomic<uint32_t> Req{0};
  alignas(64) std::atomic<uint32_t> Rep{0};
  alignas(64) uint64_t Payload = 0;
  alignas(64) std::atomic<uint32_t> SleepReq{0};
  alignas(64) std::atomic<uint32_t> SleepRep{0};
};
static Shared *newShared() {
  return new (mmap(nullptr, 4096, PROT_READ | PROT_WRITE,
                   MAP_SHARED | MAP_ANONYMOUS, -1, 0)) Shared;
}

// ---- round trips -------------------------------------------------------------
// Each carries an 8-byte message there and an 8-byte answer (+1) back.
enum Place { Unpinned, TwoCores, OneCore };
static const char *placeName(Place P) {
  return P == Unpinned ? "unpinned" : P == TwoCores ? "pinned_2cores" : "pinned_1core";
}
template <typename Server, typename Client>
static void rtt(const char *Name, Place P, int N, Server Srv, Client Cli, unsigned PauseUs = 0) {
  pid_t Me = getpid(), C = fork();
  if (C == 0) {
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (getppid() != Me)
      _exit(0);
    if (P != Unpinned)
      pinTo(P == TwoCores ? 1 : 0);
    Srv();
    _exit(0);
  }
  cpu_set_t Old;
  sched_getaffinity(0, sizeof Old, &Old);
  if (P != Unpinned)
    pinTo(0);
  std::vector<double> T;
  for (int I = 0; I < N + N / 10; ++I) {
    if (PauseUs)
      usleep(PauseUs);
    uint64_t T0 = nowNs();
    uint64_t R = Cli(uint64_t(I));
    uint64_t D = nowNs() - T0;
    CHECK(R == uint64_t(I) + 1, "%s", Name);
    if (I >= N / 10)
      T.push_back(D);
  }
  kill(C, SIGKILL);
  waitpid(C, nullptr, 0);
  sched_setaffinity(0, sizeof Old, &Old);
  std::string M = std::string("rtt_") + Name + "_" + placeName(P);
  emitSamples("floor", M.c_str(), "ns", T);
}
// The round trip of a Unix socket when the other side has slept for 1 ms.
static void sectionAsleep() {
  for (Place P : {Unpinned, TwoCores, OneCore}) {
    int S[2];
    CHECK(socketpair(AF_UNIX, SOCK_STREAM, 0, S) == 0, "sp");
    rtt("unix_socket_asleep", P, 500,
        [&] { uint64_t V; while (read(S[1], &V, 8) == 8) { ++V; CHECK(write(S[1], &V, 8) == 8, "w"); } },
        [&](uint64_t V) { CHECK(write(S[0], &V, 8) == 8 && read(S[0], &V, 8) == 8, "rw"); return V; }, 1000);
    close(S[0]), close(S[1]);
  }
}
static void spinUntil(std::atomic<uint32_t> &A, uint32_t V) {
  while (A.load(std::memory_order_acquire) != V)
    _mm_pause();
}
// Spin for a while, then sleep in futex; the waker only calls the kernel if the
// other side said that it sleeps.
static void hybridWait(std::atomic<uint32_t> &A, std::atomic<uint32_t> &Sleeps,
                       uint32_t V, int Spins) {
  for (int I = 0; I < Spins; ++I) {
    if (A.load(std::memory_order_acquire) == V)
      return;
    _mm_pause();
  }
  Sleeps.store(1, std::memory_order_seq_cst);
  uint32_t Cur;
  while ((Cur = A.load(std::memory_order_seq_cst)) != V)
    futexWait(&A, Cur);
  Sleeps.store(0, std::memory_order_relaxed);
}
static void hybridPost(std::atomic<uint32_t> &A, std::atomic<uint32_t> &Sleeps,
                       uint32_t V) {
  A.store(V, std::memory_order_seq_cst);
  if (Sleeps.load(std::memory_order_seq_cst))
    futexWake(&A);
}
static void sectionRtt() {
  const int N = 4000;
  for (Place P : {TwoCores, Unpinned, OneCore}) {
    {
      int A[2], B[2];
      CHECK(pipe(A) == 0 && pipe(B) == 0, "pipe");
      rtt("pipe_pair", P, N,
          [&] { uint64_t V; while (read(A[0], &V, 8) == 8) { ++V; CHECK(write(B[1], &V, 8) == 8, "w"); } },
          [&](uint64_t V) { CHECK(write(A[1], &V, 8) == 8 && read(B[0], &V, 8) == 8, "rw"); return V; });
      for (int F : {A[0], A[1], B[0], B[1]}) close(F);
    }
    {
      int S[2];
      CHECK(socketpair(AF_UNIX, SOCK_STREAM, 0, S) == 0, "sp");
      rtt("unix_socket", P, N,
          [&] { uint64_t V; while (read(S[1], &V, 8) == 8) { ++V; CHECK(write(S[1], &V, 8) == 8, "w"); } },
          [&](uint64_t V) { CHECK(write(S[0], &V, 8) == 8 && read(S[0], &V, 8) == 8, "rw"); return V; });
      close(S[0]), close(S[1]);
    }
    {
      int A = eventfd(0, 0), B = eventfd(0, 0);
      Shared *S = newShared();
      rtt("eventfd_pair", P, N,
          [&] { uint64_t V; while (read(A, &V, 8) == 8) { S->Payload++; V = 1; CHECK(write(B, &V, 8) == 8, "w"); } },
          [&](uint64_t V) { S->Payload = V; uint64_t One = 1; CHECK(write(A, &One, 8) == 8 && read(B, &One, 8) == 8, "rw"); return S->Payload; });
      close(A), close(B), munmap(S, 4096);
    }
    {
      Shared *S = newShared();
      rtt("futex", P, N,
          [&] {
            for (uint32_t K = 1;; ++K) {
              uint32_t C;
              while ((C = S->Req.load()) != K) futexWait(&S->Req, C);
              S->Payload++;
              S->Rep.store(K);
              futexWake(&S->Rep);
            }
          },
          [&, K = 0u](uint64_t V) mutable {
            ++K;
            S->Payload = V;
            S->Req.store(K);
            futexWake(&S->Req);
            uint32_t C;
            while ((C = S->Rep.load()) != K) futexWait(&S->Rep, C);
            return S->Payload;
          });
      munmap(S, 4096);
    }
    if (P != OneCore) {
      Shared *S = newShared();
      rtt("spin_then_futex", P, N,
          [&] { for (uint32_t K = 1;; ++K) { hybridWait(S->Req, S->SleepReq, K, 2000); S->Payload++; hybridPost(S->Rep, S->SleepRep, K); } },
          [&, K = 0u](uint64_t V) mutable { ++K; S->Payload = V; hybridPost(S->Req, S->SleepReq, K); hybridWait(S->Rep, S->SleepRep, K, 2000); return S->Payload; });
      munmap(S, 4096);
      S = newShared();
      rtt("spin", P, N,
          [&] { for (uint32_t K = 1;; ++K) { spinUntil(S->Req, K); S->Payload++; S->Rep.store(K, std::memory_order_release); } },
          [&, K = 0u](uint64_t V) mutable { ++K; S->Payload = V; S->Req.store(K, std::memory_order_release); spinUntil(S->Rep, K); return S->Payload; });
      munmap(S, 4096);
    }
  }
}

// ---- memory calls -------------------------------------------------------------
template <typename F> static void timed(const char *M, int N, F Fn) {
  std::vector<double> T;
  for (int I = 0; I < N; ++I) {
    uint64_t T0 = nowNs();
    Fn(I);
    T.push_back(nowNs() - T0);
  }
  emitSamples("floor", M, "ns", T);
}
static int newMemfd(size_t N) {
  int F = memfd_create("floor", MFD_CLOEXEC);
  CHECK(F >= 0 && ftruncate(F, N) == 0, "memfd");
  return F;
}
static void sectionMem() {
  const int N = 4000;
  const int RW = PROT_READ | PROT_WRITE, RX = PROT_READ | PROT_EXEC;
  static char Page[4096];
  memset(Page, 0x5a, sizeof Page);
  pinTo(0);
  timed("clock_overhead", N, [&](int) {});
  timed("getppid_syscall", N, [&](int) { syscall(SYS_getppid); });
  timed("memcpy_4KiB_hot", N, [&](int) { static char D[4096]; memcpy(D, Page, 4096); __asm__ volatile("" ::"r"(D) : "memory"); });

  { // mprotect of one touched page
    char *P = (char *)mmap(nullptr, 4096, RW, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    P[0] = 1;
    std::vector<double> A, B;
    for (int I = 0; I < N; ++I) {
      uint64_t T0 = nowNs();
      CHECK(mprotect(P, 4096, RX) == 0, "mp");
      uint64_t T1 = nowNs();
      CHECK(mprotect(P, 4096, RW) == 0, "mp");
      uint64_t T2 = nowNs();
      P[0] = 2;
      A.push_back(T1 - T0), B.push_back(T2 - T1);
    }
    emitSamples("floor", "mprotect_rw_to_rx_own_vma", "ns", A);
    emitSamples("floor", "mprotect_rx_to_rw_own_vma", "ns", B);
  }
  for (bool Shm : {false, true}) { // splitting pages off one big mapping
    int F = Shm ? newMemfd(size_t(N) * 8192) : -1;
    char *P = (char *)mmap(nullptr, size_t(N) * 8192, RW, Shm ? MAP_SHARED : MAP_PRIVATE | MAP_ANONYMOUS, F, 0);
    for (int I = 0; I < 2 * N; ++I) P[I * 4096] = 1;
    timed(Shm ? "mprotect_rw_to_rx_split_memfd" : "mprotect_rw_to_rx_split_anon", N,
          [&](int I) { CHECK(mprotect(P + size_t(I) * 8192, 4096, RX) == 0, "mp"); });
    munmap(P, size_t(N) * 8192);
    if (F >= 0) close(F);
  }
  { // the same while another thread runs on the other core (TLB shootdown)
    std::atomic<bool> Stop{false};
    std::atomic<uint64_t> Sink{0};
    char *P = (char *)mmap(nullptr, size_t(N) * 8192, RW, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    for (int I = 0; I < 2 * N; ++I) P[I * 4096] = 1;
    std::thread T([&] { pinTo(1); while (!Stop) for (int I = 0; I < 64; ++I) Sink += P[I * 8192 + 4096]; });
    usleep(2000);
    timed("mprotect_rw_to_rx_split_anon_2threads", N,
          [&](int I) { CHECK(mprotect(P + size_t(I) * 8192, 4096, RX) == 0, "mp"); });
    Stop = true;
    T.join();
    munmap(P, size_t(N) * 8192);
  }
  timed("mmap_munmap_4KiB_untouched", N, [&](int) {
    void *P = mmap(nullptr, 4096, RW, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    munmap(P, 4096);
  });
  timed("mmap_touch_munmap_4KiB", N, [&](int) {
    char *P = (char *)mmap(nullptr, 4096, RW, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    P[0] = 1;
    munmap(P, 4096);
  });
  timed("memfd_create_map_copy_unmap_close_4KiB", N / 4, [&](int) {
    int F = newMemfd(4096);
    char *P = (char *)mmap(nullptr, 4096, RW, MAP_SHARED, F, 0);
    memcpy(P, Page, 4096);
    munmap(P, 4096);
    close(F);
  });
  timed("memfd_reserve_map_1GiB_unmap_close", 200, [&](int) {
    int F = newMemfd(size_t(1) << 30);
    void *P = mmap(nullptr, size_t(1) << 30, RW, MAP_SHARED, F, 0);
    munmap(P, size_t(1) << 30);
    close(F);
  });
  { // first touches
    char *P = (char *)mmap(nullptr, size_t(N) * 4096, RW, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    madvise(P, size_t(N) * 4096, MADV_NOHUGEPAGE);
    timed("first_touch_anon_page", N, [&](int I) { P[size_t(I) * 4096] = 1; });
    munmap(P, size_t(N) * 4096);
    size_t Len = size_t(N) * 4096;
    int F = newMemfd(Len);
    P = (char *)mmap(nullptr, Len, RW, MAP_SHARED, F, 0);
    timed("first_touch_memfd_page_writer", N, [&](int I) { memcpy(P + size_t(I) * 4096, Page, 4096); });
    timed("again_memfd_page_writer_4KiB_copy", N, [&](int I) { memcpy(P + size_t(I) * 4096, Page, 4096); });
    volatile char Sink = 0;
    char *Q = (char *)mmap(nullptr, Len, PROT_READ, MAP_SHARED, F, 0);
    uint64_t T9 = nowNs();
    for (int I = 0; I < N; ++I) Sink += Q[size_t(I) * 4096];
    emitOne("floor", "first_touch_memfd_reader_in_order_per_page", "ns", (nowNs() - T9) / double(N));
    munmap(Q, Len);
    Q = (char *)mmap(nullptr, Len, RX, MAP_SHARED, F, 0);
    // one touch per 64 KiB, the kernel's fault-around window: every one faults
    timed("first_touch_memfd_reader_isolated_fault", N / 16, [&](int I) { Sink += Q[size_t(I) * 65536]; });
    munmap(Q, Len);
    Q = (char *)mmap(nullptr, Len, RX, MAP_SHARED, F, 0);
    uint64_t T0 = nowNs();
    CHECK(madvise(Q, Len, MADV_POPULATE_READ) == 0, "populate");
    emitOne("floor", "populate_read_existing_memfd_per_page", "ns", (nowNs() - T0) / double(N));
    munmap(Q, Len);
    T0 = nowNs();
    CHECK(fallocate(F, 3 /*PUNCH_HOLE|KEEP_SIZE*/, 0, Len) == 0, "punch");
    emitOne("floor", "punch_hole_memfd_per_page_bulk", "ns", (nowNs() - T0) / double(N));
    T0 = nowNs();
    CHECK(madvise(P, Len, MADV_POPULATE_WRITE) == 0, "populate");
    emitOne("floor", "populate_write_fresh_memfd_per_page", "ns", (nowNs() - T0) / double(N));
    timed("punch_hole_one_memfd_page", N / 4, [&](int I) { CHECK(fallocate(F, 3, size_t(I) * 4096, 4096) == 0, "punch"); });
    munmap(P, Len);
    close(F);
  }
}

// ---- bulk copies ---------------------------------------------------------------
static void sectionBulk(const std::string &Objs) {
  const size_t Len = 256u << 20;
  char *Src = (char *)mmap(nullptr, Len, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  uint64_t X = 88172645463325252ull;
  for (size_t I = 0; I < Len; I += 8) {
    X ^= X << 13, X ^= X >> 7, X ^= X << 17;
    memcpy(Src + I, &X, 8);
  }
  auto Rate = [&](uint64_t Ns, size_t N) { return N / 1e6 / (Ns / 1e9); };
  auto Sz = readFile(Objs + "/sqlite3.o");
  std::vector<double> Fresh;
  for (int K = 0; K < 20; ++K) {
    uint64_t T0 = nowNs();
    int F = newMemfd(Sz.size());
    char *P = (char *)mmap(nullptr, Sz.size(), PROT_READ | PROT_WRITE, MAP_SHARED, F, 0);
    memcpy(P, Sz.data(), Sz.size());
    Fresh.push_back(nowNs() - T0);
    CHECK(!memcmp(P, Sz.data(), Sz.size()), "copy");
    munmap(P, Sz.size());
    close(F);
  }
  emitSamples("floor", "memcpy_sqlite3_o_to_fresh_memfd", "ns", Fresh);
  struct { const char *Name; bool Populate, Huge, Anon; } Kinds[] = {
      {"memfd", false, false, false}, {"memfd_populate", true, false, false},
      {"memfd_hugepage_advice", false, true, false}, {"anon", false, false, true},
      {"anon_hugepage_advice", false, true, true}};
  std::vector<double> FreshR[5], AgainR[5];
  for (int Rep = 0; Rep < 10; ++Rep) {
    auto &K = Kinds[Rep % 5];
    uint64_t T0 = nowNs();
    int F = K.Anon ? -1 : newMemfd(Len);
    char *P = (char *)mmap(nullptr, Len + (2 << 20), PROT_READ | PROT_WRITE,
                           K.Anon ? MAP_PRIVATE | MAP_ANONYMOUS : MAP_SHARED, F, 0);
    madvise(P, Len, K.Huge ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
    if (K.Populate)
      CHECK(madvise(P, Len, MADV_POPULATE_WRITE) == 0, "populate");
    for (size_t O = 0; O < Len; O += 1 << 20)
      memcpy(P + O, Src + O, 1 << 20);
    uint64_t T1 = nowNs();
    CHECK(!memcmp(P, Src, Len), "copy");
    uint64_t T2 = nowNs();
    for (size_t O = 0; O < Len; O += 1 << 20)
      memcpy(P + O, Src + O, 1 << 20);
    uint64_t T3 = nowNs();
    FreshR[Rep % 5].push_back(Rate(T1 - T0, Len));
    AgainR[Rep % 5].push_back(Rate(T3 - T2, Len));
    munmap(P, Len + (2 << 20));
    if (F >= 0) close(F);
  }
  for (int I = 0; I < 5; ++I) {
    emitSamples("floor", (std::string("memcpy_256MiB_fresh_") + Kinds[I].Name).c_str(), "MB/s", FreshR[I]);
    emitSamples("floor", (std::string("memcpy_256MiB_again_") + Kinds[I].Name).c_str(), "MB/s", AgainR[I]);
  }
  // Copying transports: pipe, socket, process_vm_writev to another process.
  for (int Kind = 0; Kind < 3; ++Kind) {
    char *Dst = (char *)mmap(nullptr, Len, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    madvise(Dst, Len, MADV_NOHUGEPAGE);
    int S[2], Done[2];
    CHECK(pipe(Done) == 0, "pipe");
    if (Kind == 0) CHECK(pipe(S) == 0, "pipe");
    if (Kind == 1) { int T[2]; CHECK(socketpair(AF_UNIX, SOCK_STREAM, 0, T) == 0, "sp"); S[0] = T[0], S[1] = T[1]; }
    pid_t Me = getpid(), C = fork();
    if (C == 0) {
      prctl(PR_SET_PDEATHSIG, SIGKILL);
      if (getppid() != Me) _exit(0);
      for (int Round = 0; Round < 2; ++Round) {
        if (Kind < 2) {
          size_t G = 0;
          while (G < Len) { ssize_t R = read(S[0], Dst + G, std::min<size_t>(Len - G, 1 << 20)); if (R <= 0) _exit(1); G += R; }
        } else {
          char B; if (read(Done[0], &B, 1) != 1) _exit(1); // parent wrote our memory
        }
        char Ok = !memcmp(Dst, Src, Len);
        if (Kind < 2) { if (write(Done[1], &Ok, 1) != 1) _exit(1); }
        else _exit(Ok ? 0 : 1);
      }
      _exit(0);
    }
    const char *Nm = Kind == 0 ? "pipe" : Kind == 1 ? "unix_socket" : "process_vm_writev";
    if (Kind < 2) {
      // the answer includes a compare; time only until the last byte is taken
      uint64_t T0 = nowNs();
      for (size_t G = 0; G < Len;) { ssize_t W = write(S[1], Src + G, std::min<size_t>(Len - G, 1 << 20)); CHECK(W > 0, "w"); G += W; }
      uint64_t T1 = nowNs();
      char Ok; CHECK(read(Done[0], &Ok, 1) == 1 && Ok, "%s content", Nm);
      emitOne("floor", (std::string("transfer_256MiB_fresh_") + Nm).c_str(), "MB/s", Rate(T1 - T0, Len));
      kill(C, SIGKILL);
      waitpid(C, nullptr, 0);
      close(S[0]), close(S[1]);
    } else {
      uint64_t T0 = nowNs();
      for (size_t O = 0; O < Len; O += 1 << 20) {
        iovec L{Src + O, 1 << 20}, R{Dst + O, 1 << 20};
        CHECK(process_vm_writev(C, &L, 1, &R, 1, 0) == 1 << 20, "pvw");
      }
      uint64_t T1 = nowNs();
      CHECK(write(Done[1], "x", 1) == 1, "w");
      int St; waitpid(C, &St, 0);
      CHECK(St == 0, "process_vm_writev content");
      emitOne("floor", (std::string("transfer_256MiB_fresh_") + Nm).c_str(), "MB/s", Rate(T1 - T0, Len));
    }
    close(Done[0]), close(Done[1]);
    munmap(Dst, Len);
  }
}

// ---- processes and threads -------------------------------------------------------
static void spawnWait(char *const *Argv) {
  pid_t P;
  CHECK(posix_spawn(&P, Argv[0], nullptr, nullptr, Argv, environ) == 0, "%s", Argv[0]);
  waitpid(P, nullptr, 0);
}
static void sectionProc(int argc, char **argv) {
  timed("thread_create_join", 2000, [&](int) { std::thread T([] {}); T.join(); });
  std::atomic<uint32_t> Flag{0};
  timed("thread_detached_signals_back_by_futex", 2000, [&](int I) {
    std::thread([&, I] { Flag.store(I + 1); futexWake(&Flag); }).detach();
    uint32_t C;
    while ((C = Flag.load()) != uint32_t(I + 1)) futexWait(&Flag, C);
  });
  timed("fork_exit_wait", 300, [&](int) { pid_t P = fork(); if (!P) _exit(0); waitpid(P, nullptr, 0); });
  int Null = open("/dev/null", O_WRONLY);
  dup2(Null, 2);
  for (int I = 0; I < argc; ++I) {
    char *A[] = {argv[I], nullptr};
    std::string B = argv[I];
    B = B.substr(B.rfind('/') + 1);
    timed(("spawn_exit_wait_" + B).c_str(), 30, [&](int) { spawnWait(A); });
  }
}

// Wall time of a command whose output is known: cmd OBJDIR PEER METRIC N EXPECT CMD...
static void sectionCmd(char **A) {
  gPeer = A[0];
  std::vector<double> T;
  std::string Expect = A[3];
  for (int I = 0; I < atoi(A[2]); ++I) {
    int P[2];
    CHECK(pipe2(P, O_CLOEXEC) == 0, "pipe");
    posix_spawn_file_actions_t FA;
    posix_spawn_file_actions_init(&FA);
    posix_spawn_file_actions_adddup2(&FA, P[1], 1);
    uint64_t T0 = nowNs();
    pid_t C;
    CHECK(posix_spawnp(&C, A[4], &FA, nullptr, A + 4, environ) == 0, "%s", A[4]);
    close(P[1]);
    std::string Out;
    char B[256];
    for (ssize_t R; (R = read(P[0], B, sizeof B)) > 0;) Out.append(B, R);
    int St;
    waitpid(C, &St, 0);
    T.push_back(nowNs() - T0);
    CHECK(St == 0 && Out == Expect + "\n", "status %d output %s", St, Out.c_str());
    close(P[0]);
    posix_spawn_file_actions_destroy(&FA);
  }
  emitSamples("W7", A[1], "ns", T);
}

// ---- link by publishing ------------------------------------------------------------
// A dual-mapped, prefaulted slab: the controller copies 32 bytes of code and 8
// of data into the writable view, announces it, and the other process calls it
// through its executable view.  No system call in the spin variant.
static const unsigned char kTiny[32] = {
    0x51, 0x48, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xd0, 0x48, 0xb9, 0, 0, 0, 0,
    0,    0,    0,    0, 0x03, 0x01, 0x59, 0xc3, 0x90, 0x90, 0x90, 0x90, 0x90};
static void sectionPublish() {
  const int N = 8000;
  const size_t Len = size_t(N) * 2 * 64 + (1 << 20);
  for (int Mode = 0; Mode < 3; ++Mode) { // 0 spin, 1 spin then futex, 2 futex
    int F = newMemfd(Len);
    char *W = (char *)mmap(nullptr, Len, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, F, 0);
    char *Xm = (char *)mmap(nullptr, Len, PROT_READ | PROT_EXEC, MAP_SHARED | MAP_POPULATE, F, 0);
    Shared *S = newShared();
    const int Spins = Mode == 0 ? 1 << 30 : Mode == 1 ? 2000 : 0;
    pid_t Me = getpid(), C = fork(); // the child has both views at the same addresses
    if (C == 0) {
      prctl(PR_SET_PDEATHSIG, SIGKILL);
      if (getppid() != Me) _exit(0);
      pinTo(1);
      CHECK(madvise(Xm, Len, MADV_POPULATE_READ) == 0, "populate");
      for (uint32_t K = 1;; ++K) {
        hybridWait(S->Req, S->SleepReq, K, Spins);
        int64_t Arg = int64_t(S->Payload);
        S->Payload = uint64_t(((int (*)(int))(Xm + size_t(K - 1) * 64))(int(Arg)));
        hybridPost(S->Rep, S->SleepRep, K);
      }
    }
    cpu_set_t Old;
    sched_getaffinity(0, sizeof Old, &Old);
    pinTo(0);
    usleep(20000);
    std::vector<double> TP, TC;
    for (int I = 0; I < N; ++I) {
      char *D = W + size_t(I) * 64;
      uint64_t T0 = nowNs();
      unsigned char B[40];
      memcpy(B, kTiny, 32);
      uint64_t Fn = (uint64_t)(int (*)(int)) & abs, Da = (uint64_t)(Xm + size_t(I) * 64 + 32), V = 1000 + 7 * I;
      memcpy(B + 3, &Fn, 8), memcpy(B + 15, &Da, 8), memcpy(B + 32, &V, 8);
      memcpy(D, B, 40);
      uint64_t T1 = nowNs();
      S->Payload = uint64_t(int64_t(-I));
      hybridPost(S->Req, S->SleepReq, I + 1);
      hybridWait(S->Rep, S->SleepRep, I + 1, Spins);
      int R = int(S->Payload);
      uint64_t T2 = nowNs();
      CHECK(R == tinyExpect(I, -I), "publish %d: %d", I, R);
      TP.push_back(T1 - T0), TC.push_back(T2 - T0);
    }
    kill(C, SIGKILL);
    waitpid(C, nullptr, 0);
    sched_setaffinity(0, sizeof Old, &Old);
    const char *Nm = Mode == 0 ? "spin" : Mode == 1 ? "spin_then_futex" : "futex";
    emitSamples("floor", (std::string("publish_tiny_write_only_") + Nm).c_str(), "ns", TP);
    emitSamples("floor", (std::string("publish_tiny_and_call_") + Nm).c_str(), "ns", TC);
    munmap(W, Len), munmap(Xm, Len), munmap(S, 4096);
    close(F);
  }
}

// ---- the least a linker can do ------------------------------------------------------
// Parses one ELF object, lays out its sections, resolves symbols in a hash
// table, applies its relocations and returns; the memory comes from a
// dual-mapped slab (no system call per object) or from mmap + mprotect.
struct MinLink {
  struct Slab {
    char *W = nullptr, *X = nullptr;
    size_t Len = 0, Used = 0;
  } S;
  bool PerObject;
  std::unordered_map<std::string, uint64_t> Syms;
  MinLink(size_t Len, bool PerObject, bool Prefault) : PerObject(PerObject) {
    if (PerObject)
      return;
    int F = newMemfd(Len);
    int Fl = MAP_SHARED | (Prefault ? MAP_POPULATE : 0);
    S.W = (char *)mmap(nullptr, Len, PROT_READ | PROT_WRITE, Fl, F, 0);
    // Executable and readable for all: in a real system the views differ per
    // segment; the cost of the copies and relocations is the same.
    S.X = (char *)mmap(nullptr, Len, PROT_READ | PROT_WRITE | PROT_EXEC, Fl, F, 0);
    S.Len = Len;
    close(F);
  }
  ~MinLink() { if (S.W) munmap(S.W, S.Len), munmap(S.X, S.Len); }
  uint64_t ext(const char *N) {
    auto I = Syms.find(N);
    if (I != Syms.end())
      return I->second;
    uint64_t A = (uint64_t)dlsym(RTLD_DEFAULT, N);
    Syms.emplace(N, A);
    return A;
  }
  struct Placed { char *Base = nullptr; size_t Len = 0; };
  Placed add(const std::vector<char> &O) {
    auto *E = (const Elf64_Ehdr *)O.data();
    auto *Sh = (const Elf64_Shdr *)(O.data() + E->e_shoff);
    int NSh = E->e_shnum;
    std::vector<size_t> Off(NSh, ~size_t(0));
    size_t At = 0, SegEnd[3];
    const Elf64_Sym *Sym = nullptr;
    size_t NSym = 0, NGot = 0;
    const char *Str = nullptr;
    for (int I = 0; I < NSh; ++I) {
      if (Sh[I].sh_type == SHT_SYMTAB) {
        Sym = (const Elf64_Sym *)(O.data() + Sh[I].sh_offset);
        NSym = Sh[I].sh_size / sizeof *Sym;
        Str = O.data() + Sh[Sh[I].sh_link].sh_offset;
      }
    }
    std::vector<uint64_t> Val(NSym, 0);
    std::vector<uint32_t> Got(NSym, 0); // 1-based GOT slot
    for (int I = 0; I < NSh; ++I)
      if (Sh[I].sh_type == SHT_RELA) {
        auto *R = (const Elf64_Rela *)(O.data() + Sh[I].sh_offset);
        for (size_t K = 0; K < Sh[I].sh_size / sizeof *R; ++K) {
          uint32_t T = ELF64_R_TYPE(R[K].r_info), Y = ELF64_R_SYM(R[K].r_info);
          bool Need = T == R_X86_64_GOTPCREL || T == R_X86_64_GOTPCRELX || T == R_X86_64_REX_GOTPCRELX ||
                      (T == R_X86_64_PLT32 && Sym[Y].st_shndx == SHN_UNDEF);
          if (Need && !Got[Y])
            Got[Y] = ++NGot;
        }
      }
    size_t StubOff = 0, GotOff = 0;
    for (int Seg = 0; Seg < 3; ++Seg) { // RX, R, RW
      for (int I = 0; I < NSh; ++I) {
        if (!(Sh[I].sh_flags & SHF_ALLOC) || !Sh[I].sh_size) continue;
        int K = Sh[I].sh_flags & SHF_EXECINSTR ? 0 : Sh[I].sh_flags & SHF_WRITE ? 2 : 1;
        if (K != Seg) continue;
        size_t A = Sh[I].sh_addralign ? Sh[I].sh_addralign : 1;
        At = (At + A - 1) & ~(A - 1);
        Off[I] = At;
        At += Sh[I].sh_size;
      }
      if (Seg == 0) StubOff = At = (At + 15) & ~size_t(15), At += NGot * 8;
      if (Seg == 1) GotOff = At = (At + 7) & ~size_t(7), At += NGot * 8;
      if (PerObject) At = (At + 4095) & ~size_t(4095);
      SegEnd[Seg] = At;
    }
    char *W, *X;
    size_t Len = (At + 63) & ~size_t(63);
    if (PerObject) {
      W = X = (char *)mmap(nullptr, Len, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
      CHECK(X != MAP_FAILED, "mmap");
    } else {
      CHECK(S.Used + Len <= S.Len, "slab full");
      W = S.W + S.Used, X = S.X + S.Used;
      S.Used += (Len + 4095) < 8192 ? Len : (Len + 4095) & ~size_t(4095);
    }
    for (int I = 0; I < NSh; ++I)
      if (Off[I] != ~size_t(0)) {
        if (Sh[I].sh_type == SHT_NOBITS) memset(W + Off[I], 0, Sh[I].sh_size);
        else memcpy(W + Off[I], O.data() + Sh[I].sh_offset, Sh[I].sh_size);
      }
    for (size_t I = 1; I < NSym; ++I) {
      const Elf64_Sym &Y = Sym[I];
      if (Y.st_shndx == SHN_UNDEF) {
        if (*(Str + Y.st_name)) Val[I] = ext(Str + Y.st_name);
      } else if (Y.st_shndx < SHN_LORESERVE && Off[Y.st_shndx] != ~size_t(0)) {
        Val[I] = (uint64_t)X + Off[Y.st_shndx] + Y.st_value;
        if (ELF64_ST_BIND(Y.st_info) == STB_GLOBAL) Syms[Str + Y.st_name] = Val[I];
      }
    }
    for (size_t I = 0; I < NSym; ++I)
      if (Got[I]) {
        size_t G = GotOff + (Got[I] - 1) * 8, P = StubOff + (Got[I] - 1) * 8;
        memcpy(W + G, &Val[I], 8);
        int32_t D = int32_t(int64_t(G) - int64_t(P + 6));
        W[P] = char(0xff), W[P + 1] = 0x25;
        memcpy(W + P + 2, &D, 4);
      }
    for (int I = 0; I < NSh; ++I)
      if (Sh[I].sh_type == SHT_RELA && Off[Sh[I].sh_info] != ~size_t(0)) {
        auto *R = (const Elf64_Rela *)(O.data() + Sh[I].sh_offset);
        size_t B = Off[Sh[I].sh_info];
        for (size_t K = 0; K < Sh[I].sh_size / sizeof *R; ++K) {
          uint32_t T = ELF64_R_TYPE(R[K].r_info), Y = ELF64_R_SYM(R[K].r_info);
          uint64_t P = (uint64_t)X + B + R[K].r_offset, V = Val[Y] + R[K].r_addend;
          char *At2 = W + B + R[K].r_offset;
          switch (T) {
          case R_X86_64_64: memcpy(At2, &V, 8); break;
          case R_X86_64_GOTPCREL: case R_X86_64_GOTPCRELX: case R_X86_64_REX_GOTPCRELX:
            V = (uint64_t)X + GotOff + (Got[Y] - 1) * 8 + R[K].r_addend; goto Rel;
          case R_X86_64_PLT32:
            if (Got[Y]) V = (uint64_t)X + StubOff + (Got[Y] - 1) * 8 + R[K].r_addend;
            [[fallthrough]];
          case R_X86_64_PC32: Rel: {
            int64_t D = int64_t(V - P);
            CHECK(D == int32_t(D), "range %u", T);
            int32_t D4 = int32_t(D);
            memcpy(At2, &D4, 4);
            break;
          }
          default: CHECK(false, "relocation %u", T);
          }
        }
      }
    if (PerObject) {
      CHECK(mprotect(X, SegEnd[0], PROT_READ | PROT_EXEC) == 0, "mp");
      if (SegEnd[1] > SegEnd[0]) CHECK(mprotect(X + SegEnd[0], SegEnd[1] - SegEnd[0], PROT_READ) == 0, "mp");
    }
    return {X, Len};
  }
};
static void sectionMinlink(const std::string &Objs) {
  std::vector<std::vector<char>> Tiny;
  for (int I = 0; I < 1000; ++I) Tiny.push_back(readFile(Objs + "/tiny/" + tinyName(I) + ".o"));
  auto Big = readFile(Objs + "/sqlite3.o"), Chk = readFile(Objs + "/sqcheck.o");
  for (bool Per : {false, true}) {
    const char *Sfx = Per ? "_mmap_mprotect_each" : "_slab";
    for (bool Prefault : {true, false}) {
      if (Per && Prefault) continue;
      MinLink L(16 << 20, Per, Prefault);
      L.ext("abs");
      std::vector<double> T;
      std::vector<uint64_t> A;
      std::vector<MinLink::Placed> Pl;
      for (int I = 0; I < 1000; ++I) {
        std::string N = tinyName(I);
        uint64_t T0 = nowNs();
        Pl.push_back(L.add(Tiny[I]));
        A.push_back(L.ext(N.c_str()));
        T.push_back(nowNs() - T0);
      }
      for (int I = 0; I < 1000; ++I) CHECK(((int (*)(int))A[I])(-I) == tinyExpect(I, -I), "tiny %d", I);
      emitSamples("floor", (std::string("minlink_tiny") + Sfx + (Per ? "" : Prefault ? "_prefaulted" : "_cold")).c_str(), "ns", T);
      if (Per) {
        T.clear();
        for (auto &P : Pl) { uint64_t T0 = nowNs(); munmap(P.Base, P.Len); T.push_back(nowNs() - T0); }
        emitSamples("floor", "minlink_tiny_munmap_each", "ns", T);
      }
    }
    std::vector<double> T;
    for (int K = 0; K < 15; ++K) {
      uint64_t T0 = nowNs();
      MinLink L(8 << 20, Per, false);
      L.add(Big);
      uint64_t A = L.ext("sqlite3_open");
      T.push_back(nowNs() - T0);
      CHECK(A, "sqlite3_open");
      L.add(Chk);
      CHECK(((int (*)(int))L.ext("sq_check"))(100) == 4950, "sq_check");
    }
    emitSamples("floor", (std::string("minlink_sqlite3") + Sfx).c_str(), "ns", T);
    auto F4 = readFile(Objs + "/funcs_4000.o");
    T.clear();
    for (int K = 0; K < 15; ++K) {
      uint64_t T0 = nowNs();
      MinLink L(8 << 20, Per, false);
      L.add(F4);
      uint64_t A = L.ext("f4000");
      T.push_back(nowNs() - T0);
      CHECK(((int (*)(int))A)(41) == 42, "f4000");
    }
    emitSamples("floor", (std::string("minlink_4000_functions") + Sfx).c_str(), "ns", T);
  }
}

int main(int argc, char **argv) {
  CHECK(argc >= 3, "usage");
  gPeer = "floor";
  std::string S = argv[1], Objs = argv[2];
  if (S == "rtt") sectionRtt();
  else if (S == "asleep") sectionAsleep();
  else if (S == "mem") sectionMem();
  else if (S == "bulk") sectionBulk(Objs);
  else if (S == "proc") sectionProc(argc - 3, argv + 3);
  else if (S == "cmd") sectionCmd(argv + 3);
  else if (S == "publish") sectionPublish();
  else if (S == "minlink") sectionMinlink(Objs);
  else CHECK(false, "section");
}

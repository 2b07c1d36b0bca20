// Shared by the C++ peers: clock, sample output, process memory readings.
// Every peer prints JSON lines {peer, workload, metric, unit, samples:[...]}
// or {peer, workload, fact, text}; driver.py pools them into statistics.
#pragma once
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <string>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>
#include <vector>

static inline uint64_t nowNs() {
  timespec T;
  clock_gettime(CLOCK_MONOTONIC, &T);
  return uint64_t(T.tv_sec) * 1000000000ull + uint64_t(T.tv_nsec);
}

static std::string gPeer;

static void emitSamples(const char *Workload, const char *Metric,
                        const char *Unit, const std::vector<double> &S) {
  if (S.empty())
    return;
  printf("{\"peer\":\"%s\",\"workload\":\"%s\",\"metric\":\"%s\",\"unit\":\"%s\",\"samples\":[",
         gPeer.c_str(), Workload, Metric, Unit);
  for (size_t I = 0; I < S.size(); ++I)
    printf(I ? ",%.6g" : "%.6g", S[I]);
  printf("]}\n");
  fflush(stdout);
}
static void emitOne(const char *W, const char *M, const char *U, double V) {
  emitSamples(W, M, U, {V});
}
[[maybe_unused]] static void emitFact(const char *W, const char *Fact,
                                      std::string Text) {
  std::string E;
  for (char C : Text) {
    if (C == '"' || C == '\\')
      E += '\\', E += C;
    else if (C == '\n')
      E += "; ";
    else if ((unsigned char)C >= 32)
      E += C;
  }
  printf("{\"peer\":\"%s\",\"workload\":\"%s\",\"fact\":\"%s\",\"text\":\"%s\"}\n",
         gPeer.c_str(), W, Fact, E.c_str());
  fflush(stdout);
}

// A failed sanity check ends the program: no number survives a wrong result.
#define CHECK(COND, ...)                                                       \
  do {                                                                         \
    if (!(COND)) {                                                             \
      fprintf(stderr, "CHECK failed %s:%d: %s: ", __FILE__, __LINE__, #COND);  \
      fprintf(stderr, __VA_ARGS__);                                            \
      fprintf(stderr, "\n");                                                   \
      fflush(nullptr);                                                         \
      _exit(3);                                                                \
    }                                                                          \
  } while (0)

static std::vector<char> readFile(const std::string &P) {
  std::ifstream F(P, std::ios::binary);
  CHECK(F.good(), "%s", P.c_str());
  return {std::istreambuf_iterator<char>(F), std::istreambuf_iterator<char>()};
}

struct MemNow {
  double PssAnon = 0, PssShmem = 0, Pte = 0, Vmas = 0; // bytes, bytes, bytes, count
  MemNow operator-(const MemNow &O) const {
    return {PssAnon - O.PssAnon, PssShmem - O.PssShmem, Pte - O.Pte,
            Vmas - O.Vmas};
  }
  MemNow operator+(const MemNow &O) const {
    return {PssAnon + O.PssAnon, PssShmem + O.PssShmem, Pte + O.Pte,
            Vmas + O.Vmas};
  }
};
[[maybe_unused]] static MemNow memOf(pid_t P) {
  MemNow M;
  std::string D = "/proc/" + std::to_string(P), L;
  std::ifstream R(D + "/smaps_rollup");
  while (std::getline(R, L)) {
    if (L.rfind("Pss_Anon:", 0) == 0)
      M.PssAnon = atof(L.c_str() + 9) * 1024;
    if (L.rfind("Pss_Shmem:", 0) == 0)
      M.PssShmem = atof(L.c_str() + 10) * 1024;
  }
  std::ifstream S(D + "/status");
  while (std::getline(S, L))
    if (L.rfind("VmPTE:", 0) == 0)
      M.Pte = atof(L.c_str() + 6) * 1024;
  std::ifstream Q(D + "/maps");
  while (std::getline(Q, L))
    M.Vmas += 1;
  return M;
}
[[maybe_unused]] static double rssOf(pid_t P) { // bytes resident
  std::ifstream R("/proc/" + std::to_string(P) + "/smaps_rollup");
  std::string L;
  while (std::getline(R, L))
    if (L.rfind("Rss:", 0) == 0)
      return atof(L.c_str() + 4) * 1024;
  return 0;
}
// CPU time of a process with all its threads, also those that ended, in ns
// (in steps of 10 ms: divide by many operations).
struct CpuNow {
  double User = 0, Sys = 0;
};
[[maybe_unused]] static CpuNow cpuOf(pid_t P) {
  std::ifstream S("/proc/" + std::to_string(P) + "/stat");
  std::string L;
  std::getline(S, L);
  size_t I = L.rfind(')');
  CpuNow C;
  if (I == std::string::npos)
    return C;
  unsigned long U = 0, K = 0;
  sscanf(L.c_str() + I + 2, "%*c %*d %*d %*d %*d %*d %*u %*u %*u %*u %*u %lu %lu", &U, &K);
  double Tick = 1e9 / sysconf(_SC_CLK_TCK);
  C.User = U * Tick, C.Sys = K * Tick;
  return C;
}
[[maybe_unused]] static void emitMem(const char *W, const char *Who,
                                     const MemNow &D, double N) {
  std::string P = Who;
  emitOne(W, (P + "_pss_anon_per_obj").c_str(), "bytes", D.PssAnon / N);
  emitOne(W, (P + "_pss_shmem_per_obj").c_str(), "bytes", D.PssShmem / N);
  emitOne(W, (P + "_pte_per_obj").c_str(), "bytes", D.Pte / N);
  emitOne(W, (P + "_vmas_per_obj").c_str(), "count", D.Vmas / N);
}

[[maybe_unused]] static void pinTo(int Cpu) {
  cpu_set_t S;
  CPU_ZERO(&S);
  CPU_SET(Cpu, &S);
  sched_setaffinity(0, sizeof S, &S);
}

// Reads another process's memory (for sanity checks of what was transferred).
[[maybe_unused]] static void readRemote(pid_t P, uint64_t Addr, void *Dst,
                                        size_t N) {
  iovec L{Dst, N}, R{(void *)Addr, N};
  ssize_t G = process_vm_readv(P, &L, 1, &R, 1, 0);
  CHECK(G == (ssize_t)N, "process_vm_readv pid %d addr %lx: %zd", (int)P,
        (unsigned long)Addr, G);
}

static inline int tinyExpect(int I, int X) { return abs(X) + 1000 + 7 * I; }
[[maybe_unused]] static std::string tinyName(int I) {
  char B[32];
  snprintf(B, sizeof B, "tiny_%04d", I);
  return B;
}

// An object whose names have a number of eight zeros, with another number.
[[maybe_unused]] static std::string digits(int I) {
  char B[32];
  snprintf(B, sizeof B, "%08d", I);
  return B;
}
[[maybe_unused]] static std::vector<char> numbered(std::vector<char> O, int I) {
  static const std::string Zeros = "_00000000";
  std::string D = "_" + digits(I);
  int N = 0;
  for (size_t At = 0; At + Zeros.size() <= O.size(); ++At)
    if (!memcmp(&O[At], Zeros.data(), Zeros.size()))
      memcpy(&O[At], D.data(), D.size()), ++N;
  CHECK(N > 0, "no number to replace");
  return O;
}

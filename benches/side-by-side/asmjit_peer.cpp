// asmjit's JitAllocator.   asmjit_peer (asmjit-rwx|asmjit-dual) WORKLOAD [N]
// No object parsing: allocate, copy code and data, patch two addresses.
#include "common.h"
#include <asmjit/core.h>
#include <sched.h>

using namespace asmjit;

static const unsigned char kTiny[32] = {
    0x51, 0x48, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, // push rcx; movabs rax, abs
    0xff, 0xd0,                               // call rax
    0x48, 0xb9, 0, 0, 0, 0, 0, 0, 0, 0,       // movabs rcx, data
    0x03, 0x01, 0x59, 0xc3,                   // add eax,[rcx]; pop rcx; ret
    0x90, 0x90, 0x90, 0x90, 0x90};
static char gFill[4096];

struct Alloc {
  JitAllocator A;
  explicit Alloc(JitAllocator::CreateParams &P) : A(&P) {}
  void get(size_t N, char *&Rx, char *&Rw) {
    void *X = nullptr, *W = nullptr;
    CHECK(A.alloc(&X, &W, N) == kErrorOk, "alloc");
    Rx = (char *)X, Rw = (char *)W;
  }
  char *place(int I) {
    char *Rx, *Rw;
    get(64, Rx, Rw);
    VirtMem::ProtectJitReadWriteScope Scope(Rx, 64); // flushes icache at exit
    unsigned char C[32];
    memcpy(C, kTiny, 32);
    uint64_t F = (uint64_t)(int (*)(int)) & abs, D = (uint64_t)Rx + 32,
             V = 1000 + 7 * I;
    memcpy(C + 3, &F, 8);
    memcpy(C + 15, &D, 8);
    memcpy(Rw, C, 32);
    memcpy(Rw + 32, &V, 8);
    return Rx;
  }
};

static void w1(JitAllocator::CreateParams &P, int N) {
  std::vector<double> T, R, B;
  std::vector<char *> At;
  {
    Alloc A(P);
    MemNow M0 = memOf(getpid());
    for (int I = 0; I < N; ++I) {
      uint64_t T0 = nowNs();
      At.push_back(A.place(I));
      T.push_back(nowNs() - T0);
    }
    emitMem("W1", "controller", memOf(getpid()) - M0, N);
    for (int I = 0; I < N; ++I)
      CHECK(((int (*)(int))At[I])(-I) == tinyExpect(I, -I), "tiny %d", I);
    for (char *X : At) {
      uint64_t T0 = nowNs();
      CHECK(A.A.release(X) == kErrorOk, "release");
      R.push_back(nowNs() - T0);
    }
    emitMem("W1", "after_remove", memOf(getpid()) - M0, N);
  }
  emitSamples("W1", "link_one", "ns", T);
  emitSamples("W1", "remove_one", "ns", R);
  for (int K = 0; K < 5; ++K) {
    Alloc A(P);
    uint64_t T0 = nowNs();
    for (int I = 0; I < N; ++I)
      A.place(I);
    B.push_back(nowNs() - T0);
  }
  emitSamples("W2", "link_all", "ns", B);
}

static char *pairOf(Alloc &A, size_t Sz, double *T, char **Second) {
  uint64_t T0 = nowNs();
  char *CX, *CW, *DX, *DW;
  A.get(Sz, CX, CW);
  A.get(Sz, DX, DW);
  uint64_t T1 = nowNs();
  for (size_t O = 0; O < Sz; O += 4096)
    memcpy(CW + O, gFill, 4096), memcpy(DW + O, gFill, 4096);
  VirtMem::flushInstructionCache(CX, Sz);
  uint64_t T2 = nowNs();
  if (T)
    T[0] = T1 - T0, T[1] = T2 - T1;
  CHECK(CX[Sz - 1] == gFill[4095] && DX[17] == gFill[17], "content");
  *Second = DX;
  return CX;
}
static void cycles(Alloc &A, int N, size_t Sz, const std::string &Tag,
                   bool Split) {
  std::vector<double> TA, TF, TD, TC;
  for (int I = 0; I < N; ++I) {
    double T[2];
    char *D, *C = pairOf(A, Sz, T, &D);
    uint64_t T0 = nowNs();
    A.A.release(C);
    A.A.release(D);
    double R = nowNs() - T0;
    TA.push_back(T[0]), TF.push_back(T[1]), TD.push_back(R),
        TC.push_back(T[0] + T[1] + R);
  }
  emitSamples("W5", (Tag + "cycle").c_str(), "ns", TC);
  if (Split) {
    emitSamples("W5", "alloc", "ns", TA);
    emitSamples("W5", "fill", "ns", TF);
    emitSamples("W5", "dealloc", "ns", TD);
  }
}
static void w5scale(JitAllocator::CreateParams &P, int N) {
  Alloc A(P);
  std::vector<std::pair<char *, char *>> Live;
  for (int L : {100, 1000, 10000}) {
    while ((int)Live.size() < L) {
      char *D, *C = pairOf(A, 4096, nullptr, &D);
      Live.push_back({C, D});
    }
    cycles(A, N, 4096, "live" + std::to_string(L) + "_", false);
  }
  std::vector<double> T;
  for (size_t I = 0; I < Live.size(); I += 2) {
    uint64_t T0 = nowNs();
    A.A.release(Live[I].first);
    A.A.release(Live[I].second);
    T.push_back(nowNs() - T0);
  }
  emitSamples("W5", "dealloc_at_10k_live", "ns", T);
  cycles(A, N, 8192, "holes5k_16KiB_", false);
}
static void w6(JitAllocator::CreateParams &P) {
  const size_t Seg = 1 << 20, NSeg = 256;
  std::vector<char> Src(Seg * NSeg);
  uint64_t X = 88172645463325252ull;
  for (size_t I = 0; I + 8 <= Src.size(); I += 8) {
    X ^= X << 13, X ^= X >> 7, X ^= X << 17;
    memcpy(&Src[I], &X, 8);
  }
  Alloc A(P);
  std::vector<double> First, Warm;
  for (int K = 0; K < 3; ++K) {
    std::vector<char *> At;
    uint64_t T0 = nowNs();
    for (size_t I = 0; I < NSeg; ++I) {
      char *Rx, *Rw;
      A.get(Seg, Rx, Rw);
      memcpy(Rw, &Src[I * Seg], Seg);
      At.push_back(Rx);
    }
    (K ? Warm : First).push_back(Src.size() / 1e6 / ((nowNs() - T0) / 1e9));
    for (size_t I = 0; I < NSeg; ++I) {
      CHECK(!memcmp(At[I], &Src[I * Seg], Seg), "segment");
      A.A.release(At[I]);
    }
  }
  emitSamples("W6", "first_256MiB_rate", "MB/s", First);
  emitSamples("W6", "again_256MiB_rate", "MB/s", Warm);
}

int main(int argc, char **argv) {
  CHECK(argc >= 3, "usage");
  gPeer = argv[1];
  std::string W = argv[2];
  JitAllocator::CreateParams P{};
  if (gPeer == "asmjit-dual")
    P.options |= JitAllocatorOptions::kUseDualMapping;
  for (size_t I = 0; I < sizeof gFill; ++I)
    gFill[I] = char(I * 31 + (I >> 8) + 1);
  int N = argc > 3 ? atoi(argv[3]) : 0;
  if (W == "W1") w1(P, N ? N : 1000);
  else if (W == "W5") { Alloc A(P); cycles(A, N ? N : 10000, 4096, "", true); }
  else if (W == "W5scale") w5scale(P, N ? N : 300);
  else if (W == "W6") w6(P);
  else CHECK(false, "workload %s", W.c_str());
}

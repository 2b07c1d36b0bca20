// No JIT linker at all: a static linker with -shared, dlopen, dlsym.
//   dl_peer (ld.bfd|ld.lld|mold) WORKLOAD OBJDIR TMPDIR [N]
#include "common.h"
#include <dlfcn.h>
#include <sched.h>
#include <spawn.h>
#include <sys/wait.h>
extern char **environ;

static std::string gLd, gObjs, gTmp;

static void link(const std::vector<std::string> &In, const std::string &Out) {
  std::vector<std::string> A = {gLd, "-shared", "-o", Out};
  A.insert(A.end(), In.begin(), In.end());
  std::vector<char *> V;
  for (auto &S : A)
    V.push_back(S.data());
  V.push_back(nullptr);
  pid_t P;
  CHECK(posix_spawnp(&P, gLd.c_str(), nullptr, nullptr, V.data(), environ) == 0,
        "%s", gLd.c_str());
  int St;
  waitpid(P, &St, 0);
  CHECK(St == 0, "%s status %d", gLd.c_str(), St);
}

static void w1(int N) {
  std::vector<double> T, TL, TD, TR;
  std::vector<void *> H;
  std::vector<int (*)(int)> F;
  MemNow M0;
  for (int I = 0; I < N; ++I) {
    std::string O = gObjs + "/tiny/" + tinyName(I) + ".o",
                So = gTmp + "/" + tinyName(I) + ".so", S = tinyName(I);
    uint64_t T0 = nowNs();
    link({O}, So);
    uint64_t T1 = nowNs();
    void *D = dlopen(So.c_str(), RTLD_NOW | RTLD_LOCAL);
    CHECK(D, "%s", dlerror());
    auto *Fn = (int (*)(int))dlsym(D, S.c_str());
    uint64_t T2 = nowNs();
    if (I == 0)
      M0 = memOf(getpid());
    CHECK(Fn, "dlsym");
    H.push_back(D), F.push_back(Fn);
    T.push_back(T2 - T0), TL.push_back(T1 - T0), TD.push_back(T2 - T1);
  }
  emitMem("W1", "controller", memOf(getpid()) - M0, N - 1);
  for (int I = 0; I < N; ++I)
    CHECK(F[I](-I) == tinyExpect(I, -I), "tiny %d", I);
  for (void *D : H) {
    uint64_t T0 = nowNs();
    CHECK(dlclose(D) == 0, "dlclose");
    TR.push_back(nowNs() - T0);
  }
  emitSamples("W1", "link_one", "ns", T);
  emitSamples("W1", "linker_only", "ns", TL);
  emitSamples("W1", "dlopen_dlsym_only", "ns", TD);
  emitSamples("W1", "remove_one", "ns", TR);
}

static void w2(int N) {
  std::string Rsp = gTmp + "/all.rsp", So = gTmp + "/all.so";
  FILE *R = fopen(Rsp.c_str(), "w");
  for (int I = 0; I < N; ++I)
    fprintf(R, "%s/tiny/%s.o\n", gObjs.c_str(), tinyName(I).c_str());
  fclose(R);
  std::vector<double> T, TL, TR;
  for (int K = 0; K < 3; ++K) {
    uint64_t T0 = nowNs();
    link({"@" + Rsp}, So);
    uint64_t T1 = nowNs();
    void *D = dlopen(So.c_str(), RTLD_NOW | RTLD_LOCAL);
    CHECK(D, "%s", dlerror());
    std::vector<int (*)(int)> F;
    for (int I = 0; I < N; ++I)
      F.push_back((int (*)(int))dlsym(D, tinyName(I).c_str()));
    uint64_t T2 = nowNs();
    T.push_back(T2 - T0), TL.push_back(T1 - T0);
    for (int I = 0; I < N; ++I)
      CHECK(F[I](-I) == tinyExpect(I, -I), "tiny %d", I);
    uint64_t T3 = nowNs();
    dlclose(D);
    TR.push_back(nowNs() - T3);
    unlink(So.c_str());
  }
  emitSamples("W2", "link_all", "ns", T);
  emitSamples("W2", "linker_only", "ns", TL);
  emitSamples("W2", "remove_all", "ns", TR);
}

static void w3() {
  auto Sz = readFile(gObjs + "/sqlite3.o").size();
  std::string So = gTmp + "/sqlite3.so";
  std::vector<double> T, TL, MBs;
  for (int K = 0; K < 4; ++K) {
    uint64_t T0 = nowNs();
    link({gObjs + "/sqlite3.o", gObjs + "/sqcheck.o"}, So);
    uint64_t T1 = nowNs();
    void *D = dlopen(So.c_str(), RTLD_NOW | RTLD_LOCAL);
    CHECK(D, "%s", dlerror());
    void *A = dlsym(D, "sqlite3_open");
    uint64_t T2 = nowNs();
    CHECK(A, "sqlite3_open");
    CHECK(((int (*)(int))dlsym(D, "sq_check"))(100) == 4950, "sq_check");
    dlclose(D);
    unlink(So.c_str());
    T.push_back(T2 - T0), TL.push_back(T1 - T0);
    MBs.push_back(Sz / 1e6 / ((T2 - T0) / 1e9));
  }
  emitSamples("W3", "link_warm", "ns", T);
  emitSamples("W3", "linker_only", "ns", TL);
  emitSamples("W3", "link_warm_rate", "MB/s", MBs);
}

// Many objects with unwind information, linked into one: an exception passes
// through a function of one of them.
static void w8(int N) {
  auto Template = readFile(gObjs + "/thru.o");
  std::string Rsp = gTmp + "/thru.rsp", So = gTmp + "/thru.so";
  FILE *R = fopen(Rsp.c_str(), "w");
  fprintf(R, "%s/throw.o\n", gObjs.c_str());
  for (int I = 0; I < N; ++I) {
    std::string P = gTmp + "/thru_" + digits(I) + ".o";
    auto O = numbered(Template, I);
    std::ofstream(P, std::ios::binary).write(O.data(), O.size());
    fprintf(R, "%s\n", P.c_str());
  }
  fclose(R);
  uint64_t T0 = nowNs();
  // lld and mold keep the unwind information's table only if they are told to.
  link({"--eh-frame-hdr", "@" + Rsp}, So);
  void *D = dlopen(So.c_str(), RTLD_NOW | RTLD_LOCAL);
  CHECK(D, "%s", dlerror());
  auto *F = (int (*)(int))dlsym(D, "throw_time");
  emitOne("W8", "link_all", "ns", nowNs() - T0);
  CHECK(F, "throw_time");
  std::vector<double> T;
  for (int I = 0; I < 301; ++I) {
    int Time = F(I); // in tens of nanoseconds
    CHECK(Time >= 0, "the exception was not caught");
    T.push_back(Time * 10.0);
  }
  emitOne("W8", "first_throw", "ns", T[0]);
  T.erase(T.begin());
  emitSamples("W8", "later_throw", "ns", T);
  dlclose(D);
  unlink(So.c_str());
  for (int I = 0; I < N; ++I)
    unlink((gTmp + "/thru_" + digits(I) + ".o").c_str());
}

int main(int argc, char **argv) {
  CHECK(argc >= 5, "usage");
  gLd = argv[1];
  gPeer = "dlopen-" + gLd;
  std::string W = argv[2];
  gObjs = argv[3], gTmp = argv[4];
  int N = argc > 5 ? atoi(argv[5]) : 0;
  if (W == "W1") w1(N ? N : 40);
  else if (W == "W2") w2(N ? N : 1000);
  else if (W == "W3") w3();
  else if (W == "W8") w8(N ? N : 20000);
  else CHECK(false, "workload %s", W.c_str());
}

// LLVM 19 JITLink + ORC, in one process and across two.
//
//   llvm_peer CONFIG WORKLOAD [--n N] [--iters K] [--objs DIR] [--slab BYTES]
//
// CONFIG
//   inproc          InProcessMemoryManager
//   inproc-mapper   MapperJITLinkMemoryManager<InProcessMemoryMapper>
//   oop-copy        SimpleRemoteEPC + EPCGenericJITLinkMemoryManager
//   oop-shm         SimpleRemoteEPC + MapperJITLinkMemoryManager<SharedMemoryMapper>
//   *-tuned         the same, but with no thread created per message on either
//                   side (InPlaceTaskDispatcher here, own executor there)
// A further suffix "+eh" registers unwind info of every object.
#include "common.h"
#include "llvm/ExecutionEngine/JITLink/EHFrameSupport.h"
#include "llvm/ExecutionEngine/JITLink/JITLinkMemoryManager.h"
#include "llvm/ExecutionEngine/Orc/Core.h"
#include "llvm/ExecutionEngine/Orc/EPCDynamicLibrarySearchGenerator.h"
#include "llvm/ExecutionEngine/Orc/EPCEHFrameRegistrar.h"
#include "llvm/ExecutionEngine/Orc/EPCGenericJITLinkMemoryManager.h"
#include "llvm/ExecutionEngine/Orc/MapperJITLinkMemoryManager.h"
#include "llvm/ExecutionEngine/Orc/MemoryMapper.h"
#include "llvm/ExecutionEngine/Orc/ObjectLinkingLayer.h"
#include "llvm/ExecutionEngine/Orc/Shared/OrcRTBridge.h"
#include "llvm/ExecutionEngine/Orc/SimpleRemoteEPC.h"
#include "llvm/Support/Error.h"
#include "llvm/Support/MemoryBuffer.h"
#include "llvm/Support/TargetSelect.h"
#include <atomic>
#include <fcntl.h>
#include <map>
#include <signal.h>
#include <spawn.h>
#include <sys/wait.h>

using namespace llvm;
using namespace llvm::orc;
using namespace llvm::jitlink;
extern char **environ;

static ExitOnError OrDie("llvm_peer: ");

struct Options {
  std::string Config, Workload, Objs = ".", StockExecutor, TunedExecutor;
  int N = 1000, Iters = 0;
  size_t Slab = size_t(1) << 30; // what llvm-jitlink reserves at a time
  bool OOP = false, Mapper = false, Tuned = false, EH = false;
} Opt;

// ---- transport that counts the messages sent to the executor --------------
struct Counts {
  std::atomic<uint64_t> Calls{0}, Bytes{0};
  std::mutex M;
  std::map<uint64_t, uint64_t> ByTag;
} gCounts;

class CountingTransport : public SimpleRemoteEPCTransport {
  std::unique_ptr<FDSimpleRemoteEPCTransport> T;

public:
  static Expected<std::unique_ptr<CountingTransport>>
  Create(SimpleRemoteEPCTransportClient &C, int In, int Out) {
    auto Inner = FDSimpleRemoteEPCTransport::Create(C, In, Out);
    if (!Inner)
      return Inner.takeError();
    auto R = std::make_unique<CountingTransport>();
    R->T = std::move(*Inner);
    return std::move(R);
  }
  Error start() override { return T->start(); }
  void disconnect() override { T->disconnect(); }
  Error sendMessage(SimpleRemoteEPCOpcode OpC, uint64_t Seq, ExecutorAddr Tag,
                    ArrayRef<char> Args) override {
    if (OpC == SimpleRemoteEPCOpcode::CallWrapper) {
      gCounts.Calls++;
      gCounts.Bytes += Args.size();
      std::lock_guard<std::mutex> L(gCounts.M);
      gCounts.ByTag[Tag.getValue()]++;
    }
    return T->sendMessage(OpC, Seq, Tag, Args);
  }
};

// ---- a JIT session in one configuration -----------------------------------
static Expected<std::unique_ptr<JITLinkMemoryManager>>
makeSharedMM(SimpleRemoteEPC &EPC) {
  SharedMemoryMapper::SymbolAddrs A;
  if (auto E = EPC.getBootstrapSymbols(
          {{A.Instance, rt::ExecutorSharedMemoryMapperServiceInstanceName},
           {A.Reserve, rt::ExecutorSharedMemoryMapperServiceReserveWrapperName},
           {A.Initialize,
            rt::ExecutorSharedMemoryMapperServiceInitializeWrapperName},
           {A.Deinitialize,
            rt::ExecutorSharedMemoryMapperServiceDeinitializeWrapperName},
           {A.Release,
            rt::ExecutorSharedMemoryMapperServiceReleaseWrapperName}}))
    return std::move(E);
  auto M = MapperJITLinkMemoryManager::CreateWithMapper<SharedMemoryMapper>(
      Opt.Slab, EPC, A);
  if (!M)
    return M.takeError();
  return std::move(*M);
}

static pid_t spawnExecutor(int &InFD, int &OutFD) {
  int To[2], From[2];
  CHECK(pipe(To) == 0 && pipe(From) == 0, "pipe");
  if (Opt.Tuned) // a listener that also writes must never find the pipe full
    fcntl(To[1], F_SETPIPE_SZ, 1 << 20), fcntl(From[0], F_SETPIPE_SZ, 1 << 20);
  fcntl(To[1], F_SETFD, FD_CLOEXEC);
  fcntl(From[0], F_SETFD, FD_CLOEXEC);
  std::string Exe = Opt.Tuned ? Opt.TunedExecutor : Opt.StockExecutor;
  std::string Arg =
      "filedescs=" + std::to_string(To[0]) + "," + std::to_string(From[1]);
  char *Argv[] = {Exe.data(), Arg.data(), nullptr};
  pid_t P = -1;
  int E = posix_spawn(&P, Exe.c_str(), nullptr, nullptr, Argv, environ);
  CHECK(E == 0, "posix_spawn %s: %s", Exe.c_str(), strerror(E));
  close(To[0]);
  close(From[1]);
  InFD = From[0];
  OutFD = To[1];
  return P;
}

static std::unique_ptr<TaskDispatcher> makeDispatcher() {
  // What llvm-jitlink uses. Registering unwind information waits for an answer,
  // which a single thread that also reads answers would never get.
  if (Opt.OOP && (!Opt.Tuned || Opt.EH))
    return std::make_unique<DynamicThreadPoolTaskDispatcher>(std::nullopt);
  return std::make_unique<InPlaceTaskDispatcher>();
}

struct Session {
  pid_t Child = -1;
  int InFD = -1, OutFD = -1;
  std::unique_ptr<ExecutionSession> ES;
  std::unique_ptr<ObjectLinkingLayer> OLL;
  JITDylib *JD = nullptr;
  ExecutorProcessControl *EPC = nullptr;
  uint64_t TConnected = 0;

  Session() {
    std::unique_ptr<ExecutorProcessControl> P;
    if (!Opt.OOP) {
      std::unique_ptr<JITLinkMemoryManager> MM;
      if (Opt.Mapper)
        MM = OrDie(MapperJITLinkMemoryManager::CreateWithMapper<
                   InProcessMemoryMapper>(Opt.Slab));
      else
        MM = OrDie(InProcessMemoryManager::Create());
      P = OrDie(SelfExecutorProcessControl::Create(nullptr, makeDispatcher(),
                                                   std::move(MM)));
    } else {
      Child = spawnExecutor(InFD, OutFD);
      SimpleRemoteEPC::Setup S;
      if (Opt.Mapper)
        S.CreateMemoryManager = makeSharedMM;
      P = OrDie(SimpleRemoteEPC::Create<CountingTransport>(
          makeDispatcher(), std::move(S), InFD, OutFD));
    }
    TConnected = nowNs();
    EPC = P.get();
    ES = std::make_unique<ExecutionSession>(std::move(P));
    OLL = std::make_unique<ObjectLinkingLayer>(*ES, EPC->getMemMgr());
    if (Opt.EH)
      OLL->addPlugin(std::make_shared<EHFrameRegistrationPlugin>(
          *ES, OrDie(EPCEHFrameRegistrar::Create(*ES))));
    JD = &newDylib("main");
  }
  JITDylib &newDylib(const std::string &Name) {
    JITDylib &D = ES->createBareJITDylib(Name);
    D.addGenerator(
        OrDie(EPCDynamicLibrarySearchGenerator::GetForTargetProcess(*ES)));
    return D;
  }
  void add(ResourceTrackerSP RT, const std::vector<char> &O, StringRef Name) {
    OrDie(OLL->add(std::move(RT), MemoryBuffer::getMemBuffer(
                                      StringRef(O.data(), O.size()), Name,
                                      /*RequiresNullTerminator=*/false)));
  }
  uint64_t lookup(StringRef Name) { return lookupIn(*JD, Name); }
  uint64_t lookupIn(JITDylib &D, StringRef Name) {
    return OrDie(ES->lookup({&D}, Name)).getAddress().getValue();
  }
  int call(uint64_t A, int X) {
    return OrDie(EPC->runAsIntFunction(ExecutorAddr(A), X));
  }
  pid_t execPid() const { return Child > 0 ? Child : getpid(); }
  void mem(MemNow &Ctl, MemNow &Exe) {
    Ctl = memOf(getpid());
    Exe = Child > 0 ? memOf(Child) : MemNow{};
  }
  void close() {
    if (!ES)
      return;
    OrDie(ES->endSession());
    OLL.reset();
    ES.reset();
    if (Child > 0) {
      ::close(InFD);
      ::close(OutFD);
      int St = 0;
      waitpid(Child, &St, 0);
      if (St)
        emitFact(Opt.Workload.c_str(), "executor_exit_status",
                 std::to_string(St));
      Child = -1;
    }
  }
  ~Session() { close(); }
};

// CPU spent by both processes since it was made, per operation.
struct CpuMark {
  Session &S;
  CpuNow C, E;
  explicit CpuMark(Session &S) : S(S), C(cpuOf(getpid())) {
    if (S.Child > 0)
      E = cpuOf(S.Child);
  }
  void emit(const char *W, const std::string &What, double N) {
    CpuNow C1 = cpuOf(getpid()), E1;
    emitOne(W, (What + "_controller_cpu_user_per_op").c_str(), "ns", (C1.User - C.User) / N);
    emitOne(W, (What + "_controller_cpu_sys_per_op").c_str(), "ns", (C1.Sys - C.Sys) / N);
    if (S.Child <= 0)
      return;
    E1 = cpuOf(S.Child);
    emitOne(W, (What + "_executor_cpu_user_per_op").c_str(), "ns", (E1.User - E.User) / N);
    emitOne(W, (What + "_executor_cpu_sys_per_op").c_str(), "ns", (E1.Sys - E.Sys) / N);
  }
};

struct RpcMark {
  uint64_t Calls, Bytes;
  std::map<uint64_t, uint64_t> ByTag;
  RpcMark() : Calls(gCounts.Calls), Bytes(gCounts.Bytes), ByTag(gCounts.ByTag) {}
};
static void emitRpcSince(Session &S, const char *W, const char *What,
                         const RpcMark &M0, double N) {
  if (!Opt.OOP)
    return;
  std::string P = What;
  emitOne(W, (P + "_rpc_per_op").c_str(), "count",
          (gCounts.Calls - M0.Calls) / N);
  emitOne(W, (P + "_rpc_arg_bytes_per_op").c_str(), "bytes",
          (gCounts.Bytes - M0.Bytes) / N);
  std::map<uint64_t, std::string> Names;
  for (auto &KV : S.EPC->getBootstrapSymbolsMap())
    Names[KV.second.getValue()] = KV.first().str();
  std::string T;
  std::lock_guard<std::mutex> L(gCounts.M);
  for (auto &KV : gCounts.ByTag) {
    auto I = M0.ByTag.find(KV.first);
    uint64_t D = KV.second - (I == M0.ByTag.end() ? 0 : I->second);
    if (!D)
      continue;
    char B[64];
    snprintf(B, sizeof B, "=%.3f ", D / N);
    T += (Names.count(KV.first) ? Names[KV.first] : "other") + B;
  }
  emitFact(W, (P + "_rpc_names_per_op").c_str(), T);
}

static std::vector<std::vector<char>> loadTiny(int N) {
  std::vector<std::vector<char>> V;
  for (int I = 0; I < N; ++I)
    V.push_back(readFile(Opt.Objs + "/tiny/" + tinyName(I) + ".o"));
  return V;
}

// ---- W1: one object at a time ---------------------------------------------
static void w1() {
  // Always 150 or more, so that runs of 50 and 150 differ only in linking.
  auto Objs = loadTiny(std::max(Opt.N, 150));
  Session S;
  std::vector<ResourceTrackerSP> RTs;
  std::vector<uint64_t> Addrs;
  std::vector<std::string> Names;
  for (int I = 0; I < Opt.N; ++I)
    Names.push_back(tinyName(I));
  CHECK(S.lookup("labs") != 0, "warm process lookup");
  MemNow C0, E0, C1, E1, C2, E2;
  S.mem(C0, E0);
  std::vector<double> T;
  RpcMark R0;
  CpuMark Cpu(S);
  for (int I = 0; I < Opt.N; ++I) {
    uint64_t T0 = nowNs();
    auto RT = S.JD->createResourceTracker();
    S.add(RT, Objs[I], Names[I]);
    uint64_t A = S.lookup(Names[I]);
    T.push_back(nowNs() - T0);
    RTs.push_back(std::move(RT));
    Addrs.push_back(A);
  }
  Cpu.emit("W1", "link", Opt.N);
  emitSamples("W1", "link_one", "ns", T);
  emitRpcSince(S, "W1", "link", R0, Opt.N);
  S.mem(C1, E1);
  emitMem("W1", "controller", C1 - C0, Opt.N);
  emitMem("W1", "executor", E1 - E0, Opt.N);
  for (int I = 0; I < Opt.N; ++I)
    CHECK(S.call(Addrs[I], -I) == tinyExpect(I, -I), "tiny %d", I);
  T.clear();
  RpcMark R1;
  for (int I = 0; I < Opt.N; ++I) {
    uint64_t T0 = nowNs();
    OrDie(RTs[I]->remove());
    T.push_back(nowNs() - T0);
  }
  emitSamples("W1", "remove_one", "ns", T);
  emitRpcSince(S, "W1", "remove", R1, Opt.N);
  S.mem(C2, E2);
  emitMem("W1", "after_remove", (C2 + E2) - (C0 + E0), Opt.N);
}

// ---- W2: all objects, one lookup -------------------------------------------
static void w2() {
  auto Objs = loadTiny(Opt.N);
  auto Warm = readFile(Opt.Objs + "/wrapper.o");
  std::vector<double> TAdd, TAll, TRem;
  for (int K = 0; K < Opt.Iters; ++K) {
    Session S;
    std::vector<ResourceTrackerSP> RTs;
    std::vector<std::string> Names;
    for (int I = 0; I < Opt.N; ++I)
      Names.push_back(tinyName(I));
    // One object first: MapperJITLinkMemoryManager holds its mutex while a
    // reservation is on its way to the executor, and two threads that link
    // meanwhile deadlock when continuations run on the listener (-tuned).
    S.add(S.JD->getDefaultResourceTracker(), Warm, "wrapper.o");
    CHECK(S.lookup("labs") != 0 && S.lookup("idfn") != 0, "warm");
    uint64_t T0 = nowNs();
    SymbolLookupSet Set;
    for (int I = 0; I < Opt.N; ++I) {
      RTs.push_back(S.JD->createResourceTracker());
      S.add(RTs.back(), Objs[I], Names[I]);
      Set.add(S.ES->intern(Names[I]));
    }
    uint64_t T1 = nowNs();
    auto Syms = OrDie(S.ES->lookup(makeJITDylibSearchOrder(S.JD), Set));
    uint64_t T2 = nowNs();
    TAdd.push_back(double(T1 - T0));
    TAll.push_back(double(T2 - T0));
    CHECK(Syms.size() == (size_t)Opt.N, "%zu", (size_t)Syms.size());
    for (int I = 0; I < Opt.N; ++I)
      CHECK(S.call(Syms[S.ES->intern(Names[I])].getAddress().getValue(), -I) ==
                tinyExpect(I, -I),
            "tiny %d", I);
    uint64_t T3 = nowNs();
    OrDie(S.JD->clear());
    TRem.push_back(double(nowNs() - T3));
  }
  emitSamples("W2", "add_all", "ns", TAdd);
  emitSamples("W2", "link_all", "ns", TAll);
  emitSamples("W2", "remove_all", "ns", TRem);
}

// ---- W3: one big object -----------------------------------------------------
static void w3() {
  auto Big = readFile(Opt.Objs + "/sqlite3.o");
  auto Chk = readFile(Opt.Objs + "/sqcheck.o");
  Session S;
  std::vector<double> First, Warm, MBs, Rem;
  RpcMark R0;
  for (int K = 0; K < Opt.Iters; ++K) {
    JITDylib &D = S.newDylib("big" + std::to_string(K));
    uint64_t T0 = nowNs();
    S.add(D.getDefaultResourceTracker(), Big, "sqlite3.o");
    uint64_t A = S.lookupIn(D, "sqlite3_open");
    uint64_t T1 = nowNs();
    CHECK(A, "sqlite3_open");
    (K ? Warm : First).push_back(double(T1 - T0));
    if (K)
      MBs.push_back(Big.size() / 1e6 / ((T1 - T0) / 1e9));
    S.add(D.getDefaultResourceTracker(), Chk, "sqcheck.o");
    CHECK(S.call(S.lookupIn(D, "sq_check"), 100) == 4950, "sq_check");
    uint64_t T2 = nowNs();
    OrDie(S.ES->removeJITDylib(D));
    Rem.push_back(double(nowNs() - T2));
  }
  emitOne("W3", "object_bytes", "bytes", Big.size());
  emitSamples("W3", "link_first", "ns", First);
  emitSamples("W3", "link_warm", "ns", Warm);
  emitSamples("W3", "link_warm_rate", "MB/s", MBs);
  emitSamples("W3", "remove", "ns", Rem);
  emitRpcSince(S, "W3", "link+check+remove", R0, Opt.Iters);
}

// The same without .eh_frame, and objects of N functions with unwind info:
// how the cost grows with the number of unwind records.
static void w3eh() {
  struct { std::string File, Sym, Metric; int K; } Cases[] = {
      {"sqlite3_noeh.o", "sqlite3_open", "link_sqlite3_without_eh_frame", 8},
      {"funcs_500.o", "f500", "link_500_functions", 6},
      {"funcs_1000.o", "f1000", "link_1000_functions", 5},
      {"funcs_2000.o", "f2000", "link_2000_functions", 4},
      {"funcs_4000.o", "f4000", "link_4000_functions", 2},
      {"funcs_4000_noeh.o", "f4000", "link_4000_functions_without_eh_frame", 5}};
  auto Chk = readFile(Opt.Objs + "/sqcheck.o");
  Session S;
  int Id = 0;
  for (auto &C : Cases) {
    auto O = readFile(Opt.Objs + "/" + C.File);
    std::vector<double> T;
    for (int K = 0; K < C.K; ++K) {
      JITDylib &D = S.newDylib("eh" + std::to_string(Id++));
      uint64_t T0 = nowNs();
      S.add(D.getDefaultResourceTracker(), O, C.File);
      uint64_t A = S.lookupIn(D, C.Sym);
      T.push_back(double(nowNs() - T0));
      if (C.Sym[0] == 'f') {
        CHECK(S.call(A, 41) == 42, "%s", C.Sym.c_str());
      } else {
        S.add(D.getDefaultResourceTracker(), Chk, "sqcheck.o");
        CHECK(S.call(S.lookupIn(D, "sq_check"), 100) == 4950, "sq_check");
      }
      OrDie(S.ES->removeJITDylib(D));
    }
    emitSamples("W3", C.Metric.c_str(), "ns", T);
  }
}

// ---- W4: calls ---------------------------------------------------------------
static void w4() {
  auto O = readFile(Opt.Objs + "/wrapper.o");
  Session S;
  S.add(S.JD->getDefaultResourceTracker(), O, "wrapper.o");
  uint64_t F = S.lookup("idfn"), W = S.lookup("wfn");
  std::vector<double> T;
  CpuMark Cpu(S);
  for (int I = 0; I < Opt.N; ++I) {
    uint64_t T0 = nowNs();
    int R = S.call(F, I);
    T.push_back(nowNs() - T0);
    CHECK(R == I + 1, "idfn");
  }
  Cpu.emit("W4", "call", Opt.N);
  emitSamples("W4", "runAsIntFunction", "ns", T);
  T.clear();
  for (int I = 0; I < Opt.N; ++I) {
    uint64_t T0 = nowNs();
    auto R = S.EPC->callWrapper(ExecutorAddr(W), {});
    T.push_back(nowNs() - T0);
    CHECK(!R.getOutOfBandError(), "wfn");
  }
  emitSamples("W4", "callWrapper", "ns", T);
  if (!Opt.OOP) {
    auto *Fn = (int (*)(int))F;
    T.clear();
    for (int I = 0; I < 1000; ++I) {
      uint64_t T0 = nowNs();
      int X = 0;
      for (int J = 0; J < 1000; ++J)
        X = Fn(X);
      T.push_back((nowNs() - T0) / 1000.0);
      CHECK(X == 1000, "direct");
    }
    emitSamples("W4", "direct_call", "ns", T);
  }
}

// Calls after pauses of 1 ms: the executor sleeps, and the kernel has to wake it.
static void w4asleep() {
  auto O = readFile(Opt.Objs + "/wrapper.o");
  Session S;
  S.add(S.JD->getDefaultResourceTracker(), O, "wrapper.o");
  uint64_t F = S.lookup("idfn");
  std::vector<double> T;
  for (int I = 0; I < Opt.N; ++I) {
    usleep(1000);
    uint64_t T0 = nowNs();
    int R = S.call(F, I);
    T.push_back(nowNs() - T0);
    CHECK(R == I + 1, "idfn");
  }
  emitSamples("W4", "call_asleep", "ns", T);
}

// ---- W8: exceptions among many objects ----------------------------------------
// An exception passes through a function of one of many objects that have
// unwind information, which only the configurations "+eh" register.
static void w8() {
  auto Thrower = readFile(Opt.Objs + "/throw.o"),
       Template = readFile(Opt.Objs + "/thru.o");
  std::vector<std::vector<char>> Objs;
  for (int I = 0; I < Opt.N; ++I)
    Objs.push_back(numbered(Template, I));
  Session S;
  S.add(S.JD->getDefaultResourceTracker(), Thrower, "throw.o");
  uint64_t T0 = nowNs();
  SymbolLookupSet Set;
  for (int I = 0; I < Opt.N; ++I) {
    std::string Name = "thru_" + digits(I);
    S.add(S.JD->getDefaultResourceTracker(), Objs[I], Name);
    Set.add(S.ES->intern(Name));
  }
  auto Syms = OrDie(S.ES->lookup(makeJITDylibSearchOrder(S.JD), Set));
  uint64_t F = S.lookup("throw_time");
  emitOne("W8", "link_all", "ns", nowNs() - T0);
  CHECK(Syms.size() == (size_t)Opt.N, "%zu", (size_t)Syms.size());
  std::vector<double> T;
  for (int I = 0; I < 301; ++I) {
    int Time = S.call(F, I); // in tens of nanoseconds
    CHECK(Time >= 0, "the exception was not caught");
    T.push_back(Time * 10.0);
  }
  emitOne("W8", "first_throw", "ns", T[0]);
  T.erase(T.begin());
  emitSamples("W8", "later_throw", "ns", T);
}

// ---- W5: raw memory manager ---------------------------------------------------
static const MemProt RX = MemProt::Read | MemProt::Exec,
                     RW = MemProt::Read | MemProt::Write;
using FA = JITLinkMemoryManager::FinalizedAlloc;
struct CycleTimes {
  double Alloc, Fill, Fin;
};
static char gFill[4096];
static FA allocOne(Session &S, size_t CodeSz, size_t DataSz, CycleTimes *T,
                   bool Verify) {
  auto &MM = S.EPC->getMemMgr();
  uint64_t T0 = nowNs();
  auto A = OrDie(SimpleSegmentAlloc::Create(
      MM, nullptr, {{RX, {CodeSz, Align(16)}}, {RW, {DataSz, Align(16)}}}));
  uint64_t T1 = nowNs();
  auto IX = A.getSegInfo(RX), IW = A.getSegInfo(RW);
  for (size_t O = 0; O < CodeSz; O += 4096)
    memcpy(IX.WorkingMem.data() + O, gFill, 4096);
  for (size_t O = 0; O < DataSz; O += 4096)
    memcpy(IW.WorkingMem.data() + O, gFill, 4096);
  uint64_t T2 = nowNs();
  auto F = OrDie(A.finalize());
  uint64_t T3 = nowNs();
  if (T)
    *T = {double(T1 - T0), double(T2 - T1), double(T3 - T2)};
  if (Verify) {
    char B[4096];
    readRemote(S.execPid(), IX.Addr.getValue() + CodeSz - 4096, B, 4096);
    CHECK(!memcmp(B, gFill, 4096), "code content");
    readRemote(S.execPid(), IW.Addr.getValue(), B, 4096);
    CHECK(!memcmp(B, gFill, 4096), "data content");
  }
  return F;
}
static void cycles(Session &S, int N, size_t CodeSz, size_t DataSz,
                   const char *W, const std::string &Tag, bool Split) {
  auto &MM = S.EPC->getMemMgr();
  std::vector<double> TA, TW, TF, TD, TC;
  for (int I = 0; I < N; ++I) {
    CycleTimes T;
    FA F = allocOne(S, CodeSz, DataSz, &T, I % 128 == 0);
    uint64_t T0 = nowNs();
    OrDie(MM.deallocate(std::move(F)));
    double D = nowNs() - T0;
    TA.push_back(T.Alloc), TW.push_back(T.Fill), TF.push_back(T.Fin),
        TD.push_back(D), TC.push_back(T.Alloc + T.Fill + T.Fin + D);
  }
  emitSamples(W, (Tag + "cycle").c_str(), "ns", TC);
  if (Split) {
    emitSamples(W, (Tag + "alloc").c_str(), "ns", TA);
    emitSamples(W, (Tag + "fill").c_str(), "ns", TW);
    emitSamples(W, (Tag + "finalize").c_str(), "ns", TF);
    emitSamples(W, (Tag + "dealloc").c_str(), "ns", TD);
  }
}
static void w5() {
  Session S;
  RpcMark R0;
  CpuMark Cpu(S);
  cycles(S, Opt.N, 4096, 4096, "W5", "", true);
  Cpu.emit("W5", "cycle", Opt.N);
  emitRpcSince(S, "W5", "cycle", R0, Opt.N);
}
static void w5scale() {
  Session S;
  std::vector<FA> Live;
  MemNow C0, E0, C1, E1;
  S.mem(C0, E0);
  for (int L : {100, 1000, 10000}) {
    while ((int)Live.size() < L)
      Live.push_back(allocOne(S, 4096, 4096, nullptr, false));
    cycles(S, Opt.N, 4096, 4096, "W5", "live" + std::to_string(L) + "_", false);
  }
  S.mem(C1, E1);
  emitMem("W5", "live10k_controller", C1 - C0, 10000);
  emitMem("W5", "live10k_executor", E1 - E0, 10000);
  // Holes: free every other allocation, then ask for what fits in no hole.
  auto &MM = S.EPC->getMemMgr();
  std::vector<double> TD;
  for (size_t I = 0; I < Live.size(); I += 2) {
    uint64_t T0 = nowNs();
    OrDie(MM.deallocate(std::move(Live[I])));
    TD.push_back(nowNs() - T0);
  }
  emitSamples("W5", "dealloc_at_10k_live", "ns", TD);
  cycles(S, Opt.N, 8192, 8192, "W5", "holes5k_16KiB_", false);
  std::vector<FA> Rest;
  for (size_t I = 1; I < Live.size(); I += 2)
    Rest.push_back(std::move(Live[I]));
  uint64_t T0 = nowNs();
  OrDie(MM.deallocate(std::move(Rest)));
  emitOne("W5", "dealloc_5k_in_one_call", "ns", nowNs() - T0);
}

// How many live allocations until the configuration refuses.
static void limit() {
  auto Objs = loadTiny(1);
  Session S;
  auto &MM = S.EPC->getMemMgr();
  std::vector<FA> Live;
  std::string Err;
  bool Three = Opt.Workload == "limit3";
  while ((int)Live.size() < Opt.N) {
    AllocGroupSmallMap<SimpleSegmentAlloc::Segment> M;
    M[RX] = {32, Align(16)};
    M[RW] = {8, Align(16)};
    if (Three)
      M[MemProt::Read] = {48, Align(16)};
    auto A = SimpleSegmentAlloc::Create(MM, nullptr, std::move(M));
    if (!A) {
      Err = "allocate: " + toString(A.takeError());
      break;
    }
    memset(A->getSegInfo(RX).WorkingMem.data(), 0x90, 32);
    auto F = A->finalize();
    if (!F) {
      Err = "finalize: " + toString(F.takeError());
      break;
    }
    Live.push_back(std::move(*F));
  }
  emitOne("limit", Three ? "live_allocs_3seg_until_failure"
                         : "live_allocs_2seg_until_failure",
          "count", Live.size());
  emitFact("limit", Three ? "failure_3seg" : "failure_2seg",
           Err.empty() ? "none up to the number tried" : Err);
  fflush(stdout);
  // The address space is exhausted; do not try to tear down politely.
  if (S.Child > 0) {
    kill(S.Child, SIGKILL);
    waitpid(S.Child, nullptr, 0);
  }
  _exit(0);
}

// ---- W6: bulk transfer ----------------------------------------------------------
static void w6() {
  const size_t Seg = 1 << 20, NSeg = 256;
  std::vector<char> Src(Seg * NSeg);
  uint64_t X = 88172645463325252ull;
  for (size_t I = 0; I + 8 <= Src.size(); I += 8) {
    X ^= X << 13, X ^= X >> 7, X ^= X << 17;
    memcpy(&Src[I], &X, 8);
  }
  Session S;
  auto &MM = S.EPC->getMemMgr();
  std::vector<double> First, Warm, Rel;
  std::vector<char> B(Seg);
  for (int K = 0; K < Opt.Iters; ++K) {
    std::vector<FA> Live;
    std::vector<uint64_t> Addr;
    uint64_t T0 = nowNs();
    for (size_t I = 0; I < NSeg; ++I) {
      auto A =
          OrDie(SimpleSegmentAlloc::Create(MM, nullptr, {{RW, {Seg, Align(16)}}}));
      auto Info = A.getSegInfo(RW);
      memcpy(Info.WorkingMem.data(), &Src[I * Seg], Seg);
      Addr.push_back(Info.Addr.getValue());
      Live.push_back(OrDie(A.finalize()));
    }
    double Sec = (nowNs() - T0) / 1e9;
    (K ? Warm : First).push_back(Src.size() / 1e6 / Sec);
    for (size_t I = 0; I < NSeg; I += K ? 17 : 1) {
      readRemote(S.execPid(), Addr[I], B.data(), Seg);
      CHECK(!memcmp(B.data(), &Src[I * Seg], Seg), "segment %zu", I);
    }
    T0 = nowNs();
    for (auto &F : Live)
      OrDie(MM.deallocate(std::move(F)));
    Rel.push_back((nowNs() - T0) / double(NSeg));
  }
  emitSamples("W6", "first_256MiB_rate", "MB/s", First);
  emitSamples("W6", "again_256MiB_rate", "MB/s", Warm);
  emitSamples("W6", "dealloc_1MiB", "ns", Rel);
}

// ---- W7: start ------------------------------------------------------------------
static void w7() {
  auto Obj = loadTiny(1);
  std::vector<double> TConn, TCall, TLinked, TEnd, RC, RE;
  for (int K = 0; K < Opt.Iters; ++K) {
    uint64_t T0 = nowNs();
    Session S;
    uint64_t T1 = S.TConnected;
    uint64_t A = S.lookup("abs");
    CHECK(S.call(A, -5) == 5, "abs");
    uint64_t T2 = nowNs();
    S.add(S.JD->getDefaultResourceTracker(), Obj[0], "tiny_0000");
    CHECK(S.call(S.lookup("tiny_0000"), -3) == tinyExpect(0, -3), "tiny");
    uint64_t T3 = nowNs();
    RC.push_back(rssOf(getpid()));
    if (S.Child > 0)
      RE.push_back(rssOf(S.Child));
    uint64_t T5 = nowNs();
    S.close();
    uint64_t T4 = nowNs();
    TConn.push_back(T1 - T0), TCall.push_back(T2 - T0),
        TLinked.push_back(T3 - T0), TEnd.push_back(T4 - T5);
  }
  emitSamples("W7", "controller_rss", "bytes", RC);
  emitSamples("W7", "executor_rss", "bytes", RE);
  emitSamples("W7", "start_to_connected", "ns", TConn);
  emitSamples("W7", "start_to_first_call_result", "ns", TCall);
  emitSamples("W7", "start_to_first_linked_call_result", "ns", TLinked);
  emitSamples("W7", "shutdown", "ns", TEnd);
}

int main(int argc, char **argv) {
  if (argc < 3) {
    fprintf(stderr, "usage: llvm_peer CONFIG WORKLOAD [options]\n");
    return 2;
  }
  signal(SIGPIPE, SIG_IGN);
  Opt.Config = argv[1];
  Opt.Workload = argv[2];
  int N = -1, It = -1;
  for (int I = 3; I + 1 < argc; I += 2) {
    std::string K = argv[I], V = argv[I + 1];
    if (K == "--n") N = atoi(V.c_str());
    else if (K == "--iters") It = atoi(V.c_str());
    else if (K == "--objs") Opt.Objs = V;
    else if (K == "--slab") Opt.Slab = strtoull(V.c_str(), nullptr, 0);
    else if (K == "--executor") Opt.StockExecutor = V;
    else if (K == "--tuned-executor") Opt.TunedExecutor = V;
    else { fprintf(stderr, "unknown option %s\n", K.c_str()); return 2; }
  }
  std::string C = Opt.Config;
  gPeer = "llvm-" + C;
  if (C.size() > 3 && C.substr(C.size() - 3) == "+eh")
    Opt.EH = true, C = C.substr(0, C.size() - 3);
  if (C.size() > 6 && C.substr(C.size() - 6) == "-tuned")
    Opt.Tuned = true, C = C.substr(0, C.size() - 6);
  if (C == "inproc") ;
  else if (C == "inproc-mapper") Opt.Mapper = true;
  else if (C == "oop-copy") Opt.OOP = true;
  else if (C == "oop-shm") Opt.OOP = Opt.Mapper = true;
  else { fprintf(stderr, "unknown config %s\n", C.c_str()); return 2; }
  InitializeNativeTarget();
  for (size_t I = 0; I < sizeof gFill; ++I)
    gFill[I] = char(I * 31 + (I >> 8) + 1);
  auto Set = [&](int DefN, int DefIt) {
    Opt.N = N >= 0 ? N : DefN;
    Opt.Iters = It >= 0 ? It : DefIt;
  };
  const std::string &W = Opt.Workload;
  if (W == "W1") Set(1000, 0), w1();
  else if (W == "W2") Set(1000, 3), w2();
  else if (W == "W3") Set(0, 8), w3();
  else if (W == "W3eh") Set(0, 0), w3eh();
  else if (W == "W4") Set(10000, 0), w4();
  else if (W == "W4asleep") Set(500, 0), w4asleep();
  else if (W == "W8") Set(20000, 0), w8();
  else if (W == "W5") Set(10000, 0), w5();
  else if (W == "W5scale") Set(300, 0), w5scale();
  else if (W == "limit2" || W == "limit3") Set(40000, 0), limit();
  else if (W == "W6") Set(0, 3), w6();
  else if (W == "W7") Set(0, 10), w7();
  else { fprintf(stderr, "unknown workload %s\n", W.c_str()); return 2; }
  return 0;
}

#!/usr/bin/env python3
"""Markdown tables, peers side by side, from files written by run.sh.

usage: table.py [--targets [--into FILE]] OUT.jsonl [OUT2.jsonl ...]

One file: a cell is "median (p10..p99)". Several: the median of the runs' medians, [lowest..highest of them], and the
median of their p99. With --targets only the comparison that docs/performance.md shows: "median, p99". With
--into it replaces what follows the heading "## Results" of that file.
"""
import argparse
import contextlib
import io
import json
import statistics

parser = argparse.ArgumentParser()
parser.add_argument("--targets", action="store_true")
parser.add_argument("--into")
parser.add_argument("files", nargs="+")
ARGS = parser.parse_args()
files = ARGS.files
runs = {}
for f in files:
    for l in open(f):
        d = json.loads(l)
        runs.setdefault((d["peer"], d["workload"], d["metric"]), []).append(d)
rows = {k: v[-1] for k, v in runs.items()}


def num(v, u):
    if u == "ns":
        for s, n in ((1e9, "s"), (1e6, "ms"), (1e3, "µs")):
            if v >= s:
                return "%.3g %s" % (v / s, n)
        return "%.3g ns" % v
    if u == "bytes" and v >= 10240:
        return "%.1f KiB" % (v / 1024)
    text = "{:,.0f}".format(v) if v >= 1000 else "%.4g" % v
    return text + ("" if u in ("count", "fraction") else " " + u)


def cell(d):
    if d is None:
        return "-"
    u = d["unit"]
    all_ = runs[(d["peer"], d["workload"], d["metric"])]
    if len(all_) > 1:
        m = [num(f([x["median"] for x in all_]), u) for f in (statistics.median, min, max)]
        if m[1] == m[2]:
            return m[0]
        p = " p99 " + num(statistics.median(x["p99"] for x in all_), u) if u == "ns" and d["n"] >= 1000 else ""
        return "%s [%s..%s]%s" % (*m, p)
    if d["n"] < 3 or num(d["p10"], u) == num(d["p99"], u):
        return num(d["median"], u)
    if u == "MB/s":
        return "%s (%s..%s)" % (num(d["median"], u), num(d["min"], u).split()[0], num(d["max"], u).split()[0])
    return "%s (%s..%s)" % (num(d["median"], u), num(d["p10"], u), num(d["p99"], u))


def table(title, w, metrics, peers=None):
    ps = [p for p in dict.fromkeys(k[0] for k in rows) if any((p, w, m) in rows for m, _ in metrics) and (not peers or p in peers)]
    if not ps:
        return
    print("\n### %s\n" % title)
    print("| peer | " + " | ".join(h for _, h in metrics) + " |")
    print("|---" * (len(metrics) + 1) + "|")
    for p in ps:
        print("| %s | " % p + " | ".join(cell(rows.get((p, w, m))) for m, _ in metrics) + " |")


def each(title, pred):
    if not any(d["unit"] != "text" and pred(k) for k, d in rows.items()):
        return
    print("\n### %s\n\n| metric | value |\n|---|---|" % title)
    for k, d in rows.items():
        if d["unit"] != "text" and pred(k):
            print("| %s | %s |" % (k[2], cell(d)))


# ---- every metric ----------------------------------------------------------------
SYSCALLS = [("controller_syscalls_per_op", "controller"), ("executor_syscalls_per_op", "executor")] + [
    (who + "_sys_%s_per_op" % call, who[:3] + " " + call)
    for who in ("controller", "executor")
    for call in ("read", "write", "sendmsg", "recvmsg", "mmap", "munmap", "mprotect", "clone3", "futex", "madvise", "fallocate")]
CPU = [(who + "_cpu_%s_per_op" % kind, who + " " + kind) for who in ("controller", "executor") for kind in ("user", "sys")]


def everything():
    table("W1 tiny objects one by one", "W1", [
        ("link_one", "add to address"), ("remove_one", "remove"), ("link_rpc_per_op", "round trips, link"),
        ("remove_rpc_per_op", "round trips, remove")])
    table("W1 memory per live object", "W1", [
        ("controller_pss_anon_per_obj", "controller anon"), ("controller_pss_shmem_per_obj", "controller shmem"),
        ("executor_pss_anon_per_obj", "executor anon"), ("executor_pss_shmem_per_obj", "executor shmem"),
        ("controller_vmas_per_obj", "mappings, controller"), ("executor_vmas_per_obj", "mappings, executor"),
        ("after_remove_pss_anon_per_obj", "anon kept after remove"), ("after_remove_pss_shmem_per_obj", "shmem kept"),
        ("after_remove_vmas_per_obj", "mappings kept")])
    table("W1 cranelift and dlopen extras", "W1", [
        ("compile_and_link_one", "from IR"), ("link_one_module_each", "module per function"), ("linker_only", "linker"),
        ("dlopen_dlsym_only", "dlopen + dlsym")])
    table("W1 system calls per object (link, call and remove), strace", "W1", SYSCALLS)
    table("W1 processor time per link (in steps of 10 ms over 1000)", "W1", [("link_" + m, h) for m, h in CPU])
    table("W2 batch of 1000", "W2", [
        ("link_all", "add + lookup of all"), ("remove_all", "remove all"), ("compile_and_link_all", "from IR"),
        ("link_all_rpc_per_op", "round trips")])
    table("W2 system calls per object, strace", "W2", SYSCALLS)
    table("W3 sqlite3.o", "W3", [
        ("link_first", "first"), ("link_warm", "warm"), ("link_warm_rate", "rate"), ("remove", "remove"),
        ("link+check+remove_rpc_per_op", "round trips, link, check and remove")])
    table("W3 system calls per link, check and remove, strace", "W3", SYSCALLS)
    table("W3 objects of many functions", "W3", [
        (m, m.replace("link_", "").replace("_", " "))
        for m in ("link_sqlite3_without_eh_frame", "link_500_functions", "link_1000_functions", "link_2000_functions",
                  "link_4000_functions", "link_4000_functions_without_eh_frame", "link_100000_functions")])
    table("W4 call", "W4", [
        ("runAsIntFunction", "int function"), ("callWrapper", "wrapper function"), ("direct_call", "direct call"),
        ("call_asleep", "int function after 1 ms"), ("call_rpc_per_op", "round trips")])
    table("W4 processor time per call of an int function", "W4", [("call_" + m, h) for m, h in CPU])
    table("W4 system calls per round (a call; for LLVM one of each kind), strace", "W4", SYSCALLS)
    table("W5 allocate + fill + finalize + deallocate, 4 KiB of code and 4 KiB of data", "W5", [
        ("cycle", "cycle"), ("alloc", "alloc"), ("fill", "fill"), ("finalize", "finalize"), ("dealloc", "dealloc"),
        ("cycle_rpc_per_op", "round trips")])
    table("W5 with N live", "W5", [
        ("live100_cycle", "100"), ("live1000_cycle", "1k"), ("live10000_cycle", "10k"),
        ("live1000000_cycle", "a million small"), ("dealloc_at_10k_live", "dealloc at 10k"),
        ("holes5k_16KiB_cycle", "5k holes, 16 KiB"), ("dealloc_5k_in_one_call", "dealloc 5k at once")])
    table("W5 system calls per cycle, strace", "W5", SYSCALLS)
    table("W6 256 MiB in segments of 1 MiB", "W6", [
        ("first_256MiB_rate", "first"), ("again_256MiB_rate", "again"), ("dealloc_1MiB", "dealloc 1 MiB")])
    table("W7 start", "W7", [
        ("start_to_connected", "connected"), ("start_to_first_call_result", "first call's result"),
        ("start_to_first_linked_call_result", "first linked call's result"), ("shutdown", "shutdown"),
        ("controller_rss", "controller RSS"), ("executor_rss", "executor RSS")])
    table("W7 system calls per session, strace", "W7", SYSCALLS)
    table("W7 wall time of hello", "W7", [
        ("hello_wall", "run"), ("hello_inprocess_wall", "in-process"), ("hello_oop_wall", "out of process"),
        ("hello_oop_shared_memory_wall", "out of process, shared memory")])
    table("W8 exceptions among 20,000 objects", "W8", [
        ("link_all", "link all"), ("first_throw", "first throw"), ("later_throw", "later throws")])
    table("Limits", "limit", [
        ("live_allocs_3seg_until_failure", "live allocations of 3 segments"),
        ("functions_finalized_until_failure", "functions finalized"), ("live_objects", "live objects")])
    for live in (10000, 100000, 1000000):
        p = "live%d_" % live
        table("%d live objects, each" % live, "limit", [
            (p + "link_one", "link one more"), (p + "controller_pss_anon_per_obj", "controller anon"),
            (p + "controller_pss_shmem_per_obj", "controller shmem"), (p + "executor_pss_anon_per_obj", "executor anon"),
            (p + "executor_pss_shmem_per_obj", "executor shmem"), (p + "controller_vmas_per_obj", "mappings, controller"),
            (p + "executor_vmas_per_obj", "mappings, executor")])
    prefixes = ("rtt_", "publish_", "minlink_")
    titles = ("The machine: round trips", "The machine: code published to another process", "A minimal linker")
    for title, prefix in zip(titles, prefixes):
        each(title, lambda k: k[0] == "floor" and k[2].startswith(prefix))
    each("The machine: other", lambda k: k[0] == "floor" and not k[2].startswith(prefixes))
    print("\n### Facts\n")
    for k, d in rows.items():
        if d["unit"] == "text":
            print("- %s %s %s: %s" % (k[0], k[1], k[2][5:], d["value"]))
    print("- cells come from %d run(s)" % len(files))
    for k in ("run_elapsed", "foreign_cpu_share", "stolen_cpu_share"):
        if ("machine", "env", k) in rows:
            print("- %s %s" % (k, cell(rows[("machine", "env", k)])))


# ---- the comparison ----------------------------------------------------------------
class Row:
    """One line: a metric of every peer, or where peers have it under other names, a (peer, workload, metric) of each."""

    def __init__(self, work, w, metric, target=None, others=(), floor=(), add=(), eh="", stock=None, inproc=None, higher=False):
        own = lambda peer: [(peer, w, m) for m in (metric, *add)]
        llvm = lambda peer, m: [m] if m else own(peer + eh)
        self.work, self.target, self.higher = work, target, higher
        self.stock = llvm("llvm-oop-shm", stock)
        self.tuned = own("llvm-oop-shm-tuned" + eh)
        self.llvm_inproc = llvm("llvm-inproc", inproc)
        self.others, self.floor = others, floor
        self.memfd, self.posix, self.inproc = (own("farlink-" + c) for c in ("memfd", "posix", "inproc"))


def value(keys):
    """(median, p99, unit) of a metric, or of the sum of several; over several runs, the medians of those."""
    found = [runs[k] for k in keys if k in runs]
    if not found:
        return None
    middle = lambda name: sum(statistics.median(d[name] for d in ds) for ds in found)
    return middle("median"), middle("p99"), found[0][0]["unit"], min(d["n"] for ds in found for d in ds)


def short(keys):
    v = value(keys)
    if v is None:
        return "-"
    median, p99, unit, n = v
    # The 99th of a hundred is the worst; of fewer, p99 says nothing.
    return num(median, unit) + (", p99 " + num(p99, unit) if n >= 100 and unit == "ns" else "")


def verdict(row):
    """How the target in ns, MB/s, bytes or a count is met by shared memory: the ratio, if it is not."""
    v, target = value(row.memfd), row.target
    if v is None or target is None:
        return "-"
    limit = target(row) if callable(target) else target
    if limit is None:
        return "-"
    wanted = ("≥ " if row.higher else "≤ ") + num(limit, v[2])
    ratio = limit / v[0] if row.higher else v[0] / limit if limit else (0.0 if not v[0] else float("inf"))
    return wanted + (": met" if ratio <= 1 else ": missed, %.2g times" % ratio)


def times_floor(factor):
    def limit(row):
        floor = value(row.floor[0][1]) if row.floor else None
        return floor and floor[0] * factor
    return limit


def floor(name):
    return (("", [("floor", "floor", name)]),)


NATIVE = ("native process", [("process", "W7", "hello_wall")])
CLI = "llvm-jitlink-cli"
# Content of a tiny object: 32 bytes of code, 8 of data, 48 of unwind information.
MEMORY = ("executor_pss_shmem_per_obj", "controller_pss_shmem_per_obj")
ROWS = [
    Row("link one tiny object, add to address", "W1", "link_one", 6e3, floor=floor("minlink_tiny_slab_prefaulted"),
        others=[("cranelift-jit, from machine code", [("cranelift-sys", "W1", "link_one")])]),
    Row("remove it", "W1", "remove_one", 2e3, others=[("AsmJit", [("asmjit-dual", "W1", "remove_one")])]),
    Row("1,000 tiny objects, one lookup", "W2", "link_all", 4e6,
        others=[(l, [("dlopen-" + l, "W2", "link_all")]) for l in ("ld.bfd", "mold")]),
    Row("sqlite3.o, bytes to address, with unwind information", "W3", "link_warm", 2.5e6, eh="+eh",
        floor=floor("minlink_sqlite3_slab"), others=[(l, [("dlopen-" + l, "W3", "link_warm")]) for l in ("ld.bfd", "mold")]),
    Row("the same, the first link of a session", "W3", "link_first", eh="+eh"),
    Row("one object of 4,000 functions", "W3", "link_4000_functions", 2.5e6, floor=floor("minlink_4000_functions_slab")),
    Row("one object of 100,000 functions", "W3", "link_100000_functions", 25 * 2.5e6),
    Row("call a linked function, both sides awake", "W4", "runAsIntFunction", 1e3,
        floor=[("spin, then futex", [("floor", "floor", "rtt_spin_then_futex_pinned_2cores")])]),
    Row("call it after 1 ms", "W4", "call_asleep", times_floor(1.3),
        floor=[("socket", [("floor", "floor", "rtt_unix_socket_asleep_unpinned")])]),
    Row("allocate, fill, finalize and free 4 KiB + 4 KiB", "W5", "cycle", 600,
        others=[("AsmJit", [("asmjit-dual", "W5", "cycle")])]),
    Row("the same beside 10,000 live", "W5", "live10000_cycle", 600, others=[("AsmJit", [("asmjit-dual", "W5", "live10000_cycle")])]),
    Row("the same beside 1,000,000 small ones", "W5", "live1000000_cycle", 600),
    Row("256 MiB in segments of 1 MiB, fresh", "W6", "first_256MiB_rate", times_floor(0.95), higher=True,
        floor=floor("memcpy_256MiB_fresh_memfd")),
    Row("the same, again", "W6", "again_256MiB_rate", higher=True, floor=floor("memcpy_256MiB_again_memfd")),
    Row("spawn to the first linked call's result", "W7", "start_to_first_linked_call_result",
        lambda row: value(NATIVE[1]) and 1.6 * value(NATIVE[1])[0], others=[NATIVE],
        floor=[("static program", [("floor", "floor", "spawn_exit_wait_nop_static")])]),
    Row("`farlink run hello.o`, wall time", "W7", "hello_wall", 3e6, others=[NATIVE],
        stock=(CLI, "W7", "hello_oop_shared_memory_wall"), inproc=(CLI, "W7", "hello_inprocess_wall")),
    Row("memory of a live tiny object: executor + shared", "W1", "executor_pss_anon_per_obj", 88 + 64, add=MEMORY, inproc=("llvm-inproc", "W1", "controller_pss_anon_per_obj"),
        others=[("AsmJit", [("asmjit-dual", "W1", "controller_pss_shmem_per_obj")])]),
    Row("its mappings, both processes", "W1", "controller_vmas_per_obj", 0.02, add=("executor_vmas_per_obj",)),
    # In-process, LLVM's figure has the memory of the object in it.
    Row("controller's bookkeeping for it", "W1", "controller_pss_anon_per_obj", 400, inproc=("none", "W1", "none")),
    Row("the same at 1,000,000 live", "limit", "live1000000_controller_pss_anon_per_obj", 400),
    Row("live objects", "limit", "live_objects", 1e6, higher=True, stock=("llvm-oop-shm", "limit", "live_allocs_3seg_until_failure"),
        inproc=("llvm-inproc", "limit", "live_allocs_3seg_until_failure")),
    Row("20,000 objects: first throw", "W8", "first_throw", 1e6, eh="+eh",
        others=[("one shared library", [("dlopen-ld.bfd", "W8", "first_throw")])]),
    Row("later throws", "W8", "later_throw", 4e3, eh="+eh",
        others=[("one shared library", [("dlopen-ld.bfd", "W8", "later_throw")])]),
]


def ratio(row):
    llvm, own = value(row.tuned) or value(row.stock), value(row.memfd)
    if not llvm or not own or not own[0] or not llvm[0]:
        return "-"
    times = own[0] / llvm[0] if row.higher else llvm[0] / own[0]
    return "{:,.0f}".format(times) if times >= 100 else "%.3g" % times


def named(entries):
    texts = [(name + " " if name else "") + short(keys) for name, keys in entries if value(keys)]
    return "; ".join(texts) or "-"


def markdown(header, lines):
    print("| " + " | ".join(header) + " |")
    print("|---" * len(header) + "|")
    for line in lines:
        print("| " + " | ".join(line) + " |")


def targets():
    markdown(
        ["work", "LLVM shared memory, stock", "tuned", "LLVM in-process", "others", "floor", "farlink memfd", "farlink POSIX",
         "farlink in-process", "LLVM tuned / memfd", "target, memfd"],
        [[r.work, short(r.stock), short(r.tuned), short(r.llvm_inproc), named(r.others), named(r.floor), short(r.memfd),
          short(r.posix), short(r.inproc), ratio(r), verdict(r)] for r in ROWS])
    print("\nRound trips, and system calls of controller + executor, each per operation:\n")
    peers = ["llvm-oop-shm", "llvm-oop-shm-tuned", "farlink-memfd", "farlink-posix", "farlink-inproc"]
    markdown(["counted"] + peers, [[work] + [counters(p, w, trips) for p in peers] for work, w, trips in COUNTED])
    print("\nfarlink's spread: the medians of the rounds, lowest to highest, and the 10th percentile:\n")
    markdown(["work", "memfd", "POSIX", "in-process"],
             [[r.work] + [spread(keys) for keys in (r.memfd, r.posix, r.inproc)] for r in ROWS if spread(r.memfd) != "-"])
    print()
    for name in ("cpu", "kernel", "versions", "load_average_before_and_after"):
        if ("machine", "env", "fact:" + name) in rows:
            print("- %s: %s" % (name.replace("_", " "), rows[("machine", "env", "fact:" + name)]["value"]))
    for k, d in rows.items():
        # What is called a failure there is how many could live.
        if k[2] in ("fact:left_out", "fact:failure") and k[1] != "limit":
            print("- %s, %s: %s" % (k[0], k[2][5:].replace("_", " "), d["value"]))
    for k in ("foreign_cpu_share", "stolen_cpu_share"):
        if ("machine", "env", k) in rows:
            print("- %s: %s" % (k.replace("_", " "), cell(rows[("machine", "env", k)])))
    print("- runs: %d" % len(files))


# (what, workload, metrics of round trips that are summed)
COUNTED = [
    ("link a tiny object, call it and remove it (round trips without the call)", "W1", ("link_rpc_per_op", "remove_rpc_per_op")),
    ("a batch of 1,000 objects, each linked, called and removed (round trips of the link)", "W2", ("link_all_rpc_per_op",)),
    ("link sqlite3.o, call it and remove it", "W3", ("link+check+remove_rpc_per_op",)),
    ("call (LLVM: two calls)", "W4", ("call_rpc_per_op",)),
    ("allocate, fill, finalize and free", "W5", ("cycle_rpc_per_op",)),
    ("a session, from its start to its end", "W7", ()),
]


def counters(peer, w, trips):
    count = lambda keys: value(keys) and "%.3g" % abs(round(value(keys)[0], 1))
    calls = [count([(peer, w, who + "_syscalls_per_op")]) for who in ("controller", "executor")]
    parts = [count([(peer, w, m) for m in trips]), " + ".join(c for c in calls if c is not None) or None]
    return "; ".join(p for p in parts if p) or "-"


def spread(keys):
    found = [d for k in keys for d in runs.get(k, [])]
    if len(keys) != 1 or not found or found[0]["unit"] not in ("ns", "MB/s"):
        return "-"
    medians = [m for d in found for m in d.get("run_medians", [d["median"]])]
    unit = found[0]["unit"]
    low = statistics.median(d.get("p10", d["median"]) for d in found)
    return "%s to %s; %s" % (num(min(medians), unit), num(max(medians), unit), num(low, unit))


def replace_results(path):
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        targets()
    heading = "## Results\n"
    before = open(path).read().split(heading)[0]
    with open(path, "w") as f:
        f.write(before + heading + "\n" + text.getvalue())


if ARGS.into:
    replace_results(ARGS.into)
elif ARGS.targets:
    targets()
else:
    everything()

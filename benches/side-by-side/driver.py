#!/usr/bin/env python3
"""Runs the peers in interleaved rounds and pools their samples. `run.sh` builds them and starts this.

usage: driver.py BUILD_DIR FARLINK_DIR OUT.jsonl [--rounds-scale X] [--only REGEX] [--million]

--only        only entries whose "peer workload" the expression finds; "strace" stands for the counts of system calls
--million     also a million live objects and allocations, which take minutes and some GiB

Output: one JSON object a line, {peer, workload, metric, unit, n, min, median, p99, max}, with "p10" (less disturbed by
other load than the median), "run_medians" (the median of each round, in order) where there was more than one round,
and "value" for facts that are text.
"""
import argparse
import collections
import json
import os
import re
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time

parser = argparse.ArgumentParser()
parser.add_argument("build")
parser.add_argument("farlink")
parser.add_argument("out")
parser.add_argument("--rounds-scale", type=float, default=1.0)
parser.add_argument("--only", type=re.compile)
parser.add_argument("--million", action="store_true")
ARGS = parser.parse_args()
B = ARGS.build


def output(*command):
    """What a command prints, or nothing if it is not installed."""
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""


LLVM_PREFIX = output("llvm-config-19", "--prefix")
STOCK = LLVM_PREFIX + "/bin/llvm-jitlink-executor"
TUNED = B + "/tuned_executor"
LLVM = ["inproc", "inproc-mapper", "oop-copy", "oop-shm", "oop-copy-tuned", "oop-shm-tuned"]
FARLINK = ["inproc", "memfd", "posix"]
LINKERS = ["ld.bfd", "ld.lld-19", "mold"]
CRANELIFT = ["cranelift-sys", "cranelift-arena"]
JIT_ALLOCATOR = ["jitalloc-rwx", "jitalloc-dual"]
ASMJIT = ["asmjit-rwx", "asmjit-dual"]
TMP = tempfile.mkdtemp(prefix="side-by-side-", dir="/dev/shm" if os.path.isdir("/dev/shm") else None)

pool = collections.OrderedDict()   # (peer, workload, metric, unit) -> [samples of each round]
facts = collections.OrderedDict()  # (peer, workload, fact) -> text
spent = collections.Counter()      # "peer workload" -> seconds

# Expressions for "peer workload" that is left out, and why: from the build, and what is missing here.
left_out = {name: open(os.path.join(B, "left_out", name)).read().strip() for name in os.listdir(B + "/left_out")}
if not shutil.which("strace"):
    left_out["strace"] = "strace is not installed"


def why_left_out(entry):
    return next((why for name, why in left_out.items() if re.match(name, entry)), None)


def wanted(entry):
    return (not ARGS.only or ARGS.only.search(entry)) and why_left_out(entry) is None


def fact(peer, workload, name, text):
    facts[(peer, workload, name)] = text


def execute(command, timeout=90):
    """Runs one peer in its own process group; nothing of it survives."""
    p = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    timed_out = False
    try:
        out, err = p.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        timed_out = True
        os.killpg(p.pid, signal.SIGKILL)
        out, err = p.communicate()
    try:
        os.killpg(p.pid, signal.SIGKILL)  # executors left by a peer that died
    except ProcessLookupError:
        pass
    return p.returncode, out, err, timed_out


def run(peer, workload, command, timeout=90):
    start = time.time()
    status, out, err, late = execute(command, timeout)
    spent[peer + " " + workload] += time.time() - start
    round_samples = collections.OrderedDict()
    for line in out.splitlines():
        try:
            d = json.loads(line)
        except ValueError:
            continue
        if "fact" in d:
            fact(d["peer"], d["workload"], d["fact"], d["text"])
        else:
            round_samples.setdefault((d["peer"], d["workload"], d["metric"], d["unit"]), []).extend(d["samples"])
    for key, samples in round_samples.items():
        pool.setdefault(key, []).append(samples)
    if status != 0:
        why = "timed out after %d s" % timeout if late else "exit status %d" % status
        tail = "; ".join(err.strip().splitlines()[-3:])
        fact(peer, workload, "failure", why + ": " + tail[:300])
        print("FAILED %s %s: %s: %s" % (peer, workload, why, tail[:300]), file=sys.stderr)


# ---- what is run ---------------------------------------------------------------
def farlink(config, w, *extra):
    return ["farlink-" + config, w, [ARGS.farlink + "/farlink-peer", config, w, "--objs", B, "--executor",
                                     ARGS.farlink + "/farlink-executor", *map(str, extra)]]


def llvm(config, w, *extra):
    return ["llvm-" + config, w, [B + "/llvm_peer", config, w, "--objs", B, "--executor", STOCK, "--tuned-executor",
                                  TUNED, *map(str, extra)]]


def wall(peer, metric, expected, *command):
    """Wall time of a command that prints this line."""
    return [peer, "W7", [B + "/floor_peer", "cmd", B, peer, metric, "8", expected, *command]]


def plan():
    """[(rounds, [(peer, workload, command)])]: each is one interleaved group."""
    F = lambda w, *x: [farlink(c, w, *x) for c in FARLINK]
    L = lambda w, configs=LLVM, *x: [llvm(c, w, *x) for c in configs]
    R = lambda w, peers=CRANELIFT + JIT_ALLOCATOR: [[p, w, [B + "/cargo/release/rust_peer", p, w]] for p in peers]
    A = lambda w: [[p, w, [B + "/asmjit_peer", p, w]] for p in ASMJIT]
    D = lambda w: [["dlopen-" + l, w, [B + "/dl_peer", l, w, B, TMP]] for l in LINKERS]
    M = lambda section, *x: [["floor", section, [B + "/floor_peer", section, B, *x]]]
    EH = [c + "+eh" for c in ("inproc", "oop-shm", "oop-shm-tuned")]
    run_hello = lambda peer, metric, *x: wall(peer, metric, "hello 1", ARGS.farlink + "/farlink", "run", *x, B + "/hello.o")
    jitlink = lambda metric, *x: wall("llvm-jitlink-cli", metric, "hello 0", "llvm-jitlink-19", *x, B + "/hello.o")
    hello = [
        run_hello("farlink-memfd", "hello_wall"),
        run_hello("farlink-posix", "hello_wall", "--memory", "posix"),
        run_hello("farlink-inproc", "hello_wall", "--in-process"),
        jitlink("hello_inprocess_wall"),
        jitlink("hello_oop_wall", "-oop-executor=" + STOCK),
        jitlink("hello_oop_shared_memory_wall", "-oop-executor=" + STOCK, "-use-shared-memory"),
        wall("process", "hello_wall", "hello 1", B + "/hello_native"),
    ]
    programs = [B + "/nop_static", B + "/nop_dynamic", ARGS.farlink + "/farlink-executor", STOCK, TUNED]
    groups = [
        (3, F("W1") + L("W1") + L("W1", EH) + R("W1") + A("W1") + D("W1") + M("minlink") + M("publish")),
        (2, F("W2") + L("W2", LLVM, "--iters", 2) + R("W2", CRANELIFT) + D("W2")),
        (2, F("W3") + L("W3", LLVM, "--iters", 6) + L("W3", EH, "--iters", 4) + D("W3")),
        (2, F("W3eh") + L("W3eh", ["inproc", "oop-shm"])),
        (2, F("W4") + L("W4", LLVM, "--n", 5000) + R("W4", CRANELIFT) + M("rtt")),
        (2, F("W4asleep") + L("W4asleep") + M("asleep")),
        (2, F("W5") + L("W5", LLVM, "--n", 5000) + R("W5") + A("W5") + M("mem")),
        (1, F("W5scale") + L("W5scale") + R("W5scale") + A("W5scale")),
        (2, F("W6") + L("W6", LLVM, "--iters", 2) + R("W6") + A("W6") + M("bulk")),
        (2, F("W7") + L("W7") + hello + M("proc", *filter(os.path.exists, programs))),
        (1, F("W8") + L("W8", EH) + D("W8")),
        (1, L("limit3", ["inproc", "oop-shm"]) + R("limit", ["cranelift-sys"])),
    ]
    if ARGS.million:
        groups.append((1, F("limit") + F("W5million")))
    return groups


def known_failures():
    """Configurations that are known not to work, tried so that the record is a measurement."""
    runtime = LLVM_PREFIX + "/lib/clang/19/lib/linux/liborc_rt-x86_64.a"
    if not os.path.exists(runtime) or not wanted("llvm-jitlink-cli W7"):
        return
    for name, args in (("oop", []), ("oop_shared_memory", ["-use-shared-memory"])):
        command = ["llvm-jitlink-19", "-oop-executor=" + STOCK, *args, "-orc-runtime=" + runtime, B + "/hello.o"]
        status, out, err, late = execute(command, 30)
        works = status == 0 and out == "hello 0\n"
        text = "works" if works else "fails, status %s: %s" % (status, "; ".join(err.strip().splitlines()[:2]))
        fact("llvm-jitlink-cli", "W7", "with_orc_runtime_" + name, text)


# ---- system calls per operation ------------------------------------------------
CALL = re.compile(r"^(\d+) +([a-z_0-9]+)\(")
CLONE = re.compile(r"^(\d+) +(clone3?|vfork|fork)\((.*)$")
RESUMED = re.compile(r"^(\d+) +<\.\.\. (clone3?|vfork|fork) resumed>(.*)$")
RESULT = re.compile(r"= (\d+)\s*$")


def count_syscalls(command):
    """Counters of the system calls of the command's process, and of all processes that it starts."""
    log = TMP + "/strace.log"
    status, out, err, late = execute(["strace", "-f", "-o", log, *command], 90)
    if status != 0:
        raise RuntimeError("strace: %s %s" % (status, err[-200:]))
    lines = open(log, errors="replace").read().splitlines()
    os.unlink(log)
    parent, flags = {}, {}
    for line in lines:
        m = CLONE.match(line)
        if m:
            flags[m[1]] = m[3] if m[2].startswith("clone") else ""
            r = RESULT.search(line)
            if r and "unfinished" not in line:
                parent[r[1]] = (m[1], flags[m[1]])
            continue
        m = RESUMED.match(line)
        if m:
            r = RESULT.search(line)
            if r:
                parent[r[1]] = (m[1], flags.get(m[1], ""))

    def is_first(thread):
        """Whether a thread belongs to the first process."""
        while thread in parent and "CLONE_THREAD" in parent[thread][1]:
            thread = parent[thread][0]
        return thread not in parent

    counts = {True: collections.Counter(), False: collections.Counter()}
    for line in lines:
        m = CALL.match(line)
        if m:
            counts[is_first(m[1])][m[2]] += 1
    return counts[True], counts[False]


# What is counted: the difference of two runs, for each operation between them. W1 is link, call and remove of an
# object; W3 link, check and remove of sqlite3.o; W4 for LLVM one call of each kind; W5 and W6 a whole cycle; W7 a
# session from its start to its end. Calls that print are in both.
COUNTED = [("W1", "--n", 50, 150), ("W2", "--n", 500, 1000), ("W3", "--iters", 2, 6), ("W4", "--n", 50, 150),
           ("W5", "--n", 50, 150), ("W7", "--iters", 2, 6)]


def syscalls():
    for w, option, low, high in COUNTED:
        for make, config in [(farlink, c) for c in FARLINK] + [(llvm, c) for c in LLVM]:
            peer = make(config, w)[0]
            if not wanted(peer + " " + w) and not (ARGS.only and ARGS.only.search("strace") and not why_left_out(peer + " " + w)):
                continue
            fixed = ("--iters", 1) if w == "W2" else ()
            try:
                a = count_syscalls(make(config, w, option, low, *fixed)[2])
                b = count_syscalls(make(config, w, option, high, *fixed)[2])
            except RuntimeError as e:
                fact(peer, w, "strace_failure", str(e))
                continue
            for who, before, after in (("controller", a[0], b[0]), ("executor", a[1], b[1])):
                if not after:
                    continue
                d = {k: (after[k] - before[k]) / (high - low) for k in after}
                pool[(peer, w, who + "_syscalls_per_op", "count")] = [[sum(d.values())]]
                for k, v in sorted(d.items(), key=lambda x: -x[1]):
                    if v >= 0.05:
                        pool[(peer, w, "%s_sys_%s_per_op" % (who, k), "count")] = [[v]]


# ---- the machine ---------------------------------------------------------------
def busy():
    v = list(map(int, open("/proc/stat").readline().split()[1:]))
    return sum(v[:3]) + sum(v[5:7]), v[7]  # busy, stolen (jiffies of 10 ms)


def stats(groups):
    s = sorted(x for g in groups for x in g)
    n = len(s)
    d = {"n": n, "min": s[0], "p10": s[int(n * 0.1)], "median": statistics.median(s), "p99": s[min(n - 1, int(n * 0.99))],
         "max": s[-1]}
    if len(groups) > 1:
        d["run_medians"] = [round(statistics.median(g), 4) for g in groups]
    return d


def machine_facts(load_before):
    cpu = next((l.split(":")[1].strip() for l in open("/proc/cpuinfo") if l.startswith("model name")), "?")
    fact("machine", "env", "cpu", "%s, %d cores" % (cpu, os.cpu_count()))
    fact("machine", "env", "kernel", os.uname().release)
    versions = [("llvm-config-19",), ("ld.bfd",), ("ld.lld-19",), ("mold",), ("rustc",), ("g++",)]
    found = [(output(*v, "--version").splitlines() or [v[0] + " is not installed"])[0] for v in versions]
    fact("machine", "env", "versions", "; ".join(("LLVM " + f) if i == 0 else f for i, f in enumerate(found)))
    fact("machine", "env", "load_average_before_and_after", "%.2f %.2f" % (load_before, os.getloadavg()[0]))
    for name, why in sorted(left_out.items()):
        fact(name, "env", "left_out", why)


def main():
    start, busy0, load0 = time.time(), busy(), os.getloadavg()[0]
    for name, why in sorted(left_out.items()):
        print("left out: %s: %s" % (name, why), file=sys.stderr)
    for rounds, group in plan():
        group = [e for e in group if wanted(e[0] + " " + e[1])]
        for r in range(max(1, round(rounds * ARGS.rounds_scale))):
            for e in group if r % 2 == 0 else reversed(group):
                run(*e, timeout=600 if e[1] in ("limit", "W5million") else 180)
        if group:
            names = " ".join(sorted({e[1] for e in group}))
            print("%6.1f s  %s x %d" % (time.time() - start, names, rounds), file=sys.stderr)
    if wanted("strace"):
        syscalls()
        print("%6.1f s  strace" % (time.time() - start), file=sys.stderr)
    known_failures()
    print("longest: " + ", ".join("%s %.1f s" % kv for kv in spent.most_common(14)), file=sys.stderr)
    elapsed, busy1, cores, tick = time.time() - start, busy(), os.cpu_count(), os.sysconf("SC_CLK_TCK")
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_CHILDREN, resource.RUSAGE_SELF)]
    own = sum(u.ru_utime + u.ru_stime for u in usage)
    machine_facts(load0)
    with open(ARGS.out, "w") as f:
        put = lambda d: f.write(json.dumps(d) + "\n")
        one = lambda m, u, v: put(dict(peer="machine", workload="env", metric=m, unit=u, n=1, min=v, median=v, p99=v, max=v))
        one("run_elapsed", "s", round(elapsed, 1))
        one("foreign_cpu_share", "fraction", round(max(0.0, (busy1[0] - busy0[0]) / tick - own) / (elapsed * cores), 3))
        one("stolen_cpu_share", "fraction", round((busy1[1] - busy0[1]) / tick / (elapsed * cores), 4))
        for (p, w, m, u), groups in pool.items():
            put(dict(peer=p, workload=w, metric=m, unit=u, **stats(groups)))
        for (p, w, name), text in facts.items():
            put(dict(peer=p, workload=w, metric="fact:" + name, unit="text", n=1, min=None, median=None, p99=None,
                     max=None, value=text))
    shutil.rmtree(TMP)


main()

#!/usr/bin/env python3
"""Times exceptions in a program of many linked objects, each with unwind information: the first one, and later ones.

    benches/unwinding.py [OBJECTS...]        (default: 100 1000 20000)

Runs `farlink run` (a release build) with a C++ program that throws through a function of another object and catches.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

FARLINK = Path(__file__).resolve().parent.parent / "target/release/farlink"

MAIN = r"""
#include <cstdio>
#include <ctime>
extern "C" int f_00000(void (*)());
static double now() { timespec t; clock_gettime(CLOCK_MONOTONIC, &t); return t.tv_sec * 1e6 + t.tv_nsec / 1e3; }
static void fail() { throw 1; }
static double once() {
    double start = now();
    try { f_00000(fail); } catch (int) {}
    return now() - start;
}
int main() {
    double first = once(), total = 0;
    for (int i = 0; i < 1000; i++) total += once();
    std::printf("first %.1f us, later %.2f us\n", first, total / 1000);
}
"""

TEMPLATE = 'extern "C" int f_00000(void (*g)()) { g(); return 0; }'


def compile(folder, name, text):
    source = folder / f"{name}.cc"
    source.write_text(text)
    subprocess.run(["c++", "-c", "-O1", "-fPIC", "-o", folder / f"{name}.o", source], check=True)
    return folder / f"{name}.o"


def main():
    counts = [int(text) for text in sys.argv[1:]] or [100, 1000, 20000]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        program = compile(folder, "main", MAIN)
        template = compile(folder, "template", TEMPLATE).read_bytes()
        objects = []
        for number in range(max(counts)):
            path = folder / f"{number}.o"
            path.write_bytes(template.replace(b"f_00000", b"f_%05d" % number))
            objects.append(path)
        for count in counts:
            command = [FARLINK, "run", "--time", program, *objects[:count], "-lstdc++"]
            done = subprocess.run(command, capture_output=True, text=True, timeout=120)
            print(f"{count} objects: {done.stdout.strip() or done.stderr.strip()[:300]}")
            phases = [line.split() for line in done.stderr.splitlines() if line.endswith(" ms")]
            print("   " + ", ".join(f"{' '.join(row[:-2])} {row[-2]} ms" for row in phases))


if __name__ == "__main__":
    main()

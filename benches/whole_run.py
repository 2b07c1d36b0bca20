#!/usr/bin/env python3
"""Times whole runs of a program: farlink beside llvm-jitlink, each in-process and in a process of its own.

    benches/whole_run.py [--rounds N] [--sqlite FOLDER]

FOLDER is that of sqlite3.c and sqlite3.h, for example `sqlite3` of the libsqlite3-sys package; without it only hello
is timed. Every round runs each configuration once, in an order that is turned by one from round to round, so that all
of them meet the same load. Prints the median and the least wall time in milliseconds, from the start of the command to
its end. Configurations whose tool is not installed are left out by name.
"""

import argparse
import pathlib
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
FARLINK = ROOT / "target" / "release" / "farlink"
JITLINK = "llvm-jitlink-22"
JITLINK_EXECUTOR = "llvm-jitlink-executor-22"

SQLITE_DRIVER = r"""
#include <stdio.h>
#include "sqlite3.h"
int main(void) {
    sqlite3 *db;
    if (sqlite3_open(":memory:", &db) != SQLITE_OK) return 1;
    return sqlite3_exec(db,
        "CREATE TABLE t (a INTEGER PRIMARY KEY, b TEXT);"
        "WITH RECURSIVE n(i) AS (VALUES (1) UNION ALL SELECT i + 1 FROM n WHERE i < 1000)"
        " INSERT INTO t SELECT i, hex(i) FROM n;"
        "SELECT sum(length(b)) FROM t", NULL, NULL, NULL);
}
"""


def compile_object(source, output, *flags):
    subprocess.run(["cc", "-c", "-O2", "-fPIC", *flags, "-o", output, source], check=True)
    return str(output)


def configurations(objects):
    """Commands by name. All of them run main without arguments and without debugger support."""
    rows = {
        "farlink, own process, shared": [FARLINK, "run", *objects],
        "farlink, own process, posix": [FARLINK, "run", "--memory", "posix", *objects],
        "farlink, own process, remote": [FARLINK, "run", "--memory", "remote", *objects],
        "farlink, in-process": [FARLINK, "run", "--in-process", *objects],
    }
    jitlink, executor = shutil.which(JITLINK), shutil.which(JITLINK_EXECUTOR)
    if jitlink:
        rows["llvm-jitlink 22, in-process"] = [jitlink, *objects]
    if jitlink and executor:
        rows["llvm-jitlink 22, own process, shared"] = [
            jitlink, f"-oop-executor={executor}", "-use-memmgr=shared", *objects]
    if not (jitlink and executor):
        print(f"left out: {JITLINK} and {JITLINK_EXECUTOR} are not installed", file=sys.stderr)
    return rows


def run_once(command, expected):
    start = time.perf_counter()
    result = subprocess.run([str(part) for part in command], capture_output=True)
    elapsed = time.perf_counter() - start
    if result.returncode != expected:
        sys.exit(f"{command} ended with {result.returncode}: {result.stderr.decode()}")
    return elapsed * 1e3


def measure(name, objects, expected, rounds):
    rows = list(configurations(objects).items())
    times = {row: [] for row, _ in rows}
    for turn in range(rounds):
        shift = turn % len(rows)
        for row, command in rows[shift:] + rows[:shift]:
            times[row].append(run_once(command, expected))
    print(f"\n{name}, {rounds} rounds{'':<24}{'median ms':>10}{'least ms':>10}")
    for row, samples in times.items():
        print(f"  {row:<40}{statistics.median(samples):>10.2f}{min(samples):>10.2f}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--sqlite", type=pathlib.Path, metavar="FOLDER")
    args = parser.parse_args()
    subprocess.run(["cargo", "build", "--release", "-q", "-p", "farlink-cli"], cwd=ROOT, check=True)
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        hello = folder / "hello.c"
        hello.write_text('#include <stdio.h>\nint main(void) { puts("hello"); return 0; }\n')
        measure("hello", [compile_object(hello, folder / "hello.o")], 0, args.rounds)
        if args.sqlite:
            driver = folder / "driver.c"
            driver.write_text(SQLITE_DRIVER)
            objects = [
                compile_object(driver, folder / "driver.o", f"-I{args.sqlite}"),
                compile_object(args.sqlite / "sqlite3.c", folder / "sqlite3.o", "-DSQLITE_OMIT_LOAD_EXTENSION"),
            ]
            measure("SQLite", objects, 0, args.rounds)


if __name__ == "__main__":
    main()

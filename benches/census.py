#!/usr/bin/env python3
"""Links every member of archives alone, with undefined symbols at 0, by farlink and by llvm-jitlink, and counts.

    benches/census.py [ARCHIVE...]

Without arguments: the C, C++, compiler and zlib archives of this system and the rlibs of Rust's standard library. Prints a
row for each archive, then the reasons, each with the number of members that were refused for it and one of them.
"""

import collections
import glob
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

FARLINK = Path(__file__).resolve().parent.parent / "target/release/farlink"
JITLINK = "/usr/bin/llvm-jitlink-22"
# Where what is at 0 can be reached from, as with farlink.
LOW = ["-slab-allocate=256Mb", "-slab-address=0x10000000", "-slab-page-size=4096"]
SECONDS = 60


def system_archives():
    names = ["libm.a", "libstdc++.a", "libgcc.a", "libgcc_eh.a", "libz.a", "libc_nonshared.a", "libcrypto.a"]
    found = []
    for name in names:
        path = subprocess.run(["cc", f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
        if Path(path).is_file():
            # libm.a is a linker script on some systems.
            data = Path(path).read_bytes()
            if data.startswith(b"!<arch>"):
                found.append(Path(path))
            else:
                found += [Path(word) for word in data.decode().split() if word.endswith(".a") and Path(word).is_file()]
    sysroot = subprocess.run(["rustc", "--print", "sysroot"], capture_output=True, text=True).stdout.strip()
    rlibs = sorted(glob.glob(f"{sysroot}/lib/rustlib/x86_64-unknown-linux-gnu/lib/*.rlib"))
    return found + [Path(rlib) for rlib in rlibs]


def members(archive):
    """The objects of an archive: names may come more than once, so it is read here."""
    data = archive.read_bytes()
    position, count, long_names = 8, 0, b""
    while position + 60 <= len(data):
        header = data[position : position + 60]
        size = int(header[48:58])
        body = data[position + 60 : position + 60 + size]
        position += 60 + size + size % 2
        name = header[:16].rstrip()
        if name == b"//":
            long_names = body
        if name.startswith(b"/") and name[1:].isdigit():
            name = long_names[int(name[1:]) :].split(b"/\n")[0]
        # Relocatable objects: type 1 in the header. Metadata in an object's clothes is none of a linker's.
        if body[:4] == b"\x7fELF" and body[16:18] == b"\x01\x00" and not name.startswith(b"lib.rmeta"):
            count += 1
            yield f"{count}-{name.rstrip(b'/').decode(errors='replace').replace('/', '_')}", body


def definition(path):
    """A symbol that the object defines: llvm-jitlink links what its entry needs, and it takes any for that."""
    lines = subprocess.run(["nm", "--defined-only", "-g", path], capture_output=True, text=True).stdout.splitlines()
    names = [line.split()[-1] for line in lines if len(line.split()) == 3]
    return names[0] if names else "main"


def attempt(command):
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return f"takes more than {SECONDS} s"
    return None if done.returncode == 0 else (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[0]


def reason(text, name):
    """What messages have in common: without names, addresses and numbers."""
    text = text.replace(name, "X")
    text = re.sub(r"0x[0-9a-f]+", "N", text)
    text = re.sub(r"(against|symbol|External symbols?:?|section|targeting) +\S+", r"\1 S", text)
    return re.sub(r"\S*/\S*", "", text)[:150]


def main():
    archives = [Path(name) for name in sys.argv[1:]] or system_archives()
    linkers = {"farlink": lambda path: [FARLINK, "link", "--base", "0x10000000", "--undefined-zero", path]}
    if Path(JITLINK).exists():
        linkers["llvm-jitlink"] = lambda path: [JITLINK, "-noexec", "-phony-externals", *LOW, f"-entry={definition(path)}", path]
    else:
        print(f"{JITLINK} is not installed", file=sys.stderr)
    refused = {linker: collections.defaultdict(list) for linker in linkers}
    totals = collections.Counter()
    print(f"{'archive':<44}{'members':>8}" + "".join(f"{linker:>14}" for linker in linkers))
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor() as pool:
        for archive in archives:
            paths = []
            for name, body in members(archive):
                path = Path(folder) / name[-100:]
                path.write_bytes(body)
                paths.append(path)
            row = f"{archive.name:<44}{len(paths):>8}"
            totals["members"] += len(paths)
            for linker, command in linkers.items():
                outcomes = pool.map(lambda path: attempt(command(path)), paths)
                failed = [(path, text) for path, text in zip(paths, outcomes) if text]
                for path, text in failed:
                    refused[linker][reason(text, path.name)].append(f"{archive.name}({path.name})")
                row += f"{len(paths) - len(failed):>14}"
                totals[linker] += len(paths) - len(failed)
            print(row, flush=True)
            for path in paths:
                path.unlink()
    print(f"{'all':<44}{totals['members']:>8}" + "".join(f"{totals[linker]:>14}" for linker in linkers))
    for linker, reasons in refused.items():
        for text, names in sorted(reasons.items(), key=lambda item: -len(item[1])):
            print(f"{linker}: {len(names):>5}  {text}   (for example {names[0]})")


if __name__ == "__main__":
    main()

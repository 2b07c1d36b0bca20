#!/bin/bash
# Builds the peers and measures them beside each other.
#
#   run.sh OUT.jsonl [driver options: --rounds-scale X, --only REGEX, --million]
#
# What is built goes to $SIDE_BY_SIDE_BUILD (default: target/side-by-side of the project); a first build compiles
# cranelift and sqlite3 and takes some minutes, later ones a few seconds.
# Needs a Rust and a C++ compiler, binutils and Python. A peer whose tools are not installed is left out by name:
# llvm-19, llvm-19-dev (LLVM), lld-19, mold (linkers), libasmjit-dev (AsmJit), strace (counts of system calls),
# packages of cranelift and sqlite3 that cargo can get.
set -euo pipefail
[ $# -ge 1 ] || { sed -n 2,11p "$0"; exit 2; }
OUT=$(realpath -m "$1"); shift
HERE=$(cd "$(dirname "$0")" && pwd)
ROOT=$(cd "$HERE/../.." && pwd)
B=${SIDE_BY_SIDE_BUILD:-$ROOT/target/side-by-side}
mkdir -p "$B/left_out"
rm -f "$B"/left_out/*

newer() { [ ! -e "$1" ] || [ -n "$(find "${@:2}" -newer "$1" 2>/dev/null)" ]; }
# The driver says which peers are left out and why: file names are regular expressions for peers.
leave_out() { echo "$2" > "$B/left_out/$1"; echo "left out: $1: $2" >&2; }
# A peer that does not build is left out too, and nothing of an older build is measured in its place.
build() { # PEERS PROGRAM COMMAND...
  "${@:3}" -o "$B/$2.new" && mv "$B/$2.new" "$B/$2" || { rm -f "$B/$2"; leave_out "$1" "it does not build"; }
}
t0=$SECONDS
cd "$HERE"

# farlink itself, and the Rust peers, in the background: they are most of a first build.
(cd "$ROOT" && cargo build --release --locked --quiet -p farlink-peer -p farlink-cli -p farlink-executor) || exit 1
FARLINK=$(cd "$ROOT" && cargo metadata --locked --no-deps --format-version 1 |
  python3 -c 'import json,sys; print(json.load(sys.stdin)["target_directory"])')/release
# Copied, as `cargo install` does: what a linker has just written is in the system's cache in single pages, and takes longer
# to map than what was copied or is read again.
mkdir -p "$B/farlink"
for program in farlink farlink-executor farlink-peer; do
  cmp -s "$FARLINK/$program" "$B/farlink/$program" || cp -f "$FARLINK/$program" "$B/farlink/$program"
done
FARLINK=$B/farlink
(cd rust-peer && CARGO_TARGET_DIR="$B/cargo" cargo build --release --locked --quiet) &
CARGO=$!

# Objects to link.
if newer "$B/tiny/.done" objs/tiny_template.s gen_tiny.py; then
  as objs/tiny_template.s -o "$B/tmpl.o" && python3 gen_tiny.py "$B/tmpl.o" "$B/tiny" 1000 && touch "$B/tiny/.done"
fi
as objs/wrapper.s -o "$B/wrapper.o"
# The tiny object with a number of eight digits, and the value of the first.
sed 's/_0000/_00000000/g; s/0x5a5aa5a51234beef/1000/' objs/tiny_template.s | as - -o "$B/live.o"
gcc -O2 -fPIC -c objs/sqcheck.c -o "$B/sqcheck.o"
gcc -O2 -fPIC -c objs/hello.c -o "$B/hello.o"
gcc "$B/hello.o" -o "$B/hello_native"
g++ -O1 -fPIC -c objs/thru.cc -o "$B/thru.o"
g++ -O1 -fPIC -c objs/throw.cc -o "$B/throw.o"
echo 'int main(void) { return 0; }' > "$B/nop.c"
gcc -O2 "$B/nop.c" -o "$B/nop_dynamic" && gcc -O2 -static "$B/nop.c" -o "$B/nop_static"
if newer "$B/funcs_100000.o" gen_funcs.py; then
  python3 gen_funcs.py 4000 noeh | as - -o "$B/funcs_4000_noeh.o"
  for n in 500 1000 2000 4000 100000; do python3 gen_funcs.py $n | as - -o "$B/funcs_$n.o"; done
fi

# C++ peers.
CXX="g++ -O2 -std=c++17 -Wall -Wno-unused-function -Wno-misleading-indentation"
if ! command -v llvm-config-19 >/dev/null || [ ! -d "$(llvm-config-19 --includedir)/llvm" ]; then
  rm -f "$B/llvm_peer" "$B/tuned_executor"
  leave_out llvm "llvm-19 and llvm-19-dev are not installed"
else
  LLVM="-fno-exceptions -Wno-maybe-uninitialized -D_GNU_SOURCE -D__STDC_CONSTANT_MACROS -D__STDC_FORMAT_MACROS -D__STDC_LIMIT_MACROS"
  LLVM="$LLVM -isystem $(llvm-config-19 --includedir) -L$(llvm-config-19 --libdir)"
  if newer "$B/llvm_peer" llvm_peer.cpp common.h; then build llvm llvm_peer $CXX $LLVM llvm_peer.cpp -lLLVM-19 -lpthread; fi
  if newer "$B/tuned_executor" tuned_executor.cpp; then
    build 'llvm.*-tuned' tuned_executor $CXX $LLVM tuned_executor.cpp -lLLVM-19 -lpthread
  fi
fi
if [ ! -e /usr/include/asmjit/core.h ]; then
  rm -f "$B/asmjit_peer"
  leave_out asmjit "libasmjit-dev is not installed"
elif newer "$B/asmjit_peer" asmjit_peer.cpp common.h; then
  build asmjit asmjit_peer $CXX asmjit_peer.cpp -lasmjit -lrt -lpthread
fi
if newer "$B/dl_peer" dl_peer.cpp common.h; then build dlopen dl_peer $CXX dl_peer.cpp -ldl; fi
if newer "$B/floor_peer" floor_peer.cpp common.h; then build floor floor_peer $CXX floor_peer.cpp -ldl -lpthread; fi
for linker in ld.bfd ld.lld-19 mold; do
  command -v $linker >/dev/null || leave_out "dlopen-$linker" "$linker is not installed"
done
command -v llvm-jitlink-19 >/dev/null || leave_out llvm-jitlink-cli "llvm-19 is not installed"

# sqlite3.c comes from the libsqlite3-sys package that rust-peer/Cargo.toml names.
if [ ! -e "$B/sqlite3.o" ]; then
  SQ=$(cd rust-peer && cargo metadata --locked --format-version 1 | python3 -c 'import json,os,sys; print(next(os.path.dirname(p["manifest_path"]) for p in json.load(sys.stdin)["packages"] if p["name"]=="libsqlite3-sys"))') &&
    gcc -O2 -fPIC -c "$SQ/sqlite3/sqlite3.c" -o "$B/sqlite3.o.tmp" && mv "$B/sqlite3.o.tmp" "$B/sqlite3.o" ||
    leave_out '.* W3' "sqlite3.c cannot be had from cargo"
fi
if [ -e "$B/sqlite3.o" ] && newer "$B/sqlite3_noeh.o" "$B/sqlite3.o"; then
  objcopy --remove-section .eh_frame --remove-section .rela.eh_frame "$B/sqlite3.o" "$B/sqlite3_noeh.o"
fi
wait $CARGO || leave_out 'cranelift|jitalloc' "cargo does not build them"
echo "built in $((SECONDS - t0)) s" >&2
# SIDE_BY_SIDE_NICE=-10 (say) keeps other load on a shared machine out of the numbers.
exec nice -n "${SIDE_BY_SIDE_NICE:-0}" python3 driver.py "$B" "$FARLINK" "$OUT" "$@"

//! Has the program export the function by which the unwinder finds linked code. Linkers do that by themselves where the
//! unwinder's library is linked, which it is not: see `unwinder_when_needed` of the executor.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rustc-link-arg-bins=-Wl,--export-dynamic-symbol=_Unwind_Find_FDE");
}

//! libgcc's unwinder, which is loaded when something first needs it.
//!
//! A program that is linked with `libgcc_s` pays for that at every start, as much as a sixth of what the system and the
//! dynamic linker do for a small one. All that Rust's standard library wants of it are a few functions, for panics and
//! backtraces. Where [`unwinder_when_needed`](crate::unwinder_when_needed) defines them, as jumps through a table that is
//! filled by the first that is taken, the linker leaves the library out, and linked code still shares one unwinder with
//! the process: the same library, later.

use std::ffi::{CStr, c_void};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicPtr, Ordering};

/// Returns the handle of libgcc's library, loading it if it is not there. Null if it cannot be had.
pub(crate) fn load() -> *mut c_void {
    static HANDLE: OnceLock<usize> = OnceLock::new();
    let handle = HANDLE.get_or_init(|| {
        // SAFETY: the name is a C string. The library's initializers look at the processor and nothing else.
        (unsafe { libc::dlopen(c"libgcc_s.so.1".as_ptr(), libc::RTLD_NOW | libc::RTLD_GLOBAL) }) as usize
    });
    *handle as *mut c_void
}

/// Returns the address of a function of the unwinder's; null if there is none of that name.
pub(crate) fn function(name: &CStr) -> *mut c_void {
    let library = load();
    if library.is_null() {
        return library;
    }
    // SAFETY: the handle is that of a library that is never closed, and the name is a C string.
    unsafe { libc::dlsym(library, name.as_ptr()) }
}

/// What [`unwinder_when_needed`](crate::unwinder_when_needed) defines, in the order of [`FUNCTIONS`].
const NAMES: [&CStr; 14] = [
    c"_Unwind_Backtrace",
    c"_Unwind_DeleteException",
    c"_Unwind_FindEnclosingFunction",
    c"_Unwind_GetCFA",
    c"_Unwind_GetDataRelBase",
    c"_Unwind_GetIP",
    c"_Unwind_GetIPInfo",
    c"_Unwind_GetLanguageSpecificData",
    c"_Unwind_GetRegionStart",
    c"_Unwind_GetTextRelBase",
    c"_Unwind_RaiseException",
    c"_Unwind_Resume",
    c"_Unwind_SetGR",
    c"_Unwind_SetIP",
];

/// Where the jumps lead. Null before the first.
#[doc(hidden)]
pub static FUNCTIONS: [AtomicPtr<c_void>; NAMES.len()] = [const { AtomicPtr::new(std::ptr::null_mut()) }; NAMES.len()];

/// Fills the table; gives the function at this position of it. Ends the process if there is none: something is being
/// thrown, and cannot be.
#[doc(hidden)]
pub extern "C" fn find_functions(position: usize) -> *mut c_void {
    for (name, place) in NAMES.iter().zip(&FUNCTIONS) {
        place.store(function(name), Ordering::Relaxed);
    }
    let found = FUNCTIONS[position].load(Ordering::Relaxed);
    if found.is_null() {
        eprintln!("{} of libgcc_s.so.1, which unwinds stacks, cannot be found", NAMES[position].to_string_lossy());
        std::process::abort();
    }
    found
}

/// Has the unwinder's library loaded when something is first thrown, and not at each start.
///
/// For the root of a program that is an executor, or becomes one; it makes starting some 90 µs shorter. Defines what
/// Rust's standard library uses of the unwinder, so it cannot stand in two places, or beside another unwinder.
///
/// Linked with `-Wl,--export-dynamic-symbol=_Unwind_Find_FDE` (GNU ld wants to be told, LLD does not), the program still finds
/// unwind information through tables; otherwise each object's is registered.
#[macro_export]
macro_rules! unwinder_when_needed {
    () => {
        #[allow(unsafe_code, reason = "assembly: jumps that leave everything as it is")]
        mod unwinder_when_needed {
            // A jump leaves stack and registers as the caller has made them, so that the unwinder finds the caller where it
            // looks. Only r11 is changed, as in any call between libraries.
            ::core::arch::global_asm!(
                ".macro farlink_unwinder_jump name, position",
                ".pushsection .text.\\name,\"ax\",@progbits",
                ".globl \\name",
                ".hidden \\name",
                ".type \\name, @function",
                "\\name:",
                ".cfi_startproc",
                "mov r11, [rip + {functions} + 8 * \\position]",
                "test r11, r11",
                "jz 2f",
                "jmp r11",
                "2:",
                "mov r11d, \\position",
                "jmp .Lfarlink_find_unwinder",
                ".cfi_endproc",
                ".size \\name, . - \\name",
                ".popsection",
                ".endm",
                // Calls with the position in r11, keeping the arguments of the function that is to be called.
                ".pushsection .text.farlink_find_unwinder,\"ax\",@progbits",
                ".Lfarlink_find_unwinder:",
                ".cfi_startproc",
                "push rbp",
                ".cfi_def_cfa_offset 16",
                ".cfi_offset rbp, -16",
                "mov rbp, rsp",
                ".cfi_def_cfa_register rbp",
                "push rdi",
                "push rsi",
                "push rdx",
                "push rcx",
                "mov edi, r11d",
                "call {find}",
                "mov r11, rax",
                "pop rcx",
                "pop rdx",
                "pop rsi",
                "pop rdi",
                "pop rbp",
                ".cfi_def_cfa rsp, 8",
                "jmp r11",
                ".cfi_endproc",
                ".popsection",
                "farlink_unwinder_jump _Unwind_Backtrace, 0",
                "farlink_unwinder_jump _Unwind_DeleteException, 1",
                "farlink_unwinder_jump _Unwind_FindEnclosingFunction, 2",
                "farlink_unwinder_jump _Unwind_GetCFA, 3",
                "farlink_unwinder_jump _Unwind_GetDataRelBase, 4",
                "farlink_unwinder_jump _Unwind_GetIP, 5",
                "farlink_unwinder_jump _Unwind_GetIPInfo, 6",
                "farlink_unwinder_jump _Unwind_GetLanguageSpecificData, 7",
                "farlink_unwinder_jump _Unwind_GetRegionStart, 8",
                "farlink_unwinder_jump _Unwind_GetTextRelBase, 9",
                "farlink_unwinder_jump _Unwind_RaiseException, 10",
                "farlink_unwinder_jump _Unwind_Resume, 11",
                "farlink_unwinder_jump _Unwind_SetGR, 12",
                "farlink_unwinder_jump _Unwind_SetIP, 13",
                ".purgem farlink_unwinder_jump",
                functions = sym $crate::unwinder::FUNCTIONS,
                find = sym $crate::unwinder::find_functions,
            );
        }
    };
}

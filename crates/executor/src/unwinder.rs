//! libgcc's unwinder, which is loaded when something first needs it.
//!
//! A program that is linked with `libgcc_s` pays for that at every start, as much as a sixth of what the system and the
//! dynamic linker do for a small one. All that Rust's standard library wants of it are a few functions, for panics and
//! backtraces. Where [`unwinder_when_needed`](crate::unwinder_when_needed) defines them, as jumps that find where they lead
//! when they are first taken, the linker leaves the library out, and linked code still shares one unwinder with the process:
//! the same library, later.

use std::ffi::{CStr, c_char, c_void};
use std::sync::OnceLock;

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

/// Returns the function of the unwinder's that a jump is named after. Ends the process if there is none: something is being
/// thrown, and cannot be.
///
/// # Safety
///
/// The name must be a C string.
#[doc(hidden)]
pub unsafe extern "C" fn find_function(name: *const c_char) -> *mut c_void {
    // SAFETY: it is a C string (caller).
    let name = unsafe { CStr::from_ptr(name) };
    let found = function(name);
    if found.is_null() {
        eprintln!("{} of libgcc_s.so.1, which unwinds stacks, cannot be found", name.to_string_lossy());
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
                ".macro farlink_unwinder_jump name",
                // Where the jump leads, null before the first time; and the name.
                ".pushsection .data.\\name,\"aw\",@progbits",
                ".p2align 3",
                ".Lfarlink_\\name:",
                ".quad 0",
                ".asciz \"\\name\"",
                ".popsection",
                ".pushsection .text.\\name,\"ax\",@progbits",
                ".globl \\name",
                ".hidden \\name",
                ".type \\name, @function",
                "\\name:",
                ".cfi_startproc",
                "mov r11, [rip + .Lfarlink_\\name]",
                "test r11, r11",
                "jz 2f",
                "jmp r11",
                "2:",
                "lea r11, [rip + .Lfarlink_\\name]",
                "jmp .Lfarlink_find_unwinder",
                ".cfi_endproc",
                ".size \\name, . - \\name",
                ".popsection",
                ".endm",
                // Finds the function, keeping the arguments that it is to be called with.
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
                // Twice, so that the stack is aligned.
                "push r11",
                "push r11",
                "lea rdi, [r11 + 8]",
                "call {find}",
                "pop r11",
                "pop r11",
                "mov [r11], rax",
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
                "farlink_unwinder_jump _Unwind_Backtrace",
                "farlink_unwinder_jump _Unwind_DeleteException",
                "farlink_unwinder_jump _Unwind_FindEnclosingFunction",
                "farlink_unwinder_jump _Unwind_GetCFA",
                "farlink_unwinder_jump _Unwind_GetDataRelBase",
                "farlink_unwinder_jump _Unwind_GetIP",
                "farlink_unwinder_jump _Unwind_GetIPInfo",
                "farlink_unwinder_jump _Unwind_GetLanguageSpecificData",
                "farlink_unwinder_jump _Unwind_GetRegionStart",
                "farlink_unwinder_jump _Unwind_GetTextRelBase",
                "farlink_unwinder_jump _Unwind_RaiseException",
                "farlink_unwinder_jump _Unwind_Resume",
                "farlink_unwinder_jump _Unwind_SetGR",
                "farlink_unwinder_jump _Unwind_SetIP",
                ".purgem farlink_unwinder_jump",
                find = sym $crate::unwinder::find_function,
            );
        }
    };
}

//! Being called by linked code in the place of C functions, and having the controller called.
//!
//! `farlink_callback_entry` stores what C has passed in registers, has Rust find the result, and returns it.
//! `farlink_lazy_entry` has Rust find a function, and goes on there as if it had been called in the first place. Both are
//! entered from stubs of linked code, with the address of a [`CallbackDescriptor`] in r10. Unwind information describes them.

use crate::fork;
use crate::native::ResultRegisters;
use crate::registry::session;
use crate::services::end_process;
use farlink_addr::ExecutorAddr;
use farlink_wire::native::{
    ArgumentShape, Arguments, CallbackDescriptor, FLOAT_REGISTERS, INT_REGISTERS, ResultShape, Returned,
};
use farlink_wire::sps::{from_bytes, to_bytes};
use std::arch::global_asm;
use std::fmt;
use std::mem::offset_of;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::AtomicI64;

/// What the registers were when linked code called.
#[repr(C)]
struct EntryFrame {
    ints: [u64; INT_REGISTERS],
    floats: [u64; FLOAT_REGISTERS],
    result: ResultRegisters,
}

unsafe extern "C" {
    /// What stubs for functions of the controller jump to, with the address of a [`CallbackDescriptor`] in r10.
    fn farlink_callback_entry();

    /// What stubs for functions that are not linked yet jump to, likewise.
    fn farlink_lazy_entry();
}

/// Bytes that the processor's state takes where `xsave` puts it; 0 if there is no such instruction. Found by the first call
/// that has to know: a hypervisor takes its time to answer.
static STATE_BYTES: AtomicI64 = AtomicI64::new(STATE_UNKNOWN);

const STATE_UNKNOWN: i64 = -1;

global_asm!(
    ".pushsection .text.farlink_callback_entry,\"ax\",@progbits",
    ".globl farlink_callback_entry",
    ".hidden farlink_callback_entry",
    ".type farlink_callback_entry, @function",
    ".p2align 4",
    "farlink_callback_entry:",
    ".cfi_startproc",
    "push rbp",
    ".cfi_def_cfa_offset 16",
    ".cfi_offset rbp, -16",
    "mov rbp, rsp",
    ".cfi_def_cfa_register rbp",
    "sub rsp, {frame_bytes}",
    "mov [rsp], rdi",
    "mov [rsp + 8], rsi",
    "mov [rsp + 16], rdx",
    "mov [rsp + 24], rcx",
    "mov [rsp + 32], r8",
    "mov [rsp + 40], r9",
    "movsd qword ptr [rsp + {floats}], xmm0",
    "movsd qword ptr [rsp + {floats} + 8], xmm1",
    "movsd qword ptr [rsp + {floats} + 16], xmm2",
    "movsd qword ptr [rsp + {floats} + 24], xmm3",
    "movsd qword ptr [rsp + {floats} + 32], xmm4",
    "movsd qword ptr [rsp + {floats} + 40], xmm5",
    "movsd qword ptr [rsp + {floats} + 48], xmm6",
    "movsd qword ptr [rsp + {floats} + 56], xmm7",
    "mov rdi, r10",
    "mov rsi, rsp",
    // Above the saved rbp and the return address.
    "lea rdx, [rbp + 16]",
    "call {callback}",
    "mov rax, [rsp + {result}]",
    "mov rdx, [rsp + {result} + 8]",
    "movsd xmm0, qword ptr [rsp + {result} + 16]",
    "movsd xmm1, qword ptr [rsp + {result} + 24]",
    "mov rsp, rbp",
    "pop rbp",
    ".cfi_def_cfa rsp, 8",
    "ret",
    ".cfi_endproc",
    ".size farlink_callback_entry, . - farlink_callback_entry",
    ".popsection",
    // Keeps the stack at a multiple of 16.
    frame_bytes = const size_of::<EntryFrame>().next_multiple_of(16),
    floats = const offset_of!(EntryFrame, floats),
    result = const offset_of!(EntryFrame, result),
    callback = sym callback,
);

// Everything that can hold an argument is as it was when the function goes on: integer registers, rax (how many
// floating-point registers a function of a variable number of arguments gets), and vector registers of any length.
global_asm!(
    ".pushsection .text.farlink_lazy_entry,\"ax\",@progbits",
    ".globl farlink_lazy_entry",
    ".hidden farlink_lazy_entry",
    ".type farlink_lazy_entry, @function",
    ".p2align 4",
    "farlink_lazy_entry:",
    ".cfi_startproc",
    "push rbp",
    ".cfi_def_cfa_offset 16",
    ".cfi_offset rbp, -16",
    "mov rbp, rsp",
    ".cfi_def_cfa_register rbp",
    "push rax",
    "push rbx",
    ".cfi_offset rbx, -32",
    "push rdi",
    "push rsi",
    "push rdx",
    "push rcx",
    "push r8",
    "push r9",
    "mov rcx, [rip + {state_bytes}]",
    "cmp rcx, {state_unknown}",
    "jne 7f",
    // How many bytes xsave takes for what the system has enabled; 0 if the system does not use it.
    "mov eax, 1",
    "cpuid",
    "and ecx, {osxsave}",
    "jz 6f",
    "mov eax, {state_leaf}",
    "xor ecx, ecx",
    "cpuid",
    "mov ecx, ebx",
    "6:",
    "mov [rip + {state_bytes}], rcx",
    "7:",
    "mov rbx, rsp",
    "test rcx, rcx",
    "jz 2f",
    "sub rsp, rcx",
    "and rsp, -64",
    // The header has to be zero.
    "xor eax, eax",
    "mov [rsp + 512], rax",
    "mov [rsp + 520], rax",
    "mov [rsp + 528], rax",
    "mov [rsp + 536], rax",
    "mov [rsp + 544], rax",
    "mov [rsp + 552], rax",
    "mov [rsp + 560], rax",
    "mov [rsp + 568], rax",
    "mov eax, {state_mask}",
    "xor edx, edx",
    "xsave64 [rsp]",
    "jmp 3f",
    "2:",
    "sub rsp, 512",
    "and rsp, -16",
    "fxsave64 [rsp]",
    "3:",
    "sub rsp, {frame_bytes}",
    "mov rdi, r10",
    "mov rsi, rsp",
    "lea rdx, [rbp + 16]",
    "call {callback}",
    "mov r11, [rsp + {result}]",
    "add rsp, {frame_bytes}",
    "cmp qword ptr [rip + {state_bytes}], 0",
    "je 4f",
    "mov eax, {state_mask}",
    "xor edx, edx",
    "xrstor64 [rsp]",
    "jmp 5f",
    "4:",
    "fxrstor64 [rsp]",
    "5:",
    "mov rsp, rbx",
    "pop r9",
    "pop r8",
    "pop rcx",
    "pop rdx",
    "pop rsi",
    "pop rdi",
    "pop rbx",
    "pop rax",
    "pop rbp",
    ".cfi_def_cfa rsp, 8",
    "jmp r11",
    ".cfi_endproc",
    ".size farlink_lazy_entry, . - farlink_lazy_entry",
    ".popsection",
    // SSE, AVX, MPX bounds, and the three parts of AVX-512.
    state_mask = const 0xee,
    state_unknown = const STATE_UNKNOWN,
    osxsave = const 1 << 27,
    state_leaf = const 13,
    state_bytes = sym STATE_BYTES,
    frame_bytes = const size_of::<EntryFrame>().next_multiple_of(16),
    result = const offset_of!(EntryFrame, result),
    callback = sym callback,
);

/// Returns the address that stubs for functions jump to that are not linked yet.
pub(crate) fn lazy_entry() -> ExecutorAddr {
    ExecutorAddr::new(farlink_lazy_entry as *const () as u64)
}

/// Returns the address that stubs for functions of the controller jump to.
pub(crate) fn callback_entry() -> ExecutorAddr {
    ExecutorAddr::new(farlink_callback_entry as *const () as u64)
}

/// Has the controller's function called that `descriptor` stands for, and puts its result into the frame.
///
/// # Safety
///
/// The descriptor must be one that a controller has linked into this process, and the frame and the stack what the
/// registers and the stack were when its function was called.
unsafe extern "C" fn callback(descriptor: *const CallbackDescriptor, frame: *mut EntryFrame, stack: *const u64) {
    // SAFETY: the descriptor is there (caller). It may lie at any address.
    let descriptor = unsafe { descriptor.read_unaligned() };
    // SAFETY: nobody else refers to the frame (caller).
    let frame = unsafe { &mut *frame };
    let serve = || {
        let arguments = ArgumentShape::from_word(descriptor.arguments).map_err(|error| error.to_string())?;
        let result = ResultShape::from_word(descriptor.result).map_err(|error| error.to_string())?;
        // SAFETY: linked code has called a function that has as many words on the stack (caller).
        let stack = unsafe { std::slice::from_raw_parts(stack, arguments.stack) };
        let arguments = Arguments::from_words(arguments, &frame.ints, &frame.floats, stack);
        call_controller(&descriptor, &arguments, result)
    };
    // A panic stops here: it must not unwind into C.
    let returned = catch_unwind(AssertUnwindSafe(serve)).unwrap_or_else(|_| Err("a call back panicked".to_owned()));
    match returned.and_then(|returned| Ok((returned, ResultShape::from_word(descriptor.result).map_err(text)?))) {
        Ok((_, ResultShape::Void)) => {}
        Ok((returned, ResultShape::Registers(first, second))) => frame.result.set(returned.words(), first, second),
        Ok((returned, ResultShape::Memory(_))) => {
            let place = frame.ints[0] as usize as *mut u8;
            // SAFETY: linked code passes the address of the result, which has as many bytes (checked in `call_controller`).
            unsafe { std::ptr::copy_nonoverlapping(returned.bytes().as_ptr(), place, returned.bytes().len()) };
            frame.result.ints[0] = frame.ints[0];
        }
        Err(text) => end(&text),
    }
}

fn text(error: impl fmt::Display) -> String {
    error.to_string()
}

/// Calls the controller's function; gives its result, which has the length that the shape says.
fn call_controller(
    descriptor: &CallbackDescriptor,
    arguments: &Arguments,
    result: ResultShape,
) -> Result<Returned, String> {
    if fork::is_child() {
        return Err("this process was forked by linked code: the controller is its parent's".to_owned());
    }
    let session = session(ExecutorAddr::new(descriptor.session))?;
    let returned = session.call_controller(ExecutorAddr::new(descriptor.tag), to_bytes(arguments))?;
    let returned: Returned = from_bytes(&returned).map_err(text)?;
    if returned.bytes().len() != result.bytes() {
        return Err(format!("{} bytes came back for a result of {}", returned.bytes().len(), result.bytes()));
    }
    Ok(returned)
}

/// Exit status of a child of an executor that has called the controller, which is its parent's.
const CHILD_STATUS: i32 = 125;

/// Ends the process: linked code waits for a result that does not come.
fn end(text: &str) -> ! {
    eprintln!("farlink-executor: linked code called the controller: {text}");
    if fork::is_child() {
        end_process(CHILD_STATUS);
    }
    std::process::abort()
}

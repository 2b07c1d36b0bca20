//! The way between Rust and C functions of any arguments, by the System V convention of x86-64: calling them, and being
//! called by linked code in their place.
//!
//! `farlink_call_native` loads registers and stack words from a frame, calls, and stores what comes back. Unwind
//! information describes it, so backtraces go through it; but an exception finds the end of the stack here, as it does in
//! what calls `main` natively: the runtime that threw it ends the process in its own words, and never unwinds Rust's
//! frames. `farlink_callback_entry` is the reverse: it stores what C has passed, and has Rust find the result.

use crate::fork;
use crate::registry::session;
use crate::services::end_process;
use farlink_addr::ExecutorAddr;
use farlink_wire::native::{
    ArgumentShape, Arguments, CallbackDescriptor, FLOAT_REGISTERS, INT_REGISTERS, NativeCall, RegisterClass,
    ResultShape, Returned,
};
use farlink_wire::sps::{from_bytes, to_bytes};
use std::arch::global_asm;
use std::fmt;
use std::mem::offset_of;
use std::panic::{AssertUnwindSafe, catch_unwind};

/// A call for `farlink_call_native`.
#[repr(C)]
struct CallFrame {
    function: u64,
    ints: *const [u64; INT_REGISTERS],
    floats: *const [u64; FLOAT_REGISTERS],
    /// How many floating-point registers are used: functions of a variable number of arguments want to know.
    float_count: u64,
    stack: *const u64,
    stack_count: u64,
    result: ResultRegisters,
}

/// Registers that have a result.
#[derive(Clone, Copy, Default)]
#[repr(C)]
struct ResultRegisters {
    ints: [u64; 2],
    floats: [u64; 2],
}

impl ResultRegisters {
    /// Returns the words of a result of this shape.
    fn words(&self, first: RegisterClass, second: Option<RegisterClass>) -> Returned {
        let [mut ints, mut floats] = [self.ints.into_iter(), self.floats.into_iter()];
        let mut next = |class| match class {
            RegisterClass::Int => ints.next(),
            RegisterClass::Float => floats.next(),
        };
        let words = [Some(first), second].map(|class| class.and_then(&mut next).unwrap_or(0));
        Returned::from_words(words, 1 + usize::from(second.is_some()))
    }

    /// Puts words where a result of this shape has them.
    fn set(&mut self, words: [u64; 2], first: RegisterClass, second: Option<RegisterClass>) {
        let [mut ints, mut floats] = [self.ints.iter_mut(), self.floats.iter_mut()];
        for (class, word) in [Some(first), second].into_iter().flatten().zip(words) {
            let register = if class == RegisterClass::Int { ints.next() } else { floats.next() };
            if let Some(register) = register {
                *register = word;
            }
        }
    }
}

/// What the registers were when linked code called.
#[repr(C)]
struct EntryFrame {
    ints: [u64; INT_REGISTERS],
    floats: [u64; FLOAT_REGISTERS],
    result: ResultRegisters,
}

unsafe extern "C" {
    /// Makes the call of a frame, and stores its result there.
    fn farlink_call_native(frame: *mut CallFrame);

    /// What stubs for functions of the controller jump to, with the address of a [`CallbackDescriptor`] in r10.
    fn farlink_callback_entry();
}

global_asm!(
    ".pushsection .text.farlink_call_native,\"ax\",@progbits",
    ".globl farlink_call_native",
    ".hidden farlink_call_native",
    ".type farlink_call_native, @function",
    ".p2align 4",
    // The personality of what calls C: an exception that comes here finds _URC_END_OF_STACK.
    ".Lfarlink_end_of_stack:",
    "mov eax, 5",
    "ret",
    ".p2align 4",
    "farlink_call_native:",
    ".cfi_startproc",
    ".cfi_personality 0x1b, .Lfarlink_end_of_stack",
    "push rbp",
    ".cfi_def_cfa_offset 16",
    ".cfi_offset rbp, -16",
    "mov rbp, rsp",
    ".cfi_def_cfa_register rbp",
    "push rbx",
    ".cfi_offset rbx, -24",
    "mov rbx, rdi",
    // The stack words, at a multiple of 16, touched from the top down so that a guard page is not missed.
    "mov rcx, [rbx + {stack_count}]",
    "lea rax, [rcx * 8 + 8]",
    "sub rsp, rax",
    "and rsp, -16",
    "test rcx, rcx",
    "jz 3f",
    "mov rsi, [rbx + {stack}]",
    "2:",
    "mov rax, [rsi + rcx * 8 - 8]",
    "mov [rsp + rcx * 8 - 8], rax",
    "dec rcx",
    "jnz 2b",
    "3:",
    "mov r11, [rbx + {ints}]",
    "mov rax, [rbx + {float_count}]",
    "test eax, eax",
    "jz 4f",
    "mov r10, [rbx + {floats}]",
    "movsd xmm0, qword ptr [r10]",
    "movsd xmm1, qword ptr [r10 + 8]",
    "movsd xmm2, qword ptr [r10 + 16]",
    "movsd xmm3, qword ptr [r10 + 24]",
    "movsd xmm4, qword ptr [r10 + 32]",
    "movsd xmm5, qword ptr [r10 + 40]",
    "movsd xmm6, qword ptr [r10 + 48]",
    "movsd xmm7, qword ptr [r10 + 56]",
    "4:",
    "mov rdi, [r11]",
    "mov rsi, [r11 + 8]",
    "mov rdx, [r11 + 16]",
    "mov rcx, [r11 + 24]",
    "mov r8, [r11 + 32]",
    "mov r9, [r11 + 40]",
    "call [rbx + {function}]",
    "mov [rbx + {result}], rax",
    "mov [rbx + {result} + 8], rdx",
    "movsd qword ptr [rbx + {result} + 16], xmm0",
    "movsd qword ptr [rbx + {result} + 24], xmm1",
    "lea rsp, [rbp - 8]",
    "pop rbx",
    "pop rbp",
    ".cfi_def_cfa rsp, 8",
    "ret",
    ".cfi_endproc",
    ".size farlink_call_native, . - farlink_call_native",
    ".popsection",
    function = const offset_of!(CallFrame, function),
    ints = const offset_of!(CallFrame, ints),
    floats = const offset_of!(CallFrame, floats),
    float_count = const offset_of!(CallFrame, float_count),
    stack = const offset_of!(CallFrame, stack),
    stack_count = const offset_of!(CallFrame, stack_count),
    result = const offset_of!(CallFrame, result),
);

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

/// Calls a C function; gives what it returned.
///
/// # Errors
///
/// Fails if the function is the null address, or there is no memory for its result.
///
/// # Safety
///
/// Unless it is null, the address must be that of a function of this process that may be called with these arguments, and
/// leaves its result as the shape says.
#[inline]
pub unsafe fn call_native(call: &NativeCall) -> Result<Returned, String> {
    let NativeCall { function, result, arguments } = call;
    match *result {
        // SAFETY: as for this function (caller).
        ResultShape::Void => unsafe { call_registers(*function, arguments) }.map(|_| Returned::from_words([0; 2], 0)),
        ResultShape::Registers(first, second) => {
            // SAFETY: as for this function (caller).
            unsafe { call_registers(*function, arguments) }.map(|result| result.words(first, second))
        }
        ResultShape::Memory(bytes) => {
            // Words, so that the memory has their alignment.
            let mut memory: Vec<u64> = vec![0; (bytes as usize).div_ceil(size_of::<u64>())];
            let mut arguments = arguments.clone();
            arguments.set_first_int(memory.as_mut_ptr() as u64);
            // SAFETY: as for this function (caller); the first argument is the address of as many bytes as it writes.
            unsafe { call_registers(*function, &arguments) }?;
            let mut bytes_written: Vec<u8> = memory.into_iter().flat_map(u64::to_le_bytes).collect();
            bytes_written.truncate(bytes as usize);
            Ok(Returned::from_memory(bytes_written))
        }
    }
}

/// Calls a function; gives the registers afterwards.
///
/// # Safety
///
/// As [`call_native`], for a result that is not in memory, or whose address is the first argument.
#[inline]
unsafe fn call_registers(function: ExecutorAddr, arguments: &Arguments) -> Result<ResultRegisters, String> {
    if function.is_null() {
        return Err("the function to call is null".to_owned());
    }
    let mut frame = CallFrame {
        function: function.as_u64(),
        ints: arguments.ints(),
        floats: arguments.floats(),
        float_count: arguments.shape().floats as u64,
        stack: arguments.stack().as_ptr(),
        stack_count: arguments.stack().len() as u64,
        result: ResultRegisters::default(),
    };
    // SAFETY: the frame's pointers are to as many words as it says, and the function may be called (caller).
    unsafe { farlink_call_native(&raw mut frame) };
    Ok(frame.result)
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

//! Calling C functions of any arguments from Rust, by the System V convention of x86-64.
//!
//! `farlink_call_native` loads registers and stack words from a frame, calls, and stores what comes back. Unwind
//! information describes it, so backtraces go through it; but an exception finds the end of the stack here, as it does in
//! what calls `main` natively: the runtime that threw it ends the process in its own words, and never unwinds Rust's
//! frames.

use farlink_addr::ExecutorAddr;
use farlink_wire::native::{
    Arguments, FLOAT_REGISTERS, INT_REGISTERS, NativeCall, RegisterClass, ResultShape, Returned,
};
use std::arch::global_asm;
use std::mem::offset_of;

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
pub(crate) struct ResultRegisters {
    pub(crate) ints: [u64; 2],
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
    pub(crate) fn set(&mut self, words: [u64; 2], first: RegisterClass, second: Option<RegisterClass>) {
        let [mut ints, mut floats] = [self.ints.iter_mut(), self.floats.iter_mut()];
        for (class, word) in [Some(first), second].into_iter().flatten().zip(words) {
            let register = if class == RegisterClass::Int { ints.next() } else { floats.next() };
            if let Some(register) = register {
                *register = word;
            }
        }
    }
}

unsafe extern "C" {
    /// Makes the call of a frame, and stores its result there.
    fn farlink_call_native(frame: *mut CallFrame);
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

//! Calling linked code: functions like C's `main`, plain functions, and programs that end the process.

use crate::wrap::{OutOfBand, wrappers};
use crate::{fork, main_thread};
use farlink_addr::ExecutorAddr;
use farlink_wire::msg::MainCall;
use farlink_wire::sps::{Blob, SpsError};
use std::convert::Infallible;
use std::ffi::{CString, c_char, c_int};

wrappers! { announce:
    RUN_AS_MAIN => run_as_main = run_main;
    RUN_AS_VOID_FUNCTION => run_as_void_function = run_void;
    RUN_AS_INT_FUNCTION => run_as_int_function = run_int;
    RUN_PROGRAM => run_program = run_to_the_end;
}

unsafe extern "C" {
    /// The process's environment: an array of C strings that ends with null.
    static environ: *const *const c_char;
}

/// C's `main`, and what initializers are called as.
pub(crate) type Main = unsafe extern "C" fn(c_int, *const *const c_char, *const *const c_char) -> c_int;

/// Calls `function` with the other arguments.
///
/// There is no unwind information for this code, so an exception that nobody catches finds the end of the stack here, as it
/// does in what calls `main` natively, and the runtime that threw it says so in its own words.
///
/// # Safety
///
/// The function must be one that may be called so.
#[unsafe(naked)]
unsafe extern "C" fn call_main(
    function: Main,
    argc: c_int,
    argv: *const *const c_char,
    environment: *const *const c_char,
) -> c_int {
    std::arch::naked_asm!(
        "push rbp",
        "mov rbp, rsp",
        "mov rax, rdi",
        "mov edi, esi",
        "mov rsi, rdx",
        "mov rdx, rcx",
        "call rax",
        "pop rbp",
        "ret",
    )
}

/// Arguments as C wants them: `argv[argc]` is null.
pub(crate) struct Argv {
    strings: Vec<CString>,
    pointers: Vec<*const c_char>,
}

// SAFETY: the pointers are to the strings' own bytes, which belong to no thread.
unsafe impl Send for Argv {}
// SAFETY: as above; nothing is written through them here.
unsafe impl Sync for Argv {}

impl Argv {
    pub(crate) fn new(args: Vec<Blob<'static>>) -> Result<Self, String> {
        let strings: Result<Vec<_>, _> = args.into_iter().map(|arg| CString::new(arg.into_owned())).collect();
        let strings = strings.map_err(|_| "an argument of a program cannot hold a NUL")?;
        let mut pointers: Vec<_> = strings.iter().map(|string| string.as_ptr()).collect();
        pointers.push(std::ptr::null());
        c_int::try_from(strings.len()).map_err(|_| "a program cannot have that many arguments")?;
        Ok(Self { strings, pointers })
    }

    /// Returns whether these are the same arguments.
    pub(crate) fn is_same(&self, other: &Self) -> bool {
        self.strings == other.strings
    }

    fn count(&self) -> c_int {
        // Checked to fit when it was made.
        self.strings.len() as c_int
    }

    /// Calls a function as C's `main` is called.
    ///
    /// # Safety
    ///
    /// The function must be one that may be called so.
    pub(crate) unsafe fn call(&self, function: Main) -> c_int {
        // SAFETY: reading the pointer races only with code that replaces the whole environment, as natively.
        let environment = unsafe { std::ptr::addr_of!(environ).read() };
        // SAFETY: the function may be called so (caller); the arguments live as long as `self`.
        unsafe { call_main(function, self.count(), self.pointers.as_ptr(), environment) }
    }
}

/// Returns the function at an address that a controller gives.
///
/// # Safety
///
/// `F` must be a function pointer type, and the address that of such a function.
unsafe fn function<F: Copy>(addr: ExecutorAddr) -> Result<F, OutOfBand> {
    const { assert!(size_of::<F>() == size_of::<usize>()) };
    if addr.is_null() {
        return Err("the function to call is null".to_owned());
    }
    let address = addr.as_u64() as usize;
    // SAFETY: the address is not null, and is that of a function of this type (caller).
    Ok(unsafe { std::mem::transmute_copy::<usize, F>(&address) })
}

fn run_main(call: MainCall) -> Result<i64, OutOfBand> {
    let argv = Argv::new(call.args)?;
    // SAFETY: the controller names a function that may be called as `main`.
    let main: Main = unsafe { function(call.main) }?;
    let result = main_thread::run(move || {
        // SAFETY: as above.
        let status = unsafe { argv.call(main) };
        fork::exit_if_child(status);
        status
    });
    Ok(i64::from(result))
}

fn run_void((addr,): (ExecutorAddr,)) -> Result<i32, OutOfBand> {
    run_int((addr, 0))
}

fn run_int((addr, argument): (ExecutorAddr, i32)) -> Result<i32, OutOfBand> {
    // SAFETY: the controller names an `int32_t f(int32_t)`, or one without arguments, which ignores all.
    let function: Main = unsafe { function(addr) }?;
    // SAFETY: as above.
    Ok(unsafe { call_main(function, argument, std::ptr::null(), std::ptr::null()) })
}

/// Runs a program as its own process would: what it leaves for its exit runs, its streams are flushed, and the
/// process ends with its status.
fn run_to_the_end(call: MainCall) -> Result<SpsError, OutOfBand> {
    let Err(text) = run_and_exit(call);
    Ok(SpsError(Err(text)))
}

fn run_and_exit(call: MainCall) -> Result<Infallible, String> {
    let argv = Argv::new(call.args)?;
    // SAFETY: the controller names a function that may be called as `main`.
    let main: Main = unsafe { function(call.main) }?;
    let ended = main_thread::run_unless_busy(move || -> Infallible {
        // SAFETY: as above.
        let status = unsafe { argv.call(main) };
        // SAFETY: `exit` runs what was registered for it. This thread holds no lock, and it runs once: the main
        // thread takes no other job.
        unsafe { libc::exit(status) }
    });
    ended.ok_or_else(|| "the main thread runs another call; a program can only run there".to_owned())
}

/// Ends the process at once, with whatever is running in it.
pub(crate) fn end_process(status: i32) -> ! {
    // SAFETY: `_exit` has no requirement: nothing runs after it.
    unsafe { libc::_exit(status) }
}

/// Writes what the C library's streams have in their buffers.
pub(crate) fn flush_streams() {
    // SAFETY: null means all streams. One that cannot be written keeps what it has.
    unsafe { libc::fflush(std::ptr::null_mut()) };
}

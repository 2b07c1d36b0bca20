//! Alternate stacks for signal handlers: where a report is written when a thread's own stack is full.
//!
//! Rust's start-up code gives its threads such stacks, but not every executor begins with that. Each thread gets one the
//! first time it runs a call, unless it has one.

use libc::{SS_DISABLE, c_void, stack_t};
use std::cell::OnceCell;
use std::mem::MaybeUninit;

/// Bytes of an alternate stack: the system's part with all registers is a few KiB.
const BYTES: usize = 64 << 10;

thread_local! {
    static OWN: OnceCell<Option<SignalStack>> = const { OnceCell::new() };
}

/// Gives the calling thread an alternate stack, for as long as it lives, if it has none.
pub(crate) fn ensure() {
    // Where the thread is ending, nothing runs any more.
    let _ = OWN.try_with(|own| {
        own.get_or_init(SignalStack::install);
    });
}

/// The alternate stack of a thread.
struct SignalStack {
    memory: Box<[MaybeUninit<u8>]>,
}

/// Returns the alternate stack that the calling thread has.
fn current() -> Option<stack_t> {
    // SAFETY: the structure is plain bytes, to be filled in.
    let mut stack: stack_t = unsafe { std::mem::zeroed() };
    // SAFETY: the structure is there to be written.
    let is_known = unsafe { libc::sigaltstack(std::ptr::null(), &raw mut stack) } == 0;
    is_known.then_some(stack)
}

impl SignalStack {
    fn install() -> Option<Self> {
        current().filter(|stack| stack.ss_flags & SS_DISABLE != 0)?;
        // None of it is touched before it is needed.
        let mut memory = Box::new_uninit_slice(BYTES);
        let stack = stack_t { ss_sp: memory.as_mut_ptr().cast::<c_void>(), ss_flags: 0, ss_size: BYTES };
        // SAFETY: the memory is there until the stack is disabled when this is dropped, at the end of its thread.
        let is_set = unsafe { libc::sigaltstack(&raw const stack, std::ptr::null_mut()) } == 0;
        is_set.then_some(Self { memory })
    }
}

impl Drop for SignalStack {
    fn drop(&mut self) {
        // Linked code may have given the thread another.
        if current().is_none_or(|stack| !std::ptr::eq(stack.ss_sp.cast(), self.memory.as_ptr())) {
            return;
        }
        let none = stack_t { ss_sp: std::ptr::null_mut(), ss_flags: SS_DISABLE, ss_size: 0 };
        // SAFETY: no handler runs on it: this is ordinary code of the thread that it belongs to.
        unsafe { libc::sigaltstack(&raw const none, std::ptr::null_mut()) };
    }
}

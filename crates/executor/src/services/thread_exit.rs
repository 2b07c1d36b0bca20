//! What linked code registers for the end of a thread: the destructors of C++'s and Rust's thread-local variables.
//!
//! The C library runs them, and knows nothing of an object that is removed before the thread ends. So what it gets is a
//! function here, which calls the destructor only if the object is still there.

use farlink_addr::ExecutorAddr;
use std::collections::{HashMap, HashSet};
use std::ffi::{c_int, c_void};
use std::sync::{LazyLock, Mutex, MutexGuard, PoisonError};

type Destructor = unsafe extern "C" fn(*mut c_void);

unsafe extern "C" {
    fn __cxa_thread_atexit_impl(destructor: Destructor, object: *mut c_void, dso_handle: *mut c_void) -> c_int;
}

/// A destructor that waits for the end of its thread.
struct Waiting {
    destructor: Destructor,
    object: *mut c_void,
    dso_handle: u64,
}

/// The addresses of those that wait, by the handle of the object that they belong to.
fn waiting() -> MutexGuard<'static, HashMap<u64, HashSet<usize>>> {
    static WAITING: LazyLock<Mutex<HashMap<u64, HashSet<usize>>>> = LazyLock::new(Mutex::default);
    // Nothing that can panic runs under this lock.
    WAITING.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What linked code gets for `__cxa_thread_atexit` and `__cxa_thread_atexit_impl`.
unsafe extern "C" fn register(destructor: Destructor, object: *mut c_void, dso_handle: *mut c_void) -> c_int {
    let dso_handle = dso_handle as u64;
    let entry = Box::into_raw(Box::new(Waiting { destructor, object, dso_handle }));
    waiting().entry(dso_handle).or_default().insert(entry as usize);
    // An address in the program or library that the function belongs to: that has to stay until it has run.
    let own = run as *const () as *mut c_void;
    // SAFETY: the function takes what is passed with it.
    let result = unsafe { __cxa_thread_atexit_impl(run, entry.cast(), own) };
    if result != 0 {
        drop(take(entry));
    }
    result
}

/// Takes an entry out of those that wait, if its object is still there.
fn take(entry: *mut Waiting) -> Option<Box<Waiting>> {
    let mut waiting = waiting();
    // SAFETY: the entry was leaked when it was registered, and is taken back here only, once, at the end of its thread or
    // if it could not be registered.
    let entry = unsafe { Box::from_raw(entry) };
    let of_object = waiting.get_mut(&entry.dso_handle)?;
    let is_waiting = of_object.remove(&(&raw const *entry as usize));
    if of_object.is_empty() {
        waiting.remove(&entry.dso_handle);
    }
    is_waiting.then_some(entry)
}

unsafe extern "C" fn run(entry: *mut c_void) {
    if let Some(entry) = take(entry.cast()) {
        // SAFETY: linked code has registered the destructor for this, and its object is still there.
        unsafe { (entry.destructor)(entry.object) };
    }
}

/// Forgets what the object with this handle has registered: its memory goes.
pub(crate) fn forget(dso_handle: ExecutorAddr) {
    waiting().remove(&dso_handle.as_u64());
}

/// Returns the address of a function that takes the place of the C library's own for linked code.
pub(crate) fn address_of(name: &str) -> Option<ExecutorAddr> {
    let is_known = matches!(name, "__cxa_thread_atexit" | "__cxa_thread_atexit_impl");
    is_known.then(|| ExecutorAddr::new(register as *const () as u64))
}

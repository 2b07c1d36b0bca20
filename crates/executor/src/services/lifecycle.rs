//! The beginning and the end of linked objects: initializers, and what is to be done when an object is removed or the
//! process exits.
//!
//! What an object registers with `__cxa_atexit` is kept by the C library under the object's `__dso_handle`. Its arrays
//! of finalizers are kept here. When the process exits, the C library runs its own list, last to first; the handler
//! below was registered before any initializer ran, so it is the last to run, as natively.

use crate::services::calls::{Argv, Main};
use crate::services::thread_exit;
use crate::wrap::{OutOfBand, wrappers};
use crate::{main_thread, trace};
use farlink_addr::{ExecutorAddr, ExecutorAddrRange};
use farlink_wire::msg::{FiniArray, ObjectExits, RunInitializers};
use farlink_wire::sps::SpsError;
use std::ffi::c_void;
use std::sync::{Arc, Mutex, MutexGuard, Once, PoisonError};

wrappers! { announce:
    RUN_INITIALIZERS => run_initializers = initialize;
    RUN_EXITS => run_exits = end_object;
}

unsafe extern "C" {
    /// Runs what was registered with `__cxa_atexit` for this handle, last to first, and forgets it.
    fn __cxa_finalize(dso_handle: *mut c_void);
}

/// The arrays of finalizers that have not run, with their objects' handles, in the order of their registration.
static FINI: Mutex<Vec<(ExecutorAddr, FiniArray)>> = Mutex::new(Vec::new());

/// The arguments that initializers got: they live as long as the process, since an initializer may keep them.
static ARGV: Mutex<Vec<Arc<Argv>>> = Mutex::new(Vec::new());

/// Keeps arguments for good. Those that are the same as before are the same: most links have none, or the program's.
fn kept(argv: Argv) -> Arc<Argv> {
    let mut all = ARGV.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(known) = all.iter().find(|known| known.is_same(&argv)) {
        return Arc::clone(known);
    }
    let argv = Arc::new(argv);
    all.push(Arc::clone(&argv));
    argv
}

fn fini() -> MutexGuard<'static, Vec<(ExecutorAddr, FiniArray)>> {
    // Nothing that can panic runs under this lock.
    FINI.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Bytes of an entry of an array of functions.
const ENTRY_BYTES: u64 = 8;

fn initialize(request: RunInitializers) -> Result<SpsError, OutOfBand> {
    static REGISTER: Once = Once::new();
    let fini_arrays = request.exits.iter().flat_map(|exits| &exits.fini).map(|fini| fini.array);
    for array in request.init.iter().copied().chain(fini_arrays) {
        if !array.len().is_multiple_of(ENTRY_BYTES) || array.start().is_null() {
            return Ok(SpsError(Err(format!("{array} is not an array of functions"))));
        }
    }
    if request.ifuncs.iter().any(|(resolver, slot)| resolver.is_null() || slot.is_null()) {
        return Ok(SpsError(Err("an IFUNC has no resolver or no slot".to_owned())));
    }
    let argv = match Argv::new(request.args) {
        Ok(argv) => kept(argv),
        Err(text) => return Ok(SpsError(Err(text))),
    };
    REGISTER.call_once(|| {
        // SAFETY: the handler is a function of this process that stays.
        unsafe { libc::atexit(run_at_exit) };
    });
    for ObjectExits { dso_handle, fini: arrays } in request.exits {
        fini().extend(arrays.into_iter().map(|array| (dso_handle, array)));
    }
    let (init, ifuncs) = (request.init, request.ifuncs);
    main_thread::run(move || {
        for (resolver, slot) in ifuncs {
            // SAFETY: the controller names a resolver, which has no arguments, and a slot of linked data for its result.
            unsafe { resolve_ifunc(resolver, slot) };
        }
        for array in init {
            for function in entries(array) {
                let address = ExecutorAddr::new(function as *const () as u64);
                // SAFETY: the controller names arrays of initializers, which are called as `main` is.
                trace::span(address, || unsafe { argv.call(function) });
            }
        }
    });
    Ok(SpsError(Ok(())))
}

/// Calls the resolver of an IFUNC, and puts the address of what it chose into the slot.
///
/// # Safety
///
/// `resolver` must be such a function, and `slot` 8 aligned bytes that nothing reads before this returns.
unsafe fn resolve_ifunc(resolver: ExecutorAddr, slot: ExecutorAddr) {
    // SAFETY: the address is that of a function of this type (caller).
    let resolver =
        unsafe { std::mem::transmute::<usize, unsafe extern "C" fn() -> *const c_void>(resolver.as_u64() as usize) };
    // SAFETY: as above.
    let chosen = unsafe { resolver() };
    // SAFETY: the slot can be written (caller).
    unsafe { (slot.as_u64() as usize as *mut *const c_void).write(chosen) };
}

/// Returns the functions of an array. Entries of 0 and -1 are none.
fn entries(array: ExecutorAddrRange) -> Vec<Main> {
    let count = array.len() / ENTRY_BYTES;
    let start = array.start().as_u64() as *const usize;
    let read = |index: u64| {
        // SAFETY: the controller names an array of pointers in memory that it has linked; unaligned ones are allowed.
        let entry = unsafe { start.wrapping_add(index as usize).read_unaligned() };
        if entry == 0 || entry == usize::MAX {
            return None;
        }
        // SAFETY: the entry is the address of a function; one that expects fewer arguments ignores the others.
        Some(unsafe { std::mem::transmute::<usize, Main>(entry) })
    };
    (0..count).filter_map(read).collect()
}

/// Runs what an object left for its end.
fn end_object((dso_handle,): (ExecutorAddr,)) -> Result<SpsError, OutOfBand> {
    if dso_handle.is_null() {
        return Ok(SpsError(Err("the null handle stands for the whole process".to_owned())));
    }
    let arrays: Vec<FiniArray> = {
        let mut all = fini();
        let (own, others) = all.drain(..).partition(|(handle, _)| *handle == dso_handle);
        *all = others;
        let own: Vec<(ExecutorAddr, FiniArray)> = own;
        own.into_iter().map(|(_, array)| array).collect()
    };
    thread_exit::forget(dso_handle);
    main_thread::run(move || {
        // SAFETY: the C library compares the handle and calls what was registered with it, in memory that is still
        // there: this runs before the object's memory goes.
        unsafe { __cxa_finalize(dso_handle.as_u64() as *mut c_void) };
        run_fini(arrays);
    });
    Ok(SpsError(Ok(())))
}

/// Runs arrays of finalizers: the reverse of the order in which their initializers would run.
fn run_fini(mut arrays: Vec<FiniArray>) {
    arrays.sort_by_key(|array| array.priority);
    for array in arrays.into_iter().rev() {
        for function in entries(array.array).into_iter().rev() {
            // SAFETY: the controller named an array of finalizers, functions without arguments.
            let function = unsafe { std::mem::transmute::<Main, unsafe extern "C" fn()>(function) };
            // SAFETY: as above.
            unsafe { function() };
        }
    }
}

/// Runs the finalizers of every object, when the process exits.
extern "C" fn run_at_exit() {
    // A finalizer may add to the list, or exit another way: what runs is taken out first.
    loop {
        let arrays: Vec<_> = std::mem::take(&mut *fini()).into_iter().map(|(_, array)| array).collect();
        if arrays.is_empty() {
            return;
        }
        run_fini(arrays);
    }
}

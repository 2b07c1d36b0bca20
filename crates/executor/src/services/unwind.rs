//! Unwind information: telling the process's unwinder about `.eh_frame` sections.
//!
//! libgcc takes a section and walks it to the zero word at its end. LLVM's libunwind has another function for whole
//! sections; where that is in the process, it is the unwinder.

use crate::unwinder;
use crate::wrap::{OutOfBand, wrappers};
use farlink_addr::{ExecutorAddr, ExecutorAddrRange};
use farlink_wire::sps::SpsError;
use std::collections::{BTreeSet, HashSet};
use std::ffi::{CStr, c_void};
use std::sync::{LazyLock, Mutex, MutexGuard, OnceLock, PoisonError};

wrappers! { announce:
    REGISTER_EH_FRAME => register_eh_frame = register;
    DEREGISTER_EH_FRAME => deregister_eh_frame = deregister;
    REGISTER_EH_FRAME_19 => register_eh_frame_19 = register;
    DEREGISTER_EH_FRAME_19 => deregister_eh_frame_19 = deregister;
}

type FrameFunction = unsafe extern "C" fn(*const c_void);

/// The pair of functions that this process's unwinder has.
fn functions() -> (FrameFunction, FrameFunction) {
    static FUNCTIONS: OnceLock<(FrameFunction, FrameFunction)> = OnceLock::new();
    *FUNCTIONS.get_or_init(|| {
        let typed = |address: *mut c_void| {
            // SAFETY: the functions of these names have this type, in libunwind and in libgcc.
            (!address.is_null()).then(|| unsafe { std::mem::transmute::<*mut c_void, FrameFunction>(address) })
        };
        // SAFETY: the name is a C string, and the handle means all libraries of the process.
        let find = |name: &CStr| typed(unsafe { libc::dlsym(libc::RTLD_DEFAULT, name.as_ptr()) });
        let add = find(c"__unw_add_dynamic_eh_frame_section");
        let remove = find(c"__unw_remove_dynamic_eh_frame_section");
        let of_libgcc = |name| typed(unwinder::function(name)).unwrap_or(nobody_unwinds);
        add.zip(remove).unwrap_or_else(|| (of_libgcc(c"__register_frame"), of_libgcc(c"__deregister_frame")))
    })
}

/// In place of the unwinder's functions where there is no unwinder.
unsafe extern "C" fn nobody_unwinds(_begin: *const c_void) {}

/// The sections that are registered: removing another would end the process.
static SECTIONS: LazyLock<Mutex<HashSet<ExecutorAddrRange>>> = LazyLock::new(Mutex::default);

fn sections() -> MutexGuard<'static, HashSet<ExecutorAddrRange>> {
    // Nothing that can panic runs under this lock.
    SECTIONS.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Bytes of the zero that ends a section.
const TERMINATOR_BYTES: u64 = 4;

/// Sections that linked code has registered by itself before their content was there: LLVM 19's runtime does that where
/// content arrives in messages. libgcc takes no notice of a section that begins with a zero.
static EMPTY: Mutex<BTreeSet<u64>> = Mutex::new(BTreeSet::new());

fn empty() -> MutexGuard<'static, BTreeSet<u64>> {
    // Nothing that can panic runs under this lock.
    EMPTY.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What linked code gets for `__register_frame`.
unsafe extern "C" fn register_frame(begin: *const c_void) {
    // SAFETY: the caller names memory that is, or is to be, a section of unwind information.
    if unsafe { begin.cast::<u32>().read_unaligned() } == 0 {
        empty().insert(begin as u64);
        return;
    }
    // SAFETY: the caller names a section of unwind information.
    unsafe { functions().0(begin) };
}

/// What linked code gets for `__deregister_frame`.
unsafe extern "C" fn deregister_frame(begin: *const c_void) {
    if empty().remove(&(begin as u64)) {
        return;
    }
    // SAFETY: the caller has registered the section.
    unsafe { functions().1(begin) };
}

/// Takes note that `range` has its content now.
pub(crate) fn content_arrived(range: ExecutorAddrRange) {
    let waiting: Vec<u64> = {
        let mut empty = empty();
        let inside: Vec<_> = empty.range(range.start().as_u64()..range.end().as_u64()).copied().collect();
        inside.into_iter().filter(|begin| empty.remove(begin)).collect()
    };
    for begin in waiting {
        // SAFETY: linked code has said that this is a section, and its memory has just been finalized, so it is readable.
        unsafe { register_frame(begin as usize as *const c_void) };
    }
}

/// Returns the address of a function that takes the place of the unwinder's own for linked code.
pub(crate) fn address_of(name: &str) -> Option<ExecutorAddr> {
    match name {
        "__register_frame" => Some(ExecutorAddr::new(register_frame as *const () as u64)),
        "__deregister_frame" => Some(ExecutorAddr::new(deregister_frame as *const () as u64)),
        _ => None,
    }
}

fn register((section,): (ExecutorAddrRange,)) -> Result<SpsError, OutOfBand> {
    if section.start().is_null() || section.len() < TERMINATOR_BYTES {
        return Ok(SpsError(Err(format!("{section} is not a section of unwind information"))));
    }
    let end = (section.end().as_u64() - TERMINATOR_BYTES) as usize as *const u32;
    // SAFETY: the controller names a section that it has linked into this process.
    if unsafe { end.read_unaligned() } != 0 {
        return Ok(SpsError(Err(format!("the unwind information at {section} does not end with a zero"))));
    }
    if !sections().insert(section) {
        return Ok(SpsError(Err(format!("the unwind information at {section} is registered already"))));
    }
    // SAFETY: the section ends with a zero, so that the unwinder stays inside; it is deregistered before it goes.
    unsafe { functions().0(section.start().as_u64() as usize as *const c_void) };
    Ok(SpsError(Ok(())))
}

fn deregister((section,): (ExecutorAddrRange,)) -> Result<SpsError, OutOfBand> {
    if !sections().remove(&section) {
        return Ok(SpsError(Err(format!("the unwind information at {section} is not registered"))));
    }
    // SAFETY: the section was registered, once.
    unsafe { functions().1(section.start().as_u64() as usize as *const c_void) };
    Ok(SpsError(Ok(())))
}

//! The interface by which debuggers learn of linked objects: GDB's JIT interface, which LLDB reads too.
//!
//! A debugger sets a breakpoint in `__jit_debug_register_code` and then reads `__jit_debug_descriptor`. Both are found
//! by name in this program's symbol table. See the GDB manual, "JIT Compilation Interface".

use crate::wrap::{OutOfBand, wrappers};
use farlink_addr::{ExecutorAddr, ExecutorAddrRange};
use farlink_wire::sps::SpsError;
use std::collections::HashMap;
use std::sync::{LazyLock, Mutex, MutexGuard, PoisonError};

wrappers! { announce:
    REGISTER_GDB => register_gdb = register;
    REGISTER_GDB_19 => register_gdb_19 = register;
    DEREGISTER_GDB => deregister_gdb = deregister;
    ALLOW_DEBUGGERS => allow_debuggers = allow;
}

/// `JIT_NOACTION`, `JIT_REGISTER_FN` and `JIT_UNREGISTER_FN`.
const NO_ACTION: u32 = 0;
const REGISTER: u32 = 1;
const UNREGISTER: u32 = 2;

/// `struct jit_code_entry`: an ELF object in memory, in a list with the others.
#[repr(C)]
struct CodeEntry {
    next: *mut CodeEntry,
    prev: *mut CodeEntry,
    symfile_addr: *const u8,
    symfile_size: u64,
}

/// `struct jit_descriptor`.
#[repr(C)]
pub(crate) struct Descriptor {
    version: u32,
    action_flag: u32,
    relevant_entry: *mut CodeEntry,
    first_entry: *mut CodeEntry,
}

/// What debuggers read. Changed under the lock of [`ENTRIES`].
#[unsafe(no_mangle)]
pub(crate) static mut __jit_debug_descriptor: Descriptor =
    Descriptor { version: 1, action_flag: 0, relevant_entry: std::ptr::null_mut(), first_entry: std::ptr::null_mut() };

/// Where debuggers set their breakpoint. Must be a function of its own that does something.
#[unsafe(no_mangle)]
#[inline(never)]
pub(crate) extern "C" fn __jit_debug_register_code() {
    std::hint::black_box(());
}

/// An entry of the list, which was made by [`Box`].
struct Entry(*mut CodeEntry);

// SAFETY: an entry belongs to the process. It is reached under the lock only, but by debuggers, while the process stands
// still.
unsafe impl Send for Entry {}

/// The entries of the list by the addresses of their objects, which may be shown several times.
static ENTRIES: LazyLock<Mutex<HashMap<ExecutorAddr, Vec<Entry>>>> = LazyLock::new(Mutex::default);

fn entries() -> MutexGuard<'static, HashMap<ExecutorAddr, Vec<Entry>>> {
    // Nothing that can panic half-way through a change runs under this lock.
    ENTRIES.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Tells debuggers of a change: `action` was done to `entry`, and the list begins with `first`.
///
/// Must be called under the lock.
fn tell(action: u32, entry: *mut CodeEntry, first: *mut CodeEntry, notify: bool) {
    let descriptor = &raw mut __jit_debug_descriptor;
    let changed = Descriptor { version: 1, action_flag: action, relevant_entry: entry, first_entry: first };
    // SAFETY: the descriptor is only used under the lock; a debugger reads it while this process stands still. Volatile,
    // since nobody in this program reads what is written.
    unsafe { descriptor.write_volatile(changed) };
    if notify {
        __jit_debug_register_code();
    }
}

fn first_entry() -> *mut CodeEntry {
    let descriptor = &raw const __jit_debug_descriptor;
    // SAFETY: the descriptor is only used under the lock, which callers hold.
    unsafe { (*descriptor).first_entry }
}

/// Shows an object to debuggers: a copy of the ELF file in which sections have their addresses. It stays shown until it is
/// taken back by [`deregister`].
fn register((object, notify): (ExecutorAddrRange, bool)) -> Result<SpsError, OutOfBand> {
    if object.start().is_null() || object.is_empty() {
        return Ok(SpsError(Err(format!("{object} is not an object with debug information"))));
    }
    let mut entries = entries();
    let first = first_entry();
    let entry = Box::into_raw(Box::new(CodeEntry {
        next: first,
        prev: std::ptr::null_mut(),
        symfile_addr: object.start().as_u64() as usize as *const u8,
        symfile_size: object.len(),
    }));
    if !first.is_null() {
        // SAFETY: entries in the list are there until they are taken out under the lock.
        unsafe { (*first).prev = entry };
    }
    entries.entry(object.start()).or_default().push(Entry(entry));
    tell(REGISTER, entry, entry, notify);
    Ok(SpsError(Ok(())))
}

/// Takes an object back that debuggers were shown. Its memory may go after this.
fn deregister((object,): (ExecutorAddrRange,)) -> Result<SpsError, OutOfBand> {
    let mut entries = entries();
    let shown = entries.get_mut(&object.start());
    let Some((Entry(entry), is_last)) = shown.and_then(|shown| Some((shown.pop()?, shown.is_empty()))) else {
        return Ok(SpsError(Err(format!("no debugger was shown {object}"))));
    };
    if is_last {
        entries.remove(&object.start());
    }
    // SAFETY: the entry is in the list, and so there.
    let next = unsafe { (*entry).next };
    // SAFETY: as above.
    let prev = unsafe { (*entry).prev };
    if !next.is_null() {
        // SAFETY: a neighbour of an entry is in the list too.
        unsafe { (*next).prev = prev };
    }
    let mut first = first_entry();
    if prev.is_null() {
        first = next;
    } else {
        // SAFETY: as above.
        unsafe { (*prev).next = next };
    }
    tell(UNREGISTER, entry, first, true);
    // Nobody is to follow a pointer to what is gone.
    tell(NO_ACTION, std::ptr::null_mut(), first, false);
    // SAFETY: it was made by a box, and is neither in the list nor in the map any more.
    drop(unsafe { Box::from_raw(entry) });
    Ok(SpsError(Ok(())))
}

/// Lets processes of the same user debug this one, where Yama lets only its ancestors.
fn allow((): ()) -> Result<SpsError, OutOfBand> {
    // SAFETY: the call takes numbers, and changes nothing but who may debug this process. Where there is no Yama it fails,
    // and nobody is kept from anything.
    unsafe { libc::prctl(libc::PR_SET_PTRACER, libc::PR_SET_PTRACER_ANY, 0, 0, 0) };
    Ok(SpsError(Ok(())))
}

/// Returns the address of a name that controllers look up in the process and that this program answers for itself: it is
/// not among the names that the dynamic linker knows.
pub(crate) fn address_of(name: &str) -> Option<ExecutorAddr> {
    use farlink_wire::functions::{REGISTER_GDB, REGISTER_GDB_19};
    let address = match name {
        _ if name == REGISTER_GDB.name() => register_gdb as *const () as u64,
        _ if name == REGISTER_GDB_19.name() => register_gdb_19 as *const () as u64,
        "__jit_debug_register_code" => __jit_debug_register_code as *const () as u64,
        "__jit_debug_descriptor" => &raw const __jit_debug_descriptor as u64,
        _ => return None,
    };
    Some(ExecutorAddr::new(address))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The objects in the list as a debugger reads it, the newest first, after a look at whether it is one list in both
    /// directions.
    fn shown() -> Vec<u64> {
        let mut found = Vec::new();
        let (mut entry, mut before) = (first_entry(), std::ptr::null_mut());
        while !entry.is_null() {
            // SAFETY: nobody but this test changes the list.
            let CodeEntry { next, prev, symfile_addr, .. } = unsafe { &*entry };
            assert_eq!(*prev, before);
            found.push(*symfile_addr as u64);
            (before, entry) = (entry, *next);
        }
        found
    }

    /// Objects are shown in any number, taken back in any order, and what was not shown is an error.
    #[test]
    fn objects_come_and_go() {
        let range = |start: u64| ExecutorAddrRange::from_len(ExecutorAddr::new(start), 16).unwrap();
        let show = |start| register((range(start), true)).unwrap().0.unwrap();
        let take_back = |start| deregister((range(start),)).unwrap().0;
        for start in [0x10, 0x20, 0x30, 0x20, 0x40] {
            show(start);
        }
        assert_eq!(shown(), [0x40, 0x20, 0x30, 0x20, 0x10]);
        for (start, left) in [
            (0x30, &[0x40, 0x20, 0x20, 0x10][..]),
            (0x40, &[0x20, 0x20, 0x10]),
            (0x20, &[0x20, 0x10]),
            (0x10, &[0x20]),
            (0x20, &[]),
        ] {
            take_back(start).unwrap();
            assert_eq!(shown(), left);
        }
        assert!(take_back(0x20).unwrap_err().contains("no debugger was shown"));
        assert!(register((range(0), true)).unwrap().0.is_err());
        assert!(shown().is_empty());
    }
}

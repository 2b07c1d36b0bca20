//! The interface by which debuggers learn of linked objects: GDB's JIT interface, which LLDB reads too.
//!
//! A debugger sets a breakpoint in `__jit_debug_register_code` and then reads `__jit_debug_descriptor`. Both are found
//! by name in this program's symbol table. See the GDB manual, "JIT Compilation Interface".

use crate::wrap::{OutOfBand, wrappers};
use farlink_addr::{ExecutorAddr, ExecutorAddrRange};
use farlink_wire::sps::SpsError;
use std::sync::{Mutex, PoisonError};

wrappers! { announce:
    REGISTER_GDB => register_gdb = register;
    REGISTER_GDB_19 => register_gdb_19 = register;
}

/// `JIT_REGISTER_FN`.
const REGISTER: u32 = 1;

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

/// What debuggers read. Changed under [`LOCK`].
#[unsafe(no_mangle)]
pub(crate) static mut __jit_debug_descriptor: Descriptor =
    Descriptor { version: 1, action_flag: 0, relevant_entry: std::ptr::null_mut(), first_entry: std::ptr::null_mut() };

static LOCK: Mutex<()> = Mutex::new(());

/// Where debuggers set their breakpoint. Must be a function of its own that does something.
#[unsafe(no_mangle)]
#[inline(never)]
pub(crate) extern "C" fn __jit_debug_register_code() {
    std::hint::black_box(());
}

/// Shows an object to debuggers: a copy of the ELF file in which sections have their addresses. It stays shown.
fn register((object, notify): (ExecutorAddrRange, bool)) -> Result<SpsError, OutOfBand> {
    if object.start().is_null() || object.is_empty() {
        return Ok(SpsError(Err(format!("{object} is not an object with debug information"))));
    }
    let entry = Box::into_raw(Box::new(CodeEntry {
        next: std::ptr::null_mut(),
        prev: std::ptr::null_mut(),
        symfile_addr: object.start().as_u64() as usize as *const u8,
        symfile_size: object.len(),
    }));
    let _guard = LOCK.lock().unwrap_or_else(PoisonError::into_inner);
    let descriptor = &raw mut __jit_debug_descriptor;
    // SAFETY: the descriptor is only used under the lock; a debugger reads it while this process stands still.
    let first = unsafe { (*descriptor).first_entry };
    // SAFETY: the entry is new.
    unsafe { (*entry).next = first };
    if !first.is_null() {
        // SAFETY: entries are never freed.
        unsafe { (*first).prev = entry };
    }
    // SAFETY: as for reading it. Volatile, since nobody in this program reads what is written.
    unsafe {
        descriptor.write_volatile(Descriptor {
            version: 1,
            action_flag: REGISTER,
            relevant_entry: entry,
            first_entry: entry,
        });
    }
    if notify {
        __jit_debug_register_code();
    }
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

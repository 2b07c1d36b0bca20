//! Probes: each tries one mechanism that the memory layer uses or could use, on this machine, and says why if it does not
//! work.
//!
//! They are for a process of their own: some change it for good, and what a broken system does to them may end it.

use super::mapping::{Data, Mapping, Place};
use super::{SharedObject, page_size};
use crate::Error;
use farlink_addr::{AllocGroup, MemProt};
use farlink_wire::msg::Stripe;
use rustix::io::Errno;
use rustix::mm::{MapFlags, MprotectFlags, ProtFlags};
use std::ffi::c_void;
use std::io;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::Duration;

/// `mov $42, %eax; ret`.
const RETURNS_42: [u8; 6] = [0xb8, 42, 0, 0, 0, 0xc3];

fn other(what: impl ToString) -> io::Error {
    io::Error::other(what.to_string())
}

fn one_page() -> usize {
    page_size().bytes() as usize
}

/// A stripe of one page of code.
fn code_stripe() -> Stripe {
    let group = AllocGroup::standard(MemProt::RX);
    Stripe { group, offset: 0, size: page_size().bytes(), shared_with_children: false }
}

/// Makes memory that no other process can open, and that keeps its size; gives whether it could be said that it is not
/// a program (`MFD_NOEXEC_SEAL`). `memfd_create(2)`
///
/// # Errors
///
/// Fails if the system has no such memory.
pub fn nameless_memory() -> io::Result<bool> {
    let object = SharedObject::nameless(page_size().bytes())?;
    let seals = rustix::fs::fcntl_get_seals(object.as_fd())?;
    // Sealing the execute bits is what the flag does.
    Ok(seals.contains(rustix::fs::SealFlags::from_bits_retain(0x20)))
}

/// Writes code through one mapping of nameless memory and runs it through another, which cannot be written.
///
/// # Errors
///
/// Fails if the system refuses one of them.
pub fn run_nameless_code() -> io::Result<()> {
    run_code(&SharedObject::nameless(page_size().bytes())?)
}

/// As [`run_nameless_code`], of POSIX shared memory. No name is left.
///
/// # Errors
///
/// Fails if the system refuses it.
pub fn run_posix_code() -> io::Result<()> {
    let name = format!("/farlink_{}_probe", std::process::id());
    let object = SharedObject::create(&name, page_size().bytes()).map_err(|error: Error| other(error))?;
    SharedObject::unlink(&name);
    let object = object.ok_or_else(|| other("the name is in use"))?;
    object.secure(0, page_size().bytes())?;
    run_code(&object)
}

fn run_code(object: &SharedObject) -> io::Result<()> {
    let writable = object.map(one_page(), Place::Anywhere)?;
    writable.write(writable.range().start(), &RETURNS_42)?;
    let code = object.map_stripes(one_page(), &[code_stripe()], Data::Shared, Place::Anywhere)?;
    match call(&code) {
        42 => Ok(()),
        result => Err(other(format!("code that returns 42 returned {result}"))),
    }
}

fn call(code: &Mapping) -> i32 {
    // SAFETY: the mapping is executable and begins with a function without arguments that returns a number.
    let function = unsafe { std::mem::transmute::<*mut u8, extern "C" fn() -> i32>(code.start().as_ptr()) };
    function()
}

/// Reserves as much address space as a session does; with `low`, in the lowest 2 GiB.
///
/// # Errors
///
/// Fails if there is not so much.
pub fn reserve(bytes: u64, low: bool) -> io::Result<()> {
    let place = if low { Place::Below(farlink_addr::ExecutorAddr::new(1 << 31)) } else { Place::Anywhere };
    let len = usize::try_from(bytes).map_err(|_| Errno::NOMEM)?;
    Ok(Mapping::private(len, place).map(drop)?)
}

/// Makes a page of shared memory inaccessible without a mapping of its own. `madvise(2)`, `MADV_GUARD_INSTALL`
///
/// # Errors
///
/// Fails if the system cannot.
pub fn guard_page() -> io::Result<()> {
    let object = SharedObject::nameless(page_size().bytes())?;
    let mapping = object.map(one_page(), Place::Anywhere)?;
    const GUARD_INSTALL: libc::c_int = 102;
    let start: *mut c_void = mapping.start().as_ptr().cast();
    // SAFETY: the page is this mapping's, of which nobody else knows.
    checked(i64::from(unsafe { libc::madvise(start, one_page(), GUARD_INSTALL) }))
}

/// Has the system refuse this process new executable memory for good, and checks that what farlink needs still works:
/// mapping code that is in place. `prctl(2)`, `PR_SET_MDWE`
///
/// # Errors
///
/// Fails if the system cannot, or refuses too little or too much.
pub fn deny_write_execute() -> io::Result<()> {
    const SET_MDWE: libc::c_int = 65;
    const REFUSE_EXEC_GAIN: libc::c_ulong = 1;
    // SAFETY: the call takes numbers and changes nothing but what is executable from now on.
    checked(i64::from(unsafe { libc::prctl(SET_MDWE, REFUSE_EXEC_GAIN, 0, 0, 0) }))?;
    let mapping = Mapping::private(one_page(), Place::Anywhere)?;
    if mapping.protect(mapping.range(), MemProt::RX).is_ok() {
        return Err(other("memory that was written could still be made executable"));
    }
    run_nameless_code().map_err(|error| other(format!("it also refuses shared code: {error}")))
}

/// Seals a mapping: it can be neither unmapped nor changed any more, and stays. `mseal(2)`
///
/// # Errors
///
/// Fails if the system cannot.
pub fn seal_mapping() -> io::Result<()> {
    const MSEAL: libc::c_long = 462;
    let (prot, flags) = (ProtFlags::READ, MapFlags::PRIVATE);
    // SAFETY: a new mapping at an address of the system's choice.
    let start = unsafe { rustix::mm::mmap_anonymous(std::ptr::null_mut(), one_page(), prot, flags) }?;
    // SAFETY: the page is that of the mapping made above.
    checked(unsafe { libc::syscall(MSEAL, start, one_page(), 0) })?;
    // SAFETY: as above. Nobody uses the page.
    match unsafe { rustix::mm::mprotect(start, one_page(), MprotectFlags::READ | MprotectFlags::WRITE) } {
        Err(Errno::PERM) => Ok(()),
        _ => Err(other("a sealed mapping could be changed")),
    }
}

/// Wakes a thread that waits at one mapping of shared memory through another mapping of it. `futex(2)`
///
/// # Errors
///
/// Fails if the system cannot.
pub fn wake_through_shared_memory() -> io::Result<()> {
    use rustix::thread::futex;
    let object = SharedObject::nameless(page_size().bytes())?;
    let (one, two) = (object.map(one_page(), Place::Anywhere)?, object.map(one_page(), Place::Anywhere)?);
    let (waits, wakes) = (word(&one), word(&two));
    thread::scope(|scope| {
        let waiter = scope.spawn(move || {
            while waits.load(Ordering::Acquire) == 0 {
                match futex::wait(waits, futex::Flags::empty(), 0, None) {
                    Ok(()) | Err(Errno::AGAIN | Errno::INTR) => {}
                    Err(error) => return Err(error),
                }
            }
            Ok(())
        });
        // So that it is asleep, most likely. It may not be: then it does not go to sleep.
        thread::sleep(Duration::from_millis(20));
        wakes.store(1, Ordering::Release);
        futex::wake(wakes, futex::Flags::empty(), 1)?;
        Ok(waiter.join().map_err(|_| other("the waiting thread panicked"))??)
    })
}

fn word(mapping: &Mapping) -> &AtomicU32 {
    // SAFETY: the mapping is readable, writable and aligned, lives as long as the reference, and is used by atomics only.
    unsafe { AtomicU32::from_ptr(mapping.start().as_ptr().cast()) }
}

fn checked(result: i64) -> io::Result<()> {
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What needs no process of its own works wherever the tests run.
    #[test]
    fn probes_that_leave_no_trace() {
        nameless_memory().unwrap();
        run_nameless_code().unwrap();
        reserve(1 << 30, false).unwrap();
        reserve(512 << 20, true).unwrap();
        wake_through_shared_memory().unwrap();
        let too_much = reserve(1 << 60, false).unwrap_err();
        assert_eq!(too_much.raw_os_error(), Some(libc::ENOMEM));
    }
}

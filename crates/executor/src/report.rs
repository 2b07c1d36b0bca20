//! What this process does when it dies of a fault: it leaves a report for its controller, and then dies as it would have.
//!
//! The handlers are there for the signals that end a process because of what it did. They write to memory that the
//! controller has made ([`farlink_wire::report`]), with system calls and stores only: no lock, no allocation, no
//! reference to what may be broken. The part of the stack is copied by the system, which stops where there is none.
//! Then the signal gets its default action and comes again, so the process's status, its core, and what a debugger sees
//! are those of a process without handlers.
//!
//! Linked code sees the default action where a handler of ours is: see [`crate::dispositions`].

use crate::registry::session;
use crate::signal_stack;
use crate::wrap::{OutOfBand, wrappers};
use farlink_addr::ExecutorAddr;
use farlink_mem::SharedArea;
use farlink_wire::report::{
    MAGIC, MAPS_OFFSET, MAX_MAPS_BYTES, MAX_STACK_BYTES, REGISTERS, REPORT_BYTES, STACK_OFFSET, SUM_START, add_to_sum,
    state, words,
};
use farlink_wire::sps::SpsError;
use libc::{c_int, c_void};
use std::sync::atomic::{AtomicI32, AtomicPtr, AtomicU64, Ordering};

wrappers! { announce:
    LEAVE_REPORTS => leave_reports = leave;
}

/// The signals that are reported.
pub(crate) const SIGNALS: [c_int; 7] =
    [libc::SIGSEGV, libc::SIGBUS, libc::SIGILL, libc::SIGFPE, libc::SIGABRT, libc::SIGTRAP, libc::SIGSYS];

/// Where the report goes; null while nobody wants one.
static MEMORY: AtomicPtr<u64> = AtomicPtr::new(std::ptr::null_mut());

/// The process that is to leave reports: not one that it forks.
static PROCESS: AtomicI32 = AtomicI32::new(0);

/// The thread that is writing the report.
static WRITER: AtomicI32 = AtomicI32::new(0);

/// The list of mappings, where it cannot be opened any more; else -1.
static MAPS: AtomicI32 = AtomicI32::new(-1);

/// How often a thread with a second fault looks whether the report of the first is whole: for a second.
const MAX_LOOKS: usize = 1000;

/// Bytes that the system copies at once. What is in one page is accessible as a whole or not at all.
const PAGE_BYTES: u64 = 4096;

/// Pages below the stack that are passed over: where it has overflown, its pointer is in a guard.
const MAX_GUARD_PAGES: u64 = 512;

/// Leaves reports in the memory that was sent with `tag`.
fn leave((instance, tag): (ExecutorAddr, u64)) -> Result<SpsError, OutOfBand> {
    let session = session(instance)?;
    let Some(descriptor) = session.endpoint()?.take_descriptor(tag) else {
        return Ok(SpsError(Err(format!("no descriptor has come with the tag {tag}"))));
    };
    let area = match SharedArea::received(descriptor, REPORT_BYTES) {
        Ok(area) => area,
        Err(error) => return Ok(SpsError(Err(error.to_string()))),
    };
    // SAFETY: getpid has no requirement.
    PROCESS.store(unsafe { libc::getpid() }, Ordering::Relaxed);
    MEMORY.store(area.keep_for_good().as_ptr().cast(), Ordering::Release);
    Ok(SpsError(SIGNALS.into_iter().try_for_each(install).map_err(|error| format!("a handler cannot be set: {error}"))))
}

/// Installs the handler for a signal that has its default action, or that of Rust's run-time in this program.
fn install(signal: c_int) -> std::io::Result<()> {
    // SAFETY: the structure is plain bytes, to be filled in.
    let mut old: libc::sigaction = unsafe { std::mem::zeroed() };
    // SAFETY: the structure is there to be written.
    if unsafe { libc::sigaction(signal, std::ptr::null(), &raw mut old) } != 0 {
        return Err(std::io::Error::last_os_error());
    }
    if old.sa_sigaction != libc::SIG_DFL && !is_of_this_program(old.sa_sigaction) {
        // Something else in this process has a use for it, or it is ignored.
        return Ok(());
    }
    let own = action();
    // SAFETY: the handler is made for any moment, and stays.
    match unsafe { libc::sigaction(signal, &raw const own, std::ptr::null_mut()) } {
        0 => Ok(()),
        _ => Err(std::io::Error::last_os_error()),
    }
}

/// What is done about a signal that is reported.
pub(crate) fn action() -> libc::sigaction {
    // SAFETY: the structure is plain bytes.
    let mut own: libc::sigaction = unsafe { std::mem::zeroed() };
    own.sa_sigaction = handler_address();
    // Threads that run calls have an alternate stack, for when theirs is full. Others have what they have.
    own.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
    // SAFETY: the set is there to be written. Nothing may come between the report and the end.
    unsafe { libc::sigfillset(&raw mut own.sa_mask) };
    own
}

/// Whether a controller wants reports.
pub(crate) fn is_wanted() -> bool {
    !MEMORY.load(Ordering::Relaxed).is_null()
}

/// Makes sure that a report can be written also when the calling thread's stack is full, if reports are wanted.
pub(crate) fn prepare_thread() {
    if is_wanted() {
        signal_stack::ensure();
    }
}

pub(crate) fn handler_address() -> usize {
    on_signal as *const () as usize
}

/// Whether a function belongs to this program, and not to a library that was put into its process.
fn is_of_this_program(function: usize) -> bool {
    let base = |address: usize| {
        // SAFETY: the structure is plain bytes, to be filled in.
        let mut info: libc::Dl_info = unsafe { std::mem::zeroed() };
        // SAFETY: dladdr looks the address up and does not follow it.
        let found = unsafe { libc::dladdr(address as *const c_void, &raw mut info) } != 0;
        found.then_some(info.dli_fbase)
    };
    base(function).is_some_and(|found| Some(found) == base(handler_address()))
}

/// Writes the report, and lets the signal do what it does natively.
unsafe extern "C" fn on_signal(signal: c_int, info: *mut libc::siginfo_t, context: *mut c_void) {
    // SAFETY: getpid has no requirement.
    let pid = unsafe { libc::getpid() };
    let memory = MEMORY.load(Ordering::Acquire);
    if !memory.is_null() && pid == PROCESS.load(Ordering::Relaxed) {
        // SAFETY: the system passes both; the memory is that of a report.
        unsafe { report(&Words(memory), signal, info, context.cast()) };
    }
    set_default(signal);
    // SAFETY: the system passes it.
    let code = unsafe { (*info).si_code };
    let is_fault = matches!(signal, libc::SIGSEGV | libc::SIGBUS | libc::SIGILL | libc::SIGFPE);
    if code <= 0 || !is_fault {
        // What a fault's instruction does by itself when it is tried again. It is blocked until this returns.
        // SAFETY: the thread and the process are these.
        unsafe { libc::syscall(libc::SYS_tgkill, pid, tid(), signal) };
    }
}

/// Gives a signal its default action.
fn set_default(signal: c_int) {
    // SAFETY: the structure is plain bytes; all zero, it is the default action.
    let default: libc::sigaction = unsafe { std::mem::zeroed() };
    // SAFETY: the default action needs nothing.
    unsafe { libc::sigaction(signal, &raw const default, std::ptr::null_mut()) };
}

/// Has a signal end the process as it does natively, if a handler of ours is there.
pub(crate) fn give_up(signal: c_int) {
    // SAFETY: the structure is plain bytes, to be filled in.
    let mut old: libc::sigaction = unsafe { std::mem::zeroed() };
    // SAFETY: the structure is there to be written.
    unsafe { libc::sigaction(signal, std::ptr::null(), &raw mut old) };
    if old.sa_sigaction == handler_address() {
        set_default(signal);
    }
}

fn tid() -> c_int {
    // SAFETY: gettid has no requirement. Thread ids are small positive numbers.
    unsafe { libc::syscall(libc::SYS_gettid) as c_int }
}

/// The memory of the report.
struct Words(*mut u64);

impl Words {
    fn state(&self) -> &AtomicU64 {
        // SAFETY: the memory of the report has that word, aligned, for good; here it is only reached atomically.
        unsafe { AtomicU64::from_ptr(self.0.wrapping_add(words::STATE)) }
    }

    fn set(&self, index: usize, value: u64) {
        // SAFETY: the memory of the report has that word for good, and nobody makes a reference to it.
        unsafe { self.0.wrapping_add(index).write_volatile(value) };
    }

    fn get(&self, index: usize) -> u64 {
        // SAFETY: as above.
        unsafe { self.0.wrapping_add(index).read_volatile() }
    }

    fn bytes_at(&self, offset: u64) -> *mut u8 {
        self.0.cast::<u8>().wrapping_add(offset as usize)
    }
}

/// Writes the report, unless another thread does: then waits for that, since the process is to end after it.
///
/// # Safety
///
/// The arguments must be what a handler gets.
unsafe fn report(memory: &Words, signal: c_int, info: *const libc::siginfo_t, context: *const libc::ucontext_t) {
    let begun =
        memory.state().compare_exchange(state::EMPTY, state::BEGUN, Ordering::AcqRel, Ordering::Acquire).is_ok();
    if !begun {
        if WRITER.load(Ordering::Relaxed) != tid() {
            wait_for_other(memory);
        }
        return;
    }
    WRITER.store(tid(), Ordering::Relaxed);
    // SAFETY: the caller passes what the handler got.
    unsafe { write_header(memory, signal, info, context) };
    write_maps(memory);
    // SAFETY: as above.
    let registers = unsafe { &raw const (*context).uc_mcontext.gregs };
    // SAFETY: as above. The stack pointer is the register of that number.
    write_stack(memory, unsafe { (*registers)[libc::REG_RSP as usize] } as u64);
    memory.set(words::SUM, sum(memory));
    memory.set(words::MAGIC, MAGIC);
    memory.state().store(state::WHOLE, Ordering::Release);
}

/// Waits until the report that another thread writes is whole, within limits.
fn wait_for_other(memory: &Words) {
    let moment = libc::timespec { tv_sec: 0, tv_nsec: 1_000_000 };
    for _ in 0..MAX_LOOKS {
        if memory.state().load(Ordering::Acquire) != state::BEGUN {
            return;
        }
        // SAFETY: the time is one.
        unsafe { libc::nanosleep(&raw const moment, std::ptr::null_mut()) };
    }
}

/// # Safety
///
/// As [`report`].
unsafe fn write_header(memory: &Words, signal: c_int, info: *const libc::siginfo_t, context: *const libc::ucontext_t) {
    // SAFETY: the system passes it, and it is plain bytes.
    let info = unsafe { info.read() };
    let code = info.si_code;
    memory.set(words::SIGNAL, signal as u64);
    memory.set(words::CODE, i64::from(code) as u64);
    if code > 0 {
        // SAFETY: signals of faults have an address there; of others it is some number.
        memory.set(words::ADDRESS, unsafe { info.si_addr() } as u64);
    } else {
        // SAFETY: signals that are sent have the sender there.
        memory.set(words::SENDER, unsafe { info.si_pid() } as u64 & 0xffff_ffff);
    }
    // SAFETY: getpid has no requirement.
    memory.set(words::PID, unsafe { libc::getpid() } as u64);
    memory.set(words::TID, tid() as u64);
    let mut name = [0u64; 2];
    // SAFETY: the system writes at most 16 bytes.
    unsafe { libc::prctl(libc::PR_GET_NAME, name.as_mut_ptr()) };
    memory.set(words::NAME, name[0]);
    memory.set(words::NAME + 1, name[1]);
    for register in 0..REGISTERS {
        // SAFETY: the context has as many registers.
        let value = unsafe { (*context).uc_mcontext.gregs[register] };
        memory.set(words::REGISTERS + register, value as u64);
    }
}

fn open_maps() -> c_int {
    // SAFETY: the path is a C string. Where it is left open, the process is about to end.
    unsafe { libc::open(c"/proc/self/maps".as_ptr(), libc::O_RDONLY | libc::O_CLOEXEC) }
}

/// Opens the list of mappings for later, when it cannot be opened any more.
pub(crate) fn keep_maps_open() {
    MAPS.store(open_maps(), Ordering::Relaxed);
}

/// Writes the list of mappings, as far as there is room.
fn write_maps(memory: &Words) {
    let file = match (open_maps(), MAPS.load(Ordering::Relaxed)) {
        (-1, kept) => {
            // SAFETY: the file was opened for this, or is none, which is an error.
            unsafe { libc::lseek(kept, 0, libc::SEEK_SET) };
            kept
        }
        (opened, _) => opened,
    };
    let mut written = 0;
    let is_cut = loop {
        let left = MAX_MAPS_BYTES - written;
        let target = memory.bytes_at(MAPS_OFFSET + written);
        // SAFETY: as many bytes are left in the memory of the report.
        match unsafe { libc::read(file, target.cast(), left as usize) } {
            count if count > 0 => written += count as u64,
            _ => break left == 0,
        }
    };
    // What is behind is zero.
    memory.set(words::MAPS_BYTES, written.next_multiple_of(8).min(MAX_MAPS_BYTES));
    memory.set(words::MAPS_CUT, u64::from(is_cut));
}

/// Writes the part of the stack from `pointer` on.
fn write_stack(memory: &Words, pointer: u64) {
    let mut at = pointer & !7;
    let page_end = |at: u64| (at & !(PAGE_BYTES - 1)).saturating_add(PAGE_BYTES);
    let (mut guards, mut written) = (0, 0);
    while written < MAX_STACK_BYTES {
        let len = (page_end(at) - at).min(MAX_STACK_BYTES - written);
        if copy_own_memory(at, memory.bytes_at(STACK_OFFSET + written), len) {
            if written == 0 {
                memory.set(words::STACK_START, at);
            }
            written += len;
        } else if written == 0 && guards < MAX_GUARD_PAGES {
            guards += 1;
        } else {
            break;
        }
        at = page_end(at);
    }
    memory.set(words::STACK_BYTES, written);
}

/// Copies memory of this process that may not be there; gives whether it was.
fn copy_own_memory(from: u64, to: *mut u8, len: u64) -> bool {
    let local = libc::iovec { iov_base: to.cast(), iov_len: len as usize };
    let remote = libc::iovec { iov_base: from as usize as *mut c_void, iov_len: len as usize };
    // SAFETY: getpid has no requirement.
    let pid = unsafe { libc::getpid() };
    // SAFETY: `local` is in the memory of the report (caller); the system checks `remote`, and only reads it.
    let count = unsafe { libc::process_vm_readv(pid, &raw const local, 1, &raw const remote, 1, 0) };
    count == len as isize
}

fn sum(memory: &Words) -> u64 {
    let parts = [(MAPS_OFFSET, words::MAPS_BYTES), (STACK_OFFSET, words::STACK_BYTES)];
    let mut sum = (words::SUM + 1..words::COUNT).fold(SUM_START, |sum, index| add_to_sum(sum, memory.get(index)));
    for (offset, length) in parts {
        let first = offset as usize / 8;
        let count = memory.get(length) as usize / 8;
        sum = (first..first + count).fold(sum, |sum, index| add_to_sum(sum, memory.get(index)));
    }
    sum
}

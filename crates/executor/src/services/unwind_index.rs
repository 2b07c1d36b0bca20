//! Finding unwind information by address.
//!
//! libgcc asks `_Unwind_Find_FDE` for every frame that it unwinds, through the process's symbol table, so the definition
//! here is asked first. It knows the indexes of linked objects, which the controller has sorted, by the addresses of their
//! code: in the directories of reservations, which the controller keeps in shared memory, so that nobody is told of an
//! object; and in a tree, for objects whose code lies between that of others. What it does not know goes on to libgcc's own.
//! Nothing is read or sorted before something is thrown.
//!
//! Where this definition is not the one that libgcc finds, in a program that was linked without exporting it, sections are
//! registered in libgcc's own way.
//!
//! An index is 12 bytes of its directory's, a number of entries (4 bytes), then those, by ascending address, 12 bytes each: the distances from the index
//! to a function (signed), its length (unsigned), and the distance from the index to its frame description (signed).

use crate::unwinder;
use crate::wrap::{OutOfBand, wrappers};
use farlink_addr::{ExecutorAddr, ExecutorAddrRange};
use farlink_mem::{CodeDirectory, INDEX_LINK_BYTES};
use farlink_wire::setup::ExecutorInfo;
use farlink_wire::sps::SpsError;
use std::collections::BTreeMap;
use std::ffi::c_void;
use std::sync::{OnceLock, PoisonError, RwLock, RwLockWriteGuard};

wrappers! { announce_found:
    REGISTER_UNWIND_INDEX => register_unwind_index = register;
    DEREGISTER_UNWIND_INDEX => deregister_unwind_index = deregister;
    REGISTER_UNWIND_DIRECTORY => register_unwind_directory = register_directory;
    DEREGISTER_UNWIND_DIRECTORY => deregister_unwind_directory = deregister_directory;
}

/// Announces the functions, if libgcc asks here.
pub(crate) fn announce(info: &mut ExecutorInfo) {
    // SAFETY: the name is a C string, and the handle means all libraries of the process.
    let found = unsafe { libc::dlsym(libc::RTLD_DEFAULT, c"_Unwind_Find_FDE".as_ptr()) };
    if std::ptr::eq(found, _Unwind_Find_FDE as *const c_void) {
        announce_found(info);
    }
}

/// Bytes before the entries: the last four are their number.
const HEADER_BYTES: u64 = COUNT_OFFSET + 4;
const COUNT_OFFSET: u64 = INDEX_LINK_BYTES;

/// Bytes of an entry.
const ENTRY_BYTES: u64 = 12;

/// A part of the index of a linked object: entries that follow each other, without another object's code between them.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Run {
    /// Where the index begins.
    index: u64,
    /// The first entry.
    first: u64,
    /// How many entries.
    count: u64,
    /// Where the code that they know ends.
    code_end: u64,
}

/// An entry with addresses in place of distances.
struct Entry {
    function: u64,
    length: u64,
    description: u64,
}

/// Reads an entry of the index at `index`.
fn entry(index: u64, position: u64) -> Entry {
    let at = (index + HEADER_BYTES + position * ENTRY_BYTES) as usize as *const i32;
    // SAFETY: the controller has linked as many entries there, and they stay while the index is registered.
    let [function, length, description] = [0, 1, 2].map(|word| unsafe { at.wrapping_add(word).read_unaligned() });
    let address = |distance: i32| index.wrapping_add_signed(distance.into());
    Entry { function: address(function), length: u64::from(length as u32), description: address(description) }
}

impl Run {
    fn new(index: u64, first: u64, count: u64) -> Self {
        let last = entry(index, first + count - 1);
        Self { index, first, count, code_end: last.function.saturating_add(last.length) }
    }

    /// Returns where the code begins.
    fn code(&self) -> u64 {
        entry(self.index, self.first).function
    }

    /// Returns a run for each entry.
    fn single(self) -> impl Iterator<Item = Self> {
        (0..self.count).map(move |position| Self::new(self.index, self.first + position, 1))
    }

    /// Returns the entry of the function that holds `pc`.
    fn find(&self, pc: u64) -> Option<Entry> {
        let (mut low, mut high) = (0, self.count);
        while low < high {
            let middle = low + (high - low) / 2;
            if entry(self.index, self.first + middle).function <= pc {
                low = middle + 1;
            } else {
                high = middle;
            }
        }
        let entry = entry(self.index, self.first + low.checked_sub(1)?);
        (pc - entry.function < entry.length).then_some(entry)
    }
}

/// What is known of linked code.
struct Known {
    /// The runs of objects that have been registered, by where their code begins.
    runs: BTreeMap<u64, Run>,
    /// The directories of reservations.
    directories: Vec<CodeDirectory>,
}

static KNOWN: RwLock<Known> = RwLock::new(Known { runs: BTreeMap::new(), directories: Vec::new() });

fn write() -> RwLockWriteGuard<'static, Known> {
    // Nothing that can panic runs under this lock.
    KNOWN.write().unwrap_or_else(PoisonError::into_inner)
}

impl Known {
    /// Returns the entry of the function that holds `pc`.
    fn find(&self, pc: u64) -> Option<Entry> {
        let index = self.directories.iter().find_map(|directory| directory.find(ExecutorAddr::new(pc)));
        if let Some(run) = index.and_then(|index| whole(index.as_u64())) {
            return run.find(pc);
        }
        let (_, run) = self.runs.range(..=pc).next_back().filter(|(_, run)| pc < run.code_end)?;
        run.find(pc)
    }
}

/// Returns all entries of the index at `start` as one run; none if it has none.
fn whole(start: u64) -> Option<Run> {
    let count = (start + COUNT_OFFSET) as usize as *const u32;
    // SAFETY: the controller has linked an index there, which stays while it is registered.
    let count = u64::from(unsafe { count.read_unaligned() });
    (count > 0).then(|| Run::new(start, 0, count))
}

/// Returns all of an index that is to be registered.
fn read(range: ExecutorAddrRange) -> Result<Run, String> {
    let is_index = !range.start().is_null() && range.len() >= HEADER_BYTES + ENTRY_BYTES;
    let run = is_index.then(|| whole(range.start().as_u64())).flatten();
    let run = run.filter(|run| range.len() == HEADER_BYTES + run.count * ENTRY_BYTES);
    run.ok_or_else(|| format!("{range} is not an index of unwind information"))
}

type DirectoryRanges = (ExecutorAddrRange, ExecutorAddrRange, ExecutorAddrRange);

fn register_directory((code, table, indexes): DirectoryRanges) -> Result<SpsError, OutOfBand> {
    // SAFETY: the controller has these ranges in a reservation, and ends this before the reservation.
    let directory = unsafe { CodeDirectory::new(code, table, indexes) };
    let Some(directory) = directory.filter(|directory| !directory.table().start().is_null()) else {
        return Ok(SpsError(Err(format!("{table} is not a directory of unwind information"))));
    };
    write().directories.push(directory);
    Ok(SpsError(Ok(())))
}

fn deregister_directory((table,): (ExecutorAddrRange,)) -> Result<SpsError, OutOfBand> {
    let mut known = write();
    let Some(position) = known.directories.iter().position(|directory| directory.table() == table) else {
        return Ok(SpsError(Err(format!("the directory of unwind information at {table} is not registered"))));
    };
    known.directories.swap_remove(position);
    Ok(SpsError(Ok(())))
}

fn register((range,): (ExecutorAddrRange,)) -> Result<SpsError, OutOfBand> {
    let run = match read(range) {
        Ok(run) => run,
        Err(text) => return Ok(SpsError(Err(text))),
    };
    let runs = &mut write().runs;
    let code = run.code();
    let before = runs.range(..code).next_back().map(|(_, &before)| before).filter(|before| before.code_end > code);
    let inside = runs.range(code..run.code_end.max(code + 1)).map(|(_, &inside)| inside);
    let overlapping: Vec<Run> = before.into_iter().chain(inside).collect();
    if overlapping.iter().any(|other| other.index == run.index) {
        return Ok(SpsError(Err(format!("the unwind information at {range} is registered already"))));
    }
    if overlapping.is_empty() {
        runs.insert(code, run);
        return Ok(SpsError(Ok(())));
    }
    // Functions of several objects that were put together by the name of their section lie between each other.
    for other in &overlapping {
        runs.remove(&other.code());
    }
    for single in overlapping.into_iter().chain([run]).flat_map(Run::single) {
        runs.insert(single.code(), single);
    }
    Ok(SpsError(Ok(())))
}

fn deregister((range,): (ExecutorAddrRange,)) -> Result<SpsError, OutOfBand> {
    let run = match read(range) {
        Ok(run) => run,
        Err(text) => return Ok(SpsError(Err(text))),
    };
    let runs = &mut write().runs;
    let of_index = |runs: &BTreeMap<u64, Run>, code| runs.get(&code).is_some_and(|found| found.index == run.index);
    if !of_index(runs, run.code()) {
        return Ok(SpsError(Err(format!("the unwind information at {range} is not registered"))));
    }
    if runs.remove(&run.code()) != Some(run) {
        // It had been taken apart.
        for single in run.single().filter(|single| of_index(runs, single.code())).collect::<Vec<_>>() {
            runs.remove(&single.code());
        }
    }
    Ok(SpsError(Ok(())))
}

/// What libgcc wants to know besides the frame description: `struct dwarf_eh_bases`.
#[repr(C)]
struct Bases {
    text: *const c_void,
    data: *const c_void,
    function: *const c_void,
}

type FindFde = unsafe extern "C" fn(*const c_void, *mut Bases) -> *const c_void;

/// libgcc's own function of that name.
fn next() -> Option<FindFde> {
    static NEXT: OnceLock<Option<FindFde>> = OnceLock::new();
    *NEXT.get_or_init(|| {
        // SAFETY: the name is a C string, and the handle means the libraries after this one.
        let mut found = unsafe { libc::dlsym(libc::RTLD_NEXT, c"_Unwind_Find_FDE".as_ptr()) };
        if found.is_null() {
            // The C library has loaded the one that is asking, for itself alone.
            found = unwinder::function(c"_Unwind_Find_FDE");
        }
        // SAFETY: libgcc's function of this name has this type.
        (!found.is_null()).then(|| unsafe { std::mem::transmute::<*mut c_void, FindFde>(found) })
    })
}

/// Returns the frame description of the function that holds `pc`, or null.
#[unsafe(no_mangle)]
unsafe extern "C" fn _Unwind_Find_FDE(pc: *const c_void, bases: *mut Bases) -> *const c_void {
    let found = KNOWN.read().unwrap_or_else(PoisonError::into_inner).find(pc as u64);
    if let Some(entry) = found {
        let none = std::ptr::null();
        let function = entry.function as usize as *const c_void;
        // SAFETY: libgcc passes a structure of this type to be written.
        unsafe { bases.write(Bases { text: none, data: none, function }) };
        return entry.description as usize as *const c_void;
    }
    match next() {
        // SAFETY: the arguments are those that libgcc passed.
        Some(next) => unsafe { next(pc, bases) },
        None => std::ptr::null(),
    }
}

/// Keeps the lock, so that a child that is forked now does not find it taken by a thread that it does not have.
pub(crate) fn lock_for_fork() -> ForkLock {
    ForkLock { _known: write() }
}

/// See [`lock_for_fork`].
pub(crate) struct ForkLock {
    _known: RwLockWriteGuard<'static, Known>,
}

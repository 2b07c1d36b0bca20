//! Shared libraries of this process, by handles that are checked before the dynamic linker sees them.
//!
//! A library that was opened stays open: linked code may hold addresses in it.

use crate::dispositions;
use crate::module::{Module, Request, What};
use crate::registry::session;
use crate::services::{debugger, thread_exit, unwind};
use crate::unwinder;
use crate::wrap::{OutOfBand, wrappers};
use farlink_addr::ExecutorAddr;
use farlink_wire::functions::Expected;
use farlink_wire::msg::{LookupName, SymbolDef};
use std::collections::HashMap;
use std::ffi::{CStr, CString, c_void};
use std::sync::{LazyLock, Mutex, MutexGuard, Once, PoisonError};

wrappers! { announce:
    DYLIB_OPEN => dylib_open = open;
    DYLIB_OPEN_STATIC => dylib_open_static = open_static;
    DYLIB_RESOLVE => dylib_resolve = resolve_one;
    DYLIB_LOOKUP => dylib_lookup = look_up;
    RESOLVE => resolve = resolve_in_order;
    ARE_CODE => are_code = in_executable_memory;
}

/// What `dlopen` has given, once each. A handle is a position here, from 1 on: executors that open the same libraries give
/// the same handles.
static HANDLES: Mutex<Vec<u64>> = Mutex::new(Vec::new());

/// The libraries that have been opened, by how they were named, and whether more may be.
#[derive(Default)]
struct Opened {
    libraries: HashMap<String, ExecutorAddr>,
    is_closed: bool,
}

fn opened() -> MutexGuard<'static, Opened> {
    static OPENED: LazyLock<Mutex<Opened>> = LazyLock::new(Mutex::default);
    // Nothing that can panic runs under this lock.
    OPENED.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Opens no more libraries from now on: only those that are open are found.
pub(crate) fn close_list() {
    opened().is_closed = true;
}

/// Returns the library of this name, if it is open and no other may be opened.
fn find_opened(path: &str) -> Option<Expected<ExecutorAddr>> {
    let opened = opened();
    let known = opened.libraries.get(path).copied();
    // The process itself needs nothing new.
    opened
        .is_closed
        .then(|| known.ok_or_else(|| format!("{path} has to be opened before the executor is locked")))
        .filter(|_| !path.is_empty())
}

fn handles() -> MutexGuard<'static, Vec<u64>> {
    // Nothing that can panic runs under this lock.
    HANDLES.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Opens a library, or with an empty path the process itself.
fn open((instance, path, mode): (ExecutorAddr, String, u64)) -> Result<Expected<ExecutorAddr>, OutOfBand> {
    session(instance)?;
    if mode != 0 {
        return Ok(Err(format!("open: the mode has to be 0, not {mode:#x}")));
    }
    Ok(open_library(path))
}

/// As [`open`], whoever wants it.
pub(crate) fn open_library(path: String) -> Expected<ExecutorAddr> {
    if let Some(found) = find_opened(&path) {
        return found;
    }
    let named = path.clone();
    let Ok(path) = CString::new(path) else { return Err("open: the path has a NUL".to_owned()) };
    let name = if path.is_empty() { std::ptr::null() } else { path.as_ptr() };
    // SAFETY: the name is null or a C string that lives until the call returns. Initializers of a library run, as the
    // controller asks for.
    let handle = unsafe { libc::dlopen(name, libc::RTLD_LAZY | libc::RTLD_GLOBAL) };
    if handle.is_null() {
        return Err(dl_error());
    }
    let handle = {
        let (mut handles, handle) = (handles(), handle as u64);
        let known = handles.iter().position(|&known| known == handle);
        let position = known.unwrap_or_else(|| {
            handles.push(handle);
            handles.len() - 1
        });
        ExecutorAddr::new(position as u64 + 1)
    };
    opened().libraries.insert(named, handle);
    Ok(handle)
}

/// Opens a library whose thread-local variables some code wants at one distance from every thread's pointer: only while a
/// library is being loaded, before anything of it has run, can it get that.
fn open_static(
    (instance, path, names): (ExecutorAddr, String, Vec<String>),
) -> Result<Expected<ExecutorAddr>, OutOfBand> {
    let names: Vec<CString> = names.into_iter().filter_map(|name| CString::new(name).ok()).collect();
    let requests = names.iter().map(|name| Request { name: Some(name.as_c_str()), what: What::TpOffset }).collect();
    if let Ok(library) = CString::new(path.as_str())
        && !names.is_empty()
        && find_opened(&path).is_none()
    {
        let module = Module { needs: Some(library.as_c_str()), requests, ..Module::default() };
        // If it cannot be, the library is opened as it is, and whoever wants more of it will be told.
        if let Ok(module) = module.load() {
            let opened = open((instance, path, 0));
            module.unload();
            return opened;
        }
    }
    open((instance, path, 0))
}

/// Returns why the dynamic linker could not do what it was asked last on this thread.
pub(crate) fn dl_error() -> String {
    // SAFETY: dlerror has no requirement; it gives the text of this thread's last error.
    let text = unsafe { libc::dlerror() };
    if text.is_null() {
        return "the dynamic linker gives no reason".to_owned();
    }
    // SAFETY: the text is a C string that lives until this thread's next call of the dynamic linker.
    unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned()
}

fn check(handle: ExecutorAddr) -> Result<*mut c_void, String> {
    let position = handle.as_u64().checked_sub(1).and_then(|position| usize::try_from(position).ok());
    let known = position.and_then(|position| handles().get(position).copied());
    known.map(|known| known as *mut c_void).ok_or_else(|| format!("{handle} is no handle of a library"))
}

/// Returns the address of a symbol in the library that was given this handle.
fn find(handle: *mut c_void, name: &str) -> Option<ExecutorAddr> {
    let own = unwind::address_of(name).or_else(|| debugger::address_of(name)).or_else(|| thread_exit::address_of(name));
    let own = own.or_else(|| dispositions::address_of(name));
    own.or_else(|| find_exported(handle, name))
}

/// Returns the address of a symbol that no library of the process has, if the unwinder has it: it belongs to each process, and
/// is loaded when it is needed.
fn find_in_unwinder(name: &str) -> Option<ExecutorAddr> {
    let library = unwinder::load();
    (!library.is_null()).then(|| find_exported(library, name)).flatten()
}

/// As [`find`], for LLVM's controllers. LLVM's own executor is a C++ program, and what is linked into it, LLVM's runtime
/// for linked code first, relies on the C++ library in its process, and on that of mathematical functions, which it has of
/// it: each is opened when the first name that may be its own is missing.
fn find_for_llvm(handle: *mut c_void, name: &str) -> Option<ExecutorAddr> {
    static OPEN_CXX: Once = Once::new();
    static OPEN_MATH: Once = Once::new();
    let found = find(handle, name);
    if found.is_some() {
        return found;
    }
    let is_cxx = ["_Z", "__cxa_", "__gxx_"].iter().any(|prefix| name.starts_with(prefix));
    let (once, library) = if is_cxx { (&OPEN_CXX, c"libstdc++.so.6") } else { (&OPEN_MATH, c"libm.so.6") };
    once.call_once(|| {
        // SAFETY: the name is a C string. Where there is no such library, nothing changes.
        unsafe { libc::dlopen(library.as_ptr(), libc::RTLD_LAZY | libc::RTLD_GLOBAL) };
    });
    find_exported(handle, name).or_else(|| find_in_unwinder(name))
}

/// Returns the address of what a library exports. `name@VERSION` is the definition of that version.
fn find_exported(handle: *mut c_void, name: &str) -> Option<ExecutorAddr> {
    let (name, version) = match name.split_once('@') {
        Some((name, version)) => (name, Some(CString::new(version).ok()?)),
        None => (name, None),
    };
    let name = CString::new(name).ok()?;
    let address = match version {
        // SAFETY: the handle is one that dlopen gave (`check`) and that is never closed, or means the whole process; the
        // texts are C strings.
        Some(version) => unsafe { libc::dlvsym(handle, name.as_ptr(), version.as_ptr()) },
        // SAFETY: as above.
        None => unsafe { libc::dlsym(handle, name.as_ptr()) },
    };
    (!address.is_null()).then(|| ExecutorAddr::new(address as u64))
}

type Definitions = Vec<Option<SymbolDef>>;

/// LLVM's resolve: a name that is missing is absent if it is required, else at the null address.
fn resolve_one((handle, names): (ExecutorAddr, Vec<LookupName>)) -> Result<Expected<Definitions>, OutOfBand> {
    let handle = match check(handle) {
        Ok(handle) => handle,
        Err(text) => return Ok(Err(text)),
    };
    let resolve = |name: LookupName| match find_for_llvm(handle, &name.name) {
        _ if name.name.is_empty() => None,
        Some(address) => Some(SymbolDef::exported(address)),
        None if name.required => None,
        None => Some(SymbolDef::exported(ExecutorAddr::NULL)),
    };
    Ok(Ok(names.into_iter().map(resolve).collect()))
}

/// LLVM 19's lookup: a name that is missing is an error if it is required, else at the null address.
fn look_up(
    (instance, handle, names): (ExecutorAddr, ExecutorAddr, Vec<LookupName>),
) -> Result<Expected<Vec<SymbolDef>>, OutOfBand> {
    session(instance)?;
    let handle = match check(handle) {
        Ok(handle) => handle,
        Err(text) => return Ok(Err(text)),
    };
    let definition = |LookupName { name, required }: LookupName| match find_for_llvm(handle, &name) {
        Some(address) => Ok(SymbolDef::exported(address)),
        None if required => Err(format!("Missing definition for {name}")),
        None => Ok(SymbolDef::exported(ExecutorAddr::NULL)),
    };
    Ok(names.into_iter().map(definition).collect())
}

type Addresses = Vec<Option<ExecutorAddr>>;

/// The address of each name in the first library that has it. The null handle means whatever the process has loaded.
fn resolve_in_order((libraries, names): (Vec<ExecutorAddr>, Vec<String>)) -> Result<Expected<Addresses>, OutOfBand> {
    let handle = |library: ExecutorAddr| if library.is_null() { Ok(libc::RTLD_DEFAULT) } else { check(library) };
    let libraries: Result<Vec<_>, _> = libraries.into_iter().map(handle).collect();
    Ok(libraries.map(|libraries| {
        let has_process = libraries.contains(&libc::RTLD_DEFAULT);
        let in_unwinder = |name: &String| has_process.then(|| find_in_unwinder(name)).flatten();
        let in_libraries = |name: &String| libraries.iter().find_map(|&library| find(library, name));
        let first = |name: &String| in_libraries(name).or_else(|| in_unwinder(name));
        names.iter().map(first).collect()
    }))
}

/// Whether each address is in memory that can be run. What is asked for has just been found in a library, and stays there.
fn in_executable_memory((addrs,): (Vec<ExecutorAddr>,)) -> Result<Expected<Vec<bool>>, OutOfBand> {
    let maps = match std::fs::read_to_string("/proc/self/maps") {
        Ok(maps) => maps,
        Err(error) => return Ok(Err(format!("/proc/self/maps cannot be read: {error}"))),
    };
    let code: Vec<_> = maps.lines().filter_map(executable_range).collect();
    let is_code = |addr: &ExecutorAddr| code.iter().any(|&(start, end)| (start..end).contains(&addr.as_u64()));
    Ok(Ok(addrs.iter().map(is_code).collect()))
}

/// Returns the bounds of a mapping that can be run, from its line in `/proc/self/maps`.
fn executable_range(line: &str) -> Option<(u64, u64)> {
    let (bounds, rest) = line.split_once(' ')?;
    let (start, end) = bounds.split_once('-')?;
    let number = |digits| u64::from_str_radix(digits, 16).ok();
    number(start).zip(number(end)).filter(|_| rest.get(2..3) == Some("x"))
}

//! Probes of what the executor asks of the system besides memory: see [`farlink_mem::probe`], whose rules are these too.

#![allow(unsafe_code)]

use crate::module::{Module, Request, Template, What};
use std::io;

/// Loads a module that wants stacks that code can run on. They stay so.
///
/// # Errors
///
/// Fails if the system or its dynamic linker refuses that.
pub fn executable_stacks() -> io::Result<()> {
    (Module { executable_stack: true, ..Module::default() }).load().map(drop).map_err(io::Error::other)
}

/// Loads a module with that many bytes of thread-local variables at one distance from every thread's pointer.
///
/// # Errors
///
/// Fails if the dynamic linker has no room for them.
pub fn static_thread_local(bytes: u64) -> io::Result<()> {
    let template = Some(Template { content: &[], size: bytes, align: 16 });
    let requests = vec![Request { name: None, what: What::TpOffset }];
    let module = Module { template, requests, ..Module::default() }.load().map_err(io::Error::other)?;
    if module.results == [0] {
        return Err(io::Error::other("the dynamic linker gave no distance"));
    }
    Ok(())
}

/// Has the system refuse one call of this process for good: `prctl(2)` with `PR_SET_NO_NEW_PRIVS`, `seccomp(2)`.
///
/// # Errors
///
/// Fails if the system cannot, or allows the call.
pub fn refuse_system_call() -> io::Result<()> {
    const LOAD_NUMBER: u16 = (libc::BPF_LD | libc::BPF_W | libc::BPF_ABS) as u16;
    const JUMP_IF_EQUAL: u16 = (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16;
    const RETURN: u16 = (libc::BPF_RET | libc::BPF_K) as u16;
    let step = |code, jt, k| libc::sock_filter { code, jt, jf: 0, k };
    let mut filter = [
        step(LOAD_NUMBER, 0, 0),
        step(JUMP_IF_EQUAL, 1, libc::SYS_getppid as u32),
        step(RETURN, 0, libc::SECCOMP_RET_ALLOW),
        step(RETURN, 0, libc::SECCOMP_RET_ERRNO | libc::EOWNERDEAD as u32),
    ];
    let program = libc::sock_fprog { len: filter.len() as u16, filter: filter.as_mut_ptr() };
    // SAFETY: the call takes numbers, and only takes from this process what it does not use.
    checked(i64::from(unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) }))?;
    // SAFETY: the program and its steps live until the call has copied them.
    checked(unsafe { libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, 0, &raw const program) })?;
    // SAFETY: the call has no arguments.
    let result = unsafe { libc::syscall(libc::SYS_getppid) };
    match io::Error::last_os_error().raw_os_error() {
        Some(libc::EOWNERDEAD) if result == -1 => Ok(()),
        _ => Err(io::Error::other("a call that was to be refused was not")),
    }
}

/// Returns the version of Landlock. `landlock_create_ruleset(2)`
///
/// # Errors
///
/// Fails if the system has none.
pub fn landlock_version() -> io::Result<u32> {
    const VERSION: libc::c_int = 1;
    // SAFETY: with this flag the call reads no memory and makes nothing.
    let version = unsafe { libc::syscall(libc::SYS_landlock_create_ruleset, std::ptr::null::<u8>(), 0, VERSION) };
    u32::try_from(version).map_err(|_| io::Error::last_os_error())
}

/// Returns the version of the C library, as `glibc 2.36`.
#[must_use]
pub fn c_library() -> Option<String> {
    let mut text = [0u8; 64];
    // SAFETY: the buffer has as many bytes as the call is told.
    let bytes = unsafe { libc::confstr(libc::_CS_GNU_LIBC_VERSION, text.as_mut_ptr().cast(), text.len()) };
    let text = text.get(..bytes)?;
    Some(String::from_utf8_lossy(text.strip_suffix(&[0])?).into_owned())
}

fn checked(result: i64) -> io::Result<()> {
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

//! Starting a child, and waiting for it.

#![allow(unsafe_code)]

use crate::process::Program;
use rustix::process::{Pid, Signal, WaitId, WaitIdOptions, WaitOptions, kill_process, waitid, waitpid};
use std::ffi::{CString, OsStr, OsString, c_char};
use std::os::fd::RawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;

/// A child that has not been waited for.
pub(crate) struct Child(pub(crate) Pid);

impl Child {
    /// Returns a child of this process that another has made; none if there is no such child that has not been waited for,
    /// or while it runs it is not what it has to be.
    pub(crate) fn found(pid: Pid, is_right: impl FnOnce(Pid) -> bool) -> Option<Self> {
        let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG | WaitIdOptions::NOWAIT;
        let has_ended = || waitid(WaitId::Pid(pid), options).map(|status| status.is_some());
        let is_wanted = has_ended().ok()? || is_right(pid) || has_ended().ok()?;
        is_wanted.then_some(Self(pid))
    }

    pub(crate) fn id(&self) -> Pid {
        self.0
    }

    /// Starts a program with its arguments and these changes of the environment, in which the descriptors `inherited` are open.
    ///
    /// `posix_spawn(3)` does not copy this process, however large it is, and passes the descriptors to no other child.
    pub(crate) fn spawn(
        program: &Program,
        args: &[OsString],
        environment: &[(&str, OsString)],
        inherited: &[RawFd],
    ) -> std::io::Result<Self> {
        let c_string = |text: &OsStr| Ok(CString::new(text.as_bytes())?);
        let path = c_string(program.path.as_os_str())?;
        let args: Vec<CString> = std::iter::once(program.path.as_os_str())
            .chain(args.iter().map(OsString::as_os_str))
            .map(c_string)
            .collect::<std::io::Result<_>>()?;
        let is_changed = |name: &OsStr| environment.iter().any(|(changed, _)| name == *changed);
        let kept = std::env::vars_os().filter(|(name, _)| !is_changed(name));
        let changed = environment.iter().map(|(name, value)| (OsString::from(*name), value.clone()));
        let variables: Vec<CString> = kept
            .chain(changed)
            .map(|(name, value)| c_string(&[name.as_os_str(), value.as_os_str()].join(OsStr::new("="))))
            .collect::<std::io::Result<_>>()?;
        let pointers = |texts: &[CString]| -> Vec<*mut c_char> {
            texts.iter().map(|text| text.as_ptr().cast_mut()).chain([std::ptr::null_mut()]).collect()
        };
        let (argv, environ) = (pointers(&args), pointers(&variables));
        let settings = SpawnSettings::new(inherited)?;
        let mut pid = 0;
        // SAFETY: the path and the arrays, which end with null, are of C strings that live until the call returns, and the
        // settings have been made.
        let result = unsafe {
            libc::posix_spawnp(
                &raw mut pid,
                path.as_ptr(),
                &raw const settings.actions,
                &raw const settings.attributes,
                argv.as_ptr(),
                environ.as_ptr(),
            )
        };
        checked(result)?;
        Ok(Self(Pid::from_raw(pid).expect("a child has an id")))
    }

    pub(crate) fn wait(&self) -> std::io::Result<ExitStatus> {
        let ended = rustix::io::retry_on_intr(|| waitpid(Some(self.0), WaitOptions::empty()))?;
        Ok(ExitStatus::from_raw(ended.map_or(0, |(_, status)| status.as_raw())))
    }

    pub(crate) fn try_wait(&self) -> std::io::Result<Option<ExitStatus>> {
        let ended = waitpid(Some(self.0), WaitOptions::NOHANG)?;
        Ok(ended.map(|(_, status)| ExitStatus::from_raw(status.as_raw())))
    }

    pub(crate) fn kill(&self) {
        // It has not been waited for, so its id is its own.
        let _ = kill_process(self.0, Signal::KILL);
    }
}

/// How a child begins: with descriptors that this process closes for others, and signals as programs expect them.
struct SpawnSettings {
    actions: libc::posix_spawn_file_actions_t,
    attributes: libc::posix_spawnattr_t,
}

impl SpawnSettings {
    fn new(inherited: &[RawFd]) -> std::io::Result<Box<Self>> {
        // SAFETY: both are plain structures, which the functions below fill in.
        let mut settings: Box<Self> = Box::new(unsafe { std::mem::zeroed() });
        let (actions, attributes) = (&raw mut settings.actions, &raw mut settings.attributes);
        // SAFETY: the structure is there to be filled in.
        checked(unsafe { libc::posix_spawn_file_actions_init(actions) })?;
        // SAFETY: as above.
        checked(unsafe { libc::posix_spawnattr_init(attributes) })?;
        for &number in inherited {
            // SAFETY: the actions have been made. A descriptor that is made a copy of itself stays open in the child.
            checked(unsafe { libc::posix_spawn_file_actions_adddup2(actions, number, number) })?;
        }
        // SAFETY: an empty set of signals is plain bytes.
        let mut signals: libc::sigset_t = unsafe { std::mem::zeroed() };
        // SAFETY: the set is there to be written.
        unsafe { libc::sigemptyset(&raw mut signals) };
        // SAFETY: the attributes and the set have been made.
        checked(unsafe { libc::posix_spawnattr_setsigmask(attributes, &raw const signals) })?;
        // SAFETY: the set has been made. Rust's programs ignore this signal, and others expect not to.
        unsafe { libc::sigaddset(&raw mut signals, libc::SIGPIPE) };
        // SAFETY: as above.
        checked(unsafe { libc::posix_spawnattr_setsigdefault(attributes, &raw const signals) })?;
        let flags = (libc::POSIX_SPAWN_SETSIGMASK | libc::POSIX_SPAWN_SETSIGDEF) as libc::c_short;
        // SAFETY: as above.
        checked(unsafe { libc::posix_spawnattr_setflags(attributes, flags) })?;
        Ok(settings)
    }
}

impl Drop for SpawnSettings {
    fn drop(&mut self) {
        // SAFETY: what has been made is not used again; the C library accepts what is all zero.
        unsafe { libc::posix_spawn_file_actions_destroy(&raw mut self.actions) };
        // SAFETY: as above.
        unsafe { libc::posix_spawnattr_destroy(&raw mut self.attributes) };
    }
}

/// Makes an error of a number that a function gives in place of `errno`.
fn checked(result: libc::c_int) -> std::io::Result<()> {
    if result == 0 { Ok(()) } else { Err(std::io::Error::from_raw_os_error(result)) }
}

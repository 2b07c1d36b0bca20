//! An executor that linked code cannot make more of: after it has been locked, no memory becomes executable in it but what
//! its controller writes.
//!
//! That takes several measures, each of which closes what the others leave open:
//!
//! - at its start, before there are threads: no new privileges, and a Landlock domain ([`landlock`]), which keeps it from
//!   writing below `/proc` (`/proc/self/mem` ignores protections) and from the memory of processes outside;
//! - when it is locked: code and read-only memory are sealed ([`seal`]), protections may not gain execution
//!   (`PR_SET_MDWE`), and system calls that would make memory executable, start programs or reach into other processes are
//!   refused ([`filter`]).
//!
//! The controller does its part: memory that it has shared cannot be mapped to be written again by anybody
//! (`F_SEAL_FUTURE_WRITE`), so code has no other address at which it can be changed.

mod filter;
mod landlock;
mod seal;

use crate::registry::session;
use crate::wrap::{OutOfBand, wrappers};
use crate::{report, services, unwinder};
use farlink_addr::ExecutorAddr;
use farlink_wire::functions::{Expected, HARDEN_SANDBOX};
use std::os::fd::OwnedFd;
use std::sync::Mutex;
use std::sync::PoisonError;

wrappers! { announce:
    HARDEN => harden = lock;
}

/// What is done, and why it could not be; empty if it has been.
type Measure = (String, String);

/// What has been done at the start.
static BEGUN: Mutex<Option<Vec<Measure>>> = Mutex::new(None);

fn measure(name: &str, result: Result<(), String>) -> Measure {
    (name.to_owned(), result.err().unwrap_or_default())
}

fn system(result: libc::c_long) -> Result<(), String> {
    if result == 0 { Ok(()) } else { Err(std::io::Error::last_os_error().to_string()) }
}

const NO_NEW_PRIVILEGES: &str = "no new privileges";
const DOMAIN: &str = "no writing below /proc, no reaching into other processes (Landlock)";

/// What a domain is made of, or why there is none.
pub(crate) struct Rules(Result<OwnedFd, String>);

/// Gets ready what [`begin`] takes.
pub(crate) fn rules() -> Rules {
    Rules(landlock::rules())
}

/// Does what can only be done while there is one thread. What is forked later is in the same domain, and can enter one of
/// its own in it.
pub(crate) fn begin(Rules(rules): &Rules) {
    let entered = rules.as_ref().map_err(String::clone).and_then(landlock::enter_domain);
    // SAFETY: the flag is set for good and has no other effect on this process.
    let privileges = unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) };
    let begun = vec![measure(NO_NEW_PRIVILEGES, system(privileges.into())), measure(DOMAIN, entered)];
    *BEGUN.lock().unwrap_or_else(PoisonError::into_inner) = Some(begun);
}

/// Locks this process; gives what has been done and what could not be.
fn lock((instance, flags): (ExecutorAddr, u64)) -> Result<Expected<Vec<(String, String)>>, OutOfBand> {
    let session = session(instance)?;
    let is_sandboxed = flags & HARDEN_SANDBOX != 0;
    let not_begun = || {
        let why = "it has to be done at the start: farlink-executor --harden".to_owned();
        [NO_NEW_PRIVILEGES, DOMAIN].map(|name| (name.to_owned(), why.clone())).to_vec()
    };
    let mut done = BEGUN.lock().unwrap_or_else(PoisonError::into_inner).clone().unwrap_or_else(not_begun);
    // Later it could not be loaded: also the C library wants it, to end a thread.
    unwinder::load();
    services::close_library_list();
    let stripes = session.shared.seal().map_err(|error| error.to_string());
    done.push(measure("code and read-only memory are sealed (mseal)", stripes.and_then(|()| seal::loaded_objects())));
    if is_sandboxed {
        report::keep_maps_open();
    }
    const MDWE: libc::c_int = 65;
    const REFUSE_EXEC_GAIN: libc::c_ulong = 1;
    // SAFETY: the flag is set for good; this process gives execution to nothing that it can write.
    let mdwe = unsafe { libc::prctl(MDWE, REFUSE_EXEC_GAIN, 0, 0, 0) };
    done.push(measure("protections gain no execution (PR_SET_MDWE)", system(mdwe.into())));
    match filter::install(is_sandboxed) {
        Ok(()) => done.push(measure("system calls are filtered (seccomp)", Ok(()))),
        Err(error) => return Ok(Err(format!("system calls cannot be filtered: {error}"))),
    }
    Ok(Ok(done))
}

//! System calls that fail because a test wants them to. Only with the feature `fault-injection`.

use super::count::SystemCall;
use rustix::io::Errno;
use std::sync::Mutex;

/// What happens at a system call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// It fails as the system lets it fail when there is no more of what it needs.
    Fail,
    /// The process gets SIGKILL before it.
    Kill,
}

struct Plan {
    fault: Fault,
    /// Calls that still go well.
    left: u64,
    /// What was struck.
    struck: Option<SystemCall>,
}

static PLAN: Mutex<Option<Plan>> = Mutex::new(None);

/// Makes the memory layer's `nth` system call from now on, counted from 0 over all kinds and threads of this process, go
/// wrong.
///
/// Unmapping and removing names of one's own are passed over when calls are to fail: the system does not refuse those.
pub fn arm(nth: u64, fault: Fault) {
    *lock() = Some(Plan { fault, left: nth, struck: None });
}

/// Ends what [`arm`] began; gives the kind of the call that went wrong, if it came to that.
pub fn disarm() -> Option<String> {
    lock().take()?.struck.map(|kind| format!("{kind:?}"))
}

fn lock() -> std::sync::MutexGuard<'static, Option<Plan>> {
    PLAN.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

pub(super) fn strike(kind: SystemCall) -> Result<(), Errno> {
    let mut plan = lock();
    let Some(plan) = plan.as_mut().filter(|plan| plan.struck.is_none()) else { return Ok(()) };
    let can_fail = !matches!(kind, SystemCall::Munmap | SystemCall::ShmUnlink);
    if plan.fault == Fault::Fail && !can_fail {
        return Ok(());
    }
    if plan.left > 0 {
        plan.left -= 1;
        return Ok(());
    }
    plan.struck = Some(kind);
    match plan.fault {
        // Nothing but an error of this process's rights keeps it from killing itself; then the call fails.
        Fault::Kill => rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL)?,
        Fault::Fail => {}
    }
    Err(match kind {
        SystemCall::MemfdCreate | SystemCall::ShmOpen => Errno::MFILE,
        SystemCall::Ftruncate | SystemCall::Fallocate => Errno::NOSPC,
        SystemCall::Stat | SystemCall::Lseek => Errno::BADF,
        SystemCall::AddSeals => Errno::PERM,
        _ => Errno::NOMEM,
    })
}

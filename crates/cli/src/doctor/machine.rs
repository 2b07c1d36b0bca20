//! Settings of this machine that matter to farlink: read, not tried.

use super::{Finding, Status};
use rustix::fs::{StatVfsMountFlags, statvfs};

const SETTINGS: &str = "settings";

/// Mappings of one process below which large programs have trouble, farlink or not.
const USUAL_MAPPINGS: u64 = 65_530;

pub(super) fn settings() -> Vec<Finding> {
    let settings = [dev_shm(), memfd_noexec(), max_map_count(), ptrace_scope(), perf_event_paranoid()];
    settings.into_iter().flatten().collect()
}

fn finding(name: &'static str, status: Status, seen: impl Into<String>, farlink: &str) -> Finding {
    Finding { group: SETTINGS, name, status, seen: seen.into(), farlink: farlink.to_owned() }
}

fn number(path: &str) -> Option<i64> {
    std::fs::read_to_string(path).ok()?.trim().parse().ok()
}

fn dev_shm() -> Option<Finding> {
    const NAME: &str = "/dev/shm";
    let without = "needs it only with --memory posix and for LLVM's executors";
    let stat = match statvfs(NAME) {
        Ok(stat) => stat,
        Err(error) => return Some(finding(NAME, Status::Limited, error.to_string(), without)),
    };
    let mib = |blocks: u64| blocks.saturating_mul(stat.f_frsize) >> 20;
    let seen = format!("{} MiB free of {} MiB", mib(stat.f_bavail), mib(stat.f_blocks));
    if stat.f_flag.contains(StatVfsMountFlags::NOEXEC) {
        return Some(finding(NAME, Status::Limited, format!("{seen}, mounted noexec"), without));
    }
    let used = "secures pages there before they are used, so that a full /dev/shm is an error and not a signal";
    Some(finding(NAME, Status::Works, seen, used))
}

fn memfd_noexec() -> Option<Finding> {
    const NAME: &str = "vm.memfd_noexec";
    let value = number("/proc/sys/vm/memfd_noexec")?;
    let what = match value {
        0 => "memory without a name may be a program unless it says that it is none",
        1 => "memory without a name is no program unless it says that it is one",
        _ => "memory without a name must not be a program",
    };
    let farlink = "says of its memory that it is no program: code in it is mapped, which every value allows";
    Some(finding(NAME, Status::Works, format!("{value}: {what}"), farlink))
}

fn max_map_count() -> Option<Finding> {
    let value = u64::try_from(number("/proc/sys/vm/max_map_count")?).ok()?;
    let status = if value < USUAL_MAPPINGS { Status::Limited } else { Status::Works };
    let farlink = "needs some ten mappings for each GiB reserved, however many objects are linked";
    Some(finding("vm.max_map_count", status, value.to_string(), farlink))
}

fn ptrace_scope() -> Option<Finding> {
    const NAME: &str = "kernel.yama.ptrace_scope";
    let attach = "debuggers can attach to executors of the same user";
    let Some(value) = number("/proc/sys/kernel/yama/ptrace_scope") else {
        return Some(finding(NAME, Status::Works, "not there: Yama is not in use", attach));
    };
    let (status, farlink) = match value {
        0 => (Status::Works, attach),
        1 => (Status::Limited, "debuggers can start executors, but attach to them only as root"),
        2 => (Status::Limited, "debuggers need to be root"),
        _ => (Status::Limited, "no debugger can look at an executor"),
    };
    Some(finding(NAME, status, value.to_string(), farlink))
}

fn perf_event_paranoid() -> Option<Finding> {
    let value = number("/proc/sys/kernel/perf_event_paranoid")?;
    let is_free = value <= 2 || rustix::process::geteuid().is_root();
    let (status, farlink) = if is_free {
        (Status::Works, "perf can profile executors of the same user")
    } else {
        (Status::Limited, "perf needs to be root")
    };
    Some(finding("kernel.perf_event_paranoid", status, value.to_string(), farlink))
}

//! What a controller can ask for. Each service is a table of wrapper functions and the Rust functions behind them.

mod access;
mod calls;
mod debugger;
mod dispatch;
mod dylib;
mod lifecycle;
mod memory;
mod native;
mod thread_exit;
mod tls;
mod trace;
mod unwind;
mod unwind_index;

use crate::report;
use crate::wrap::address;
use farlink_addr::ExecutorAddr;
use farlink_mem::wrapper::WrapperFunction;
use farlink_wire::setup::ExecutorInfo;

pub(crate) use access::write_own_memory;
pub(crate) use calls::{end_process, flush_streams};
pub(crate) use dylib::{close_list as close_library_list, dl_error, open_library};
pub(crate) use unwind_index::{ForkLock, lock_for_fork};

/// Whether a call of `function` is over soon, in a process that has run nothing of its controller's yet: no library that is
/// being opened keeps others from being looked into.
pub(crate) fn is_brief(function: ExecutorAddr) -> bool {
    let brief: [WrapperFunction; 5] = [
        memory::shared_map,
        memory::shared_map_at,
        unwind_index::register_unwind_directory,
        dylib::resolve,
        report::leave_reports,
    ];
    brief.into_iter().any(|brief| function == address(brief))
}

/// Announces every function that the connection allows.
pub(crate) fn announce(info: &mut ExecutorInfo, passes_descriptors: bool) {
    memory::announce(info);
    if passes_descriptors {
        memory::announce_with_descriptors(info);
        report::announce(info);
    }
    dylib::announce(info);
    calls::announce(info);
    native::announce(info);
    lifecycle::announce(info);
    unwind::announce(info);
    unwind_index::announce(info);
    tls::announce(info);
    trace::announce(info);
    debugger::announce(info);
    access::announce(info);
    crate::harden::announce(info);
    dispatch::announce(info);
}

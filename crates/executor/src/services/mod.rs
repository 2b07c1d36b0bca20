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

use farlink_wire::setup::ExecutorInfo;

pub(crate) use access::write_own_memory;
pub(crate) use calls::{end_process, flush_streams};
pub(crate) use dylib::{close_list as close_library_list, dl_error, open_library};
pub(crate) use unwind_index::{ForkLock, lock_for_fork};

/// Announces every function that the connection allows.
pub(crate) fn announce(info: &mut ExecutorInfo, passes_descriptors: bool) {
    memory::announce(info);
    if passes_descriptors {
        memory::announce_with_descriptors(info);
        crate::report::announce(info);
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

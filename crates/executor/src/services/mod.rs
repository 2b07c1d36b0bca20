//! What a controller can ask for. Each service is a table of wrapper functions and the Rust functions behind them.

mod access;
mod calls;
mod debugger;
mod dispatch;
mod dylib;
mod lifecycle;
mod memory;
mod unwind;

use farlink_wire::setup::ExecutorInfo;

pub(crate) use calls::end_process;

/// Announces every function that the connection allows.
pub(crate) fn announce(info: &mut ExecutorInfo, passes_descriptors: bool) {
    memory::announce(info);
    if passes_descriptors {
        memory::announce_with_descriptors(info);
    }
    dylib::announce(info);
    calls::announce(info);
    lifecycle::announce(info);
    unwind::announce(info);
    debugger::announce(info);
    access::announce(info);
    dispatch::announce(info);
}

//! An executor without a connection: the controller is in this process.

use crate::registry::Registered;
use crate::server::announcement;
use crate::trace;
use farlink_addr::ExecutorAddr;
use farlink_mem::wrapper::call_wrapper;
use farlink_rpc::{CallError, Caller, Executor, Handler, Pending};
use std::sync::Arc;

/// Returns an executor that is this process. Functions are called directly, on the calling thread.
///
/// What it holds of memory is torn down when its last clone is dropped.
#[must_use]
pub fn local() -> Executor {
    local_executor(Registered::local(None))
}

/// As [`local`], for a controller with functions that linked code calls.
#[must_use]
pub fn local_with(handler: Arc<dyn Handler>) -> Executor {
    local_executor(Registered::local(Some(handler)))
}

fn local_executor(registered: Registered) -> Executor {
    let info = announcement(registered.token, false);
    let caller = Arc::new(DirectCaller(registered));
    Executor::new(info, caller).expect("the page size of this process is one")
}

struct DirectCaller(Registered);

impl Caller for DirectCaller {
    #[allow(unsafe_code)]
    fn call(&self, function: ExecutorAddr, args: Vec<u8>) -> Pending<Result<Vec<u8>, CallError>> {
        // SAFETY: the controller, which is this process, names a function of its own or one that it has linked.
        let result = trace::span(function, || unsafe { call_wrapper(function, &args) });
        Pending::ready(result.map_err(CallError::OutOfBand))
    }
}

impl Drop for DirectCaller {
    fn drop(&mut self) {
        // Nobody is left to be told of actions that fail.
        let _ = self.0.session.shut_down();
    }
}

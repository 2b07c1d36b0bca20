//! Calls from linked code to the controller.

use crate::fork;
use crate::registry::session;
use farlink_addr::ExecutorAddr;
use farlink_mem::wrapper::WrapperResult;
use farlink_wire::functions::DISPATCH_FN;
use farlink_wire::setup::ExecutorInfo;
use std::ffi::c_void;
use std::panic::{AssertUnwindSafe, catch_unwind};

/// Announces the function through which linked code calls the controller.
pub(crate) fn announce(info: &mut ExecutorInfo) {
    let address = ExecutorAddr::new(dispatch as *const () as u64);
    info.bootstrap_symbols.push((DISPATCH_FN.to_owned(), address));
}

/// Calls the controller's function with this tag and waits for its result. `context` stands for the session.
unsafe extern "C" fn dispatch(context: *mut c_void, tag: *const c_void, args: *const u8, size: usize) -> WrapperResult {
    let args = if size == 0 {
        Vec::new()
    } else {
        // SAFETY: linked code passes `size` bytes, as to every wrapper function.
        unsafe { std::slice::from_raw_parts(args, size) }.to_vec()
    };
    let call = || {
        if fork::is_child() {
            return Err("this process was forked by linked code: the controller is its parent's".to_owned());
        }
        let session = session(ExecutorAddr::new(context as u64))?;
        session.endpoint()?.call(ExecutorAddr::new(tag as u64), args).wait().map_err(|error| error.to_string())
    };
    // A panic stops here: it must not unwind into C.
    let result = catch_unwind(AssertUnwindSafe(call));
    WrapperResult::from_result(result.unwrap_or_else(|_| Err(format!("{DISPATCH_FN} panicked"))))
}

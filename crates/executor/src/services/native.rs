//! Calls of C functions of any arguments, and what functions of the controller look like to linked code.

use crate::callback::{callback_entry, lazy_entry};
use crate::native::call_native;
use crate::wrap::{OutOfBand, wrappers};
use farlink_wire::functions::{CALLBACK_ENTRY_KEY, LAZY_ENTRY_KEY};
use farlink_wire::native::{NativeCall, Returned};
use farlink_wire::setup::ExecutorInfo;

wrappers! { announce_functions:
    CALL_NATIVE => call = run;
}

/// Announces the functions of this service, and the code that stubs jump to.
pub(crate) fn announce(info: &mut ExecutorInfo) {
    announce_functions(info);
    info.set_value(CALLBACK_ENTRY_KEY, &callback_entry());
    info.set_value(LAZY_ENTRY_KEY, &lazy_entry());
}

fn run(call: NativeCall) -> Result<Returned, OutOfBand> {
    // SAFETY: the controller names a function that may be called so; it is trusted with this process's memory.
    unsafe { call_native(&call) }
}

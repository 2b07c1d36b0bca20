//! The record of what this process does, for the controller: see [`crate::trace`].

use crate::trace;
use crate::wrap::{OutOfBand, wrappers};
use farlink_wire::msg::TraceSpan;

wrappers! { announce:
    TRACE_START => trace_start = start;
    TRACE_TAKE => trace_take = take;
}

/// Spans in one answer: they fit in a message.
const MAX_TAKEN: u64 = 1 << 16;

fn start((): ()) -> Result<u64, OutOfBand> {
    Ok(trace::start())
}

fn take((count,): (u64,)) -> Result<Vec<TraceSpan>, OutOfBand> {
    Ok(trace::take(count.min(MAX_TAKEN)))
}

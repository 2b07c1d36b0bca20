//! The record of what this process does, for the controller: see [`crate::trace`]. And what profilers see of it.

use crate::trace;
use crate::wrap::{OutOfBand, wrappers};
use farlink_wire::msg::TraceSpan;
use farlink_wire::sps::SpsError;
use rustix::mm::{MapFlags, ProtFlags, mmap};
use std::fs::File;

wrappers! { announce:
    TRACE_START => trace_start = start;
    TRACE_TAKE => trace_take = take;
    MAP_FOR_PERF => map_for_perf = map;
}

/// Spans in one answer: they fit in a message.
const MAX_TAKEN: u64 = 1 << 16;

fn start((): ()) -> Result<u64, OutOfBand> {
    Ok(trace::start())
}

fn take((count,): (u64,)) -> Result<Vec<TraceSpan>, OutOfBand> {
    Ok(trace::take(count.min(MAX_TAKEN)))
}

/// Maps the first page of a file, and leaves it mapped: a profiler that records this process sees that, and finds in the file
/// where linked functions are. It takes executable mappings for that only.
fn map((path,): (String,)) -> Result<SpsError, OutOfBand> {
    let mapped = File::open(&path).map_err(|error| error.to_string()).and_then(|file| {
        let (prot, flags) = (ProtFlags::READ | ProtFlags::EXEC, MapFlags::PRIVATE);
        // SAFETY: a new mapping at an address of the system's choice, which nobody reads.
        let mapped = unsafe { mmap(std::ptr::null_mut(), rustix::param::page_size(), prot, flags, &file, 0) };
        mapped.map(drop).map_err(|error| error.to_string())
    });
    Ok(SpsError(mapped.map_err(|error| format!("{path} cannot be mapped: {error}"))))
}

//! Linux: mappings, shared memory objects, and copies of memory for children.

mod mapping;
mod object;
pub mod probe;
mod snapshot;

pub(crate) use mapping::{Data, Mapping, Place};
pub(crate) use object::SharedObject;
pub(crate) use snapshot::Snapshot;

use farlink_addr::{ExecutorAddr, ExecutorAddrRange, PageSize};

/// Returns the page size of this process.
pub(crate) fn page_size() -> PageSize {
    PageSize::new(rustix::param::page_size() as u64).expect("Linux has page sizes that are powers of two from 4096")
}

/// Returns how many mappings of this process are in `ranges`, which do not overlap. `/proc/self/maps`
pub(crate) fn count_mappings(ranges: &[ExecutorAddrRange]) -> std::io::Result<u64> {
    let maps = std::fs::read_to_string("/proc/self/maps")?;
    let address = |digits: &str| u64::from_str_radix(digits, 16).ok().map(ExecutorAddr::new);
    let mappings = maps.lines().filter_map(|line| {
        let (start, end) = line.split_once(' ')?.0.split_once('-')?;
        ExecutorAddrRange::new(address(start)?, address(end)?)
    });
    Ok(mappings.filter(|mapping| ranges.iter().any(|range| range.overlaps(*mapping))).count() as u64)
}

//! What happens at the limits of the process: number of mappings, address space.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use farlink_addr::{Align, AllocGroup, ExecutorAddr, MemProt};
use farlink_mem::{
    Allocation, Error, InProcessMapper, MemoryManager, MemoryMapper, MemoryService, SegmentLayout, page_size,
};
use farlink_wire::msg::Segment;
use farlink_wire::sps::Blob;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use std::sync::Arc;

fn one_page(addr: ExecutorAddr, prot: MemProt) -> Vec<Allocation<'static>> {
    let content = Blob::from(&b"content"[..]);
    let segment = Segment { group: AllocGroup::standard(prot), addr, size: 8, content };
    vec![Allocation { segments: vec![segment], ..Allocation::default() }]
}

/// Both limits, one after the other: while one is reached no thread of another test can start.
#[test]
fn limits_of_the_process() {
    too_many_mappings();
    little_address_space();
}

/// At the limit of mappings a request is refused. Pages that cannot be made writable again are given to nobody, since
/// writing to them would be a fault, and go with their slab; everything else goes on.
fn too_many_mappings() {
    let limit = std::fs::read_to_string("/proc/sys/vm/max_map_count").unwrap();
    let pages: u64 = limit.trim().parse().unwrap();
    if pages > 300_000 {
        eprintln!("SKIPPED too_many_mappings: reaching a limit of {pages} mappings takes too long");
        return;
    }
    let page = page_size().bytes();
    let service = MemoryService::new();
    let slab = service.reserve_private((pages + 100) * page).unwrap();
    let at = |index: u64| slab.start().checked_add(index * page).unwrap();
    // Three neighbours alike are one mapping.
    for index in 0..3 {
        service.initialize(one_page(at(index), MemProt::RX)).unwrap();
    }
    let mut made = Vec::with_capacity(pages as usize);
    let error = loop {
        let addr = at(4 + 2 * made.len() as u64);
        match service.initialize(one_page(addr, MemProt::READ)) {
            Ok(_) => made.push(addr),
            Err(error) => break error,
        }
    };
    // The middle one would be a mapping of its own, and make two of its neighbours.
    let deallocated = service.deinitialize(&[at(1)]);
    let few = service.deinitialize(&made.split_off(made.len() - 20));
    // There are mappings again: now messages of failed assertions can be made.
    assert!(matches!(&error, Error::Protect { text, .. } if text.contains("max_map_count")), "{error}");
    deallocated.unwrap();
    few.unwrap();
    let again = service.initialize(one_page(at(1), MemProt::RX)).unwrap_err();
    assert!(matches!(again, Error::Overlap(..)), "{again}");
    assert!(matches!(service.deinitialize(&[at(1)]), Err(Error::UnknownAllocation(_))));
    assert!(matches!(service.deinitialize(&[at(1), at(2)]), Err(Error::UnknownAllocation(_))));
    service.deinitialize(&[at(2)]).unwrap();
    service.initialize(one_page(at(2), MemProt::RX)).unwrap();
    service.release(&[slab.start()]).unwrap();
}

/// With little address space left, a smaller reservation is made than is usual, and what is too large is an error.
fn little_address_space() {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
    let used = statm.split_whitespace().next().unwrap().parse::<u64>().unwrap() * page_size().bytes();
    let before = getrlimit(Resource::As);
    let mapper: Arc<dyn MemoryMapper> = Arc::new(InProcessMapper::new());
    let manager = MemoryManager::new(mapper, 1 << 30);
    let rw = |content_bytes| SegmentLayout {
        group: AllocGroup::standard(MemProt::RW),
        content_bytes,
        zero_fill_bytes: 0,
        align: Align::ONE,
    };
    setrlimit(Resource::As, Rlimit { current: Some(used + (64 << 20)), maximum: before.maximum }).unwrap();
    let small = manager.allocate(vec![rw(1 << 20)]).wait();
    let large = manager.allocate(vec![rw(100 << 20)]).wait();
    setrlimit(Resource::As, before).unwrap();
    small.unwrap().segments()[0].working.write(0, &[1; 1 << 20]).unwrap();
    assert!(matches!(large, Err(Error::OutOfAddressSpace { .. })));
    let reserved = manager.stats().reserved_bytes;
    assert!((1 << 20..=64 << 20).contains(&reserved), "{reserved}");
    assert!(manager.allocate(vec![rw(100 << 20)]).wait().is_ok());
}

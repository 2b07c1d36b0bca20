//! [`MemoryManager`] against a plain model, and over a mapper that fails on demand.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use farlink_addr::{Align, AllocGroup, ExecutorAddr, ExecutorAddrRange, MemProt, PageSize};
use farlink_mem::{
    AllocatedSegment, Error, FinalizeRequest, FinalizedAlloc, InFlightAlloc, InProcessMapper, MemoryManager,
    MemoryMapper, SegmentLayout, WorkingMemory, page_size,
};
use farlink_rpc::{CallError, Disconnected, Pending};
use proptest::prelude::*;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

fn layout(prot: MemProt, content: u64, zeros: u64, align: u64) -> SegmentLayout {
    SegmentLayout {
        group: AllocGroup::standard(prot),
        content_bytes: content,
        zero_fill_bytes: zeros,
        align: Align::new(align).unwrap(),
    }
}

fn rw(bytes: u64) -> Vec<SegmentLayout> {
    vec![layout(MemProt::RW, bytes, 0, 1)]
}

// ---- The model.

#[derive(Clone, Debug)]
enum Op {
    Allocate(Vec<SegmentLayout>),
    /// Finalize some of those in flight, from this one on.
    Finalize(prop::sample::Index, usize),
    Abandon(prop::sample::Index),
    Deallocate(prop::sample::Index, usize),
}

fn segment_layout() -> impl Strategy<Value = SegmentLayout> {
    let prot = prop::sample::select(vec![MemProt::READ, MemProt::RW, MemProt::RX]);
    let content = prop_oneof![3 => 0u64..200, 3 => 1u64..20_000, 1 => Just(4096u64), 1 => Just(8192u64)];
    let zeros = prop_oneof![3 => Just(0u64), 1 => 0u64..10_000];
    let log2 = prop_oneof![8 => 0u32..5, 1 => 12u32..15, 1 => 5u32..17];
    (prot, content, zeros, log2).prop_map(|(prot, content, zeros, log2)| layout(prot, content, zeros, 1 << log2))
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        4 => prop::collection::vec(segment_layout(), 1..5).prop_map(Op::Allocate),
        3 => (any::<prop::sample::Index>(), 1usize..4).prop_map(|(at, count)| Op::Finalize(at, count)),
        1 => any::<prop::sample::Index>().prop_map(Op::Abandon),
        2 => (any::<prop::sample::Index>(), 1usize..4).prop_map(|(at, count)| Op::Deallocate(at, count)),
    ]
}

/// What an allocation has to look like.
#[derive(Clone, Debug)]
struct Expected {
    /// Range, content bytes, and the byte that all of the content has.
    segments: Vec<(ExecutorAddrRange, u64, u8)>,
    /// Whole pages.
    pages: Vec<ExecutorAddrRange>,
}

fn read(addr: u64) -> u8 {
    // SAFETY: the model reads memory of live allocations, which are readable in every state.
    unsafe { (addr as *const u8).read_volatile() }
}

impl Expected {
    /// Checks content and zeros: ends of everything and some bytes between.
    fn check(&self) -> Result<(), TestCaseError> {
        for &(range, content, byte) in &self.segments {
            let start = range.start().as_u64();
            let ends = [0, 1, content.saturating_sub(1), content, content + 1, range.len().saturating_sub(1)];
            for offset in ends.into_iter().chain((0..range.len()).step_by(1021)).filter(|&at| at < range.len()) {
                prop_assert_eq!(
                    read(start + offset),
                    if offset < content { byte } else { 0 },
                    "{} + {}",
                    range,
                    offset
                );
            }
        }
        Ok(())
    }
}

struct Model {
    manager: MemoryManager,
    is_striped: bool,
    reservation_bytes: u64,
    in_flight: Vec<(InFlightAlloc, Expected)>,
    live: Vec<(FinalizedAlloc, Expected)>,
    next: u8,
}

impl Model {
    fn new(reservation_bytes: u64, is_striped: bool) -> Self {
        let mapper = if is_striped { InProcessMapper::new() } else { InProcessMapper::page_by_page() };
        let manager = MemoryManager::new(Arc::new(mapper), reservation_bytes);
        // Less than this has no stripes.
        let is_striped = is_striped && reservation_bytes >= 1 << 20;
        Self { manager, is_striped, reservation_bytes, in_flight: Vec::new(), live: Vec::new(), next: 0 }
    }

    fn run(&mut self, op: Op) -> Result<(), TestCaseError> {
        match op {
            Op::Allocate(layouts) => self.allocate(&layouts)?,
            Op::Finalize(at, count) if !self.in_flight.is_empty() => {
                let at = at.index(self.in_flight.len());
                let batch: Vec<_> = self.in_flight.drain(at..self.in_flight.len().min(at + count)).collect();
                let (allocs, expected): (Vec<_>, Vec<_>) = batch.into_iter().unzip();
                let allocs = allocs.into_iter().map(|alloc| (alloc, Vec::new())).collect();
                let finalized = self.manager.finalize(allocs).wait().unwrap();
                prop_assert_eq!(finalized.len(), expected.len());
                for (alloc, expected) in finalized.into_iter().zip(expected) {
                    prop_assert_eq!(Some(alloc.key()), expected.segments.iter().map(|segment| segment.0.start()).min());
                    self.live.push((alloc, expected));
                }
            }
            Op::Abandon(at) if !self.in_flight.is_empty() => {
                self.in_flight.swap_remove(at.index(self.in_flight.len())).0.abandon();
            }
            Op::Deallocate(at, count) if !self.live.is_empty() => {
                let at = at.index(self.live.len());
                let gone = self.live.drain(at..self.live.len().min(at + count)).map(|(alloc, _)| alloc).collect();
                self.manager.deallocate(gone).wait().unwrap();
            }
            _ => {}
        }
        self.check()
    }

    fn allocate(&mut self, layouts: &[SegmentLayout]) -> Result<(), TestCaseError> {
        let result = self.manager.allocate(layouts.to_vec()).wait();
        if layouts.iter().all(|layout| layout.content_bytes + layout.zero_fill_bytes == 0) {
            // With alignments that leave a gap there may be an allocation of nothing; it is of no use to the model.
            return Ok(());
        }
        let alloc = result.unwrap();
        prop_assert_eq!(alloc.segments().len(), layouts.len());
        let mut expected = Expected { segments: Vec::new(), pages: Vec::new() };
        for (segment, layout) in alloc.segments().iter().zip(layouts) {
            let AllocatedSegment { group, range, content_bytes, working } = segment;
            let len = layout.content_bytes + layout.zero_fill_bytes;
            prop_assert_eq!((*group, *content_bytes, range.len()), (layout.group, layout.content_bytes, len));
            prop_assert!(range.start().is_aligned(layout.align));
            prop_assert!(self.is_striped || range.start().is_aligned(page_size().align()));
            prop_assert_eq!(working.len(), layout.content_bytes);
            // In stripes, what was code traps until it is overwritten; all else is zero.
            if !self.is_striped || layout.group.prot != MemProt::RX {
                let untouched = Expected { segments: vec![(*range, 0, 0)], pages: Vec::new() };
                untouched.check()?;
            }
            self.next = self.next.wrapping_add(1).max(1);
            working.write(0, &vec![self.next; layout.content_bytes as usize]).unwrap();
            expected.segments.push((*range, *content_bytes, self.next));
            let pages = if self.is_striped { len } else { page_size().round_up(len).unwrap() };
            expected.pages.push(ExecutorAddrRange::from_len(range.start(), pages).unwrap());
        }
        self.in_flight.push((alloc, expected));
        Ok(())
    }

    fn check(&self) -> Result<(), TestCaseError> {
        let all: Vec<_> =
            self.in_flight.iter().map(|(_, expected)| expected).chain(self.live.iter().map(|(_, e)| e)).collect();
        let mut pages: Vec<_> = all.iter().flat_map(|e| &e.pages).filter(|range| !range.is_empty()).collect();
        pages.sort();
        for pair in pages.windows(2) {
            prop_assert!(!pair[0].overlaps(*pair[1]), "{:?}", pair);
        }
        for expected in &all {
            expected.check()?;
        }
        let stats = self.manager.stats();
        let used: u64 = pages.iter().map(|range| range.len()).sum();
        prop_assert_eq!(stats.live_allocations, all.len() as u64);
        prop_assert!(stats.live_bytes >= used, "{:?} {}", stats, used);
        if self.is_striped {
            prop_assert!(stats.live_bytes + stats.free_bytes <= stats.reserved_bytes);
        } else {
            prop_assert_eq!(stats.live_bytes + stats.free_bytes, stats.reserved_bytes);
        }
        let requested: u64 = all.iter().flat_map(|e| &e.segments).map(|segment| segment.0.len()).sum();
        prop_assert_eq!(stats.requested_bytes, requested);
        prop_assert!(stats.largest_free_bytes <= stats.free_bytes);
        prop_assert!(stats.reserved_bytes >= stats.reservations * self.reservation_bytes);
        if all.is_empty() {
            prop_assert_eq!(stats.live_bytes, 0);
            prop_assert!(stats.reservations <= 1, "empty reservations are released but for one");
        }
        Ok(())
    }

    /// Ends everything; all of the reservations has to be in one piece each.
    fn finish(mut self) -> Result<(), TestCaseError> {
        self.in_flight.clear();
        let live = self.live.drain(..).map(|(alloc, _)| alloc).collect();
        self.manager.deallocate(live).wait().unwrap();
        let stats = self.manager.stats();
        prop_assert_eq!((stats.live_allocations, stats.live_bytes, stats.requested_bytes), (0, 0, 0));
        let guards = if self.is_striped { 2 * page_size().bytes() } else { 0 };
        prop_assert_eq!(stats.free_bytes, stats.reserved_bytes - stats.reservations * guards);
        let pieces = if self.is_striped { 4 } else { 1 };
        prop_assert!(stats.largest_free_bytes * stats.reservations * pieces >= stats.reserved_bytes);
        Ok(())
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 100, ..ProptestConfig::default() })]

    /// Over 15,000 random operations: allocations are where and what they have to be, nothing overlaps, content stays
    /// and memory that is allocated again is zero.
    #[test]
    fn behaves_as_the_model(
        ops in prop::collection::vec(op(), 150..250),
        reservation_bytes in prop::sample::select(vec![1u64, 1 << 17, 1 << 20, 1 << 30]),
        is_striped in any::<bool>(),
    ) {
        let mut model = Model::new(reservation_bytes, is_striped && reservation_bytes >= 1 << 20);
        for op in ops {
            model.run(op)?;
        }
        model.finish()?;
    }
}

// ---- Failures.

/// What the mapper is to do.
#[derive(Default)]
struct Plan {
    /// Reserve no more than this.
    most_reserved: Option<u64>,
    /// What reserving more gives; otherwise that there is no address space.
    too_much: Option<Error>,
    reserve: Option<Error>,
    prepare: Option<Error>,
    secure: Option<Error>,
    finalize: Option<Error>,
    /// After deallocating.
    deallocate: Option<Error>,
    fewer_keys: bool,
    less_reserved: bool,
}

/// A mapper that does as `plan` says, and else what an [`InProcessMapper`] does.
struct Failing {
    real: InProcessMapper,
    plan: Mutex<Plan>,
    /// Sizes asked for.
    reserved: Mutex<Vec<u64>>,
    released: Mutex<Vec<ExecutorAddr>>,
    secured: Mutex<Vec<ExecutorAddrRange>>,
}

impl Failing {
    fn new(plan: Plan) -> Self {
        Self {
            real: InProcessMapper::page_by_page(),
            plan: Mutex::new(plan),
            reserved: Mutex::default(),
            released: Mutex::default(),
            secured: Mutex::default(),
        }
    }
}

impl MemoryMapper for Failing {
    fn page_size(&self) -> PageSize {
        self.real.page_size()
    }

    fn reserve(&self, bytes: u64) -> Pending<Result<ExecutorAddrRange, Error>> {
        self.reserved.lock().unwrap().push(bytes);
        let plan = self.plan.lock().unwrap();
        match &plan.reserve {
            Some(error) => Pending::ready(Err(error.clone())),
            None if plan.most_reserved.is_some_and(|most| bytes > most) => {
                Pending::ready(Err(plan.too_much.clone().unwrap_or(Error::OutOfAddressSpace { bytes })))
            }
            None if plan.less_reserved => {
                self.real.reserve(bytes).map(|range| Ok(ExecutorAddrRange::from_len(range?.start(), 1).unwrap()))
            }
            None => self.real.reserve(bytes),
        }
    }

    fn prepare(&self, range: ExecutorAddrRange) -> Result<WorkingMemory, Error> {
        self.plan.lock().unwrap().prepare.clone().map_or_else(|| self.real.prepare(range), Err)
    }

    fn secure(&self, range: ExecutorAddrRange) -> Result<(), Error> {
        self.secured.lock().unwrap().push(range);
        self.plan.lock().unwrap().secure.clone().map_or(Ok(()), Err)
    }

    fn finalize(&self, allocations: Vec<FinalizeRequest>) -> Pending<Result<Vec<ExecutorAddr>, Error>> {
        let plan = self.plan.lock().unwrap();
        match &plan.finalize {
            Some(error) => Pending::ready(Err(error.clone())),
            None if plan.fewer_keys => Pending::ready(Ok(Vec::new())),
            // Not ready before it is waited for, as with an executor of its own.
            None => {
                let result = self.real.finalize(allocations).wait();
                let (completer, pending) = Pending::channel(|| ());
                completer.complete(());
                pending.map(move |()| result)
            }
        }
    }

    fn deallocate(&self, keys: Vec<ExecutorAddr>) -> Pending<Result<(), Error>> {
        match &self.plan.lock().unwrap().deallocate {
            Some(error) if matches!(error, Error::Call(_)) => Pending::ready(Err(error.clone())),
            error => {
                let error = error.clone();
                self.real.deallocate(keys).map(|result| result.and(error.map_or(Ok(()), Err)))
            }
        }
    }

    fn release(&self, bases: Vec<ExecutorAddr>) -> Pending<Result<(), Error>> {
        self.released.lock().unwrap().extend(&bases);
        self.real.release(bases)
    }
}

const GIB: u64 = 1 << 30;

fn failing(plan: Plan) -> (Arc<Failing>, MemoryManager) {
    let mapper = Arc::new(Failing::new(plan));
    let manager = MemoryManager::new(Arc::clone(&mapper) as Arc<dyn MemoryMapper>, GIB);
    (mapper, manager)
}

fn disconnected() -> Error {
    Error::Call(CallError::Disconnected(Disconnected::Eof))
}

fn live(manager: &MemoryManager) -> (u64, u64) {
    let stats = manager.stats();
    (stats.live_allocations, stats.live_bytes)
}

fn one(manager: &MemoryManager) -> InFlightAlloc {
    manager.allocate(rw(1)).wait().unwrap()
}

fn finalized(manager: &MemoryManager) -> FinalizedAlloc {
    manager.finalize(vec![(one(manager), Vec::new())]).wait().unwrap().pop().unwrap()
}

/// When finalizing fails, or preparing, or securing the zeros, the memory is free again.
#[test]
fn what_fails_is_free_again() {
    let refused = || Some(Error::Refused { what: "x", text: String::new() });
    let (_, manager) = failing(Plan { finalize: refused(), ..Plan::default() });
    assert!(manager.finalize(vec![(one(&manager), vec![]), (one(&manager), vec![])]).wait().is_err());
    assert_eq!(live(&manager), (0, 0));

    for plan in [Plan { prepare: refused(), ..Plan::default() }, Plan { secure: refused(), ..Plan::default() }] {
        let (_, manager) = failing(plan);
        assert!(manager.allocate(vec![layout(MemProt::RW, 10, 10, 1)]).wait().is_err());
        assert_eq!(live(&manager), (0, 0));
        assert_eq!(manager.stats().reservations, 1);
    }
}

/// When it is unknown what the executor did, memory is not given to anybody else.
#[test]
fn what_is_unknown_stays_taken() {
    let page = page_size().bytes();
    for plan in [
        Plan { finalize: Some(disconnected()), ..Plan::default() },
        Plan { finalize: Some(Error::BadAnswer { what: "x", text: String::new() }), ..Plan::default() },
        Plan { fewer_keys: true, ..Plan::default() },
    ] {
        let (_, manager) = failing(plan);
        assert!(manager.finalize(vec![(one(&manager), vec![])]).wait().is_err());
        assert_eq!(live(&manager), (1, page));
    }
    let (_, manager) = failing(Plan { deallocate: Some(disconnected()), ..Plan::default() });
    let alloc = finalized(&manager);
    assert!(manager.deallocate(vec![alloc]).wait().unwrap_err().is_disconnected());
    assert_eq!(live(&manager), (1, page));

    // A request that was never sent has done nothing.
    let unsent = Error::Call(CallError::TooLarge { bytes: 1 << 40 });
    let (_, manager) = failing(Plan { finalize: Some(unsent), ..Plan::default() });
    assert!(manager.finalize(vec![(one(&manager), vec![])]).wait().is_err());
    assert_eq!(live(&manager), (0, 0));
}

/// An outcome that nobody waits for is an outcome still: what was finalized is not allocated again.
#[test]
fn a_dropped_result_frees_nothing() {
    let (_, manager) = failing(Plan::default());
    drop(manager.finalize(vec![(one(&manager), vec![])]));
    assert_eq!(live(&manager).0, 1);
    let second = finalized(&manager);
    manager.deallocate(vec![second]).wait().unwrap();
    assert_eq!(live(&manager).0, 1);
}

/// Memory whose dealloc actions fail is free all the same.
#[test]
fn failed_actions_still_free() {
    let (_, manager) = failing(Plan { deallocate: Some(Error::Actions("no".into())), ..Plan::default() });
    let alloc = finalized(&manager);
    assert!(matches!(manager.deallocate(vec![alloc]).wait(), Err(Error::Actions(_))));
    assert_eq!(live(&manager), (0, 0));
}

/// A reservation that is refused is halved down to what is needed and no further.
#[test]
fn reservations_are_halved() {
    let mib = 1 << 20;
    let text = String::new;
    // The executor, and this process's own limit of address space, which shared memory needs on both sides.
    let too_much = [
        Some(Error::Refused { what: "reserve", text: text() }),
        Some(Error::SharedMemory { name: text(), what: "mapped", text: text() }),
        None,
    ];
    let managers = too_much.map(|too_much| {
        let (mapper, manager) = failing(Plan { most_reserved: Some(5 * mib), too_much, ..Plan::default() });
        drop(manager.allocate(rw(3 * mib)).wait().unwrap());
        let sizes = std::mem::take(&mut *mapper.reserved.lock().unwrap());
        assert_eq!(sizes, (0..9).map(|n| GIB >> n).collect::<Vec<_>>());
        (mapper, manager)
    });
    let [.., (mapper, manager)] = managers;

    assert!(
        matches!(manager.allocate(rw(6 * mib)).wait(), Err(Error::OutOfAddressSpace { bytes }) if bytes == 6 * mib)
    );
    let sizes = std::mem::take(&mut *mapper.reserved.lock().unwrap());
    assert_eq!(sizes, (0..9).map(|n| (GIB >> n).max(6 * mib)).collect::<Vec<_>>());

    // What a smaller size does not help is not tried again.
    mapper.plan.lock().unwrap().reserve = Some(disconnected());
    assert!(manager.allocate(rw(6 * mib)).wait().is_err_and(|error| error.is_disconnected()));
    assert_eq!(mapper.reserved.lock().unwrap().len(), 1);
}

/// A mapper that reserves less than it was asked for is an error, not an endless loop, and what it gave goes back.
#[test]
fn reservations_that_are_too_small() {
    let (mapper, manager) = failing(Plan { less_reserved: true, ..Plan::default() });
    assert!(matches!(manager.allocate(rw(10)).wait(), Err(Error::BadAnswer { .. })));
    assert_eq!((mapper.released.lock().unwrap().len(), manager.stats().reservations), (1, 0));
}

/// Sizes and alignments that cannot be are refused before anything is reserved.
#[test]
fn impossible_requests_are_refused() {
    let (mapper, manager) = failing(Plan::default());
    let max = u64::MAX;
    for layouts in [
        vec![],
        rw(0),
        vec![layout(MemProt::RW, 0, 0, 1), layout(MemProt::RX, 0, 0, 16)],
        rw(max),
        vec![layout(MemProt::RW, max, max, 1)],
        vec![layout(MemProt::RW, 1, max, 1)],
        vec![layout(MemProt::RW, max - 4094, 0, 1)],
        vec![layout(MemProt::RW, 1 << 63, 0, 1), layout(MemProt::RX, 1 << 63, 0, 1)],
        vec![layout(MemProt::RW, max - 4096, 0, 1), layout(MemProt::RW, 1, 0, 2 << 20)],
    ] {
        let text = format!("{layouts:?}");
        assert!(matches!(manager.allocate(layouts).wait(), Err(Error::BadSize { .. })), "{text}");
    }
    for align in [4 << 20, 1 << 63] {
        let layouts = vec![layout(MemProt::RW, 1, 0, align)];
        assert!(matches!(manager.allocate(layouts).wait(), Err(Error::Alignment(bytes)) if bytes == align));
    }
    assert!(mapper.reserved.lock().unwrap().is_empty());
    // These can be counted, but no system has them.
    for bytes in [1 << 60, 1 << 63] {
        assert!(manager.allocate(rw(bytes)).wait().is_err());
    }
    assert_eq!(manager.stats().reservations, 0);
    let alloc = manager.allocate(vec![layout(MemProt::RW, 1, 0, 2 << 20)]).wait().unwrap();
    assert_eq!(alloc.segments()[0].range.start().as_u64() % (2 << 20), 0);
}

/// Zeros that have no content are made sure of as content is, in the executor's memory.
#[test]
fn zeros_are_secured() {
    let (mapper, manager) = failing(Plan::default());
    let segments = vec![layout(MemProt::RX, 10, 0, 1), layout(MemProt::RW, 10, 9000, 1)];
    let alloc = manager.allocate(segments).wait().unwrap();
    let zeros = alloc.segments()[1].range;
    let zeros = ExecutorAddrRange::new(zeros.start().checked_add(10).unwrap(), zeros.end()).unwrap();
    assert_eq!(*mapper.secured.lock().unwrap(), [zeros]);
}

/// An allocation is not freed in a manager that it is not from.
#[test]
fn allocations_of_another_manager() {
    let ((_, first), (_, second)) = (failing(Plan::default()), failing(Plan::default()));
    let (foreign, own) = (finalized(&first), finalized(&second));
    // Nothing of such a request is done, so its own part is not free either.
    assert!(matches!(second.deallocate(vec![foreign, own]).wait(), Err(Error::UnknownAllocation(_))));
    assert_eq!((live(&first).0, live(&second).0), (1, 1));
    assert!(matches!(second.deallocate(vec![finalized(&first)]).wait(), Err(Error::UnknownAllocation(_))));
    assert_eq!((live(&first).0, live(&second).0), (2, 1));
}

/// Large data is zero when it is allocated again, whether its pages were kept or given back; of much that has become free only
/// a little keeps its pages.
#[test]
fn large_data_comes_back_as_zeros() {
    const MIB: u64 = 1 << 20;
    let manager = MemoryManager::new(Arc::new(InProcessMapper::new()), 1 << 30);
    let committed = || manager.usage().wait().unwrap().committed_bytes;
    let place = |bytes: u64| {
        let alloc = manager.allocate(rw(bytes)).wait().unwrap();
        let (working, mut found) = (&alloc.segments()[0].working, vec![1; bytes as usize]);
        working.read(0, &mut found).unwrap();
        assert!(found.iter().all(|&byte| byte == 0), "{bytes}");
        working.write(0, &vec![0x55; bytes as usize]).unwrap();
        manager.finalize(vec![(alloc, Vec::new())]).wait().unwrap()
    };
    let kept = place(64);
    let before = committed();
    for bytes in [100 << 10, MIB, 3 * MIB + 100, 5 * MIB] {
        for _ in 0..2 {
            manager.deallocate(place(bytes)).wait().unwrap();
        }
    }
    let many: Vec<_> = (0..64).flat_map(|_| place(MIB)).collect();
    assert!(committed() >= before + 64 * MIB);
    many.into_iter().for_each(|alloc| manager.deallocate(vec![alloc]).wait().unwrap());
    manager.trim();
    assert!(committed() < before + MIB, "{} bytes", committed() - before);
    manager.deallocate(place(MIB)).wait().unwrap();
    manager.deallocate(kept).wait().unwrap();
}

/// Data that became free keeps its pages while it is taken again and again, and nobody has to ask for what is not: it goes
/// back by itself, while a little stays.
#[test]
fn what_is_not_taken_again_goes_back() {
    const MIB: u64 = 1 << 20;
    let manager = MemoryManager::new(Arc::new(InProcessMapper::new()), 1 << 30);
    let committed = || manager.usage().wait().unwrap().committed_bytes;
    let fill = |count: u64| -> Vec<_> {
        let place = |_| {
            let alloc = manager.allocate(rw(MIB)).wait().unwrap();
            alloc.segments()[0].working.write(0, &[0x55; MIB as usize]).unwrap();
            manager.finalize(vec![(alloc, Vec::new())]).wait().unwrap().pop().unwrap()
        };
        (0..count).map(place).collect()
    };
    let free = |allocs: Vec<_>| manager.deallocate(allocs).wait().unwrap();
    let little = fill(1);
    free(fill(4));
    free(fill(64));
    let full = committed();
    assert!(full >= 65 * MIB, "{full}");
    // Long enough for several looks, with half of it in use at some time between two of them.
    let (start, mut used) = (Instant::now(), Instant::now());
    while start.elapsed() < Duration::from_millis(2500) {
        let kept = committed();
        assert!(kept >= 65 * MIB || used.elapsed() > Duration::from_secs(1), "{kept}");
        free(fill(60));
        used = Instant::now();
        std::thread::sleep(Duration::from_millis(100));
    }
    while committed() > 2 * MIB {
        assert!(start.elapsed() < Duration::from_secs(60), "{} bytes", committed());
        std::thread::sleep(Duration::from_millis(50));
    }
    free(little);
}

/// A dropped manager releases its reservations, once no allocation is in flight.
#[test]
fn dropping_releases() {
    let (mapper, manager) = failing(Plan::default());
    let (in_flight, finalized) = (one(&manager), finalized(&manager));
    drop(manager);
    assert!(mapper.released.lock().unwrap().is_empty());
    let reservation = in_flight.segments()[0].range;
    drop(in_flight);
    assert_eq!(mapper.released.lock().unwrap().len(), 1);
    assert!(mapper.real.prepare(reservation).is_err());
    drop(finalized);
}

/// Threads that allocate at once get ranges of their own, and all of them come back.
#[test]
fn threads_share_a_manager() {
    let manager = MemoryManager::new(Arc::new(InProcessMapper::new()), 1 << 16);
    std::thread::scope(|scope| {
        for byte in 1..5 {
            let manager = &manager;
            scope.spawn(move || {
                for round in 0..50 {
                    let alloc = manager.allocate(rw(1 + round * 100)).wait().unwrap();
                    let segment = alloc.segments()[0].clone();
                    segment.working.write(0, &vec![byte; segment.content_bytes as usize]).unwrap();
                    let alloc = manager.finalize(vec![(alloc, vec![])]).wait().unwrap();
                    let start = segment.range.start().as_u64();
                    assert!((0..segment.range.len()).all(|offset| read(start + offset) == byte));
                    manager.deallocate(alloc).wait().unwrap();
                }
            });
        }
    });
    assert_eq!(live(&manager), (0, 0));
}

/// One reservation is enough for any alignment, wherever the system puts it.
#[test]
fn reservations_have_room_to_align() {
    for log2 in 13..=21 {
        let manager = MemoryManager::new(Arc::new(InProcessMapper::page_by_page()), 1);
        let alloc = manager.allocate(vec![layout(MemProt::RW, 1, 0, 1 << log2)]).wait().unwrap();
        assert!(alloc.segments()[0].range.start().is_aligned(Align::new(1 << log2).unwrap()));
        assert_eq!(manager.stats().reservations, 1, "{log2}");
    }
}

/// Reserves at an address whose low 32 bits are zero, in stripes if asked to.
struct Aligned {
    is_striped: bool,
}

impl MemoryMapper for Aligned {
    fn page_size(&self) -> PageSize {
        page_size()
    }

    fn reserve(&self, bytes: u64) -> Pending<Result<ExecutorAddrRange, Error>> {
        Pending::ready(Ok(ExecutorAddrRange::from_len(ExecutorAddr::new(0x7f_0000_0000), bytes).unwrap()))
    }

    fn prepare(&self, range: ExecutorAddrRange) -> Result<WorkingMemory, Error> {
        WorkingMemory::in_heap(range.len())
    }

    fn stripes(&self, base: ExecutorAddr) -> Vec<(MemProt, ExecutorAddrRange)> {
        let stripe = |prot, at, len| (prot, ExecutorAddrRange::from_len(base.checked_add(at).unwrap(), len).unwrap());
        let stripes = [stripe(MemProt::RX, 0, 1 << 20), stripe(MemProt::RW, 2 << 20, 1 << 20)];
        if self.is_striped { stripes.to_vec() } else { Vec::new() }
    }

    fn finalize(&self, allocations: Vec<FinalizeRequest>) -> Pending<Result<Vec<ExecutorAddr>, Error>> {
        Pending::ready(Ok(allocations.iter().map(|request| request.segments[0].range.start()).collect()))
    }

    fn deallocate(&self, _keys: Vec<ExecutorAddr>) -> Pending<Result<(), Error>> {
        Pending::ready(Ok(()))
    }

    fn release(&self, _bases: Vec<ExecutorAddr>) -> Pending<Result<(), Error>> {
        Pending::ready(Ok(()))
    }
}

/// No code is where the low 32 bits of an address are zero, which libgcc takes for a function that was removed; data may
/// be, and nothing is lost.
#[test]
fn no_code_where_unwinders_do_not_look() {
    for is_striped in [false, true] {
        let manager = MemoryManager::new(Arc::new(Aligned { is_striped }), 4 << 20);
        let mut live = Vec::new();
        for _ in 0..20 {
            let alloc = manager.allocate(vec![layout(MemProt::RX, 100, 0, 16)]).wait().unwrap();
            let range = alloc.segments()[0].range;
            assert!(!range.contains(ExecutorAddr::new(0x7f_0000_0000)), "{range}");
            live.push(alloc);
        }
        let data = manager.allocate(rw(100)).wait().unwrap();
        assert_eq!(
            data.segments()[0].range.start(),
            ExecutorAddr::new(0x7f_0000_0000 + u64::from(is_striped) * (2 << 20))
        );
        drop((live, data));
        assert_eq!(manager.stats().live_bytes, 0);
    }
}

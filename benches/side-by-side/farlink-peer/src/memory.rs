//! Workloads W5 and W6: executor memory without a linker. Allocation, content, finalizing and giving back, alone and
//! beside live allocations, and many bytes at once.

use crate::observe::{Counters, MemoryOfBoth, check, rate, since};
use crate::report::Report;
use crate::{Args, Config, Result};
use farlink::DEFAULT_RESERVATION_BYTES;
use farlink::addr::{Align, AllocGroup, ExecutorAddr, ExecutorAddrRange, MemProt};
use farlink::mem::{FinalizedAlloc, InProcessMapper, MemoryManager, MemoryMapper, SegmentLayout, SharedMemoryMapper};
use farlink::rpc::{Endpoint, Executor, Handler, Options, Transport, connect};
use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::process::{Child, Command};
use std::sync::Arc;
use std::time::Instant;

/// Bytes of a page of content.
const PAGE: usize = 4096;

struct NoCallbacks;

impl Handler for NoCallbacks {
    fn call(&self, _function: ExecutorAddr, _args: Vec<u8>) -> std::result::Result<Vec<u8>, String> {
        Err("no callbacks".to_owned())
    }
}

/// A memory manager, and the other process if there is one.
struct Subject {
    manager: MemoryManager,
    peer: Option<Peer>,
}

struct Peer {
    child: Child,
    endpoint: Endpoint,
    executor: Executor,
}

impl Drop for Subject {
    fn drop(&mut self) {
        if let Some(peer) = &mut self.peer {
            peer.endpoint.hang_up(Ok(()));
            let _ = peer.child.wait();
        }
    }
}

impl Subject {
    fn new(args: &Args) -> Result<Self> {
        let manager = |mapper: Arc<dyn MemoryMapper>| MemoryManager::new(mapper, DEFAULT_RESERVATION_BYTES);
        if args.config == Config::Inproc {
            return Ok(Self { manager: manager(Arc::new(InProcessMapper::new())), peer: None });
        }
        let (ours, theirs) = UnixStream::pair()?;
        rustix::io::fcntl_setfd(&theirs, rustix::io::FdFlags::empty())?;
        let number = theirs.as_raw_fd();
        let child =
            Command::new(&args.executor).args([&format!("filedescs={number},{number}"), "--farlink"]).spawn()?;
        drop(theirs);
        let transport = Transport::from_socket(ours.into())?;
        let (endpoint, info) = connect(transport, Arc::new(NoCallbacks), Options::default())?;
        let executor = Executor::new(info, Arc::new(endpoint.clone()))?;
        let mapper = match args.config {
            Config::Posix => SharedMemoryMapper::posix(&executor)?,
            _ => SharedMemoryMapper::new(&executor)?,
        };
        Ok(Self { manager: manager(Arc::new(mapper)), peer: Some(Peer { child, endpoint, executor }) })
    }

    fn executor_id(&self) -> Option<u32> {
        self.peer.as_ref().map(|peer| peer.child.id())
    }

    fn counters(&self) -> Result<Counters> {
        let calls = self.peer.as_ref().map(|peer| peer.executor.calls()).unwrap_or_default();
        Counters::with_calls(calls, self.executor_id())
    }

    /// Allocates a segment for each protection, fills them, and finalizes; the times of the three.
    fn place(&self, prots: &[MemProt], content: &[u8]) -> Result<(FinalizedAlloc, [f64; 3])> {
        let layout = |&prot| SegmentLayout {
            group: AllocGroup::standard(prot),
            content_bytes: content.len() as u64,
            zero_fill_bytes: 0,
            align: Align::new(16).expect("16 is a power of two"),
        };
        let start = Instant::now();
        let alloc = self.manager.allocate(prots.iter().map(layout).collect()).wait()?;
        let allocated = since(start);
        for segment in alloc.segments() {
            segment.working.write(0, content)?;
        }
        let filled = since(start);
        let mut finalized = self.manager.finalize(vec![(alloc, Vec::new())]).wait()?;
        let done = since(start);
        let alloc = finalized.pop().ok_or("nothing was finalized")?;
        Ok((alloc, [allocated, filled - allocated, done - filled]))
    }

    fn end(&self, alloc: FinalizedAlloc) -> Result<f64> {
        let start = Instant::now();
        self.manager.deallocate(vec![alloc]).wait()?;
        Ok(since(start))
    }

    /// Reads memory of the executor's process, as the kernel sees it.
    fn check_content(&self, range: ExecutorAddrRange, content: &[u8]) -> Result<()> {
        let process = self.executor_id().unwrap_or(std::process::id());
        let mut bytes = vec![0; content.len()];
        File::open(format!("/proc/{process}/mem"))?.read_exact_at(&mut bytes, range.start().as_u64())?;
        check("content in the executor", &(bytes == content), &true)
    }

    /// Times `count` cycles with `content` in code and in data: the whole, and its four parts.
    fn cycles(&self, count: usize, content: &[u8]) -> Result<[Vec<f64>; 5]> {
        let mut times: [Vec<f64>; 5] = Default::default();
        for round in 0..count {
            let (alloc, [allocate, fill, finalize]) = self.place(&[MemProt::RX, MemProt::RW], content)?;
            if round % 128 == 0 {
                for (_, range) in alloc.segments() {
                    self.check_content(range, content)?;
                }
            }
            let end = self.end(alloc)?;
            let parts = [allocate + fill + finalize + end, allocate, fill, finalize, end];
            times.iter_mut().zip(parts).for_each(|(times, part)| times.push(part));
        }
        Ok(times)
    }
}

fn content(bytes: usize) -> Vec<u8> {
    (0..bytes).map(|at| (at * 31 + (at >> 8) + 1) as u8).collect()
}

/// W5: 4 KiB of code and 4 KiB of data, nothing else live.
pub(crate) fn cycle(args: &Args, report: &Report) -> Result<()> {
    let subject = Subject::new(args)?;
    let (count, content) = (args.n(5000), content(PAGE));
    subject.cycles(1, &content)?;
    let counters = subject.counters()?;
    let times = subject.cycles(count, &content)?;
    subject.counters()?.report_since(&counters, report, "W5", "cycle", count);
    for (metric, times) in ["cycle", "alloc", "fill", "finalize", "dealloc"].into_iter().zip(&times) {
        report.times("W5", metric, times);
    }
    Ok(())
}

/// The same beside as many live allocations of the same sizes, and among holes.
pub(crate) fn cycle_beside_live(args: &Args, report: &Report) -> Result<()> {
    let subject = Subject::new(args)?;
    let (count, page, prots) = (args.n(300), content(PAGE), [MemProt::RX, MemProt::RW]);
    let before = MemoryOfBoth::now(subject.executor_id())?;
    let mut live = Vec::new();
    for target in [100, 1000, 10_000] {
        while live.len() < target {
            live.push(Some(subject.place(&prots, &page)?.0));
        }
        report.times("W5", &format!("live{target}_cycle"), &subject.cycles(count, &page)?[0]);
    }
    MemoryOfBoth::now(subject.executor_id())?.report_since(before, report, "W5", "live10k_", live.len());
    let every_other = live.iter_mut().step_by(2).filter_map(Option::take);
    let times = every_other.map(|alloc| subject.end(alloc)).collect::<Result<Vec<_>>>()?;
    report.times("W5", "dealloc_at_10k_live", &times);
    report.times("W5", "holes5k_16KiB_cycle", &subject.cycles(count, &content(2 * PAGE))?[0]);
    let start = Instant::now();
    subject.manager.deallocate(live.into_iter().flatten().collect()).wait()?;
    report.times("W5", "dealloc_5k_in_one_call", &[since(start)]);
    Ok(())
}

/// The same beside a million live allocations of 64 bytes of code and 64 bytes of data.
pub(crate) fn cycle_beside_a_million(args: &Args, report: &Report) -> Result<()> {
    let subject = Subject::new(args)?;
    let (small, page) = (content(64), content(PAGE));
    let place = |_| subject.place(&[MemProt::RX, MemProt::RW], &small).map(|(alloc, _)| alloc);
    let live = (0..args.n(1_000_000)).map(place).collect::<Result<Vec<_>>>()?;
    report.times("W5", &format!("live{}_cycle", live.len()), &subject.cycles(3000, &page)?[0]);
    let start = Instant::now();
    let count = live.len();
    subject.manager.deallocate(live).wait()?;
    report.times("W5", &format!("live{count}_dealloc_all"), &[since(start)]);
    Ok(())
}

/// W6: 256 MiB in segments of 1 MiB, into memory that nobody has used, and again.
pub(crate) fn bulk(args: &Args, report: &Report) -> Result<()> {
    const SEGMENT: usize = 1 << 20;
    let source = noise(256 * SEGMENT);
    let subject = Subject::new(args)?;
    for round in 0..args.iters(3) {
        let mut live = Vec::new();
        let start = Instant::now();
        for segment in source.chunks_exact(SEGMENT) {
            live.push(subject.place(&[MemProt::RW], segment)?.0);
        }
        let rate = rate(source.len(), start);
        report.samples("W6", if round == 0 { "first_256MiB_rate" } else { "again_256MiB_rate" }, "MB/s", &[rate]);
        for (alloc, segment) in live.iter().zip(source.chunks_exact(SEGMENT)) {
            check_one(&subject, alloc, segment)?;
        }
        let times = live.into_iter().map(|alloc| subject.end(alloc)).collect::<Result<Vec<_>>>()?;
        report.times("W6", "dealloc_1MiB", &times);
    }
    Ok(())
}

fn check_one(subject: &Subject, alloc: &FinalizedAlloc, content: &[u8]) -> Result<()> {
    let (_, range) = alloc.segments().first().copied().ok_or("an allocation without segments")?;
    subject.check_content(range, content)
}

/// Bytes without a pattern, the same for every peer.
fn noise(bytes: usize) -> Vec<u8> {
    let mut state = 88_172_645_463_325_252_u64;
    let mut next = || {
        // The generator xorshift64.
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    };
    (0..bytes / 8).flat_map(|_| next()).collect()
}

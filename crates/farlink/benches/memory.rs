//! Executor memory: allocate, write, finalize and deallocate, while other allocations are live.
//!
//! `cargo bench -p farlink --bench memory`. A second process is a copy of this program.

#![allow(clippy::unwrap_used, reason = "a measurement that cannot go on panics")]

use divan::Bencher;
use divan::counter::BytesCount;
use farlink::addr::{Align, AllocGroup, MemProt};
use farlink::mem::{
    FinalizedAlloc, InProcessMapper, MemoryManager, MemoryMapper, RemoteMapper, SegmentLayout, SharedMemoryMapper,
};
use farlink::rpc::{Endpoint, Executor, Handler, Options, Transport, connect};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, ExitCode};
use std::sync::Arc;

const RESERVATION: u64 = 1 << 30;

fn main() -> ExitCode {
    let args: Vec<_> = std::env::args_os().collect();
    if args.iter().any(|arg| arg.to_string_lossy().starts_with("filedescs=")) {
        return farlink::executor::main_with_args(args.into_iter().skip(1));
    }
    divan::main();
    ExitCode::SUCCESS
}

struct NoCallbacks;

impl Handler for NoCallbacks {
    fn call(&self, _function: farlink::addr::ExecutorAddr, _args: Vec<u8>) -> Result<Vec<u8>, String> {
        Err("no callbacks".to_owned())
    }
}

/// A manager, and the other process if there is one.
struct Subject {
    manager: MemoryManager,
    _peer: Option<(Child, Endpoint)>,
}

impl Drop for Subject {
    fn drop(&mut self) {
        if let Some((child, endpoint)) = &mut self._peer {
            endpoint.hang_up(Ok(()));
            let _ = child.wait();
        }
    }
}

#[derive(Clone, Copy, Debug)]
enum Kind {
    InProcess,
    Shared,
    PageByPage,
    Posix,
    Remote,
}

impl Subject {
    fn new(kind: Kind) -> Self {
        let manager = |mapper: Arc<dyn MemoryMapper>| MemoryManager::new(mapper, RESERVATION);
        if matches!(kind, Kind::InProcess) {
            return Self { manager: manager(Arc::new(InProcessMapper::new())), _peer: None };
        }
        let (ours, theirs) = UnixStream::pair().unwrap();
        rustix::io::fcntl_setfd(&theirs, rustix::io::FdFlags::empty()).unwrap();
        let number = theirs.as_raw_fd();
        let child = Command::new(std::env::current_exe().unwrap())
            .args([&format!("filedescs={number},{number}"), "--farlink"])
            .spawn()
            .unwrap();
        drop(theirs);
        let transport = Transport::from_socket(ours.into()).unwrap();
        let (endpoint, info) = connect(transport, Arc::new(NoCallbacks), Options::default()).unwrap();
        let executor = Executor::new(info, Arc::new(endpoint.clone())).unwrap();
        let mapper: Arc<dyn MemoryMapper> = match kind {
            Kind::PageByPage => Arc::new(SharedMemoryMapper::page_by_page(&executor).unwrap()),
            Kind::Posix => Arc::new(SharedMemoryMapper::posix(&executor).unwrap()),
            Kind::Remote => Arc::new(RemoteMapper::new(&executor).unwrap()),
            _ => Arc::new(SharedMemoryMapper::new(&executor).unwrap()),
        };
        Self { manager: manager(mapper), _peer: Some((child, endpoint)) }
    }

    /// Makes one allocation: code and data of so many bytes each.
    fn place(&self, content: &[u8]) -> FinalizedAlloc {
        let layout = |prot| SegmentLayout {
            group: AllocGroup::standard(prot),
            content_bytes: content.len() as u64,
            zero_fill_bytes: 0,
            align: Align::new(16).unwrap(),
        };
        let alloc = self.manager.allocate(vec![layout(MemProt::RX), layout(MemProt::RW)]).wait().unwrap();
        for segment in alloc.segments() {
            segment.working.write(0, content).unwrap();
        }
        self.manager.finalize(vec![(alloc, Vec::new())]).wait().unwrap().remove(0)
    }

    fn end(&self, alloc: FinalizedAlloc) {
        self.manager.deallocate(vec![alloc]).wait().unwrap();
    }
}

/// Numbers without a pattern, the same in every run.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: usize) -> usize {
        // The generator xorshift64.
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % bound as u64) as usize
    }
}

/// Replaces one of `live` tiny allocations, any, by a new one of `bytes` and `bytes`, and that by a tiny one.
fn churn(bencher: Bencher<'_, '_>, kind: Kind, live: usize, bytes: usize) {
    let subject = Subject::new(kind);
    let mut allocs: Vec<_> = (0..live).map(|_| subject.place(&[0x90; 64])).collect();
    let (content, mut random) = (vec![0x90; bytes], Random(0x9e37_79b9_7f4a_7c15));
    // Holes of all places, before the clock runs.
    for _ in 0..live.min(100_000) {
        let at = random.below(live);
        let fresh = subject.place(&[0x90; 64]);
        subject.end(std::mem::replace(&mut allocs[at], fresh));
    }
    bencher.bench_local(|| {
        let at = random.below(live);
        let fresh = subject.place(&content);
        subject.end(std::mem::replace(&mut allocs[at], fresh));
    });
    subject.manager.deallocate(allocs).wait().unwrap();
}

#[divan::bench(args = [100, 10_000, 1_000_000], sample_count = 200, sample_size = 100)]
fn tiny_in_process(bencher: Bencher<'_, '_>, live: usize) {
    churn(bencher, Kind::InProcess, live, 64);
}

#[divan::bench(args = [100, 10_000, 1_000_000], sample_count = 200, sample_size = 100)]
fn tiny_shared(bencher: Bencher<'_, '_>, live: usize) {
    churn(bencher, Kind::Shared, live, 64);
}

/// Allocates, writes, finalizes and ends 4 KiB of code and 4 KiB of data beside `live` tiny allocations.
fn pages(bencher: Bencher<'_, '_>, kind: Kind, live: usize) {
    let subject = Subject::new(kind);
    let allocs: Vec<_> = (0..live).map(|_| subject.place(&[0x90; 64])).collect();
    let content = vec![0x90; 4096];
    bencher.bench_local(|| subject.end(subject.place(&content)));
    subject.manager.deallocate(allocs).wait().unwrap();
}

#[divan::bench(args = [100, 10_000, 1_000_000], sample_count = 200, sample_size = 100)]
fn pages_in_process(bencher: Bencher<'_, '_>, live: usize) {
    pages(bencher, Kind::InProcess, live);
}

#[divan::bench(args = [100, 10_000, 1_000_000], sample_count = 200, sample_size = 100)]
fn pages_shared(bencher: Bencher<'_, '_>, live: usize) {
    pages(bencher, Kind::Shared, live);
}

/// Allocates, writes, finalizes and ends 1 MiB of data, as a program does that replaces large data.
#[divan::bench(args = [Kind::InProcess, Kind::Shared, Kind::Posix], sample_count = 200, sample_size = 10)]
fn large_data(bencher: Bencher<'_, '_>, kind: Kind) {
    let subject = Subject::new(kind);
    let (content, kept) = (vec![0x90; 1 << 20], subject.place(&[0x90; 64]));
    let layout = SegmentLayout {
        group: AllocGroup::standard(MemProt::RW),
        content_bytes: content.len() as u64,
        zero_fill_bytes: 0,
        align: Align::new(16).unwrap(),
    };
    bencher.counter(BytesCount::new(content.len())).bench_local(|| {
        let alloc = subject.manager.allocate(vec![layout]).wait().unwrap();
        alloc.segments()[0].working.write(0, &content).unwrap();
        let alloc = subject.manager.finalize(vec![(alloc, Vec::new())]).wait().unwrap().remove(0);
        subject.end(alloc);
    });
    subject.end(kept);
}

/// The other ways, which call the executor for each allocation.
#[divan::bench(args = [Kind::PageByPage, Kind::Posix, Kind::Remote], sample_count = 100, sample_size = 10)]
fn pages_with_calls(bencher: Bencher<'_, '_>, kind: Kind) {
    pages(bencher, kind, 100);
}

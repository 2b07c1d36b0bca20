//! Every system call of the memory layer fails once, in the controller and in the executor, and either process is killed
//! before every one of them: what is going on ends with an error or well, what comes after works as long as both live,
//! and nothing is left.
//!
//! This program is its own controller and executor too: it starts itself again as one of them.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on panics")]

mod common;

use common::{DEADLINE, NoCallbacks, names_of, wait};
use farlink_addr::{Align, AllocGroup, ExecutorAddr, MemProt};
use farlink_mem::fault::{self, Fault};
use farlink_mem::{
    Error, FinalizedAlloc, InProcessMapper, MemoryManager, MemoryMapper, RemoteMapper, SegmentLayout,
    SharedMemoryMapper,
};
use farlink_rpc::{Executor, Options, Transport, connect};
use farlink_wire::functions::RUN_EXITS;
use farlink_wire::msg::{ActionPair, WrapperFunctionCall};
use rustix::process::{Pid, WaitOptions, getpid, set_child_subreaper, waitpid};
use std::collections::BTreeSet;
use std::fs;
use std::io::{BufRead, BufReader};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::thread;
use std::time::Instant;

/// Tells a copy of this program what it is: `executor FD` or `controller MAPPER`, then `FAULT NTH`.
const ROLE: &str = "FARLINK_FAULTS_ROLE";

const RESERVATION: u64 = 1 << 20;

const MAPPERS: [&str; 5] = ["striped", "paged", "posix", "posix-paged", "remote"];

fn role() -> Option<Vec<String>> {
    Some(std::env::var(ROLE).ok()?.split(' ').map(str::to_owned).collect())
}

fn arm(fault: &str, nth: &str) {
    match fault {
        "fail" => fault::arm(nth.parse().unwrap(), Fault::Fail),
        "kill" => fault::arm(nth.parse().unwrap(), Fault::Kill),
        _ => {}
    }
}

/// Starts this program again in a role.
fn start(role: &str, inherited: Option<&UnixStream>) -> Child {
    if let Some(socket) = inherited {
        rustix::io::fcntl_setfd(socket, rustix::io::FdFlags::empty()).unwrap();
    }
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "role_of_a_copy", "--nocapture"]).env(ROLE, role);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap()
}

/// Not a test by itself: what a copy of this program does.
#[test]
fn role_of_a_copy() {
    let Some(role) = role() else { return };
    match &role.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["executor", number, fault, nth] => {
            // SAFETY: the parent has left this descriptor open for this process alone.
            let socket = unsafe { OwnedFd::from_raw_fd(number.parse().unwrap()) };
            arm(fault, nth);
            let status = farlink_executor::run(Transport::from_socket(socket).unwrap(), Options::default());
            let struck = fault::disarm();
            println!("struck {}", struck.as_deref().unwrap_or("nothing"));
            std::process::exit(status.unwrap());
        }
        ["controller", mapper, fault, nth] => {
            let peer = Peer::start("none", 0);
            println!("\nexecutor {}", peer.child.id());
            arm(fault, nth);
            let _ = scenario(&peer.mapper(mapper).unwrap(), &peer.executor);
            drop(peer.end());
            std::process::exit(0);
        }
        other => panic!("{other:?} is no role"),
    }
}

/// An executor in a copy of this program.
struct Peer {
    child: Child,
    endpoint: farlink_rpc::Endpoint,
    executor: Executor,
}

impl Peer {
    fn start(fault: &str, nth: u64) -> Self {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let child = start(&format!("executor {} {fault} {nth}", theirs.as_raw_fd()), Some(&theirs));
        drop(theirs);
        let transport = Transport::from_socket(ours.into()).unwrap();
        let (endpoint, info) = connect(transport, Arc::new(NoCallbacks), Options::default()).unwrap();
        let executor = Executor::new(info, Arc::new(endpoint.clone())).unwrap();
        Self { child, endpoint, executor }
    }

    fn mapper(&self, name: &str) -> Result<Arc<dyn MemoryMapper>, Error> {
        Ok(match name {
            "striped" => Arc::new(SharedMemoryMapper::new(&self.executor)?),
            "paged" => Arc::new(SharedMemoryMapper::page_by_page(&self.executor)?),
            "posix" => Arc::new(SharedMemoryMapper::posix(&self.executor)?),
            "posix-paged" => Arc::new(SharedMemoryMapper::posix_page_by_page(&self.executor)?),
            _ => Arc::new(RemoteMapper::new(&self.executor)?),
        })
    }

    /// Ends the session; gives how the process ended, and what was struck in it if it ended well.
    fn end(mut self) -> (std::process::ExitStatus, Option<String>) {
        self.endpoint.hang_up(Ok(()));
        let status = wait(&mut self.child);
        assert_eq!(names_of(self.child.id()), Vec::<String>::new());
        let lines = BufReader::new(self.child.stdout.take().unwrap()).lines().map(Result::unwrap);
        let struck = { lines }.find_map(|line| Some(line.strip_prefix("struck ")?.to_owned()));
        (status, struck)
    }
}

fn layout(prot: MemProt, content_bytes: u64, zero_fill_bytes: u64) -> SegmentLayout {
    let (group, align) = (AllocGroup::standard(prot), Align::new(16).unwrap());
    SegmentLayout { group, content_bytes, zero_fill_bytes, align }
}

/// Does one of everything. An operation that fails is left out, and so is what needs it.
///
/// Gives the errors.
fn scenario(mapper: &Arc<dyn MemoryMapper>, executor: &Executor) -> Vec<Error> {
    let manager = MemoryManager::new(Arc::clone(mapper), RESERVATION);
    let mut errors = Vec::new();
    // An action that does nothing: nobody has this handle.
    let exits = executor.bind(RUN_EXITS).unwrap().addr();
    let nothing = || Some(WrapperFunctionCall::new(exits, &(ExecutorAddr::new(1),)));
    let action = || ActionPair { finalize: nothing(), dealloc: nothing() };
    let mut place = |layouts: Vec<SegmentLayout>, actions: Vec<ActionPair>| -> Option<FinalizedAlloc> {
        let placed = manager.allocate(layouts).wait().and_then(|alloc| {
            for segment in alloc.segments() {
                segment.working.write(0, &vec![0x90; segment.content_bytes as usize])?;
            }
            Ok(manager.finalize(vec![(alloc, actions)]).wait()?.remove(0))
        });
        placed.map_err(|error| errors.push(error)).ok()
    };
    let small = || vec![layout(MemProt::RX, 100, 0), layout(MemProt::READ, 10, 0), layout(MemProt::RW, 10, 9000)];
    let first = place(small(), Vec::new());
    let second = place(small(), vec![action(), action()]);
    // More than fits, so that there is a second reservation, which goes when it is empty.
    let large = place(vec![layout(MemProt::RW, 100, 3 << 20)], Vec::new());
    let third = place(vec![layout(MemProt::RW, 400_000, 0)], vec![action()]);
    let buffer = manager.allocate_buffer(200_000).wait();
    let end = |allocs: Vec<FinalizedAlloc>| manager.deallocate(allocs).wait().err();
    errors.extend(end(second.into_iter().chain(large).collect()));
    errors.extend(buffer.map(drop).err().filter(|error| !matches!(error, Error::NotShared)));
    errors.extend(end(first.into_iter().chain(third).collect()));
    errors.extend(manager.usage().wait().err());
    errors
}

/// Descriptors, mappings of shared memory, and names of this process.
fn held() -> (usize, usize, usize) {
    let maps = fs::read_to_string("/proc/self/maps").unwrap();
    (
        fs::read_dir("/proc/self/fd").unwrap().count(),
        maps.lines().filter(|line| line.contains("farlink")).filter(|line| line.contains("rw-s")).count(),
        names_of(std::process::id()).len(),
    )
}

/// Waits until this process holds no more than `before`: threads that end close what they have.
fn settles_to(before: (usize, usize, usize), what: &str) {
    let start = Instant::now();
    while held() != before {
        assert!(start.elapsed() < DEADLINE, "{what}: {:?} instead of {before:?}", held());
        thread::yield_now();
    }
}

/// All of it: one test, since the faults are those of the whole process.
#[test]
fn every_system_call_fails_once() {
    if role().is_some() {
        return;
    }
    failing_here();
    failing_in_the_executor();
    executor_killed();
    controller_killed();
}

fn failing_here() {
    let mut struck = BTreeSet::new();
    let local = farlink_executor::local();
    for name in MAPPERS.into_iter().chain(["in-process", "in-process, paged"]) {
        let before = held();
        for nth in 0.. {
            let peer = (!name.starts_with("in-process")).then(|| Peer::start("none", 0));
            let (mapper, executor): (Arc<dyn MemoryMapper>, _) = match &peer {
                Some(peer) => (peer.mapper(name).unwrap(), peer.executor.clone()),
                None if name == "in-process" => (Arc::new(InProcessMapper::new()), local.clone()),
                None => (Arc::new(InProcessMapper::page_by_page()), local.clone()),
            };
            fault::arm(nth, Fault::Fail);
            let errors = scenario(&mapper, &executor);
            let kind = fault::disarm();
            // Both live, so what comes after works.
            let after = scenario(&mapper, &executor);
            assert!(after.is_empty(), "{name} {nth} {kind:?}: {errors:?}, then {after:?}");
            drop((mapper, executor));
            if let Some(peer) = peer {
                assert_eq!(peer.end().0.code(), Some(0));
            }
            settles_to(before, &format!("{name} {nth} {kind:?}"));
            let Some(kind) = kind else {
                assert!(errors.is_empty(), "{name}: {errors:?}");
                break;
            };
            struck.insert(kind);
        }
    }
    let kinds = ["AddSeals", "Fallocate", "Ftruncate", "Madvise", "MemfdCreate", "Mmap", "Mprotect", "ShmOpen", "Stat"];
    assert!(kinds.iter().all(|&kind| struck.contains(kind)), "{struck:?}");
}

fn failing_in_the_executor() {
    for name in MAPPERS {
        let before = held();
        for nth in 0.. {
            let peer = Peer::start("fail", nth);
            let mapper = peer.mapper(name).unwrap();
            let errors = scenario(&mapper, &peer.executor);
            let after = scenario(&mapper, &peer.executor);
            // The second time round may be what the fault was kept for.
            assert!(errors.is_empty() || after.is_empty(), "{name} {nth}: {errors:?}, then {after:?}");
            drop(mapper);
            let (status, struck) = peer.end();
            assert_eq!(status.code(), Some(0), "{name} {nth}");
            settles_to(before, &format!("{name} {nth}"));
            if struck.as_deref() == Some("nothing") {
                break;
            }
        }
    }
}

fn executor_killed() {
    for name in MAPPERS {
        let before = held();
        for nth in 0.. {
            let peer = Peer::start("kill", nth);
            let mapper = peer.mapper(name).unwrap();
            let errors = scenario(&mapper, &peer.executor);
            drop(mapper);
            let status = peer.end().0;
            settles_to(before, &format!("{name} {nth}"));
            if status.signal() != Some(9) {
                assert_eq!((status.code(), errors.len()), (Some(0), 0), "{name} {nth}: {errors:?}");
                break;
            }
        }
    }
}

fn controller_killed() {
    set_child_subreaper(Some(getpid())).unwrap();
    for name in MAPPERS {
        for nth in 0.. {
            let mut controller = start(&format!("controller {name} kill {nth}"), None);
            let lines = BufReader::new(controller.stdout.take().unwrap()).lines().map(Result::unwrap);
            let executor = { lines }.find_map(|line| Some(line.strip_prefix("executor ")?.to_owned())).unwrap();
            let status = wait(&mut controller);
            // The executor, which is this process's to reap now, ends by itself.
            let executor = Pid::from_raw(executor.parse().unwrap()).unwrap();
            let start = Instant::now();
            // A controller that was not killed has reaped it.
            while matches!(waitpid(Some(executor), WaitOptions::NOHANG), Ok(None)) {
                assert!(start.elapsed() < DEADLINE, "{name} {nth}: {executor:?} is still there");
                thread::yield_now();
            }
            let ids = [controller.id(), executor.as_raw_nonzero().get() as u32];
            assert_eq!(ids.map(|id| names_of(id).len()), [0, 0], "{name} {nth}");
            if status.signal() != Some(9) {
                assert_eq!(status.code(), Some(0), "{name} {nth}");
                break;
            }
        }
    }
}

//! What sessions take of the process, and that they give it back. One test, alone in its process, because it counts
//! the descriptors and threads of all of it.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod common;

use common::*;
use farlink_rpc::{Disconnected, Transport, connect};
use farlink_wire::frame::{MAX_FRAME_BYTES, Opcode};
use std::time::{Duration, Instant};
use std::{fs, thread};

fn entries(dir: &str) -> usize {
    fs::read_dir(dir).unwrap().count()
}

/// The number of open descriptors and of threads.
fn usage() -> (usize, usize) {
    (entries("/proc/self/fd"), entries("/proc/self/task"))
}

/// The most address space that the process ever had, in bytes.
fn peak_bytes() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmPeak:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() << 10
}

fn assert_returns_to(before: (usize, usize), what: &str) {
    let start = Instant::now();
    while usage() != before {
        assert!(start.elapsed() < DEADLINE, "{what}: {:?} descriptors and threads, {before:?} before", usage());
        thread::sleep(Duration::from_millis(5));
    }
}

/// Every way for a session to end gives back all descriptors and threads, calls one after another share threads,
/// and a message that claims a length takes no memory for it.
#[test]
fn everything_is_given_back() {
    let before = usage();
    for (name, ends) in WAYS {
        for end in ["drop", "hang up", "close"] {
            let (controller, executor) = session(ends(), echo(), echo(), options());
            for _ in 0..10 {
                controller.call(addr(1), vec![1; 1000]).wait().unwrap();
                executor.call(addr(1), vec![1; 1000]).wait().unwrap();
            }
            assert!(usage().1 > before.1);
            let kept = executor.clone();
            match end {
                "drop" => drop((controller, executor)),
                "hang up" => controller.hang_up(Ok(())),
                _ => executor.close(Disconnected::Local),
            }
            if end == "drop" {
                // A clone keeps it open, so it is the other side that has ended it.
                assert!(matches!(kept.wait_disconnected(), Disconnected::Eof));
            } else {
                kept.wait_disconnected();
            }
            drop(kept);
            assert_returns_to(before, &format!("{name}, {end}"));
        }
    }

    // A failed set-up.
    let (raw, transport) = RawPeer::new();
    drop(raw);
    assert!(connect(transport, echo(), options()).is_err());
    drop(Transport::pair().unwrap());
    assert_returns_to(before, "failed set-ups");

    // The descriptors are closed at the end, not only when the last clone is dropped.
    let (raw, endpoint) = RawPeer::executor(echo());
    let open = usage().0;
    drop(raw);
    endpoint.wait_disconnected();
    assert_eq!(usage().0, open - 3, "the peer's socket, this end's and the eventfd are closed");
    drop(endpoint);
    assert_returns_to(before, "an ended endpoint");

    // Calls one after another.
    let (controller, executor) = session(Transport::pair().unwrap(), echo(), echo(), options());
    for _ in 0..2000 {
        controller.call(addr(1), Vec::new()).wait().unwrap();
    }
    assert!(usage().1 <= before.1 + 32, "{} threads", usage().1);
    drop((controller, executor));
    assert_returns_to(before, "many calls");

    // A claim of a gigabyte.
    let (mut raw, endpoint) = RawPeer::executor(echo());
    let peak = peak_bytes();
    let mut claim = frame(Opcode::Call, 0, 0, b"");
    claim[..8].copy_from_slice(&MAX_FRAME_BYTES.to_le_bytes());
    raw.send(&claim);
    raw.send(&[0; 100_000]);
    drop(raw);
    let reason = endpoint.wait_disconnected();
    assert!(matches!(reason, Disconnected::Truncated { received: 100_032, expected: MAX_FRAME_BYTES }), "{reason}");
    assert!(peak_bytes() - peak < 256 << 20, "{} bytes for a claim", peak_bytes() - peak);
    drop(endpoint);
    assert_returns_to(before, "a claim");
}

//! The queue of the shared ring in every order that its steps can come in: the same source, on loom's primitives.
//!
//! That a thread sleeps for ever shows as a deadlock, and a message that nobody reads as one that is missing at the end.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on panics")]

#[allow(dead_code, reason = "the models use what threads share")]
#[path = "../src/ring/queue.rs"]
mod queue;

/// Loom's primitives in the place of the system's.
mod primitive {
    use loom::sync::Condvar;
    pub(super) use loom::sync::Mutex;
    use loom::sync::atomic::AtomicU32;
    pub(super) use loom::sync::atomic::{AtomicBool, AtomicU64, Ordering, fence};

    /// A futex: comparing and going to sleep are one step, as they are for the system.
    #[derive(Debug)]
    pub(super) struct Word {
        value: AtomicU32,
        lock: Mutex<()>,
        woken: Condvar,
    }

    impl Word {
        pub(super) fn new(value: u32) -> Self {
            Self { value: AtomicU32::new(value), lock: Mutex::new(()), woken: Condvar::new() }
        }

        pub(super) fn load(&self, ordering: Ordering) -> u32 {
            self.value.load(ordering)
        }

        pub(super) fn store(&self, value: u32, ordering: Ordering) {
            // Loom would let a store of this thread come between what another's swap has read and what it has written,
            // which no system does. A swap it keeps apart.
            self.value.swap(value, ordering);
        }

        pub(super) fn swap(&self, value: u32, ordering: Ordering) -> u32 {
            self.value.swap(value, ordering)
        }

        pub(super) fn wait(&self, expected: u32, _timeout: Option<std::time::Duration>) {
            let guard = self.lock.lock().unwrap();
            if self.value.load(Ordering::SeqCst) == expected {
                drop(self.woken.wait(guard).unwrap());
            }
        }

        pub(super) fn wake(&self) {
            drop(self.lock.lock().unwrap());
            self.woken.notify_all();
        }
    }

    pub(super) fn pause(_nth: u32) {
        loom::thread::yield_now();
    }
}

use farlink_wire::frame::HEADER_BYTES;
use loom::sync::Arc;
use loom::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use loom::thread;
use queue::{Attendant, Inbound, Memory, Outbound, Sent};

const WORDS: usize = 16;

/// Both ends of one direction.
struct Ends {
    memory: Memory<WORDS>,
    outbound: Outbound,
    inbound: Inbound,
    received: AtomicUsize,
}

impl Ends {
    fn new() -> Arc<Self> {
        let (outbound, inbound) = (Outbound::default(), Inbound::default());
        Arc::new(Self { memory: Memory::new(), outbound, inbound, received: AtomicUsize::new(0) })
    }

    /// Sends a message; rings the bell if nobody reads, which another reader then hears.
    fn send(&self) {
        let mut header = [7; HEADER_BYTES];
        header[..8].copy_from_slice(&(HEADER_BYTES as u64).to_le_bytes());
        match self.outbound.send(&self.memory, &header, &[], 0).unwrap() {
            Sent::Done => {}
            Sent::NobodyReads => self.answer_bell(),
            Sent::NoRoom => panic!("there is room for all messages of a model"),
        }
    }

    fn answer_bell(&self) {
        if let Some(mut attendant) = self.inbound.attend(&self.memory) {
            while self.receive(&mut attendant) {}
            self.leave(attendant);
        }
    }

    fn receive(&self, attendant: &mut Attendant<'_, WORDS>) -> bool {
        let received = attendant.receive().unwrap();
        if let Some((header, payload)) = &received {
            assert!(header[8..].iter().all(|&byte| byte == 7) && payload.is_empty());
            self.received.fetch_add(1, Ordering::SeqCst);
        }
        received.is_some()
    }

    fn leave<'a>(&'a self, mut attendant: Attendant<'a, WORDS>) {
        while attendant.leave() {
            match self.inbound.attend(&self.memory) {
                Some(again) => attendant = again,
                None => return,
            }
            while self.receive(&mut attendant) {}
        }
    }

    /// Attends until as many messages have been received, by whomever.
    fn attend_until(&self, count: usize) {
        let is_done = || self.received.load(Ordering::SeqCst) >= count;
        if let Some(mut attendant) = self.inbound.attend(&self.memory) {
            while !is_done() {
                if !self.receive(&mut attendant) {
                    attendant.sleep(is_done, None);
                }
            }
            self.leave(attendant);
        }
    }

    fn received(&self) -> usize {
        self.received.load(Ordering::SeqCst)
    }
}

fn model(f: impl Fn() + Send + Sync + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(3);
    builder.check(f);
}

/// A reader that sleeps is woken for each message and reads it whole.
#[test]
fn messages_wake_the_reader() {
    model(|| {
        let ends = Ends::new();
        let reader = {
            let ends = Arc::clone(&ends);
            thread::spawn(move || ends.attend_until(2))
        };
        ends.send();
        ends.send();
        reader.join().unwrap();
        assert_eq!(ends.received(), 2);
    });
}

/// A message that comes while readers leave and others take their place is read by one of them or by who hears the bell.
#[test]
fn no_message_is_left_behind() {
    model(|| {
        let ends = Ends::new();
        let readers: Vec<_> = (0..2)
            .map(|_| {
                let ends = Arc::clone(&ends);
                thread::spawn(move || ends.answer_bell())
            })
            .collect();
        ends.send();
        readers.into_iter().for_each(|reader| reader.join().unwrap());
        assert_eq!(ends.received(), 1);
    });
}

/// Several writers: each message is read once.
#[test]
fn writers_take_turns() {
    model(|| {
        let ends = Ends::new();
        let writer = {
            let ends = Arc::clone(&ends);
            thread::spawn(move || ends.send())
        };
        ends.send();
        ends.answer_bell();
        writer.join().unwrap();
        assert_eq!(ends.received(), 2);
    });
}

/// Closing wakes a reader that sleeps; what was written before is read by who closes, if not by the reader.
#[test]
fn closing_frees_the_reader() {
    model(|| {
        let ends = Ends::new();
        let reader = {
            let ends = Arc::clone(&ends);
            thread::spawn(move || {
                let Some(mut attendant) = ends.inbound.attend(&ends.memory) else { return };
                while !ends.inbound.is_closed() {
                    if !ends.receive(&mut attendant) {
                        attendant.sleep(|| false, None);
                    }
                }
            })
        };
        ends.send();
        let mut last = ends.inbound.close(&ends.memory);
        while ends.receive(&mut last) {}
        reader.join().unwrap();
        assert_eq!(ends.received(), 1);
    });
}

/// A reader that waits for something else too is told of it while it sleeps.
#[test]
fn a_nudge_is_not_lost() {
    model(|| {
        let (ends, stop) = (Ends::new(), Arc::new(AtomicBool::new(false)));
        let reader = {
            let (ends, stop) = (Arc::clone(&ends), Arc::clone(&stop));
            thread::spawn(move || {
                let stop = || stop.load(Ordering::SeqCst);
                let attendant = ends.inbound.attend(&ends.memory).unwrap();
                while !stop() {
                    attendant.sleep(stop, None);
                }
            })
        };
        stop.store(true, Ordering::SeqCst);
        ends.inbound.nudge(&ends.memory);
        reader.join().unwrap();
    });
}

//! Calls in flight, and objects that are to go when no call can be in them any more.
//!
//! A call belongs to the generation in which it began. What is retired waits for the calls of its generation: those that
//! begin later do not get to it, since nothing leads there any more. Counts are kept apart by thread, so that calls of
//! different threads do not wait for each other's caches.

use crate::library::{Library, LibraryInner, Object};
use std::cell::Cell;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

/// How many counts there are. Threads beyond that share one.
const SHARDS: usize = 16;

/// The calls of some threads: those of the even and of the odd generations. Alone in its cache line.
#[derive(Default)]
#[repr(align(128))]
struct Shard([AtomicU64; 2]);

/// The calls of a session that have begun and not returned, and what waits for them.
#[derive(Default)]
pub(crate) struct Flights {
    generation: AtomicU64,
    shards: [Shard; SHARDS],
    /// Whether anything waits for the calls of the generation before.
    is_draining: AtomicBool,
    retired: Mutex<Retired>,
}

/// Objects that wait.
#[derive(Default)]
struct Retired {
    /// For the calls of the generation before.
    draining: Vec<(Weak<LibraryInner>, Object)>,
    /// For the next generation to begin.
    waiting: Vec<(Weak<LibraryInner>, Object)>,
}

/// A call that has begun. One that is never landed holds what is retired later for as long as the session is there.
#[derive(Clone, Copy)]
pub(crate) struct Flight {
    shard: usize,
    parity: usize,
}

/// Returns this thread's shard.
fn shard() -> usize {
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    thread_local! {
        static SHARD: Cell<Option<usize>> = const { Cell::new(None) };
    }
    SHARD.get().unwrap_or_else(|| {
        let shard = NEXT.fetch_add(1, SeqCst) % SHARDS;
        SHARD.set(Some(shard));
        shard
    })
}

impl Flights {
    /// Begins a call.
    #[inline]
    pub(crate) fn take_off(&self) -> Flight {
        let shard = shard();
        loop {
            let generation = self.generation.load(SeqCst);
            let parity = (generation & 1) as usize;
            self.shards[shard].0[parity].fetch_add(1, SeqCst);
            // A generation that has begun meanwhile may not have seen this call.
            if self.generation.load(SeqCst) == generation {
                return Flight { shard, parity };
            }
            self.land(Flight { shard, parity });
        }
    }

    /// Ends a call.
    #[inline]
    pub(crate) fn land(&self, flight: Flight) {
        self.shards[flight.shard].0[flight.parity].fetch_sub(1, SeqCst);
        if self.is_draining.load(SeqCst) {
            self.remove_retired();
        }
    }

    fn lock(&self) -> MutexGuard<'_, Retired> {
        // Nothing that can panic runs under this lock.
        self.retired.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Has an object removed when all calls that are in flight now have returned.
    pub(crate) fn retire(&self, library: &Arc<LibraryInner>, object: Object) {
        self.lock().waiting.push((Arc::downgrade(library), object));
        self.remove_retired();
    }

    /// Removes what waits for nothing any more.
    fn remove_retired(&self) {
        let mut ready = Vec::new();
        {
            let mut retired = self.lock();
            loop {
                if retired.draining.is_empty() {
                    if retired.waiting.is_empty() {
                        self.is_draining.store(false, SeqCst);
                        break;
                    }
                    retired.draining = std::mem::take(&mut retired.waiting);
                    // Before the counts are read: whoever lands after that looks here.
                    self.is_draining.store(true, SeqCst);
                    self.generation.fetch_add(1, SeqCst);
                }
                let before = (self.generation.load(SeqCst).wrapping_sub(1) & 1) as usize;
                if self.shards.iter().any(|shard| shard.0[before].load(SeqCst) > 0) {
                    break;
                }
                ready.append(&mut retired.draining);
            }
        }
        for (library, object) in ready {
            if let Some(inner) = library.upgrade() {
                // Nobody is left to be told that something failed at its end; the memory comes back all the same.
                let _ = Library::from_inner(inner).remove(object);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    impl Flights {
        fn waits(&self) -> bool {
            self.remove_retired();
            self.is_draining.load(SeqCst)
        }
    }

    fn retire_nothing(flights: &Flights) {
        let object = Object::nowhere();
        flights.lock().waiting.push((Weak::new(), object));
        flights.remove_retired();
    }

    /// What is retired waits for calls that began before, also in two generations, and not for later ones.
    #[test]
    fn retired_objects_wait_for_earlier_calls() {
        let flights = Flights::default();
        retire_nothing(&flights);
        assert!(!flights.waits());
        let (first, second) = (flights.take_off(), flights.take_off());
        retire_nothing(&flights);
        let later = flights.take_off();
        flights.land(first);
        assert!(flights.waits());
        retire_nothing(&flights);
        flights.land(second);
        // The later call holds what was retired after it began.
        assert!(flights.waits() && flights.lock().waiting.is_empty());
        let last = flights.take_off();
        flights.land(later);
        assert!(!flights.waits());
        flights.land(last);
    }

    /// Calls of many threads, while others retire: in the end nothing waits.
    #[test]
    fn many_threads() {
        let flights = Flights::default();
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| (0..2000).for_each(|_| flights.land(flights.take_off())));
                scope.spawn(|| (0..200).for_each(|_| retire_nothing(&flights)));
            }
        });
        assert!(!flights.waits());
        assert!(flights.shards.iter().flat_map(|shard| &shard.0).all(|count| count.load(SeqCst) == 0));
    }
}

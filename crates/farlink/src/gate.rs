//! A gate between those who tell all executors something, any number at once, and one who tells a new executor what all have
//! been told: neither happens during the other.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// See the module.
#[derive(Default)]
pub(crate) struct Gate {
    state: Mutex<GateState>,
    changed: Condvar,
}

#[derive(Default)]
struct GateState {
    inside: usize,
    is_closed: bool,
}

/// Being inside of a gate, or having closed it.
pub(crate) struct Passage<'a> {
    gate: &'a Gate,
    has_closed: bool,
}

impl Gate {
    fn lock(&self) -> MutexGuard<'_, GateState> {
        // Nothing that can panic runs under this lock.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Enters, once it is open; none if that takes too long.
    pub(crate) fn enter(&self, timeout: Duration) -> Option<Passage<'_>> {
        let waited = self.changed.wait_timeout_while(self.lock(), timeout, |state| state.is_closed);
        let mut state = waited.unwrap_or_else(PoisonError::into_inner).0;
        (!state.is_closed).then(|| {
            state.inside += 1;
            Passage { gate: self, has_closed: false }
        })
    }

    /// Closes the gate when nobody is inside; none if that takes too long. Who is inside may need another to get in: nobody
    /// is kept out meanwhile.
    pub(crate) fn close(&self, timeout: Duration) -> Option<Passage<'_>> {
        let is_busy = |state: &mut GateState| state.is_closed || state.inside > 0;
        let waited = self.changed.wait_timeout_while(self.lock(), timeout, is_busy);
        let mut state = waited.unwrap_or_else(PoisonError::into_inner).0;
        (!is_busy(&mut state)).then(|| {
            state.is_closed = true;
            Passage { gate: self, has_closed: true }
        })
    }
}

impl Drop for Passage<'_> {
    fn drop(&mut self) {
        let mut state = self.gate.lock();
        if self.has_closed {
            state.is_closed = false;
        } else {
            state.inside -= 1;
        }
        self.gate.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NEVER: Duration = Duration::ZERO;
    const LONG: Duration = Duration::from_secs(60);

    /// Any number are inside, or one has closed; who closes waits for those inside, and lets others in until then.
    #[test]
    fn inside_or_closed() {
        let gate = Gate::default();
        let first = gate.enter(NEVER).unwrap();
        assert!(gate.close(NEVER).is_none());
        std::thread::scope(|scope| {
            let closing = scope.spawn(|| gate.close(LONG).is_some());
            let second = gate.enter(LONG).unwrap();
            drop(first);
            drop(second);
            assert!(closing.join().unwrap());
        });
        let closed = gate.close(NEVER).unwrap();
        assert!(gate.enter(NEVER).is_none() && gate.close(NEVER).is_none());
        drop(closed);
        assert!(gate.enter(NEVER).is_some());
    }
}

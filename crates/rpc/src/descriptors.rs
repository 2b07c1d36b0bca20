//! Descriptors that a controller has sent, until calls take them.

use crate::Disconnected;
use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Descriptors that may wait for a call to take them.
const MAX_WAITING: usize = 64;

/// How long a call waits for a descriptor that has been sent before it, but goes another way: over the socket, while the
/// call may have come through the ring.
const PATIENCE: Duration = Duration::from_secs(2);

/// Descriptors by the tags that calls name them by.
#[derive(Default)]
pub(crate) struct Descriptors {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    waiting: HashMap<u64, OwnedFd>,
    /// Tag of the one that came last. They come in the order of their tags.
    last: u64,
    has_ended: bool,
}

impl Descriptors {
    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing that can panic runs under this lock.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Keeps a descriptor that the peer has sent until a call takes it.
    pub(crate) fn keep(&self, tag: u64, descriptor: Option<OwnedFd>) -> Result<(), Disconnected> {
        let protocol = |text: &str| Disconnected::Protocol(format!("a Descriptor message with tag {tag} {text}"));
        let descriptor = descriptor.ok_or_else(|| protocol("without a descriptor"))?;
        let mut state = self.lock();
        if state.waiting.len() == MAX_WAITING {
            return Err(protocol("while as many are waiting as may"));
        }
        if state.waiting.insert(tag, descriptor).is_some() {
            return Err(protocol("that another has"));
        }
        state.last = state.last.max(tag);
        self.changed.notify_all();
        Ok(())
    }

    /// Takes the descriptor that the peer has sent with this tag, waiting for it if it may be on its way.
    pub(crate) fn take(&self, tag: u64) -> Option<OwnedFd> {
        let is_on_its_way = |state: &mut State| !state.has_ended && state.last < tag;
        let waited = self.changed.wait_timeout_while(self.lock(), PATIENCE, is_on_its_way);
        waited.unwrap_or_else(PoisonError::into_inner).0.waiting.remove(&tag)
    }

    /// Closes what is left; nothing comes any more.
    pub(crate) fn end(&self) {
        let mut state = self.lock();
        state.has_ended = true;
        state.waiting.clear();
        self.changed.notify_all();
    }
}

//! Waiting for objects that other threads are linking.

use crate::library::{LibraryInner, ObjectId};
use crate::state::{ObjectState, State};
use std::sync::{MutexGuard, PoisonError};

impl LibraryInner {
    /// Changes the state and wakes those who wait for an object to settle.
    pub(crate) fn settle(&self, change: impl FnOnce(&mut State)) {
        let mut state = self.lock();
        change(&mut state);
        let is_waited_for = state.waiting > 0;
        drop(state);
        // To wake nobody would be a system call too.
        if is_waited_for {
            self.settled.notify_all();
        }
    }

    /// Waits until none of `objects` is being linked; gives the state as it is then.
    pub(crate) fn wait_settled(&self, objects: &[ObjectId]) -> MutexGuard<'_, State> {
        let linking = |state: &mut State| {
            let slot = |object: &ObjectId| state.objects.get(object.0 as usize);
            objects.iter().filter_map(slot).any(|slot| matches!(slot.state, ObjectState::Linking))
        };
        let mut state = self.lock();
        state.waiting += 1;
        let mut state = self.settled.wait_while(state, linking).unwrap_or_else(PoisonError::into_inner);
        state.waiting -= 1;
        state
    }
}

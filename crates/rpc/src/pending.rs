//! Results that may not be there yet.
//!
//! A [`Pending`] is waited for (it blocks the thread) or awaited (it is a [`Future`]), without any async runtime.
//! Adaptors run in whoever waits, so completing one costs its thread no more than a wake-up.

use crate::ring::Drive;
use std::future::Future;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

/// A value that is there already or will be.
///
/// Dropping it abandons the result, not the operation.
#[must_use = "an operation's outcome is only known by waiting for it"]
pub struct Pending<T>(State<T>);

enum State<T> {
    Ready(Option<T>),
    /// A completer fills the slot. A thread that waits may do some of the work for that.
    Slot(Arc<Slot<T>>, Option<Arc<dyn Drive>>),
    Waiting(Box<dyn Source<T>>),
}

/// Where a pending value comes from.
trait Source<T>: Send {
    fn wait(self: Box<Self>) -> T;
    /// Gives nothing at the deadline.
    fn wait_until(self: Box<Self>, deadline: Instant) -> Option<T>;
    fn poll(&mut self, context: &mut Context<'_>) -> Poll<T>;
}

impl<T: Send + 'static> Pending<T> {
    /// Returns a value that is there already.
    pub fn ready(value: T) -> Self {
        Self(State::Ready(Some(value)))
    }

    /// Returns a pending value and the means to complete it.
    ///
    /// If the [`Completer`] is dropped before it is used, the value becomes what `abandoned` returns.
    pub fn channel(abandoned: fn() -> T) -> (Completer<T>, Self) {
        let slot = Arc::new(Slot { state: Mutex::new(SlotState::Empty(Waiter::None)), filled: Condvar::new() });
        (Completer { slot: Arc::clone(&slot), abandoned }, Self(State::Slot(slot, None)))
    }

    /// Has a thread that waits for the value, which comes from a channel, work for `driver` meanwhile.
    pub(crate) fn driven_by(self, driver: Arc<dyn Drive>) -> Self {
        match self.0 {
            State::Slot(slot, _) => Self(State::Slot(slot, Some(driver))),
            other => Self(other),
        }
    }

    /// Blocks until the value is there.
    ///
    /// # Panics
    ///
    /// Panics if it has been awaited to its end before.
    pub fn wait(self) -> T {
        match self.0 {
            State::Ready(value) => value.expect(TAKEN_ONCE),
            State::Slot(slot, driver) => {
                if let Some(driver) = driver {
                    driver.drive(&|| slot.is_full(), None);
                }
                slot.wait()
            }
            State::Waiting(source) => source.wait(),
        }
    }

    /// Blocks until the value is there, for at most `timeout`. After that the result is abandoned, not the operation.
    ///
    /// # Panics
    ///
    /// As [`Self::wait`].
    pub fn wait_timeout(self, timeout: Duration) -> Option<T> {
        let Some(deadline) = Instant::now().checked_add(timeout) else { return Some(self.wait()) };
        self.wait_until(deadline)
    }

    fn wait_until(self, deadline: Instant) -> Option<T> {
        match self.0 {
            State::Ready(value) => Some(value.expect(TAKEN_ONCE)),
            State::Slot(slot, driver) => {
                if let Some(driver) = driver {
                    driver.drive(&|| slot.is_full(), Some(deadline));
                }
                slot.wait_until(deadline)
            }
            State::Waiting(source) => source.wait_until(deadline),
        }
    }

    /// Has [`Self::wait`] give what `late` returns if the value is not there at the deadline. Whoever awaits the value has a
    /// clock of its own, and sees no deadline.
    pub(crate) fn limited(self, deadline: Instant, late: impl FnOnce() -> T + Send + 'static) -> Self {
        match self.0 {
            State::Ready(_) => self,
            _ => Self(State::Waiting(Box::new(Limited { inner: self, deadline, late }))),
        }
    }

    /// Applies `f` to the value, in whoever waits for it.
    pub fn map<U: Send + 'static>(self, f: impl FnOnce(T) -> U + Send + 'static) -> Pending<U> {
        match self.0 {
            State::Ready(Some(value)) => Pending::ready(f(value)),
            _ => Pending(State::Waiting(Box::new(Mapped { inner: Some(self), f: Some(f) }))),
        }
    }
}

impl<T: Send + 'static, E: Send + 'static> Pending<Result<T, E>> {
    /// Collects the results of several operations: all values in order, or the first error in that order.
    pub fn all(operations: Vec<Self>) -> Pending<Result<Vec<T>, E>> {
        let done = Vec::with_capacity(operations.len());
        Pending(State::Waiting(Box::new(All { operations: operations.into(), done })))
    }
}

impl<T: Send + 'static> Future for Pending<T> {
    type Output = T;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<T> {
        match &mut self.0 {
            State::Ready(value) => Poll::Ready(value.take().expect("a future is not polled after its end")),
            State::Slot(slot, _) => slot.poll(context),
            State::Waiting(source) => source.poll(context),
        }
    }
}

impl<T> Unpin for Pending<T> {}

/// Completes a [`Pending`].
pub struct Completer<T> {
    slot: Arc<Slot<T>>,
    abandoned: fn() -> T,
}

impl<T> Completer<T> {
    /// Gives the value to whoever waits for it. Only the first call counts.
    pub fn complete(self, value: T) {
        self.slot.fill(value);
    }

    /// As [`Self::complete`]. The waker of a task that awaits the value is somebody else's code: if it panics, only that task
    /// is the worse for it.
    pub(crate) fn complete_safely(self, value: T) {
        let _ = catch_unwind(AssertUnwindSafe(|| self.complete(value)));
    }
}

impl<T> Drop for Completer<T> {
    fn drop(&mut self) {
        if matches!(*self.slot.lock(), SlotState::Empty(_)) {
            self.slot.fill((self.abandoned)());
        }
    }
}

struct Slot<T> {
    state: Mutex<SlotState<T>>,
    filled: Condvar,
}

enum SlotState<T> {
    Empty(Waiter),
    Full(T),
    Taken,
}

/// Who is to be told of the value. Waking a thread is a system call, also if there is none.
enum Waiter {
    None,
    Thread,
    Task(Waker),
}

impl<T> Slot<T> {
    fn lock(&self) -> MutexGuard<'_, SlotState<T>> {
        // Nothing that can panic runs under this lock.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn fill(&self, value: T) {
        let mut state = self.lock();
        if state.is_empty()
            && let SlotState::Empty(waiter) = std::mem::replace(&mut *state, SlotState::Full(value))
        {
            drop(state);
            match waiter {
                Waiter::None => {}
                Waiter::Thread => self.filled.notify_one(),
                Waiter::Task(waker) => waker.wake(),
            }
        }
    }
}

impl<T> SlotState<T> {
    fn is_empty(&mut self) -> bool {
        matches!(self, Self::Empty(_))
    }

    fn take(&mut self) -> T {
        match std::mem::replace(self, Self::Taken) {
            Self::Full(value) => value,
            _ => unreachable!("a slot that is not empty is taken by its only owner"),
        }
    }
}

impl<T> Slot<T> {
    fn is_full(&self) -> bool {
        !self.lock().is_empty()
    }

    /// Locks the state for a thread that is about to wait.
    fn lock_to_wait(&self) -> MutexGuard<'_, SlotState<T>> {
        let mut state = self.lock();
        if let SlotState::Empty(waiter) = &mut *state {
            *waiter = Waiter::Thread;
        }
        state
    }

    fn wait(&self) -> T {
        let waited = self.filled.wait_while(self.lock_to_wait(), SlotState::is_empty);
        waited.unwrap_or_else(PoisonError::into_inner).take()
    }

    fn wait_until(&self, deadline: Instant) -> Option<T> {
        let left = deadline.saturating_duration_since(Instant::now());
        let waited = self.filled.wait_timeout_while(self.lock_to_wait(), left, SlotState::is_empty);
        let (mut state, timed_out) = waited.unwrap_or_else(PoisonError::into_inner);
        (!timed_out.timed_out()).then(|| state.take())
    }

    fn poll(&self, context: &mut Context<'_>) -> Poll<T> {
        let mut state = self.lock();
        match &mut *state {
            SlotState::Empty(waiter) => {
                *waiter = Waiter::Task(context.waker().clone());
                Poll::Pending
            }
            SlotState::Full(_) => Poll::Ready(state.take()),
            SlotState::Taken => panic!("a future is not polled after its end"),
        }
    }
}

struct Limited<T, F> {
    inner: Pending<T>,
    deadline: Instant,
    late: F,
}

impl<T: Send + 'static, F: FnOnce() -> T + Send> Source<T> for Limited<T, F> {
    fn wait(self: Box<Self>) -> T {
        let Self { inner, deadline, late } = *self;
        inner.wait_until(deadline).unwrap_or_else(late)
    }

    fn wait_until(self: Box<Self>, deadline: Instant) -> Option<T> {
        if deadline < self.deadline { self.inner.wait_until(deadline) } else { Some(self.wait()) }
    }

    fn poll(&mut self, context: &mut Context<'_>) -> Poll<T> {
        Pin::new(&mut self.inner).poll(context)
    }
}

struct Mapped<T, F> {
    inner: Option<Pending<T>>,
    f: Option<F>,
}

const TAKEN_ONCE: &str = "a pending value is taken once";

impl<T: Send + 'static, U, F: FnOnce(T) -> U + Send> Source<U> for Mapped<T, F> {
    fn wait(mut self: Box<Self>) -> U {
        let f = self.f.take().expect(TAKEN_ONCE);
        f(self.inner.take().expect(TAKEN_ONCE).wait())
    }

    fn wait_until(mut self: Box<Self>, deadline: Instant) -> Option<U> {
        let f = self.f.take().expect(TAKEN_ONCE);
        self.inner.take().expect(TAKEN_ONCE).wait_until(deadline).map(f)
    }

    fn poll(&mut self, context: &mut Context<'_>) -> Poll<U> {
        let inner = self.inner.as_mut().expect(TAKEN_ONCE);
        Pin::new(inner).poll(context).map(|value| self.f.take().expect(TAKEN_ONCE)(value))
    }
}

struct All<T, E> {
    operations: std::collections::VecDeque<Pending<Result<T, E>>>,
    done: Vec<T>,
}

impl<T: Send + 'static, E: Send + 'static> Source<Result<Vec<T>, E>> for All<T, E> {
    fn wait(self: Box<Self>) -> Result<Vec<T>, E> {
        let mut all = *self;
        // Every operation is waited for, also after one has failed: none is in flight when this returns.
        let mut failed = None;
        for operation in all.operations {
            match operation.wait() {
                Ok(value) => all.done.push(value),
                Err(error) => failed = failed.or(Some(error)),
            }
        }
        failed.map_or(Ok(all.done), Err)
    }

    fn wait_until(self: Box<Self>, deadline: Instant) -> Option<Result<Vec<T>, E>> {
        let mut all = *self;
        let mut failed = None;
        for operation in all.operations {
            match operation.wait_until(deadline)? {
                Ok(value) => all.done.push(value),
                Err(error) => failed = failed.or(Some(error)),
            }
        }
        Some(failed.map_or(Ok(all.done), Err))
    }

    fn poll(&mut self, context: &mut Context<'_>) -> Poll<Result<Vec<T>, E>> {
        while let Some(operation) = self.operations.front_mut() {
            match Pin::new(operation).poll(context) {
                Poll::Pending => return Poll::Pending,
                Poll::Ready(Err(error)) => return Poll::Ready(Err(error)),
                Poll::Ready(Ok(value)) => self.done.push(value),
            }
            self.operations.pop_front();
        }
        Poll::Ready(Ok(std::mem::take(&mut self.done)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::task::Wake;
    use std::thread;

    struct Unparker(thread::Thread);

    impl Wake for Unparker {
        fn wake(self: Arc<Self>) {
            self.0.unpark();
        }
    }

    fn block_on<T>(mut future: impl Future<Output = T> + Unpin) -> T {
        let waker = Arc::new(Unparker(thread::current())).into();
        loop {
            match Pin::new(&mut future).poll(&mut Context::from_waker(&waker)) {
                Poll::Ready(value) => return value,
                Poll::Pending => thread::park(),
            }
        }
    }

    /// A value completed by another thread reaches one that blocks and one that awaits, through an adaptor.
    #[test]
    fn waits_and_awaits() {
        for awaited in [false, true] {
            let (completer, pending) = Pending::channel(|| 0);
            let worker = thread::spawn(move || completer.complete(20));
            let pending = pending.map(|value| value + 1);
            assert_eq!(if awaited { block_on(pending) } else { pending.wait() }, 21);
            worker.join().unwrap();
        }
    }

    /// Waiting for a limited time gives a value that is there in time, through adaptors, and nothing after it.
    #[test]
    fn waiting_ends_at_the_deadline() {
        let (completer, pending) = Pending::channel(|| 0);
        let (other, late) = Pending::channel(|| 0);
        completer.complete(20);
        assert_eq!(pending.map(|value| value + 1).wait_timeout(Duration::MAX), Some(21));
        assert_eq!(late.map(|value| value + 1).wait_timeout(Duration::from_millis(1)), None);
        other.complete(20);
        let (_completer, never) = Pending::channel(|| Err("abandoned"));
        let both = Pending::all(vec![Pending::ready(Ok(1)), never]);
        assert_eq!(both.wait_timeout(Duration::from_millis(1)), None::<Result<Vec<i32>, &str>>);
    }

    /// A limited value is there in time or is what stands for it, also where somebody waits for less or for more.
    #[test]
    fn limited_values() {
        let limited = |limit: u64| {
            let (completer, pending) = Pending::channel(|| 0);
            (completer, pending.limited(Instant::now() + Duration::from_millis(limit), || 7).map(|value| value + 1))
        };
        let (completer, pending) = limited(100_000);
        completer.complete(20);
        assert_eq!(pending.wait(), 21);
        let (_completer, pending) = limited(1);
        assert_eq!(pending.wait(), 8);
        let (_completer, pending) = limited(1);
        assert_eq!(pending.wait_timeout(Duration::from_secs(100)), Some(8));
        let (_completer, pending) = limited(100_000);
        assert_eq!(pending.wait_timeout(Duration::from_millis(1)), None);
    }

    /// A completer that is dropped unused leaves the stand-in value, not a hang.
    #[test]
    fn abandoned_value_arrives() {
        let (completer, pending) = Pending::channel(|| "abandoned");
        drop(completer);
        assert_eq!(pending.wait(), "abandoned");
    }

    /// Several operations give all values in order, or the first error, whichever way they are waited for.
    #[test]
    fn all_collects_in_order() {
        let three = |second: Result<u32, &'static str>| {
            Pending::all(vec![Pending::ready(Ok(1)), Pending::ready(second), Pending::ready(Ok(3))])
        };
        assert_eq!(three(Ok(2)).wait(), Ok(vec![1, 2, 3]));
        assert_eq!(block_on(three(Ok(2))), Ok(vec![1, 2, 3]));
        assert_eq!(three(Err("no")).wait(), Err("no"));
        assert_eq!(block_on(three(Err("no"))), Err("no"));
    }
}

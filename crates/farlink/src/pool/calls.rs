//! Calling the executors of a pool: one of them, or all.

use super::{Given, Pool, Restart, Running, cannot};
use crate::Error;
use crate::journal::Told;
use farlink_addr::ExecutorAddr;
use farlink_rpc::{CallError, Caller, Pending};
use farlink_wire::sps::{SpsError, to_bytes};
use rustix::process::Signal;
use std::os::fd::BorrowedFd;
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};
use std::time::Instant;

/// Returns the path in the arguments of a call that opens a library: they begin alike.
pub(super) fn path_of(args: &[u8]) -> Option<String> {
    let length = u64::from_le_bytes(args.get(8..16)?.try_into().ok()?);
    let path = args.get(16..)?.get(..usize::try_from(length).ok()?)?;
    String::from_utf8(path.to_vec()).ok()
}

impl Pool {
    /// Chooses an executor for a call: the one with the fewest that have not returned, or the one with this number.
    pub(crate) fn give(&self, wanted: Option<usize>) -> Result<Given, Error> {
        if wanted.is_some_and(|index| index >= self.size()) {
            let text = format!("the session has {}, numbered from 0", self.size());
            return Err(Error::Refused { operation: "be the one that is wanted", text });
        }
        let chosen = match wanted {
            Some(index) => self.revived(index)?,
            None => self.idlest()?,
        };
        chosen.calls.fetch_add(1, Ordering::Relaxed);
        Ok(Given(chosen))
    }

    fn idlest(&self) -> Result<Arc<Running>, Error> {
        let first = self.turn.fetch_add(1, Ordering::Relaxed);
        let places = (0..self.size()).map(|offset| (first.wrapping_add(offset)) % self.size());
        let live = places.filter_map(|index| self.members[index].running()).filter(|running| running.ended().is_none());
        match live.min_by_key(|running| running.calls.load(Ordering::Relaxed)) {
            Some(running) => Ok(running),
            None => self.revived(first % self.size()),
        }
    }

    /// Returns the executor in a place, where another is started if that has ended and may be.
    pub(super) fn revived(&self, index: usize) -> Result<Arc<Running>, Error> {
        let running = self.members[index].running().ok_or_else(|| self.reason())?;
        let Some(reason) = running.ended() else { return Ok(running) };
        if self.restart == Restart::Never || self.has_ended.load(Ordering::Acquire) {
            return Err(CallError::from(reason).into());
        }
        self.start_another(index, &running)?;
        self.members[index].running().ok_or_else(|| self.reason().into())
    }

    /// Notes, if a call failed by that, that its executor has ended.
    pub(crate) fn returned(&self, running: &Arc<Running>, error: &CallError) {
        if let CallError::Disconnected(_) = error {
            self.note_end(running);
        }
    }

    /// Has one executor do something.
    fn tell_one(&self, function: ExecutorAddr, args: Vec<u8>) -> Result<Pending<Result<Vec<u8>, CallError>>, Error> {
        let (given, pool) = (self.give(None)?, self.this.clone());
        let noted = self.journal.notes(function).then(|| args.clone());
        Ok(given.0.caller.call(function, args).map(move |result| {
            if let Some(pool) = pool.upgrade() {
                match (&result, noted) {
                    (Ok(answer), Some(args)) => pool.journal.note(&args, answer),
                    (Ok(_), None) => {}
                    (Err(error), _) => pool.returned(&given.0, error),
                }
            }
            result
        }))
    }

    /// Has all executors do something; gives what they answer.
    fn tell_all(&self, told: Told, function: ExecutorAddr, args: &[u8]) -> Result<Vec<u8>, Error> {
        if told == Told::Open {
            self.before_opening(args)?;
        }
        if !told.takes_back() {
            self.revive_all()?;
        }
        let _inside = self.enter()?;
        let timeout = self.timeout;
        // What is told in order is told to all before anything else of that kind.
        let _order = told.is_ordered().then(|| self.order.lock().unwrap_or_else(PoisonError::into_inner));
        let live = self.live();
        let calls: Vec<_> = live.iter().map(|running| running.caller.call(function, args.to_vec())).collect();
        let deadline = Instant::now() + timeout;
        let wait = |call: Pending<Result<Vec<u8>, CallError>>| match told {
            // Linked code takes as long as it takes.
            Told::Initialize => call.wait(),
            _ => {
                let left = deadline.saturating_duration_since(Instant::now());
                let late = || Err(CallError::TimedOut { function: "a step of the protocol", timeout });
                call.wait_timeout(left).unwrap_or_else(late)
            }
        };
        let answers: Vec<_> = calls.into_iter().map(wait).collect();
        let answer = self.agreed(&live, answers);
        match answer {
            Ok(answer) => {
                self.journal.record(told, function, args, &answer);
                Ok(answer)
            }
            // What has gone with all executors need not be taken back from them.
            Err(CallError::Disconnected(_)) if told.takes_back() => {
                let answer = to_bytes(&SpsError(Ok(())));
                self.journal.record(told, function, args, &answer);
                Ok(answer)
            }
            Err(error) => {
                self.journal.give_up(told, args);
                Err(error.into())
            }
        }
    }

    /// Returns the answer of the first executor that has one. Those that answer otherwise are not alike: they are ended.
    fn agreed(&self, live: &[Arc<Running>], answers: Vec<Result<Vec<u8>, CallError>>) -> Result<Vec<u8>, CallError> {
        let first = answers.iter().position(Result::is_ok);
        for (running, answer) in live.iter().zip(&answers) {
            let is_other = match (first, answer) {
                (_, Err(CallError::Disconnected(_))) => {
                    self.note_end(running);
                    false
                }
                (Some(first), answer) => answer.as_ref().ok() != answers[first].as_ref().ok(),
                (None, _) => false,
            };
            if is_other {
                running.process.signal(Signal::KILL);
            }
        }
        match first {
            Some(first) => answers.into_iter().nth(first).expect("its position was found"),
            None => answers.into_iter().next().unwrap_or_else(|| Err(self.reason())),
        }
    }

    /// Sees to it that a library which is about to be opened is at one address in all executors.
    fn before_opening(&self, args: &[u8]) -> Result<(), Error> {
        if !self.journal.has_begun() {
            return self.open_beforehand(args);
        }
        if self.size() > 1 && path_of(args).is_some_and(|path| !path.is_empty()) {
            return Err(cannot("shared libraries have to be added before the first lookup, to be the same in all"));
        }
        Ok(())
    }
}

/// Returns an error as those who call executors expect it.
fn call_error(error: Error) -> CallError {
    match error {
        Error::Call(error) => error,
        error => CallError::OutOfBand(error.to_string()),
    }
}

impl Caller for Pool {
    fn call(&self, function: ExecutorAddr, args: Vec<u8>) -> Pending<Result<Vec<u8>, CallError>> {
        match self.journal.kind(function) {
            Some(told) => Pending::ready(self.tell_all(told, function, &args).map_err(call_error)),
            None => self.tell_one(function, args).unwrap_or_else(|error| Pending::ready(Err(call_error(error)))),
        }
    }

    fn send_descriptor(&self, descriptor: BorrowedFd<'_>) -> Result<u64, CallError> {
        let failed = |error: std::io::Error| CallError::OutOfBand(format!("a descriptor cannot be kept: {error}"));
        let kept = descriptor.try_clone_to_owned().map_err(failed)?;
        // Who takes a place after this gets what is kept.
        let _inside = self.enter().map_err(call_error)?;
        let tag = self.next_tag();
        for running in self.live() {
            match running.process.endpoint().send_descriptor_as(tag, descriptor) {
                Ok(()) | Err(CallError::Disconnected(_)) => {}
                Err(error) => return Err(error),
            }
        }
        self.journal.keep(tag, kept);
        Ok(tag)
    }
}

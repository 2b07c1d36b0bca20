//! Telling a new executor what all have been told.

use super::{Journal, Reservation, Resolved, State};
use crate::Error;
use crate::pool::cannot;
use crate::relink::Moved;
use farlink_addr::ExecutorAddr;
use farlink_rpc::{Callee, Executor};
use farlink_wire::functions::{
    Expected, HARDEN, RESOLVE, RUN_INITIALIZERS, SHARED_INITIALIZE_BATCH, SHARED_MAP_AT, TLS_CLOSE, TLS_OPEN,
};
use farlink_wire::msg::TlsTemplate;
use farlink_wire::sps::{Blob, SpsError};
use std::collections::BTreeMap;
use std::os::fd::OwnedFd;

/// Reservations that an executor is told of at once: it does not keep any number of descriptors that wait.
const MAPPED_AT_ONCE: usize = 16;

impl Journal {
    /// Tells an executor everything, up to running initializers.
    ///
    /// # Errors
    ///
    /// Fails if it cannot do something, or answers otherwise than those before it did.
    pub(crate) fn replay(
        &self,
        executor: &Executor,
        send: &dyn Fn(u64, &OwnedFd) -> Result<(), Error>,
        tag: &mut dyn FnMut() -> u64,
        relink: &dyn Fn(&Moved) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let mut state = self.lock();
        if state.is_broken {
            return Err(cannot("what was linked could not be put right before"));
        }
        let resolved = state.open_libraries(executor)?;
        state.check_moved(resolved, relink)?;
        // What calls are about to name.
        state.descriptors.iter().try_for_each(|(&tag, object)| send(tag, object))?;
        let map = executor.bind(SHARED_MAP_AT)?;
        let reservations: Vec<_> = state.reservations.iter().collect();
        for some in reservations.chunks(MAPPED_AT_ONCE) {
            // All of these are on their way before the first answer is waited for.
            let mut mapped = Vec::with_capacity(some.len());
            for &(&base, Reservation { object, bytes, stripes }) in some {
                let tag = tag();
                send(tag, object)?;
                mapped.push((base, map.call(&(self.instance, tag, *bytes, stripes.clone(), base))));
            }
            for (base, answer) in mapped {
                let why = match answer.wait()? {
                    Ok(mapped) if mapped == base => continue,
                    Ok(other) => format!("it is at {other}"),
                    Err(text) => text,
                };
                return Err(cannot(format!(
                    "memory at {base}, which linked code counts on, cannot be had in a new executor: {why}"
                )));
            }
        }
        if let Some(args) = &state.lock {
            let locked = executor.bind(HARDEN)?.call_encoded(args.clone()).wait()?;
            locked.map_err(|text| cannot(format!("a new executor cannot lock itself: {text}")))?;
        }
        for (function, args) in &state.settings {
            let set = executor.callee::<(), SpsError>("a setting", *function).call_encoded(args.clone()).wait()?;
            set.0.map_err(cannot)?;
        }
        state.open_modules(executor)?;
        state.finalize(self.instance, executor)?;
        let initialize = executor.bind(RUN_INITIALIZERS)?;
        state.initializers.iter().try_for_each(|request| initialize.call(request).wait()?.0.map_err(cannot))
    }
}

impl State {
    /// Opens the shared libraries, which fails if they have other handles; gives what names mean now.
    fn open_libraries(&self, executor: &Executor) -> Result<Resolved, Error> {
        for (function, args, handle) in &self.opened {
            let open = executor.callee::<(), Expected<ExecutorAddr>>("open a library", *function);
            if open.call_encoded(args.clone()).wait()? != Ok(*handle) {
                return Err(cannot("a shared library cannot be opened again as it was".to_owned()));
            }
        }
        let mut by_libraries: BTreeMap<&[ExecutorAddr], Vec<&String>> = BTreeMap::new();
        for (libraries, name) in self.resolved.keys() {
            by_libraries.entry(libraries).or_default().push(name);
        }
        let mut resolved = Resolved::new();
        for (libraries, names) in by_libraries {
            let asked = (libraries.to_vec(), names.iter().map(|name| (*name).clone()).collect());
            let found = executor.bind(RESOLVE)?.call(&asked).wait()?.map_err(cannot)?;
            let keys = names.into_iter().map(|name| (libraries.to_vec(), name.clone()));
            resolved.extend(keys.zip(found));
        }
        Ok(resolved)
    }

    /// Has linked code refer to what names mean now.
    fn check_moved(&mut self, resolved: Resolved, relink: &dyn Fn(&Moved) -> Result<(), Error>) -> Result<(), Error> {
        let mut moved = Moved::new();
        for (key, old) in &self.resolved {
            let new = resolved.get(key).copied().flatten();
            match (*old, new) {
                (Some(old), Some(new)) if old != new => drop(moved.insert((key.1.clone(), old), new)),
                (Some(_), None) => return Err(cannot(format!("{} is in no library of a new executor", key.1))),
                _ => {}
            }
        }
        if !moved.is_empty() {
            // Some of it may have been done: then no address is known to be right.
            relink(&moved).inspect_err(|_| self.is_broken = true)?;
        }
        self.resolved = resolved;
        Ok(())
    }

    /// Makes the modules of thread-local variables, with the numbers that they have. The dynamic linker gives the lowest
    /// that is free, so what has gone meanwhile is stood for by another module until all are there.
    fn open_modules(&self, executor: &Executor) -> Result<(), Error> {
        if self.modules.is_empty() {
            return Ok(());
        }
        let (open, close) = (executor.bind(TLS_OPEN)?, executor.bind(TLS_CLOSE)?);
        let filler = TlsTemplate { content: Blob::default(), size: 8, align: 8, is_static: false, users: 1 };
        let mut fillers = Vec::new();
        let moved = || cannot("thread-local variables of linked code have another place in a new executor".to_owned());
        for module in self.modules.values() {
            loop {
                let (handle, place) = open.call(&module.template).wait()?.map_err(cannot)?;
                if place == module.place {
                    break;
                }
                close_module(&close, handle, module.template.users)?;
                if place.module >= module.place.module {
                    return Err(moved());
                }
                fillers.push(open.call(&filler).wait()?.map_err(cannot)?.0);
            }
        }
        fillers.into_iter().try_for_each(|handle| close_module(&close, handle, 1))
    }

    fn finalize(&self, instance: ExecutorAddr, executor: &Executor) -> Result<(), Error> {
        if self.allocations.is_empty() {
            return Ok(());
        }
        let requests: Vec<_> = self.allocations.values().cloned().collect();
        let keys = executor.bind(SHARED_INITIALIZE_BATCH)?.call(&(instance, requests)).wait()?.map_err(cannot)?;
        if keys.len() != self.allocations.len() {
            return Err(cannot("a new executor has not finalized what it was asked to".to_owned()));
        }
        Ok(())
    }
}

/// Has a module go that has been closed by none of its users.
fn close_module(close: &Callee<(ExecutorAddr,), SpsError>, handle: ExecutorAddr, users: u64) -> Result<(), Error> {
    (0..users.max(1)).try_for_each(|_| close.call(&(handle,)).wait()?.0.map_err(cannot))
}

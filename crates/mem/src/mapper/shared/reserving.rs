//! Reserving: a memory object for each reservation, made here or by the executor, and its stripes.

use super::{Backing, Inner, Map, MapObject, MapObjectAt};
use crate::Error;
use crate::mapper::posix::{attach, take, unlink_orphans};
use crate::mapper::view::View;
use crate::mapper::{bad_answer, check_keys, check_reserved, refused};
use crate::service::nameless_error;
use crate::sys::{Place, SharedObject};
use farlink_addr::{ExecutorAddr, ExecutorAddrRange};
use farlink_rpc::{CallError, Executor, Pending};
use farlink_wire::functions::Expected;
use farlink_wire::msg::{SharedFinalizeRequest, SharedSegment, Stripe};
use std::collections::hash_map::RandomState;
use std::hash::BuildHasher;
use std::sync::Arc;
use std::sync::atomic::Ordering;

impl Inner {
    /// Returns `bytes` in whole pages, if there are any.
    pub(super) fn whole_pages(&self, bytes: u64) -> Result<u64, Error> {
        let rounded = self.page_size.round_up(bytes).filter(|&bytes| bytes != 0);
        rounded.ok_or(Error::BadSize { what: "reserved", bytes })
    }

    /// Takes the executor's answer to a reserve call: the base, and the object behind the reservation or why there is
    /// none.
    fn reserved(&self, bytes: u64, base: ExecutorAddr, view: Result<View, Error>) -> Result<ExecutorAddrRange, Error> {
        let attached = view.and_then(|view| {
            let range = check_reserved(base, bytes, self.page_size)?;
            self.views.add(range, view).map(|()| range)
        });
        // The executor has reserved what cannot be used here. What it says to giving it back adds nothing. A base that
        // is in use stays: it is another's.
        if attached.is_err() && !base.is_null() && !self.views.has(base) {
            let _ = self.release.call(&(self.instance, vec![base])).wait();
        }
        attached
    }

    /// Reserves `bytes`, whole pages, in these stripes if there are any.
    pub(super) fn reserve(
        self: &Arc<Self>,
        bytes: Result<u64, Error>,
        stripes: impl FnOnce(u64) -> Vec<Stripe>,
    ) -> Pending<Result<ExecutorAddrRange, Error>> {
        let reserve = |bytes| {
            let stripes = stripes(bytes);
            match &self.backing {
                Backing::Nameless { executor, map: Map::Anywhere(map), ends_writing } => {
                    self.reserve_nameless(bytes, stripes, executor, map, *ends_writing)
                }
                Backing::Nameless { executor, map: Map::At { map, limit }, ends_writing } => {
                    let made = make(bytes, stripes, *ends_writing)?;
                    Ok(Pending::ready(self.reserve_at(bytes, made, executor, (map, *limit), *ends_writing)))
                }
                Backing::Named { reserve, asked, .. } => {
                    asked.fetch_add(1, Ordering::Relaxed);
                    let inner = Arc::clone(self);
                    Ok(reserve.call(&(self.instance, bytes)).map(move |answer| {
                        let range = inner.reserved_named(bytes, stripes.clone(), answer)?;
                        inner.protect(range, &stripes).inspect_err(|_| inner.unreserve(range)).map(|()| range)
                    }))
                }
            }
        };
        bytes.and_then(reserve).unwrap_or_else(|error| Pending::ready(Err(error)))
    }

    fn reserve_nameless(
        self: &Arc<Self>,
        bytes: u64,
        stripes: Vec<Stripe>,
        executor: &Executor,
        map: &MapObject,
        ends_writing: bool,
    ) -> Result<Pending<Result<ExecutorAddrRange, Error>>, Error> {
        let view = make(bytes, stripes.clone(), ends_writing)?;
        let descriptor = view.object.as_ref().map(SharedObject::as_fd);
        let tag = executor.send_descriptor(descriptor.expect("it has just been made"))?;
        let inner = Arc::clone(self);
        Ok(map.call(&(self.instance, tag, bytes, stripes)).map(move |answer| {
            let base = answer?.map_err(refused("map shared memory"))?;
            inner.reserved(bytes, base, end_writing(view, ends_writing))
        }))
    }

    /// Reserves at an address of this process's choice, which the system has nothing at in any executor.
    fn reserve_at(
        &self,
        bytes: u64,
        view: View,
        executor: &Executor,
        (map, limit): (&MapObjectAt, Option<ExecutorAddr>),
        ends_writing: bool,
    ) -> Result<ExecutorAddrRange, Error> {
        let mut failed = Error::OutOfAddressSpace { bytes };
        for base in bases(bytes, limit) {
            // The tag of a descriptor is for one call.
            let descriptor = view.object.as_ref().map(SharedObject::as_fd);
            let tag = executor.send_descriptor(descriptor.expect("it has just been made"))?;
            match map.call(&(self.instance, tag, bytes, view.stripes.clone(), base)).wait()? {
                Ok(mapped) if mapped == base => return self.reserved(bytes, base, end_writing(view, ends_writing)),
                Ok(elsewhere) => return Err(bad_answer("reserve", format!("{elsewhere} instead of {base}"))),
                Err(text) => failed = refused("map shared memory")(text),
            }
        }
        Err(failed)
    }

    fn reserved_named(
        &self,
        bytes: u64,
        stripes: Vec<Stripe>,
        answer: Result<Expected<(ExecutorAddr, String)>, CallError>,
    ) -> Result<ExecutorAddrRange, Error> {
        if let (Err(CallError::Disconnected(_)), Backing::Named { pid, asked, .. }) = (&answer, &self.backing) {
            unlink_orphans(*pid, asked.load(Ordering::Relaxed));
        }
        let (base, name) = answer?.map_err(refused("reserve shared memory"))?;
        // The object comes first: its name has to go whatever else is wrong.
        let view = take(&name).and_then(|object| attach(object, &name, bytes, stripes));
        self.reserved(bytes, base, view)
    }

    /// Gives each stripe of a reservation its protection, for good: they are the segments of an allocation that ends with
    /// the reservation.
    fn protect(&self, range: ExecutorAddrRange, stripes: &[Stripe]) -> Result<(), Error> {
        let Backing::Named { reserves_writable, .. } = self.backing else { return Ok(()) };
        // What is left as it was reserved is not copied for children.
        let is_done = |stripe: &&Stripe| reserves_writable && stripe.shared_with_children;
        let segment = |stripe: &Stripe| {
            let addr = range.start().checked_add(stripe.offset)?;
            Some(SharedSegment { group: stripe.group, addr, size: stripe.size })
        };
        let segments: Vec<_> = stripes.iter().filter(|stripe| !is_done(stripe)).filter_map(segment).collect();
        if segments.is_empty() {
            return Ok(());
        }
        let request = SharedFinalizeRequest { segments, actions: Vec::new() };
        let key = self.initialize.call(&(self.instance, range.start(), request)).wait()?;
        let key = key.map_err(refused("protect stripes"))?;
        check_keys(vec![key], &[range.start()]).map(|_| ())
    }

    /// Gives back a reservation that cannot be used.
    fn unreserve(&self, range: ExecutorAddrRange) {
        let _ = self.views.remove(&[range.start()]);
        // What the executor says to that adds nothing.
        let _ = self.release.call(&(self.instance, vec![range.start()])).wait();
    }
}

/// How many addresses are tried for a reservation, at random: nothing is near them as a rule.
const MAX_BASES_TRIED: usize = 8;

/// Returns addresses for a reservation, at random in the middle of the address space, far from where the system puts programs
/// and libraries; or all that come into question below a limit.
fn bases(bytes: u64, limit: Option<ExecutorAddr>) -> Box<dyn Iterator<Item = ExecutorAddr>> {
    const LOWEST: u64 = 16 << 40;
    const HIGHEST: u64 = 80 << 40;
    const STEP: u64 = 2 << 20;
    const LOWEST_BELOW: u64 = 256 << 20;
    const STEP_BELOW: usize = 64 << 20;
    if let Some(limit) = limit {
        let last = limit.as_u64().saturating_sub(bytes);
        return Box::new((LOWEST_BELOW..=last).step_by(STEP_BELOW).map(ExecutorAddr::new));
    }
    // Seeded by the system.
    let random = move || RandomState::new().hash_one(bytes);
    let base = move || ExecutorAddr::new((LOWEST + random() % (HIGHEST - LOWEST)) / STEP * STEP);
    Box::new(std::iter::repeat_with(base).take(MAX_BASES_TRIED))
}

/// Has nobody map an object to be written any more, if that is wanted.
fn end_writing(view: View, ends: bool) -> Result<View, Error> {
    let ended = match &view.object {
        Some(object) if ends => object.end_writing(),
        _ => Ok(()),
    };
    ended.map_err(|error| Error::system("shared memory cannot be sealed", error)).map(|()| view)
}

/// Makes an object without a name, and maps it.
fn make(bytes: u64, stripes: Vec<Stripe>, ends_writing: bool) -> Result<View, Error> {
    let make = if ends_writing { SharedObject::nameless_for_a_while } else { SharedObject::nameless };
    let object = make(bytes).map_err(|error| nameless_error(error, bytes))?;
    let length = usize::try_from(bytes).map_err(|_| Error::OutOfAddressSpace { bytes })?;
    let mapping = object.map(length, Place::Anywhere).map_err(|_| Error::OutOfAddressSpace { bytes })?;
    Ok(View::new(Some(object), Arc::new(mapping), None, stripes))
}

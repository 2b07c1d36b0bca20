//! Directories: how the executor finds linked code by its address, without having been told of any object.

use super::space::DirectoryPlace;
use super::{FinalizedAlloc, InFlightAlloc, Inner, MemoryManager};
use crate::directory::Directory;
use crate::{Error, FinalizeRequest, FinalizeSegment};
use farlink_addr::{AllocGroup, ExecutorAddr, ExecutorAddrRange, MemProt};
use farlink_rpc::Pending;
use farlink_wire::msg::ActionPair;
use std::sync::Arc;

/// Makes the actions by which an executor begins and ceases to use a directory of a reservation's code: of the stripe of code,
/// the table, and the stripe of read-only data.
pub type DirectoryActions =
    Arc<dyn Fn(ExecutorAddrRange, ExecutorAddrRange, ExecutorAddrRange) -> ActionPair + Send + Sync>;

impl MemoryManager {
    /// Makes sure that code of `alloc` can be published once it is finalized; gives whether it can: not while another thread
    /// tells the executor of the directory. Makes a call to the executor the first time in a reservation.
    pub fn prepare_to_publish(&self, alloc: &InFlightAlloc) -> Pending<Result<bool, Error>> {
        let Some(place) = alloc.taken.as_ref().and_then(|taken| taken.place.as_ref()) else {
            return Pending::ready(Ok(false));
        };
        let Some(actions) = &self.inner.directory_actions else { return Pending::ready(Ok(false)) };
        let base = place.reservation;
        let taken = {
            let mut state = self.inner.lock();
            match state.reservations.get_mut(&base) {
                Some(reservation) if reservation.directory.is_some() => return Pending::ready(Ok(true)),
                Some(reservation) if !reservation.is_telling => {
                    reservation.is_telling = reservation.directory_place.is_some();
                    reservation.directory_place
                }
                _ => None,
            }
        };
        let Some(taken) = taken else { return Pending::ready(Ok(false)) };
        self.inner.make_directory(base, taken, actions(taken.code, taken.table, taken.indexes))
    }

    /// Has the executor find the code of `alloc`, with the index at `index`, which is in its read-only data and begins with
    /// room for [`INDEX_LINK_BYTES`](crate::INDEX_LINK_BYTES). No call is made.
    ///
    /// # Errors
    ///
    /// Fails if that has not been prepared, or the allocation has no code.
    pub fn publish(&self, alloc: &mut FinalizedAlloc, index: ExecutorAddr) -> Result<(), Error> {
        let code = alloc.code().filter(|code| !code.is_empty()).ok_or(Error::NoSegments)?;
        let base = alloc.reservation;
        let mut state = self.inner.lock();
        let directory = state.reservations.get_mut(&base).and_then(|reservation| reservation.directory.as_mut());
        directory.ok_or(Error::UnknownReservation(base))?.add(code, index)?;
        alloc.is_published = true;
        Ok(())
    }
}

impl FinalizedAlloc {
    /// Returns where its code is.
    fn code(&self) -> Option<ExecutorAddrRange> {
        let code = self.parts().into_iter().find(|(group, _)| group.prot.contains(MemProt::EXEC));
        code.map(|(_, range)| range)
    }
}

impl Inner {
    fn make_directory(
        self: &Arc<Self>,
        base: ExecutorAddr,
        place: DirectoryPlace,
        actions: ActionPair,
    ) -> Pending<Result<bool, Error>> {
        let group = AllocGroup::standard(MemProt::READ);
        // Nothing is written to the table now; most of it never is.
        let content = self.mapper.prepare(ExecutorAddrRange::at(place.table.start()));
        let views = content.map(|working| Some((working, self.mapper.view(place.indexes)?)));
        let (working, view) = match views {
            Ok(Some(views)) => views,
            Ok(None) => return Pending::ready(Ok(self.told(base, None))),
            Err(error) => {
                self.told(base, None);
                return Pending::ready(Err(error));
            }
        };
        let segment = FinalizeSegment { group, range: place.table, content_bytes: 0, working };
        let request = FinalizeRequest { reservation: base, segments: vec![segment], actions: vec![actions] };
        let inner = Arc::clone(self);
        self.mapper.finalize(vec![request]).map(move |finalized| {
            let directory = || Directory::new(base, place.table.start(), place.indexes, view);
            let told = finalized.map(|_| directory());
            match told {
                Ok(directory) => Ok(inner.told(base, directory)),
                // What the executor knows is not known; nobody is to try again then.
                Err(error) if error.leaves_unknown() => Err(error),
                Err(error) => {
                    inner.told(base, None);
                    Err(error)
                }
            }
        })
    }

    /// Keeps the directory that the executor has been told of, or none if it could not be; gives whether there is one.
    fn told(&self, base: ExecutorAddr, directory: Option<Directory>) -> bool {
        let is_there = directory.is_some();
        if let Some(reservation) = self.lock().reservations.get_mut(&base) {
            (reservation.is_telling, reservation.directory) = (false, directory);
        }
        is_there
    }

    /// Has code found no more, before its memory is free.
    pub(super) fn withdraw(&self, allocs: &[FinalizedAlloc]) {
        let mut published = allocs.iter().filter(|alloc| alloc.is_published).peekable();
        if published.peek().is_none() {
            return;
        }
        let mut state = self.lock();
        for alloc in published {
            let reservation = state.reservations.get_mut(&alloc.reservation);
            let directory = reservation.and_then(|reservation| reservation.directory.as_mut());
            if let (Some(directory), Some(code)) = (directory, alloc.code()) {
                // The words are in the stripe: that was found out when they were added.
                let _ = directory.remove(code.start());
            }
        }
    }
}

//! What a service takes of the system, and copies of its memory for children.

use super::MemoryService;
use super::slabs::Backing;
use crate::Error;
use crate::sys::{self, Snapshot};
use farlink_addr::MemProt;

/// A copy of shared memory, made before a fork for the child.
#[derive(Debug)]
pub struct ChildCopy(Vec<Snapshot>);

impl ChildCopy {
    /// Puts the copy in place of the shared memory. Only for a child that has just been forked: it has one thread.
    ///
    /// # Errors
    ///
    /// Fails if the system has no room; then part of the memory is still shared.
    pub fn install(self) -> Result<(), Error> {
        let failed = |error| Error::system("the copy of linked data cannot be put in place", error);
        self.0.into_iter().try_for_each(|snapshot| snapshot.install().map_err(failed))
    }
}

/// What a service holds of the system.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct ServiceUsage {
    /// Number of slabs.
    pub slabs: u64,
    /// Bytes of address space in them.
    pub reserved_bytes: u64,
    /// Bytes of physical memory behind them.
    pub committed_bytes: u64,
    /// Mappings that they consist of, guards included.
    pub mappings: u64,
}

impl MemoryService {
    /// Copies the shared memory that linked code can write, for a child that is about to be forked. What children share
    /// is not copied.
    ///
    /// # Errors
    ///
    /// Fails if there is no memory for the copy.
    pub fn copy_for_child(&self) -> Result<ChildCopy, Error> {
        let state = self.lock();
        let mut snapshots = Vec::new();
        for slab in state.slabs.values() {
            let Backing::Shared { object, .. } = &slab.backing else { continue };
            for range in slab.copied_on_fork() {
                let failed = |error| Error::system("linked data cannot be copied for a child", error);
                snapshots.push(Snapshot::take(&slab.mapping, object, range).map_err(failed)?);
            }
        }
        Ok(ChildCopy(snapshots))
    }

    /// Has the parts of slabs that this process cannot write stay as they are mapped, for as long as it lives.
    ///
    /// # Errors
    ///
    /// Fails if the system cannot do that.
    pub fn seal(&self) -> Result<(), Error> {
        let failed = |error| Error::system("mappings cannot be sealed", error);
        let state = self.lock();
        state.slabs.values().try_for_each(|slab| {
            let fixed = slab.stripes.iter().filter(|(stripe, _)| !stripe.group.prot.contains(MemProt::WRITE));
            { fixed }.try_for_each(|&(_, range)| slab.mapping.seal(range)).map_err(failed)
        })
    }

    /// Returns what this service holds of the system.
    ///
    /// # Errors
    ///
    /// Fails if the system does not tell.
    pub fn usage(&self) -> Result<ServiceUsage, Error> {
        let unknown = |error| Error::system("memory cannot be examined", error);
        let state = self.lock();
        let mut usage = ServiceUsage::default();
        for slab in state.slabs.values() {
            let range = slab.mapping.range();
            usage.slabs += 1;
            usage.reserved_bytes += range.len();
            usage.committed_bytes += match &slab.backing {
                Backing::Shared { object, .. } => object.committed_bytes().map_err(unknown)?,
                Backing::Private { object: None } => slab.mapping.resident_bytes(range).map_err(unknown)?,
                Backing::Private { object: Some(object) } => {
                    let own = slab.data().map(|range| slab.mapping.resident_bytes(range)).sum::<Result<u64, _>>();
                    own.and_then(|own| Ok(own + object.committed_bytes()?)).map_err(unknown)?
                }
            };
        }
        let ranges: Vec<_> = state.slabs.values().map(|slab| slab.mapping.range()).collect();
        drop(state);
        usage.mappings =
            sys::count_mappings(&ranges).map_err(|error| Error::system("mappings cannot be read", error))?;
        Ok(usage)
    }
}

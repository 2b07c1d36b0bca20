//! Executors that linked code cannot make more of: see [`SessionBuilder::harden`](crate::SessionBuilder::harden).
//!
//! The executor does most of it. What has to be done here: its memory is such that nobody can map code to be written once
//! the executor has mapped it, and the memory for code is reserved before the executor is locked, since it maps no more code
//! after that.

use crate::session::{Session, SessionInner};
use crate::{Error, SessionBuilder};
use farlink_addr::{Align, AllocGroup, MemProt};
use farlink_mem::SegmentLayout;
use farlink_wire::functions::{HARDEN, HARDEN_SANDBOX, SHARED_INSTANCE};
use std::sync::OnceLock;

/// Something that keeps linked code from making more code, or from reaching out of its process.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Measure {
    /// What it is.
    pub name: String,
    /// Why it could not be taken; none if it has been.
    pub problem: Option<String>,
}

/// What a session wants of its executor, and what has become of it.
#[derive(Debug, Default)]
pub(crate) struct Hardening {
    pub(crate) is_wanted: bool,
    pub(crate) is_sandboxed: bool,
    done: OnceLock<Result<Vec<Measure>, Error>>,
}

impl Hardening {
    pub(crate) fn new(is_wanted: bool, is_sandboxed: bool) -> Self {
        Self { is_wanted, is_sandboxed, done: OnceLock::new() }
    }
}

/// Returns that an executor cannot be locked.
pub(crate) fn refused(text: impl Into<String>) -> Error {
    Error::Refused { operation: "lock itself", text: text.into() }
}

impl SessionInner {
    /// Locks the executor, if that is wanted and has not been done.
    pub(crate) fn lock_executor(&self) -> Result<&[Measure], Error> {
        if !self.hardening.is_wanted {
            return Ok(&[]);
        }
        let done = self.hardening.done.get_or_init(|| self.harden().map_err(|error| self.explain(error)));
        done.as_deref().map_err(Clone::clone)
    }

    fn harden(&self) -> Result<Vec<Measure>, Error> {
        let executor = self.runtime()?.executor();
        if !executor.offers(HARDEN) {
            return Err(refused("it is not farlink's"));
        }
        // Reserves, and gives back: one reservation that nothing is in is kept.
        let code = SegmentLayout {
            group: AllocGroup::standard(MemProt::RX),
            content_bytes: 1,
            zero_fill_bytes: 0,
            align: Align::ONE,
        };
        drop(self.memory.allocate(vec![code]).wait()?);
        let flags = if self.hardening.is_sandboxed { HARDEN_SANDBOX } else { 0 };
        let instance = executor.object(SHARED_INSTANCE)?;
        let measures = self.runtime()?.protocol().bind(HARDEN)?.call(&(instance, flags)).wait()?.map_err(refused)?;
        let measure =
            |(name, problem): (String, String)| Measure { name, problem: Some(problem).filter(|p| !p.is_empty()) };
        Ok(measures.into_iter().map(measure).collect())
    }
}

impl SessionBuilder {
    /// Has an executor that [`Self::spawn`] starts locked before anything is linked: from then on no memory becomes
    /// executable in it but what this session links, no other program runs, and the memory, descriptors and signals of other
    /// processes are out of reach ([`Session::lock`] says what the system could do of that).
    ///
    /// Shared libraries have to be added before the first lookup. Linked code has one reservation
    /// ([`Self::reservation_bytes`]), and no pages of it go back to the system. Needs memory that is shared without a name,
    /// as it is unless something else is chosen.
    #[must_use]
    pub fn harden(mut self, hardens: bool) -> Self {
        self.is_hardened = hardens;
        self
    }

    /// As [`Self::harden`], and linked code opens no files and no connections.
    #[must_use]
    pub fn sandbox(mut self, sandboxes: bool) -> Self {
        self.is_sandboxed = sandboxes;
        self
    }

    pub(crate) fn hardening(&self) -> Hardening {
        Hardening::new(self.is_hardened || self.is_sandboxed, self.is_sandboxed)
    }
}

impl Session {
    /// Locks a hardened executor before something is linked, which does it too; gives what has been done. Nothing if the
    /// executor is not to be hardened.
    ///
    /// # Errors
    ///
    /// Fails if the executor cannot be locked.
    pub fn lock(&self) -> Result<Vec<Measure>, Error> {
        self.inner().lock_executor().map(<[Measure]>::to_vec)
    }
}

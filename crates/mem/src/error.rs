//! How memory operations fail.

use farlink_addr::{ExecutorAddr, ExecutorAddrRange};
use farlink_rpc::CallError;
use std::fmt;

/// What to do when shared memory cannot be had.
const WAY_OUT: &str =
    "use memory without a name (--memory shared) or memory that is sent in messages (--memory remote)";

/// Why an operation on an executor's memory failed.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A size that is zero, or above what an address space has.
    #[error("{bytes} bytes cannot be {what}")]
    BadSize {
        /// What was to be done.
        what: &'static str,
        /// The size in bytes.
        bytes: u64,
    },
    /// The executor has no address space of that size.
    #[error("no {bytes} bytes of address space are left")]
    OutOfAddressSpace {
        /// The size in bytes.
        bytes: u64,
    },
    /// An address that no reservation of this session begins at.
    #[error("{0} is not the base of a reservation")]
    UnknownReservation(ExecutorAddr),
    /// An address that no finalized allocation begins at.
    #[error("{0} is not the key of an allocation")]
    UnknownAllocation(ExecutorAddr),
    /// A range that is not inside one reservation.
    #[error("{0} is not inside one reservation")]
    OutsideReservation(ExecutorAddrRange),
    /// A range that another allocation or segment has.
    #[error("{0} overlaps {1}, which is allocated")]
    Overlap(ExecutorAddrRange, ExecutorAddrRange),
    /// A segment that does not begin at a page boundary.
    #[error("the segment at {0} does not begin at a page boundary")]
    Misaligned(ExecutorAddr),
    /// A segment with more content than bytes.
    #[error("the segment at {addr} has {content} bytes of content but only {size} bytes")]
    ContentTooLong {
        /// The segment's address.
        addr: ExecutorAddr,
        /// Bytes of content.
        content: u64,
        /// Bytes of the segment.
        size: u64,
    },
    /// A request without segments.
    #[error("an allocation without segments cannot be finalized")]
    NoSegments,
    /// An address given twice, or one that another thread is working on.
    #[error("{0} is in use by another operation")]
    Busy(ExecutorAddr),
    /// A segment's protection could not be changed.
    #[error("segment {range} cannot be made {prot}: {text}")]
    Protect {
        /// The segment.
        range: ExecutorAddrRange,
        /// The protection asked for.
        prot: farlink_addr::MemProt,
        /// What the system says.
        text: String,
    },
    /// Actions failed.
    #[error("{0}")]
    Actions(String),
    /// Shared memory could not be had.
    #[error("shared memory {name} cannot be {what}: {text}; {WAY_OUT}")]
    SharedMemory {
        /// The object, or /dev/shm.
        name: String,
        /// What was to be done.
        what: &'static str,
        /// What the system says.
        text: String,
    },
    /// A system call failed.
    #[error("{what}: {text}")]
    System {
        /// What was to be done.
        what: &'static str,
        /// What the system says.
        text: String,
    },
    /// The executor refused an operation.
    #[error("the executor cannot {what}: {text}")]
    Refused {
        /// What was asked.
        what: &'static str,
        /// What it answered.
        text: String,
    },
    /// The executor answered with something that cannot be.
    #[error("the executor's answer to {what} cannot be: {text}")]
    BadAnswer {
        /// What was asked.
        what: &'static str,
        /// What is wrong with the answer.
        text: String,
    },
    /// The executor could not be called.
    #[error(transparent)]
    Call(#[from] CallError),
    /// A write or read past the end of working memory.
    #[error("{len} bytes at offset {offset:#x} are outside working memory of {size} bytes")]
    OutOfBounds {
        /// Offset of the access in bytes.
        offset: u64,
        /// Length of the access in bytes.
        len: u64,
        /// Length of the working memory in bytes.
        size: u64,
    },
    /// An alignment that no reservation can be relied on to have.
    #[error("an alignment of {0} bytes is above the largest supported, 2 MiB")]
    Alignment(u64),
    /// The executor's memory is not shared with this process.
    #[error("the executor's memory is reached by messages only: it has no buffers that both processes see")]
    NotShared,
    /// The service has been shut down.
    #[error("the memory service has been shut down")]
    ShutDown,
}

impl Error {
    /// Returns whether the connection to the executor has ended.
    #[must_use]
    pub fn is_disconnected(&self) -> bool {
        matches!(self, Self::Call(CallError::Disconnected(_)))
    }

    /// Returns which function of the executor did not return in time, and how long it was waited for, if that is it.
    #[must_use]
    pub fn timed_out(&self) -> Option<(&'static str, std::time::Duration)> {
        match self {
            Self::Call(CallError::TimedOut { function, timeout }) => Some((function, *timeout)),
            _ => None,
        }
    }

    pub(crate) fn system(what: &'static str, error: impl fmt::Display) -> Self {
        Self::System { what, text: error.to_string() }
    }

    pub(crate) fn shared(name: &str, what: &'static str, error: impl fmt::Display) -> Self {
        Self::SharedMemory { name: format!("/dev/shm{name}"), what, text: error.to_string() }
    }
}

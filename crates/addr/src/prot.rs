//! Protections and lifetimes, and the group that has both in common (ORC: `AllocGroup`).

use bitflags::bitflags;
use std::fmt;

bitflags! {
    /// What the executor may do with memory. The bits are those of LLVM's `MemProt`.
    #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
    pub struct MemProt: u8 {
        /// Reading.
        const READ = 1;
        /// Writing.
        const WRITE = 2;
        /// Executing.
        const EXEC = 4;
    }
}

impl MemProt {
    /// Reading and writing.
    pub const RW: Self = Self::READ.union(Self::WRITE);
    /// Reading and executing.
    pub const RX: Self = Self::READ.union(Self::EXEC);
}

impl fmt::Display for MemProt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (bit, letter) in [(Self::READ, 'R'), (Self::WRITE, 'W'), (Self::EXEC, 'X')] {
            write!(f, "{}", if self.contains(bit) { letter } else { '-' })?;
        }
        Ok(())
    }
}

impl fmt::Debug for MemProt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// How long memory is needed.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub enum MemLifetime {
    /// From finalize to deallocate.
    #[default]
    Standard,
    /// Until the finalize actions have run.
    Finalize,
    /// Never in the executor: for example debug information that only the controller reads.
    NoAlloc,
}

/// Memory that can share a segment: one protection, one lifetime.
///
/// The order of groups is the order of segments in an allocation: by lifetime, then by protection bits.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct AllocGroup {
    /// Needed how long.
    pub lifetime: MemLifetime,
    /// Used how.
    pub prot: MemProt,
}

impl AllocGroup {
    /// Returns the group of memory with protection `prot` that lives from finalize to deallocate.
    #[must_use]
    pub const fn standard(prot: MemProt) -> Self {
        Self { lifetime: MemLifetime::Standard, prot }
    }
}

impl fmt::Display for AllocGroup {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.prot)?;
        match self.lifetime {
            MemLifetime::Standard => Ok(()),
            MemLifetime::Finalize => write!(f, " (finalize)"),
            MemLifetime::NoAlloc => write!(f, " (no alloc)"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Groups sort as LLVM's do: read-only, data, code, then the same for finalize lifetime.
    #[test]
    fn groups_sort_by_lifetime_then_protection() {
        let finalize = |prot| AllocGroup { lifetime: MemLifetime::Finalize, prot };
        let sorted = [
            AllocGroup::standard(MemProt::READ),
            AllocGroup::standard(MemProt::RW),
            AllocGroup::standard(MemProt::RX),
            finalize(MemProt::READ),
            finalize(MemProt::RX),
        ];
        assert!(sorted.is_sorted());
        assert_eq!(finalize(MemProt::RX).to_string(), "R-X (finalize)");
    }
}

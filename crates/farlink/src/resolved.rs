//! What the executor has said of names that a library does not define.
//!
//! An address holds until the library gets another shared library, which is searched earlier. That a name is nowhere is
//! believed only for weak references, and until anything is opened in the session: linked code may open libraries by itself,
//! and who needs a name gets it then.

use farlink_addr::ExecutorAddr;
use foldhash::{HashMap, HashSet};

/// The names of a library that have been asked for.
#[derive(Default)]
pub(crate) struct Resolved {
    addresses: HashMap<Box<str>, Option<ExecutorAddr>>,
    /// How many libraries the session had opened when they were asked for.
    opened: u64,
}

impl Resolved {
    /// Returns what is known of `name`, now that the session has opened `opened` libraries.
    pub(crate) fn get(&mut self, name: &str, is_weak: bool, opened: u64) -> Option<Option<ExecutorAddr>> {
        if self.opened != opened {
            self.addresses.clear();
            self.opened = opened;
        }
        self.addresses.get(name).copied().filter(|found| found.is_some() || is_weak)
    }

    /// Forgets everything: another executor may have other addresses.
    pub(crate) fn forget(&mut self) {
        self.addresses.clear();
    }

    /// Keeps what the executor has said when the session had opened `opened` libraries.
    pub(crate) fn insert(&mut self, name: &str, found: Option<ExecutorAddr>, opened: u64) {
        if self.opened == opened {
            self.addresses.insert(name.into(), found);
        }
    }
}

/// As many names are kept of those that were out of reach. To find one out again takes another allocation.
const MAX_FAR_NAMES: usize = 1 << 16;

/// Names that code has turned out not to reach without an entry in a table: what refers to them next gets one at once.
#[derive(Default)]
pub(crate) struct FarNames(HashSet<Box<str>>);

impl FarNames {
    pub(crate) fn add(&mut self, name: &str) {
        if self.0.len() >= MAX_FAR_NAMES {
            self.0.clear();
        }
        self.0.insert(name.into());
    }

    pub(crate) fn has(&self, name: &str) -> bool {
        !self.0.is_empty() && self.0.contains(name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Addresses are kept until something is opened; an absence also counts only for who can do without.
    #[test]
    fn what_is_believed() {
        let mut resolved = Resolved::default();
        let found = Some(ExecutorAddr::new(0x1000));
        assert_eq!(resolved.get("a", false, 0), None);
        resolved.insert("a", found, 0);
        resolved.insert("b", None, 0);
        assert_eq!(resolved.get("a", false, 0), Some(found));
        assert_eq!((resolved.get("b", false, 0), resolved.get("b", true, 0)), (None, Some(None)));
        assert_eq!((resolved.get("a", false, 1), resolved.get("b", true, 1)), (None, None));
        resolved.insert("a", found, 0);
        assert_eq!(resolved.get("a", false, 1), None, "an answer from before the opening");
    }

    /// Names that are far are kept, however many there were before, and take no memory without end.
    #[test]
    fn far_names_are_bounded() {
        let mut far = FarNames::default();
        assert!(!far.has("0"));
        for number in 0..=MAX_FAR_NAMES {
            far.add(&number.to_string());
            assert!(far.has(&number.to_string()) && far.0.len() <= MAX_FAR_NAMES);
        }
    }
}

//! Names, each kept once, with the values that somebody has entered under it.

use foldhash::fast::RandomState;
use hashbrown::HashTable;
use smallvec::SmallVec;
use std::hash::BuildHasher;

/// A name that has values. Once it has none its id may stand for another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct NameId(u32);

/// Names with values, in the order in which those were added.
pub(crate) struct Names<T> {
    ids: HashTable<NameId>,
    hasher: RandomState,
    entries: Vec<Entry<T>>,
    /// Entries that nothing uses.
    free: Vec<NameId>,
}

struct Entry<T> {
    name: Box<str>,
    values: SmallVec<[T; 1]>,
}

impl<T> Default for Names<T> {
    fn default() -> Self {
        Self { ids: HashTable::new(), hasher: RandomState::default(), entries: Vec::new(), free: Vec::new() }
    }
}

impl<T> Names<T> {
    /// Returns the id of a name that has values.
    pub(crate) fn find(&self, name: &str) -> Option<NameId> {
        let hash = self.hasher.hash_one(name);
        self.ids.find(hash, |&id| *self.entries[id.0 as usize].name == *name).copied()
    }

    /// Returns what a name has.
    pub(crate) fn values(&self, id: NameId) -> &[T] {
        &self.entries[id.0 as usize].values
    }

    /// Returns what a name has, to be changed.
    pub(crate) fn values_mut(&mut self, id: NameId) -> &mut [T] {
        &mut self.entries[id.0 as usize].values
    }

    /// Adds a value to a name.
    pub(crate) fn add(&mut self, name: &str, value: T) -> NameId {
        let hash = self.hasher.hash_one(name);
        let entries = &mut self.entries;
        if let Some(&id) = self.ids.find(hash, |&id| *entries[id.0 as usize].name == *name) {
            entries[id.0 as usize].values.push(value);
            return id;
        }
        let entry = Entry { name: name.into(), values: SmallVec::from_buf([value]) };
        let id = match self.free.pop() {
            Some(id) => {
                entries[id.0 as usize] = entry;
                id
            }
            None => {
                entries.push(entry);
                NameId(u32::try_from(entries.len() - 1).expect("fewer names than fit in memory"))
            }
        };
        let hasher = &self.hasher;
        self.ids.insert_unique(hash, id, |&id| hasher.hash_one(&*entries[id.0 as usize].name));
        id
    }

    /// Removes the values of a name for which `goes` holds. A name without values is forgotten.
    pub(crate) fn remove(&mut self, id: NameId, goes: impl Fn(&T) -> bool) {
        let entry = &mut self.entries[id.0 as usize];
        if entry.values.is_empty() {
            return;
        }
        entry.values.retain(|value| !goes(value));
        if entry.values.is_empty() {
            let name = std::mem::take(&mut entry.name);
            if let Ok(found) = self.ids.find_entry(self.hasher.hash_one(&*name), |&other| other == id) {
                found.remove();
            }
            self.free.push(id);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A name has one id however many values it has; without any it is forgotten and its place is used again.
    #[test]
    fn names_come_and_go() {
        let mut names = Names::default();
        let a = names.add("a", 1);
        assert_eq!(names.add("a", 2), a);
        let b = names.add("b", 3);
        assert_eq!((names.find("a"), names.find("b"), names.find("c")), (Some(a), Some(b), None));
        names.remove(a, |&value| value == 1);
        assert_eq!(names.values(a), [2]);
        names.remove(a, |_| true);
        assert_eq!(names.find("a"), None);
        names.remove(a, |_| true);
        assert_eq!(names.add("c", 4), a);
        assert_ne!(names.add("d", 5), a);
        assert_eq!((names.values(a), names.values(b)), (&[4][..], &[3][..]));
    }
}

//! Names, each kept once, with the values that somebody has entered under it.

use crate::chunks::Chunks;
use ecow::EcoString;
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
    entries: Chunks<Entry<T>>,
    /// Entries that nothing uses.
    free: Vec<NameId>,
}

/// A name and its values: there may be a million, so short names are in place.
struct Entry<T> {
    name: EcoString,
    values: SmallVec<[T; 1]>,
}

impl<T> Default for Names<T> {
    fn default() -> Self {
        Self { ids: HashTable::new(), hasher: RandomState::default(), entries: Chunks::default(), free: Vec::new() }
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
        let Some(entry) = self.entries.get_mut(id.0 as usize).filter(|entry| !entry.values.is_empty()) else { return };
        entry.values.retain(|value| !goes(value));
        if entry.values.is_empty() {
            let name = std::mem::take(&mut entry.name);
            if let Ok(found) = self.ids.find_entry(self.hasher.hash_one(&*name), |&other| other == id) {
                found.remove();
            }
            self.free.push(id);
            if self.ids.is_empty() && self.entries.len() > MANY {
                (self.ids, self.entries, self.free) = Default::default();
            }
        }
    }
}

/// From how many elements on a list whose elements have all gone gives its memory back.
pub(crate) const MANY: usize = 256;

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

    /// When the last of many names has gone, so has the memory that they took, and others can come.
    #[test]
    fn many_names_go() {
        let mut names = Names::default();
        let ids: Vec<_> = (0..=MANY).map(|number| names.add(&number.to_string(), number)).collect();
        ids.iter().for_each(|&id| names.remove(id, |_| true));
        assert_eq!((names.entries.len(), names.free.capacity()), (0, 0));
        names.remove(ids[MANY], |_| true);
        let id = names.add("5", 1);
        assert_eq!((names.find("5"), names.values(id)), (Some(id), &[1][..]));
    }
}

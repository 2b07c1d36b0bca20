//! The symbols of a library: every definition of every name, and which one counts.
//!
//! Nothing is decided when an object is declared. Which of several definitions counts is found when an object is
//! about to be linked, so that removing an object leaves the rest as if it had never been there. A definition that
//! has been linked counts from then on.

use crate::library::ObjectId;
use farlink_addr::ExecutorAddr;
use farlink_graph::TlsAddress;
use std::collections::HashMap;
use std::sync::Arc;

/// How much a definition counts. Of several, the greatest counts; of equals, the first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Strength {
    /// A weak definition, or one of a COMDAT group.
    Weak,
    /// A common symbol of this many bytes.
    Common(u64),
    /// Any other.
    Strong,
}

/// What a symbol stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Value {
    Address(ExecutorAddr),
    ThreadLocal(TlsAddress),
}

impl Value {
    /// Returns the address of what every thread has in one place.
    pub(crate) fn address(self) -> Option<ExecutorAddr> {
        if let Self::Address(address) = self { Some(address) } else { None }
    }

    /// Returns where what every thread has for itself is.
    pub(crate) fn thread_local(self) -> Option<TlsAddress> {
        if let Self::ThreadLocal(tls) = self { Some(tls) } else { None }
    }
}

/// A definition of a name.
#[derive(Clone, Debug)]
pub(crate) struct Definition {
    /// The object that holds it; none for an absolute symbol.
    pub(crate) object: Option<ObjectId>,
    pub(crate) strength: Strength,
    /// Its value, once that is known.
    pub(crate) value: Option<Value>,
}

/// Two definitions of one name that cannot be in one library: the objects, where there are any.
#[derive(Debug)]
pub(crate) struct Conflict {
    pub(crate) first: Option<ObjectId>,
}

#[derive(Default)]
pub(crate) struct SymbolTable {
    definitions: HashMap<Arc<str>, Vec<Definition>>,
    /// The objects that hold a COMDAT group, by its signature. The first one's group counts.
    comdats: HashMap<Arc<str>, Vec<ObjectId>>,
}

impl SymbolTable {
    /// Returns the definition that counts.
    pub(crate) fn winner(&self, name: &str) -> Option<&Definition> {
        let definitions = self.definitions.get(name)?;
        let linked = definitions.iter().find(|definition| definition.value.is_some());
        // `max_by_key` gives the last of equals, so the search runs backwards.
        linked.or_else(|| definitions.iter().rev().max_by_key(|definition| definition.strength))
    }

    /// Checks that a definition may be added.
    pub(crate) fn check(&self, name: &str, strength: Strength) -> Result<(), Conflict> {
        let conflict = self.winner(name).filter(|winner| {
            // A weaker definition that is in use cannot be replaced any more.
            strength == Strength::Strong && (winner.strength == Strength::Strong || winner.value.is_some())
        });
        conflict.map_or(Ok(()), |winner| Err(Conflict { first: winner.object }))
    }

    /// Adds a definition that [`Self::check`] has accepted. Gives the name as it is kept.
    pub(crate) fn add(&mut self, name: &str, definition: Definition) -> Arc<str> {
        add_to(&mut self.definitions, name, definition)
    }

    /// Sets the value of `object`'s definition of `name`.
    pub(crate) fn publish(&mut self, name: &str, object: ObjectId, value: Value) {
        let definitions = self.definitions.get_mut(name).into_iter().flatten();
        for definition in definitions.filter(|definition| definition.object == Some(object)) {
            definition.value = Some(value);
        }
    }

    /// Forgets `object`'s definition of `name`.
    pub(crate) fn remove(&mut self, name: &str, object: ObjectId) {
        if let Some(definitions) = self.definitions.get_mut(name) {
            definitions.retain(|definition| definition.object != Some(object));
            if definitions.is_empty() {
                self.definitions.remove(name);
            }
        }
    }

    /// Adds a COMDAT group. Gives the signature as it is kept.
    pub(crate) fn add_comdat(&mut self, signature: &str, object: ObjectId) -> Arc<str> {
        add_to(&mut self.comdats, signature, object)
    }

    /// Returns whether `object`'s group of that signature is the one that counts.
    pub(crate) fn owns_comdat(&self, signature: &str, object: ObjectId) -> bool {
        self.comdats.get(signature).and_then(|objects| objects.first()) == Some(&object)
    }

    pub(crate) fn remove_comdat(&mut self, signature: &str, object: ObjectId) {
        if let Some(objects) = self.comdats.get_mut(signature) {
            objects.retain(|&other| other != object);
            if objects.is_empty() {
                self.comdats.remove(signature);
            }
        }
    }
}

/// Appends `value` to what `name` has. The name is allocated once, however many have it.
fn add_to<T>(map: &mut HashMap<Arc<str>, Vec<T>>, name: &str, value: T) -> Arc<str> {
    if let Some((known, _)) = map.get_key_value(name) {
        let known = Arc::clone(known);
        map.entry(Arc::clone(&known)).or_default().push(value);
        return known;
    }
    let name: Arc<str> = name.into();
    map.insert(Arc::clone(&name), vec![value]);
    name
}

#[cfg(test)]
mod tests {
    use super::*;

    fn define(table: &mut SymbolTable, object: u32, strength: Strength) -> Result<(), Conflict> {
        table.check("f", strength)?;
        table.add("f", Definition { object: Some(ObjectId(object)), strength, value: None });
        Ok(())
    }

    fn winner(table: &SymbolTable) -> u32 {
        table.winner("f").unwrap().object.unwrap().0
    }

    /// Strong beats common beats weak; of common ones the largest counts; of equals the first.
    #[test]
    fn strength_decides_then_order() {
        let mut table = SymbolTable::default();
        define(&mut table, 0, Strength::Weak).unwrap();
        define(&mut table, 1, Strength::Weak).unwrap();
        assert_eq!(winner(&table), 0);
        define(&mut table, 2, Strength::Common(8)).unwrap();
        define(&mut table, 3, Strength::Common(16)).unwrap();
        define(&mut table, 4, Strength::Common(16)).unwrap();
        assert_eq!(winner(&table), 3);
        define(&mut table, 5, Strength::Strong).unwrap();
        assert_eq!(winner(&table), 5);
        assert_eq!(define(&mut table, 6, Strength::Strong).unwrap_err().first, Some(ObjectId(5)));
    }

    /// A linked weak definition stays the one that counts, and a strong one cannot come after it.
    #[test]
    fn a_linked_definition_is_final() {
        let mut table = SymbolTable::default();
        define(&mut table, 0, Strength::Weak).unwrap();
        table.publish("f", ObjectId(0), Value::Address(ExecutorAddr::new(0x1000)));
        define(&mut table, 1, Strength::Common(8)).unwrap();
        assert_eq!(winner(&table), 0);
        assert!(define(&mut table, 2, Strength::Strong).is_err());
    }

    /// Removing an object brings back the definition that it had displaced.
    #[test]
    fn removal_uncovers_the_next() {
        let mut table = SymbolTable::default();
        define(&mut table, 0, Strength::Weak).unwrap();
        define(&mut table, 1, Strength::Strong).unwrap();
        table.remove("f", ObjectId(1));
        assert_eq!(winner(&table), 0);
        table.remove("f", ObjectId(0));
        assert!(table.winner("f").is_none());
        table.add_comdat("g", ObjectId(0));
        table.add_comdat("g", ObjectId(1));
        assert!(!table.owns_comdat("g", ObjectId(1)));
        table.remove_comdat("g", ObjectId(0));
        assert!(table.owns_comdat("g", ObjectId(1)));
    }
}

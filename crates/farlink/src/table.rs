//! The symbols of a library: every definition of every name, and which one counts.
//!
//! Nothing is decided when an object is declared. Which of several definitions counts is found when an object is
//! about to be linked, so that removing an object leaves the rest as if it had never been there. A definition that
//! has been linked counts from then on.

use crate::library::ObjectId;
use crate::names::{NameId, Names};
use farlink_addr::ExecutorAddr;
use farlink_graph::{SymbolId, TlsAddress};

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
    /// The object's symbol.
    pub(crate) symbol: SymbolId,
    stored: Stored,
}

/// What is known of a definition, in 16 bytes: few are thread-local, and one that has a value counts, however strong it is.
#[derive(Clone, Debug)]
enum Stored {
    Declared(Strength),
    Address(ExecutorAddr),
    ThreadLocal(Box<TlsAddress>),
}

impl From<Value> for Stored {
    fn from(value: Value) -> Self {
        match value {
            Value::Address(address) => Self::Address(address),
            Value::ThreadLocal(tls) => Self::ThreadLocal(Box::new(tls)),
        }
    }
}

impl Definition {
    /// A definition by a symbol of an object, which has no value yet.
    pub(crate) fn by_object(object: ObjectId, symbol: SymbolId, strength: Strength) -> Self {
        Self { object: Some(object), symbol, stored: Stored::Declared(strength) }
    }

    /// A definition that nothing but its address is known of.
    pub(crate) fn absolute(address: ExecutorAddr) -> Self {
        Self { object: None, symbol: SymbolId::from_index(0), stored: Stored::Address(address) }
    }

    /// Returns how much it counts as long as it has no value.
    fn strength(&self) -> Option<Strength> {
        if let Stored::Declared(strength) = self.stored { Some(strength) } else { None }
    }

    /// Returns its value, once that is known.
    pub(crate) fn value(&self) -> Option<Value> {
        match &self.stored {
            Stored::Declared(_) => None,
            Stored::Address(address) => Some(Value::Address(*address)),
            Stored::ThreadLocal(tls) => Some(Value::ThreadLocal(**tls)),
        }
    }
}

/// Two definitions of one name that cannot be in one library: the objects, where there are any.
#[derive(Debug)]
pub(crate) struct Conflict {
    pub(crate) first: Option<ObjectId>,
}

#[derive(Default)]
pub(crate) struct SymbolTable {
    definitions: Names<Definition>,
    /// The objects that hold a COMDAT group, by its signature. The first one's group counts.
    comdats: Names<ObjectId>,
}

impl SymbolTable {
    /// Returns the definition of `name` that counts.
    pub(crate) fn winner(&self, name: &str) -> Option<&Definition> {
        self.winner_of(self.definitions.find(name)?)
    }

    /// As [`Self::winner`].
    pub(crate) fn winner_of(&self, name: NameId) -> Option<&Definition> {
        let definitions = self.definitions.values(name);
        if let [only] = definitions {
            return Some(only);
        }
        let linked = definitions.iter().find(|definition| definition.strength().is_none());
        // `max_by_key` gives the last of equals, so the search runs backwards.
        linked.or_else(|| definitions.iter().rev().max_by_key(|definition| definition.strength()))
    }

    /// Checks that a definition may be added.
    pub(crate) fn check(&self, name: &str, strength: Strength) -> Result<(), Conflict> {
        let conflict = self.winner(name).filter(|winner| {
            // A weaker definition that is in use cannot be replaced any more.
            strength == Strength::Strong && winner.strength().is_none_or(|other| other == Strength::Strong)
        });
        conflict.map_or(Ok(()), |winner| Err(Conflict { first: winner.object }))
    }

    /// Adds a definition that [`Self::check`] has accepted. Gives the id of its name, for as long as it is there.
    pub(crate) fn add(&mut self, name: &str, definition: Definition) -> NameId {
        self.definitions.add(name, definition)
    }

    /// Sets the value of the definition of `name` by a symbol of `object`.
    pub(crate) fn publish(&mut self, name: NameId, object: ObjectId, symbol: SymbolId, value: Value) {
        let mut definitions = self.definitions.values_mut(name).iter_mut();
        let mine = |definition: &&mut Definition| (definition.object, definition.symbol) == (Some(object), symbol);
        if let Some(definition) = definitions.find(mine) {
            definition.stored = value.into();
        }
    }

    /// Has a definition of `name` by no object, which was at `old`, be at `new`.
    pub(crate) fn move_absolute(&mut self, name: &str, old: ExecutorAddr, new: ExecutorAddr) {
        let Some(name) = self.definitions.find(name) else { return };
        let is_moved = |of: &&mut Definition| of.object.is_none() && of.value().and_then(Value::address) == Some(old);
        for definition in self.definitions.values_mut(name).iter_mut().filter(is_moved) {
            *definition = Definition::absolute(new);
        }
    }

    /// Forgets the definition of `name` by a symbol of `object`.
    pub(crate) fn remove(&mut self, name: NameId, object: ObjectId, symbol: SymbolId) {
        self.definitions.remove(name, |definition| (definition.object, definition.symbol) == (Some(object), symbol));
    }

    /// Adds a COMDAT group. Gives the id of its signature, for as long as it is there.
    pub(crate) fn add_comdat(&mut self, signature: &str, object: ObjectId) -> NameId {
        self.comdats.add(signature, object)
    }

    /// Returns whether `object`'s group of that signature is the one that counts.
    pub(crate) fn owns_comdat(&self, signature: NameId, object: ObjectId) -> bool {
        self.comdats.values(signature).first() == Some(&object)
    }

    pub(crate) fn remove_comdat(&mut self, signature: NameId, object: ObjectId) {
        self.comdats.remove(signature, |&other| other == object);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SYMBOL: SymbolId = SymbolId::from_index(1);

    fn define(table: &mut SymbolTable, object: u32, strength: Strength) -> Result<(), Conflict> {
        table.check("f", strength)?;
        table.add("f", Definition::by_object(ObjectId(object), SYMBOL, strength));
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
        let name = table.definitions.find("f").unwrap();
        table.publish(name, ObjectId(0), SYMBOL, Value::Address(ExecutorAddr::new(0x1000)));
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
        let name = table.definitions.find("f").unwrap();
        table.remove(name, ObjectId(1), SYMBOL);
        assert_eq!(winner(&table), 0);
        table.remove(name, ObjectId(0), SYMBOL);
        assert!(table.winner("f").is_none());
        let signature = table.add_comdat("g", ObjectId(0));
        assert_eq!(table.add_comdat("g", ObjectId(1)), signature);
        assert!(!table.owns_comdat(signature, ObjectId(1)));
        table.remove_comdat(signature, ObjectId(0));
        assert!(table.owns_comdat(signature, ObjectId(1)));
    }
}

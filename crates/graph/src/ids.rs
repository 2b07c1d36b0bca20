//! Indices into the arrays of a graph.

macro_rules! ids {
    ($($(#[$doc:meta])* $name:ident),*) => {$(
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(pub(crate) u32);

        impl $name {
            pub(crate) fn index(self) -> usize {
                self.0 as usize
            }
        }
    )*};
}

ids! {
    /// A section of a graph.
    SectionId,
    /// A block of a graph.
    BlockId,
    /// A symbol of a graph.
    SymbolId,
    /// A COMDAT group of a graph.
    ComdatId
}

impl SymbolId {
    /// Returns the symbol that was added as the `index`-th, from 0.
    #[must_use]
    pub const fn from_index(index: u32) -> Self {
        Self(index)
    }
}

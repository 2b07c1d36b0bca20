//! Linking again, in place: in a new executor, shared libraries that were added after something had been linked may be at
//! other addresses than in the one before it, and linked code has the old ones in it.
//!
//! Nothing of linked code moves by that: its content is made anew of its graph, which sessions keep from when such a library
//! is added, and is put where it was. Nobody runs it meanwhile.

use crate::Error;
use crate::library::LibraryInner;
use crate::pool::cannot;
use crate::session::SessionInner;
use crate::state::ObjectState;
use farlink_addr::ExecutorAddr;
use std::collections::HashMap;
use std::sync::{PoisonError, Weak};

/// Names that mean other addresses than before: by name and old address, the new one.
pub(crate) type Moved = HashMap<(String, ExecutorAddr), ExecutorAddr>;

impl SessionInner {
    /// Whether graphs of what is linked now may be wanted again.
    pub(crate) fn may_relink(&self) -> bool {
        self.pool().is_some_and(|pool| pool.has_late_libraries())
    }

    /// Has linked code refer to what has moved.
    ///
    /// # Errors
    ///
    /// Fails if an object has sections together with others, whose content is not made anew.
    pub(crate) fn relink(&self, moved: &Moved) -> Result<(), Error> {
        let libraries = self.deaths.libraries.lock().unwrap_or_else(PoisonError::into_inner).clone();
        libraries.iter().filter_map(Weak::upgrade).try_for_each(|library| self.relink_library(&library, moved))
    }

    fn relink_library(&self, library: &LibraryInner, moved: &Moved) -> Result<(), Error> {
        let mut state = library.lock();
        state.resolved.forget();
        moved.iter().for_each(|((name, old), new)| state.table.move_absolute(name, *old, *new));
        for slot in state.objects.iter_mut() {
            let has_sets = slot.has_more().is_some_and(|more| !more.sets.is_empty());
            let name = slot.name.clone();
            let (ObjectState::Linked(linked), Some(graph)) = (&slot.state, slot.graph()) else { continue };
            let changed: Vec<_> = graph
                .externals()
                .filter_map(|id| {
                    let key = (graph.symbol_name(id).to_owned(), graph.symbol_address(id)?);
                    Some((id, *moved.get(&key)?))
                })
                .collect();
            let Some(memory) = linked.memory.as_ref().filter(|_| !changed.is_empty()) else { continue };
            if has_sets {
                let text = format!("{name} refers to a library that has moved, and has sections with other objects");
                return Err(cannot(text));
            }
            let layout = farlink_graph::lay_out(graph, &[])?;
            let contents: Vec<u64> = layout.segments().iter().map(|segment| segment.content_bytes).collect();
            let segments = self.memory.rewrite(memory, &contents)?;
            let graph = slot.graph_mut().expect("it was there before");
            changed.into_iter().for_each(|(id, addr)| graph.set_address(id, addr));
            farlink_graph::fix_up(graph, &layout, &segments)?;
        }
        Ok(())
    }
}

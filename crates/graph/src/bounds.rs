//! `__start_X` and `__stop_X`: the bounds of all sections named `X`, where that is a C identifier.
//!
//! Programs collect things in a section of that name and walk from one bound to the other. The bounds are those of
//! this object's sections: a reference to one keeps all of them alive, and they are laid out one after another. An
//! object without such a section has an ordinary external symbol of that name. Whoever links several objects together
//! asks for [`LinkGraph::bounded_sections`] and [`LinkGraph::collected_sections`], and refuses sets that are in several.

use crate::builder::define;
use crate::error::LinkError;
use crate::graph::LinkGraph;
use crate::parts::Place;
use crate::{BlockId, SectionId, SymbolId};
use std::collections::HashMap;

/// The two bounds of a set of sections.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Bound {
    Start,
    Stop,
}

/// Returns the bound that a symbol of this name is, and of which sections.
fn parse(name: &str) -> Option<(Bound, &str)> {
    let (bound, section) = match name.strip_prefix("__start_") {
        Some(section) => (Bound::Start, section),
        None => (Bound::Stop, name.strip_prefix("__stop_")?),
    };
    is_identifier(section).then_some((bound, section))
}

fn is_identifier(name: &str) -> bool {
    let is_letter = |byte: u8| byte.is_ascii_alphabetic() || byte == b'_';
    name.bytes().next().is_some_and(is_letter) && name.bytes().all(|byte| is_letter(byte) || byte.is_ascii_digit())
}

/// The sections that have bounds, by the external symbols that are those.
#[derive(Default)]
pub(crate) struct BoundedSections {
    /// Sections of one name.
    sets: Vec<Vec<SectionId>>,
    symbols: HashMap<SymbolId, (Bound, usize)>,
}

impl BoundedSections {
    pub(crate) fn new(graph: &LinkGraph) -> Self {
        let external = |id: &SymbolId| matches!(graph.symbol(*id).place, Place::External { .. });
        let bound = |id| parse(graph.symbol_name(id)).map(|(bound, name)| (id, bound, name));
        let bounds: Vec<_> = graph.symbol_ids().filter(external).filter_map(bound).collect();
        let mut found = Self::default();
        if bounds.is_empty() {
            return found;
        }
        let mut by_name: HashMap<&str, Vec<SectionId>> = HashMap::new();
        for section in graph.sections() {
            by_name.entry(graph.section_name(section)).or_default().push(section);
        }
        let mut sets: HashMap<&str, usize> = HashMap::new();
        for (symbol, bound, name) in bounds {
            if let Some(sections) = by_name.remove(name) {
                sets.insert(name, found.sets.len());
                found.sets.push(sections);
            }
            if let Some(&set) = sets.get(name) {
                found.symbols.insert(symbol, (bound, set));
            }
        }
        found
    }

    /// Takes out the sections whose bound `symbol` is; none if it is not one, or they were taken before.
    pub(crate) fn take(&mut self, symbol: SymbolId) -> Vec<SectionId> {
        match self.symbols.get(&symbol) {
            Some(&(_, set)) => std::mem::take(&mut self.sets[set]),
            None => Vec::new(),
        }
    }
}

impl LinkGraph {
    /// Returns the names of the sections whose bounds this graph has and refers to.
    #[must_use]
    pub fn bounded_sections(&self) -> Vec<&str> {
        // Once defined, a bound is a local symbol.
        let is_bound = |id: &SymbolId| self.symbol(*id).live && matches!(self.symbol(*id).place, Place::Defined { .. });
        let names = self.symbol_ids().filter(is_bound).filter_map(|id| parse(self.symbol_name(id)));
        let mut names: Vec<&str> = names.map(|(_, section)| section).collect();
        names.sort_unstable();
        names.dedup();
        names
    }

    /// Returns the names of the sections that `__start_X` and `__stop_X` can be about, needed or not: a reference to a
    /// bound needs them.
    pub fn collected_sections(&self) -> impl Iterator<Item = &str> {
        let is_kept = |&id: &SectionId| self.section_blocks(id).any(|block| !self.block(block).discarded);
        self.sections().filter(is_kept).map(|id| self.section_name(id)).filter(|name| is_identifier(name))
    }
}

/// Makes the bounds that live blocks refer to local symbols of this graph.
pub(crate) fn define_bounds(graph: &mut LinkGraph) -> Result<(), LinkError> {
    let bounded = BoundedSections::new(graph);
    let spans: Vec<_> = bounded.sets.iter().map(|set| span(graph, set)).collect();
    for (&symbol, &(bound, set)) in &bounded.symbols {
        if !graph.symbol(symbol).live {
            continue;
        }
        match spans[set] {
            Span::Blocks { first, last } => {
                let size = graph.block(last).size;
                match bound {
                    Bound::Start => define(graph, symbol, first, 0),
                    Bound::Stop => define(graph, symbol, last, size),
                }
            }
            Span::Mixed => {
                let section = graph.section_name(bounded.sets[set][0]).to_owned();
                return Err(LinkError::MixedSections { object: graph.name().to_owned(), section });
            }
            // The COMDAT groups of all of them lost.
            Span::None => {}
        }
    }
    Ok(())
}

/// What sections of one name have in memory.
enum Span {
    None,
    /// The first and the last of blocks that follow each other.
    Blocks {
        first: BlockId,
        last: BlockId,
    },
    /// Blocks that cannot follow each other.
    Mixed,
}

fn span(graph: &LinkGraph, sections: &[SectionId]) -> Span {
    let blocks = || sections.iter().flat_map(|&id| graph.section_blocks(id)).filter(|&id| graph.block(id).live);
    let part = |id: BlockId| (graph.section(graph.block(id).section).group, graph.block(id).is_zero_fill());
    match (blocks().next(), blocks().last()) {
        (Some(first), Some(last)) if blocks().all(|id| part(id) == part(first)) => Span::Blocks { first, last },
        (Some(_), Some(_)) => Span::Mixed,
        _ => Span::None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Only what follows the prefix decides, and only C identifiers count.
    #[test]
    fn names() {
        assert_eq!(parse("__start_set"), Some((Bound::Start, "set")));
        assert_eq!(parse("__stop__s3t"), Some((Bound::Stop, "_s3t")));
        for name in ["__start_", "__start_.text", "__stop_3", "_start_set", "__stop_a-b", "start"] {
            assert_eq!(parse(name), None, "{name}");
        }
    }
}

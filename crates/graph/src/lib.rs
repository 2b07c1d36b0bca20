//! Objects as graphs, and the phases that turn them into executable bytes.
//!
//! A [`LinkGraph`] has sections of blocks, symbols in blocks, and edges from blocks to symbols. The phases, each in
//! its own module, are called in this order for each object of a batch:
//!
//! 1. [`LinkGraph::discard_comdat`] and [`LinkGraph::externalize`] take out what another object's definition beats.
//! 2. [`prune`] marks what something live reaches.
//! 3. [`build_tables`] adds the GOT, stubs and support code that live edges need.
//! 4. [`lay_out`] gives every live block a place in a segment; [`assign`] gives it an address.
//! 5. [`LinkGraph::set_address`] for every symbol of [`LinkGraph::externals`].
//! 6. [`fix_up`] copies each block into working memory and applies its edges there.
//!
//! Every pass is a loop over flat arrays or a worklist: nothing recurses, and work is linear in the input.

#![forbid(unsafe_code)]

mod bounds;
mod builder;
mod bytes;
mod edge;
mod eh_frame;
mod error;
mod fix_up;
mod graph;
mod ids;
mod layout;
mod parts;
mod prune;
mod tables;
mod x86_64;

pub use builder::GraphBuilder;
pub use bytes::Bytes;
pub use edge::{Edge, EdgeKind};
pub use error::LinkError;
pub use fix_up::fix_up;
pub use graph::LinkGraph;
pub use ids::{BlockId, ComdatId, SectionId, SymbolId};
pub use layout::{Layout, assign, lay_out};
pub use parts::{
    Arch, Block, Comdat, Content, InitArray, Linkage, Place, Scope, Section, SectionKind, Symbol, SymbolType,
    TableEntry, Text,
};
pub use prune::prune;
pub use tables::build_tables;

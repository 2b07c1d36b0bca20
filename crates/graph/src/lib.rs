//! Objects as graphs, and the phases that turn them into executable bytes.
//!
//! A [`LinkGraph`] has sections of blocks, symbols in blocks, and edges from blocks to symbols. The phases, each in
//! its own module, are called in this order for each object of a batch:
//!
//! 1. [`LinkGraph::discard_comdat`] and [`LinkGraph::externalize`] take out what another object's definition beats.
//! 2. [`prune`] marks what something live reaches, and [`mark_symbol`] and [`mark_sections`] what turns out to be needed
//!    for other objects; [`provide`] defines what each object has of its own.
//! 3. [`build_tables`] adds the GOT, stubs and indexes that live edges need, as far as targets are not in reach.
//! 4. [`lay_out`] gives every live block a place in a segment, [`Together`] those that go together with other objects';
//!    [`assign`] gives them addresses.
//! 5. [`LinkGraph::set_address`] and [`LinkGraph::set_tls_address`] for every symbol of [`LinkGraph::externals`].
//!    If there are [`missing_entries`] then, [`add_entries`] and again from 4.
//! 6. [`fix_up`] copies each block into working memory and applies its edges there.
//!
//! Every pass is a loop over flat arrays or a worklist: nothing recurses, and work is linear in the input.

#![forbid(unsafe_code)]

mod bounds;
mod builder;
mod bytes;
mod code;
mod demangle;
mod edge;
mod eh_frame;
mod error;
mod fix_up;
mod function_stub;
mod graph;
mod ids;
mod layout;
mod parts;
mod provide;
mod prune;
mod reach;
mod tables;
mod together;
mod unwind_index;
mod x86_64;

pub use bounds::{Bound, Bounded, parse_bound};
pub use builder::{GraphBuilder, NewSection};
pub use bytes::Bytes;
pub use code::CodePlace;
pub use demangle::{demangled, with_demangled};
pub use edge::{Edge, EdgeKind};
pub use error::LinkError;
pub use fix_up::{fix_up, fix_up_part};
pub use function_stub::{FunctionStub, absolute_externals, add_function_stub};
pub use graph::LinkGraph;
pub use ids::{BlockId, ComdatId, SectionId, SymbolId};
pub use layout::{Layout, assign, lay_out};
pub use parts::{
    Arch, Block, Comdat, Content, Ifunc, InitArray, Linkage, Place, Scope, Section, SectionKind, Symbol, SymbolType,
    TableEntry, Text, TlsAddress, TlsModule,
};
pub use provide::provide;
pub use prune::{mark_sections, mark_symbol, prune};
pub use reach::{add_entries, missing_entries};
pub use tables::build_tables;
pub use together::Together;

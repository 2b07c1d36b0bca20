//! ELF files: relocatable objects to [`LinkGraph`]s, archives to objects.
//!
//! - [`identify`] tells what a file is, for whoever has to decide what to do with it.
//! - [`parse_object`] makes the graph of a relocatable object. It copies nothing and follows no reference: what an
//!   object needs and does not need is found when it is linked.
//! - [`Archive`] finds the member that defines a symbol.
//!
//! Bytes may be anything. Every offset and count is checked against them before it is used.

#![forbid(unsafe_code)]

mod archive;
mod debug;
mod debug_symbols;
mod error;
mod identify;
mod needs;
mod object;
mod relocation;
mod section;

pub use archive::{Archive, Member};
pub use debug::debug_object;
pub use error::ElfError;
pub use identify::{InputKind, check_shared_object, identify};
pub use needs::Needs;
pub use object::parse_object;

pub use farlink_graph::{Bytes, LinkGraph};

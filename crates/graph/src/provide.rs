//! What the linker defines for an object that wants it and does not find it: its handle, functions that the C library
//! has for each program, the GOT's address, a file header.

use crate::builder::{define, edge};
use crate::edge::EdgeKind;
use crate::graph::LinkGraph;
use crate::parts::{Linkage, Place, Scope, SectionKind, Symbol, SymbolType, Text};
use crate::x86_64::{ENTRY_BYTES, FIELD_IS_LAST, SUPPORT, SupportFunction};
use crate::{BlockId, SymbolId};
use farlink_addr::{Align, MemProt};

/// The name of the GOT's address.
const GOT_NAME: &str = "_GLOBAL_OFFSET_TABLE_";

const DSO_HANDLE: &str = "__dso_handle";

/// The name of the first byte of the module with the object's thread-local variables.
const TLS_BASE_NAME: &str = "_TLS_MODULE_BASE_";

/// The name of the address of the file's header in memory.
const HEADER_NAME: &str = "__ehdr_start";

/// Alignment of tables and handles in bytes.
pub(crate) const TABLE_ALIGN: Align = match Align::new(ENTRY_BYTES) {
    Some(align) => align,
    None => unreachable!(),
};

/// The header of an ELF file for x86-64 that has neither sections nor segments. Only what is not 0 is listed.
const HEADER: [u8; 64] = {
    let mut header = [0; 64];
    // The magic number, 64 bits, little-endian, version 1.
    let identification = [0x7f, b'E', b'L', b'F', 2, 1, 1];
    let mut index = 0;
    while index < identification.len() {
        header[index] = identification[index];
        index += 1;
    }
    header[16] = 3; // a shared object
    header[18] = 62; // x86-64
    header[20] = 1; // version
    header[52] = 64; // bytes of this header
    header
};

/// Makes the external symbol `id` a local one if it is something that every object has of its own. Returns whether it is.
///
/// May make other external symbols live.
pub fn provide(graph: &mut LinkGraph, id: SymbolId) -> bool {
    if let Some(function) = SUPPORT.iter().find(|function| function.name == graph.symbol_name(id)) {
        provide_function(graph, function, id);
        return true;
    }
    match graph.symbol_name(id) {
        DSO_HANDLE => {
            let handle = handle(graph);
            let place = graph.symbol(handle).place;
            let symbol = &mut graph.symbols[id.index()];
            (symbol.place, symbol.scope) = (place, Scope::Local);
        }
        GOT_NAME => {
            // It gets its place with the table.
            let symbol = &mut graph.symbols[id.index()];
            (symbol.place, symbol.scope) = (Place::Absolute(0), Scope::Local);
            graph.got_symbol = Some(id);
        }
        TLS_BASE_NAME => {
            let symbol = &mut graph.symbols[id.index()];
            (symbol.place, symbol.scope, symbol.kind) = (Place::Absolute(0), Scope::Local, SymbolType::Tls);
            graph.tls_base = Some(id);
        }
        HEADER_NAME => {
            let bytes = HEADER.to_vec();
            let block = graph.push_own("$__EHDR", SectionKind::Regular, MemProt::READ, bytes, TABLE_ALIGN);
            define(graph, id, block, 0);
        }
        _ => return false,
    }
    true
}

/// Gives an object with arrays of initializers or finalizers the handle that those belong to.
pub(crate) fn provide_handle_for_arrays(graph: &mut LinkGraph) {
    let has_arrays = graph.sections().any(|id| {
        let runs = matches!(graph.section(id).kind, SectionKind::Init { .. } | SectionKind::Fini { .. });
        runs && graph.section_blocks(id).any(|block| graph.block(block).live)
    });
    if has_arrays {
        handle(graph);
    }
}

/// Returns the object's handle: the one that it defines itself, as start-up files do, or one that is made.
fn handle(graph: &mut LinkGraph) -> SymbolId {
    if let Some(handle) = graph.dso_handle {
        return handle;
    }
    let is_live = |id: &SymbolId| match graph.symbol(*id).place {
        Place::Defined { block, .. } => graph.block(block).live,
        _ => false,
    };
    let own = graph.symbol_ids().filter(is_live).find(|&id| graph.symbol_name(id) == DSO_HANDLE);
    let handle = own.unwrap_or_else(|| {
        let bytes = vec![0; ENTRY_BYTES as usize];
        let block = graph.push_own("$__DSO_HANDLE", SectionKind::Regular, MemProt::READ, bytes, TABLE_ALIGN);
        let handle = graph.push_local(DSO_HANDLE, block, 0);
        graph.push_edges(block, [edge(0, EdgeKind::Pointer64, handle, 0)]);
        handle
    });
    graph.dso_handle = Some(handle);
    handle
}

fn provide_function(graph: &mut LinkGraph, function: &SupportFunction, id: SymbolId) {
    let handle = handle(graph);
    let callee = external_symbol(graph, function.callee);
    let code = function.code.to_vec();
    let block: BlockId = graph.push_own("$__SUPPORT", SectionKind::Regular, MemProt::RX, code, TABLE_ALIGN);
    let edges = [
        edge(function.handle_offset, EdgeKind::Delta32, handle, FIELD_IS_LAST),
        edge(function.jump_offset, EdgeKind::Branch32, callee, FIELD_IS_LAST),
    ];
    graph.push_edges(block, edges);
    define(graph, id, block, 0);
}

/// Returns a live strong external symbol of that name.
fn external_symbol(graph: &mut LinkGraph, name: &'static str) -> SymbolId {
    let known = graph.externals().find(|&id| graph.symbol_name(id) == name);
    known.unwrap_or_else(|| {
        let (place, kind) = (Place::External { weak: false }, SymbolType::Function);
        let (linkage, scope) = (Linkage::Strong, Scope::Default);
        let (name, size, live) = (Text::Own(name), 0, true);
        let id = graph.push_symbol(Symbol {
            name,
            place,
            size,
            linkage,
            scope,
            kind,
            live,
            addr: None,
            tls: None,
            lost: None,
        });
        graph.newly_live.push(id);
        id
    })
}

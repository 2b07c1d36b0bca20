//! Writing the linked bytes: each block is copied once into working memory, and its edges are applied there.
//!
//! Values come from the graph, never from working memory, which the executor may be able to write.

use crate::edge::{Edge, EdgeKind, TlsUse};
use crate::error::LinkError;
use crate::graph::LinkGraph;
use crate::layout::Layout;
use crate::parts::{Place, Table, TlsAddress};
use crate::tables::TLS_ENTRY_BYTES;
use crate::unwind_index::unwind_index;
use crate::x86_64::{DESCRIPTOR_CALL, ENTRY_BYTES, FIELD_IS_LAST, NO_DESCRIPTOR_CALL, relax, relax_descriptor};
use crate::{BlockId, SymbolId};
use farlink_addr::{ExecutorAddr, MemProt};
use farlink_mem::{AllocatedSegment, WorkingMemory};

const PIC_HINT: &str = "code for a far target has to be position-independent: recompile with -fPIC";
const ABSOLUTE_HINT: &str = "32-bit absolute addresses do not reach linked code: recompile with -fPIC, or link in low \
                             memory (SessionBuilder::low_memory)";
/// For code that is where 32-bit absolute addresses reach it.
const LOW_HINT: &str =
    "code that was compiled with -fno-pic does not reach data of shared libraries: recompile with -fPIC";
const TLS_HINT: &str = "thread-local variables of one program have 2 GiB at most";
const NARROW_HINT: &str = "the object wants its target at an address that small";

/// Copies the live blocks of `graph` into the working memory of `segments` and applies their edges.
///
/// # Errors
///
/// Fails if a value does not fit.
///
/// # Panics
///
/// Panics if `segments` are not what was allocated for `layout`.
pub fn fix_up(graph: &LinkGraph, layout: &Layout, segments: &[AllocatedSegment]) -> Result<(), LinkError> {
    fix_up_part(graph, layout, segments, 0, 1)
}

/// As [`fix_up`], for one of `parts` parts of the blocks, which may be done beside each other.
///
/// # Errors
///
/// As [`fix_up`].
///
/// # Panics
///
/// As [`fix_up`], and unless `part` is less than `parts`.
pub fn fix_up_part(
    graph: &LinkGraph,
    layout: &Layout,
    segments: &[AllocatedSegment],
    part: usize,
    parts: usize,
) -> Result<(), LinkError> {
    assert_eq!(layout.segments.len(), segments.len(), "memory was allocated for this layout");
    for (segment, allocated) in layout.segments.iter().zip(segments) {
        debug_assert_eq!(segment.layout.content_bytes, allocated.content_bytes, "memory was allocated for this layout");
        let count = segment.blocks.len();
        let blocks = &segment.blocks[count * part / parts..count * (part + 1) / parts];
        write_blocks(graph, blocks, &allocated.working)?;
    }
    Ok(())
}

/// Copies `blocks` to their offsets in `memory`, which is zero, and applies their edges.
pub(crate) fn write_blocks(
    graph: &LinkGraph,
    blocks: &[(BlockId, u64)],
    memory: &WorkingMemory,
) -> Result<(), LinkError> {
    for &(block, start) in blocks {
        // Zero fill is zero already, and working memory need not have it.
        if graph.block(block).is_zero_fill() {
            continue;
        }
        let writer = Writer { graph, block, memory, start };
        if graph.unwind_index == Some(block) {
            writer.write(0, &unwind_index(graph, block)?)?;
            continue;
        }
        let content = graph.block_content(block);
        debug_assert_eq!(content.len() as u64, graph.block(block).size, "a block has the bytes it promised");
        writer.write(0, content)?;
        for edge in graph.block_edges(block) {
            writer.apply(edge)?;
        }
    }
    Ok(())
}

/// Writes one block.
struct Writer<'a> {
    graph: &'a LinkGraph,
    block: BlockId,
    memory: &'a WorkingMemory,
    /// Offset of the block in its segment.
    start: u64,
}

/// A number that goes into a field: how, and whether it fits.
#[derive(Clone, Copy)]
enum Fit {
    Signed,
    Unsigned,
    /// Either.
    Bits,
}

impl Writer<'_> {
    fn write(&self, offset: u64, bytes: &[u8]) -> Result<(), LinkError> {
        debug_assert!(offset + bytes.len() as u64 <= self.graph.block(self.block).size || bytes.is_empty());
        self.memory
            .write(self.start + offset, bytes)
            .map_err(|error| LinkError::Memory { object: self.graph.name().to_owned(), text: error.to_string() })
    }

    fn apply(&self, edge: &Edge) -> Result<(), LinkError> {
        let graph = self.graph;
        // An offset inside the block: checked when the graph was made.
        let p = graph.block(self.block).addr.as_u64().wrapping_add(edge.offset);
        let s = address(graph, edge.target);
        let a = edge.addend as u64;
        let got = || table_start(graph.tables.got.block, graph);
        let slot = || entry(graph, &graph.tables.got, edge.target, ENTRY_BYTES);
        // Only what may be written without one can be without a slot.
        let given_slot = || slot().unwrap_or_default();
        let relative = |value: u64| value.wrapping_add(a).wrapping_sub(p);
        match edge.kind {
            EdgeKind::Pointer64 => self.field(edge, s.wrapping_add(a), 8, Fit::Bits, ""),
            EdgeKind::Pointer32 => self.field(edge, s.wrapping_add(a), 4, Fit::Unsigned, ABSOLUTE_HINT),
            EdgeKind::Pointer32Signed => self.field(edge, s.wrapping_add(a), 4, Fit::Signed, ABSOLUTE_HINT),
            EdgeKind::Pointer16 => self.field(edge, s.wrapping_add(a), 2, Fit::Bits, NARROW_HINT),
            EdgeKind::Pointer8 => self.field(edge, s.wrapping_add(a), 1, Fit::Bits, NARROW_HINT),
            EdgeKind::Delta64 => self.field(edge, relative(s), 8, Fit::Bits, ""),
            EdgeKind::Delta32 | EdgeKind::Delta32Bnd => self.field(edge, relative(s), 4, Fit::Signed, PIC_HINT),
            EdgeKind::Delta16 => self.field(edge, relative(s), 2, Fit::Signed, NARROW_HINT),
            EdgeKind::Delta8 => self.field(edge, relative(s), 1, Fit::Signed, NARROW_HINT),
            EdgeKind::Branch32 | EdgeKind::Branch32Bnd => {
                self.field(edge, self.branch(edge, s, relative), 4, Fit::Signed, PIC_HINT)
            }
            kind if kind.may_relax() => {
                if self.relax(edge, s, p)? {
                    return Ok(());
                }
                let slot = slot().ok_or_else(|| self.out_of_range(edge, relative(s), PIC_HINT))?;
                self.field(edge, relative(slot), 4, Fit::Signed, PIC_HINT)
            }
            EdgeKind::GotPcRel32 => self.field(edge, relative(given_slot()), 4, Fit::Signed, PIC_HINT),
            EdgeKind::GotPcRel64 => self.field(edge, relative(given_slot()), 8, Fit::Bits, ""),
            EdgeKind::GotPc32 => self.field(edge, relative(got()), 4, Fit::Signed, PIC_HINT),
            EdgeKind::GotPc64 => self.field(edge, relative(got()), 8, Fit::Bits, ""),
            EdgeKind::GotOff64 | EdgeKind::PltOff64 => {
                self.field(edge, s.wrapping_add(a).wrapping_sub(got()), 8, Fit::Bits, "")
            }
            EdgeKind::Got64 | EdgeKind::GotPlt64 => {
                self.field(edge, given_slot().wrapping_add(a).wrapping_sub(got()), 8, Fit::Bits, "")
            }
            EdgeKind::Got32 => self.field(edge, given_slot().wrapping_add(a).wrapping_sub(got()), 4, Fit::Signed, ""),
            EdgeKind::Size32 => {
                let value = graph.symbol(edge.target).size.wrapping_add(a);
                self.field(edge, value, 4, Fit::Unsigned, NARROW_HINT)
            }
            EdgeKind::Size64 => self.field(edge, graph.symbol(edge.target).size.wrapping_add(a), 8, Fit::Bits, ""),
            EdgeKind::CiePointer => self.field(edge, p.wrapping_sub(s), 4, Fit::Unsigned, ""),
            kind => match kind.tls_use() {
                Some(tls_use) => self.apply_tls(edge, tls_use, p),
                None => unreachable!("what cannot be linked is not laid out"),
            },
        }
    }

    /// Applies an edge of thread-local storage at the address `p`.
    fn apply_tls(&self, edge: &Edge, tls_use: TlsUse, p: u64) -> Result<(), LinkError> {
        let (graph, a) = (self.graph, edge.addend as u64);
        let relative = |value: u64| value.wrapping_add(a).wrapping_sub(p);
        let tables = &graph.tables;
        let slot = |table, bytes| entry(graph, table, edge.target, bytes).unwrap_or_default();
        match tls_use {
            TlsUse::TpOffset => {
                let Some(tp_offset) = self.tls(edge)?.tp_offset else { return Err(self.not_static(edge)) };
                let value = (tp_offset as u64).wrapping_add(a);
                let width = edge.kind.width() as usize;
                self.field(edge, value, width, Fit::Signed, TLS_HINT)
            }
            TlsUse::TpOffsetSlot => {
                if edge.kind.is_tls_descriptor() {
                    let opcode = relax_descriptor(graph.block_content(self.block), edge.offset as usize);
                    let opcode = opcode.ok_or_else(|| self.unknown_code(edge))?;
                    // Two bytes before the field, which are there: the instruction has been looked at.
                    self.write(edge.offset - 2, &[opcode])?;
                }
                let slot = slot(&tables.tp_offsets, ENTRY_BYTES);
                self.field(edge, relative(slot), 4, Fit::Signed, PIC_HINT)
            }
            TlsUse::GeneralSlot => {
                let slot = slot(&tables.tls_general, TLS_ENTRY_BYTES);
                self.field(edge, relative(slot), 4, Fit::Signed, PIC_HINT)
            }
            TlsUse::LocalSlot => {
                self.field(edge, relative(table_start(tables.tls_local, graph)), 4, Fit::Signed, PIC_HINT)
            }
            TlsUse::LocalOffset => {
                let tls = self.tls(edge)?;
                if graph.tls_module.is_none_or(|own| own.id != tls.module) {
                    return Err(LinkError::ForeignLocalDynamic { place: self.place(edge), symbol: self.symbol(edge) });
                }
                self.field(edge, tls.offset.wrapping_add(a), 4, Fit::Signed, TLS_HINT)
            }
            TlsUse::Module if edge.kind == EdgeKind::DtpMod64 => {
                let own = graph.tls_module.map(|module| module.id).filter(|_| Some(self.block) == tables.tls_local);
                let module = own.map_or_else(|| self.tls(edge).map(|tls| tls.module), Ok)?;
                self.field(edge, module, 8, Fit::Bits, "")
            }
            TlsUse::Module => self.field(edge, self.tls(edge)?.offset.wrapping_add(a), 8, Fit::Bits, ""),
            TlsUse::Call => {
                let at = edge.offset as usize;
                if graph.block_content(self.block).get(at..at + 2) != Some(&DESCRIPTOR_CALL) {
                    return Err(self.unknown_code(edge));
                }
                self.write(edge.offset, &NO_DESCRIPTOR_CALL)
            }
        }
    }

    /// Returns where the thread-local variable that an edge refers to is.
    fn tls(&self, edge: &Edge) -> Result<TlsAddress, LinkError> {
        let unknown = || LinkError::NoTls { place: self.place(edge), symbol: self.symbol(edge) };
        self.graph.tls_address(edge.target).ok_or_else(unknown)
    }

    fn place(&self, edge: &Edge) -> String {
        self.graph.place_label(self.block, edge.offset)
    }

    fn symbol(&self, edge: &Edge) -> String {
        self.graph.symbol_label(edge.target)
    }

    fn not_static(&self, edge: &Edge) -> LinkError {
        LinkError::DynamicTls { place: self.place(edge), relocation: edge.kind.to_string(), symbol: self.symbol(edge) }
    }

    fn unknown_code(&self, edge: &Edge) -> LinkError {
        LinkError::UnknownCode { place: self.place(edge), relocation: edge.kind.to_string() }
    }

    /// Returns the value of a branch: to its target if that is in reach, else to the target's stub.
    fn branch(&self, edge: &Edge, s: u64, relative: impl Fn(u64) -> u64) -> u64 {
        let direct = relative(s);
        let in_reach = i32::try_from(direct as i64).is_ok();
        // Code that wants to go on behind its target's first instruction would end up behind the stub's. In data, the
        // addend makes a distance relative to somewhere else, as in tables of functions.
        let section = self.graph.section(self.graph.block(self.block).section);
        if edge.addend != FIELD_IS_LAST && section.group.prot.contains(MemProt::EXEC) {
            return direct;
        }
        match entry(self.graph, &self.graph.tables.stubs, edge.target, ENTRY_BYTES) {
            // A call of what is not there goes through the stub and faults at address 0, wherever the code is.
            Some(stub) if !in_reach || is_null_external(self.graph, edge.target, s) => relative(stub),
            _ => direct,
        }
    }

    /// Writes the instruction in its form without a GOT slot, if it has one that reaches. Returns whether it did.
    fn relax(&self, edge: &Edge, s: u64, p: u64) -> Result<bool, LinkError> {
        if edge.addend != FIELD_IS_LAST || is_null_external(self.graph, edge.target, s) {
            return Ok(false);
        }
        let code = self.graph.block_content(self.block);
        let distance = s.wrapping_sub(p) as i64;
        let Some(relaxed) = relax(edge.kind, code, edge.offset as usize, distance, s) else { return Ok(false) };
        self.write(edge.offset.wrapping_add_signed(relaxed.start), &relaxed.bytes[..relaxed.len])?;
        Ok(true)
    }

    /// Writes the low `width` bytes of `value` if it fits in them.
    fn field(&self, edge: &Edge, value: u64, width: usize, fit: Fit, hint: &'static str) -> Result<(), LinkError> {
        let bits = width as u32 * 8;
        let fits = bits == 64 || {
            let (signed, unsigned) = ((value as i64) >> (bits - 1), value >> bits);
            let (as_signed, as_unsigned) = (signed == 0 || signed == -1, unsigned == 0);
            match fit {
                Fit::Signed => as_signed,
                Fit::Unsigned => as_unsigned,
                Fit::Bits => as_signed || as_unsigned,
            }
        };
        if fits {
            self.write(edge.offset, &value.to_le_bytes()[..width])
        } else {
            Err(self.out_of_range(edge, value, hint))
        }
    }

    fn out_of_range(&self, edge: &Edge, value: u64, hint: &'static str) -> LinkError {
        let graph = self.graph;
        let fixup = graph.block(self.block).addr.checked_add(edge.offset).unwrap_or(ExecutorAddr::NULL);
        let is_low = fixup.as_u64() <= i32::MAX as u64;
        let hint = if is_low && matches!(hint, PIC_HINT | ABSOLUTE_HINT) { LOW_HINT } else { hint };
        LinkError::OutOfRange {
            place: self.place(edge),
            relocation: edge.kind.to_string(),
            symbol: self.symbol(edge),
            target: ExecutorAddr::new(address(graph, edge.target)),
            fixup,
            value: value as i64,
            hint,
        }
    }
}

/// The address of a symbol. What a weak reference does not find is at 0.
fn address(graph: &LinkGraph, symbol: SymbolId) -> u64 {
    graph.symbol_address(symbol).map_or(0, ExecutorAddr::as_u64)
}

fn is_null_external(graph: &LinkGraph, symbol: SymbolId, address: u64) -> bool {
    address == 0 && matches!(graph.symbol(symbol).place, Place::External { .. })
}

fn table_start(block: Option<BlockId>, graph: &LinkGraph) -> u64 {
    block.map_or(0, |block| graph.block(block).addr.as_u64())
}

/// The address of a symbol's entry in a table.
fn entry(graph: &LinkGraph, table: &Table, symbol: SymbolId, entry_bytes: u64) -> Option<u64> {
    let position = table.position(symbol)?;
    Some(table_start(table.block, graph).wrapping_add(u64::from(position) * entry_bytes))
}

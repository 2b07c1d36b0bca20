//! Linked objects as debuggers want them: a copy of the file in which sections have the addresses where they were linked.
//!
//! A debugger applies the relocations of debug information by itself, from the symbols: it has to find there where
//! everything is, in this object and elsewhere.

use crate::debug_symbols::symbols_object;
use crate::identify::check_relocatable;
use crate::section::runs_fragment;
use farlink_graph::{LinkGraph, SectionId, SymbolId};
use object::LittleEndian as LE;
use object::elf;
use object::read::elf::{FileHeader, SectionHeader, Sym};

type Header = elf::FileHeader64<LE>;

// Offsets and lengths in bytes: see the gABI, "Sections" and "Symbol Table".
const SECTION_HEADER_BYTES: usize = 64;
const SH_FLAGS: usize = 8;
const SH_ADDR: usize = 16;
const SYMBOL_BYTES: usize = 24;
const ST_SHNDX: usize = 6;
const ST_VALUE: usize = 8;

/// Returns the file of a linked graph with the addresses of its sections and symbols in it.
///
/// Sections that were not linked are marked as having no memory. If the graph has not been read from a file, it is one with
/// the names of its functions. None if there are none either.
#[must_use]
pub fn debug_object(graph: &LinkGraph) -> Option<Vec<u8>> {
    if check_relocatable(graph.name(), graph.bytes()).is_err() {
        return symbols_object(graph);
    }
    let mut file = Vec::from(&graph.bytes()[..]);
    let header = Header::parse(&graph.bytes()[..]).ok()?;
    let sections = header.sections(LE, &graph.bytes()[..]).ok()?;
    let headers = usize::try_from(header.e_shoff(LE)).ok()?;
    // The graph has the sections with memory in the file's order, and one more after each fragment of a function.
    let mut next = graph.sections();
    let mut linked: Vec<Option<SectionId>> = Vec::with_capacity(sections.len());
    for (index, section) in sections.iter().enumerate() {
        let name = sections.section_name(LE, section).ok()?;
        let flags = section.sh_flags(LE).0;
        let has_memory = flags & elf::SHF_ALLOC.0 != 0 && flags & elf::SHF_EXCLUDE.0 == 0;
        if !has_memory || section.sh_type(LE) == elf::SHT_NULL {
            linked.push(None);
            continue;
        }
        let id = next.next().filter(|&id| graph.section_name(id).as_bytes() == name)?;
        let is_fragment = flags & elf::SHF_EXECINSTR.0 != 0 && section.sh_size(LE) > 0 && runs_fragment(name).is_some();
        if is_fragment {
            next.next()?;
        }
        let range = graph.section_range(id).filter(|_| !is_fragment);
        let position = headers.checked_add(index.checked_mul(SECTION_HEADER_BYTES)?)?;
        match range {
            Some(range) => put(&mut file, position + SH_ADDR, &range.start().as_u64().to_le_bytes())?,
            None => put(&mut file, position + SH_FLAGS, &(flags & !elf::SHF_ALLOC.0).to_le_bytes())?,
        }
        linked.push(range.map(|_| id));
    }
    patch_symbols(graph, &mut file, &linked)?;
    patch_thread_locals(graph, &mut file)?;
    Some(file)
}

/// Makes symbols absolute that are not in a section with an address, and have one all the same: what other objects define,
/// and common symbols.
fn patch_symbols(graph: &LinkGraph, file: &mut [u8], linked: &[Option<SectionId>]) -> Option<()> {
    let bytes = &graph.bytes()[..];
    let sections = Header::parse(bytes).ok()?.sections(LE, bytes).ok()?;
    let Some(table) = sections.iter().find(|section| section.sh_type(LE) == elf::SHT_SYMTAB) else { return Some(()) };
    let start = usize::try_from(table.sh_offset(LE)).ok()?;
    let symbols = sections.symbols(LE, bytes, elf::SHT_SYMTAB).ok()?;
    for (index, symbol) in symbols.iter().enumerate().skip(1) {
        let is_elsewhere = matches!(symbol.st_shndx(LE), elf::SHN_UNDEF | elf::SHN_COMMON);
        let is_lost = || {
            let section = symbols.symbol_section(LE, symbol, object::SymbolIndex(index)).ok().flatten();
            section.is_some_and(|section| linked.get(section.0).is_some_and(Option::is_none))
        };
        let wants_address = is_elsewhere || is_lost() && !matches!(symbol.st_type(), elf::STT_SECTION | elf::STT_FILE);
        let id = u32::try_from(index).ok().map(SymbolId::from_index)?;
        if let Some(address) = Some(id).filter(|_| wants_address).and_then(|id| graph.symbol_address(id)) {
            let position = start.checked_add(index.checked_mul(SYMBOL_BYTES)?)?;
            put(file, position + ST_SHNDX, &elf::SHN_ABS.0.to_le_bytes())?;
            put(file, position + ST_VALUE, &address.as_u64().to_le_bytes())?;
        }
    }
    Some(())
}

// How compilers say where a thread-local variable is: see DWARF 5, "Literal Encodings" and "Stack Operations".
const DW_OP_CONST8U: u8 = 0x0e;
const DW_OP_FORM_TLS_ADDRESS: u8 = 0x9b;
const DW_OP_GNU_PUSH_TLS_ADDRESS: u8 = 0xe0;
/// No operation: a debugger says that it does not know it.
const NO_OPERATION: u8 = 0;

/// Takes out of debug information where thread-local variables are.
///
/// Debuggers ask the C library for the variables of an object by its entry in the dynamic linker's list. There is none for a
/// linked object; they take the program's, and would show another variable. In compressed debug information nothing is
/// changed.
fn patch_thread_locals(graph: &LinkGraph, file: &mut [u8]) -> Option<()> {
    let bytes = &graph.bytes()[..];
    let sections = Header::parse(bytes).ok()?.sections(LE, bytes).ok()?;
    for section in sections.iter() {
        let Some((relocations, _)) = section.rela(LE, bytes).ok()? else { continue };
        let target = sections.section(object::SectionIndex(section.sh_info(LE) as usize)).ok()?;
        if target.sh_flags(LE).0 & (elf::SHF_ALLOC.0 | elf::SHF_COMPRESSED.0) != 0 {
            continue;
        }
        let start = usize::try_from(target.sh_offset(LE)).ok()?;
        // GCC writes half of the number so, and zeros for the other half.
        let is_tls = |relocation: &&elf::Rela64<LE>| {
            matches!(relocation.r_type(LE, false), elf::R_X86_64_DTPOFF64 | elf::R_X86_64_DTPOFF32)
        };
        for relocation in relocations.iter().filter(is_tls) {
            let at = start.checked_add(usize::try_from(relocation.r_offset.get(LE)).ok()?)?;
            let (before, after) = (at.checked_sub(1)?, at.checked_add(8)?);
            let pushes = matches!(file.get(after), Some(&(DW_OP_FORM_TLS_ADDRESS | DW_OP_GNU_PUSH_TLS_ADDRESS)));
            if pushes && file.get(before) == Some(&DW_OP_CONST8U) {
                put(file, after, &[NO_OPERATION])?;
            }
        }
    }
    Some(())
}

fn put(file: &mut [u8], at: usize, value: &[u8]) -> Option<()> {
    file.get_mut(at..at.checked_add(value.len())?)?.copy_from_slice(value);
    Some(())
}

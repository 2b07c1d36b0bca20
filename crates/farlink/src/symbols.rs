//! What the bytes of objects and libraries say about their code: functions, unwind information, lines.
//!
//! A relocatable object has no addresses of its own, so its code is given some here, one section after the other, and its
//! unwind and debug information is relocated to those. Where in the executor it has come to be does not matter to them.
//! Everything is read again from the bytes when something has happened, so that a link pays nothing for it.

use crate::known_code::Notes;
use farlink_addr::{ExecutorAddr, ExecutorAddrRange};
use gimli::{EndianRcSlice, LittleEndian};
use object::{Object, ObjectSection, ObjectSegment, ObjectSymbol, RelocationKind, RelocationTarget, SectionFlags};
use std::collections::HashMap;
use std::rc::Rc;

/// Bytes of unwind or debug information, as they are read.
pub(crate) type Reader = EndianRcSlice<LittleEndian>;

/// Where the code of relocatable objects is taken to begin.
const FIRST_ADDRESS: u64 = 0x1_0000;

/// Alignment that every section gets.
const SECTION_ALIGN: u64 = 64;

/// `SHF_EXECINSTR`.
const EXECUTABLE: u64 = 4;

/// A function.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Function {
    pub(crate) start: u64,
    /// Length in bytes; 0 if nothing is said.
    pub(crate) size: u64,
    pub(crate) name: String,
}

/// A part of a file that has addresses.
#[derive(Debug)]
struct Part {
    file_offset: u64,
    size: u64,
    addr: u64,
}

/// What is known of the code of one file.
pub(crate) struct Code {
    parts: Vec<Part>,
    /// By their addresses.
    functions: Vec<Function>,
    eh_frame: Option<(Reader, gimli::BaseAddresses)>,
    lines: Option<addr2line::Context<Reader>>,
}

fn reader(bytes: &[u8]) -> Reader {
    EndianRcSlice::new(Rc::from(bytes), LittleEndian)
}

impl Code {
    /// Reads a relocatable object.
    pub(crate) fn of_object(bytes: &[u8]) -> Option<Self> {
        let file = object::File::parse(bytes).ok()?;
        let mut next = FIRST_ADDRESS;
        let mut addresses: HashMap<object::SectionIndex, u64> = HashMap::new();
        let mut parts = Vec::new();
        for section in file.sections() {
            let is_code = matches!(section.flags(), SectionFlags::Elf { sh_flags, .. } if sh_flags.0 & EXECUTABLE != 0);
            if !is_code && section.name() != Ok(".eh_frame") {
                continue;
            }
            let addr = next;
            next = addr.checked_add(section.size())?.checked_next_multiple_of(SECTION_ALIGN)?;
            addresses.insert(section.index(), addr);
            if let (true, Some((file_offset, size))) = (is_code, section.file_range()) {
                parts.push(Part { file_offset, size, addr });
            }
        }
        let base = |section: Option<object::SectionIndex>| {
            section.and_then(|index| addresses.get(&index)).copied().unwrap_or_default()
        };
        let mut functions = functions(file.symbols(), |symbol| {
            let section = symbol.section_index().filter(|index| addresses.contains_key(index))?;
            symbol.address().checked_add(base(Some(section)))
        });
        functions.sort_by_key(|function| function.start);
        let relocated = |name: &str| relocated(&file, name, &base);
        let eh_frame = relocated(".eh_frame").map(|bytes| {
            let addr = base(file.section_by_name(".eh_frame").map(|section| section.index()));
            (reader(&bytes), gimli::BaseAddresses::default().set_eh_frame(addr))
        });
        let section = |id: gimli::SectionId| Ok::<_, gimli::Error>(reader(&relocated(id.name()).unwrap_or_default()));
        let has_lines = file.section_by_name(".debug_line").is_some();
        let dwarf = has_lines.then(|| gimli::Dwarf::load(section).ok()).flatten();
        let lines = dwarf.and_then(|dwarf| addr2line::Context::from_dwarf(dwarf).ok());
        Some(Self { parts, functions, eh_frame, lines })
    }

    /// Returns what is known by notes and the unwind information as it is linked: the addresses are those of the executor.
    pub(crate) fn of_notes(notes: Notes, eh_frame: Option<Vec<u8>>) -> Self {
        let part = |(addr, size)| Part { file_offset: addr, size, addr };
        let mut functions = notes.functions;
        functions.sort_by_key(|function| function.start);
        let bases = |start: ExecutorAddr| gimli::BaseAddresses::default().set_eh_frame(start.as_u64());
        let start = notes.eh_frame.map(ExecutorAddrRange::start);
        let eh_frame = eh_frame.zip(start).map(|(bytes, start)| (reader(&bytes), bases(start)));
        Self { parts: notes.places.into_iter().map(part).collect(), functions, eh_frame, lines: None }
    }

    /// Reads a shared library or a program, which have addresses. Their lines are not looked for.
    pub(crate) fn of_library(bytes: &[u8]) -> Option<Self> {
        let file = object::File::parse(bytes).ok()?;
        let part = |segment: object::Segment<'_, '_>| {
            let (file_offset, size) = segment.file_range();
            Part { file_offset, size, addr: segment.address() }
        };
        let parts = file.segments().map(part).collect();
        let address = |symbol: &object::Symbol<'_, '_>| Some(symbol.address()).filter(|_| symbol.is_definition());
        let mut functions = functions(file.symbols().chain(file.dynamic_symbols()), address);
        functions.sort_by_key(|function| function.start);
        let eh_frame = file.section_by_name(".eh_frame").and_then(|section| {
            let bases = gimli::BaseAddresses::default().set_eh_frame(section.address());
            Some((reader(section.data().ok()?), bases))
        });
        Some(Self { parts, functions, eh_frame, lines: None })
    }

    /// Returns the address, as this file has it, of what is at an offset in it.
    pub(crate) fn address_of(&self, file_offset: u64) -> Option<u64> {
        self.parts.iter().find_map(|part| {
            let distance = file_offset.checked_sub(part.file_offset).filter(|&distance| distance < part.size)?;
            part.addr.checked_add(distance)
        })
    }

    /// Returns the name of the function at an address, and how far in it that is.
    pub(crate) fn function_at(&self, addr: u64) -> Option<(&str, u64)> {
        let after = self.functions.partition_point(|function| function.start <= addr);
        // Of several that begin in one place the first that is long enough counts; one without a size goes on to the next.
        let covers = |function: &&Function| function.size == 0 || addr - function.start < function.size;
        let found = self.functions[..after].iter().rev().take(16).find(covers)?;
        Some((&found.name, addr - found.start))
    }

    /// Returns the file and the line that an address was compiled from.
    pub(crate) fn line_at(&self, addr: u64) -> Option<(String, u32)> {
        let location = self.lines.as_ref()?.find_location(addr).ok()??;
        Some((location.file?.to_owned(), location.line?))
    }

    /// Returns the unwind information and what its addresses count from.
    pub(crate) fn eh_frame(&self) -> Option<(gimli::EhFrame<Reader>, &gimli::BaseAddresses)> {
        self.eh_frame.as_ref().map(|(bytes, bases)| (gimli::EhFrame::from(bytes.clone()), bases))
    }
}

/// Collects functions with the addresses that `address` gives them.
fn functions<'a, S: ObjectSymbol<'a>>(
    symbols: impl Iterator<Item = S>,
    address: impl Fn(&S) -> Option<u64>,
) -> Vec<Function> {
    let function = |symbol: S| {
        let is_named = matches!(symbol.kind(), object::SymbolKind::Text | object::SymbolKind::Unknown);
        let name = symbol.name().ok().filter(|name| is_named && !name.is_empty())?;
        Some(Function { start: address(&symbol)?, size: symbol.size(), name: name.to_owned() })
    };
    symbols.filter_map(function).collect()
}

/// Returns the bytes of a section with its relocations applied, where they are of the kinds that such sections have.
fn relocated(
    file: &object::File<'_>,
    name: &str,
    base: &impl Fn(Option<object::SectionIndex>) -> u64,
) -> Option<Vec<u8>> {
    let section = file.section_by_name(name)?;
    let mut bytes = section.uncompressed_data().ok()?.into_owned();
    let start = base(Some(section.index()));
    for (offset, relocation) in section.relocations() {
        let target = match relocation.target() {
            RelocationTarget::Symbol(index) => {
                let symbol = file.symbol_by_index(index).ok()?;
                symbol.address().wrapping_add(base(symbol.section_index()))
            }
            RelocationTarget::Section(index) => base(Some(index)),
            _ => 0,
        };
        let value = target.wrapping_add_signed(relocation.addend());
        let value = match relocation.kind() {
            RelocationKind::Absolute => value,
            RelocationKind::Relative => value.wrapping_sub(start.wrapping_add(offset)),
            _ => continue,
        };
        let size = usize::from(relocation.size() / 8);
        let place = usize::try_from(offset).ok().and_then(|at| bytes.get_mut(at..at.checked_add(size)?));
        if let (Some(place), true) = (place, size <= 8) {
            place.copy_from_slice(&value.to_le_bytes()[..size]);
        }
    }
    Some(bytes)
}

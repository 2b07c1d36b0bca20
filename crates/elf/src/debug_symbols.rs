//! A file with nothing but the names of a linked graph's code, for debuggers, where the graph was not read from one.

use farlink_addr::{ExecutorAddr, ExecutorAddrRange, MemProt};
use farlink_graph::{LinkGraph, SymbolId, SymbolType};
use object::elf;

// Lengths in bytes: see the gABI.
const FILE_HEADER_BYTES: usize = 64;
const SECTION_HEADER_BYTES: u16 = 64;
const SYMBOL_BYTES: u64 = 24;

/// Sections before those of code: none, symbols, and all names.
const FIRST_CODE: u16 = 3;

/// `STB_GLOBAL`, before the type of a symbol.
const GLOBAL: u8 = 1 << 4;

/// A table of names. The first is empty.
struct Names(Vec<u8>);

impl Names {
    /// Adds a name; gives where it is.
    fn add(&mut self, name: &str) -> u32 {
        let position = self.0.len() as u32;
        self.0.extend(name.bytes().filter(|&byte| byte != 0));
        self.0.push(0);
        position
    }
}

/// A section header, as far as it differs from one of zeros.
#[derive(Default)]
struct SectionHeader {
    name: u32,
    kind: u32,
    flags: u64,
    addr: u64,
    offset: u64,
    size: u64,
    link: u32,
    info: u32,
    align: u64,
    entry_bytes: u64,
}

impl SectionHeader {
    fn write(&self, file: &mut Vec<u8>) {
        file.extend(self.name.to_le_bytes());
        file.extend(self.kind.to_le_bytes());
        for word in [self.flags, self.addr, self.offset, self.size] {
            file.extend(word.to_le_bytes());
        }
        file.extend(self.link.to_le_bytes());
        file.extend(self.info.to_le_bytes());
        file.extend(self.align.to_le_bytes());
        file.extend(self.entry_bytes.to_le_bytes());
    }
}

/// Returns a relocatable object with a section for each of the graph's that has code, at its address and without content,
/// and a symbol for each function. None if there is no code.
pub(crate) fn symbols_object(graph: &LinkGraph) -> Option<Vec<u8>> {
    let is_code = |&id: &_| graph.section(id).group.prot.contains(MemProt::EXEC);
    let code: Vec<ExecutorAddrRange> =
        graph.sections().filter(is_code).filter_map(|id| graph.section_range(id)).collect();
    if code.is_empty() || code.len() > usize::from(u16::MAX - FIRST_CODE) {
        return None;
    }
    let mut names = Names(vec![0]);
    let mut symbols = vec![0; SYMBOL_BYTES as usize];
    for id in graph.definitions().filter(|&id| graph.symbol(id).kind == SymbolType::Function) {
        write_symbol(graph, id, &code, &mut names, &mut symbols);
    }
    let [symbols_name, names_name, code_name] = [".symtab", ".strtab", ".text"].map(|name| names.add(name));
    let symbols_offset = FILE_HEADER_BYTES as u64;
    let names_offset = symbols_offset + symbols.len() as u64;
    let headers_offset = (names_offset + names.0.len() as u64).next_multiple_of(8);
    let mut headers = vec![
        SectionHeader::default(),
        SectionHeader {
            name: symbols_name,
            kind: elf::SHT_SYMTAB.0,
            offset: symbols_offset,
            size: symbols.len() as u64,
            link: 2,
            // The first that is not local.
            info: 1,
            align: 8,
            entry_bytes: SYMBOL_BYTES,
            ..SectionHeader::default()
        },
        SectionHeader {
            name: names_name,
            kind: elf::SHT_STRTAB.0,
            offset: names_offset,
            size: names.0.len() as u64,
            align: 1,
            ..SectionHeader::default()
        },
    ];
    headers.extend(code.iter().map(|range| SectionHeader {
        name: code_name,
        kind: elf::SHT_NOBITS.0,
        flags: elf::SHF_ALLOC.0 | elf::SHF_EXECINSTR.0,
        addr: range.start().as_u64(),
        offset: headers_offset,
        size: range.len(),
        align: 1,
        ..SectionHeader::default()
    }));
    let mut file = file_header(headers_offset, FIRST_CODE + code.len() as u16);
    file.extend(symbols);
    file.extend(names.0);
    file.resize(headers_offset as usize, 0);
    headers.iter().for_each(|header| header.write(&mut file));
    Some(file)
}

fn file_header(headers_offset: u64, sections: u16) -> Vec<u8> {
    let mut header = vec![0x7f, b'E', b'L', b'F', elf::ELFCLASS64.0, elf::ELFDATA2LSB.0, 1];
    header.resize(16, 0);
    header.extend(elf::ET_REL.0.to_le_bytes());
    header.extend(elf::EM_X86_64.0.to_le_bytes());
    header.extend(1_u32.to_le_bytes());
    header.extend([0; 16]);
    header.extend(headers_offset.to_le_bytes());
    header.extend([0; 4]);
    // Of this header, of program headers and how many, of section headers and how many, and which has their names.
    for half in [FILE_HEADER_BYTES as u16, 0, 0, SECTION_HEADER_BYTES, sections, 2] {
        header.extend(half.to_le_bytes());
    }
    header
}

/// Adds a function, whose value is its offset in its section.
fn write_symbol(graph: &LinkGraph, id: SymbolId, code: &[ExecutorAddrRange], names: &mut Names, symbols: &mut Vec<u8>) {
    let place = |addr: ExecutorAddr| {
        let section = code.iter().position(|range| range.start() <= addr && addr < range.end())?;
        Some((section as u16, addr.offset_from(code[section].start())?))
    };
    let Some((section, value)) = graph.symbol_address(id).and_then(place) else { return };
    symbols.extend(names.add(graph.symbol_name(id)).to_le_bytes());
    symbols.extend([GLOBAL | elf::STT_FUNC.0, 0]);
    symbols.extend((FIRST_CODE + section).to_le_bytes());
    symbols.extend(value.to_le_bytes());
    symbols.extend(graph.symbol(id).size.to_le_bytes());
}

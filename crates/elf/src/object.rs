//! Relocatable objects: sections, COMDAT groups, symbols and relocations to a graph.

use crate::error::ElfError;
use crate::identify::check_relocatable;
use crate::relocation::{Relocation, relocations};
use crate::section::{Purpose, purpose, runs_fragment};
use farlink_addr::{Align, AllocGroup, MemProt};
use farlink_graph::{
    Arch, BlockId, Bytes, ComdatId, Content, Edge, EdgeKind, GraphBuilder, LinkGraph, Linkage, NewSection, Place,
    Scope, SectionKind, SymbolId, SymbolType, Text,
};
use object::LittleEndian as LE;
use object::elf;
use object::read::elf::{FileHeader, SectionHeader, SectionTable, Sym, SymbolTable};
use std::ops::Range;

type Header = elf::FileHeader64<LE>;

/// Makes the graph of the relocatable object `bytes`, which messages call `name`.
///
/// Sections without memory (debug information, for one) are left out.
///
/// # Errors
///
/// Fails if the bytes are not a relocatable ELF object for x86-64, are malformed, or hold what cannot be linked
/// whatever refers to it. What is not supported but might not be needed is refused when it is linked.
pub fn parse_object(name: &str, bytes: Bytes) -> Result<LinkGraph, ElfError> {
    check_relocatable(name, &bytes)?;
    let parser = Parser::new(name, &bytes)?;
    let mut builder = GraphBuilder::new(name, Arch::X86_64, bytes.clone());
    let comdats = parser.add_comdats(&mut builder)?;
    let (blocks, fragments) = parser.add_sections(&mut builder, &comdats)?;
    parser.add_symbols(&mut builder, &blocks)?;
    parser.add_edges(&mut builder, &blocks)?;
    for FragmentPointer { pointer, function } in fragments {
        let (linkage, scope) = (Linkage::Strong, Scope::Local);
        let place = Place::Defined { block: function, offset: 0 };
        let target = builder.add_symbol(Text::Own(""), place, 0, linkage, scope, SymbolType::Function);
        builder.add_edges(pointer, [Edge { offset: 0, kind: EdgeKind::Pointer64, target, addend: 0 }]);
    }
    Ok(builder.finish()?)
}

/// A common symbol of the large model: see the psABI, "Symbol Table".
const SHN_LARGE_COMMON: elf::SymbolSection = elf::SymbolSection(0xff02);

/// The flag of sections of the large model: see the psABI, "Section Attribute Flags".
const SHF_LARGE: u64 = 0x1000_0000;

/// What an object that holds nothing but GCC's intermediate code defines.
const SLIM_LTO: &[u8] = b"__gnu_lto_slim";

/// The function by which an unwinder finds unwind information. That of linked code is known to the executor's, so an
/// unwinder that is linked (`libgcc_eh.a`) is given that one instead of its own.
const FIND_FDE: &[u8] = b"_Unwind_Find_FDE";

/// The section that says whether an object's code wants to run on its stack.
const STACK_NOTE: &[u8] = b".note.GNU-stack";

/// The sections that say which lines code was compiled from; the second as older tools compress it.
const LINES: [&[u8]; 2] = [b".debug_line", b".zdebug_line"];

/// Returns where the default version of a name begins.
fn default_version(name: &[u8]) -> Option<usize> {
    name.windows(2).position(|pair| pair == b"@@")
}

fn is_common(symbol: &elf::Sym64<LE>) -> bool {
    matches!(symbol.st_shndx(LE), elf::SHN_COMMON | SHN_LARGE_COMMON)
}

struct Parser<'a> {
    name: &'a str,
    bytes: &'a [u8],
    sections: SectionTable<'a, Header>,
    symbols: SymbolTable<'a, Header>,
}

/// A section that is linked.
#[derive(Clone, Copy)]
struct Linked {
    block: BlockId,
    size: u64,
    is_zero_fill: bool,
    /// How far its bytes are from the beginning of its block.
    shift: u64,
}

/// `sub $8, %rsp`: what goes before a fragment of a function, so that it can call others.
const FRAGMENT_START: [u8; 4] = [0x48, 0x83, 0xec, 0x08];

/// `add $8, %rsp; ret`
const FRAGMENT_END: [u8; 5] = [0x48, 0x83, 0xc4, 0x08, 0xc3];

/// A pointer to a function made of a fragment, in an array of initializers or finalizers.
struct FragmentPointer {
    pointer: BlockId,
    function: BlockId,
}

impl<'a> Parser<'a> {
    fn new(name: &'a str, bytes: &'a [u8]) -> Result<Self, ElfError> {
        let malformed = |error: object::read::Error| ElfError::malformed(name, error);
        let header = Header::parse(bytes).map_err(malformed)?;
        let sections = header.sections(LE, bytes).map_err(malformed)?;
        if sections.iter().filter(|section| section.sh_type(LE) == elf::SHT_SYMTAB).count() > 1 {
            return Err(ElfError::malformed(name, "it has more than one symbol table"));
        }
        let symbols = sections.symbols(LE, bytes, elf::SHT_SYMTAB).map_err(malformed)?;
        Ok(Self { name, bytes, sections, symbols })
    }

    fn malformed(&self, what: impl ToString) -> ElfError {
        ElfError::malformed(self.name, what)
    }

    /// Returns where in the file a part of its bytes is.
    fn position(&self, part: &[u8]) -> Range<usize> {
        let start = part.as_ptr().addr().saturating_sub(self.bytes.as_ptr().addr());
        start..start + part.len()
    }

    fn text(&self, builder: &GraphBuilder, part: &[u8]) -> Result<Text, ElfError> {
        if part.is_empty() {
            return Ok(Text::Own(""));
        }
        let text = builder.text(self.position(part));
        text.ok_or_else(|| self.malformed(format!("the name {:?} is not UTF-8", String::from_utf8_lossy(part))))
    }

    fn section_name(&self, section: &elf::SectionHeader64<LE>) -> Result<&'a [u8], ElfError> {
        self.sections.section_name(LE, section).map_err(|error| self.malformed(error))
    }

    /// Adds the COMDAT groups; gives the group of each section.
    fn add_comdats(&self, builder: &mut GraphBuilder) -> Result<Vec<Option<ComdatId>>, ElfError> {
        let mut comdats = vec![None; self.sections.len()];
        for section in self.sections.iter() {
            let group = section.group(LE, self.bytes).map_err(|error| self.malformed(error))?;
            let Some((_, members)) = group.filter(|(flags, _)| flags.0 & elf::GRP_COMDAT.0 != 0) else { continue };
            let signature = self.signature(section)?;
            let comdat = builder.add_comdat(self.text(builder, signature)?);
            for member in members {
                let slot = comdats.get_mut(member.get(LE) as usize);
                *slot.ok_or_else(|| self.malformed("a COMDAT group names a section that is not there"))? = Some(comdat);
            }
        }
        Ok(comdats)
    }

    /// Returns the signature of a group: the name of its symbol, or of that symbol's section.
    fn signature(&self, group: &elf::SectionHeader64<LE>) -> Result<&'a [u8], ElfError> {
        let index = object::SymbolIndex(group.sh_info(LE) as usize);
        let symbol = self.symbols.symbol(index).map_err(|error| self.malformed(error))?;
        let section = self.symbols.symbol_section(LE, symbol, index).map_err(|error| self.malformed(error))?;
        match section {
            Some(section) if symbol.st_type() == elf::STT_SECTION => {
                let section = self.sections.section(section).map_err(|error| self.malformed(error))?;
                self.section_name(section)
            }
            _ => self.symbols.symbol_name(LE, symbol).map_err(|error| self.malformed(error)),
        }
    }

    /// Adds the sections that have memory; gives the block of each, and pointers to those that are fragments of functions.
    fn add_sections(
        &self,
        builder: &mut GraphBuilder,
        comdats: &[Option<ComdatId>],
    ) -> Result<(Vec<Option<Linked>>, Vec<FragmentPointer>), ElfError> {
        let mut blocks = Vec::with_capacity(self.sections.len());
        let mut fragments = Vec::new();
        for (section, &comdat) in self.sections.iter().zip(comdats) {
            let flags = section.sh_flags(LE).0;
            let has_memory = flags & elf::SHF_ALLOC.0 != 0 && flags & elf::SHF_EXCLUDE.0 == 0;
            if !has_memory || section.sh_type(LE) == elf::SHT_NULL {
                if section.sh_type(LE) == elf::SHT_REL {
                    return Err(self.malformed("x86-64 has no relocations without addends (SHT_REL)"));
                }
                if flags & elf::SHF_EXECINSTR.0 != 0 && self.section_name(section)? == STACK_NOTE {
                    builder.set_executable_stack();
                }
                if section.sh_type(LE) == elf::SHT_PROGBITS && LINES.contains(&self.section_name(section)?) {
                    builder.set_has_lines();
                }
                blocks.push(None);
                continue;
            }
            let linked = self.add_section(builder, section, flags, comdat)?;
            if linked.shift > 0
                && let Some(kind) = runs_fragment(self.section_name(section)?)
            {
                let pointer = NewSection {
                    name: Text::Own("$__FRAGMENT"),
                    kind,
                    group: AllocGroup::standard(MemProt::READ),
                    comdat,
                    retain: false,
                    is_large: false,
                    content: Content::Own(vec![0; 8]),
                    size: 8,
                    align: Align::new(8).expect("8 is a power of two"),
                };
                fragments.push(FragmentPointer { pointer: builder.add_section(pointer).1, function: linked.block });
            }
            blocks.push(Some(linked));
        }
        Ok((blocks, fragments))
    }

    fn add_section(
        &self,
        builder: &mut GraphBuilder,
        section: &elf::SectionHeader64<LE>,
        flags: u64,
        comdat: Option<ComdatId>,
    ) -> Result<Linked, ElfError> {
        let name = self.section_name(section)?;
        let label = String::from_utf8_lossy(name);
        let size = section.sh_size(LE);
        let Purpose { kind, group } =
            purpose(&label, section.sh_type(LE), flags).map_err(|what| ElfError::unsupported(self.name, what))?;
        let align = Align::new(section.sh_addralign(LE).max(1));
        let align = align.ok_or_else(|| self.malformed(format!("the alignment of {label} is not a power of two")))?;
        let content = if section.sh_type(LE) == elf::SHT_NOBITS {
            Content::ZeroFill
        } else {
            let data = section.data(LE, self.bytes).map_err(|error| self.malformed(format!("{label}: {error}")))?;
            Content::Object(self.position(data))
        };
        let is_array = matches!(kind, SectionKind::Init { .. } | SectionKind::Fini { .. });
        if is_array && !size.is_multiple_of(8) {
            return Err(self.malformed(format!("{label} is not an array of pointers")));
        }
        let is_fragment = flags & elf::SHF_EXECINSTR.0 != 0 && size > 0 && runs_fragment(name).is_some();
        let (content, shift, size_in_block) = match content {
            Content::Object(range) if is_fragment => {
                let function = [&FRAGMENT_START, &self.bytes[range], &FRAGMENT_END].concat();
                let size = function.len() as u64;
                (Content::Own(function), FRAGMENT_START.len() as u64, size)
            }
            content => (content, 0, size),
        };
        let is_zero_fill = content == Content::ZeroFill;
        let retain = flags & elf::SHF_GNU_RETAIN.0 != 0;
        let is_large = flags & SHF_LARGE != 0;
        let name = self.text(builder, name)?;
        let section = NewSection { name, kind, group, comdat, retain, is_large, content, size: size_in_block, align };
        let (_, block) = builder.add_section(section);
        Ok(Linked { block, size, is_zero_fill, shift })
    }

    /// Adds a symbol for each of the object's, with the same numbers.
    fn add_symbols(&self, builder: &mut GraphBuilder, blocks: &[Option<Linked>]) -> Result<(), ElfError> {
        for (index, symbol) in self.symbols.enumerate() {
            let place = if is_common(symbol) {
                Place::Defined { block: self.add_common(builder, index)?, offset: 0 }
            } else {
                self.place(symbol, index, blocks)?
            };
            self.add_symbol(builder, symbol, place)?;
        }
        if self.symbols.is_empty() {
            // Relocations without a symbol name the first one.
            let (linkage, scope) = (Linkage::Strong, Scope::Local);
            builder.add_symbol(Text::Own(""), Place::Absolute(0), 0, linkage, scope, SymbolType::None);
        }
        Ok(())
    }

    fn add_symbol(
        &self,
        builder: &mut GraphBuilder,
        symbol: &elf::Sym64<LE>,
        mut place: Place,
    ) -> Result<SymbolId, ElfError> {
        let mut name = self.symbols.symbol_name(LE, symbol).map_err(|error| self.malformed(error))?;
        if name == SLIM_LTO {
            let what = "holds intermediate code for link-time optimization only: compile without -flto, or with \
                        -ffat-lto-objects";
            return Err(ElfError::unsupported(self.name, what.to_owned()));
        }
        if let Some(at) = default_version(name).filter(|_| place != Place::External { weak: false }) {
            // `name@@VERSION` is the definition that references without a version mean.
            name = &name[..at];
        }
        if name == FIND_FDE {
            place = Place::External { weak: false };
        }
        let linkage = match symbol.st_bind() {
            _ if is_common(symbol) => Linkage::Common,
            // Of unique symbols, too, the first one counts.
            elf::STB_WEAK | elf::STB_GNU_UNIQUE => Linkage::Weak,
            _ => Linkage::Strong,
        };
        let scope = match (symbol.st_bind(), symbol.st_visibility()) {
            (elf::STB_LOCAL, _) => Scope::Local,
            (_, elf::STV_HIDDEN | elf::STV_INTERNAL) => Scope::Hidden,
            _ => Scope::Default,
        };
        let kind = match symbol.st_type() {
            elf::STT_FUNC => SymbolType::Function,
            elf::STT_OBJECT | elf::STT_COMMON => SymbolType::Object,
            elf::STT_SECTION => SymbolType::Section,
            elf::STT_TLS => SymbolType::Tls,
            elf::STT_GNU_IFUNC => SymbolType::IndirectFunction,
            _ => SymbolType::None,
        };
        // The name of a section symbol is its section's: it has none of its own.
        let name = if kind == SymbolType::Section { Text::Own("") } else { self.text(builder, name)? };
        Ok(builder.add_symbol(name, place, symbol.st_size(LE), linkage, scope, kind))
    }

    fn place(
        &self,
        symbol: &elf::Sym64<LE>,
        index: object::SymbolIndex,
        blocks: &[Option<Linked>],
    ) -> Result<Place, ElfError> {
        let value = symbol.st_value(LE);
        match symbol.st_shndx(LE) {
            _ if index.0 == 0 => return Ok(Place::Absolute(0)),
            elf::SHN_UNDEF => return Ok(Place::External { weak: symbol.st_bind() == elf::STB_WEAK }),
            _ if symbol.st_type() == elf::STT_FILE => return Ok(Place::Discarded),
            elf::SHN_ABS => return Ok(Place::Absolute(value)),
            _ => {}
        }
        let section = self.symbols.symbol_section(LE, symbol, index).map_err(|error| self.malformed(error))?;
        let section = section.ok_or_else(|| self.malformed(format!("symbol {} is in no section", index.0)))?;
        let linked = blocks.get(section.0);
        let linked =
            linked.ok_or_else(|| self.malformed(format!("symbol {} is in a section that is not there", index.0)))?;
        match linked {
            Some(linked) if value <= linked.size => {
                Ok(Place::Defined { block: linked.block, offset: value + linked.shift })
            }
            Some(_) => Err(self.malformed(format!("symbol {} lies past the end of its section", index.0))),
            None => Ok(Place::Discarded),
        }
    }

    /// Adds the zeros that a common symbol asks for.
    fn add_common(&self, builder: &mut GraphBuilder, index: object::SymbolIndex) -> Result<BlockId, ElfError> {
        let symbol = self.symbols.symbol(index).map_err(|error| self.malformed(error))?;
        // A common symbol's value is its alignment.
        let align = Align::new(symbol.st_value(LE).max(1));
        let align = align.ok_or_else(|| self.malformed("the alignment of a common symbol is not a power of two"))?;
        let is_large = symbol.st_shndx(LE) == SHN_LARGE_COMMON;
        let is_tls = symbol.st_type() == elf::STT_TLS;
        let section = NewSection {
            name: Text::Own("COMMON"),
            kind: if is_tls { SectionKind::Tls } else { SectionKind::Regular },
            group: AllocGroup::standard(MemProt::RW),
            comdat: None,
            retain: false,
            is_large,
            content: Content::ZeroFill,
            size: symbol.st_size(LE),
            align,
        };
        Ok(builder.add_section(section).1)
    }

    /// Adds the relocations of the sections that are linked.
    fn add_edges(&self, builder: &mut GraphBuilder, blocks: &[Option<Linked>]) -> Result<(), ElfError> {
        let mut edges: Vec<Vec<Edge>> = vec![Vec::new(); blocks.len()];
        for section in self.sections.iter() {
            let Some(relocations) = relocations(section, self.bytes).map_err(|error| self.malformed(error))? else {
                continue;
            };
            let target = section.sh_info(LE) as usize;
            let linked =
                blocks.get(target).ok_or_else(|| self.malformed("relocations of a section that is not there"))?;
            let Some(linked) = linked else { continue };
            if !relocations.has_addends() {
                return Err(self.malformed("x86-64 has no relocations without addends (SHT_CREL)"));
            }
            edges[target].reserve(relocations.size_hint().0);
            for relocation in relocations {
                let relocation = relocation.map_err(|error| self.malformed(error))?;
                if linked.is_zero_fill {
                    return Err(self.malformed(format!("section number {target} has relocations but no bytes")));
                }
                edges[target].extend(self.edge(&relocation, linked, target)?);
            }
        }
        for (linked, edges) in blocks.iter().zip(edges) {
            if let Some(linked) = linked {
                builder.add_edges(linked.block, edges);
            }
        }
        Ok(())
    }

    /// Returns the edge of a relocation; none for the one that does nothing.
    fn edge(&self, relocation: &Relocation, linked: &Linked, section: usize) -> Result<Option<Edge>, ElfError> {
        let r_type = relocation.r_type;
        if r_type == elf::R_X86_64_NONE {
            return Ok(None);
        }
        let kind = EdgeKind::from_x86_64(r_type.0);
        let offset = relocation.r_offset;
        let end = offset.checked_add(kind.width());
        if end.is_none_or(|end| end > linked.size) {
            return Err(
                self.malformed(format!("a relocation at {offset:#x} lies outside its section, number {section}"))
            );
        }
        let symbol = relocation.r_sym;
        if symbol as usize >= self.symbols.len().max(1) {
            return Err(
                self.malformed(format!("a relocation at {offset:#x} names symbol {symbol}, which is not there"))
            );
        }
        Ok(Some(Edge {
            offset: offset + linked.shift,
            kind,
            target: SymbolId::from_index(symbol),
            addend: relocation.r_addend,
        }))
    }
}

//! Archives: objects that are linked when something refers to what they define.

use crate::error::ElfError;
use crate::identify::{InputKind, identify};
use farlink_graph::Bytes;
use object::LittleEndian as LE;
use object::elf;
use object::read::archive::{ArchiveFile, ArchiveOffset};
use object::read::elf::{FileHeader, Sym};
use std::collections::HashMap;
use std::ops::Range;
use std::path::{Path, PathBuf};

/// An archive (`.a`), thin or not.
///
/// Its index is that of the archive where it has one, else made by looking into every member.
#[derive(Debug)]
pub struct Archive {
    name: String,
    bytes: Bytes,
    members: Vec<Member>,
    /// The first member that defines each symbol.
    index: HashMap<Box<str>, Member>,
    /// Of a thin archive's members that are themselves in archives: where in those their headers are.
    nested: HashMap<Member, u64>,
}

/// A member of an archive: the position of its header, which tells members of one name apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Member(u64);

impl Member {
    /// Returns the position of the member's header in the archive, in bytes.
    #[must_use]
    pub fn position(self) -> u64 {
        self.0
    }
}

impl Archive {
    /// Reads an archive's headers and index. Members of a thin archive are files: `name` has to be the archive's path.
    ///
    /// # Errors
    ///
    /// Fails if the bytes are not an archive.
    pub fn parse(name: &str, bytes: Bytes) -> Result<Self, ElfError> {
        let (bytes, nested) = take_nested(bytes);
        let (members, symbols) = {
            let malformed = |error: object::read::Error| ElfError::malformed(name, error);
            let file = ArchiveFile::parse(&*bytes).map_err(malformed)?;
            let members = positions(name, &bytes, &file)?;
            (members, index(name, &file)?)
        };
        let mut archive = Self { name: name.to_owned(), bytes, members, index: HashMap::new(), nested };
        match symbols {
            Some(symbols) => {
                for (symbol, member) in symbols {
                    archive.index.entry(symbol).or_insert(member);
                }
            }
            None => archive.make_index()?,
        }
        Ok(archive)
    }

    /// Returns the bytes of the members of an archive that is not thin, as far as they can be read.
    pub(crate) fn objects(bytes: &[u8]) -> impl Iterator<Item = &[u8]> {
        let file = ArchiveFile::parse(bytes).ok();
        let members = file.into_iter().flat_map(|file| file.members().collect::<Vec<_>>());
        members.filter_map(move |member| member.ok()?.data(bytes).ok())
    }

    /// Returns the members that are objects, in their order.
    pub fn members(&self) -> impl Iterator<Item = Member> + '_ {
        self.members.iter().copied()
    }

    /// Returns the first member that defines `symbol`.
    #[must_use]
    pub fn find(&self, symbol: &str) -> Option<Member> {
        self.index.get(symbol).copied()
    }

    /// Returns what messages call a member, `archive(member)`, and its bytes.
    ///
    /// # Errors
    ///
    /// Fails if there is no member at that position, or if it is a file that cannot be read.
    pub fn member(&self, member: Member) -> Result<(String, Bytes), ElfError> {
        let malformed = |error: object::read::Error| ElfError::malformed(&self.name, error);
        let file = ArchiveFile::parse(&*self.bytes).map_err(malformed)?;
        let found = file.member(ArchiveOffset(member.0)).map_err(malformed)?;
        let name = String::from_utf8_lossy(found.name()).into_owned();
        let display_name = format!("{}({name})", self.name);
        if found.is_thin() {
            let path = self.thin_path(&name);
            let unreadable = |error: String| ElfError::ThinMember {
                archive: self.name.clone(),
                member: path.display().to_string(),
                error,
            };
            let bytes: Bytes = std::fs::read(&path).map_err(|error| unreadable(error.to_string()))?.into();
            let Some(&position) = self.nested.get(&member) else { return Ok((display_name, bytes)) };
            // A thin one has files and no members of its own, which could be this archive again.
            if identify(&bytes) != InputKind::Archive {
                return Err(unreadable("it is not an archive with members of its own".to_owned()));
            }
            let (members, index, nested) = Default::default();
            return Self { name: display_name, bytes, members, index, nested }.member(Member(position));
        }
        let (start, size) = found.file_range();
        let range = usize::try_from(start).ok().zip(start.checked_add(size).and_then(|end| usize::try_from(end).ok()));
        let bytes = range.and_then(|(start, end)| self.bytes.slice(start..end));
        let bytes = bytes.ok_or_else(|| ElfError::malformed(&self.name, format!("its member {name} is cut off")))?;
        Ok((display_name, bytes))
    }

    /// Returns the path of a member of a thin archive, which is written relative to the archive.
    fn thin_path(&self, name: &str) -> PathBuf {
        Path::new(&self.name).parent().unwrap_or(Path::new("")).join(name)
    }

    /// Makes the index of an archive without one.
    fn make_index(&mut self) -> Result<(), ElfError> {
        let mut index = HashMap::new();
        for &member in &self.members {
            let (name, bytes) = self.member(member)?;
            if identify(&bytes) == InputKind::Relocatable {
                for symbol in defined_symbols(&name, &bytes)? {
                    index.entry(symbol).or_insert(member);
                }
            }
        }
        self.index = index;
        Ok(())
    }
}

/// Bytes of a member's header, and of the name in it.
const HEADER_BYTES: usize = 60;
const NAME_BYTES: usize = 16;

/// Where in a header the size of the member is.
const SIZE: Range<usize> = 48..58;

/// What a thin archive begins with.
const THIN_MAGIC: &[u8] = b"!<thin>\n";

/// Finds the members of a thin archive that are themselves in archives. GNU's names for those, `/12:345`, say where their
/// headers are; in the bytes that are returned they are the names of those archives, which is what others understand.
fn take_nested(bytes: Bytes) -> (Bytes, HashMap<Member, u64>) {
    let mut nested = HashMap::new();
    if !bytes.starts_with(THIN_MAGIC) {
        return (bytes, nested);
    }
    let mut plain = bytes.to_vec();
    let mut position = THIN_MAGIC.len();
    while let Some(header) = plain.get_mut(position..).and_then(|rest| rest.get_mut(..HEADER_BYTES)) {
        let number = |digits: &[u8]| std::str::from_utf8(digits).ok()?.trim_end().parse::<u64>().ok();
        let is_table = matches!(header[..2], [b'/', b' ' | b'/']) || header.starts_with(b"/SYM64/");
        let content =
            if is_table { number(&header[SIZE]).and_then(|size| usize::try_from(size).ok()) } else { Some(0) };
        let name = &mut header[..NAME_BYTES];
        if let Some(colon) = name.iter().position(|&byte| byte == b':')
            && let (b'/', Some(of)) = (name[0], number(&name[colon + 1..]))
        {
            name[colon..].fill(b' ');
            nested.insert(Member(position as u64), of);
        }
        // Members begin at even positions. What is malformed is found by who reads it next.
        let next = content
            .and_then(|content| position.checked_add(HEADER_BYTES)?.checked_add(content)?.checked_next_multiple_of(2));
        let Some(next) = next else { break };
        position = next;
    }
    (if nested.is_empty() { bytes } else { plain.into() }, nested)
}

/// Returns the positions of all members' headers.
fn positions(name: &str, bytes: &[u8], file: &ArchiveFile<'_>) -> Result<Vec<Member>, ElfError> {
    let mut positions = Vec::new();
    for member in file.members() {
        let member = member.map_err(|error| ElfError::malformed(name, error))?;
        let header = member.header().map(|header| header.name.as_ptr().addr());
        let position = header.and_then(|header| header.checked_sub(bytes.as_ptr().addr()));
        let position = position.ok_or_else(|| ElfError::malformed(name, "a member has no header"))?;
        positions.push(Member(position as u64));
    }
    Ok(positions)
}

type Index = Vec<(Box<str>, Member)>;

/// Returns the archive's own index, if it has one.
fn index(name: &str, file: &ArchiveFile<'_>) -> Result<Option<Index>, ElfError> {
    let malformed = |error: object::read::Error| ElfError::malformed(name, error);
    let Some(symbols) = file.symbols().map_err(malformed)? else { return Ok(None) };
    let mut index = Vec::new();
    for symbol in symbols {
        let symbol = symbol.map_err(malformed)?;
        // A name that is not UTF-8 is one that no object here can refer to.
        if let Ok(symbol_name) = std::str::from_utf8(symbol.name()) {
            index.push((symbol_name.into(), Member(symbol.offset().0)));
        }
    }
    Ok(Some(index))
}

/// Returns the names that an object defines for others.
fn defined_symbols(name: &str, bytes: &[u8]) -> Result<Vec<Box<str>>, ElfError> {
    let malformed = |error: object::read::Error| ElfError::malformed(name, error);
    let header = elf::FileHeader64::<LE>::parse(bytes).map_err(malformed)?;
    let sections = header.sections(LE, bytes).map_err(malformed)?;
    let symbols = sections.symbols(LE, bytes, elf::SHT_SYMTAB).map_err(malformed)?;
    let defines =
        |symbol: &&elf::Sym64<LE>| symbol.st_bind() != elf::STB_LOCAL && symbol.st_shndx(LE) != elf::SHN_UNDEF;
    let names = symbols.iter().filter(defines).filter_map(|symbol| symbols.symbol_name(LE, symbol).ok());
    Ok(names.filter_map(|name| std::str::from_utf8(name).ok()).map(Into::into).collect())
}

//! Archives: objects that are linked when something refers to what they define.

use crate::error::ElfError;
use crate::identify::{InputKind, identify};
use farlink_graph::Bytes;
use object::LittleEndian as LE;
use object::elf;
use object::read::archive::{ArchiveFile, ArchiveOffset};
use object::read::elf::{FileHeader, Sym};
use std::collections::HashMap;
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
        let (members, symbols) = {
            let malformed = |error: object::read::Error| ElfError::malformed(name, error);
            let file = ArchiveFile::parse(&*bytes).map_err(malformed)?;
            let members = positions(name, &bytes, &file)?;
            (members, index(name, &file)?)
        };
        let mut archive = Self { name: name.to_owned(), bytes, members, index: HashMap::new() };
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
            let bytes = std::fs::read(&path).map_err(|error| ElfError::ThinMember {
                archive: self.name.clone(),
                member: path.display().to_string(),
                error: error.to_string(),
            })?;
            return Ok((display_name, bytes.into()));
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

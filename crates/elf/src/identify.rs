//! Telling what a file is by its first bytes.

use crate::error::ElfError;
use object::LittleEndian as LE;
use object::elf;
use object::read::elf::{FileHeader, ProgramHeader};

/// What a file is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum InputKind {
    /// No bytes at all.
    Empty,
    /// A relocatable object for this system.
    Relocatable,
    /// A shared library.
    SharedObject,
    /// An executable program, position-independent or not.
    Executable,
    /// A core dump.
    Core,
    /// An archive.
    Archive,
    /// An archive whose members are files beside it.
    ThinArchive,
    /// An ELF file with 32-bit addresses.
    Elf32,
    /// An ELF file whose numbers are big-endian.
    BigEndian,
    /// An ELF file for another architecture, by its number in the ELF header.
    OtherArchitecture(u16),
    /// LLVM bitcode, as compilers write it for link-time optimization.
    Bitcode,
    /// A text.
    Text,
    /// Nothing that is known.
    Unknown,
}

/// As much of a file as is looked at to tell whether it is a text.
const TEXT_BYTES: usize = 512;

/// Tells what a file is.
#[must_use]
pub fn identify(bytes: &[u8]) -> InputKind {
    let start = |magic: &[u8]| bytes.starts_with(magic);
    if bytes.is_empty() {
        InputKind::Empty
    } else if start(b"\x7fELF") {
        identify_elf(bytes)
    } else if start(b"!<arch>\n") {
        InputKind::Archive
    } else if start(b"!<thin>\n") {
        InputKind::ThinArchive
    } else if start(b"BC\xc0\xde") {
        InputKind::Bitcode
    } else if is_text(&bytes[..bytes.len().min(TEXT_BYTES)]) {
        InputKind::Text
    } else {
        InputKind::Unknown
    }
}

/// Whether bytes, of which the last character may be cut off, are UTF-8 without control characters.
fn is_text(bytes: &[u8]) -> bool {
    let valid = match std::str::from_utf8(bytes) {
        Ok(text) => text,
        Err(error) if error.error_len().is_none() => {
            std::str::from_utf8(&bytes[..error.valid_up_to()]).unwrap_or_default()
        }
        Err(_) => return false,
    };
    !valid.chars().any(|character| character.is_control() && !character.is_ascii_whitespace())
}

fn identify_elf(bytes: &[u8]) -> InputKind {
    match (bytes.get(4), bytes.get(5)) {
        (Some(1), _) => return InputKind::Elf32,
        (Some(2), Some(2)) => return InputKind::BigEndian,
        _ => {}
    }
    let Ok(header) = elf::FileHeader64::<LE>::parse(bytes) else { return InputKind::Unknown };
    if header.e_machine(LE) != elf::EM_X86_64 {
        return InputKind::OtherArchitecture(header.e_machine(LE).0);
    }
    match header.e_type(LE) {
        elf::ET_REL => InputKind::Relocatable,
        elf::ET_EXEC => InputKind::Executable,
        elf::ET_DYN if is_program(header, bytes) => InputKind::Executable,
        elf::ET_DYN => InputKind::SharedObject,
        elf::ET_CORE => InputKind::Core,
        _ => InputKind::Unknown,
    }
}

/// Whether a file of the type of shared objects says that it is a program (`DF_1_PIE`).
fn is_program(header: &elf::FileHeader64<LE>, bytes: &[u8]) -> bool {
    let segments = header.program_headers(LE, bytes).unwrap_or_default();
    let dynamic = segments.iter().find_map(|segment| segment.dynamic(LE, bytes).ok().flatten());
    let is_pie =
        |entry: &elf::Dyn64<LE>| entry.d_tag.get(LE) == elf::DT_FLAGS_1 && entry.d_val.get(LE) & elf::DF_1_PIE.0 != 0;
    dynamic.is_some_and(|entries| entries.iter().any(is_pie))
}

/// Checks that a file is a relocatable object for this system.
pub(crate) fn check_relocatable(name: &str, bytes: &[u8]) -> Result<(), ElfError> {
    const COMPILE: &str = "compile for x86-64 Linux";
    let (what, hint) = match identify(bytes) {
        InputKind::Relocatable => return Ok(()),
        InputKind::Empty => ("an empty file".to_owned(), "was the compiler interrupted?"),
        InputKind::SharedObject => ("a shared library".to_owned(), "a relocatable object (.o) is needed here"),
        InputKind::Executable => {
            ("an executable program".to_owned(), "run it directly, or link the objects (.o) that it was made of")
        }
        InputKind::Core => ("a core dump".to_owned(), "a relocatable object (.o) is needed here"),
        InputKind::Archive | InputKind::ThinArchive => {
            ("an archive".to_owned(), "a relocatable object (.o) is needed here")
        }
        InputKind::Elf32 => ("a 32-bit object".to_owned(), COMPILE),
        InputKind::BigEndian => ("an object for a big-endian machine".to_owned(), COMPILE),
        InputKind::OtherArchitecture(machine) => (format!("built for {}", machine_name(machine)), COMPILE),
        InputKind::Bitcode => ("LLVM bitcode".to_owned(), "compile without -flto, or with -ffat-lto-objects"),
        InputKind::Text => ("a text file".to_owned(), "a source is known by its extension (.c .cc .cpp .s .S .rs)"),
        InputKind::Unknown => ("neither an object nor an archive".to_owned(), "an ELF object (.o) is needed here"),
    };
    Err(ElfError::WrongKind { name: name.to_owned(), what, hint })
}

/// Checks that a shared library has the bytes that its segments promise: one that is cut off would end the process
/// that opens it.
///
/// # Errors
///
/// Fails if the bytes are not a shared library, or not all of one.
pub fn check_shared_object(name: &str, bytes: &[u8]) -> Result<(), ElfError> {
    if identify(bytes) != InputKind::SharedObject {
        return Err(ElfError::malformed(name, "it is not a shared library for x86-64"));
    }
    let malformed = |error: object::read::Error| ElfError::malformed(name, error);
    let header = elf::FileHeader64::<LE>::parse(bytes).map_err(malformed)?;
    for segment in header.program_headers(LE, bytes).map_err(malformed)? {
        let end = segment.p_offset(LE).checked_add(segment.p_filesz(LE));
        if segment.p_type(LE) == elf::PT_LOAD && end.is_none_or(|end| end > bytes.len() as u64) {
            return Err(ElfError::malformed(name, "a segment lies past the end of the file"));
        }
    }
    Ok(())
}

fn machine_name(machine: u16) -> String {
    let name = match elf::Machine(machine) {
        elf::EM_AARCH64 => "AArch64",
        elf::EM_RISCV => "RISC-V",
        elf::EM_PPC64 => "64-bit PowerPC",
        elf::EM_LOONGARCH => "LoongArch",
        elf::EM_S390 => "IBM Z",
        elf::EM_MIPS => "MIPS",
        elf::EM_SPARCV9 => "64-bit SPARC",
        elf::EM_BPF => "eBPF",
        other => return format!("another machine (ELF machine {})", other.0),
    };
    name.to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Files are told apart by their first bytes, however few there are.
    #[test]
    fn kinds() {
        assert_eq!(identify(b""), InputKind::Empty);
        assert_eq!(identify(b"int main() {}\n"), InputKind::Text);
        assert_eq!(identify(b"\x7fELF"), InputKind::Unknown);
        assert_eq!(identify(b"\x7fELF\x01"), InputKind::Elf32);
        assert_eq!(identify(b"\x7fELF\x02\x02"), InputKind::BigEndian);
        assert_eq!(identify(b"!<arch>\n"), InputKind::Archive);
        assert_eq!(identify(&[0xff, 0xfe]), InputKind::Unknown);
        let this = std::fs::read(std::env::current_exe().unwrap()).unwrap();
        assert_eq!(identify(&this), InputKind::Executable);
    }
}

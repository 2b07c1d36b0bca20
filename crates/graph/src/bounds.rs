//! Names that linkers define: the bounds of sets of sections, and those of a whole program.

use crate::parts::SectionKind;

/// The end of something that a symbol stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Bound {
    /// Its first byte.
    Start,
    /// The byte after its last.
    End,
}

/// What a symbol that no object defines is the bound of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bounded<'a> {
    /// The sections of that name, put together: `__start_X` and `__stop_X`. Arrays of initializers and finalizers have the
    /// names `.preinit_array`, `.init_array` and `.fini_array`, whatever their priorities.
    Sections(&'a str),
    /// Everything that is linked together.
    Program,
    /// Code.
    Code,
    /// Data that has content, writable or not.
    Data,
    /// Nothing: a table that only static programs have.
    Nothing,
}

/// Returns what a symbol of this name is the bound of, and which bound.
#[must_use]
pub fn parse_bound(name: &str) -> Option<(Bounded<'_>, Bound)> {
    let sections = |section, bound| is_identifier(section).then_some((Bounded::Sections(section), bound));
    if let Some(section) = name.strip_prefix("__start_") {
        return sections(section, Bound::Start);
    }
    if let Some(section) = name.strip_prefix("__stop_") {
        return sections(section, Bound::End);
    }
    Some(match name {
        "__preinit_array_start" => (Bounded::Sections(".preinit_array"), Bound::Start),
        "__preinit_array_end" => (Bounded::Sections(".preinit_array"), Bound::End),
        "__init_array_start" => (Bounded::Sections(".init_array"), Bound::Start),
        "__init_array_end" => (Bounded::Sections(".init_array"), Bound::End),
        "__fini_array_start" => (Bounded::Sections(".fini_array"), Bound::Start),
        "__fini_array_end" => (Bounded::Sections(".fini_array"), Bound::End),
        "__rela_iplt_start" | "__rela_iplt_end" => (Bounded::Nothing, Bound::Start),
        "__executable_start" => (Bounded::Program, Bound::Start),
        "_end" | "end" => (Bounded::Program, Bound::End),
        "__etext" | "_etext" | "etext" => (Bounded::Code, Bound::End),
        "_edata" | "edata" | "__bss_start" => (Bounded::Data, Bound::End),
        _ => return None,
    })
}

/// Returns what tells the members of a set of arrays, if `name` is that of one.
pub(crate) fn array_kind(name: &str) -> Option<fn(SectionKind) -> bool> {
    Some(match name {
        ".preinit_array" => |kind| matches!(kind, SectionKind::Init { priority: 0, reversed: false }),
        ".init_array" => |kind| matches!(kind, SectionKind::Init { priority: 1.., reversed: false }),
        ".fini_array" => |kind| matches!(kind, SectionKind::Fini { reversed: false, .. }),
        _ => return None,
    })
}

fn is_identifier(name: &str) -> bool {
    let is_letter = |byte: u8| byte.is_ascii_alphabetic() || byte == b'_';
    name.bytes().next().is_some_and(is_letter) && name.bytes().all(|byte| is_letter(byte) || byte.is_ascii_digit())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Only what follows the prefix decides, and only C identifiers count.
    #[test]
    fn names() {
        assert_eq!(parse_bound("__start_set"), Some((Bounded::Sections("set"), Bound::Start)));
        assert_eq!(parse_bound("__stop__s3t"), Some((Bounded::Sections("_s3t"), Bound::End)));
        for name in ["__start_", "__start_.text", "__stop_3", "_start_set", "__stop_a-b", "start", "_start"] {
            assert_eq!(parse_bound(name), None, "{name}");
        }
    }
}

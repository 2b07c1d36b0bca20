//! What an edge writes: the relocations of x86-64.
//!
//! In the formulas, as in the psABI: S is the address of the target symbol, A the addend, P the address that is
//! written to, G the address of the target's GOT slot, GOT that of the GOT, L that of the target's stub (or S), Z the
//! target's size. PLTOFF64 reaches everything, so it is written without a stub. A stub is where its target begins: a
//! PLT32 with another addend than that of a call (-4) is out of range in code if it needs one.
//!
//! | relocation | formula | bytes | range |
//! | --- | --- | --- | --- |
//! | 64 | S + A | 8 | any |
//! | 32 | S + A | 4 | unsigned |
//! | 32S | S + A | 4 | signed |
//! | 16, 8 | S + A | 2, 1 | signed or unsigned |
//! | PC64 | S + A - P | 8 | any |
//! | PC32, PC16, PC8 | S + A - P | 4, 2, 1 | signed |
//! | PLT32 | L + A - P | 4 | signed |
//! | GOTPCREL, GOTPCRELX, REX_GOTPCRELX | G + A - P | 4 | signed |
//! | GOTPCREL64 | G + A - P | 8 | any |
//! | GOTPC32 | GOT + A - P | 4 | signed |
//! | GOTPC64 | GOT + A - P | 8 | any |
//! | GOTOFF64 | S + A - GOT | 8 | any |
//! | GOT64 | G + A - GOT | 8 | any |
//! | PLTOFF64 | S + A - GOT | 8 | any |
//! | SIZE32 | Z + A | 4 | unsigned |
//! | SIZE64 | Z + A | 8 | any |
//! | (CIE pointer) | P - S | 4 | unsigned |

use crate::SymbolId;
use std::fmt;

/// A reference from a block to a symbol.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Edge {
    /// Offset in the block of the first byte written.
    pub offset: u64,
    /// What is written.
    pub kind: EdgeKind,
    /// The symbol referred to.
    pub target: SymbolId,
    /// The constant in the formula.
    pub addend: i64,
}

macro_rules! kinds {
    ($($(#[$doc:meta])* $kind:ident = $number:literal $name:literal $bytes:literal,)*) => {
        /// What an edge writes; the module has the formulas.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[non_exhaustive]
        pub enum EdgeKind {
            $($(#[$doc])* $kind,)*
            /// The distance from a frame description back to its CIE. No relocation: made when `.eh_frame` is split.
            CiePointer,
            /// A relocation type that is not supported. Refused if it is needed.
            Unsupported(u32),
        }

        impl EdgeKind {
            /// Returns the kind of an ELF relocation type of x86-64.
            #[must_use]
            pub fn from_x86_64(r_type: u32) -> Self {
                match r_type {
                    $($number => Self::$kind,)*
                    other => Self::Unsupported(other),
                }
            }

            /// Returns how many bytes an edge of this kind writes; none are known for what is not supported.
            #[must_use]
            pub fn width(self) -> u64 {
                match self {
                    $(Self::$kind => $bytes,)*
                    Self::CiePointer => 4,
                    Self::Unsupported(_) => 0,
                }
            }
        }

        impl fmt::Display for EdgeKind {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                match self {
                    $(Self::$kind => f.write_str(concat!("R_X86_64_", $name)),)*
                    Self::CiePointer => f.write_str("CIE pointer"),
                    Self::Unsupported(r_type) => match unsupported_name(*r_type) {
                        Some(name) => f.write_str(name),
                        None => write!(f, "relocation type {r_type}"),
                    },
                }
            }
        }
    };
}

kinds! {
    /// 64.
    Pointer64 = 1 "64" 8,
    /// PC32.
    Delta32 = 2 "PC32" 4,
    /// PLT32: a call or jump.
    Branch32 = 4 "PLT32" 4,
    /// GOTPCREL.
    GotPcRel32 = 9 "GOTPCREL" 4,
    /// 32.
    Pointer32 = 10 "32" 4,
    /// 32S.
    Pointer32Signed = 11 "32S" 4,
    /// 16.
    Pointer16 = 12 "16" 2,
    /// PC16.
    Delta16 = 13 "PC16" 2,
    /// 8.
    Pointer8 = 14 "8" 1,
    /// PC8.
    Delta8 = 15 "PC8" 1,
    /// PC64.
    Delta64 = 24 "PC64" 8,
    /// GOTOFF64.
    GotOff64 = 25 "GOTOFF64" 8,
    /// GOTPC32.
    GotPc32 = 26 "GOTPC32" 4,
    /// GOT64.
    Got64 = 27 "GOT64" 8,
    /// GOTPCREL64.
    GotPcRel64 = 28 "GOTPCREL64" 8,
    /// GOTPC64.
    GotPc64 = 29 "GOTPC64" 8,
    /// PLTOFF64.
    PltOff64 = 31 "PLTOFF64" 8,
    /// SIZE32.
    Size32 = 32 "SIZE32" 4,
    /// SIZE64.
    Size64 = 33 "SIZE64" 8,
    /// GOTPCRELX: GOTPCREL in an instruction that has a shorter form.
    GotPcRelX = 41 "GOTPCRELX" 4,
    /// REX_GOTPCRELX: the same in one with a REX prefix.
    RexGotPcRelX = 42 "REX_GOTPCRELX" 4,
}

impl EdgeKind {
    /// Whether the target needs a slot in the GOT.
    pub(crate) fn needs_got_slot(self) -> bool {
        matches!(self, Self::GotPcRel32 | Self::GotPcRel64 | Self::Got64 | Self::GotPcRelX | Self::RexGotPcRelX)
    }

    /// Whether the address of the GOT itself is in the formula.
    pub(crate) fn needs_got(self) -> bool {
        matches!(self, Self::GotOff64 | Self::GotPc32 | Self::GotPc64 | Self::Got64 | Self::PltOff64)
    }

    /// Whether this is a relocation of thread-local storage.
    pub(crate) fn is_tls(self) -> bool {
        matches!(self, Self::Unsupported(16..=23 | 34..=36 | 44 | 45 | 47 | 48 | 50 | 51))
    }
}

/// Names of the relocation types that are known and not supported.
fn unsupported_name(r_type: u32) -> Option<&'static str> {
    let name = match r_type {
        3 => "R_X86_64_GOT32",
        5 => "R_X86_64_COPY",
        6 => "R_X86_64_GLOB_DAT",
        7 => "R_X86_64_JUMP_SLOT",
        8 => "R_X86_64_RELATIVE",
        16 => "R_X86_64_DTPMOD64",
        17 => "R_X86_64_DTPOFF64",
        18 => "R_X86_64_TPOFF64",
        19 => "R_X86_64_TLSGD",
        20 => "R_X86_64_TLSLD",
        21 => "R_X86_64_DTPOFF32",
        22 => "R_X86_64_GOTTPOFF",
        23 => "R_X86_64_TPOFF32",
        30 => "R_X86_64_GOTPLT64",
        34 => "R_X86_64_GOTPC32_TLSDESC",
        35 => "R_X86_64_TLSDESC_CALL",
        36 => "R_X86_64_TLSDESC",
        37 => "R_X86_64_IRELATIVE",
        38 => "R_X86_64_RELATIVE64",
        43 => "R_X86_64_CODE_4_GOTPCRELX",
        44 => "R_X86_64_CODE_4_GOTTPOFF",
        45 => "R_X86_64_CODE_4_GOTPC32_TLSDESC",
        _ => return None,
    };
    Some(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Types map to kinds with the psABI's names and widths; others keep their number and are named.
    #[test]
    fn types_and_names() {
        assert_eq!(EdgeKind::from_x86_64(2).to_string(), "R_X86_64_PC32");
        assert_eq!(EdgeKind::from_x86_64(42).width(), 4);
        assert_eq!(EdgeKind::from_x86_64(22).to_string(), "R_X86_64_GOTTPOFF");
        assert!(EdgeKind::from_x86_64(22).is_tls() && !EdgeKind::from_x86_64(3).is_tls());
        assert_eq!(EdgeKind::from_x86_64(u32::MAX), EdgeKind::Unsupported(u32::MAX));
        assert_eq!(EdgeKind::from_x86_64(200).to_string(), "relocation type 200");
    }
}

//! What an edge writes: the relocations of x86-64.
//!
//! In the formulas, as in the psABI: S is the address of the target symbol, A the addend, P the address that is
//! written to, G the address of the target's GOT slot, GOT that of the GOT, L that of the target's stub (or S), Z the
//! target's size. PLTOFF64 reaches everything, so it is written without a stub. A stub is where its target begins: a
//! PLT32 with another addend than that of a call (-4) is out of range in code if it needs one.
//!
//! Of thread-local storage: M is the number of the target's module, D its offset in it, T its distance from the thread
//! pointer, the same in all threads if the module is static; GT, GM and GL are the addresses of GOT slots with T, with M
//! and D, and with M and 0. Descriptors are written as the psABI's initial-exec form of the same code, so they want T.
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
//! | GOT32 | G + A - GOT | 4 | signed |
//! | GOTPLT64 | G + A - GOT | 8 | any |
//! | TPOFF32, TPOFF64 | T + A | 4, 8 | signed |
//! | DTPOFF32, DTPOFF64 | D + A | 4, 8 | signed |
//! | DTPMOD64 | M | 8 | any |
//! | GOTTPOFF, GOTPC32_TLSDESC | GT + A - P | 4 | signed |
//! | TLSGD | GM + A - P | 4 | signed |
//! | TLSLD | GL + A - P | 4 | signed |
//! | TLSDESC_CALL | a two-byte no-operation | 2 | |
//! | (CIE pointer) | P - S | 4 | unsigned |
//!
//! The CODE_4, CODE_5 and CODE_6 forms, for instructions with longer prefixes, write what those without it write.

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
    /// GOT32.
    Got32 = 3 "GOT32" 4,
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
    /// DTPMOD64: the number of a module with thread-local variables.
    DtpMod64 = 16 "DTPMOD64" 8,
    /// DTPOFF64: the offset of a thread-local variable in its module.
    DtpOff64 = 17 "DTPOFF64" 8,
    /// TPOFF64: the distance of a thread-local variable from the thread pointer.
    TpOff64 = 18 "TPOFF64" 8,
    /// TLSGD: the general-dynamic model.
    TlsGd = 19 "TLSGD" 4,
    /// TLSLD: the local-dynamic model.
    TlsLd = 20 "TLSLD" 4,
    /// DTPOFF32.
    DtpOff32 = 21 "DTPOFF32" 4,
    /// GOTTPOFF: the initial-exec model.
    GotTpOff = 22 "GOTTPOFF" 4,
    /// TPOFF32: the local-exec model.
    TpOff32 = 23 "TPOFF32" 4,
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
    /// GOTPLT64.
    GotPlt64 = 30 "GOTPLT64" 8,
    /// PLTOFF64.
    PltOff64 = 31 "PLTOFF64" 8,
    /// SIZE32.
    Size32 = 32 "SIZE32" 4,
    /// SIZE64.
    Size64 = 33 "SIZE64" 8,
    /// GOTPC32_TLSDESC: a descriptor of thread-local storage.
    TlsDesc32 = 34 "GOTPC32_TLSDESC" 4,
    /// TLSDESC_CALL: the call that goes with it.
    TlsDescCall = 35 "TLSDESC_CALL" 2,
    /// PC32_BND: PC32, as it was written for memory protection extensions.
    Delta32Bnd = 39 "PC32_BND" 4,
    /// PLT32_BND: PLT32, likewise.
    Branch32Bnd = 40 "PLT32_BND" 4,
    /// GOTPCRELX: GOTPCREL in an instruction that has a shorter form.
    GotPcRelX = 41 "GOTPCRELX" 4,
    /// REX_GOTPCRELX: the same in one with a REX prefix.
    RexGotPcRelX = 42 "REX_GOTPCRELX" 4,
    /// CODE_4_GOTPCRELX: the same in one with a prefix of two bytes.
    Code4GotPcRelX = 43 "CODE_4_GOTPCRELX" 4,
    /// CODE_4_GOTTPOFF.
    Code4GotTpOff = 44 "CODE_4_GOTTPOFF" 4,
    /// CODE_4_GOTPC32_TLSDESC.
    Code4TlsDesc32 = 45 "CODE_4_GOTPC32_TLSDESC" 4,
    /// CODE_5_GOTPCRELX.
    Code5GotPcRelX = 46 "CODE_5_GOTPCRELX" 4,
    /// CODE_5_GOTTPOFF.
    Code5GotTpOff = 47 "CODE_5_GOTTPOFF" 4,
    /// CODE_5_GOTPC32_TLSDESC.
    Code5TlsDesc32 = 48 "CODE_5_GOTPC32_TLSDESC" 4,
    /// CODE_6_GOTPCRELX.
    Code6GotPcRelX = 49 "CODE_6_GOTPCRELX" 4,
    /// CODE_6_GOTTPOFF.
    Code6GotTpOff = 50 "CODE_6_GOTTPOFF" 4,
    /// CODE_6_GOTPC32_TLSDESC.
    Code6TlsDesc32 = 51 "CODE_6_GOTPC32_TLSDESC" 4,
}

/// What an edge has to do with thread-local storage.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum TlsUse {
    /// The distance from the thread pointer: the module has to be static.
    TpOffset,
    /// The same by way of a GOT slot.
    TpOffsetSlot,
    /// Module and offset, in a GOT slot.
    GeneralSlot,
    /// The object's own module, in a GOT slot.
    LocalSlot,
    /// The offset in the object's own module.
    LocalOffset,
    /// The module, or the offset in it.
    Module,
    /// Nothing but the call of a descriptor.
    Call,
}

impl EdgeKind {
    /// Whether the target needs a slot in the GOT.
    pub(crate) fn needs_got_slot(self) -> bool {
        use EdgeKind::{Got32, Got64, GotPcRel32, GotPcRel64, GotPlt64};
        matches!(self, GotPcRel32 | GotPcRel64 | Got32 | Got64 | GotPlt64) || self.may_relax()
    }

    /// Whether this is a use of a GOT slot that may turn out to be unnecessary.
    pub(crate) fn may_relax(self) -> bool {
        use EdgeKind::{Code4GotPcRelX, Code5GotPcRelX, Code6GotPcRelX, GotPcRelX, RexGotPcRelX};
        matches!(self, GotPcRelX | RexGotPcRelX | Code4GotPcRelX | Code5GotPcRelX | Code6GotPcRelX)
    }

    /// Whether the address of the GOT itself is in the formula.
    pub(crate) fn needs_got(self) -> bool {
        use EdgeKind::{Got32, Got64, GotOff64, GotPc32, GotPc64, GotPlt64, PltOff64};
        matches!(self, GotOff64 | GotPc32 | GotPc64 | Got32 | Got64 | GotPlt64 | PltOff64)
    }

    /// Whether this is a call or jump that may go through a stub.
    pub(crate) fn is_branch(self) -> bool {
        matches!(self, Self::Branch32 | Self::Branch32Bnd)
    }

    /// Whether this is a descriptor of thread-local storage.
    pub(crate) fn is_tls_descriptor(self) -> bool {
        use EdgeKind::{Code4TlsDesc32, Code5TlsDesc32, Code6TlsDesc32, TlsDesc32};
        matches!(self, TlsDesc32 | Code4TlsDesc32 | Code5TlsDesc32 | Code6TlsDesc32)
    }

    /// What this has to do with thread-local storage; `None` if nothing.
    pub(crate) fn tls_use(self) -> Option<TlsUse> {
        Some(match self {
            Self::TpOff32 | Self::TpOff64 => TlsUse::TpOffset,
            Self::GotTpOff | Self::Code4GotTpOff | Self::Code5GotTpOff | Self::Code6GotTpOff => TlsUse::TpOffsetSlot,
            kind if kind.is_tls_descriptor() => TlsUse::TpOffsetSlot,
            Self::TlsGd => TlsUse::GeneralSlot,
            Self::TlsLd => TlsUse::LocalSlot,
            Self::DtpOff32 => TlsUse::LocalOffset,
            Self::DtpMod64 | Self::DtpOff64 => TlsUse::Module,
            Self::TlsDescCall => TlsUse::Call,
            _ => return None,
        })
    }
}

/// Names of the relocation types that are known and not supported.
fn unsupported_name(r_type: u32) -> Option<&'static str> {
    let name = match r_type {
        5 => "R_X86_64_COPY",
        6 => "R_X86_64_GLOB_DAT",
        7 => "R_X86_64_JUMP_SLOT",
        8 => "R_X86_64_RELATIVE",
        36 => "R_X86_64_TLSDESC",
        37 => "R_X86_64_IRELATIVE",
        38 => "R_X86_64_RELATIVE64",
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
        assert_eq!(EdgeKind::from_x86_64(48).tls_use(), Some(TlsUse::TpOffsetSlot));
        assert!(EdgeKind::from_x86_64(3).tls_use().is_none() && EdgeKind::from_x86_64(43).may_relax());
        assert_eq!(EdgeKind::from_x86_64(u32::MAX), EdgeKind::Unsupported(u32::MAX));
        assert_eq!(EdgeKind::from_x86_64(200).to_string(), "relocation type 200");
    }
}

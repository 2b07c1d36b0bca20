//! Why an object cannot be linked.

use farlink_addr::ExecutorAddr;

/// Why an object cannot be linked. Every variant names the object.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum LinkError {
    /// A value does not fit where it is to be written.
    #[error(
        "{place}: {relocation} against {symbol} at {target} does not reach from {fixup} \
         (the value {value:#x} does not fit); {hint}"
    )]
    OutOfRange {
        /// Object, section and offset of the relocation.
        place: String,
        /// The relocation.
        relocation: String,
        /// The symbol referred to.
        symbol: String,
        /// Its address.
        target: ExecutorAddr,
        /// The address that is written to.
        fixup: ExecutorAddr,
        /// The value that does not fit.
        value: i64,
        /// What usually helps.
        hint: &'static str,
    },
    /// A relocation of a type that is not supported.
    #[error("{place}: {relocation} against {symbol} is not supported{}", if *.is_tls { TLS_HINT } else { "" })]
    UnsupportedRelocation {
        /// Object, section and offset of the relocation.
        place: String,
        /// The relocation.
        relocation: String,
        /// The symbol referred to.
        symbol: String,
        /// Whether it is one of thread-local storage.
        is_tls: bool,
    },
    /// A symbol of a kind that is not supported.
    #[error("{object}: {what} are not supported yet: {symbol}")]
    UnsupportedSymbol {
        /// The object.
        object: String,
        /// What the symbol is.
        what: &'static str,
        /// The symbol, or the section if that has no symbol.
        symbol: String,
    },
    /// A reference to something that is not linked.
    #[error("{place}: refers to {symbol} in {what}")]
    DiscardedTarget {
        /// Object, section and offset of the reference.
        place: String,
        /// The symbol referred to, or its section.
        symbol: String,
        /// Where that is, and so why it is not linked.
        what: &'static str,
    },
    /// A size that is not known: that of a symbol which another object defines.
    #[error("{place}: {relocation} wants the size of {symbol}, which is defined elsewhere")]
    UnknownSize {
        /// Object, section and offset of the relocation.
        place: String,
        /// The relocation.
        relocation: String,
        /// The symbol referred to.
        symbol: String,
    },
    /// Sections of one name that are referred to as a whole, and cannot be put together.
    #[error(
        "{object}: its sections named {section} cannot be put together as __start_{section} or __stop_{section} needs: \
         their protections differ, or only some are zero fill"
    )]
    MixedSections {
        /// The object.
        object: String,
        /// Their name.
        section: String,
    },
    /// An `.eh_frame` section that cannot be understood.
    #[error("{object}: .eh_frame is malformed at {offset:#x}: {what}")]
    BadEhFrame {
        /// The object.
        object: String,
        /// Offset in the section.
        offset: u64,
        /// What is wrong.
        what: &'static str,
    },
    /// More bytes than an address space has, or an alignment beyond what is supported.
    #[error("{object}: {what}")]
    TooLarge {
        /// The object.
        object: String,
        /// What is too large.
        what: String,
    },
    /// Working memory could not be written.
    #[error("{object}: {text}")]
    Memory {
        /// The object.
        object: String,
        /// What went wrong.
        text: String,
    },
}

const TLS_HINT: &str = " yet: it is one of thread-local storage";

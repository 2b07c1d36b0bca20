//! Why an object cannot be linked.

use farlink_addr::ExecutorAddr;

/// Why an object cannot be linked. Every variant names the object, or the sections of several.
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
    #[error("{place}: {relocation} against {symbol} is not supported")]
    UnsupportedRelocation {
        /// Object, section and offset of the relocation.
        place: String,
        /// The relocation.
        relocation: String,
        /// The symbol referred to.
        symbol: String,
    },
    /// A thread-local variable that is used as if it were another, or the other way round.
    #[error(
        "{place}: {relocation} and {symbol} do not go together: one is thread-local and the other is not; \
         is the variable declared differently in two sources?"
    )]
    TlsMismatch {
        /// Object, section and offset of the relocation.
        place: String,
        /// The relocation.
        relocation: String,
        /// The symbol referred to.
        symbol: String,
    },
    /// A thread-local variable whose distance from the thread pointer differs from thread to thread.
    #[error(
        "{place}: {relocation} wants {symbol} at the same distance from every thread's pointer, which it has not \
         (there is little room for such variables, and none for alignment above 64 bytes); recompile with -fPIC, for the \
         general-dynamic model"
    )]
    DynamicTls {
        /// Object, section and offset of the relocation.
        place: String,
        /// The relocation.
        relocation: String,
        /// The symbol referred to.
        symbol: String,
    },
    /// A thread-local variable that belongs to another link, used as if it belonged to this one.
    #[error(
        "{place}: the code expects {symbol} among the thread-local variables that are linked together with it; \
         link both at once, or recompile with -ftls-model=global-dynamic"
    )]
    ForeignLocalDynamic {
        /// Object, section and offset of the relocation.
        place: String,
        /// The symbol referred to.
        symbol: String,
    },
    /// A thread-local variable that has no place.
    #[error("{place}: the thread-local variable {symbol} has no place: it is not defined where threads could have it")]
    NoTls {
        /// Object, section and offset of the relocation.
        place: String,
        /// The symbol referred to.
        symbol: String,
    },
    /// A relocation that has to change the code around it, and code that is not what the psABI says it is.
    #[error("{place}: {relocation} is not in an instruction of those that it belongs to")]
    UnknownCode {
        /// Object, section and offset of the relocation.
        place: String,
        /// The relocation.
        relocation: String,
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
        "the sections named {section} cannot be put together as __start_{section} or __stop_{section} needs: \
         some are writable and some executable"
    )]
    MixedSections {
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

//! Why a file is not what is needed.

use farlink_graph::LinkError;

/// Why a file cannot be linked. Every variant names the file.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ElfError {
    /// The file is no relocatable object, but something else that is known.
    #[error("{name} is {what}; {hint}")]
    WrongKind {
        /// The file.
        name: String,
        /// What it is.
        what: String,
        /// What to do.
        hint: &'static str,
    },
    /// The file is not as its format wants it.
    #[error("{name} is malformed or cut off: {what}")]
    Malformed {
        /// The file.
        name: String,
        /// What is wrong.
        what: String,
    },
    /// The object has something that is not supported.
    #[error("{name}: {what}")]
    Unsupported {
        /// The file.
        name: String,
        /// What it has.
        what: String,
    },
    /// A member of a thin archive cannot be read.
    #[error("{archive}: its member {member} cannot be read: {error}")]
    ThinMember {
        /// The archive.
        archive: String,
        /// Path of the member.
        member: String,
        /// What the system says.
        error: String,
    },
    /// The object's unwind information is malformed.
    #[error(transparent)]
    Graph(#[from] LinkError),
}

impl ElfError {
    pub(crate) fn malformed(name: &str, what: impl ToString) -> Self {
        Self::Malformed { name: name.to_owned(), what: what.to_string() }
    }

    pub(crate) fn unsupported(name: &str, what: impl ToString) -> Self {
        Self::Unsupported { name: name.to_owned(), what: what.to_string() }
    }
}

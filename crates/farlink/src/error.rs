//! How sessions, libraries and links fail.

use crate::{Death, ThreadState};
use farlink_rpc::{CallError, SetupError};
use std::path::PathBuf;
use std::sync::Arc;

/// Why an operation of a [`Session`](crate::Session) or a [`Library`](crate::Library) failed.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The executor program could not be started.
    #[error("cannot start the executor program {}: {error}", program.display())]
    Spawn {
        /// The program.
        program: PathBuf,
        /// What the system says.
        error: Arc<std::io::Error>,
    },
    /// No executor program was named and none was found.
    #[error(
        "no executor: call farlink::executor::init() first in main, which makes this program one; or install \
         farlink-executor, which is neither beside this program nor in PATH, or name it with SessionBuilder::executor or in \
         FARLINK_EXECUTOR"
    )]
    NoExecutor,
    /// The connection to the executor could not be made.
    #[error("cannot connect to the executor: {0}")]
    Connect(Arc<std::io::Error>),
    /// The executor was started or connected to, but no session came about.
    #[error("{executor}: {error}{}", ended(how.as_deref()))]
    Setup {
        /// Which executor.
        executor: String,
        /// What went wrong.
        error: SetupError,
        /// How its process ended, if it is a child of this one and has.
        how: Option<String>,
    },
    /// The process that executors are forked from could not be used, and has ended.
    #[error("executors cannot be forked from {program}: {problem}")]
    Prepared {
        /// Its program.
        program: String,
        /// What went wrong.
        problem: String,
    },
    /// The executor's process ended while it was needed.
    #[error("the executor {0}")]
    ExecutorEnded(Arc<Death>),
    /// A call to the executor failed.
    #[error(transparent)]
    Call(#[from] CallError),
    /// The executor refused an operation.
    #[error("the executor cannot {operation}: {text}")]
    Refused {
        /// What was asked.
        operation: &'static str,
        /// What it answered.
        text: String,
    },
    /// An operation on executor memory failed.
    #[error(transparent)]
    Memory(Arc<farlink_mem::Error>),
    /// An input is not what it has to be.
    #[error(transparent)]
    Input(Arc<farlink_elf::ElfError>),
    /// An object cannot be linked.
    #[error(transparent)]
    Link(Arc<farlink_graph::LinkError>),
    /// Two objects define the same symbol.
    #[error("{} is defined twice: in {first} and in {second}", farlink_graph::with_demangled(symbol))]
    DuplicateDefinition {
        /// The symbol.
        symbol: String,
        /// The object whose definition was there.
        first: String,
        /// The object that defines it again.
        second: String,
    },
    /// A thread-local variable was looked up, which every thread has at another address.
    #[error("{symbol} is a thread-local variable and has no one address: look up a function that returns its own")]
    ThreadLocal {
        /// The symbol.
        symbol: String,
    },
    /// Symbols are defined nowhere.
    #[error("{}", undefined(.0))]
    Undefined(Vec<UndefinedSymbol>),
    /// An object that others use cannot be removed.
    #[error("{object} cannot be removed while {} refers to it", .users.join(", "))]
    InUse {
        /// The object.
        object: String,
        /// The objects that refer to it.
        users: Vec<String>,
    },
    /// The object has been removed already.
    #[error("the object has been removed already")]
    Removed,
    /// Another thread was linking an object that this lookup needs, and failed.
    #[error("{object}, which is needed here, could not be linked for another lookup")]
    Dependency {
        /// The object.
        object: String,
    },
    /// A call did not return in time. It goes on in the executor.
    #[error("{function} did not return within {timeout:?}{}", crate::hang::listed(threads))]
    TimedOut {
        /// The function.
        function: String,
        /// How long it was waited for.
        timeout: std::time::Duration,
        /// What the executor's threads were doing, if this session started it.
        threads: Arc<[ThreadState]>,
    },
    /// A closure that linked code called panicked, and the executor has ended.
    #[error("{text}; the executor has ended")]
    CallbackPanicked {
        /// Which closure, and what it said.
        text: String,
    },
    /// A redirectable symbol was to lead to an object that does not define it.
    #[error("the object defines no redirectable symbol: Library::define_redirectable has to come before the object")]
    NotRedirectable,
    /// A closure did not make the definitions that it stands for.
    #[error("{symbols} cannot be defined: {error}")]
    Materialize {
        /// What it was to define.
        symbols: String,
        /// What it said.
        error: Arc<dyn std::error::Error + Send + Sync>,
    },
    /// A session without an executor cannot run anything.
    #[error("this session only links; it has no executor to run code in")]
    NoExecution,
    /// Profilers cannot be told what was linked.
    #[error("profilers cannot be told what was linked: {}: {error}", path.display())]
    Profile {
        /// The file that they would read.
        path: PathBuf,
        /// What the system says.
        error: Arc<std::io::Error>,
    },
    /// The reservation for an image cannot be placed.
    #[error("an image cannot be linked at {base:#x}: the base must be a multiple of the page size ({page} bytes)")]
    BadBase {
        /// The base asked for.
        base: u64,
        /// The page size.
        page: u64,
    },
}

/// A symbol that is defined nowhere, and who needs it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UndefinedSymbol {
    /// The symbol.
    pub name: String,
    /// The objects that refer to it. Empty if it was asked for by name.
    pub users: Vec<String>,
}

/// Objects named for one undefined symbol; more are counted.
const USERS_SHOWN: usize = 3;

fn undefined(symbols: &[UndefinedSymbol]) -> String {
    let mut text = match symbols.len() {
        1 => "undefined symbol".to_owned(),
        count => format!("{count} undefined symbols"),
    };
    for symbol in symbols {
        text += &format!("\n  {}", farlink_graph::with_demangled(&symbol.name));
        let shown = symbol.users.iter().take(USERS_SHOWN).map(String::as_str).collect::<Vec<_>>();
        if !shown.is_empty() {
            text += &format!(", needed by {}", shown.join(", "));
        }
        if symbol.users.len() > USERS_SHOWN {
            text += &format!(" and {} more", symbol.users.len() - USERS_SHOWN);
        }
    }
    if symbols.iter().any(|symbol| is_cxx_runtime(&symbol.name)) {
        text +=
            "\nsome belong to the C++ runtime: link with -l stdc++ (Library::add_shared_library(\"libstdc++.so.6\"))";
    }
    text
}

/// Whether `name` is one that every C++ program needs of its runtime library.
fn is_cxx_runtime(name: &str) -> bool {
    name.starts_with("_ZSt") || name.starts_with("_ZNSt") || name.starts_with("_Zn") || name.starts_with("__cxa_throw")
}

fn ended(how: Option<&str>) -> String {
    how.map(|how| format!(" (its process {how})")).unwrap_or_default()
}

macro_rules! shared_sources {
    ($($source:ty => $variant:ident),*) => {$(
        impl From<$source> for Error {
            fn from(error: $source) -> Self {
                Self::$variant(Arc::new(error))
            }
        }
    )*};
}

shared_sources!(farlink_mem::Error => Memory, farlink_elf::ElfError => Input, farlink_graph::LinkError => Link);

/// How the process of an executor ended, as a sentence without its subject.
pub(crate) fn describe_status(status: std::process::ExitStatus) -> String {
    use std::os::unix::process::ExitStatusExt;
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("exited with status {code}"),
        (None, Some(signal)) => format!("was killed by {}", signal_name(signal)),
        (None, None) => "ended".to_owned(),
    }
}

/// Returns the name of a signal, for example `SIGSEGV`.
#[must_use]
pub fn signal_name(signal: i32) -> String {
    let name = match signal {
        1 => "SIGHUP",
        2 => "SIGINT",
        3 => "SIGQUIT",
        4 => "SIGILL",
        5 => "SIGTRAP",
        6 => "SIGABRT",
        7 => "SIGBUS",
        8 => "SIGFPE",
        9 => "SIGKILL",
        11 => "SIGSEGV",
        13 => "SIGPIPE",
        14 => "SIGALRM",
        15 => "SIGTERM",
        24 => "SIGXCPU",
        25 => "SIGXFSZ",
        31 => "SIGSYS",
        other => return format!("signal {other}"),
    };
    name.to_owned()
}

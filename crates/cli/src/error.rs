//! How the command fails, in words for the person who typed it.

use std::io;
use std::path::{Path, PathBuf};
use std::process::ExitStatus;

#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("cannot read {}: {error}", path.display())]
    Read { path: PathBuf, error: io::Error },
    #[error("cannot write {}: {error}", path.display())]
    Write { path: PathBuf, error: io::Error },
    #[error("{}: {what}", path.display())]
    Input { path: PathBuf, what: String },
    #[error("cannot run the compiler {compiler}: {error}; install it, or name another in ${variable}")]
    Compiler { compiler: String, variable: &'static str, error: io::Error },
    #[error("{} was not compiled: {compiler} failed ({status})", path.display())]
    Compile { path: PathBuf, compiler: String, status: ExitStatus },
    #[error("cannot make a temporary folder for compiled sources: {0}")]
    TempDir(io::Error),
    #[error("cannot prepare for signals: {0}")]
    Signals(io::Error),
    #[error("no library {name}: looked for {} in {}", wanted.join(" and "), list(dirs))]
    NoLibrary { name: String, wanted: Vec<String>, dirs: Vec<PathBuf> },
    #[error("{0}")]
    Farlink(#[from] farlink::Error),
    #[error("the secret in {} cannot be read: {error}", path.display())]
    Secret { path: PathBuf, error: io::Error },
    #[error("--secret-file is for an executor at tcp:HOST:PORT; others demand no secret")]
    NeedlessSecret,
    #[error("cannot start an executor: where this program itself is cannot be told: {0}")]
    NoSelf(io::Error),
    #[error("the process that is to be debugged cannot be looked at: {0}")]
    NoDebugger(io::Error),
    #[error("{0}")]
    NoEntry(String),
}

fn list(dirs: &[PathBuf]) -> String {
    dirs.iter().map(|dir| dir.display().to_string()).collect::<Vec<_>>().join(", ")
}

impl Error {
    pub(crate) fn input(path: &Path, what: impl ToString) -> Self {
        Self::Input { path: path.to_owned(), what: what.to_string() }
    }
}

//! Sources to objects, with the system's compilers.

use crate::error::Error;
use crate::signals::Signals;
use std::ffi::OsString;
use std::path::Path;
use std::process::Command;

/// A language that is compiled on the way.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Language {
    C,
    Cxx,
    Assembly,
    Fortran,
    Rust,
}

impl Language {
    /// Tells the language of a source by its name.
    pub(crate) fn of(path: &Path) -> Option<Self> {
        match path.extension()?.to_str()? {
            "c" => Some(Self::C),
            "cc" | "cpp" | "cxx" | "C" => Some(Self::Cxx),
            "s" | "S" => Some(Self::Assembly),
            "f" | "for" | "f90" | "f95" | "f03" | "f08" | "F" | "F90" | "F95" | "F03" | "F08" => Some(Self::Fortran),
            "rs" => Some(Self::Rust),
            _ => None,
        }
    }

    /// The variable that names the compiler, the compiler without it, and the variable of more flags.
    fn compiler(self) -> (&'static str, &'static str, &'static str) {
        match self {
            Self::C | Self::Assembly => ("CC", "cc", "CFLAGS"),
            Self::Cxx => ("CXX", "c++", "CXXFLAGS"),
            Self::Fortran => ("FC", "gfortran", "FFLAGS"),
            Self::Rust => ("RUSTC", "rustc", "RUSTFLAGS"),
        }
    }

    /// How fast or how well to be debugged.
    pub(crate) fn optimization(self, debug: bool) -> &'static [&'static str] {
        match (self, debug) {
            (Self::C | Self::Cxx | Self::Fortran, false) => &["-O2"],
            (Self::C | Self::Cxx | Self::Fortran | Self::Assembly, true) => &["-g"],
            (Self::Assembly, false) => &[],
            (Self::Rust, false) => &["-Copt-level=2"],
            (Self::Rust, true) => &["-Cdebuginfo=2"],
        }
    }

    fn flags(self) -> &'static [&'static str] {
        match self {
            Self::C | Self::Cxx | Self::Fortran => &["-c", "-fPIC"],
            Self::Assembly => &["-c"],
            // A library crate has no entry of its own: its exported functions are what the object defines.
            Self::Rust => &["--crate-type=lib", "--emit=obj", "--edition=2021", "-Cpanic=abort"],
        }
    }
}

/// Compiles `source`, with debug information if that is wanted, and returns the object's bytes. Nothing is left on disk.
pub(crate) fn compile(source: &Path, language: Language, debug: bool, signals: &Signals) -> Result<Vec<u8>, Error> {
    let folder = signals.temporary_folder()?;
    let object = folder.path().join("object.o");
    let mut command = compiler_command(language);
    command.args(language.flags()).args(language.optimization(debug));
    run_compiler(command, language, source, &object, signals)?;
    std::fs::read(&object).map_err(|error| Error::Read { path: object, error })
}

/// Returns a command that is the compiler of a language.
pub(crate) fn compiler_command(language: Language) -> Command {
    Command::new(compiler_name(language))
}

fn compiler_name(language: Language) -> String {
    let (variable, default, _) = language.compiler();
    std::env::var(variable).ok().filter(|name| !name.is_empty()).unwrap_or(default.to_owned())
}

/// Has a compiler's command, which has its first flags, make `output` of `source`.
pub(crate) fn run_compiler(
    mut command: Command,
    language: Language,
    source: &Path,
    output: &Path,
    signals: &Signals,
) -> Result<(), Error> {
    let (variable, _, flags_variable) = language.compiler();
    if let Some(flags) = std::env::var_os(flags_variable) {
        command.args(flags.to_string_lossy().split_whitespace());
    }
    // A name that begins with a dash is no option.
    let source_argument: OsString =
        if source.is_absolute() { source.into() } else { Path::new(".").join(source).into() };
    command.arg("-o").arg(output).arg(source_argument);
    let compiler_error = |error| Error::Compiler { compiler: compiler_name(language), variable, error };
    let mut child = command.spawn().map_err(compiler_error)?;
    let status = signals.wait_compiler(&mut child).map_err(compiler_error)?;
    if status.success() {
        return Ok(());
    }
    Err(Error::Compile { path: source.to_owned(), compiler: compiler_name(language), status })
}

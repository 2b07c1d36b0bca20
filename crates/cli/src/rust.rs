//! Rust programs: what `rustc` would link, without the linking.
//!
//! Only `rustc` knows which objects and libraries a program consists of, and it tells its linker. So it is given one that
//! notes what it is told: this program under another name.

use crate::compile::{Language, compiler_command, run_compiler};
use crate::error::Error;
use crate::signals::Signals;
use crate::start::ExitCode;
use std::ffi::OsString;
use std::io::ErrorKind;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

/// The name under which this program notes what a linker is told.
const COLLECTOR: &str = "farlink-collect";

/// The file, beside the collector, that the arguments go into, each with a NUL behind it.
const ARGUMENTS: &str = "arguments";

/// Returns whether a source is that of a program with Rust's own `main`, and not one that defines C's.
pub(crate) fn is_program(source: &Path) -> Result<bool, Error> {
    let text = std::fs::read_to_string(source).map_err(|error| Error::Read { path: source.to_owned(), error })?;
    Ok(!text.contains("#![no_main]") && !text.contains("extern \"C\" fn main"))
}

/// What a linker is told to link.
pub(crate) enum LinkInput {
    /// An object, which may be gone soon, as it is: its name and its bytes.
    Object(String, Vec<u8>),
    File(PathBuf),
    Library(String),
}

/// Compiles a program and returns what it consists of, and where else libraries are looked for.
pub(crate) fn build(source: &Path, debug: bool, signals: &Signals) -> Result<(Vec<LinkInput>, Vec<PathBuf>), Error> {
    let folder = signals.temporary_folder()?;
    let collector = folder.path().join(COLLECTOR);
    let this = std::env::current_exe().map_err(Error::NoSelf)?;
    let link_error = |error| Error::Write { path: collector.clone(), error };
    std::os::unix::fs::symlink(this, &collector).map_err(link_error)?;
    let mut command = compiler_command(Language::Rust);
    command.args(["--crate-type=bin", "--edition=2021", "-Clinker-flavor=gcc"]);
    command.args(Language::Rust.optimization(debug));
    let mut linker = OsString::from("-Clinker=");
    linker.push(&collector);
    command.arg(linker);
    run_compiler(command, Language::Rust, source, &folder.path().join("program"), signals)?;
    let path = folder.path().join(ARGUMENTS);
    let arguments = std::fs::read(&path).map_err(|error| Error::Read { path, error })?;
    let arguments = arguments.split(|&byte| byte == 0).map(|argument| OsString::from_vec(argument.to_vec()));
    interpret(arguments)
}

/// Finds the inputs among a linker's arguments. What else they say is about the file that it would write.
fn interpret(arguments: impl Iterator<Item = OsString>) -> Result<(Vec<LinkInput>, Vec<PathBuf>), Error> {
    let (mut inputs, mut folders) = (Vec::new(), Vec::new());
    let mut arguments = arguments.filter(|argument| !argument.is_empty());
    while let Some(argument) = arguments.next() {
        let text = argument.to_string_lossy().into_owned();
        match text.as_str() {
            "-o" | "-z" | "-u" | "-T" | "-Xlinker" => drop(arguments.next()),
            "-L" => folders.extend(arguments.next().map(PathBuf::from)),
            "-l" => inputs.extend(arguments.next().map(|name| LinkInput::Library(name.to_string_lossy().into_owned()))),
            option if option.starts_with("-L") => folders.push(option[2..].into()),
            option if option.starts_with("-l") => inputs.push(LinkInput::Library(option[2..].to_owned())),
            option if option.starts_with('-') => {}
            file if file.ends_with(".o") => {
                let bytes = std::fs::read(file).map_err(|error| Error::Read { path: file.into(), error })?;
                let name = Path::new(file).file_name().map(|name| name.to_string_lossy().into_owned());
                inputs.push(LinkInput::Object(name.unwrap_or_default(), bytes));
            }
            _ => inputs.push(LinkInput::File(argument.into())),
        }
    }
    Ok((inputs, folders))
}

/// If this program runs as the collector, notes its arguments and returns the status to exit with.
pub(crate) fn collect() -> Option<ExitCode> {
    let mut arguments = std::env::args_os();
    let this = PathBuf::from(arguments.next()?);
    if this.file_name()? != COLLECTOR {
        return None;
    }
    Some(match note(this.parent()?, arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("farlink: what the program consists of cannot be noted: {error}");
            ExitCode::FAILURE
        }
    })
}

/// Writes the arguments, and copies of the objects that they name, into `folder`.
fn note(folder: &Path, arguments: impl Iterator<Item = OsString>) -> std::io::Result<()> {
    let mut noted = Vec::new();
    let mut write = |argument: &OsString| {
        noted.extend_from_slice(argument.as_bytes());
        noted.push(0);
    };
    let mut copies = 0;
    for argument in arguments {
        // Arguments that are too many come in a file, one in each line.
        let from_file =
            argument.as_bytes().strip_prefix(b"@").map(std::ffi::OsStr::from_bytes).map(std::fs::read_to_string);
        let all: Vec<OsString> = match from_file {
            Some(lines) => lines?.lines().map(|line| line.trim_matches('"').into()).collect(),
            None => vec![argument],
        };
        for argument in all {
            if !argument.as_bytes().ends_with(b".o") {
                write(&argument);
                continue;
            }
            let name = Path::new(&argument).file_name().ok_or(ErrorKind::InvalidInput)?;
            copies += 1;
            let place = folder.join(copies.to_string());
            std::fs::create_dir(&place)?;
            let copy = place.join(name);
            std::fs::copy(&argument, &copy)?;
            write(&copy.into_os_string());
        }
    }
    std::fs::write(folder.join(ARGUMENTS), noted)
}

//! From what is written on the command line to what a library is given.

use crate::args::InputArgs;
use crate::compile::{Language, compile};
use crate::error::Error;
use crate::rust::{self, LinkInput};
use crate::script;
use crate::signals::Signals;
use farlink::addr::ExecutorAddr;
use farlink::elf::{InputKind, Needs, check_shared_object, identify};
use farlink::{Library, ParsedObjects};
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Where libraries are looked for after the folders that are named: as the compilers of this system do it.
const SYSTEM_DIRS: &[&str] = &[
    "/usr/local/lib/x86_64-linux-gnu",
    "/usr/local/lib",
    "/lib/x86_64-linux-gnu",
    "/usr/lib/x86_64-linux-gnu",
    "/lib64",
    "/usr/lib64",
    "/lib",
    "/usr/lib",
];

/// Linker scripts that name linker scripts are followed this far.
const MAX_SCRIPT_DEPTH: usize = 8;

/// The C++ runtime, which a program with C++ sources is linked with as C++ compilers do it.
const CXX_RUNTIME: &str = "libstdc++.so.6";

/// The same for Fortran.
const FORTRAN_RUNTIME: &str = "libgfortran.so.5";

/// The mathematical functions, which both have.
const MATH_LIBRARY: &str = "libm.so.6";

/// The same for vectors, which compilers write calls of with `-ffast-math`.
const VECTOR_MATH_LIBRARY: &str = "libmvec.so.1";

/// Something to link, read but not yet given to a library.
pub(crate) enum Loaded {
    Object {
        name: String,
        bytes: Vec<u8>,
    },
    /// Objects that have been read.
    Parsed(ParsedObjects),
    Archive {
        path: PathBuf,
        bytes: Vec<u8>,
    },
    WholeArchive {
        path: PathBuf,
        bytes: Vec<u8>,
    },
    Shared {
        path: String,
    },
    /// What a linker script has for symbols that nothing else defines.
    AsNeeded {
        path: PathBuf,
    },
}

/// Reads and compiles everything that the command line names, in its order, libraries last.
pub(crate) fn load(args: &InputArgs, signals: &Signals) -> Result<Vec<Loaded>, Error> {
    let mut loaded = Vec::new();
    let (mut has_cxx, mut has_fortran) = (false, false);
    for path in &args.inputs {
        match Language::of(path) {
            Some(language) => {
                // The compiler's message about a file that is not there would name the compiler first.
                std::fs::metadata(path).map_err(|error| Error::Read { path: path.clone(), error })?;
                has_cxx |= language == Language::Cxx;
                has_fortran |= language == Language::Fortran;
                if language == Language::Rust && rust::is_program(path)? {
                    load_rust_program(path, args, signals, &mut loaded)?;
                    continue;
                }
                let bytes = compile(path, language, args.debug, signals)?;
                loaded.push(Loaded::Object { name: path.display().to_string(), bytes });
            }
            None => load_file(path, 0, args, &mut loaded)?,
        }
    }
    for path in &args.whole_archive {
        let bytes = std::fs::read(path).map_err(|error| Error::Read { path: path.clone(), error })?;
        loaded.push(Loaded::WholeArchive { path: path.clone(), bytes });
    }
    for name in &args.libraries {
        load_file(&find_library(name, &args.library_dirs)?, 0, args, &mut loaded)?;
    }
    let runtimes = [(has_cxx, CXX_RUNTIME), (has_fortran, FORTRAN_RUNTIME), (has_cxx || has_fortran, MATH_LIBRARY)];
    let shared = |path: &str| Loaded::Shared { path: path.to_owned() };
    loaded.extend(runtimes.into_iter().filter(|&(is_needed, _)| is_needed).map(|(_, path)| shared(path)));
    if has_cxx || has_fortran {
        loaded.push(Loaded::AsNeeded { path: VECTOR_MATH_LIBRARY.into() });
    }
    Ok(loaded)
}

/// Adds everything that a Rust program is linked of.
fn load_rust_program(
    source: &Path,
    args: &InputArgs,
    signals: &Signals,
    loaded: &mut Vec<Loaded>,
) -> Result<(), Error> {
    let (inputs, folders) = rust::build(source, args.debug, signals)?;
    for input in inputs {
        match input {
            LinkInput::Object(name, bytes) => loaded.push(Loaded::Object { name, bytes }),
            LinkInput::File(path) => load_file(&path, 0, args, loaded)?,
            LinkInput::Library(name) => load_file(&find_library(&name, &folders)?, 0, args, loaded)?,
        }
    }
    Ok(())
}

fn load_file(path: &Path, depth: usize, args: &InputArgs, loaded: &mut Vec<Loaded>) -> Result<(), Error> {
    let bytes = std::fs::read(path).map_err(|error| Error::Read { path: path.to_owned(), error })?;
    match identify(&bytes) {
        InputKind::SharedObject => {
            let checked = check_shared_object(&path.display().to_string(), &bytes);
            checked.map_err(|error| Error::Farlink(error.into()))?;
            loaded.push(Loaded::Shared { path: absolute(path)? });
        }
        InputKind::Archive | InputKind::ThinArchive => {
            loaded.push(Loaded::Archive { path: path.to_owned(), bytes });
        }
        InputKind::Text if has_extension(path, "so") => {
            let files = script::parse(&String::from_utf8_lossy(&bytes)).map_err(|what| Error::input(path, what))?;
            for file in files.inputs {
                if depth == MAX_SCRIPT_DEPTH {
                    return Err(Error::input(path, "linker scripts name each other without end"));
                }
                load_file(&scripted(path, &file, args)?, depth + 1, args, loaded)?;
            }
            // One that is not there is none that is needed.
            let as_needed = files.as_needed.iter().filter_map(|file| scripted(path, file, args).ok());
            loaded.extend(as_needed.map(|path| Loaded::AsNeeded { path }));
        }
        // Whatever else it is, parsing it as an object says what is wrong with it.
        _ => loaded.push(Loaded::Object { name: path.display().to_string(), bytes }),
    }
    Ok(())
}

fn has_extension(path: &Path, extension: &str) -> bool {
    path.extension().is_some_and(|found| found == extension)
}

/// Returns the file that a linker script at `script` names as `file`.
fn scripted(script: &Path, file: &str, args: &InputArgs) -> Result<PathBuf, Error> {
    if let Some(name) = file.strip_prefix("-l") {
        return find_library(name, &args.library_dirs);
    }
    let beside = script.with_file_name(file);
    if Path::new(file).is_absolute() || beside.is_file() {
        return Ok(beside);
    }
    find_library(&format!(":{file}"), &args.library_dirs)
}

/// Returns the path of a shared library as the dynamic linker wants it: one with a slash is not searched for.
fn absolute(path: &Path) -> Result<String, Error> {
    let path = std::path::absolute(path).map_err(|error| Error::Read { path: path.to_owned(), error })?;
    path.into_os_string().into_string().map_err(|path| Error::input(Path::new(&path), "the path is not UTF-8"))
}

/// Finds what `-l name` means.
fn find_library(name: &str, named_dirs: &[PathBuf]) -> Result<PathBuf, Error> {
    let wanted = match name.strip_prefix(':') {
        Some(file) => vec![file.to_owned()],
        None => vec![format!("lib{name}.so"), format!("lib{name}.a")],
    };
    let dirs: Vec<PathBuf> = named_dirs.iter().cloned().chain(SYSTEM_DIRS.iter().map(PathBuf::from)).collect();
    let candidates = dirs.iter().flat_map(|dir| wanted.iter().map(move |file| dir.join(file)));
    if let Some(found) = { candidates }.find(|path| path.is_file()) {
        return Ok(found);
    }
    // The compiler knows folders of its own, where for example the C++ runtime is.
    let known = wanted.iter().filter_map(|file| compiler_file(file)).next();
    known.ok_or_else(|| Error::NoLibrary { name: name.to_owned(), wanted, dirs })
}

/// Asks the C compiler where it has a library.
fn compiler_file(file: &str) -> Option<PathBuf> {
    let compiler = std::env::var("CC").ok().filter(|name| !name.is_empty()).unwrap_or("cc".to_owned());
    let output = Command::new(compiler).arg(format!("-print-file-name={file}")).output().ok()?;
    let path = PathBuf::from(String::from_utf8(output.stdout).ok()?.trim());
    // What the compiler does not have it prints as it was asked.
    (path.is_absolute() && path.is_file()).then_some(path)
}

/// Returns what everything that was loaded needs of the process.
pub(crate) fn needs(loaded: &[Loaded]) -> Needs {
    let mut needs = Needs::default();
    for input in loaded {
        if let Loaded::Object { bytes, .. } | Loaded::Archive { bytes, .. } | Loaded::WholeArchive { bytes, .. } = input
        {
            needs.add(Needs::of(bytes));
        }
    }
    needs
}

/// What compilers link with every program besides libraries that every process has: the compiler's own functions, and
/// those of the C library that each program has for itself.
const COMPILER_ARCHIVES: [&str; 2] = ["libgcc.a", "libc_nonshared.a"];

/// Returns the libraries that are for what nothing else defines.
pub(crate) fn as_needed(loaded: &[Loaded]) -> Vec<PathBuf> {
    let path = |input: &Loaded| if let Loaded::AsNeeded { path } = input { Some(path.clone()) } else { None };
    loaded.iter().filter_map(path).collect()
}

/// Adds what is for symbols that nothing else defines: what compilers link with every program, as far as the compiler is
/// there, and the libraries `as_needed`. Returns whether there was anything.
pub(crate) fn add_needed(library: &Library, as_needed: &[PathBuf]) -> Result<bool, Error> {
    // One that cannot be opened leaves undefined what it is for, which is then what is reported.
    let opened = as_needed.iter().filter(|path| library.add_shared_library(&path.to_string_lossy()).is_ok()).count();
    let paths: Vec<PathBuf> = COMPILER_ARCHIVES.into_iter().filter_map(compiler_file).collect();
    for path in &paths {
        let bytes = std::fs::read(path).map_err(|error| Error::Read { path: path.clone(), error })?;
        library.add_archive(&path.display().to_string(), bytes)?;
    }
    Ok(!paths.is_empty() || opened > 0)
}

/// Reads the objects of what was loaded, those at once that follow each other.
pub(crate) fn parse(loaded: Vec<Loaded>) -> Result<Vec<Loaded>, Error> {
    let mut loaded = loaded.into_iter().peekable();
    let mut parsed = Vec::new();
    while let Some(input) = loaded.next() {
        let Loaded::Object { name, bytes } = input else {
            parsed.push(input);
            continue;
        };
        let mut objects = vec![(name, bytes)];
        while let Some(Loaded::Object { name, bytes }) = loaded.next_if(|next| matches!(next, Loaded::Object { .. })) {
            objects.push((name, bytes));
        }
        parsed.push(Loaded::Parsed(ParsedObjects::parse(objects)?));
    }
    Ok(parsed)
}

/// Gives a library everything that was loaded, and the definitions of the command line.
pub(crate) fn add(library: &Library, args: &InputArgs, loaded: Vec<Loaded>) -> Result<(), Error> {
    for (name, addr) in &args.definitions {
        library.define(name, ExecutorAddr::new(*addr))?;
    }
    for input in loaded {
        match input {
            Loaded::Object { name, bytes } => library.add_object(&name, bytes).map(drop)?,
            Loaded::Parsed(objects) => library.add_parsed(objects).map(drop)?,
            Loaded::Archive { path, bytes } => library.add_archive(&path.display().to_string(), bytes)?,
            Loaded::WholeArchive { path, bytes } => library.add_whole_archive(&path.display().to_string(), bytes)?,
            Loaded::Shared { path } => library.add_shared_library(&path)?,
            Loaded::AsNeeded { .. } => {}
        }
    }
    Ok(())
}

/// Returns whether what nothing refers to is left out of Rust's programs, as everybody leaves it out, because there is one.
pub(crate) fn has_rust_program(args: &InputArgs) -> bool {
    let is_rust = |path: &&PathBuf| Language::of(path) == Some(Language::Rust);
    args.inputs.iter().filter(is_rust).any(|path| rust::is_program(path).unwrap_or(false))
}

/// Returns what the program is told its name is: that of its first input without the extension, as its native build
/// would usually be called.
pub(crate) fn program_name(args: &InputArgs) -> OsString {
    let first = &args.inputs[0];
    if first.extension().is_some() { first.with_extension("").into() } else { first.clone().into() }
}

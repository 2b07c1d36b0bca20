//! What the examples have in common: C, compiled by the system's compiler.

use std::error::Error;
use std::fs;
use std::process::Command;

pub(crate) type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// Compiles a C source; gives the object's bytes. What the compiler has to say goes to standard error.
pub(crate) fn compile(source: &str, flags: &[&str]) -> Result<Vec<u8>> {
    let dir = tempfile::tempdir()?;
    let (text, object) = (dir.path().join("source.c"), dir.path().join("source.o"));
    fs::write(&text, source)?;
    let status =
        Command::new("cc").args(["-c", "-g", "-fPIC"]).args(flags).arg("-o").arg(&object).arg(&text).status()?;
    if !status.success() {
        return Err("the compiler refused it".into());
    }
    Ok(fs::read(object)?)
}

//! Sessions in each configuration, calls of linked functions, and the objects that every peer links.

use crate::observe::check;
use crate::{Args, Config, Result};
use farlink::graph::Bytes;
use farlink::{Function, Library, Memory, Session, SessionBuilder};

/// Starts a session in the configuration that was asked for.
pub(crate) fn session(args: &Args) -> Result<Session> {
    let out_of_process =
        |memory| SessionBuilder::default().memory(memory).executor(args.executor.clone(), Vec::new()).spawn();
    Ok(match args.config {
        Config::Inproc => Session::in_process()?,
        Config::Memfd => out_of_process(Memory::Shared)?,
        Config::Posix => out_of_process(Memory::Posix)?,
    })
}

/// A linked function `int name(int)`.
pub(crate) struct IntFunction(Function<fn(i32) -> i32>);

impl IntFunction {
    /// Links what the function needs.
    pub(crate) fn find(library: &Library, name: &str) -> Result<Self> {
        Ok(Self(library.function(name)?))
    }

    #[allow(unsafe_code, reason = "linked code is called")]
    pub(crate) fn call(&self, arg: i32) -> Result<i32> {
        // SAFETY: every function that these measurements name takes an `int` and gives an `int`, in the objects of `objs/`
        // and in the C library, and its object is removed only after the last call.
        Ok(unsafe { self.0.call((arg,)) }?)
    }
}

/// Finds a function and calls it once.
pub(crate) fn call(library: &Library, name: &str, arg: i32) -> Result<i32> {
    IntFunction::find(library, name)?.call(arg)
}

/// Object `number` of the tiny ones: `int tiny_NNNN(int x)` gives |x| + 1000 + 7 * number, calls `abs` of the C library,
/// and has data and unwind information.
pub(crate) fn tiny_name(number: usize) -> String {
    format!("tiny_{number:04}")
}

pub(crate) fn tiny_objects(args: &Args, count: usize) -> Result<Vec<Bytes>> {
    (0..count).map(|number| Ok(args.read(&format!("tiny/{}.o", tiny_name(number)))?.into())).collect()
}

/// Calls a tiny object's function and compares what it gives.
pub(crate) fn check_tiny(library: &Library, name: &str, number: usize) -> Result<()> {
    let number = i32::try_from(number)?;
    check(name, &call(library, name, -number)?, &(number + 1000 + 7 * number))
}

/// An object with a name of eight digits in it, of which copies with other numbers can be made.
pub(crate) struct Template {
    bytes: Vec<u8>,
    /// Where the digits are.
    digits: Vec<usize>,
}

const DIGITS: &[u8] = b"_00000000";

impl Template {
    pub(crate) fn read(args: &Args, name: &str) -> Result<Self> {
        let bytes = args.read(name)?;
        let digits = bytes.windows(DIGITS.len()).enumerate().filter(|(_, window)| *window == DIGITS);
        let digits: Vec<_> = digits.map(|(at, _)| at + 1).collect();
        if digits.is_empty() { Err(format!("{name} has no number").into()) } else { Ok(Self { bytes, digits }) }
    }

    pub(crate) fn copy(&self, number: usize) -> Bytes {
        let mut bytes = self.bytes.clone();
        for &at in &self.digits {
            bytes[at..at + 8].copy_from_slice(format!("{number:08}").as_bytes());
        }
        bytes.into()
    }
}

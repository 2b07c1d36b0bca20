//! The executor's command line, with LLVM's spelling of inherited descriptors beside our own.

#![allow(unsafe_code)]

use crate::server::run;
use crate::signals::restore_default_signals;
use farlink_rpc::{Options, Transport};
use std::ffi::OsString;
use std::os::fd::{BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::process::ExitCode;

const USAGE: &str = "\
Usage: farlink-executor [--farlink] filedescs=R,W | --fd N

An executor for one controller, reached over descriptors that were open when it was started.

  filedescs=R,W  read from descriptor R and write to W, which may be one socket
  --fd N         talk over the socket N
  --farlink      the controller is farlink and understands errors beside results
  --help         print this
  --version      print the version";

enum Request {
    Help,
    Version,
    Serve { read: RawFd, write: RawFd, is_farlink: bool },
}

/// Runs the executor with these arguments, which do not begin with the program's name.
#[must_use]
pub fn main_with_args(args: impl Iterator<Item = OsString>) -> ExitCode {
    match parse(args) {
        Ok(Request::Help) => {
            println!("{USAGE}");
            ExitCode::SUCCESS
        }
        Ok(Request::Version) => {
            println!("farlink-executor {}", env!("CARGO_PKG_VERSION"));
            ExitCode::SUCCESS
        }
        Ok(Request::Serve { read, write, is_farlink }) => match serve(read, write, is_farlink) {
            Ok(status) => exit(status),
            Err(text) => {
                eprintln!("farlink-executor: {text}");
                ExitCode::FAILURE
            }
        },
        Err(text) => {
            eprintln!("farlink-executor: {text}\n{USAGE}");
            ExitCode::FAILURE
        }
    }
}

fn exit(status: i32) -> ExitCode {
    u8::try_from(status).map_or(ExitCode::FAILURE, ExitCode::from)
}

fn parse(args: impl Iterator<Item = OsString>) -> Result<Request, String> {
    let (mut fds, mut is_farlink) = (None, false);
    let mut args = args.map(|arg| arg.to_string_lossy().into_owned());
    while let Some(arg) = args.next() {
        let parsed = match arg.as_str() {
            "--help" | "-h" => return Ok(Request::Help),
            "--version" | "-V" => return Ok(Request::Version),
            "--farlink" => {
                is_farlink = true;
                continue;
            }
            "--fd" => {
                let number = args.next().and_then(|number| number.parse().ok());
                number.map(|fd: RawFd| (fd, fd)).ok_or("--fd wants the number of a descriptor")?
            }
            other => descriptors(other).ok_or_else(|| format!("{other:?} is not understood"))?,
        };
        if fds.replace(parsed).is_some() {
            return Err("the connection is given twice".to_owned());
        }
    }
    let (read, write) = fds.ok_or("no connection is given")?;
    Ok(Request::Serve { read, write, is_farlink })
}

/// Reads `filedescs=R,W`.
fn descriptors(arg: &str) -> Option<(RawFd, RawFd)> {
    let (read, write) = arg.strip_prefix("filedescs=")?.split_once(',')?;
    Some((read.parse().ok()?, write.parse().ok()?))
}

fn serve(read: RawFd, write: RawFd, is_farlink: bool) -> Result<i32, String> {
    let transport = if read == write {
        Transport::from_socket(adopt(read)?)
    } else {
        Transport::from_fds(adopt(read)?, adopt(write)?)
    };
    let transport = transport.map_err(|error| format!("the connection cannot be used: {error}"))?;
    if read == write {
        // Writing to a pipe that nobody reads would end the process; a socket is written without that signal.
        restore_default_signals();
    }
    let options = Options { out_of_band_results: is_farlink, ..Options::default() };
    run(transport, options).map_err(|error| format!("the session could not begin: {error}"))
}

/// Takes an inherited descriptor, which programs that linked code starts do not inherit in turn.
fn adopt(number: RawFd) -> Result<OwnedFd, String> {
    if (0..=2).contains(&number) {
        return Err(format!("descriptor {number} is a standard stream, which is the program's"));
    }
    if number < 0 {
        return Err(format!("{number} is no descriptor"));
    }
    // SAFETY: the number is not -1, and is used for one call, which fails if it is not open.
    let borrowed = unsafe { BorrowedFd::borrow_raw(number) };
    rustix::io::fcntl_setfd(borrowed, rustix::io::FdFlags::CLOEXEC)
        .map_err(|error| format!("descriptor {number} is not open: {error}"))?;
    // SAFETY: the descriptor is open, and nobody else in this process has it: it was inherited, is not a standard
    // stream, and the command line names it once.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(args: &[&str]) -> Result<(RawFd, RawFd, bool), String> {
        match parse(args.iter().map(OsString::from))? {
            Request::Serve { read, write, is_farlink } => Ok((read, write, is_farlink)),
            _ => Err("not a request to serve".to_owned()),
        }
    }

    /// Both spellings of a connection are read; anything else is an error.
    #[test]
    fn command_lines() {
        assert_eq!(parsed(&["filedescs=3,6"]), Ok((3, 6, false)));
        assert_eq!(parsed(&["--fd", "5", "--farlink"]), Ok((5, 5, true)));
        for bad in
            [&[][..], &["filedescs=3"], &["--fd"], &["--fd", "x"], &["filedescs=3,4", "--fd", "5"], &["listen=x"]]
        {
            assert!(parsed(bad).is_err(), "{bad:?}");
        }
        assert!(adopt(0).is_err() && adopt(-1).is_err() && adopt(1_000_000).is_err());
    }
}

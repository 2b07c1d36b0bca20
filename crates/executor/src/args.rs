//! The executor's command line, with LLVM's spellings of a connection beside our own.

use crate::environment;
use crate::harden;
use crate::listen::Place;
use crate::prepared;
use crate::server::run;
use crate::signals::{ignore_broken_pipes, restore_default_signals};
use farlink_rpc::Options;
use std::ffi::OsString;
use std::os::fd::RawFd;
use std::path::PathBuf;
use std::process::ExitCode;

const USAGE: &str = "\
Usage: farlink-executor [OPTIONS] CONNECTION

An executor for one controller, which is reached over the CONNECTION, one of:

  filedescs=R,W     descriptors that were open when this was started: read from R and write to W, maybe one socket
  --fd N            the socket N, likewise
  --stdio           standard input and output; what the program prints goes to standard error
  --unix PATH       a Unix socket, made for this user alone and removed when the controller has come
  listen=HOST:PORT  TCP at that address, for a controller that knows the secret

Options:

  --secret-file FILE  the secret, 16 bytes or more
  --insecure          let anybody who can connect run anything here, LLVM's tools among them
  --harden            keep linked code from other processes and from writing below /proc, and be ready to be locked
  --prepared          be no executor yet: the CONNECTION, one inherited socket that keeps the bounds of messages, is for
                      requests to open shared libraries and to fork executors that have them, children of the parent
  --ring N            the inherited memory N of a ring, which a controller that is farlink has made for this executor
  --farlink           the controller is farlink and understands errors beside results
  --help              print this
  --version           print the version";

enum Request {
    Help,
    Version,
    Serve { place: Place, kind: Kind },
}

/// What to be.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Kind {
    is_farlink: bool,
    is_hardened: bool,
    is_prepared: bool,
    /// The descriptor of a ring's memory.
    ring: Option<RawFd>,
}

/// Exit status for what is wrong with the arguments or the connection.
const FAILURE: i32 = 1;

/// Runs the executor with these arguments, which do not begin with the program's name. Call it before there are other
/// threads: it takes back what a controller has added to the environment.
#[must_use]
pub fn main_with_args(args: impl Iterator<Item = OsString>) -> ExitCode {
    u8::try_from(exit_status(args)).map_or(ExitCode::FAILURE, ExitCode::from)
}

/// As [`main_with_args`]; gives the exit status.
#[allow(unsafe_code, reason = "the environment is changed")]
pub fn exit_status(args: impl Iterator<Item = OsString>) -> i32 {
    // SAFETY: there is only this thread yet (documented for who calls this; this program's `main`, that of `farlink` and
    // programs that are their own executors come here first).
    unsafe { environment::restore() };
    match parse(args) {
        Ok(Request::Help) => {
            println!("{USAGE}");
            0
        }
        Ok(Request::Version) => {
            println!("farlink-executor {}", env!("CARGO_PKG_VERSION"));
            0
        }
        Ok(Request::Serve { place, kind }) => serve(&place, kind).unwrap_or_else(|text| {
            eprintln!("farlink-executor: {text}");
            FAILURE
        }),
        Err(text) => {
            eprintln!("farlink-executor: {text}\n{USAGE}");
            FAILURE
        }
    }
}

fn parse(args: impl Iterator<Item = OsString>) -> Result<Request, String> {
    let (mut kind, mut is_insecure) = (Kind::default(), false);
    let (mut places, mut address, mut secret) = (Vec::new(), None, None);
    let mut args = args;
    while let Some(arg) = args.next() {
        let text = arg.to_string_lossy();
        match text.as_ref() {
            "--help" | "-h" => return Ok(Request::Help),
            "--version" | "-V" => return Ok(Request::Version),
            "--farlink" => kind.is_farlink = true,
            "--harden" => kind.is_hardened = true,
            "--prepared" => kind.is_prepared = true,
            "--insecure" => is_insecure = true,
            "--stdio" => places.push(Place::Stdio),
            "--unix" => places.push(Place::Unix(args.next().ok_or("--unix wants a path")?.into())),
            "--secret-file" => secret = Some(PathBuf::from(args.next().ok_or("--secret-file wants a path")?)),
            "--fd" => {
                let fd = number(args.next()).ok_or("--fd wants the number of a descriptor")?;
                places.push(Place::Fds(fd, fd));
            }
            "--ring" => kind.ring = Some(number(args.next()).ok_or("--ring wants the number of a descriptor")?),
            other => match other.split_once('=') {
                Some(("filedescs", numbers)) => places.push(descriptors(numbers).ok_or("filedescs= wants R,W")?),
                Some(("listen", host_and_port)) if address.is_none() => address = Some(host_and_port.to_owned()),
                _ => return Err(format!("{other:?} is not understood")),
            },
        }
    }
    if address.is_none() && (secret.is_some() || is_insecure) {
        return Err("--secret-file and --insecure are for listen=HOST:PORT".to_owned());
    }
    if secret.is_some() && is_insecure {
        return Err("--insecure lets anybody connect: no --secret-file goes with it".to_owned());
    }
    places.extend(address.map(|address| listening(&address, secret, is_insecure)).transpose()?);
    let is_free = |place: &Place, ring| matches!(place, Place::Fds(read, write) if ring != *read && ring != *write);
    match (places.pop(), places.is_empty()) {
        (Some(place), true) if kind.ring.is_some_and(|ring| !is_free(&place, ring)) => {
            Err("--ring wants a descriptor of its own, beside inherited ones".to_owned())
        }
        (Some(place), true) => Ok(Request::Serve { place, kind }),
        (Some(_), false) => Err("the connection is given twice".to_owned()),
        (None, _) => Err("no connection is given".to_owned()),
    }
}

fn number(arg: Option<OsString>) -> Option<RawFd> {
    arg?.to_str()?.parse().ok()
}

/// Reads `filedescs=R,W`.
fn descriptors(arg: &str) -> Option<Place> {
    let (read, write) = arg.split_once(',')?;
    Some(Place::Fds(read.parse().ok()?, write.parse().ok()?))
}

/// Reads `listen=HOST:PORT`.
fn listening(address: &str, secret: Option<PathBuf>, is_insecure: bool) -> Result<Place, String> {
    let named = address.rsplit_once(':').filter(|(host, port)| !host.is_empty() && port.parse::<u16>().is_ok());
    if named.is_none() {
        return Err(format!("listen={address} does not name a host and a port, as listen=localhost:20000 does"));
    }
    if secret.is_none() && !is_insecure {
        return Err("whoever connects could run anything here: name a file with a secret that both ends know with \
                    --secret-file, or let anybody connect with --insecure"
            .to_owned());
    }
    Ok(Place::Tcp { address: address.to_owned(), secret })
}

fn serve(place: &Place, kind: Kind) -> Result<i32, String> {
    let rules = kind.is_hardened.then(harden::rules);
    rules.iter().for_each(harden::begin);
    let Kind { is_farlink, is_prepared, .. } = kind;
    if is_prepared {
        restore_default_signals();
        let options = Options { out_of_band_results: is_farlink, ..Options::default() };
        return prepared::run(place.find_socket()?, rules, options);
    }
    drop(rules);
    let mut found = place.find()?;
    if let Some(number) = kind.ring {
        found.take_ring(number)?;
    }
    if found.writes_to_pipe {
        ignore_broken_pipes();
    } else {
        // A socket is written without that signal.
        restore_default_signals();
    }
    let options = Options { out_of_band_results: is_farlink || found.is_farlink, ..Options::default() };
    run(found.transport, options).map_err(|error| format!("the session could not begin: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(args: &[&str]) -> Result<(Place, bool), String> {
        match parse(args.iter().map(OsString::from))? {
            Request::Serve { place, kind } => Ok((place, kind.is_farlink)),
            _ => Err("not a request to serve".to_owned()),
        }
    }

    /// Every spelling of a connection is read; anything else is an error.
    #[test]
    fn command_lines() {
        assert_eq!(parsed(&["filedescs=3,6"]), Ok((Place::Fds(3, 6), false)));
        assert_eq!(parsed(&["--fd", "5", "--farlink"]), Ok((Place::Fds(5, 5), true)));
        assert_eq!(parsed(&["--fd", "5", "--ring", "6"]), Ok((Place::Fds(5, 5), false)));
        assert_eq!(parsed(&["--stdio"]), Ok((Place::Stdio, false)));
        assert_eq!(parsed(&["--unix", "/x"]), Ok((Place::Unix("/x".into()), false)));
        let tcp = |address: &str, secret: Option<&str>| {
            Ok((Place::Tcp { address: address.to_owned(), secret: secret.map(PathBuf::from) }, false))
        };
        assert_eq!(parsed(&["listen=::1:0", "--secret-file", "s"]), tcp("::1:0", Some("s")));
        assert_eq!(parsed(&["--insecure", "listen=localhost:1"]), tcp("localhost:1", None));
        for bad in [
            &[][..],
            &["filedescs=3"],
            &["--fd"],
            &["--fd", "x"],
            &["--unix"],
            &["--fd", "5", "--ring"],
            &["--fd", "5", "--ring", "5"],
            &["filedescs=5,6", "--ring", "6"],
            &["--stdio", "--ring", "3"],
            &["filedescs=3,4", "--fd", "5"],
            &["--stdio", "listen=localhost:1", "--insecure"],
            &["listen=localhost:1"],
            &["listen=:1", "--insecure"],
            &["listen=localhost", "--insecure"],
            &["listen=localhost:70000", "--insecure"],
            &["--stdio", "--insecure"],
            &["listen=localhost:1", "--insecure", "--secret-file", "s"],
        ] {
            assert!(parsed(bad).is_err(), "{bad:?}");
        }
    }
}

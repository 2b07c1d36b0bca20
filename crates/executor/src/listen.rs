//! Where the controller comes from: inherited descriptors, the standard streams, a Unix socket, or TCP.

#![allow(unsafe_code)]

use farlink_rpc::{Transport, demand_secret};
use rustix::fs::Mode;
use rustix::net::sockopt;
use std::net::{TcpListener, TcpStream};
use std::os::fd::{BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// How long a peer may take to prove that it knows the secret. Peers are heard one after the other.
const SECRET_PATIENCE: Duration = Duration::from_secs(5);

/// Fewest bytes of a secret.
const MIN_SECRET_BYTES: usize = 16;

/// Where to find the controller.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Place {
    /// Inherited descriptors.
    Fds(RawFd, RawFd),
    /// The standard input and output, which linked programs then have no part in.
    Stdio,
    /// A Unix socket to be made.
    Unix(PathBuf),
    /// A host and port to listen on, and the file with the secret that whoever connects has to know.
    Tcp { address: String, secret: Option<PathBuf> },
}

/// The way to a controller.
pub(crate) struct Found {
    pub(crate) transport: Transport,
    /// Whether the controller is known to be farlink.
    pub(crate) is_farlink: bool,
    /// Whether bytes go out over a pipe: writing to one that nobody reads ends a process that does not ignore SIGPIPE.
    pub(crate) writes_to_pipe: bool,
}

impl Found {
    /// Takes the inherited memory of a ring that goes with the connection, which is another descriptor.
    pub(crate) fn take_ring(&mut self, number: RawFd) -> Result<(), String> {
        let memory = adopt(number)?;
        self.transport
            .take_ring(&memory)
            .map_err(|error| format!("descriptor {number} is no memory of a ring: {error}"))
    }
}

impl Place {
    /// Gets the one inherited descriptor, which is no connection of an executor.
    pub(crate) fn find_socket(&self) -> Result<OwnedFd, String> {
        match self {
            Self::Fds(read, write) if read == write => adopt(*read),
            _ => Err("--prepared wants one inherited socket: --fd N".to_owned()),
        }
    }

    /// Gets the connection, waiting for the controller if need be.
    pub(crate) fn find(&self) -> Result<Found, String> {
        match self {
            Self::Fds(read, write) if read == write => {
                Ok(Found { transport: over_socket(adopt(*read)?)?, is_farlink: false, writes_to_pipe: false })
            }
            Self::Fds(read, write) => over_fds(adopt(*read)?, adopt(*write)?, false),
            Self::Stdio => {
                let (read, write) =
                    take_standard_streams().map_err(|error| format!("the standard streams cannot be used: {error}"))?;
                over_fds(read, write, true)
            }
            Self::Unix(path) => {
                Ok(Found { transport: over_socket(accept_unix(path)?)?, is_farlink: true, writes_to_pipe: false })
            }
            Self::Tcp { address, secret } => {
                let secret = secret.as_deref().map(read_secret).transpose()?;
                let stream = accept_tcp(address, secret.as_deref())?;
                let is_farlink = secret.is_some();
                Ok(Found { transport: over_socket(stream.into())?, is_farlink, writes_to_pipe: false })
            }
        }
    }
}

fn unusable(error: std::io::Error) -> String {
    format!("the connection cannot be used: {error}")
}

fn over_socket(socket: OwnedFd) -> Result<Transport, String> {
    Transport::from_socket(socket).map_err(unusable)
}

fn over_fds(read: OwnedFd, write: OwnedFd, is_farlink: bool) -> Result<Found, String> {
    let transport = Transport::from_fds(read, write).map_err(unusable)?;
    Ok(Found { transport, is_farlink, writes_to_pipe: true })
}

/// Takes an inherited descriptor, which programs that linked code starts do not inherit in turn.
fn adopt(number: RawFd) -> Result<OwnedFd, String> {
    if (0..=2).contains(&number) {
        return Err(format!("descriptor {number} is a standard stream, which is the program's; use --stdio"));
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

/// Moves standard input and output to other descriptors. From then on linked programs read nothing, and what they write
/// to their standard output goes to the standard error stream: it would be taken for messages.
fn take_standard_streams() -> rustix::io::Result<(OwnedFd, OwnedFd)> {
    let (stdin, stdout) = (rustix::stdio::stdin(), rustix::stdio::stdout());
    let taken = (rustix::io::fcntl_dupfd_cloexec(stdin, 3)?, rustix::io::fcntl_dupfd_cloexec(stdout, 3)?);
    let null = rustix::fs::open(c"/dev/null", rustix::fs::OFlags::RDONLY | rustix::fs::OFlags::CLOEXEC, Mode::empty())?;
    rustix::stdio::dup2_stdin(null)?;
    rustix::stdio::dup2_stdout(rustix::stdio::stderr())?;
    Ok(taken)
}

/// Makes a socket that only this user can connect to, waits for one connection, and removes the socket.
fn accept_unix(path: &Path) -> Result<OwnedFd, String> {
    let shown = path.display();
    // The process has one thread yet, so nobody else makes a file meanwhile.
    let mask = rustix::process::umask(Mode::from_raw_mode(0o177));
    let listener = UnixListener::bind(path);
    rustix::process::umask(mask);
    let listener = listener.map_err(|error| match error.kind() {
        std::io::ErrorKind::AddrInUse => {
            format!("{shown} is there already: remove it if no executor is listening there, or name another path")
        }
        _ => format!("cannot listen at {shown}: {error}"),
    })?;
    let accepted = loop {
        let (stream, _) = match listener.accept() {
            Ok(accepted) => accepted,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
            Err(error) => break Err(format!("cannot take a connection at {shown}: {error}")),
        };
        match sockopt::socket_peercred(&stream) {
            Ok(peer) if peer.uid == rustix::process::geteuid() => break Ok(stream.into()),
            Ok(peer) => eprintln!("farlink-executor: user {} may not connect", peer.uid.as_raw()),
            Err(error) => eprintln!("farlink-executor: a peer that cannot be told may not connect: {error}"),
        }
    };
    let _ = std::fs::remove_file(path);
    accepted
}

/// Reads a secret: what a file has, without white space at its ends.
fn read_secret(path: &Path) -> Result<Vec<u8>, String> {
    let shown = path.display();
    let text = std::fs::read(path).map_err(|error| format!("the secret in {shown} cannot be read: {error}"))?;
    let secret = text.trim_ascii();
    if secret.len() < MIN_SECRET_BYTES {
        return Err(format!(
            "the secret in {shown} has {} bytes, and needs {MIN_SECRET_BYTES} or more: try head -c 32 /dev/urandom | base64",
            secret.len()
        ));
    }
    Ok(secret.to_vec())
}

/// Listens at `address` until somebody connects who knows the secret, if there is one.
fn accept_tcp(address: &str, secret: Option<&[u8]>) -> Result<TcpStream, String> {
    let listener = TcpListener::bind(address).map_err(|error| format!("cannot listen at {address}: {error}"))?;
    let at = listener.local_addr().map_err(|error| format!("cannot listen at {address}: {error}"))?;
    // Whoever asked for port 0 wants to know.
    eprintln!("farlink-executor: listening at {at}");
    loop {
        let (stream, peer) = match listener.accept() {
            Ok(accepted) => accepted,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(format!("cannot take a connection at {at}: {error}")),
        };
        match secret.map(|secret| demand_secret(&stream, secret, SECRET_PATIENCE)) {
            None | Some(Ok(())) => return Ok(stream),
            Some(Err(error)) => eprintln!("farlink-executor: {peer} was turned away: {error}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Standard streams, numbers that are none, and descriptors that are not open cannot be adopted.
    #[test]
    fn descriptors_that_cannot_be_used() {
        assert!(adopt(0).is_err() && adopt(-1).is_err() && adopt(1_000_000).is_err());
    }
}

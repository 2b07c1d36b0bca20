//! Sessions with executors that are there already, and listen.

use crate::{Error, Session, SessionBuilder};
use farlink_rpc::{Transport, prove_secret};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;

impl SessionBuilder {
    /// Talks to an executor that listens on a Unix socket (`farlink-executor --unix PATH`).
    ///
    /// # Errors
    ///
    /// Fails if nobody listens there, or it does not introduce itself as an executor.
    pub fn connect_unix(self, path: &Path) -> Result<Session, Error> {
        let socket = UnixStream::connect(path).map_err(connect_error)?;
        self.connect(Transport::from_socket(socket.into()).map_err(connect_error)?)
    }

    /// Talks to an executor that listens on TCP (`farlink-executor listen=HOST:PORT`), at this host and port: after both
    /// have proved that they know `secret`, unless it is none, as `--insecure` needs it.
    ///
    /// What follows is neither encrypted nor protected against change. An executor on another machine needs
    /// [`Memory::Remote`](crate::Memory::Remote).
    ///
    /// # Errors
    ///
    /// Fails if nobody listens there, or it has another secret, or does not introduce itself as an executor.
    pub fn connect_tcp(self, address: &str, secret: Option<&[u8]>) -> Result<Session, Error> {
        let socket = TcpStream::connect(address).map_err(connect_error)?;
        if let Some(secret) = secret {
            prove_secret(&socket, secret, self.options.setup_timeout).map_err(connect_error)?;
        }
        self.connect(Transport::from_socket(socket.into()).map_err(connect_error)?)
    }
}

fn connect_error(error: std::io::Error) -> Error {
    Error::Connect(Arc::new(error))
}

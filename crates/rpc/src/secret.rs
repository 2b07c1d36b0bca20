//! Proof, before the first frame, that both ends of a connection know a secret.
//!
//! | step | from | bytes |
//! | --- | --- | --- |
//! | 1 | executor | `farlink1`, 32 random bytes E |
//! | 2 | controller | 32 random bytes C, HMAC-SHA-256(secret, `controller` E C) |
//! | 3 | executor | HMAC-SHA-256(secret, `executor` E C) |
//!
//! The secret itself is never sent, and what is sent is of no use for another connection. What follows is neither
//! encrypted nor protected against change: over a network that others can write to, tunnel the connection.

use hmac::{Hmac, Mac};
use sha2::Sha256;
use std::io::{self, ErrorKind, Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

/// The first bytes from an executor that wants proof.
const MAGIC: [u8; 8] = *b"farlink1";

/// Bytes of a challenge, and of an answer to it.
const LEN: usize = 32;

/// Demands of the controller at the other end of `stream` that it proves to know `secret`, and proves the same to it,
/// in at most `patience`.
///
/// # Errors
///
/// Fails if the peer does not know the secret, takes longer, or goes away. The stream is then of no use.
pub fn demand_secret(stream: &TcpStream, secret: &[u8], patience: Duration) -> io::Result<()> {
    let mut stream = Timed::new(stream, patience);
    let own = challenge()?;
    stream.write(&[&MAGIC[..], &own].concat())?;
    let (theirs, proof): ([u8; LEN], [u8; LEN]) = (stream.read()?, stream.read()?);
    proof_of(secret, b"controller", &own, &theirs)?.verify_slice(&proof).map_err(|_| wrong("controller"))?;
    let proof = proof_of(secret, b"executor", &own, &theirs)?.finalize().into_bytes();
    stream.write(&proof)?;
    stream.done()
}

/// Proves to the executor at the other end of `stream` that this controller knows `secret`, and demands the same of it,
/// in at most `patience`.
///
/// # Errors
///
/// Fails if the peer does not want proof, does not know the secret, takes longer, or goes away. The stream is then of no
/// use.
pub fn prove_secret(stream: &TcpStream, secret: &[u8], patience: Duration) -> io::Result<()> {
    let mut stream = Timed::new(stream, patience);
    if stream.read::<{ MAGIC.len() }>()? != MAGIC {
        return Err(io::Error::new(ErrorKind::InvalidData, "the executor does not ask for a secret"));
    }
    let theirs: [u8; LEN] = stream.read()?;
    let own = challenge()?;
    let proof = proof_of(secret, b"controller", &theirs, &own)?.finalize().into_bytes();
    stream.write(&[&own[..], &proof].concat())?;
    let proof: [u8; LEN] = stream.read().map_err(|error| match error.kind() {
        ErrorKind::UnexpectedEof | ErrorKind::ConnectionReset => wrong("controller"),
        _ => error,
    })?;
    proof_of(secret, b"executor", &theirs, &own)?.verify_slice(&proof).map_err(|_| wrong("executor"))?;
    stream.done()
}

fn challenge() -> io::Result<[u8; LEN]> {
    let mut bytes = [0; LEN];
    let mut filled = 0;
    while filled < LEN {
        filled += rustix::rand::getrandom(&mut bytes[filled..], rustix::rand::GetRandomFlags::empty())?;
    }
    Ok(bytes)
}

fn proof_of(secret: &[u8], role: &[u8], executor: &[u8], controller: &[u8]) -> io::Result<Hmac<Sha256>> {
    let mac = Hmac::<Sha256>::new_from_slice(secret).map_err(|error| io::Error::other(error.to_string()))?;
    Ok(mac.chain_update(role).chain_update(executor).chain_update(controller))
}

fn wrong(who: &str) -> io::Error {
    io::Error::new(ErrorKind::PermissionDenied, format!("the {who} has another secret"))
}

/// A stream on which everything together may take a certain time.
struct Timed<'a> {
    stream: &'a TcpStream,
    end: Instant,
}

impl<'a> Timed<'a> {
    fn new(stream: &'a TcpStream, patience: Duration) -> Self {
        Self { stream, end: Instant::now() + patience }
    }

    /// Returns the time that is left.
    fn left(&self) -> io::Result<Option<Duration>> {
        let left = self.end.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::Error::new(ErrorKind::TimedOut, "the secret takes too long"));
        }
        Ok(Some(left))
    }

    fn read<const N: usize>(&mut self) -> io::Result<[u8; N]> {
        let (mut bytes, mut filled) = ([0; N], 0);
        while filled < N {
            self.stream.set_read_timeout(self.left()?)?;
            match self.stream.read(&mut bytes[filled..]) {
                Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
                Ok(count) => filled += count,
                // The time that is left says whether that was all of it.
                Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(bytes)
    }

    /// Writes a few bytes, which the socket's buffer takes.
    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.stream.set_write_timeout(self.left()?)?;
        self.stream.write_all(bytes)
    }

    fn done(self) -> io::Result<()> {
        self.stream.set_read_timeout(None)?;
        self.stream.set_write_timeout(None)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;
    use std::thread;

    const PATIENCE: Duration = Duration::from_millis(300);

    /// Runs both sides; gives what each says.
    fn meet(
        controller: impl FnOnce(&TcpStream) -> io::Result<()> + Send,
        executor: impl FnOnce(&TcpStream) -> io::Result<()>,
    ) -> (io::Result<()>, io::Result<()>) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        thread::scope(|scope| {
            let controller = scope.spawn(move || controller(&TcpStream::connect(address).unwrap()));
            let accepted = listener.accept().unwrap().0;
            let executor = executor(&accepted);
            drop(accepted);
            (controller.join().unwrap(), executor)
        })
    }

    /// Ends with the same secret agree, and nothing of the proof is left in the stream; with others they do not.
    #[test]
    fn secrets_are_compared() {
        let with = |secret: &'static [u8]| move |stream: &TcpStream| prove_secret(stream, secret, PATIENCE);
        let agreed = meet(
            |stream| {
                with(b"one")(stream)?;
                { stream }.write_all(b"next")
            },
            |stream| {
                demand_secret(stream, b"one", PATIENCE)?;
                let mut next = [0; 4];
                { stream }.read_exact(&mut next)?;
                assert_eq!(&next, b"next");
                Ok(())
            },
        );
        assert!(agreed.0.is_ok() && agreed.1.is_ok(), "{agreed:?}");
        let (controller, executor) = meet(with(b"other"), |stream| demand_secret(stream, b"one", PATIENCE));
        assert_eq!(controller.unwrap_err().to_string(), "the controller has another secret");
        assert_eq!(executor.unwrap_err().kind(), ErrorKind::PermissionDenied);
    }

    /// An executor that only repeats what it is sent has not proved anything.
    #[test]
    fn echoes_prove_nothing() {
        let (controller, _) = meet(
            |stream| prove_secret(stream, b"one", PATIENCE),
            |mut stream| {
                stream.write_all(&[&MAGIC[..], &[7; LEN]].concat())?;
                let mut answer = [0; 2 * LEN];
                stream.read_exact(&mut answer)?;
                stream.write_all(&answer[LEN..])
            },
        );
        assert_eq!(controller.unwrap_err().to_string(), "the executor has another secret");
    }

    /// Peers that say nothing, too little, or something else are given up, each at the latest when the time is over.
    #[test]
    fn bad_peers_are_given_up() {
        let (_, executor) = meet(
            |mut stream| {
                for _ in 0..20 {
                    stream.write_all(b"x")?;
                    thread::sleep(PATIENCE / 10);
                }
                Ok(())
            },
            |stream| demand_secret(stream, b"one", PATIENCE),
        );
        assert_eq!(executor.unwrap_err().kind(), ErrorKind::TimedOut);
        let (_, executor) = meet(|_| Ok(()), |stream| demand_secret(stream, b"one", PATIENCE));
        let kind = executor.unwrap_err().kind();
        // A peer that closes before it has read resets the connection.
        assert!(matches!(kind, ErrorKind::UnexpectedEof | ErrorKind::ConnectionReset), "{kind}");
        let (controller, _) =
            meet(|stream| prove_secret(stream, b"one", PATIENCE), |mut stream| stream.write_all(&[0; 72]));
        assert!(controller.unwrap_err().to_string().contains("does not ask"));
    }
}

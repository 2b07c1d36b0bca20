//! Messages out of the bytes of a link.
//!
//! Bytes are read in large pieces, so one system call usually gives several messages. The memory taken for a
//! payload is at most twice the bytes of it that have arrived (and the size of one piece): a length that a peer
//! claims costs nothing until it is true.

use crate::Disconnected;
use crate::transport::{Link, LinkError};
use farlink_wire::frame::{FrameError, HEADER_BYTES, Header};
use rustix::io::Errno;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Instant;

/// Bytes asked for at once.
const PIECE_BYTES: usize = 64 << 10;

/// The same to begin with: most sessions have little to say over the link, and memory that is touched is no gift.
const FIRST_PIECE_BYTES: usize = 8 << 10;

/// Why there is no next message.
#[derive(Debug)]
pub(crate) enum FrameEnd {
    /// The peer sent something that is no message.
    Invalid(FrameError),
    /// The connection has ended.
    Ended(Disconnected),
    /// The deadline has passed.
    TimedOut,
}

impl From<FrameEnd> for Disconnected {
    fn from(end: FrameEnd) -> Self {
        match end {
            FrameEnd::Invalid(error) => error.into(),
            FrameEnd::Ended(reason) => reason,
            FrameEnd::TimedOut => Self::Io(Arc::new(io::ErrorKind::TimedOut.into())),
        }
    }
}

/// Reads messages from a link.
pub(crate) struct FrameReader {
    link: Arc<Link>,
    /// Bytes from `start` to `end` have been read and not yet used.
    buffer: Vec<u8>,
    start: usize,
    end: usize,
    /// When the next message must have arrived.
    deadline: Option<Instant>,
    /// On a link that has been closed: bytes that had arrived then and have not been read. Bounds the work for a
    /// peer that goes on sending.
    remnant: Option<u64>,
}

impl FrameReader {
    pub(crate) fn new(link: Arc<Link>, deadline: Option<Instant>) -> Self {
        Self { link, buffer: vec![0; FIRST_PIECE_BYTES], start: 0, end: 0, deadline, remnant: None }
    }

    pub(crate) fn set_deadline(&mut self, deadline: Option<Instant>) {
        self.deadline = deadline;
    }

    /// Whether something has been read and not yet used.
    pub(crate) fn has_bytes(&self) -> bool {
        self.start < self.end
    }

    /// Takes the descriptor that came with the last message of that kind.
    pub(crate) fn take_descriptor(&self) -> Option<OwnedFd> {
        self.link.take_descriptor()
    }

    /// Waits for the next message.
    pub(crate) fn next(&mut self) -> Result<(Header, Vec<u8>), FrameEnd> {
        while self.end - self.start < HEADER_BYTES {
            if self.fill()? == 0 {
                return Err(ended((self.end - self.start) as u64, HEADER_BYTES as u64));
            }
        }
        let mut header = [0; HEADER_BYTES];
        header.copy_from_slice(&self.buffer[self.start..self.start + HEADER_BYTES]);
        let header = Header::parse(&header).map_err(FrameEnd::Invalid)?;
        self.start += HEADER_BYTES;
        Ok((header, self.payload(header.payload_bytes as usize)?))
    }

    fn payload(&mut self, len: usize) -> Result<Vec<u8>, FrameEnd> {
        let mut payload = Vec::new();
        self.take_buffered(&mut payload, len)?;
        while payload.len() < len {
            let left = len - payload.len();
            let count = if left < PIECE_BYTES {
                // Through the buffer, which then also gets the messages that follow.
                self.fill()?;
                self.take_buffered(&mut payload, len)?
            } else {
                self.read_directly(&mut payload, left)?
            };
            if count == 0 {
                return Err(ended((HEADER_BYTES + payload.len()) as u64, (HEADER_BYTES + len) as u64));
            }
        }
        Ok(payload)
    }

    /// Moves bytes from the buffer to the payload, which is to have `len` bytes; returns how many.
    fn take_buffered(&mut self, payload: &mut Vec<u8>, len: usize) -> Result<usize, FrameEnd> {
        let left = len - payload.len();
        let count = left.min(self.end - self.start);
        grow(payload, left.min(PIECE_BYTES))?;
        payload.extend_from_slice(&self.buffer[self.start..self.start + count]);
        self.start += count;
        Ok(count)
    }

    /// Reads up to `left` bytes to the end of the payload, at most as many as it has; returns how many.
    fn read_directly(&mut self, payload: &mut Vec<u8>, left: usize) -> Result<usize, FrameEnd> {
        let old = payload.len();
        let target = old + left.min(old.max(PIECE_BYTES));
        grow(payload, target - old)?;
        payload.resize(target, 0);
        let mut filled = old;
        while filled < target {
            match self.read(&mut payload[filled..])? {
                0 => break,
                count => filled += count,
            }
        }
        payload.truncate(filled);
        Ok(filled - old)
    }

    /// Reads more bytes into the buffer, behind those that are there; returns how many.
    fn fill(&mut self) -> Result<usize, FrameEnd> {
        self.buffer.copy_within(self.start..self.end, 0);
        self.end -= self.start;
        self.start = 0;
        // The reader borrows the link, so the buffer is taken out for the time.
        let mut buffer = std::mem::take(&mut self.buffer);
        let count = self.read(&mut buffer[self.end..]);
        self.buffer = buffer;
        let count = count?;
        self.end += count;
        if self.end == self.buffer.len() {
            self.buffer.resize(PIECE_BYTES, 0);
        }
        Ok(count)
    }

    fn read(&mut self, buffer: &mut [u8]) -> Result<usize, FrameEnd> {
        if self.remnant.is_none() && self.link.is_closed() {
            self.remnant = Some(self.link.arrived_bytes());
        }
        if self.remnant == Some(0) {
            return Ok(0);
        }
        match self.link.read(buffer, self.deadline) {
            Ok(count) => {
                self.remnant = self.remnant.map(|left| left.saturating_sub(count as u64));
                Ok(count)
            }
            Err(LinkError::Closed | LinkError::Gone) => Ok(0),
            Err(LinkError::TimedOut) => Err(FrameEnd::TimedOut),
            Err(LinkError::Io(error)) => Err(FrameEnd::Ended(Disconnected::Io(Arc::new(error.into())))),
        }
    }
}

fn ended(received: u64, expected: u64) -> FrameEnd {
    FrameEnd::Ended(if received == 0 { Disconnected::Eof } else { Disconnected::Truncated { received, expected } })
}

/// Makes room for `count` more bytes and no more. Running out of memory ends the connection, not the process.
fn grow(payload: &mut Vec<u8>, count: usize) -> Result<(), FrameEnd> {
    payload.try_reserve_exact(count).map_err(|_| FrameEnd::Ended(Disconnected::Io(Arc::new(Errno::NOMEM.into()))))
}

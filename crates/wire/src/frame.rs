//! The header before every message.
//!
//! | offset | field | meaning |
//! | --- | --- | --- |
//! | 0 | size | length of the whole message in bytes, header included |
//! | 8 | opcode | Setup 0, Hangup 1, Result 2, Call 3; farlink's own: Descriptor 102, Doorbell 103 |
//! | 16 | sequence | number of the call that a Call makes or a Result answers; 0 in Setup and Hangup |
//! | 24 | tag | Call: the address to call. Result: 0 for a value, 1 for an out-of-band error (see [`RESULT_ERROR`]) |
//!
//! ```
//! use farlink_addr::ExecutorAddr;
//! use farlink_wire::frame::{Header, Opcode};
//!
//! let call = Header { opcode: Opcode::Call, sequence: 7, tag: ExecutorAddr::new(0x1000), payload_bytes: 24 };
//! let bytes = call.to_bytes();
//! assert_eq!(bytes[0], 56);
//! assert_eq!(Header::parse(&bytes), Ok(call));
//! ```

use farlink_addr::ExecutorAddr;

/// Length of a header in bytes.
pub const HEADER_BYTES: usize = 32;

/// Longest message in bytes, header included: 1 GiB, as much as a whole reservation sent in one message.
///
/// A receiver takes memory for a message only as its bytes arrive, so the limit bounds a peer that really sends
/// that much.
pub const MAX_FRAME_BYTES: u64 = (1 << 30) + (1 << 20);

/// Tag of a Result whose payload is a value.
pub const RESULT_VALUE: u64 = 0;

/// Tag of a Result whose payload is the text of an out-of-band error: the call could not be made or understood.
///
/// Only sent to a peer known to accept it (newer than LLVM 22, or farlink); LLVM 19 and 22 end the session on any
/// tag but 0, so they get an empty value instead.
pub const RESULT_ERROR: u64 = 1;

/// What a message is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Opcode {
    /// The executor introduces itself: its first message, sent once.
    Setup = 0,
    /// The sender ends the session; the payload says whether in order.
    Hangup = 1,
    /// The answer to a call.
    Result = 2,
    /// A call of a wrapper function (LLVM: CallWrapper).
    Call = 3,
    /// A descriptor for the peer, in the ancillary data of the message's first byte. The tag is what calls that are sent
    /// later name it by; there is no payload. Only for a controller to send, over a Unix socket, to an executor that
    /// announces a function which takes one.
    Descriptor = 102,
    /// Messages wait in the shared ring, which nobody was reading. No payload; sequence and tag are 0. Only for peers that
    /// have a ring: see [`RING_KEY`](crate::functions::RING_KEY).
    Doorbell = 103,
}

/// Why a header cannot be accepted.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum FrameError {
    /// The size is less than that of a header.
    #[error("message size {0} is less than the {HEADER_BYTES} bytes of a header")]
    TooSmall(u64),
    /// The size is above [`MAX_FRAME_BYTES`].
    #[error("message size {0} is above the limit of {MAX_FRAME_BYTES} bytes")]
    TooLarge(u64),
    /// The opcode is none that exists.
    #[error("unknown opcode {0}")]
    UnknownOpcode(u64),
}

/// A header whose size and opcode have been checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// What the message is.
    pub opcode: Opcode,
    /// Number of the call, per direction.
    pub sequence: u64,
    /// Address to call, or kind of a result.
    pub tag: ExecutorAddr,
    /// Length of what follows the header, in bytes. At most [`MAX_FRAME_BYTES`] less [`HEADER_BYTES`].
    pub payload_bytes: u64,
}

impl Header {
    /// Reads a header.
    ///
    /// # Errors
    ///
    /// Fails if the size is out of bounds or the opcode unknown.
    pub fn parse(bytes: &[u8; HEADER_BYTES]) -> Result<Self, FrameError> {
        let word = |index: usize| {
            let mut word = [0; 8];
            word.copy_from_slice(&bytes[index * 8..index * 8 + 8]);
            u64::from_le_bytes(word)
        };
        let size = word(0);
        if size < HEADER_BYTES as u64 {
            return Err(FrameError::TooSmall(size));
        }
        if size > MAX_FRAME_BYTES {
            return Err(FrameError::TooLarge(size));
        }
        let opcode = match word(1) {
            0 => Opcode::Setup,
            1 => Opcode::Hangup,
            2 => Opcode::Result,
            3 => Opcode::Call,
            102 => Opcode::Descriptor,
            103 => Opcode::Doorbell,
            other => return Err(FrameError::UnknownOpcode(other)),
        };
        Ok(Self {
            opcode,
            sequence: word(2),
            tag: ExecutorAddr::new(word(3)),
            payload_bytes: size - HEADER_BYTES as u64,
        })
    }

    /// Returns the bytes of the header.
    #[must_use]
    pub fn to_bytes(&self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        let words = [self.payload_bytes + HEADER_BYTES as u64, self.opcode as u64, self.sequence, self.tag.as_u64()];
        for (chunk, word) in bytes.chunks_exact_mut(8).zip(words) {
            chunk.copy_from_slice(&word.to_le_bytes());
        }
        bytes
    }
}

//! What a controller and its prepared process say to each other: requests, each with one answer, in turn.
//!
//! A prepared process has one thread and runs no linked code: executors are forked from it. Its control socket keeps the
//! bounds of messages (`SOCK_SEQPACKET`), and each message is a header and an SPS-encoded payload.
//!
//! | offset | field | meaning |
//! | --- | --- | --- |
//! | 0 | magic | [`MAGIC`], which stands for this version of the protocol |
//! | 4 | kind | Answer 0, Open 1, Fork 2 |
//!
//! The process's first message is an answer that nobody has asked for: whether it is ready. End of file ends it.

use crate::sps::{DecodeError, Encode, from_bytes};

/// The first word of every message, which messages of an ordinary executor do not begin with: it would be a size above
/// [`MAX_FRAME_BYTES`](crate::frame::MAX_FRAME_BYTES).
pub const MAGIC: u32 = 0x5052_4501;

/// Length of a header in bytes.
pub const HEADER_BYTES: usize = 8;

/// Longest message in bytes, header included: paths have at most 4096, and texts of errors may have a path or two in them.
pub const MAX_MESSAGE_BYTES: usize = 16 << 10;

/// Longest text of an answer in bytes; what is longer is cut.
const MAX_TEXT_BYTES: usize = 8 << 10;

const ANSWER: u32 = 0;
const OPEN: u32 = 1;
const FORK: u32 = 2;

/// Why bytes are not a message of this protocol.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum MessageError {
    /// They are longer than any message.
    #[error("a message of {0} bytes is above the limit of {MAX_MESSAGE_BYTES} bytes")]
    TooLong(usize),
    /// They do not begin as messages of this version do.
    #[error("what arrived is no message of a prepared process of this version")]
    NotPrepared,
    /// The kind is none that is expected.
    #[error("unknown kind of message {0}")]
    UnknownKind(u32),
    /// The payload is not that of its kind.
    #[error(transparent)]
    Payload(#[from] DecodeError),
}

/// What a controller asks of a prepared process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Request {
    /// Opens a shared library, which every executor that is forked later has, at the same address. Its initializers run
    /// here, once; handlers that they register for `fork` do not run.
    Open {
        /// The library, as `dlopen` takes it: a path, or a name to be searched for.
        path: String,
    },
    /// Forks an executor, a child of the controller. One descriptor comes with the message: the stream socket that the
    /// executor is to serve.
    Fork,
}

impl Request {
    /// Returns the bytes of the message.
    ///
    /// # Errors
    ///
    /// Fails if they are more than a message may have.
    pub fn to_message(&self) -> Result<Vec<u8>, MessageError> {
        let message = match self {
            Self::Open { path } => message(OPEN, path),
            Self::Fork => message(FORK, &()),
        };
        if message.len() > MAX_MESSAGE_BYTES { Err(MessageError::TooLong(message.len())) } else { Ok(message) }
    }

    /// Reads a request.
    ///
    /// # Errors
    ///
    /// Fails if the bytes are not one.
    pub fn parse(message: &[u8]) -> Result<Self, MessageError> {
        match split(message)? {
            (OPEN, payload) => Ok(Self::Open { path: from_bytes(payload)? }),
            (FORK, _) => Ok(Self::Fork),
            (kind, _) => Err(MessageError::UnknownKind(kind)),
        }
    }
}

/// What a prepared process answers: a number, which is the process id of a child that it has forked and 0 otherwise, or why
/// it could not do what it was asked to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer(pub Result<u32, String>);

impl Answer {
    /// Returns the bytes of the message. A text that is too long for one is cut.
    #[must_use]
    pub fn to_message(&self) -> Vec<u8> {
        match &self.0 {
            Err(text) if text.len() > MAX_TEXT_BYTES => {
                let cut: Result<u32, String> = Err(text[..text.floor_char_boundary(MAX_TEXT_BYTES)].to_owned());
                message(ANSWER, &cut)
            }
            result => message(ANSWER, result),
        }
    }

    /// Reads an answer.
    ///
    /// # Errors
    ///
    /// Fails if the bytes are not one.
    pub fn parse(message: &[u8]) -> Result<Self, MessageError> {
        match split(message)? {
            (ANSWER, payload) => Ok(Self(from_bytes(payload)?)),
            (kind, _) => Err(MessageError::UnknownKind(kind)),
        }
    }
}

fn message(kind: u32, payload: &impl Encode) -> Vec<u8> {
    let mut message = Vec::new();
    (MAGIC, kind).encode(&mut message);
    payload.encode(&mut message);
    message
}

/// Checks a message's length and beginning; gives its kind and its payload.
fn split(message: &[u8]) -> Result<(u32, &[u8]), MessageError> {
    if message.len() > MAX_MESSAGE_BYTES {
        return Err(MessageError::TooLong(message.len()));
    }
    let (magic, kind): (u32, u32) = from_bytes(message).map_err(|_| MessageError::NotPrepared)?;
    if magic != MAGIC {
        return Err(MessageError::NotPrepared);
    }
    Ok((kind, &message[HEADER_BYTES..]))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Messages survive; cut short, with another beginning, of another kind or too long they are errors.
    #[test]
    fn messages() {
        let requests = [Request::Open { path: "libm.so.6".to_owned() }, Request::Fork];
        for request in &requests {
            let message = request.to_message().unwrap();
            assert_eq!(Request::parse(&message).as_ref(), Ok(request));
            assert!((0..message.len()).all(|len| Request::parse(&message[..len]).is_err()));
            assert!(matches!(Answer::parse(&message), Err(MessageError::UnknownKind(1 | 2))));
        }
        for answer in [Answer(Ok(7)), Answer(Err("no".to_owned()))] {
            let message = answer.to_message();
            assert_eq!(Answer::parse(&message).as_ref(), Ok(&answer));
            assert!((0..message.len()).all(|len| Answer::parse(&message[..len]).is_err()));
            assert_eq!(Request::parse(&message), Err(MessageError::UnknownKind(0)));
        }
        assert_eq!(Answer::parse(&[0; 32]), Err(MessageError::NotPrepared));
        assert_eq!(Answer::parse(&[0; MAX_MESSAGE_BYTES + 1]), Err(MessageError::TooLong(MAX_MESSAGE_BYTES + 1)));
        let path = "x".repeat(MAX_MESSAGE_BYTES);
        assert!(matches!(Request::Open { path }.to_message(), Err(MessageError::TooLong(_))));
        let answer = Answer(Err("ä".repeat(MAX_MESSAGE_BYTES)));
        let cut = Answer::parse(&answer.to_message()).unwrap().0.unwrap_err();
        assert!(cut.len() == MAX_TEXT_BYTES && cut.chars().all(|char| char == 'ä'));
    }

    /// The first word cannot be the size of an ordinary executor's message.
    #[test]
    fn magic_is_no_size() {
        assert!(u64::from(MAGIC) > crate::frame::MAX_FRAME_BYTES);
    }
}

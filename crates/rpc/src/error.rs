//! How calls and connections fail.

use farlink_wire::frame::FrameError;
use farlink_wire::sps::DecodeError;
use std::sync::Arc;

/// Why a connection ended. Cheap to clone: every call that was pending gets one.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Disconnected {
    /// This end closed the connection.
    #[error("the connection was closed")]
    Local,
    /// The peer ended the session in order.
    #[error("the peer ended the session")]
    Hangup,
    /// The peer ended the session for a reason.
    #[error("the peer ended the session: {0}")]
    HangupWithError(String),
    /// The peer closed the connection between two messages, without a word.
    #[error("the peer closed the connection")]
    Eof,
    /// The peer closed the connection within a message.
    #[error("the peer closed the connection within a message, after {received} of {expected} bytes")]
    Truncated {
        /// Bytes of the message that arrived.
        received: u64,
        /// Length of the message, or of its header when that was not complete.
        expected: u64,
    },
    /// The peer's process ended; the text says how.
    #[error("{0}")]
    ProcessEnded(String),
    /// The peer sent something that the protocol does not have.
    #[error("protocol error: {0}")]
    Protocol(String),
    /// The system reported an error on the connection.
    #[error("the connection failed: {0}")]
    Io(Arc<std::io::Error>),
}

impl From<FrameError> for Disconnected {
    fn from(error: FrameError) -> Self {
        Self::Protocol(error.to_string())
    }
}

/// Why a call gave no result.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CallError {
    /// The connection ended before the result arrived.
    #[error(transparent)]
    Disconnected(#[from] Disconnected),
    /// The peer could not make or understand the call.
    #[error("the call failed: {0}")]
    OutOfBand(String),
    /// The result is not what the function returns.
    #[error("the result of {function} cannot be decoded: {error}")]
    BadResult {
        /// The function called.
        function: &'static str,
        /// What is wrong with the result.
        error: DecodeError,
    },
    /// The executor does not offer the function.
    #[error("the executor does not offer {0}")]
    Missing(&'static str),
    /// The result did not arrive in time. The call goes on; what it returns is not waited for.
    #[error("{function} did not return within {timeout:?}")]
    TimedOut {
        /// The function called.
        function: &'static str,
        /// How long it was waited for.
        timeout: std::time::Duration,
    },
    /// The arguments are longer than a message can be.
    #[error("a message of {bytes} bytes is above the limit of {limit} bytes", limit = farlink_wire::frame::MAX_FRAME_BYTES)]
    TooLarge {
        /// Length of the message in bytes.
        bytes: u64,
    },
}

/// Why no session came about.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SetupError {
    /// The connection ended before the executor had introduced itself.
    #[error("the executor did not introduce itself: {0}")]
    Disconnected(#[from] Disconnected),
    /// The executor did not introduce itself in time.
    #[error("the executor did not introduce itself within {0:?}")]
    TimedOut(std::time::Duration),
    /// The first message is not a Setup that can be understood.
    #[error("the executor's first message is not a valid Setup: {0}")]
    Invalid(String),
    /// The executor announced a page size that no system has.
    #[error("the executor announced a page size of {0} bytes")]
    BadPageSize(u64),
}

/// Longest text of an error in a message, in bytes. Texts are for people.
const MAX_TEXT_BYTES: usize = 1 << 20;

pub(crate) fn shortened(text: &str) -> &str {
    &text[..text.floor_char_boundary(MAX_TEXT_BYTES)]
}

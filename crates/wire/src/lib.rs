//! What travels between a controller and an executor: LLVM's SimpleRemoteEPC frames with SPS-encoded payloads.
//!
//! - [`sps`]: the encoding of values. No padding, no type tags, little-endian.
//! - [`frame`]: the 32-byte header before every message.
//! - [`setup`]: the first message, in which an executor introduces itself.
//! - [`msg`]: the composite values that calls carry.
//! - [`native`]: calls of C functions, and calls by them.
//! - [`report`]: what a process that dies leaves of itself.
//! - [`prepared`]: how executors are forked from a process that is ready for it.
//! - [`functions`]: every function that an executor offers, by name, with the types of its arguments and result.
//!
//! Decoding is total: any bytes give a value or a [`DecodeError`](sps::DecodeError), and no length is believed
//! before the bytes that it promises are there.

#![forbid(unsafe_code)]

pub mod frame;
pub mod functions;
pub mod msg;
pub mod native;
pub mod prepared;
pub mod report;
pub mod setup;
pub mod sps;

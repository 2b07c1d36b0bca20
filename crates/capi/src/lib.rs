//! The C interface of farlink: sessions, libraries, calls and shared buffers, as `farlink.h` declares them.
//!
//! Every function checks the pointers that it gets for null, catches panics, and keeps the text of what went wrong for
//! `farlink_last_error`. Handles are boxes of what the Rust interface has, which is cheap to clone and can be used from any
//! thread. `farlink.h` is made of this by cbindgen; a test sees to it that it stays so.

// All that C calls gets pointers; nothing else is unsafe.
#![deny(unsafe_code)]

#[allow(unsafe_code)]
mod buffer;
#[allow(unsafe_code)]
mod call;
#[allow(unsafe_code)]
mod error;
#[allow(unsafe_code)]
mod library;
#[allow(unsafe_code)]
mod session;

pub use buffer::*;
pub use call::*;
pub use error::farlink_last_error;
pub use library::*;
pub use session::*;

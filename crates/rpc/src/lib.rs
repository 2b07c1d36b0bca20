//! Calls between a controller and an executor.
//!
//! - [`Endpoint`]: one end of a connection. Both ends are alike: each can call the other, at any depth of nesting,
//!   and results come back in any order.
//! - [`Transport`]: the descriptors that carry the frames.
//! - [`Executor`]: what a controller holds of an executor, in another process or in its own: what it announced, and
//!   a [`Caller`] to reach it.
//! - [`Pending`]: a result that may not be there yet; it can be waited for or awaited.

#![forbid(unsafe_code)]

mod endpoint;
mod error;
mod executor;
mod pending;
mod transport;

pub use endpoint::{Endpoint, Handler, Limits, accept, connect};
pub use error::{CallError, Disconnected, SetupError};
pub use executor::{Callee, Caller, Executor};
pub use pending::{Completer, Pending};
pub use transport::Transport;

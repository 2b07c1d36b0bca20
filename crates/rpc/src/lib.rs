//! Calls between a controller and an executor.
//!
//! - [`Endpoint`]: one end of a connection. Both ends are alike: each can call the other, at any depth of nesting,
//!   and results come back in any order.
//! - [`Transport`]: the descriptors that carry the frames. Small ones go through memory that the two ends share, if both
//!   can do that.
//! - [`Executor`]: what a controller holds of an executor, in another process or in its own: what it announced, and
//!   a [`Caller`] to reach it.
//! - [`Pending`]: a result that may not be there yet; it can be waited for or awaited.
//!
//! Every session ends with one [`Disconnected`] reason, which all its pending and later calls get.
//!
//! ```
//! use farlink_addr::ExecutorAddr;
//! use farlink_rpc::{Handler, Options, Transport, accept, connect};
//! use farlink_wire::setup::ExecutorInfo;
//! use std::sync::Arc;
//!
//! struct Reverse;
//!
//! impl Handler for Reverse {
//!     fn call(&self, _function: ExecutorAddr, mut args: Vec<u8>) -> Result<Vec<u8>, String> {
//!         args.reverse();
//!         Ok(args)
//!     }
//! }
//!
//! let (ours, theirs) = Transport::pair()?;
//! let executor = accept(theirs, &ExecutorInfo::default(), Arc::new(Reverse), Options::default())?;
//! let (controller, _info) = connect(ours, Arc::new(Reverse), Options::default())?;
//! let result = controller.call(ExecutorAddr::new(0x1000), b"abc".to_vec());
//! assert_eq!(result.wait()?, b"cba");
//! controller.hang_up(Ok(()));
//! executor.wait_disconnected();
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

#![deny(unsafe_code)]

mod count;
mod deliver;
mod descriptors;
mod endpoint;
mod error;
mod executor;
mod frames;
mod pending;
mod pool;
mod reading;
mod ring;
mod secret;
mod session;
mod transport;

pub use count::system_calls;
pub use endpoint::{Endpoint, Handler, Options, accept, accept_unread, connect};
pub use error::{CallError, Disconnected, SetupError};
pub use executor::{CallObserver, Callee, Caller, Executor};
pub use pending::{Completer, Pending};
pub use reading::Reading;
pub use secret::{demand_secret, prove_secret};
pub use transport::Transport;

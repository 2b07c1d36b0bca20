//! The process that runs linked code: a server for one controller, and what linked code needs at run time.
//!
//! Everything a controller can ask for is a wrapper function at an address that is announced when the session begins
//! ([`farlink_wire::functions`] lists them); a call names an address, of such a function or of linked code. The
//! services:
//!
//! - `services::memory`: reserved ranges and what is finalized in them, shared and private
//! - `services::dylib`: shared libraries and their symbols
//! - `services::calls`: `main`, whole programs; `services::native`: functions of any arguments, and calls back
//! - `services::lifecycle`: initializers, and what objects leave for their end
//! - `services::unwind_index`, and `services::unwind` for controllers that are not farlink's: unwind information
//! - `unwinder`: libgcc's unwinder, loaded when it is needed
//! - `services::tls`, `services::thread_exit`: thread-local variables, and what is done at the end of a thread
//! - `services::access`: reading and writing memory
//! - `services::trace`: what was called, and when
//! - `harden`: what keeps linked code from making more code
//! - `prepared`: a process that executors are forked from
//! - `report`, `dispositions`: what is left of a process that dies of a fault, and that linked code does not notice
//!
//! [`run`] serves a controller over a transport until the connection ends; [`local`] is the same without a connection,
//! for a controller in this process.

// What deals with the system, with linked code or with callers in C may be unsafe; the rest is not.
#![deny(unsafe_code)]

mod args;
#[allow(unsafe_code)]
mod callback;
#[allow(unsafe_code)]
mod dispositions;
#[allow(unsafe_code)]
mod environment;
#[allow(unsafe_code)]
mod fork;
#[allow(unsafe_code)]
mod harden;
mod host;
mod listen;
mod local;
mod main_thread;
#[allow(unsafe_code)]
mod module;
#[allow(unsafe_code)]
mod native;
mod prepared;
pub mod probe;
mod registry;
#[allow(unsafe_code)]
mod report;
mod server;
#[allow(unsafe_code)]
mod services;
#[allow(unsafe_code)]
mod signal_stack;
#[allow(unsafe_code)]
mod signals;
mod trace;
#[allow(unsafe_code)]
#[doc(hidden)]
pub mod unwinder;
#[allow(unsafe_code)]
mod wrap;

pub use args::{exit_status, main_with_args};
pub use environment::{OLD_TUNABLES, TUNABLES};
pub use host::{EXECUTOR_ARG, can_be_started_again, init};
pub use local::{local, local_with};
pub use native::call_native;
pub use server::run;
pub use signals::{ignore_broken_pipes, restore_default_signals, wait_for_children};

//! Links object code into another process and runs it there.
//!
//! ```no_run
//! fn main() -> Result<(), Box<dyn std::error::Error>> {
//!     farlink::executor::init(); // this program can be its own executor
//!     let session = farlink::Session::spawn()?; // in another process; or in_process()
//!     let library = session.create_library("main");
//!     library.add_object("add.o", std::fs::read("add.o")?)?;
//!     let add = library.function::<fn(i32, i32) -> i32>("add")?;
//!     // SAFETY: add.c declares `int add(int, int)`.
//!     println!("{}", unsafe { add.call((40, 2)) }?);
//!     Ok(())
//! }
//! ```
//!
//! A [`Session`] is an executor and its memory; a [`Library`] holds objects, archives and shared libraries, and links
//! what a lookup needs. `ARCHITECTURE.md` shows how a link goes from bytes to running code.

#![deny(unsafe_code)]

// The programs of the guide compile.
#[cfg(doctest)]
mod guide {
    macro_rules! chapters {
        ($($name:ident = $file:literal;)*) => {$(
            #[doc = include_str!(concat!("../../../docs/guide/", $file))]
            pub struct $name;
        )*};
    }

    chapters! {
        FirstLink = "first-link.md";
        OutOfProcess = "out-of-process.md";
        SharedData = "shared-data.md";
        Hardening = "hardening.md";
        Replacing = "replacing.md";
        SeveralExecutors = "several-executors.md";
        AnotherMachine = "another-machine.md";
    }
}

#[doc(hidden)]
pub mod abi;
mod adding;
mod backtrace;
mod batch;
mod buffer;
mod callback;
mod child;
mod chunks;
mod claim;
mod connect;
mod death;
mod debugger;
mod error;
mod executors;
mod flight;
#[allow(unsafe_code)]
mod function;
mod gate;
mod hang;
mod harden;
mod image;
mod inner;
mod journal;
mod known_code;
mod lazy;
mod library;
mod names;
mod observe;
mod parallel;
mod perf;
mod place;
mod pointer;
mod pool;
mod prepared;
mod private_code;
mod process;
mod redirect;
mod relink;
mod resolve;
mod resolved;
mod runtime;
mod session;
mod settle;
mod state;
mod stats;
mod support;
mod symbols;
mod table;
mod thread_local;
mod trace;

pub use abi::{CField, CResult, CType, CValue};
pub use adding::ParsedObjects;
pub use backtrace::Frame;
pub use batch::PhaseTimes;
pub use buffer::SharedBuffer;
pub use callback::CallbackFunction;
pub use death::{Death, Fault};
pub use error::{Error, UndefinedSymbol, signal_name};
pub use function::{Callback, Function, Signature};
pub use hang::ThreadState;
pub use harden::Measure;
pub use image::{Image, ImageSegment};
pub use lazy::MaterializeError;
pub use library::{Library, Object, ObjectMemory};
pub use perf::Perf;
pub use pointer::ExecutorPtr;
pub use pool::Restart;
pub use redirect::Redirect;
pub use session::{DEFAULT_RESERVATION_BYTES, Memory, Session, SessionBuilder};
pub use stats::SessionStats;
pub use trace::{LinkProgress, TraceProcess, TraceSpan, trace_now};

pub use farlink_addr as addr;
pub use farlink_elf as elf;
pub use farlink_executor as executor;
pub use farlink_graph as graph;
pub use farlink_mem as mem;
pub use farlink_rpc as rpc;

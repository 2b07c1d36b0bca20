//! What becomes of messages that arrive: results go to those who wait for them, calls to threads made on demand.

use crate::endpoint::Handler;
use crate::pool::{Job, MAX_REFUSED, Submitted};
use crate::ring::Ring;
use crate::session::Session;
use crate::{CallError, Disconnected};
use farlink_wire::frame::{Header, Opcode, RESULT_ERROR, RESULT_VALUE};
use farlink_wire::sps::{Blob, from_bytes};
use std::any::Any;
use std::os::fd::OwnedFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::{io, thread};

/// Stack of a thread that serves calls, in bytes: what Linux gives a program's first thread.
const WORKER_STACK_BYTES: usize = 8 << 20;

impl Session {
    /// Delivers a Call or a Result message. Runs no handler and writes nothing.
    pub(crate) fn deliver(&self, header: Header, payload: Vec<u8>) -> Result<(), Disconnected> {
        match header.opcode {
            Opcode::Call => self.deliver_call(Job::new(header, payload)),
            _ => self.deliver_result(header, payload),
        }
    }

    fn deliver_result(&self, header: Header, payload: Vec<u8>) -> Result<(), Disconnected> {
        let sequence = header.sequence;
        let result = match header.tag.as_u64() {
            RESULT_VALUE => Ok(payload),
            RESULT_ERROR => {
                let text: Blob<'_> = from_bytes(&payload).map_err(|error| {
                    Disconnected::Protocol(format!("the error in the Result message for call {sequence}: {error}"))
                })?;
                Err(CallError::OutOfBand(String::from_utf8_lossy(&text.0).into_owned()))
            }
            other => {
                let text = format!("a Result message for call {sequence} of unknown kind {other}");
                return Err(Disconnected::Protocol(text));
            }
        };
        self.complete(sequence, result)
    }

    fn deliver_call(&self, job: Job) -> Result<(), Disconnected> {
        let mut submitted = self.pool.submit(job);
        if submitted == Submitted::NeedsWorker && self.spawn_worker().is_err() {
            submitted = self.pool.worker_failed();
        }
        match submitted {
            Submitted::Overrun => Err(Disconnected::Protocol(format!(
                "a Call message, while {MAX_REFUSED} refused calls wait to be answered"
            ))),
            Submitted::NeedsRefuser => self.spawn_refuser().map_err(|error| Disconnected::Io(Arc::new(error))),
            Submitted::Taken | Submitted::NeedsWorker => Ok(()),
        }
    }

    /// Starts a thread that serves calls by `body`.
    fn spawn_server(&self, body: impl FnOnce(&Self, &dyn Handler) + Send + 'static) -> io::Result<()> {
        let (session, handler) = self.server_parts().ok_or(io::ErrorKind::NotConnected)?;
        let server = thread::Builder::new().name("farlink-call".to_owned()).stack_size(WORKER_STACK_BYTES);
        server.spawn(move || body(&session, &*handler)).map(drop)
    }

    fn spawn_worker(&self) -> io::Result<()> {
        self.spawn_server(Self::work)
    }

    fn spawn_refuser(&self) -> io::Result<()> {
        let (session, _) = self.server_parts().ok_or(io::ErrorKind::NotConnected)?;
        let refuser = thread::Builder::new().name("farlink-refuse".to_owned());
        refuser.spawn(move || session.refuse()).map(drop)
    }

    /// Begins to use the ring whose memory the controller has sent. There is none if the descriptor did not get through what
    /// carries the connection.
    pub(crate) fn open_ring(&self, descriptor: Option<OwnedFd>) -> Result<(), Disconnected> {
        let protocol = |text: &str| Disconnected::Protocol(format!("a Descriptor message for the shared ring {text}"));
        let Some(descriptor) = descriptor else { return Ok(()) };
        let ring = Ring::open(&descriptor).map_err(|error| protocol(&format!("that cannot be used: {error}")))?;
        self.set_ring(ring).map_err(|_| protocol("while there is one"))
    }

    /// Starts the thread that serves the calls of the ring, as soon as there is one.
    pub(crate) fn spawn_ring_server(&self) -> io::Result<()> {
        self.spawn_server(Self::serve_ring)
    }
}

impl Job {
    /// Runs the call. A panic is an error to the peer.
    pub(crate) fn run(self, handler: &dyn Handler) -> Result<Vec<u8>, String> {
        catch_unwind(AssertUnwindSafe(|| handler.call(self.function, self.args)))
            .unwrap_or_else(|panic| Err(format!("the handler panicked: {}", panic_text(&*panic))))
    }
}

fn panic_text(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<&str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("no text")
}

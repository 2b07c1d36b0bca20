//! Reading what arrives over a connection, and the end of the session, which is seen there.

use crate::Disconnected;
use crate::frames::FrameReader;
use crate::session::Session;
use crate::transport::Link;
use farlink_wire::frame::{Header, Opcode};
use farlink_wire::functions::RING_TAG;
use farlink_wire::sps::{SpsError, from_bytes};
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::mpsc::{SyncSender, sync_channel};
use std::{fmt, io, thread};

/// Which side of a session this is. Only the executor's may send Setup.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Role {
    Controller,
    Executor,
}

/// The reading part of an endpoint. Nothing arrives unless a thread runs it; dropping it ends the session.
pub struct Reading(Option<(Reader, Arc<Link>)>);

impl Reading {
    pub(crate) fn new(
        frames: FrameReader,
        role: Role,
        session: &Arc<Session>,
        offers_ring: bool,
        link: Arc<Link>,
    ) -> Self {
        Self(Some((Reader { frames, role, session: Arc::clone(session), offers_ring }, link)))
    }

    /// Reads to the end of the session.
    pub(crate) fn run(mut self) {
        if let Some((mut reader, link)) = self.0.take() {
            let found = reader.run();
            reader.end(link, found);
        }
    }

    /// Reads until `wake` is readable, or to the end of the session. Gives back what is to go on reading, if the session has not
    /// ended.
    #[must_use]
    pub fn run_until(mut self, wake: BorrowedFd<'_>) -> Option<Self> {
        let (mut reader, link) = self.0.take()?;
        loop {
            if link.is_woken(wake, reader.frames.has_bytes()) {
                return Some(Self(Some((reader, link))));
            }
            if let Err(found) = reader.step() {
                reader.end(link, found);
                return None;
            }
        }
    }

    /// Starts a thread that reads to the end of the session.
    ///
    /// # Errors
    ///
    /// Fails if no thread can be made. The session has ended then.
    pub fn spawn(self) -> io::Result<()> {
        thread::Builder::new().name(READER.to_owned()).spawn(move || self.run()).map(drop)
    }
}

impl Drop for Reading {
    fn drop(&mut self) {
        if let Some((reader, link)) = self.0.take() {
            reader.end(link, Disconnected::Local);
        }
    }
}

impl fmt::Debug for Reading {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Reading").finish_non_exhaustive()
    }
}

/// Name of threads that read.
pub(crate) const READER: &str = "farlink-reader";

/// A thread that is about to read. It ends if it gets nothing to do.
pub(crate) struct ReaderThread(SyncSender<Reading>);

impl ReaderThread {
    pub(crate) fn start() -> io::Result<Self> {
        let (hand_over, handed_over) = sync_channel::<Reading>(1);
        let body = move || handed_over.recv().into_iter().for_each(Reading::run);
        thread::Builder::new().name(READER.to_owned()).spawn(body)?;
        Ok(Self(hand_over))
    }

    pub(crate) fn run(self, reading: Reading) {
        // There is room for one, and the thread waits for it.
        let _ = self.0.send(reading);
    }
}

/// What reads.
struct Reader {
    frames: FrameReader,
    role: Role,
    session: Arc<Session>,
    /// Whether the executor has announced the shared ring.
    offers_ring: bool,
}

impl Reader {
    /// Delivers messages until there are no more; returns why.
    fn run(&mut self) -> Disconnected {
        loop {
            if let Err(reason) = self.step() {
                return reason;
            }
        }
    }

    /// Waits for a message and delivers it. Fails with the reason if there are no more.
    fn step(&mut self) -> Result<(), Disconnected> {
        let (header, payload) = self.frames.next()?;
        self.deliver(header, payload)
    }

    /// Ends the session; `found` is why there are no more messages.
    fn end(self, link: Arc<Link>, found: Disconnected) {
        let Self { frames, session, .. } = self;
        drop(frames);
        // Who reads the ring may be waiting for one.
        session.descriptors.end();
        session.end_ring();
        session.end(link, found);
    }

    fn deliver(&self, header: Header, payload: Vec<u8>) -> Result<(), Disconnected> {
        match header.opcode {
            Opcode::Call => self.session.deliver(header, payload),
            Opcode::Result => {
                self.session.deliver(header, payload)?;
                self.session.nudge_ring();
                Ok(())
            }
            Opcode::Hangup => Err(hangup_reason(&payload)),
            Opcode::Doorbell => self.session.answer_bell(),
            Opcode::Descriptor if self.role == Role::Executor => {
                let (tag, descriptor) = (header.tag.as_u64(), self.frames.take_descriptor());
                if tag == RING_TAG && self.offers_ring {
                    return self.session.open_ring(descriptor);
                }
                self.session.descriptors.keep(tag, descriptor)
            }
            Opcode::Descriptor => Err(Disconnected::Protocol("a Descriptor message from an executor".to_owned())),
            Opcode::Setup => Err(Disconnected::Protocol(match self.role {
                Role::Controller => "a second Setup message".to_owned(),
                Role::Executor => "a Setup message from a controller".to_owned(),
            })),
        }
    }
}

pub(crate) fn hangup_reason(payload: &[u8]) -> Disconnected {
    match from_bytes(payload) {
        Ok(SpsError(Ok(()))) => Disconnected::Hangup,
        Ok(SpsError(Err(text))) => Disconnected::HangupWithError(text),
        Err(error) => Disconnected::Protocol(format!("the reason in a Hangup message: {error}")),
    }
}

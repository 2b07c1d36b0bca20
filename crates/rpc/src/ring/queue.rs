//! One direction of the ring: a queue of messages in memory that two processes share, and how its reader waits.
//!
//! Each process has the cursor that it moves, and what it needs to trust, in its own memory. What the other one may have
//! written is read once, checked, and only then used, so that nothing it writes can make this process access anything
//! but the queue. All of the shared memory is atomics: there is nothing that another process could race with.
//!
//! **How a message is published.** It takes whole cache lines, the first word of each of which is 0 as long as nobody has
//! written there; the reader makes it 0 again. The first word of a message is its length, and is written last. So the
//! reader looks at just the place where the next message will be, and has that in its cache when it comes: from one
//! processor to another goes one line and not two.
//!
//! **Who reads.** At most one thread at a time is the [`Attendant`]. In shared memory there is only how it is to be
//! called: it is awake (`AWAKE`), it sleeps (`ASLEEP`), or there is none (`ABSENT`). A writer first publishes its message,
//! then looks at the state; an attendant first publishes that it will not look any more, then looks for a message once
//! more. Between the two there is a sequentially consistent fence on either side, so one of them sees the other.
//!
//! **Nobody is called in vain.** Who ends being the attendant looks once more *after* it has made way for another, and
//! goes on if there is a message. So whoever is called and finds another thread in its place can rely on that one.

use super::primitive::{AtomicBool, AtomicU64, Mutex, Ordering, Word, fence, pause};
use farlink_wire::frame::HEADER_BYTES;
use std::time::Duration;

/// Nobody reads. What fresh memory says.
pub(super) const ABSENT: u32 = 0;
/// A thread reads, and will look again before it does anything else.
pub(super) const AWAKE: u32 = 1;
/// A thread sleeps on the state until it is another.
pub(super) const ASLEEP: u32 = 2;

const WORD_BYTES: usize = 8;
const HEADER_WORDS: usize = HEADER_BYTES / WORD_BYTES;

/// Words of a cache line. Messages begin at multiples of it.
const LINE_WORDS: u64 = 8;

/// The memory of one direction, as both processes have it. All zero is an empty queue that nobody reads.
///
/// Cursors count words since the beginning. Beside the messages, each side writes to cache lines of its own (two of them,
/// since processors fetch pairs).
#[derive(Debug)]
#[repr(C)]
pub(super) struct Memory<const WORDS: usize> {
    writer: WriterPart,
    reader: ReaderPart,
    data: [AtomicU64; WORDS],
}

#[derive(Debug)]
#[repr(C, align(128))]
struct WriterPart {
    /// The processor that the writer last ran on.
    processor: AtomicU64,
    /// Whether the writer has this memory; 0 if it has not, or has not yet.
    is_open: AtomicU64,
}

#[derive(Debug)]
#[repr(C, align(128))]
struct ReaderPart {
    /// Words read, which may be overwritten.
    head: AtomicU64,
    state: Word,
}

/// The peer has written what no peer of ours writes.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Corrupt(pub(super) &'static str);

/// What became of a message.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Sent {
    /// It will be read.
    Done,
    /// It is there, but nobody reads: the peer has to be told another way.
    NobodyReads,
    /// There is no room for it.
    NoRoom,
}

/// A message: its header, and what follows.
pub(super) type Message = ([u8; HEADER_BYTES], Vec<u8>);

impl<const WORDS: usize> Memory<WORDS> {
    /// Longest message in bytes: a quarter of the queue.
    pub(super) const MAX_BYTES: usize = WORDS / 4 * WORD_BYTES;

    /// Most messages that there can be at once.
    pub(super) const MAX_MESSAGES: usize = WORDS / LINE_WORDS as usize;

    #[cfg(test)]
    pub(super) fn new() -> Self {
        Self {
            writer: WriterPart { processor: AtomicU64::new(0), is_open: AtomicU64::new(0) },
            reader: ReaderPart { head: AtomicU64::new(0), state: Word::new(ABSENT) },
            data: std::array::from_fn(|_| AtomicU64::new(0)),
        }
    }

    fn word(&self, cursor: u64) -> &AtomicU64 {
        const { assert!(WORDS.is_power_of_two() && WORDS / 4 >= HEADER_WORDS && WORDS >= LINE_WORDS as usize) };
        &self.data[cursor as usize % WORDS]
    }

    /// Copies bytes to the words from `cursor` on; returns the cursor behind them.
    fn write(&self, mut cursor: u64, bytes: &[u8]) -> u64 {
        for chunk in bytes.chunks(WORD_BYTES) {
            self.word(cursor).store(word_of(chunk), Ordering::Relaxed);
            cursor = cursor.wrapping_add(1);
        }
        cursor
    }

    /// Copies the words from `cursor` on into `bytes`.
    fn read(&self, mut cursor: u64, bytes: &mut [u8]) {
        for chunk in bytes.chunks_mut(WORD_BYTES) {
            let word = self.word(cursor).load(Ordering::Relaxed).to_le_bytes();
            chunk.copy_from_slice(&word[..chunk.len()]);
            cursor = cursor.wrapping_add(1);
        }
    }

    /// Says that a reader comes, which looks for messages before it does anything else: nobody needs to be called.
    pub(super) fn expect_reader(&self) {
        self.reader.state.store(AWAKE, Ordering::Relaxed);
    }

    /// Says that the writer has the memory, and so reads the other queue in it.
    pub(super) fn open(&self) {
        self.writer.is_open.store(1, Ordering::Release);
    }

    /// Returns whether the writer has said that it has the memory.
    pub(super) fn is_open(&self) -> bool {
        self.writer.is_open.load(Ordering::Acquire) != 0
    }

    /// Returns the processor that the writer ran on when it wrote last, as it says.
    pub(super) fn writers_processor(&self) -> u64 {
        self.writer.processor.load(Ordering::Relaxed)
    }

    #[cfg(test)]
    pub(super) fn scribble(&self, place: usize, value: u64) {
        match place {
            0 => self.writer.processor.store(value, Ordering::Release),
            1 => self.reader.head.store(value, Ordering::Release),
            2 => self.reader.state.store(value as u32, Ordering::Release),
            other => self.data[other % WORDS].store(value, Ordering::Release),
        }
    }
}

/// Returns up to eight bytes as a word.
fn word_of(bytes: &[u8]) -> u64 {
    let mut word = [0; WORD_BYTES];
    word[..bytes.len()].copy_from_slice(bytes);
    u64::from_le_bytes(word)
}

/// Returns how many words a message of `bytes` takes: whole lines.
fn words(bytes: usize) -> u64 {
    (bytes.div_ceil(WORD_BYTES) as u64).next_multiple_of(LINE_WORDS)
}

/// The writing end of a queue. Threads take turns.
#[derive(Debug, Default)]
pub(super) struct Outbound(Mutex<Writer>);

#[derive(Debug, Default)]
struct Writer {
    tail: u64,
    /// How far the reader has come, when it was last looked at.
    head: u64,
    /// The processor that the reader has been told of.
    processor: u64,
}

impl Writer {
    /// Returns whether there is room for a message of `words`.
    fn has_room<const WORDS: usize>(&mut self, memory: &Memory<WORDS>, words: u64) -> Result<bool, Corrupt> {
        if self.tail.wrapping_sub(self.head) + words <= WORDS as u64 {
            return Ok(true);
        }
        let head = memory.reader.head.load(Ordering::Acquire);
        // It can only have moved towards the tail.
        if self.tail.wrapping_sub(head) > self.tail.wrapping_sub(self.head) {
            return Err(Corrupt("its reader's cursor is out of bounds"));
        }
        self.head = head;
        Ok(self.tail.wrapping_sub(head) + words <= WORDS as u64)
    }
}

impl Outbound {
    #[cfg(test)]
    pub(super) fn start_at(&self, cursor: u64) {
        *self.0.lock().expect("no test panics under the lock") = Writer { tail: cursor, head: cursor, processor: 0 };
    }

    /// Writes a message of at most [`Memory::MAX_BYTES`], of which `header` says how long it is, and wakes the reader if
    /// it sleeps. `processor` is the one this thread runs on.
    pub(super) fn send<const WORDS: usize>(
        &self,
        memory: &Memory<WORDS>,
        header: &[u8; HEADER_BYTES],
        payload: &[u8],
        processor: u64,
    ) -> Result<Sent, Corrupt> {
        {
            // A panic under this lock leaves nothing half-done: the first word comes last.
            let mut writer = self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            let (start, taken) = (writer.tail, words(HEADER_BYTES + payload.len()));
            if !writer.has_room(memory, taken)? {
                return Ok(Sent::NoRoom);
            }
            let (length, rest) = header.split_at(WORD_BYTES);
            let behind_header = memory.write(start.wrapping_add(1), rest);
            memory.write(behind_header, payload);
            memory.word(start).store(word_of(length), Ordering::Release);
            writer.tail = start.wrapping_add(taken);
            if writer.processor != processor {
                writer.processor = processor;
                memory.writer.processor.store(processor, Ordering::Relaxed);
            }
        }
        fence(Ordering::SeqCst);
        let state = &memory.reader.state;
        if state.load(Ordering::Relaxed) == AWAKE {
            return Ok(Sent::Done);
        }
        match state.swap(AWAKE, Ordering::AcqRel) {
            AWAKE => Ok(Sent::Done),
            ASLEEP => {
                state.wake();
                Ok(Sent::Done)
            }
            ABSENT => Ok(Sent::NobodyReads),
            _ => Err(Corrupt("its reader is in no state that there is")),
        }
    }
}

/// The reading end of a queue.
#[derive(Debug, Default)]
pub(super) struct Inbound {
    is_attended: AtomicBool,
    /// Words read. The attendant's.
    head: AtomicU64,
    /// Whether the attendant is about to sleep or does. The shared state says that too, but the peer can change it.
    is_asleep: AtomicBool,
    is_closed: AtomicBool,
}

impl Inbound {
    #[cfg(test)]
    pub(super) fn start_at(&self, cursor: u64) {
        self.head.store(cursor, Ordering::Relaxed);
    }

    /// Makes the calling thread the attendant, unless another is or the queue is closed.
    pub(super) fn attend<'a, const WORDS: usize>(&'a self, memory: &'a Memory<WORDS>) -> Option<Attendant<'a, WORDS>> {
        let attendant = self.take_place(memory)?;
        if self.is_closed() {
            return None;
        }
        memory.reader.state.store(AWAKE, Ordering::Relaxed);
        Some(attendant)
    }

    /// Makes the calling thread the attendant, unless another is.
    fn take_place<'a, const WORDS: usize>(&'a self, memory: &'a Memory<WORDS>) -> Option<Attendant<'a, WORDS>> {
        self.is_attended.compare_exchange(false, true, Ordering::Acquire, Ordering::Relaxed).ok()?;
        Some(Attendant { inbound: self, memory, head: self.head.load(Ordering::Relaxed) })
    }

    /// Whether no thread can become the attendant any more.
    pub(super) fn is_closed(&self) -> bool {
        self.is_closed.load(Ordering::SeqCst)
    }

    /// Wakes the attendant if it sleeps: something has changed that it waits for besides messages.
    pub(super) fn nudge<const WORDS: usize>(&self, memory: &Memory<WORDS>) {
        fence(Ordering::SeqCst);
        if self.is_asleep.load(Ordering::Relaxed) {
            memory.reader.state.store(AWAKE, Ordering::Relaxed);
            memory.reader.state.wake();
        }
    }

    /// Closes the queue, and makes the calling thread the last attendant as soon as the one that is has left, which it
    /// does when it sees this.
    pub(super) fn close<'a, const WORDS: usize>(&'a self, memory: &'a Memory<WORDS>) -> Attendant<'a, WORDS> {
        self.is_closed.store(true, Ordering::SeqCst);
        let mut pauses = 0;
        loop {
            if let Some(attendant) = self.take_place(memory) {
                return attendant;
            }
            // Again and again: the peer may change the state at any time, before the attendant sleeps.
            memory.reader.state.store(AWAKE, Ordering::Relaxed);
            memory.reader.state.wake();
            pause(pauses);
            pauses = pauses.saturating_add(1);
        }
    }
}

/// The one thread that reads a queue, for as long as this exists.
#[derive(Debug)]
pub(super) struct Attendant<'a, const WORDS: usize> {
    inbound: &'a Inbound,
    memory: &'a Memory<WORDS>,
    /// Words read.
    head: u64,
}

impl<const WORDS: usize> Attendant<'_, WORDS> {
    /// Whether there is a message.
    pub(super) fn has_message(&self) -> bool {
        self.memory.word(self.head).load(Ordering::Acquire) != 0
    }

    /// Takes the next message, if there is one.
    pub(super) fn receive(&mut self) -> Result<Option<Message>, Corrupt> {
        // From here on only this copy counts: the peer can change what it was copied from.
        let length = self.memory.word(self.head).load(Ordering::Acquire);
        if length == 0 {
            return Ok(None);
        }
        let size = usize::try_from(length).unwrap_or(usize::MAX);
        if !(HEADER_BYTES..=Memory::<WORDS>::MAX_BYTES).contains(&size) {
            return Err(Corrupt("the length of a message is out of bounds"));
        }
        let mut header = [0; HEADER_BYTES];
        let (first, rest) = header.split_at_mut(WORD_BYTES);
        first.copy_from_slice(&length.to_le_bytes());
        self.memory.read(self.head.wrapping_add(1), rest);
        let mut payload = vec![0; size - HEADER_BYTES];
        self.memory.read(self.head.wrapping_add(HEADER_WORDS as u64), &mut payload);
        let taken = words(size);
        for line in (0..taken).step_by(LINE_WORDS as usize) {
            self.memory.word(self.head.wrapping_add(line)).store(0, Ordering::Relaxed);
        }
        self.head = self.head.wrapping_add(taken);
        self.memory.reader.head.store(self.head, Ordering::Release);
        Ok(Some((header, payload)))
    }

    /// Sleeps for at most `timeout`, until there is a message, the queue is closed, or `stop` has become true and somebody has called
    /// [`Inbound::nudge`]. May return without cause.
    pub(super) fn sleep(&self, stop: impl Fn() -> bool, timeout: Option<Duration>) {
        self.inbound.is_asleep.store(true, Ordering::Relaxed);
        self.memory.reader.state.store(ASLEEP, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        if !self.has_message() && !stop() && !self.inbound.is_closed() {
            self.memory.reader.state.wait(ASLEEP, timeout);
        }
        self.inbound.is_asleep.store(false, Ordering::Relaxed);
        self.memory.reader.state.store(AWAKE, Ordering::Relaxed);
    }

    /// Makes way for another attendant. Returns whether a message has come meanwhile, for which nobody may have been
    /// called: then the caller has to try to attend again.
    #[must_use = "a message may wait for this thread"]
    pub(super) fn leave(self) -> bool {
        let (memory, read) = (self.memory, self.head);
        memory.reader.state.store(ABSENT, Ordering::Relaxed);
        drop(self);
        fence(Ordering::SeqCst);
        memory.word(read).load(Ordering::Relaxed) != 0
    }
}

impl<const WORDS: usize> Drop for Attendant<'_, WORDS> {
    fn drop(&mut self) {
        self.inbound.head.store(self.head, Ordering::Relaxed);
        self.inbound.is_attended.store(false, Ordering::Release);
    }
}

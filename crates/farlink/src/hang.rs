//! What the threads of an executor that does not answer are doing, as far as the system tells.
//!
//! A thread that waits in a system call has its stack's and its program's pointer told, and that is enough to find the way
//! back through code with unwind information. One that runs is only said to run: to stop it would disturb it.

use crate::backtrace::{Finder, Frame, Stopped};
use crate::pool::Running;
use crate::process::Process;
use crate::session::{Connection, Session, SessionInner};
use crate::{Error, SessionBuilder};
use std::fmt;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::time::Duration;

/// Bytes of a stack that are looked at.
const STACK_BYTES: usize = 64 << 10;

/// Frames of a thread that a message shows.
const FRAMES_SHOWN: usize = 8;

/// Where the two pointers are in the system's order of registers, and how many registers there are before and with them.
const RSP: usize = 15;
const RIP: usize = 16;

/// How long what is asked of an executor may take, unless it runs linked code: longer than anything takes on a busy machine.
pub(crate) const DEFAULT_PROTOCOL_TIMEOUT: Duration = Duration::from_secs(300);

/// A thread of an executor's process.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct ThreadState {
    /// Its number.
    pub tid: u32,
    /// Its name.
    pub name: String,
    /// Its state, as `proc_pid_stat(5)` writes it: `R` runs, `S` waits, `D` waits and cannot be interrupted, `T` is
    /// stopped.
    pub state: char,
    /// Where in the system it waits, if that is told.
    pub waits_in: Option<String>,
    /// The number of the system call that it is in, if it is.
    pub system_call: Option<u64>,
    /// The frames of its stack, the innermost first, if it waits.
    pub frames: Vec<Frame>,
}

impl fmt::Display for ThreadState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let what = match self.state {
            'R' => "runs",
            'S' => "waits",
            'D' => "waits without interruption",
            'T' | 't' => "is stopped",
            'Z' | 'X' => "has ended",
            _ => "is in a state that is not known",
        };
        write!(f, "thread {} ({}) {what}", self.name, self.tid)?;
        self.system_call.iter().try_for_each(|number| write!(f, ", in system call {number}"))?;
        self.waits_in.iter().try_for_each(|place| write!(f, ", at {place}"))?;
        self.frames.iter().take(FRAMES_SHOWN).try_for_each(|frame| write!(f, "\n    {frame}"))
    }
}

/// Lists threads in a message that goes before.
pub(crate) fn listed(threads: &[ThreadState]) -> String {
    threads.iter().map(|thread| format!("\n  {thread}")).collect()
}

/// Where a thread is, told by the system.
#[derive(Debug, PartialEq, Eq)]
struct Call {
    /// The system call; none if it waits for another reason.
    number: Option<u64>,
    rsp: u64,
    rip: u64,
}

/// Reads `proc_pid_syscall(5)`; gives nothing for a thread that runs.
fn parse_call(text: &str) -> Option<Call> {
    let words: Vec<&str> = text.split_whitespace().collect();
    let hex = |word: &str| u64::from_str_radix(word.strip_prefix("0x")?, 16).ok();
    let [number, .., rsp, rip] = words[..] else { return None };
    Some(Call { number: number.parse().ok(), rsp: hex(rsp)?, rip: hex(rip)? })
}

/// Reads the name and the state in `proc_pid_stat(5)`. A name may have anything in it.
fn parse_stat(text: &str) -> Option<(String, char)> {
    let (before, after) = text.rsplit_once(')')?;
    let name = before.split_once('(')?.1;
    Some((name.to_owned(), after.trim_start().chars().next()?))
}

impl SessionInner {
    /// Returns what the threads of the executor's process are doing, or of all executors; nothing of what is no child of this
    /// one.
    pub(crate) fn threads(&self) -> Vec<ThreadState> {
        match &self.connection {
            Connection::Process(process) => self.threads_of(process),
            Connection::Pool(pool) => {
                pool.all().iter().flat_map(|running| self.threads_of(running.process())).collect()
            }
            _ => Vec::new(),
        }
    }

    fn threads_of(&self, process: &Process) -> Vec<ThreadState> {
        let folder = format!("/proc/{}", process.id().as_raw_nonzero());
        let Ok(entries) = fs::read_dir(format!("{folder}/task")) else { return Vec::new() };
        let maps = fs::read_to_string(format!("{folder}/maps")).unwrap_or_default();
        let memory = File::open(format!("{folder}/mem")).ok();
        let linked = self.linked_code();
        let find = |addr| linked.find(addr, &self.memory);
        let mut finder = Finder::new(&maps, &find);
        let mut tids: Vec<u32> = entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok()).collect();
        tids.sort_unstable();
        let mut state = |tid: u32| {
            let read = |name: &str| fs::read_to_string(format!("{folder}/task/{tid}/{name}")).ok();
            let (name, state) = parse_stat(&read("stat")?)?;
            let waits_in = read("wchan").filter(|place| !place.is_empty() && place != "0");
            let call = read("syscall").and_then(|text| parse_call(&text));
            let frames = call.as_ref().zip(memory.as_ref()).map(|(call, memory)| frames(call, memory, &mut finder));
            let system_call = call.and_then(|call| call.number);
            Some(ThreadState { tid, name, state, waits_in, system_call, frames: frames.unwrap_or_default() })
        };
        tids.into_iter().filter_map(&mut state).collect()
    }

    /// Returns the error that `function` has not returned in time, and does what is to be done about that. If the executors
    /// are a pool, it is this one's function.
    pub(crate) fn stuck(&self, function: &str, timeout: Duration, running: Option<&Running>) -> Error {
        let process = match (&self.connection, running) {
            (Connection::Process(process), _) => Some(process),
            (_, running) => running.map(Running::process),
        };
        let threads = process.map_or_else(|| self.threads(), |process| self.threads_of(process)).into();
        if let (Some(process), true) = (process, self.ends_when_stuck) {
            process.signal(rustix::process::Signal::KILL);
        }
        Error::TimedOut { function: function.to_owned(), timeout, threads }
    }
}

/// Finds the frames of a thread that waits.
fn frames(call: &Call, memory: &File, finder: &mut Finder<'_>) -> Vec<Frame> {
    let mut stack = vec![0; STACK_BYTES];
    let count = memory.read_at(&mut stack, call.rsp).unwrap_or_default();
    stack.truncate(count);
    let mut registers = [None; RIP + 1];
    registers[RSP] = Some(call.rsp);
    registers[RIP] = Some(call.rip);
    Stopped { registers: &registers, stack_start: call.rsp, stack: &stack }.frames(finder).0
}

impl SessionBuilder {
    /// Sets how long everything else but calls of linked code may take: what is asked of the executor to link, to remove, to
    /// read memory. 5 minutes unless set. What takes longer is [`Error::TimedOut`], with what the executor was doing.
    #[must_use]
    pub fn protocol_timeout(mut self, timeout: Duration) -> Self {
        self.protocol_timeout = timeout;
        self.options.write_timeout = timeout;
        self
    }

    /// Has an executor that this session started end when something is [`Error::TimedOut`]: it is killed, once what its
    /// threads were doing has been noted.
    #[must_use]
    pub fn end_when_stuck(mut self, ends: bool) -> Self {
        self.ends_when_stuck = ends;
        self
    }
}

impl Session {
    /// Returns what the threads of the executor are doing, if this session started its process: for someone who wonders why
    /// it does not answer.
    #[must_use]
    pub fn threads(&self) -> Vec<ThreadState> {
        self.inner().threads()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the system says of threads is read, names with brackets and threads that run included.
    #[test]
    fn descriptions_of_threads() {
        assert_eq!(parse_stat("12 (a) (b)) S 1 2"), Some(("a) (b)".to_owned(), 'S')));
        assert_eq!(parse_stat("12"), None);
        let waiting = parse_call("7 0x1 0x2 0x3 0x4 0x5 0x6 0x7ffe 0x401000\n");
        assert_eq!(waiting, Some(Call { number: Some(7), rsp: 0x7ffe, rip: 0x40_1000 }));
        assert_eq!(parse_call("-1 0x7ffe 0x401000"), Some(Call { number: None, rsp: 0x7ffe, rip: 0x40_1000 }));
        assert_eq!(parse_call("running\n"), None);
    }
}

//! How an executor ended, told from what the system says of its process and from the report that it may have left.

use crate::backtrace::{Finder, Frame, LinkedFile, LinkedPlace, Stopped};
use crate::error::{describe_status, signal_name};
use crate::known_code::{self, KnownCode};
use crate::library::LibraryInner;
use crate::pool::Running;
use crate::session::{Connection, SessionInner};
use crate::state::ObjectState;
use crate::{Library, Session};
use ecow::EcoString;
use farlink_addr::{ExecutorAddr, ExecutorAddrRange};
use farlink_graph::CodePlace;
use farlink_mem::{MemoryManager, SharedArea};
use farlink_rpc::{CallError, Executor, Pending};
use farlink_wire::functions::{LEAVE_REPORTS, SHARED_INSTANCE};
use farlink_wire::report::{self, REGISTER_NAMES, REPORT_BYTES, Report, ReportError};
use farlink_wire::sps::SpsError;
use std::fmt;
use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;
use std::sync::{Arc, Mutex, Once, OnceLock, PoisonError, Weak};

/// How an executor ended.
///
/// `Display` gives one line that goes on from "the executor"; [`Self::report`] gives all that is known.
#[derive(Clone, Debug)]
pub struct Death {
    status: Option<ExitStatus>,
    fault: Option<Fault>,
    problem: Option<String>,
}

/// The fault that a process has died of. All of it is the process's own word.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Fault {
    /// The signal's number.
    pub signal: i32,
    /// Why it came, in words; empty if there is nothing to say.
    pub reason: String,
    /// The address that the fault was about, where there is one.
    pub address: Option<ExecutorAddr>,
    /// The thread's name and number.
    pub thread: (String, u32),
    /// The general registers by name.
    pub registers: Vec<(&'static str, u64)>,
    /// The frames of its stack, the innermost first.
    pub frames: Vec<Frame>,
    /// Whether there are more frames.
    pub has_more_frames: bool,
}

impl Death {
    /// Puts together what the system says of a process and what the process has left.
    pub(crate) fn new(
        status: Option<ExitStatus>,
        left: Result<Option<Report>, ReportError>,
        linked: &dyn Fn(u64) -> Option<LinkedPlace>,
    ) -> Self {
        let ended_by = |report: &Report| status.is_none_or(|status| status.signal() == Some(report.signal));
        let (fault, problem) = match left {
            Ok(Some(report)) if ended_by(&report) => (Some(Fault::new(&report, linked)), None),
            Ok(Some(report)) => {
                let signal = signal_name(report.signal);
                (None, Some(format!("its report of a fault is about {signal}, which is not what ended it")))
            }
            Ok(None) => (None, None),
            Err(error) => (None, Some(error.to_string())),
        };
        Self { status, fault, problem }
    }

    /// Returns how the process ended, if it was started by the session.
    #[must_use]
    pub fn status(&self) -> Option<ExitStatus> {
        self.status
    }

    /// Returns the fault that it died of, if it has left a report of one.
    #[must_use]
    pub fn fault(&self) -> Option<&Fault> {
        self.fault.as_ref()
    }

    /// Returns what is wrong with the report that it has left, if something is.
    #[must_use]
    pub fn problem(&self) -> Option<&str> {
        self.problem.as_deref()
    }

    /// Returns all that is known, in lines.
    #[must_use]
    pub fn report(&self) -> String {
        let mut text = self.to_string();
        if let Some(fault) = &self.fault {
            text += &fault.details();
        }
        text
    }

    fn how(&self) -> String {
        let note = match self.status {
            Some(status) if status.signal() == Some(libc::SIGKILL) => {
                ", which somebody sent, or the system for want of memory"
            }
            _ => "",
        };
        match (self.status, &self.fault) {
            (Some(status), _) => describe_status(status) + note,
            (None, Some(fault)) => format!("was killed by {}", signal_name(fault.signal)),
            (None, None) => "has gone".to_owned(),
        }
    }
}

impl fmt::Display for Death {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.how())?;
        if let Some(fault) = &self.fault {
            write!(f, "{}", fault.cause())?;
        }
        self.problem.iter().try_for_each(|problem| write!(f, "; {problem}"))
    }
}

/// Why a signal came, by its number and its code.
fn reason(report: &Report) -> String {
    let text = match (report.signal, report.code) {
        (_, code) if code <= 0 && report.sender == report.pid => "",
        (_, code) if code <= 0 => return format!("process {} sent it", report.sender),
        (libc::SIGSEGV, 1 | 2) if has_overflown(report) => "the stack has overflown",
        (libc::SIGSEGV, 1) => "nothing is mapped there",
        (libc::SIGSEGV, 2) => "what is mapped there does not allow it",
        (libc::SIGSEGV, _) => "no address that the processor has, or no access that it allows",
        (libc::SIGBUS, 1) => "the address is not aligned",
        (libc::SIGBUS, 2) => "there is no memory behind the address",
        (libc::SIGILL, _) => "no instruction is there that may be executed",
        (libc::SIGFPE, 1) => "an integer was divided by zero, or its quotient is too large",
        (libc::SIGFPE, 2) => "an integer overflowed",
        (libc::SIGFPE, _) => "a floating-point operation failed",
        (libc::SIGTRAP, _) => "a trap was executed, as removed code consists of",
        (libc::SIGSYS, _) => "the system call is not allowed",
        _ => "",
    };
    text.to_owned()
}

/// How far below its pointer a stack that overflows is touched, in bytes: in frames that are larger, by probes.
const STACK_REACH: u64 = 64 << 10;

fn has_overflown(report: &Report) -> bool {
    let rsp = report.registers[15];
    let is_near = (rsp.saturating_sub(STACK_REACH)..rsp.saturating_add(8)).contains(&report.address.as_u64());
    // Where the stack's pointer is nothing could be read.
    is_near || report.stack_start.as_u64() > rsp && !report.stack.is_empty()
}

impl Fault {
    fn new(report: &Report, linked: &dyn Fn(u64) -> Option<LinkedPlace>) -> Self {
        let registers = report.registers.map(Some);
        let stopped = Stopped { registers: &registers, stack_start: report.stack_start.as_u64(), stack: &report.stack };
        let (frames, has_more_frames) = stopped.frames(&mut Finder::new(&report.maps, linked));
        let has_address = report.code > 0 && matches!(report.signal, libc::SIGSEGV | libc::SIGBUS);
        Self {
            signal: report.signal,
            reason: reason(report),
            address: has_address.then_some(report.address),
            thread: (report.thread.clone(), report.tid),
            registers: REGISTER_NAMES.into_iter().zip(report.registers).collect(),
            frames,
            has_more_frames,
        }
    }

    /// Returns the innermost frame of linked code, if there is one.
    #[must_use]
    pub fn linked_frame(&self) -> Option<&Frame> {
        self.frames.iter().find(|frame| frame.is_linked)
    }

    /// Returns what was wrong and where, to go on from how the process ended.
    fn cause(&self) -> String {
        let mut text = String::new();
        if let Some(address) = self.address {
            text += &format!(" at the address {address}");
        }
        if !self.reason.is_empty() {
            text += &format!(": {}", self.reason);
        }
        if let Some(frame) = self.linked_frame() {
            text += &format!("; in {frame}");
        }
        text
    }

    fn details(&self) -> String {
        let mut text = format!("\nthread {} ({})", self.thread.0, self.thread.1);
        let mut number = 0;
        // Recursion fills the stack with one frame.
        for same in self.frames.chunk_by(|one, next| one == next) {
            text += &format!("\n  #{number:<2} {:#018x} {}", same[0].address, same[0]);
            if same.len() > 1 {
                text += &format!("\n      and as often again: {}", same.len() - 1);
            }
            number += same.len();
        }
        if self.has_more_frames {
            text += "\n      and more";
        }
        for (index, (name, value)) in self.registers.iter().enumerate() {
            text += if index % 4 == 0 { "\n " } else { "" };
            text += &format!(" {name:>3} {value:#018x}");
        }
        text
    }
}

impl fmt::Display for Frame {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (&self.function, &self.object) {
            (Some((name, offset)), Some(object)) => write!(f, "{name}+{offset:#x} ({object})")?,
            (_, Some(object)) => write!(f, "{object}")?,
            _ => f.write_str("no code that is known")?,
        }
        self.line.iter().try_for_each(|(file, line)| write!(f, " at {file}:{line}"))
    }
}

/// What is known of the executor's end.
#[derive(Default)]
pub(crate) struct Deaths {
    /// Where the executor leaves its report, if it leaves any.
    pub(crate) reporter: Option<Reporter>,
    /// The libraries, whose code may be where it has stopped.
    pub(crate) libraries: Mutex<Vec<Weak<LibraryInner>>>,
    /// Code of objects that are being removed: what they left for their end may run, and fail.
    pub(crate) leaving: Mutex<Vec<Arc<LeavingCode>>>,
    /// How it ended, once somebody wanted to know.
    pub(crate) found: OnceLock<Arc<Death>>,
}

/// The code of objects that are being removed: what each is called, and what is known of it.
pub(crate) type LeavingCode = Vec<(EcoString, KnownCode)>;

impl SessionInner {
    /// Takes note of code that is being removed, until [`Self::has_left`].
    pub(crate) fn leaves(&self, code: LeavingCode) -> Arc<LeavingCode> {
        let leaving = Arc::new(code);
        self.deaths.leaving.lock().unwrap_or_else(PoisonError::into_inner).push(Arc::clone(&leaving));
        leaving
    }

    pub(crate) fn has_left(&self, code: &Arc<LeavingCode>) {
        self.deaths.leaving.lock().unwrap_or_else(PoisonError::into_inner).retain(|other| !Arc::ptr_eq(other, code));
    }

    /// Takes note of a library, whose code may be where the executor stops.
    pub(crate) fn know(&self, library: &Library) {
        let mut libraries = self.deaths.libraries.lock().unwrap_or_else(PoisonError::into_inner);
        if libraries.len() == libraries.capacity() {
            libraries.retain(|library| library.strong_count() > 0);
        }
        libraries.push(Arc::downgrade(library.inner()));
    }

    /// Returns the code that is linked now, or on its way out.
    pub(crate) fn linked_code(&self) -> LinkedCode {
        // Not under these locks: whoever removes an object holds its library's before them.
        let libraries = self.deaths.libraries.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let leaving = self.deaths.leaving.lock().unwrap_or_else(PoisonError::into_inner).clone();
        LinkedCode::collect(&libraries, &leaving)
    }

    /// Returns how the executor ended, which the system says of its process if that is a child of this one; none if
    /// nothing is known.
    pub(crate) fn death(&self, status: Option<ExitStatus>) -> Option<Arc<Death>> {
        if let Some(found) = self.deaths.found.get() {
            return Some(Arc::clone(found));
        }
        let left = self.deaths.reporter.as_ref().map_or(Ok(None), Reporter::left);
        if status.is_none() && matches!(left, Ok(None)) {
            return None;
        }
        let find = || {
            let linked = self.linked_code();
            Arc::new(Death::new(status, left, &|addr| linked.find(addr, &self.memory)))
        };
        Some(Arc::clone(self.deaths.found.get_or_init(find)))
    }
}

impl SessionInner {
    /// Returns how an executor ended: this one, if the executors are a pool.
    pub(crate) fn death_of(&self, running: Option<&Running>) -> Option<Arc<Death>> {
        let Some(running) = running else { return self.death(self.process_end()) };
        let status = running.process().ended_soon()?;
        let left = running.reporter().map_or(Ok(None), Reporter::left);
        let find = || {
            let linked = self.linked_code();
            Arc::new(Death::new(Some(status), left, &|addr| linked.find(addr, &self.memory)))
        };
        Some(Arc::clone(running.death.get_or_init(find)))
    }
}

impl Session {
    /// Returns how the executor ended; none while it has not, or if nothing is known of it. Of several executors, or if
    /// another has taken its place, how the last one ended that was noticed.
    ///
    /// An executor that dies of a fault leaves a report of it, if the connection passes descriptors: which fault, where, and
    /// how it came there. One that linked code has `exit`, or that is killed, has its status only.
    #[must_use]
    pub fn death(&self) -> Option<Arc<Death>> {
        let inner = self.inner();
        match &inner.connection {
            Connection::Process(process) => inner.death(Some(process.ended()?)),
            Connection::Endpoint(endpoint) => endpoint.disconnected().and_then(|_| inner.death(None)),
            Connection::Pool(pool) => inner.death_of(Some(&*pool.last_end()?)),
            Connection::InProcess | Connection::None => None,
        }
    }
}

/// The code of all linked objects of a session, by address.
pub(crate) struct LinkedCode {
    places: Vec<(CodePlace, usize)>,
    objects: Vec<(EcoString, KnownCode)>,
}

impl LinkedCode {
    pub(crate) fn collect(libraries: &[Weak<LibraryInner>], leaving: &[Arc<LeavingCode>]) -> Self {
        let (mut places, mut objects) = (Vec::new(), Vec::new());
        let mut add = |name: &EcoString, code: &KnownCode| {
            places.extend(code.places().into_iter().map(|place| (place, objects.len())));
            objects.push((name.clone(), code.clone()));
        };
        for library in libraries.iter().filter_map(Weak::upgrade) {
            for slot in library.lock().objects.iter() {
                if let ObjectState::Linked(linked) = &slot.state {
                    add(&slot.name, &linked.code);
                }
            }
        }
        leaving.iter().flat_map(|leaving| &**leaving).for_each(|(name, code)| add(name, code));
        places.sort_by_key(|(place, _)| place.addr);
        Self { places, objects }
    }

    /// Returns what is at an address; `memory` shows what is linked there.
    pub(crate) fn find(&self, addr: u64, memory: &MemoryManager) -> Option<LinkedPlace> {
        let after = self.places.partition_point(|(place, _)| place.addr.as_u64() <= addr);
        let (place, object) = self.places.get(after.checked_sub(1)?)?;
        let distance = Some(addr - place.addr.as_u64()).filter(|&distance| distance < place.size)?;
        let (name, code) = &self.objects[*object];
        let file = match code {
            KnownCode::Nothing => return None,
            KnownCode::File(file) => LinkedFile::Whole(file.1.clone()),
            KnownCode::Notes(notes) => {
                let notes = known_code::read(notes)?;
                let eh_frame = notes.eh_frame.and_then(|range| content(memory, range));
                LinkedFile::Notes(notes, eh_frame)
            }
        };
        let file_offset = place.file_offset.and_then(|offset| offset.checked_add(distance));
        Some(LinkedPlace { object: name.to_string(), number: *object, file, file_offset })
    }
}

/// Returns what is linked at some addresses.
fn content(memory: &MemoryManager, range: ExecutorAddrRange) -> Option<Vec<u8>> {
    let view = memory.view(range)?;
    let mut bytes = vec![0; usize::try_from(view.len()).ok()?];
    view.read_volatile(0, &mut bytes).ok()?;
    Some(bytes)
}

/// The memory that an executor leaves its report in.
pub(crate) struct Reporter {
    area: SharedArea,
    /// Whether the executor has taken it, or said that it cannot.
    answered: Once,
    asked: Mutex<Option<Pending<Result<SpsError, CallError>>>>,
}

impl Reporter {
    /// Asks an executor for reports; none if it cannot leave any.
    pub(crate) fn new(executor: &Executor) -> Option<Self> {
        let leave = executor.bind(LEAVE_REPORTS).ok()?;
        let instance = executor.object(SHARED_INSTANCE).ok()?;
        // Reports are for when something goes wrong: where they cannot be had, what can go right goes on.
        let area = SharedArea::new(REPORT_BYTES).ok()?;
        let tag = executor.send_descriptor(area.descriptor()).ok()?;
        let asked = leave.call(&(instance, tag));
        Some(Self { area, answered: Once::new(), asked: Mutex::new(Some(asked)) })
    }

    /// Waits until the executor is ready: before it runs what was linked.
    pub(crate) fn wait_ready(&self) {
        self.answered.call_once(|| {
            let asked = self.asked.lock().unwrap_or_else(PoisonError::into_inner).take();
            if let Some(asked) = asked {
                let _ = asked.wait();
            }
        });
    }

    /// Returns what the executor has left.
    pub(crate) fn left(&self) -> Result<Option<Report>, ReportError> {
        let copy = self.area.copy().map_err(|_| ReportError::Damaged("there is no memory to read it"))?;
        report::parse(&copy)
    }
}

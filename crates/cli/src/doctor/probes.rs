//! The mechanisms, each of which is tried in a process of its own.

use super::{Finding, Program, Status};
use crate::start::ExitCode;
use clap::ValueEnum;
use farlink::executor::probe as executor_probe;
use farlink::mem::probe as memory_probe;
use farlink::{Memory, Session};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::ffi::OsStr;
use std::io::{self, PipeReader, Read};
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

const MEMORY: &str = "memory";
const HARDENING: &str = "hardening";
pub(super) const EXECUTOR: &str = "executor";
const RUN_TIME: &str = "run time";

/// Bytes of thread-local variables that are tried: more than any C library keeps room for unasked.
const STATIC_TLS_BYTES: u64 = 64 << 10;

/// Longer than any of them takes on a busy machine.
pub(super) const PATIENCE: Duration = Duration::from_secs(60);

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Probe {
    NamelessMemory,
    NamelessCode,
    PosixCode,
    Reservation,
    LowReservation,
    GuardPage,
    Futex,
    DenyWriteExecute,
    SealMapping,
    Seccomp,
    Landlock,
    StaticThreadLocal,
    ExecutableStacks,
    SharedExecutor,
    PosixExecutor,
    RemoteExecutor,
}

/// What is said of a probe: its heading, its name, and what farlink does if it works, and if it does not.
struct About {
    group: &'static str,
    name: &'static str,
    works: &'static str,
    fails: &'static str,
}

impl Probe {
    fn about(self) -> About {
        let (group, name, works, fails) = match self {
            Self::NamelessMemory => (
                MEMORY,
                "memory without a name (memfd_create)",
                "shares it between the processes: no name can be left in /dev/shm, nobody else can open it, and its size is \
                 sealed",
                "can share POSIX memory instead (--memory posix), or none (--memory remote)",
            ),
            Self::NamelessCode => (
                MEMORY,
                "code in memory without a name",
                "writes code through one mapping and runs it through another: no page is writable and executable",
                "can share POSIX memory instead (--memory posix), or none (--memory remote)",
            ),
            Self::PosixCode => (
                MEMORY,
                "code in POSIX shared memory (/dev/shm)",
                "uses it for LLVM's executors and with --memory posix; names are removed as soon as both sides have them",
                "does without, except for LLVM's executors, which need --memory remote then",
            ),
            Self::Reservation => (
                MEMORY,
                "1 GiB of address space at once",
                "reserves that much and uses pages only as they are written",
                "halves what it reserves until the system agrees",
            ),
            Self::LowReservation => (
                MEMORY,
                "512 MiB in the lowest 2 GiB",
                "places code there that was compiled without -fPIC",
                "cannot link code that was compiled with -fno-pic",
            ),
            Self::GuardPage => (
                MEMORY,
                "guard pages without mappings (MADV_GUARD_INSTALL)",
                "separates stripes with them",
                "separates stripes with mappings of their own, two more for each reservation",
            ),
            Self::Futex => (
                MEMORY,
                "waking through shared memory (futex)",
                "sends small messages through a ring in shared memory",
                "nothing: calls go through a socket",
            ),
            Self::DenyWriteExecute => (
                HARDENING,
                "memory never both written and executable (PR_SET_MDWE)",
                "locks hardened executors with it: no protection gains execution",
                "needs nothing of it: stripes have no page that is writable and executable",
            ),
            Self::SealMapping => (
                HARDENING,
                "mappings that cannot be changed (mseal)",
                "seals code and constants of hardened executors",
                "hardens executors without it: code still cannot be made writable, but can be unmapped",
            ),
            Self::Seccomp => (
                HARDENING,
                "refusing system calls (seccomp)",
                "refuses hardened executors system calls that make code or reach other processes",
                "has no hardened executors",
            ),
            Self::Landlock => (
                HARDENING,
                "refusing files and networks (Landlock)",
                "keeps hardened executors from /proc/*/mem and from other processes",
                "needs nothing of it",
            ),
            Self::StaticThreadLocal => (
                RUN_TIME,
                "room for thread-local variables (GLIBC_TUNABLES)",
                "asks for it where objects have more of them without -fPIC than there is room for anyway",
                "can link such objects only if their variables are few; recompile with -fPIC",
            ),
            Self::ExecutableStacks => (
                RUN_TIME,
                "code on stacks (PT_GNU_STACK)",
                "makes stacks executable for objects that want it, as nested functions of GNU C do",
                "refuses objects that want it",
            ),
            Self::SharedExecutor => (
                EXECUTOR,
                "--memory shared",
                "runs programs this way unless told otherwise",
                "cannot share memory with this executor; see the other ways",
            ),
            Self::PosixExecutor => {
                (EXECUTOR, "--memory posix", "runs programs this way if told so", "cannot share POSIX memory with it")
            }
            Self::RemoteExecutor => (
                EXECUTOR,
                "--memory remote",
                "runs programs this way if told so, and in executors on other machines",
                "cannot use this executor at all",
            ),
        };
        About { group, name, works, fails }
    }

    /// Tries it, in this process.
    fn run(self, program: &Program) -> Result<String, String> {
        let io = |result: io::Result<()>| result.map(|()| String::new()).map_err(|error| error.to_string());
        match self {
            Self::NamelessMemory => match memory_probe::nameless_memory() {
                Ok(true) => Ok("sealed, and marked as no program (MFD_NOEXEC_SEAL)".to_owned()),
                Ok(false) => Ok("sealed; the mark MFD_NOEXEC_SEAL is of Linux 6.3".to_owned()),
                Err(error) => Err(error.to_string()),
            },
            Self::NamelessCode => io(memory_probe::run_nameless_code()),
            Self::PosixCode => io(memory_probe::run_posix_code()),
            Self::Reservation => io(memory_probe::reserve(farlink::DEFAULT_RESERVATION_BYTES, false)),
            Self::LowReservation => io(memory_probe::reserve(farlink::DEFAULT_RESERVATION_BYTES / 2, true)),
            Self::GuardPage => io(memory_probe::guard_page()),
            Self::Futex => io(memory_probe::wake_through_shared_memory()),
            Self::DenyWriteExecute => io(memory_probe::deny_write_execute()),
            Self::SealMapping => io(memory_probe::seal_mapping()),
            Self::Seccomp => io(executor_probe::refuse_system_call()),
            Self::Landlock => match executor_probe::landlock_version() {
                Ok(version) => Ok(format!("version {version}")),
                Err(error) => Err(error.to_string()),
            },
            Self::StaticThreadLocal => io(executor_probe::static_thread_local(STATIC_TLS_BYTES)),
            Self::ExecutableStacks => io(executor_probe::executable_stacks()),
            Self::SharedExecutor => try_executor(program, Memory::Shared),
            Self::PosixExecutor => try_executor(program, Memory::Posix),
            Self::RemoteExecutor => try_executor(program, Memory::Remote),
        }
    }
}

/// Starts an executor, passes data through its memory, and calls it.
fn try_executor(program: &Program, memory: Memory) -> Result<String, String> {
    const CALLS: u32 = 200;
    let start = Instant::now();
    let builder = Session::builder().memory(memory).executor(&program.path, program.args.clone());
    let session = builder.spawn().map_err(|error| error.to_string())?;
    let started = start.elapsed();
    if memory != Memory::Remote {
        pass_data(&session).map_err(|error| error.to_string())?;
    }
    let library = session.create_library("doctor");
    let start = Instant::now();
    for _ in 0..CALLS {
        library.lookup("malloc").map_err(|error| error.to_string())?;
    }
    let call = start.elapsed() / CALLS;
    Ok(format!("started in {:.1} ms, {:.0} µs for a call", started.as_secs_f64() * 1e3, call.as_secs_f64() * 1e6))
}

fn pass_data(session: &Session) -> Result<(), farlink::Error> {
    let buffer = session.shared_buffer::<u64>(1 << 16)?;
    let mut read = [0; 8];
    session.write_memory(buffer.executor_addr(), &42u64.to_le_bytes())?;
    session.read_memory(buffer.executor_addr(), &mut read)
}

/// Tries a mechanism in this process, which was started for that: prints what was seen, and ends with a status that says
/// whether it works.
pub(super) fn answer(probe: Probe, program: &Program) -> ExitCode {
    let (text, status) = match probe.run(program) {
        Ok(text) => (text, ExitCode::SUCCESS),
        Err(text) => (text, ExitCode::FAILURE),
    };
    print!("{text}");
    status
}

/// Tries all of them one after another, since some measure, each in a process of its own.
pub(super) fn try_all(this: &Path, executor: Option<&Path>) -> Vec<Finding> {
    Probe::value_variants().iter().map(|&probe| try_one(probe, this, executor)).collect()
}

fn try_one(probe: Probe, this: &Path, executor: Option<&Path>) -> Finding {
    let name = probe.to_possible_value().expect("no probe is skipped");
    let mut command = Command::new(this);
    command.args(["doctor", "--probe", name.get_name()]);
    if let Some(executor) = executor {
        command.arg("--executor").arg(executor);
    }
    if probe == Probe::StaticThreadLocal {
        command.env(farlink::executor::TUNABLES, format!("glibc.rtld.optional_static_tls={}", 2 * STATIC_TLS_BYTES));
    }
    let about = probe.about();
    let outcome = outcome(&mut command);
    let (status, seen, farlink) = match outcome {
        Ok((text, 0)) => (Status::Works, text, about.works),
        Ok((text, _)) | Err(text) => (Status::Fails, text, about.fails),
    };
    Finding { group: about.group, name: about.name, status, seen, farlink: farlink.to_owned() }
}

/// Runs a command to its end, which must not be far: gives what it printed and its exit status, or how it ended
/// otherwise.
pub(super) fn outcome(command: &mut Command) -> Result<(String, i32), String> {
    let name = Path::new(command.get_program()).file_name().unwrap_or(OsStr::new("it")).to_string_lossy().into_owned();
    let mut run = || {
        let (mut read, write) = std::io::pipe()?;
        let command = command.stdin(Stdio::null()).stdout(write.try_clone()?).stderr(write);
        let mut child = command.spawn()?;
        // The command has ends of the pipe until it goes, which is how its end is seen.
        command.stdout(Stdio::null()).stderr(Stdio::null());
        let text = read_in_time(&mut read);
        if text.is_none() {
            child.kill()?;
        }
        Ok((text, child.wait()?))
    };
    let (text, status) = run().map_err(|error: io::Error| format!("{name} cannot be run: {error}"))?;
    let text = text.ok_or_else(|| format!("{name} did not end within {} s", PATIENCE.as_secs()))?;
    match (status.code(), status.signal()) {
        (Some(code), _) => Ok((String::from_utf8_lossy(&text).trim_end().to_owned(), code)),
        (None, signal) => Err(format!("{name} was killed by {}", farlink::signal_name(signal.unwrap_or_default()))),
    }
}

/// Reads to the end, if that comes in time. An error is the end.
fn read_in_time(pipe: &mut PipeReader) -> Option<Vec<u8>> {
    let deadline = Instant::now() + PATIENCE;
    let mut bytes = Vec::new();
    let mut buffer = [0; 4096];
    loop {
        let left = deadline.checked_duration_since(Instant::now())?;
        let left = Timespec { tv_sec: left.as_secs() as i64, tv_nsec: i64::from(left.subsec_nanos()) };
        match poll(&mut [PollFd::new(&*pipe, PollFlags::IN)], Some(&left)) {
            Ok(0) => return None,
            Ok(_) => match pipe.read(&mut buffer) {
                Ok(0) | Err(_) => return Some(bytes),
                Ok(count) => bytes.extend_from_slice(&buffer[..count]),
            },
            Err(rustix::io::Errno::INTR) => {}
            Err(_) => return Some(bytes),
        }
    }
}

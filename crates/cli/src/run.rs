//! `farlink run`: a program of objects, run as if it had been linked natively.

use crate::args::{Address, MemoryArg, RunArgs};
use crate::compile::Language;
use crate::debugger;
use crate::error::Error;
use crate::inputs::{self, Loaded};
use crate::map::Map;
use crate::progress::{self, Progress};
use crate::signals::Signals;
use crate::start::ExitCode;
use crate::stats;
use crate::trace::{self, Trace};
use farlink::{Library, Session, SessionBuilder};
use std::ffi::OsString;
use std::fs::File;
use std::io::Write;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::ExitStatus;
use std::time::{Duration, Instant};

pub(crate) fn run(args: RunArgs) -> Result<ExitCode, Error> {
    let mut clock = Clock::start();
    let signals = Signals::install()?;
    let trace_file = args.trace.as_deref().map(output_file).transpose()?;
    let map_file = args.map.as_ref().map(|(path, _)| output_file(path)).transpose()?;
    let loaded = inputs::load(&args.input, &signals)?;
    clock.lap("load inputs");
    let as_needed = inputs::as_needed(&loaded);
    let (session, loaded) = session(&args, loaded)?;
    clock.lap("start executor");
    let library = session.create_library("main");
    if args.gc_sections || inputs::has_rust_program(&args.input) {
        library.drop_unused();
    }
    let progress = Progress::start(&session);
    let mut watch = Watch { clock, progress, linked: Linked::default() };
    inputs::add(&library, &args.input, loaded)?;
    let mut program = vec![inputs::program_name(&args.input)];
    program.extend(args.args.iter().cloned());
    signals.run((!args.in_process).then_some(&session));
    let mut outcome = link_and_execute(&session, &library, &args, &program, &mut watch);
    let is_undefined = matches!(&outcome, Err(Error::Farlink(farlink::Error::Undefined(_))));
    if is_undefined && inputs::add_needed(&library, &as_needed)? {
        outcome = link_and_execute(&session, &library, &args, &program, &mut watch);
    }
    let outcome = outcome.map_err(|error| explain_entry(error, &args));
    let Watch { mut clock, progress, linked } = watch;
    clock.lap(if clock.has("link") { "run" } else { "link and run" });
    drop(progress);
    signals.ended();
    if args.time {
        clock.print(&library);
    }
    if let (Some((path, mut file)), Some(map)) = (map_file, &linked.map) {
        let written = file.write_all(map.as_bytes());
        written.map_err(|error| Error::Write { path: path.to_owned(), error })?;
    }
    if let (Some((path, file)), Some(trace)) = (trace_file, &linked.trace) {
        let written = trace::write(file, trace, &clock);
        written.map_err(|error| Error::Write { path: path.to_owned(), error })?;
    }
    let status = outcome?;
    if args.in_process {
        // Ends as the program would: what it left for its exit runs, and its streams are flushed.
        std::process::exit(status.code().unwrap_or_default());
    }
    let code = exit_code(status, &session);
    if session.ended().is_some() {
        // Nothing is left to be told that the session ends, and what it holds goes with this process at once.
        std::mem::forget((session, library));
    }
    Ok(code)
}

/// Bytes of thread-local variables that every process has room for.
const USUAL_TLS_BYTES: u64 = 512;

/// Begins the session, and reads the inputs, while the executor starts if one does.
fn session(args: &RunArgs, loaded: Vec<Loaded>) -> Result<(Session, Vec<Loaded>), Error> {
    let needs = inputs::needs(&loaded);
    // The session sees how long each object takes to read, if somebody wants to know.
    let parse = || if args.trace.is_some() { Ok(loaded) } else { inputs::parse(loaded) };
    let (traces, maps) = (args.trace.is_some(), args.map.is_some());
    let builder = Session::builder()
        .low_memory(needs.low_memory)
        .trace(traces)
        .keep_graphs(traces || maps || args.stats.is_some());
    let builder = builder.debug(args.input.debug || args.wait_for_debugger);
    let builder = args.perf.into_iter().fold(builder, |builder, form| builder.perf(form.into()));
    let builder = builder.tell_progress(progress::is_wanted());
    if args.in_process {
        return Ok((builder.in_process()?, parse()?));
    }
    let shares_by_default = !matches!(args.connect, Some(Address::Tcp(_) | Address::Command(_)));
    let default = if shares_by_default { MemoryArg::Shared } else { MemoryArg::Remote };
    let static_tls_bytes = if needs.tls_bytes > USUAL_TLS_BYTES { needs.tls_bytes } else { 0 };
    let builder = builder.memory(args.memory.unwrap_or(default).into()).static_tls_bytes(static_tls_bytes);
    let builder = builder.harden(args.harden || args.sandbox).sandbox(args.sandbox);
    if let Some(address) = &args.connect {
        return Ok((connect(builder, address, args.secret_file.as_deref())?, parse()?));
    }
    let builder = match &args.executor {
        Some(path) => builder.executor(path, Vec::new()),
        // This program is an executor too, so that nothing else needs to be installed.
        None => builder
            .executor(std::env::current_exe().map_err(Error::NoSelf)?, vec![farlink::executor::EXECUTOR_ARG.into()]),
    };
    let (session, parsed) = builder.spawn_while(parse);
    // What is wrong with the inputs is said first: it is what somebody can mend.
    let parsed = parsed.transpose()?;
    Ok((session?, parsed.unwrap_or_default()))
}

/// Talks to an executor that is there, or that a command brings.
fn connect(builder: SessionBuilder, address: &Address, secret_file: Option<&Path>) -> Result<Session, Error> {
    if let (Some(_), Address::Unix(_) | Address::Command(_)) = (secret_file, address) {
        return Err(Error::NeedlessSecret);
    }
    let read = |path: &Path| {
        let bytes = std::fs::read(path);
        bytes.map_err(|error| Error::Secret { path: path.to_owned(), error })
    };
    let secret = secret_file.map(read).transpose()?;
    Ok(match address {
        Address::Unix(path) => builder.connect_unix(path)?,
        Address::Tcp(address) => builder.connect_tcp(address, secret.as_deref().map(<[u8]>::trim_ascii))?,
        Address::Command(command) => builder.spawn_command(command)?,
    })
}

/// Links the program, says what that took if somebody wants to know, and runs it; gives how it ended.
fn link_and_execute(
    session: &Session,
    library: &Library,
    args: &RunArgs,
    program: &[OsString],
    watch: &mut Watch,
) -> Result<ExitStatus, Error> {
    if args.wants_link_first() || watch.progress.is_some() {
        library.link_program(&args.entry, program)?;
        watch.clock.lap("link");
        // The terminal is the program's from here on.
        watch.progress = None;
        watch.linked = look(session, library, args)?;
    }
    execute(library, args, program)
}

/// Makes a file for what will be known later: that it cannot be made is said before the program runs.
fn output_file(path: &Path) -> Result<(&Path, File), Error> {
    let file = File::create(path).map_err(|error| Error::Write { path: path.to_owned(), error })?;
    Ok((path, file))
}

/// What is seen of a run.
struct Watch {
    clock: Clock,
    progress: Option<Progress>,
    linked: Linked,
}

/// What is known of a program that has been linked and does not run yet.
#[derive(Default)]
struct Linked {
    trace: Option<Trace>,
    map: Option<String>,
}

/// Looks at what has been linked, for whatever somebody wants to know.
fn look(session: &Session, library: &Library, args: &RunArgs) -> Result<Linked, Error> {
    let graphs = library.linked_graphs();
    if let Some(format) = args.stats {
        stats::print(&session.stats()?, library, &graphs, format);
    }
    let trace = args.trace.as_ref().map(|_| trace::take(session, args.in_process, &graphs)).transpose()?;
    let map = args
        .map
        .as_ref()
        .map(|&(_, format)| Ok::<_, farlink::Error>(Map::new(session, library, &graphs)?.write(format)));
    if args.wait_for_debugger {
        debugger::wait(session.process_id())?;
    }
    Ok(Linked { trace, map: map.transpose()? })
}

/// Runs the program; gives how it ended.
fn execute(library: &Library, args: &RunArgs, program: &[OsString]) -> Result<ExitStatus, Error> {
    let outcome = if args.in_process {
        farlink::executor::restore_default_signals();
        let status = library.run_as_main(&args.entry, program);
        status.map(|status| ExitStatus::from_raw((status & 0xff) << 8))
    } else {
        library.run_program(&args.entry, program)
    };
    Ok(outcome?)
}

/// Says how to write the entry if it is what is missing.
fn explain_entry(error: Error, args: &RunArgs) -> Error {
    let entry = &args.entry;
    let is_entry = |symbol: &farlink::UndefinedSymbol| symbol.name == *entry && symbol.users.is_empty();
    match &error {
        Error::Farlink(farlink::Error::Undefined(symbols)) if symbols.iter().any(is_entry) => {
            let is_rust = |path: &std::path::PathBuf| Language::of(path) == Some(Language::Rust);
            let hint = if args.input.inputs.iter().any(is_rust) {
                "; a Rust source without a `main` of its own defines it as `#[unsafe(no_mangle)] pub extern \"C\" fn`"
            } else {
                "; name another entry with --entry"
            };
            Error::NoEntry(format!("{error}\nno input defines the entry {entry}{hint}"))
        }
        _ => error,
    }
}

/// Returns the exit status of a program that has ended as a shell would, and says so if a signal ended it.
fn exit_code(status: ExitStatus, session: &Session) -> ExitCode {
    let code = match (status.code(), status.signal()) {
        (Some(code), _) => code,
        (None, Some(signal)) => {
            match session.death() {
                Some(death) => eprintln!("farlink: the program {}", death.report()),
                None => eprintln!("farlink: the program was killed by {}", farlink::signal_name(signal)),
            }
            128 + signal
        }
        (None, None) => unreachable!("a process that was waited for exited or was killed"),
    };
    // An exit status has eight bits.
    ExitCode::from(code as u8)
}

/// How long the parts of a run took.
pub(crate) struct Clock {
    started: u64,
    last: Instant,
    laps: Vec<(&'static str, Duration)>,
}

impl Clock {
    fn start() -> Self {
        Self { started: farlink::trace_now(), last: Instant::now(), laps: Vec::new() }
    }

    fn has(&self, name: &str) -> bool {
        self.laps.iter().any(|&(lap, _)| lap == name)
    }

    /// Returns when the run began, as the spans of a trace have it.
    pub(crate) fn started(&self) -> u64 {
        self.started
    }

    /// Returns when each part began and ended.
    pub(crate) fn spans(&self) -> impl Iterator<Item = (&'static str, (u64, u64))> {
        self.laps.iter().scan(self.started, |start, &(name, time)| {
            let span = (*start, *start + time.as_nanos() as u64);
            *start = span.1;
            Some((name, span))
        })
    }

    fn lap(&mut self, name: &'static str) {
        let now = Instant::now();
        self.laps.push((name, now - self.last));
        self.last = now;
    }

    fn print(&self, library: &Library) {
        let row = |name: &str, time: Duration| eprintln!("{name:<20} {:>12.3} ms", time.as_secs_f64() * 1e3);
        for &(name, time) in &self.laps {
            row(name, time);
        }
        for (name, time) in library.phase_times().phases() {
            row(&format!("  {name}"), time);
        }
    }
}

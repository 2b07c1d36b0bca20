//! What Ctrl-C and its like do, in each state of the command.
//!
//! | state | a signal that ends programs |
//! | --- | --- |
//! | compiling | ends the compiler, removes what it has written, and ends this process |
//! | linking | ends this process; the executor sees its connection end and ends too |
//! | running, own process | goes to the program, if the terminal has not sent it there already; this process ends with the program's status |
//! | running, in-process | does what it does to any program; the program may handle it |

use crate::error::Error;
use farlink::Session;
use signal_hook::consts::{SIGHUP, SIGINT, SIGQUIT, SIGTERM};
use signal_hook::iterator::SignalsInfo;
use signal_hook::iterator::exfiltrator::origin::{Origin, WithOrigin};
use std::process::{Child, ExitStatus};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;
use tempfile::TempDir;

/// Signals that end a program which does not handle them, and that a person or a service manager sends.
const ENDING: [i32; 4] = [SIGHUP, SIGINT, SIGQUIT, SIGTERM];

#[derive(Default)]
enum State {
    /// Compiling or linking: nothing but this process is to be ended.
    #[default]
    Preparing,
    Running(Session),
    InProcess,
}

#[derive(Default)]
struct Shared {
    state: State,
    folder: Option<Arc<TempDir>>,
    compiler: Option<u32>,
}

/// The handling of signals, from its installation to the end of the process.
pub(crate) struct Signals(Arc<Mutex<Shared>>);

fn lock(shared: &Mutex<Shared>) -> MutexGuard<'_, Shared> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Signals {
    pub(crate) fn install() -> Result<Self, Error> {
        let shared = Arc::<Mutex<Shared>>::default();
        let mut signals = SignalsInfo::<WithOrigin>::new(ENDING).map_err(Error::Signals)?;
        let theirs = Arc::clone(&shared);
        let handler = move || {
            for origin in &mut signals {
                handle(&mut lock(&theirs), &origin);
            }
        };
        thread::Builder::new().name("farlink-signals".to_owned()).spawn(handler).map_err(Error::Signals)?;
        Ok(Self(shared))
    }

    /// Returns a folder that is removed when the last handle on it goes, or a signal ends this process.
    pub(crate) fn temporary_folder(&self) -> Result<Folder<'_>, Error> {
        let folder = Arc::new(TempDir::with_prefix("farlink-").map_err(Error::TempDir)?);
        lock(&self.0).folder = Some(Arc::clone(&folder));
        Ok(Folder { folder, signals: self })
    }

    /// Waits for a compiler, which a signal to this process ends too.
    pub(crate) fn wait_compiler(&self, child: &mut Child) -> std::io::Result<ExitStatus> {
        lock(&self.0).compiler = Some(child.id());
        let status = loop {
            // The lock is held while the child is reaped, so that its id is not signalled afterwards.
            let mut shared = lock(&self.0);
            if let Some(status) = child.try_wait()? {
                shared.compiler = None;
                break status;
            }
            drop(shared);
            thread::sleep(Duration::from_millis(1));
        };
        Ok(status)
    }

    /// From now on signals are the program's.
    pub(crate) fn run(&self, session: Option<&Session>) {
        lock(&self.0).state = session.map_or(State::InProcess, |session| State::Running(session.clone()));
    }

    /// The program has ended; its session may go.
    pub(crate) fn ended(&self) {
        lock(&self.0).state = State::Preparing;
    }
}

fn handle(shared: &mut Shared, origin: &Origin) {
    match &shared.state {
        State::Preparing => {
            if let Some(pid) = shared.compiler.and_then(pid) {
                let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
            }
            if let Some(folder) = &shared.folder {
                let _ = std::fs::remove_dir_all(folder.path());
            }
            std::process::exit(128 + origin.signal);
        }
        State::Running(session) => {
            // A signal from the terminal has gone to the whole foreground group, the program included.
            if let (Some(_), Some(signal)) = (&origin.process, rustix::process::Signal::from_named_raw(origin.signal)) {
                session.signal(signal);
            }
        }
        State::InProcess => {
            let _ = signal_hook::low_level::emulate_default_handler(origin.signal);
        }
    }
}

fn pid(id: u32) -> Option<rustix::process::Pid> {
    rustix::process::Pid::from_raw(i32::try_from(id).ok()?)
}

/// A temporary folder.
pub(crate) struct Folder<'a> {
    folder: Arc<TempDir>,
    signals: &'a Signals,
}

impl Folder<'_> {
    pub(crate) fn path(&self) -> &std::path::Path {
        self.folder.path()
    }
}

impl Drop for Folder<'_> {
    fn drop(&mut self) {
        // The folder itself goes with the last handle, which is this one.
        lock(&self.signals.0).folder = None;
    }
}

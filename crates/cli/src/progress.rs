//! How far a link is, on a terminal, once it has taken longer than a moment.

use farlink::Session;
use std::io::{IsTerminal, Write};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

/// Links that take no longer show nothing.
const MOMENT: Duration = Duration::from_millis(500);

/// How often what is shown is brought up to date.
const STEP: Duration = Duration::from_millis(80);

/// What turns while a link goes on.
const SPINNER: [char; 4] = ['|', '/', '-', '\\'];

/// Moves to the beginning of the line and clears it.
const CLEAR_LINE: &str = "\r\x1b[2K";

/// Whether progress is shown: somebody is there to see it.
pub(crate) fn is_wanted() -> bool {
    std::io::stderr().is_terminal() && std::env::var_os("TERM").is_none_or(|name| name != "dumb")
}

/// Prints to the terminal. Nobody is told if that fails.
fn show(text: &str) {
    let mut stderr = std::io::stderr().lock();
    let _ = stderr.write_all(text.as_bytes()).and_then(|()| stderr.flush());
}

/// Shows how far a session's link is until this is dropped. Then nothing of it is left on the terminal.
pub(crate) struct Progress {
    /// Dropping it ends the thread.
    stop: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Progress {
    /// Starts to watch, if progress is wanted.
    pub(crate) fn start(session: &Session) -> Option<Self> {
        if !is_wanted() {
            return None;
        }
        let (stop, stopped) = channel();
        let session = session.clone();
        let begun = Instant::now();
        let watch = move || {
            if stopped.recv_timeout(MOMENT) != Err(RecvTimeoutError::Timeout) {
                return;
            }
            for spinner in SPINNER.into_iter().cycle() {
                let about = session.progress().map_or(String::new(), |progress| match progress.objects {
                    0 => progress.phase.to_owned(),
                    objects => format!("{}, {objects} objects", progress.phase),
                });
                show(&format!("{CLEAR_LINE}{spinner} linking, {}s: {about}", begun.elapsed().as_secs()));
                if stopped.recv_timeout(STEP) != Err(RecvTimeoutError::Timeout) {
                    break;
                }
            }
            show(CLEAR_LINE);
        };
        // Without the thread there is no progress to be seen, and nothing else is missing.
        let thread = thread::Builder::new().name("farlink-progress".to_owned()).spawn(watch).ok();
        Some(Self { stop: Some(stop), thread })
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.stop.take();
        if let Some(thread) = self.thread.take() {
            // Had it panicked, that would have been said.
            let _ = thread.join();
        }
    }
}

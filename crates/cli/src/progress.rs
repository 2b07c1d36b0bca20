//! How far a link is, on a terminal, once it has taken longer than a moment.

use farlink::Session;
use indicatif::{ProgressBar, ProgressStyle};
use std::io::IsTerminal;
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread::{self, JoinHandle};
use std::time::Duration;

/// Links that take no longer show nothing.
const MOMENT: Duration = Duration::from_millis(500);

/// How often what is shown is brought up to date.
const STEP: Duration = Duration::from_millis(80);

/// Whether progress is shown: somebody is there to see it.
pub(crate) fn is_wanted() -> bool {
    std::io::stderr().is_terminal() && std::env::var_os("TERM").is_none_or(|name| name != "dumb")
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
        let show = move || {
            if stopped.recv_timeout(MOMENT) != Err(RecvTimeoutError::Timeout) {
                return;
            }
            let bar = ProgressBar::new_spinner();
            if let Ok(style) = ProgressStyle::with_template("{spinner} linking, {elapsed}: {msg}") {
                bar.set_style(style);
            }
            while stopped.recv_timeout(STEP) == Err(RecvTimeoutError::Timeout) {
                if let Some(progress) = session.progress() {
                    bar.set_message(match progress.objects {
                        0 => progress.phase.to_owned(),
                        objects => format!("{}, {objects} objects", progress.phase),
                    });
                }
                bar.tick();
            }
            bar.finish_and_clear();
        };
        // Without the thread there is no progress to be seen, and nothing else is missing.
        let thread = thread::Builder::new().name("farlink-progress".to_owned()).spawn(show).ok();
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

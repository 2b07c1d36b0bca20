//! The executor's process, when it is a child of this one.
//!
//! A thread of its own waits for the child, so its end is noticed even while something else holds the other end of
//! the connection (a child that linked code forked, for example), and no zombie is left.

#![allow(unsafe_code)]

use crate::Error;
use crate::error::describe_status;
use farlink_rpc::{Disconnected, Endpoint, Handler, Options, Transport, connect};
use farlink_wire::setup::ExecutorInfo;
use rustix::process::{Pid, Signal, WaitId, WaitIdOptions, kill_process, waitid};
use std::ffi::OsString;
use std::os::fd::AsRawFd;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::sync_channel;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

/// How long an executor that was told to end may take before it is killed.
const END_GRACE: Duration = Duration::from_secs(5);

/// A program that speaks the executor's side of the protocol, and its arguments.
#[derive(Clone, Debug)]
pub(crate) struct Program {
    pub(crate) path: PathBuf,
    pub(crate) args: Vec<OsString>,
    /// Bytes of thread-local variables at one distance from every thread's pointer that linked code may have, besides those
    /// that the C library has room for anyway.
    pub(crate) static_tls_bytes: u64,
}

/// Has the executor's C library keep room for thread-local variables. The executor gives its program the environment as it
/// was: the old value goes along.
fn reserve_static_tls(command: &mut Command, bytes: u64) {
    const NAME: &str = "glibc.rtld.optional_static_tls";
    let old = std::env::var_os(farlink_executor::TUNABLES).unwrap_or_default();
    if old.to_string_lossy().contains(NAME) {
        return;
    }
    let mut new = old.clone();
    if !new.is_empty() {
        new.push(":");
    }
    new.push(format!("{NAME}={bytes}"));
    command.env(farlink_executor::TUNABLES, new).env(farlink_executor::OLD_TUNABLES, old);
}

impl Program {
    /// Finds `farlink-executor`: in `FARLINK_EXECUTOR`, beside this program, or in `PATH`.
    pub(crate) fn find() -> Result<Self, Error> {
        const NAME: &str = "farlink-executor";
        let named = std::env::var_os("FARLINK_EXECUTOR").map(PathBuf::from);
        let beside = std::env::current_exe().ok().map(|exe| exe.with_file_name(NAME)).filter(|path| path.is_file());
        let in_path = || {
            let path = std::env::var_os("PATH")?;
            std::env::split_paths(&path).map(|dir| dir.join(NAME)).find(|path| path.is_file())
        };
        let path = named.or(beside).or_else(in_path).ok_or(Error::NoExecutor)?;
        Ok(Self { path, args: Vec::new(), static_tls_bytes: 0 })
    }
}

/// A running executor. Dropping it ends it.
pub(crate) struct Process {
    pid: Pid,
    endpoint: Endpoint,
    watch: Arc<Watch>,
}

struct Watch {
    status: Mutex<Option<ExitStatus>>,
    ended: Condvar,
}

impl Watch {
    fn lock(&self) -> MutexGuard<'_, Option<ExitStatus>> {
        // Nothing that can panic runs under this lock.
        self.status.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for the child's end, then reaps it.
    fn run(&self, mut child: Child, pid: Pid) -> String {
        // The child stays a zombie until it is reaped under the lock: until then its id cannot be another's.
        let wait = || waitid(WaitId::Pid(pid), WaitIdOptions::EXITED | WaitIdOptions::NOWAIT);
        while wait().is_err_and(|error| error == rustix::io::Errno::INTR) {}
        let mut status = self.lock();
        let how = match child.wait() {
            Ok(ended) => {
                *status = Some(ended);
                describe_status(ended)
            }
            Err(error) => format!("cannot be waited for: {error}"),
        };
        self.ended.notify_all();
        how
    }

    fn wait_timeout(&self, timeout: Duration) -> Option<ExitStatus> {
        let status = self.lock();
        let waited = self.ended.wait_timeout_while(status, timeout, |status| status.is_none());
        *waited.unwrap_or_else(PoisonError::into_inner).0
    }

    /// Sends `signal` unless the process has been reaped.
    fn signal(&self, pid: Pid, signal: Signal) {
        let status = self.lock();
        if status.is_none() {
            // A process that has ended but is not reaped yet accepts any signal.
            let _ = kill_process(pid, signal);
        }
    }
}

impl Process {
    /// Starts `program` and waits until it has introduced itself.
    pub(crate) fn start(
        program: &Program,
        handler: Arc<dyn Handler>,
        options: Options,
    ) -> Result<(Self, ExecutorInfo), Error> {
        let (ours, theirs) = rustix::net::socketpair(
            rustix::net::AddressFamily::UNIX,
            rustix::net::SocketType::STREAM,
            rustix::net::SocketFlags::CLOEXEC,
            None,
        )
        .map_err(|error| Error::Connect(Arc::new(error.into())))?;
        let number = theirs.as_raw_fd();
        let mut command = Command::new(&program.path);
        // LLVM's executors take the first argument that is theirs and ignore the rest.
        command.args(&program.args).arg(format!("filedescs={number},{number}")).arg("--farlink");
        if program.static_tls_bytes > 0 {
            reserve_static_tls(&mut command, program.static_tls_bytes);
        }
        // SAFETY: the closure runs between fork and exec and makes one system call, fcntl, which is safe there.
        unsafe {
            command.pre_exec(move || Ok(rustix::io::fcntl_setfd(&theirs, rustix::io::FdFlags::empty())?));
        }
        let child =
            command.spawn().map_err(|error| Error::Spawn { program: program.path.clone(), error: Arc::new(error) })?;
        // The command owns the executor's end of the connection. It must be closed here, or its end is never seen.
        drop(command);
        Self::watch(child, Transport::from_socket(ours), &program.path.display().to_string(), handler, options)
    }

    /// Runs a shell command that is an executor on its standard streams, and waits until it has introduced itself.
    pub(crate) fn start_command(
        command: &str,
        handler: Arc<dyn Handler>,
        options: Options,
    ) -> Result<(Self, ExecutorInfo), Error> {
        let failed = |error| Error::Spawn { program: command.into(), error: Arc::new(error) };
        let mut shell = Command::new("/bin/sh");
        let shell = shell.arg("-c").arg(command).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = shell.spawn().map_err(failed)?;
        let streams = child.stdout.take().zip(child.stdin.take());
        let (read, write) = streams.ok_or_else(|| failed(std::io::ErrorKind::BrokenPipe.into()))?;
        Self::watch(child, Transport::from_fds(read.into(), write.into()), command, handler, options)
    }

    fn watch(
        mut child: Child,
        transport: std::io::Result<Transport>,
        name: &str,
        handler: Arc<dyn Handler>,
        options: Options,
    ) -> Result<(Self, ExecutorInfo), Error> {
        let pid = Pid::from_child(&child);
        let connected = transport.map_err(|error| Error::Connect(Arc::new(error))).and_then(|transport| {
            let setup_error = |error| Error::Setup { executor: name.to_owned(), error, how: None };
            connect(transport, handler, options).map_err(setup_error)
        });
        let (endpoint, info) = match connected {
            Ok(connected) => connected,
            Err(error) => return Err(end_failed(&mut child, error)),
        };
        let watch = Arc::new(Watch { status: Mutex::new(None), ended: Condvar::new() });
        let (watcher, watched) = (Arc::clone(&watch), endpoint.clone());
        // The child is handed over when the thread is there: one that cannot be started would lose it.
        let (hand_over, handed_over) = sync_channel(1);
        let started = thread::Builder::new().name("farlink-watch".to_owned()).spawn(move || {
            if let Ok(child) = handed_over.recv() {
                let how = watcher.run(child, pid);
                watched.close(Disconnected::ProcessEnded(format!("the executor {how}")));
            }
        });
        if let Err(error) = started {
            return Err(end_failed(&mut child, Error::Connect(Arc::new(error))));
        }
        // There is room for one, and the thread waits for it.
        let _ = hand_over.send(child);
        Ok((Self { pid, endpoint, watch }, info))
    }

    pub(crate) fn endpoint(&self) -> &Endpoint {
        &self.endpoint
    }

    pub(crate) fn id(&self) -> Pid {
        self.pid
    }

    /// Waits until the process has ended.
    pub(crate) fn wait(&self) -> ExitStatus {
        loop {
            if let Some(status) = self.watch.wait_timeout(Duration::from_secs(3600)) {
                return status;
            }
        }
    }

    /// Returns how the process ended, if it does within a moment: the connection's end is seen before the
    /// process's.
    pub(crate) fn ended_soon(&self) -> Option<ExitStatus> {
        self.watch.wait_timeout(Duration::from_secs(1))
    }

    /// Sends a signal to the process.
    pub(crate) fn signal(&self, signal: Signal) {
        self.watch.signal(self.pid, signal);
    }
}

/// Ends a child that no session came about with, and says how it ended if it had by itself.
fn end_failed(child: &mut Child, mut error: Error) -> Error {
    // A program that is no executor usually ends at once; one that hangs is killed.
    for _ in 0..20 {
        match child.try_wait() {
            Ok(None) => thread::sleep(Duration::from_millis(10)),
            Ok(Some(status)) => {
                if let Error::Setup { how, .. } = &mut error {
                    *how = Some(describe_status(status));
                }
                return error;
            }
            Err(_) => break,
        }
    }
    let _ = child.kill();
    let _ = child.wait();
    error
}

impl Drop for Process {
    fn drop(&mut self) {
        self.endpoint.hang_up(Ok(()));
        if self.watch.wait_timeout(END_GRACE).is_none() {
            self.watch.signal(self.pid, Signal::KILL);
            self.watch.wait_timeout(END_GRACE);
        }
    }
}

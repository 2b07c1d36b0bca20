//! The executor's process, when it is a child of this one.
//!
//! A thread of its own waits for the child, so its end is noticed even while something else holds the other end of
//! the connection (a child that linked code forked, for example), and no zombie is left.

use crate::Error;
use crate::child::Child;
use crate::error::describe_status;
use farlink_rpc::{Disconnected, Endpoint, Handler, Options, Transport, connect};
use farlink_wire::setup::ExecutorInfo;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use rustix::process::{Pid, Signal, WaitId, WaitIdOptions, kill_process, waitid};
use std::ffi::OsString;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::path::PathBuf;
use std::process::{Command, ExitStatus, Stdio};
use std::sync::mpsc::{SyncSender, sync_channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

/// How long an executor that was told to end may take before it is killed.
pub(crate) const END_GRACE: Duration = Duration::from_secs(5);

/// What the executor program is called.
const NAME: &str = "farlink-executor";

/// A program that speaks the executor's side of the protocol, and its arguments.
#[derive(Clone, Debug)]
pub(crate) struct Program {
    pub(crate) path: PathBuf,
    pub(crate) args: Vec<OsString>,
    /// Bytes of thread-local variables at one distance from every thread's pointer that linked code may have, besides those
    /// that the C library has room for anyway.
    pub(crate) static_tls_bytes: u64,
    /// Whether it is to be locked, for which it has to be ready from its start.
    pub(crate) is_hardened: bool,
}

/// Returns what the environment has to say so that the executor's C library keeps room for thread-local variables. The
/// executor gives its program the environment as it was: the old value goes along.
fn static_tls_environment(bytes: u64) -> Vec<(&'static str, OsString)> {
    const NAME: &str = "glibc.rtld.optional_static_tls";
    let old = std::env::var_os(farlink_executor::TUNABLES).unwrap_or_default();
    if bytes == 0 || old.to_string_lossy().contains(NAME) {
        return Vec::new();
    }
    let mut new = old.clone();
    if !new.is_empty() {
        new.push(":");
    }
    new.push(format!("{NAME}={bytes}"));
    vec![(farlink_executor::TUNABLES, new), (farlink_executor::OLD_TUNABLES, old)]
}

impl Program {
    /// Finds an executor: what `FARLINK_EXECUTOR` names, this program if it can be one, or `farlink-executor` beside this
    /// program or in `PATH`.
    pub(crate) fn find() -> Result<Self, Error> {
        let named = std::env::var_os("FARLINK_EXECUTOR").map(PathBuf::from);
        if named.is_none() && farlink_executor::can_be_started_again() {
            return Ok(Self::this_one());
        }
        let beside = std::env::current_exe().ok().map(|exe| exe.with_file_name(NAME)).filter(|path| path.is_file());
        let in_path = || {
            let path = std::env::var_os("PATH")?;
            std::env::split_paths(&path).map(|dir| dir.join(NAME)).find(|path| path.is_file())
        };
        let path = named.or(beside).or_else(in_path).ok_or(Error::NoExecutor)?;
        Ok(Self { path, args: Vec::new(), static_tls_bytes: 0, is_hardened: false })
    }

    /// Returns this program, started again.
    pub(crate) fn this_one() -> Self {
        const RUNNING: &str = "/proc/self/exe";
        // By its name, which the process then has, if that still leads to what is running.
        let is_running = |path: &PathBuf| {
            let of_both = rustix::fs::stat(path).and_then(|named| Ok((named, rustix::fs::stat(RUNNING)?)));
            of_both.is_ok_and(|(named, running)| (named.st_dev, named.st_ino) == (running.st_dev, running.st_ino))
        };
        let path = std::env::current_exe().ok().filter(is_running).unwrap_or_else(|| RUNNING.into());
        Self { path, args: vec![farlink_executor::EXECUTOR_ARG.into()], static_tls_bytes: 0, is_hardened: false }
    }

    /// Whether it is known to be farlink's executor, and no other's.
    fn is_own(&self) -> bool {
        self.args.first().is_some_and(|arg| arg == farlink_executor::EXECUTOR_ARG)
            || self.path.file_name().is_some_and(|name| name == NAME)
    }

    /// Starts the program with `socket` as its connection, the memory of a ring if there is one, and with these arguments
    /// after that.
    pub(crate) fn start(&self, socket: OwnedFd, ring: Option<OwnedFd>, args: &[&str]) -> Result<Child, Error> {
        let number = socket.as_raw_fd();
        let inherited: Vec<RawFd> = [&socket].into_iter().chain(&ring).map(AsRawFd::as_raw_fd).collect();
        // LLVM's executors take the first argument that is theirs and ignore the rest.
        let connection = OsString::from(format!("filedescs={number},{number}"));
        let harden: &[&str] = if self.is_hardened { &["--harden"] } else { &[] };
        let ring = ring.as_ref().map(|ring| ["--ring".into(), ring.as_raw_fd().to_string().into()]);
        let own = ["--farlink"].iter().chain(args).chain(harden).map(OsString::from).chain(ring.into_iter().flatten());
        let args: Vec<OsString> = self.args.iter().cloned().chain([connection]).chain(own).collect();
        let environment = static_tls_environment(self.static_tls_bytes);
        // The executor's end of the connection is closed here, or its end would never be seen.
        Child::spawn(self, &args, &environment, &inherited)
            .map_err(|error| Error::Spawn { program: self.path.clone(), error: Arc::new(error) })
    }
}

/// Makes two sockets that are connected. Both are closed in children.
pub(crate) fn socket_pair(kind: SocketType) -> Result<(OwnedFd, OwnedFd), Error> {
    socketpair(AddressFamily::UNIX, kind, SocketFlags::CLOEXEC, None)
        .map_err(|error| Error::Connect(Arc::new(error.into())))
}

/// A running executor. Dropping it ends it.
pub(crate) struct Process {
    pid: Pid,
    endpoint: Endpoint,
    watch: Arc<Watch>,
}

/// How a child ended. None if nobody is told, since this process ignores SIGCHLD: the system reaps its children by itself.
pub(crate) type End = Option<ExitStatus>;

/// What is known of a child's end. A thread of its own waits for that.
pub(crate) struct Watch {
    status: Mutex<Option<End>>,
    ended: Condvar,
}

/// The way of a child, and what belongs to it, to the thread that waits for its end.
pub(crate) type HandOver<T> = SyncSender<(Child, T)>;

impl Watch {
    /// Starts the thread, which waits for the child that it is handed over, and then calls `at_end` with what came along
    /// and how the child ended. A child that no thread can be had for is not lost.
    pub(crate) fn start<T: Send + 'static>(
        at_end: impl FnOnce(T, String) + Send + 'static,
    ) -> std::io::Result<(Arc<Self>, HandOver<T>)> {
        let watch = Arc::new(Self { status: Mutex::new(None), ended: Condvar::new() });
        // There is room for one, so handing over does not wait.
        let (hand_over, handed_over) = sync_channel::<(Child, T)>(1);
        let watcher = Arc::clone(&watch);
        thread::Builder::new().name("farlink-watch".to_owned()).spawn(move || {
            if let Ok((child, along)) = handed_over.recv() {
                at_end(along, watcher.run(&child));
            }
        })?;
        Ok((watch, hand_over))
    }

    /// Returns whether the child has been reaped: its id may be another's.
    pub(crate) fn has_ended(&self) -> bool {
        self.lock().is_some()
    }

    fn lock(&self) -> MutexGuard<'_, Option<End>> {
        // Nothing that can panic runs under this lock.
        self.status.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for the child's end, then reaps it.
    fn run(&self, child: &Child) -> String {
        // The child stays a zombie until it is reaped under the lock: until then its id cannot be another's.
        let wait = || waitid(WaitId::Pid(child.0), WaitIdOptions::EXITED | WaitIdOptions::NOWAIT);
        while wait().is_err_and(|error| error == rustix::io::Errno::INTR) {}
        let mut status = self.lock();
        let how = match child.wait() {
            Ok(ended) => {
                *status = Some(Some(ended));
                describe_status(ended)
            }
            Err(error) => {
                *status = Some(None);
                format!("has ended, and cannot be waited for: {error}; is SIGCHLD ignored?")
            }
        };
        self.ended.notify_all();
        how
    }

    /// Waits for the end, which may not come in time.
    pub(crate) fn wait_timeout(&self, timeout: Duration) -> Option<End> {
        let status = self.lock();
        let waited = self.ended.wait_timeout_while(status, timeout, |status| status.is_none());
        *waited.unwrap_or_else(PoisonError::into_inner).0
    }

    /// Sends `signal` unless the process has been reaped.
    pub(crate) fn signal(&self, pid: Pid, signal: Signal) {
        let status = self.lock();
        if status.is_none() {
            // A process that has ended but is not reaped yet accepts any signal.
            let _ = kill_process(pid, signal);
        }
    }
}

impl Process {
    /// Starts `program` and waits until it has introduced itself, doing `work` meanwhile.
    pub(crate) fn start(
        program: &Program,
        handler: Arc<dyn Handler>,
        options: Options,
        work: impl FnOnce(),
    ) -> Result<(Self, ExecutorInfo), Error> {
        let (ours, theirs) = socket_pair(SocketType::STREAM)?;
        let mut transport = Transport::from_socket(ours).map_err(|error| Error::Connect(Arc::new(error)))?;
        // Without one, or if it is not wanted, the session goes on over the socket.
        let offers_ring = options.shared_ring && program.is_own();
        let ring = offers_ring.then(|| transport.offer_ring().ok()).flatten();
        let child = program.start(theirs, ring, &[])?;
        Self::watch(child, Ok(transport), &program.path.display().to_string(), handler, options, work)
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
        // Dropping the shell's handle neither ends it nor waits for it.
        let child = Child(Pid::from_child(&child));
        Self::watch(child, Transport::from_fds(read.into(), write.into()), command, handler, options, || {})
    }

    /// Waits until a child has introduced itself over `transport`, doing `work` meanwhile. From then on it is watched.
    pub(crate) fn watch(
        child: Child,
        transport: std::io::Result<Transport>,
        name: &str,
        handler: Arc<dyn Handler>,
        options: Options,
        work: impl FnOnce(),
    ) -> Result<(Self, ExecutorInfo), Error> {
        let pid = child.0;
        // The thread starts while the child does. It gets the child when there is something to close.
        let started = Watch::start(|watched: Endpoint, how| {
            watched.close(Disconnected::ProcessEnded(format!("the executor {how}")));
        });
        // A child whose connection goes ends by itself.
        work();
        let connect_error = |error| Error::Connect(Arc::new(error));
        let connected = started.and_then(|started| Ok((started, transport?))).map_err(connect_error);
        let connected = connected.and_then(|(started, transport)| {
            let setup_error = |error| Error::Setup { executor: name.to_owned(), error, how: None };
            Ok((started, connect(transport, handler, options).map_err(setup_error)?))
        });
        let ((watch, hand_over), (endpoint, info)) = match connected {
            Ok(connected) => connected,
            Err(error) => return Err(end_failed(&child, error)),
        };
        // The thread waits for it.
        let _ = hand_over.send((child, endpoint.clone()));
        Ok((Self { pid, endpoint, watch }, info))
    }

    pub(crate) fn endpoint(&self) -> &Endpoint {
        &self.endpoint
    }

    pub(crate) fn id(&self) -> Pid {
        self.pid
    }

    pub(crate) fn watched(&self) -> &Arc<Watch> {
        &self.watch
    }

    /// Waits until the process has ended.
    pub(crate) fn wait(&self) -> End {
        loop {
            if let Some(status) = self.watch.wait_timeout(Duration::from_secs(3600)) {
                return status;
            }
        }
    }

    /// Returns how the process ended, if it does within a moment: the connection's end is seen before the
    /// process's.
    pub(crate) fn ended_soon(&self) -> Option<ExitStatus> {
        self.watch.wait_timeout(Duration::from_secs(1)).flatten()
    }

    /// Returns how the process ended, if it has.
    pub(crate) fn ended(&self) -> Option<ExitStatus> {
        self.watch.wait_timeout(Duration::ZERO).flatten()
    }

    /// Sends a signal to the process.
    pub(crate) fn signal(&self, signal: Signal) {
        self.watch.signal(self.pid, signal);
    }
}

/// Ends a child that no session came about with, and says how it ended if it had by itself.
fn end_failed(child: &Child, mut error: Error) -> Error {
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
    child.kill();
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

//! A real executor in a process of its own, and this process as one, for the tests.

#![allow(dead_code, reason = "each test file uses its part")]

use farlink_addr::ExecutorAddr;
use farlink_rpc::{Endpoint, Executor, Handler, Options, Transport, connect};
use std::fs;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

/// Longer than anything here takes on a busy machine.
pub(crate) const DEADLINE: Duration = Duration::from_secs(30);

pub(crate) struct NoCallbacks;

impl Handler for NoCallbacks {
    fn call(&self, function: ExecutorAddr, _args: Vec<u8>) -> Result<Vec<u8>, String> {
        Err(format!("no function {function}"))
    }
}

/// Starts the executor program with one end of a socket pair; gives the other end.
pub(crate) fn start(extra: &[&str]) -> (Child, UnixStream) {
    // While the child's end may be inherited, no other test may start a process.
    static SPAWN: Mutex<()> = Mutex::new(());
    let _guard = SPAWN.lock().unwrap();
    let (ours, theirs) = UnixStream::pair().unwrap();
    rustix::io::fcntl_setfd(&theirs, rustix::io::FdFlags::empty()).unwrap();
    let number = theirs.as_raw_fd();
    let child = Command::new(env!("CARGO_BIN_EXE_farlink-executor"))
        .arg(format!("filedescs={number},{number}"))
        .args(extra)
        .stdin(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    (child, ours)
}

/// An executor in a process of its own.
pub(crate) struct Process {
    pub(crate) child: Child,
    pub(crate) endpoint: Endpoint,
    pub(crate) executor: Executor,
}

impl Process {
    pub(crate) fn spawn() -> Self {
        let (child, socket) = start(&["--farlink"]);
        let transport = Transport::from_socket(socket.into()).unwrap();
        let options = Options { out_of_band_results: true, ..Options::default() };
        let (endpoint, info) = connect(transport, Arc::new(NoCallbacks), options).unwrap();
        let executor = Executor::new(info, Arc::new(endpoint.clone())).unwrap();
        Self { child, endpoint, executor }
    }

    /// Ends the session in order and checks that the process ends well and leaves no shared memory.
    pub(crate) fn end(mut self) {
        self.endpoint.hang_up(Ok(()));
        assert_eq!(wait(&mut self.child).code(), Some(0));
        assert_eq!(names_of(self.child.id()), Vec::<String>::new());
    }
}

/// Waits for the end of a process.
pub(crate) fn wait(child: &mut Child) -> ExitStatus {
    let start = Instant::now();
    while start.elapsed() < DEADLINE {
        if let Some(status) = child.try_wait().unwrap() {
            return status;
        }
        thread::sleep(Duration::from_millis(2));
    }
    let _ = child.kill();
    panic!("the executor did not end");
}

/// The shared memory objects that the process with this id made and that are still there.
pub(crate) fn names_of(pid: u32) -> Vec<String> {
    let prefix = format!("farlink_{pid}_");
    let names = fs::read_dir("/dev/shm").unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    names.filter(|name| name.starts_with(&prefix)).collect()
}

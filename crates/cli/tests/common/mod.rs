//! Runs the `farlink` command as a person would, and checks after each run that it left nothing behind: no process,
//! no name in /dev/shm, no temporary file.

#![allow(dead_code, reason = "each test file uses its part")]

use std::collections::HashSet;
use std::ffi::OsStr;
use std::fs;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// Longer than anything here takes on a busy machine.
const DEADLINE: Duration = Duration::from_secs(120);

/// How long what a run started may take to go after the run's end.
const GRACE: Duration = Duration::from_secs(10);

/// Ways to run a program, each of which has to give the same results.
pub(crate) const WAYS: [&[&str]; 4] = [&[], &["--memory", "posix"], &["--memory", "remote"], &["--in-process"]];

/// Ways to run a program in LLVM's executors, as far as they are installed.
pub(crate) fn ways_of_llvm(test: &str) -> Vec<Vec<String>> {
    let mut ways = Vec::new();
    for version in [19, 22] {
        let executor = format!("/usr/lib/llvm-{version}/bin/llvm-jitlink-executor");
        if available(test, &executor) {
            let way = |memory: &str| ["--executor", &executor, "--memory", memory].map(str::to_owned).to_vec();
            ways.extend([way("posix"), way("remote")]);
        }
    }
    ways
}

pub(crate) fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").canonicalize().unwrap()
}

pub(crate) fn example(name: &str) -> PathBuf {
    root().join("examples").join(name)
}

/// What a program printed, and how it ended.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Output {
    pub(crate) stdout: String,
    pub(crate) stderr: String,
    pub(crate) code: Option<i32>,
}

impl Output {
    fn new(stdout: Vec<u8>, stderr: Vec<u8>, status: ExitStatus) -> Self {
        let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
        Self { stdout: text(stdout), stderr: text(stderr), code: status.code() }
    }
}

/// A call of the command.
pub(crate) struct Farlink {
    command: Command,
    /// A variable that everything the run starts inherits.
    mark: String,
    temp: TempDir,
    stdin: Vec<u8>,
}

impl Farlink {
    pub(crate) fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let mark = format!("{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let temp = TempDir::new().unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_farlink"));
        command.env("FARLINK_TEST_MARK", &mark).env("TMPDIR", temp.path());
        Self { command, mark, temp, stdin: Vec::new() }
    }

    pub(crate) fn arg(mut self, arg: impl AsRef<OsStr>) -> Self {
        self.command.arg(arg);
        self
    }

    pub(crate) fn args<I: AsRef<OsStr>>(mut self, args: impl IntoIterator<Item = I>) -> Self {
        self.command.args(args);
        self
    }

    pub(crate) fn env(mut self, key: &str, value: impl AsRef<OsStr>) -> Self {
        self.command.env(key, value);
        self
    }

    pub(crate) fn stdin(mut self, bytes: &[u8]) -> Self {
        self.stdin = bytes.to_vec();
        self
    }

    /// Runs the command through `wrapper`, for example `unshare`.
    pub(crate) fn through(mut self, wrapper: &[&str]) -> Self {
        let mut command = Command::new(wrapper[0]);
        command.args(&wrapper[1..]).arg(self.command.get_program()).args(self.command.get_args());
        for (key, value) in self.command.get_envs() {
            command.env(key, value.unwrap_or_default());
        }
        self.command = command;
        self
    }

    /// Starts the command without waiting for it.
    pub(crate) fn start(mut self) -> Running {
        let mut child =
            self.command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let mut stdin = child.stdin.take().unwrap();
        // A program need not read its input.
        let _ = stdin.write_all(&self.stdin);
        Running { child, mark: self.mark, temp: self.temp }
    }

    /// Runs the command to its end and checks that nothing is left of it.
    pub(crate) fn output(self) -> Output {
        self.start().output()
    }

    /// Runs a command that has to fail with farlink's own status; gives what it says.
    pub(crate) fn failure(self) -> String {
        let output = self.output();
        assert_eq!(output.code, Some(125), "{output:?}");
        assert!(output.stderr.starts_with("farlink: ") || output.stderr.starts_with("error: "), "{output:?}");
        output.stderr
    }
}

/// A command that has been started.
pub(crate) struct Running {
    pub(crate) child: Child,
    mark: String,
    temp: TempDir,
}

impl Running {
    pub(crate) fn output(mut self) -> Output {
        let mut stdout = self.child.stdout.take().unwrap();
        let mut stderr = self.child.stderr.take().unwrap();
        let read = |stream: &mut dyn Read| {
            let mut bytes = Vec::new();
            stream.read_to_end(&mut bytes).unwrap();
            bytes
        };
        let (stdout, stderr) = thread::scope(|scope| {
            let stderr = scope.spawn(move || read(&mut stderr));
            (read(&mut stdout), stderr.join().unwrap())
        });
        let status = self.wait();
        self.check_clean();
        Output::new(stdout, stderr, status)
    }

    pub(crate) fn wait(&mut self) -> ExitStatus {
        let start = Instant::now();
        while start.elapsed() < DEADLINE {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            thread::sleep(Duration::from_millis(5));
        }
        let _ = self.child.kill();
        panic!("the command did not end");
    }

    /// The processes that the run started and that are still there, itself included.
    pub(crate) fn processes(&self) -> Vec<u32> {
        let mark = format!("FARLINK_TEST_MARK={}", self.mark);
        let marked = |pid: &u32| {
            let environ = fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
            environ.split(|&byte| byte == 0).any(|entry| entry == mark.as_bytes())
        };
        all_processes().filter(marked).collect()
    }

    /// Waits until the run has started a process of its own; gives its id.
    pub(crate) fn wait_for_executor(&self) -> u32 {
        let start = Instant::now();
        while start.elapsed() < DEADLINE {
            let executor = self.processes().into_iter().find(|&pid| pid != self.child.id());
            match executor {
                Some(pid) => return pid,
                None => thread::sleep(Duration::from_millis(5)),
            }
        }
        panic!("no executor was started");
    }

    /// Checks that nothing is left of the run.
    pub(crate) fn check_clean(&self) {
        eventually("a process is left", || self.processes().is_empty());
        eventually("a name is left in /dev/shm", || dead_names().is_empty());
        let left: Vec<_> = fs::read_dir(self.temp.path()).unwrap().map(|entry| entry.unwrap().path()).collect();
        assert!(left.is_empty(), "temporary files are left: {left:?}");
    }
}

fn eventually(what: &str, condition: impl Fn() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < GRACE, "{what}");
        thread::sleep(Duration::from_millis(10));
    }
}

fn all_processes() -> impl Iterator<Item = u32> {
    fs::read_dir("/proc").unwrap().filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
}

/// The shared memory objects of executors that are not there any more.
fn dead_names() -> Vec<String> {
    let living: HashSet<u32> = all_processes().collect();
    let Ok(entries) = fs::read_dir("/dev/shm") else { return Vec::new() };
    let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    let owner = |name: &String| name.strip_prefix("farlink_")?.split('_').next()?.parse::<u32>().ok();
    names.filter(|name| owner(name).is_some_and(|pid| !living.contains(&pid))).collect()
}

/// Runs a command that has to succeed; gives its standard output.
pub(crate) fn tool(command: &mut Command) -> String {
    let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    assert!(output.status.success(), "{command:?}\n{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Compiles `source` (a path, or text for a file of that extension) to an object.
pub(crate) fn compile(dir: &Path, name: &str, text: &str, flags: &[&str]) -> PathBuf {
    let source = dir.join(name);
    fs::write(&source, text).unwrap();
    let object = dir.join(format!("{name}.o"));
    let compiler = if name.ends_with(".cc") { "c++" } else { "cc" };
    tool(Command::new(compiler).arg("-c").args(flags).arg("-o").arg(&object).arg(&source));
    object
}

/// Runs the native build of `objects`.
pub(crate) fn native<I: AsRef<OsStr>>(
    linker: &str,
    objects: impl IntoIterator<Item = I>,
    flags: &[&str],
    args: &[&str],
    stdin: &[u8],
) -> Output {
    let dir = TempDir::new().unwrap();
    let program = dir.path().join("program");
    tool(Command::new(linker).arg("-o").arg(&program).args(objects).args(flags));
    let mut child = Command::new(&program)
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let _ = child.stdin.take().unwrap().write_all(stdin);
    let output = child.wait_with_output().unwrap();
    Output::new(output.stdout, output.stderr, output.status)
}

/// Whether `path`, which only some machines have, is here. Says loudly that the test is skipped if not; fails where
/// nothing may be skipped.
pub(crate) fn available(test: &str, path: impl AsRef<Path>) -> bool {
    let path = path.as_ref();
    let here = if path.is_absolute() { path.exists() } else { in_path(path) };
    if !here {
        assert!(std::env::var_os("FARLINK_REQUIRE_TOOLS").is_none(), "{test}: {} is missing", path.display());
        eprintln!("SKIPPED {test}: {} is not installed", path.display());
    }
    here
}

fn in_path(name: &Path) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|dir| dir.join(name).is_file())
}

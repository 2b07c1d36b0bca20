//! Ways to an executor that `farlink run` does not start by itself.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on panics")]

mod common;

use common::{Farlink, example};
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};
use tempfile::TempDir;

const FARLINK: &str = env!("CARGO_BIN_EXE_farlink");
const DEADLINE: Duration = Duration::from_secs(20);

/// A listening executor, which is killed with the test that fails.
struct Executor(Child);

impl Executor {
    fn start(args: &[&str]) -> Self {
        let mut command = Command::new(FARLINK);
        command.arg("executor").args(args).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        Self(command.spawn().unwrap())
    }

    /// Waits for the line that says where it listens; gives the address and the rest of what it says.
    fn address(&mut self) -> (String, impl Read + use<>) {
        let mut stderr = BufReader::new(self.0.stderr.take().unwrap());
        let mut line = String::new();
        stderr.read_line(&mut line).unwrap();
        (
            line.trim().strip_prefix("farlink-executor: listening at ").unwrap_or_else(|| panic!("{line}")).to_owned(),
            stderr,
        )
    }

    /// Waits for its end; gives its standard output, which is the linked program's.
    fn output(&mut self) -> String {
        let start = Instant::now();
        while self.0.try_wait().unwrap().is_none() {
            assert!(start.elapsed() < DEADLINE, "the executor does not end");
            thread::sleep(Duration::from_millis(2));
        }
        let mut text = String::new();
        self.0.stdout.take().unwrap().read_to_string(&mut text).unwrap();
        text
    }
}

impl Drop for Executor {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn run(args: &[&str]) -> common::Output {
    Farlink::new().arg("run").args(args).arg(example("hello.c")).output()
}

fn wait_for(path: &Path) {
    let start = Instant::now();
    while !path.exists() {
        assert!(start.elapsed() < DEADLINE, "{} is not made", path.display());
        thread::sleep(Duration::from_millis(2));
    }
}

/// Over a Unix socket, which nobody else can connect to and which is gone afterwards, in every kind of memory.
#[test]
fn unix_sockets() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("socket");
    let (shown, spec) = (path.to_str().unwrap(), format!("unix:{}", path.display()));
    for memory in ["shared", "posix", "remote"] {
        let mut executor = Executor::start(&["--unix", shown]);
        wait_for(&path);
        let metadata = fs::metadata(&path).unwrap();
        assert!(metadata.file_type().is_socket());
        assert_eq!(metadata.permissions().mode() & 0o777, 0o600);
        let outcome = run(&["--connect", &spec, "--memory", memory]);
        assert_eq!((outcome.code, outcome.stdout.as_str()), (Some(0), ""), "{outcome:?}");
        assert!(executor.output().starts_with("hello"), "{memory}");
        assert!(!path.exists());
    }
    fs::write(&path, "").unwrap();
    let mut executor = Executor::start(&["--unix", shown]);
    assert_eq!(executor.output(), "");
    let mut text = String::new();
    executor.0.stderr.take().unwrap().read_to_string(&mut text).unwrap();
    assert!(text.contains("is there already"), "{text}");
    let message = Farlink::new().arg("run").args(["--connect", "unix:/nowhere"]).arg(example("hello.c")).failure();
    assert!(message.contains("cannot connect"), "{message}");
}

/// On TCP the host that is named is bound, and whoever does not know the secret is turned away without ending the wait
/// for somebody who does.
#[test]
fn tcp_with_a_secret() {
    let dir = TempDir::new().unwrap();
    let secret = |name: &str, text: &str| {
        let path = dir.path().join(name);
        fs::write(&path, text).unwrap();
        path.to_str().unwrap().to_owned()
    };
    let (right, wrong) = (secret("right", "0123456789abcdef\n"), secret("wrong", "0123456789abcdeF\n"));
    let mut executor = Executor::start(&["listen=localhost:0", "--secret-file", &right]);
    let (address, mut rest) = executor.address();
    assert!(address.starts_with("127.0.0.1:") || address.starts_with("[::1]:"), "{address}");
    let spec = format!("tcp:{address}");
    let refused = run(&["--connect", &spec, "--secret-file", &wrong]);
    assert!(refused.code == Some(125) && refused.stderr.contains("another secret"), "{refused:?}");
    // One that says nothing, and one that speaks LLVM's protocol without proof.
    drop(TcpStream::connect(&address).unwrap());
    TcpStream::connect(&address).unwrap().write_all(&[0; 200]).unwrap();
    let outcome = run(&["--connect", &spec, "--secret-file", &right]);
    assert_eq!((outcome.code, outcome.stderr.as_str()), (Some(0), ""), "{outcome:?}");
    assert!(executor.output().starts_with("hello"));
    let mut text = String::new();
    rest.read_to_string(&mut text).unwrap();
    assert_eq!(text.matches("was turned away").count(), 3, "{text}");
}

/// Without a secret an executor listens only if it is told to; one that wants a secret is noticed, and so is one that
/// does not.
#[test]
fn tcp_without_a_secret() {
    for bad in
        [&["listen=localhost:0"][..], &["listen=:0", "--insecure"], &["listen=localhost:0", "--secret-file", "/"]]
    {
        let outcome = Command::new(FARLINK).arg("executor").args(bad).output().unwrap();
        assert!(!outcome.status.success(), "{bad:?}");
    }
    let mut executor = Executor::start(&["listen=localhost:0", "--insecure"]);
    let (address, _rest) = executor.address();
    let outcome = run(&["--connect", &format!("tcp:{address}")]);
    assert_eq!((outcome.code, outcome.stderr.as_str()), (Some(0), ""), "{outcome:?}");
    assert!(executor.output().starts_with("hello"));
}

/// Two network namespaces, joined by a cable, as two machines are by a network. Gone when this is dropped.
struct TwoMachines([String; 2]);

impl TwoMachines {
    /// Nothing, which is said loudly, where they cannot be made.
    fn new(test: &str) -> Option<Self> {
        if !common::available(test, "ip") {
            return None;
        }
        let names = ["a", "b"].map(|end| format!("farlink-{}-{end}", std::process::id()));
        let [a, b] = &names;
        let machines = Self(names.clone());
        let [cable_a, cable_b] = ["a", "b"].map(|end| format!("fl{}{end}", std::process::id()));
        let commands = [
            format!("netns add {a}"),
            format!("netns add {b}"),
            format!("-n {a} link add {cable_a} type veth peer name {cable_b} netns {b}"),
            format!("-n {a} addr add 10.99.0.1/24 dev {cable_a}"),
            format!("-n {b} addr add 10.99.0.2/24 dev {cable_b}"),
            format!("-n {a} link set {cable_a} up"),
            format!("-n {b} link set {cable_b} up"),
        ];
        for command in commands {
            let output = Command::new("ip").args(command.split(' ')).output().unwrap();
            if !output.status.success() {
                let text = String::from_utf8_lossy(&output.stderr);
                eprintln!("SKIPPED {test}: network namespaces cannot be made here: ip {command}: {text}");
                return None;
            }
        }
        Some(machines)
    }
}

impl Drop for TwoMachines {
    fn drop(&mut self) {
        for name in &self.0 {
            let _ = Command::new("ip").args(["netns", "delete", name]).output();
        }
    }
}

/// On another machine: an executor that listens there on TCP, with a secret that both know, and content in messages.
#[test]
fn across_a_network() {
    let Some(machines) = TwoMachines::new("across_a_network") else { return };
    let [here, there] = &machines.0;
    let dir = TempDir::new().unwrap();
    let secret = dir.path().join("secret");
    fs::write(&secret, "0123456789abcdef").unwrap();
    let secret = secret.to_str().unwrap();
    let mut command = Command::new("ip");
    command.args(["netns", "exec", there, FARLINK, "executor", "listen=10.99.0.2:0", "--secret-file", secret]);
    let command = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut executor = Executor(command.spawn().unwrap());
    let (address, _rest) = executor.address();
    assert!(address.starts_with("10.99.0.2:"), "{address}");
    let spec = format!("tcp:{address}");
    let args = ["run", "--memory", "remote", "--connect", &spec, "--secret-file", secret];
    let run = Farlink::new().args(args).arg(example("hello.c")).through(&["ip", "netns", "exec", here]);
    let outcome = run.output();
    assert_eq!((outcome.code, outcome.stderr.as_str()), (Some(0), ""), "{outcome:?}");
    assert!(executor.output().starts_with("hello"));
}

/// On the standard streams of a command: the program's own output is beside the messages, and its exit status that of the
/// run.
#[test]
fn standard_streams() {
    let spec = format!("command:exec {FARLINK} executor --stdio");
    for memory in ["remote", "posix"] {
        let outcome = run(&["--connect", &spec, "--memory", memory]);
        assert_eq!((outcome.code, outcome.stdout.as_str()), (Some(0), ""), "{outcome:?}");
        assert!(outcome.stderr.starts_with("hello"), "{memory}: {outcome:?}");
    }
    let message = Farlink::new().arg("run").args(["--connect", "command:exit 3"]).arg(example("hello.c")).failure();
    assert!(message.contains("exit 3") && message.contains("status 3"), "{message}");
    let needless = ["--connect", "command:true", "--secret-file", "/dev/null"];
    let message = Farlink::new().arg("run").args(needless).arg(example("hello.c")).failure();
    assert!(message.contains("others demand no secret"), "{message}");
    for bad in ["nowhere", "tcp:host", "unix:", "command:"] {
        let outcome = Farlink::new().arg("run").args(["--connect", bad]).arg(example("hello.c")).output();
        assert!(outcome.stderr.contains("unix:PATH"), "{outcome:?}");
    }
}

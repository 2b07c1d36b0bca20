//! Prepared processes and what is forked from them: how they begin and end.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on panics")]
#![allow(unsafe_code)]

mod liars;
mod linked;

use super::*;
use crate::{Session, SessionBuilder};
use farlink_addr::ExecutorAddr;
use farlink_wire::functions::RESOLVE;
use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::thread;
use tempfile::TempDir;

/// Longer than anything here takes on a busy machine.
const DEADLINE: Duration = Duration::from_secs(30);

/// Makes the program of the tests its own executor, and what else these tests need, before the test harness begins.
#[used]
// SAFETY: the C library calls what is in this section as C functions, before `main`.
#[unsafe(link_section = ".init_array")]
static BE_SOMETHING_ELSE: extern "C" fn() = {
    extern "C" fn init() {
        let args: Vec<String> = std::env::args().collect();
        match args.get(1).map(String::as_str) {
            Some(liars::ARG) => liars::lie(&args[2..]),
            Some(CONTROLLER_ARG) => control(),
            _ => farlink_executor::init(),
        }
    }
    init
};

/// The argument that makes the program of the tests a controller to be killed.
const CONTROLLER_ARG: &str = "--be-a-controller";

/// Forks executors, prints the ids of what there is, and waits to be killed.
fn control() -> ! {
    let prepared = Prepared::start(&Program::this_one()).unwrap();
    let forked = [fork(&prepared).unwrap(), fork(&prepared).unwrap()];
    let [one, other] = forked.each_ref().map(|(process, _)| process.id().as_raw_nonzero());
    println!("{} {one} {other}", prepared.id().as_raw_nonzero());
    loop {
        thread::park();
    }
}

/// One test at a time: some count what this process has open.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

fn start() -> Prepared {
    Prepared::start(&Program::this_one()).unwrap()
}

/// Waits until something is so.
fn until(mut is_so: impl FnMut() -> bool) -> bool {
    let begin = Instant::now();
    while !is_so() {
        if begin.elapsed() > DEADLINE {
            return false;
        }
        thread::sleep(Duration::from_millis(5));
    }
    true
}

/// What a process has open.
fn descriptors(pid: impl std::fmt::Display) -> Vec<String> {
    let entries = fs::read_dir(format!("/proc/{pid}/fd")).unwrap().map(|entry| entry.unwrap().path());
    entries.filter_map(|path| Some(fs::read_link(path).ok()?.display().to_string())).collect()
}

struct NoCallbacks;

impl Handler for NoCallbacks {
    fn call(&self, function: ExecutorAddr, _args: Vec<u8>) -> Result<Vec<u8>, String> {
        Err(format!("no function {function}"))
    }
}

fn fork(prepared: &Prepared) -> Result<(Process, ExecutorInfo), Error> {
    prepared.fork(Arc::new(NoCallbacks), Options { out_of_band_results: true, ..Options::default() })
}

/// Executors that are forked announce the same but for their ids, and are children of this process.
#[test]
fn the_same_layout() {
    let _alone = alone();
    let prepared = start();
    let (one, mut first) = fork(&prepared).unwrap();
    let (other, mut second) = fork(&prepared).unwrap();
    for (process, info) in [(&one, &mut first), (&other, &mut second)] {
        let pid: u64 = from_bytes(info.value(PID_KEY).unwrap()).unwrap();
        assert_eq!(u64::try_from(process.id().as_raw_nonzero().get()).unwrap(), pid);
        info.bootstrap_map.retain(|(key, _)| key != PID_KEY);
    }
    assert_eq!(first, second);
}

/// Compiles a C or C++ source with these flags.
fn compile(name: &str, source: &str, flags: &[&str]) -> (TempDir, PathBuf) {
    let dir = TempDir::new().unwrap();
    let (text, output) = (dir.path().join(name), dir.path().join("output"));
    fs::write(&text, source).unwrap();
    let compiler = if name.ends_with(".cc") { "c++" } else { "cc" };
    let status = Command::new(compiler).args(["-O1", "-fPIC"]).args(flags).arg("-o").arg(&output).arg(&text).status();
    assert!(status.unwrap().success());
    (dir, output)
}

/// A session in an executor that has been forked, and its process.
struct Forked {
    session: Session,
    child: Child,
}

impl Forked {
    fn new(prepared: &Prepared) -> Self {
        Self::with(prepared, Session::builder())
    }

    fn with(prepared: &Prepared, builder: SessionBuilder) -> Self {
        let (ours, theirs) = socket_pair(SocketType::STREAM).unwrap();
        let connection = Connection::of(&theirs).unwrap();
        let pid = prepared.ask(&Request::Fork, Some(theirs.as_fd()), DEADLINE, "fork").unwrap();
        drop(theirs);
        let child = prepared.adopt(pid, &connection).unwrap();
        let session = builder.connect(Transport::from_socket(ours).unwrap()).unwrap();
        Self { session, child }
    }

    fn end(self) -> Option<i32> {
        drop(self.session);
        self.child.wait().unwrap().code()
    }
}

/// A library that is opened beforehand is in every executor, where it is in the others, and its initializers have run once,
/// in the prepared process. What they print is printed once.
#[test]
fn libraries_are_opened_once() {
    let _alone = alone();
    let source = "#include <stdio.h>
        #include <unistd.h>
        int opened_by, count = 40;
        __attribute__((constructor)) static void init(void) { opened_by = getpid(); fputs(\"opened\", fopen(LOG, \"a\")); }
        int add(int n) { return count += n; }
        int who(void) { return opened_by; }";
    let logs = TempDir::new().unwrap();
    let log = logs.path().join("log");
    let define = format!("-DLOG=\"{}\"", log.display());
    let (_dir, library) = compile("library.c", source, &["-shared", &define]);
    let prepared = start();
    prepared.open(library.to_str().unwrap()).unwrap();
    let forked = [Forked::new(&prepared), Forked::new(&prepared)];
    let addresses = forked.each_ref().map(|forked| {
        let process = forked.session.create_library("process");
        let add = process.function::<fn(i32) -> i32>("add").unwrap();
        // SAFETY: the functions are declared so.
        assert_eq!(unsafe { add.call((2,)) }.unwrap(), 42);
        let who = process.function::<fn() -> i32>("who").unwrap();
        // SAFETY: as above.
        assert_eq!(unsafe { who.call(()) }.unwrap(), prepared.id().as_raw_nonzero().get());
        (add.addr(), process.lookup("malloc").unwrap())
    });
    assert_eq!(addresses[0], addresses[1]);
    assert_eq!(forked.map(Forked::end), [Some(0), Some(0)]);
    assert_eq!(fs::read_to_string(&log).unwrap(), "opened");
    let refused = prepared.open("/no/library.so").unwrap_err().to_string();
    assert!(refused.contains("cannot open the shared library: /no/library.so"), "{refused}");
    let long = prepared.open(&"x".repeat(MAX_MESSAGE_BYTES)).unwrap_err().to_string();
    assert!(long.contains("above the limit"), "{long}");
    fork(&prepared).unwrap();
}

/// A child has the standard streams and its connection open, and what a library has opened; nothing of the prepared
/// process's own. Neither that nor this process keeps anything of a hundred executors, and none is left as a zombie.
#[test]
fn nothing_is_left_of_a_hundred() {
    let _alone = alone();
    let prepared = start();
    let of_prepared = descriptors(prepared.id().as_raw_nonzero());
    let (process, _) = fork(&prepared).unwrap();
    let sockets = descriptors(process.id().as_raw_nonzero()).iter().filter(|name| name.starts_with("socket:")).count();
    assert_eq!(sockets, 1);
    drop(process);
    let own = || descriptors(std::process::id()).len();
    let before = own();
    let mut ids = Vec::new();
    for _ in 0..100 {
        ids.push(fork(&prepared).unwrap().0.id());
    }
    assert!(until(|| own() == before), "{} and {before}", own());
    assert_eq!(descriptors(prepared.id().as_raw_nonzero()), of_prepared);
    assert!(ids.into_iter().all(|id| Child::found(id, |_| true).is_none()));
    assert_eq!(prepared.children().len(), 1);
    let id = prepared.id();
    drop(prepared);
    assert!(Child::found(id, |_| true).is_none());
}

/// How a child ends is told as of an executor that was started, and disturbs nobody else.
#[test]
fn a_child_that_dies() {
    let _alone = alone();
    let prepared = start();
    let [(one, _), (other, info)] = [fork(&prepared).unwrap(), fork(&prepared).unwrap()];
    one.signal(Signal::SEGV);
    let status = one.wait();
    assert_eq!(status.map(describe_status).as_deref(), Some("was killed by SIGSEGV"));
    assert!(other.ended().is_none());
    let executor = farlink_rpc::Executor::new(info, Arc::new(other.endpoint().clone())).unwrap();
    let names = vec!["malloc".to_owned()];
    let found = executor.bind(RESOLVE).unwrap().call(&(vec![ExecutorAddr::NULL], names)).wait().unwrap().unwrap();
    assert!(found[0].is_some());
    fork(&prepared).unwrap();
}

/// When the prepared process has died, its executors live on, and to fork or open fails with how it ended.
#[test]
fn a_prepared_process_that_dies() {
    let _alone = alone();
    let prepared = start();
    let (child, _) = fork(&prepared).unwrap();
    prepared.watch.signal(prepared.id(), Signal::KILL);
    for _ in 0..2 {
        let text = fork(&prepared).map(drop).unwrap_err().to_string();
        assert!(text.contains("was killed by SIGKILL") && text.contains("are not affected"), "{text}");
    }
    assert!(prepared.open("libm.so.6").is_err());
    assert!(child.ended().is_none());
    drop(prepared);
    assert!(child.ended().is_none());
}

/// A prepared process that is stopped gives an error in time, and is ended: no executor of that request comes later.
#[test]
fn a_prepared_process_that_is_stopped() {
    let _alone = alone();
    let prepared = start();
    prepared.watch.signal(prepared.id(), Signal::STOP);
    let options = Options { setup_timeout: Duration::from_millis(100), ..Options::default() };
    let text = prepared.fork(Arc::new(NoCallbacks), options).map(drop).unwrap_err().to_string();
    assert!(text.contains("did not answer within 100ms") && text.contains("SIGKILL"), "{text}");
    let id = prepared.id();
    drop(prepared);
    assert!(Child::found(id, |_| true).is_none());
}

/// Several threads may fork at once.
#[test]
fn many_threads_fork() {
    let _alone = alone();
    let prepared = start();
    let ids: Vec<Pid> = thread::scope(|scope| {
        let threads: Vec<_> =
            (0..4).map(|_| scope.spawn(|| [(); 5].map(|()| fork(&prepared).unwrap().0.id()))).collect();
        threads.into_iter().flat_map(|thread| thread.join().unwrap()).collect()
    });
    assert_eq!(ids.len(), 20);
}

/// When the controller is killed, the prepared process and its executors end.
#[test]
fn a_controller_that_is_killed() {
    let _alone = alone();
    let mut command = Command::new(std::env::current_exe().unwrap());
    let mut controller = command.arg(CONTROLLER_ARG).stdout(Stdio::piped()).spawn().unwrap();
    let mut line = String::new();
    BufReader::new(controller.stdout.take().unwrap()).read_line(&mut line).unwrap();
    controller.kill().unwrap();
    controller.wait().unwrap();
    let ids: Vec<&str> = line.split_whitespace().collect();
    assert_eq!(ids.len(), 3, "{line}");
    // Whoever they have been left to may be slow to wait for them.
    let has_ended =
        |id: &&str| fs::read_to_string(format!("/proc/{id}/stat")).map_or(true, |stat| stat.contains(") Z "));
    assert!(until(|| ids.iter().all(has_ended)));
}

/// A library that starts threads cannot be in executors that are forked, which is said; and one that ends the process, too.
#[test]
fn libraries_that_cannot_be_forked() {
    let _alone = alone();
    let threads = "#include <pthread.h>
        #include <unistd.h>
        static void *run(void *arg) { for (;;) pause(); }
        __attribute__((constructor)) static void init(void) { pthread_t t; pthread_create(&t, 0, run, 0); }";
    let (_dir, library) = compile("threads.c", threads, &["-shared"]);
    let prepared = start();
    let opened = prepared.open(library.to_str().unwrap()).unwrap_err().to_string();
    let forked = fork(&prepared).map(drop).unwrap_err().to_string();
    for text in [opened, forked] {
        assert!(text.contains("2 threads run") && text.contains("in each executor"), "{text}");
    }
    let exits = "#include <stdlib.h>\n__attribute__((constructor)) static void init(void) { exit(7); }";
    let (_dir, library) = compile("exits.c", exits, &["-shared"]);
    let text = start().open(library.to_str().unwrap()).unwrap_err().to_string();
    assert!(text.contains("exited with status 7"), "{text}");
}

/// The death of a prepared process is noticed although something else has its control socket.
#[test]
fn a_socket_that_outlives_the_process() {
    let _alone = alone();
    let daemon = "#include <signal.h>
        #include <stdio.h>
        #include <unistd.h>
        __attribute__((constructor)) static void init(void) {
            int daemon = fork();
            if (daemon == 0) for (;;) pause();
            FILE *log = fopen(LOG, \"w\");
            fprintf(log, \"%d\", daemon);
            fclose(log);
            kill(getpid(), SIGKILL);
        }";
    let logs = TempDir::new().unwrap();
    let log = logs.path().join("log");
    let define = format!("-DLOG=\"{}\"", log.display());
    let (_dir, library) = compile("daemon.c", daemon, &["-shared", &define]);
    let text = start().open(library.to_str().unwrap()).unwrap_err().to_string();
    assert!(text.contains("was killed by SIGKILL"), "{text}");
    let daemon = fs::read_to_string(log).unwrap().parse().unwrap();
    // It has not ended, so its id is its own.
    rustix::process::kill_process(Pid::from_raw(daemon).unwrap(), Signal::KILL).unwrap();
}

/// What cannot be a prepared process is told so: programs that end, that answer otherwise, that are not there.
#[test]
fn programs_that_are_no_prepared_processes() {
    let _alone = alone();
    let program = |path: &str| Program { path: path.into(), ..Program::this_one() };
    let failed = |path: &str| Prepared::start(&program(path)).map(drop).unwrap_err().to_string();
    let ended = failed("/bin/false");
    assert!(ended.contains("does not know --prepared") && ended.contains("exited with status 1"), "{ended}");
    assert!(failed("/no/program").contains("cannot start the executor program"));
    for version in [19, 22] {
        let executor = format!("/usr/lib/llvm-{version}/bin/llvm-jitlink-executor");
        if Path::new(&executor).exists() {
            let program = Program { args: Vec::new(), ..program(&executor) };
            let text = Prepared::start(&program).map(drop).unwrap_err().to_string();
            assert!(text.contains("does not know --prepared"), "{text}");
        } else {
            eprintln!("SKIPPED: {executor} is not installed");
        }
    }
}

//! A campaign of faults, and a soak: at every point in the life of a link one of the processes is killed or stopped, while
//! eight threads link, call and remove; and the same at full speed for long. Nothing leaks, every error explains itself, and
//! who survives goes on.
//!
//! The short form is for every run of the tests. The long one is run by hand: `FARLINK_CAMPAIGN_ROUNDS=100` rounds at every
//! point, `FARLINK_SOAK_SECONDS=1800` of soak.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on panics")]

mod common;

use common::{compile, tool};
use farlink::addr::ExecutorAddr;
use farlink::{Error, Library, Restart, Session};
use std::fs;
use std::process::{Command, Stdio};
use std::sync::LazyLock;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant, SystemTime};
use tempfile::TempDir;

/// Threads that link, call and remove.
const THREADS: usize = 8;

/// Longer than anything here takes on a busy machine.
const PATIENCE: Duration = Duration::from_secs(30);

const SOURCE: &str = r#"
    #include <stdlib.h>
    static int initialized;
    static int big[5000] = {1};
    __attribute__((constructor)) static void begin(void) { initialized = atoi("41"); }
    __attribute__((destructor)) static void end(void) { initialized = 0; }
    int work(void) { void *p = malloc(100); free(p); return initialized + big[0]; }
    "#;

struct Inputs {
    object: Vec<u8>,
    archive: Vec<u8>,
}

static INPUTS: LazyLock<Inputs> = LazyLock::new(|| {
    let dir = TempDir::new().unwrap();
    let object = compile(dir.path(), "work.c", SOURCE, &["-O1", "-fPIC"]);
    let member = compile(dir.path(), "member.c", "int member(void) { return 6; }", &["-O1", "-fPIC"]);
    let archive = dir.path().join("libmember.a");
    tool(Command::new("ar").arg("rcs").arg(&archive).arg(member));
    Inputs { object: fs::read(object).unwrap(), archive: fs::read(archive).unwrap() }
});

fn number(variable: &str, default: u64) -> u64 {
    std::env::var(variable).ok().map_or(default, |value| value.parse().unwrap())
}

/// Numbers that are different in every run.
fn random(below: u64) -> u64 {
    static STATE: AtomicU64 = AtomicU64::new(0);
    let seed = || SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_nanos() as u64 | 1;
    let _ = STATE.compare_exchange(0, seed(), Ordering::Relaxed, Ordering::Relaxed);
    let mut x = STATE.load(Ordering::Relaxed);
    x ^= x << 13;
    x ^= x >> 7;
    x ^= x << 17;
    STATE.store(x, Ordering::Relaxed);
    x % below
}

fn spawn() -> Result<Session, Error> {
    let executor = env!("CARGO_BIN_EXE_farlink");
    Session::builder().executor(executor, vec!["executor".into()]).reservation_bytes(64 << 20).spawn()
}

/// Links, calls and removes once.
fn round(library: &Library) -> Result<(), Error> {
    let object = library.add_object("work.o", INPUTS.object.as_slice())?;
    let worked = library.run_as_main("work", &["work".into()]).map(|result| assert_eq!(result, 42));
    let removed = library.remove(object);
    worked.and(removed)
}

/// A step in the life of a link.
type Step = fn(&Session, &Library) -> Result<(), Error>;

/// The points at which something happens: while the executor starts is one more.
const STEPS: [(&str, Step); 19] = [
    ("a library is created", |session, _| {
        let _ = session.create_library("another");
        Ok(())
    }),
    ("an object is declared", |_, library| library.add_object("work.o", INPUTS.object.as_slice()).map(drop)),
    ("an archive is added", |_, library| library.add_archive("libmember.a", INPUTS.archive.as_slice())),
    ("a shared library is opened", |_, library| library.add_shared_library("libm.so.6")),
    ("a name is defined", |_, library| {
        // A second time, in the next round, it is there.
        let _ = library.define("place", ExecutorAddr::new(0x1000));
        Ok(())
    }),
    ("a lookup links", |_, library| library.lookup("work").map(drop)),
    ("a lookup finds", |_, library| library.lookup("work").map(drop)),
    ("a member of an archive is linked", |_, library| library.lookup("member").map(drop)),
    ("several names are looked up", |_, library| library.lookup_all(&["work", "member", "place"]).map(drop)),
    ("everything is linked", |_, library| library.link_all()),
    ("linked code is called", |_, library| library.run_as_main("work", &[]).map(drop)),
    ("linked code is called again", |_, library| library.run_as_main("member", &[]).map(drop)),
    ("linked data is read", |session, library| {
        let addr = library.lookup("work")?;
        session.read_memory(addr, &mut [0; 8])
    }),
    ("the process's memory is read", |session, library| {
        let addr = library.lookup("work")?;
        session.read_memory(ExecutorAddr::new(addr.as_u64() & !0xfff), &mut [0; 8])
    }),
    ("a buffer is made and used", |session, _| {
        let buffer = session.shared_buffer::<u64>(1000)?;
        buffer.set(3, 4)?;
        assert_eq!(buffer.get(3)?, 4);
        Ok(())
    }),
    ("an object comes and goes", |session, _| round(&session.create_library("brief"))),
    ("statistics are asked for", |session, _| session.stats().map(drop)),
    ("threads are listed", |session, _| {
        let _ = session.threads();
        Ok(())
    }),
    ("a library goes", |session, _| {
        let library = session.create_library("brief");
        library.add_object("work.o", INPUTS.object.as_slice())?;
        library.lookup("work").map(drop)
    }),
];

/// What happens to the executor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Blow {
    Kill,
    /// It is stopped, and goes on after a while.
    Pause,
}

fn strike(session: &Session, blow: Blow) {
    use rustix::process::Signal;
    thread::sleep(Duration::from_micros(random(400)));
    match blow {
        Blow::Kill => session.signal(Signal::KILL),
        Blow::Pause => {
            session.signal(Signal::STOP);
            thread::sleep(Duration::from_micros(random(3000)));
            session.signal(Signal::CONT);
        }
    }
}

/// Checks that an error tells what happened.
fn explains(point: &str, blow: Blow, result: Result<(), Error>) {
    if let Err(error) = result {
        let text = error.to_string();
        // Who waits for another thread's link is told of that.
        let is_explained = text.contains("SIGKILL") || matches!(error, Error::Dependency { .. });
        assert!(blow == Blow::Kill && is_explained, "{point}, {blow:?}: {text}");
    }
}

/// One session, in which a blow falls at a point.
fn session_with_a_blow(point: usize, blow: Blow) {
    let name = STEPS[point].0;
    let session = spawn().unwrap();
    let library = session.create_library("main");
    let is_over = AtomicBool::new(false);
    thread::scope(|scope| {
        for _ in 0..THREADS {
            scope.spawn(|| {
                let library = session.create_library("beside");
                while !is_over.load(Ordering::Relaxed) {
                    let result = round(&library);
                    let is_gone = result.is_err();
                    explains(name, blow, result);
                    if is_gone {
                        break;
                    }
                }
            });
        }
        for (index, (step, run)) in STEPS.iter().enumerate() {
            let struck = (index == point).then(|| scope.spawn(|| strike(&session, blow)));
            explains(step, blow, run(&session, &library));
            if let Some(struck) = struck {
                struck.join().unwrap();
            }
        }
        is_over.store(true, Ordering::Relaxed);
    });
    let after = round(&session.create_library("after"));
    assert_eq!(after.is_err(), blow == Blow::Kill, "{name}, {blow:?}: {after:?}");
    explains(name, blow, after);
    let pid = session.process_id().unwrap();
    drop((library, session));
    assert!(!fs::exists(format!("/proc/{pid}")).unwrap(), "{name}, {blow:?}: the executor is left");
}

/// What this process holds: descriptors, mappings of farlink's memory, threads.
fn held() -> (usize, usize, usize) {
    let count = |what: &str| fs::read_dir(format!("/proc/self/{what}")).unwrap().count();
    let maps = fs::read_to_string("/proc/self/maps").unwrap().matches("farlink").count();
    (count("fd"), maps, count("task"))
}

/// The same when it has not changed for a while: a session's threads end shortly after it.
fn held_at_rest() -> (usize, usize, usize) {
    let (mut last, mut since) = (held(), Instant::now());
    while since.elapsed() < Duration::from_millis(300) {
        thread::sleep(Duration::from_millis(10));
        if held() != last {
            (last, since) = (held(), Instant::now());
        }
    }
    last
}

/// Runs a test of this file in a process of its own, where nothing else opens or maps anything; gives whether this is it.
fn is_alone(test: &str) -> bool {
    if std::env::var_os("FARLINK_TEST_ALONE").is_some() {
        return true;
    }
    let mut command = Command::new(std::env::current_exe().unwrap());
    tool(command.args(["--exact", test, "--test-threads=1", "--nocapture"]).env("FARLINK_TEST_ALONE", "1"));
    false
}

/// Waits until this process holds no more than before: threads end shortly after what they were for.
fn assert_nothing_left(before: (usize, usize, usize)) {
    let start = Instant::now();
    while held() != before && start.elapsed() < PATIENCE {
        thread::sleep(Duration::from_millis(10));
    }
    assert_eq!(held(), before, "descriptors, mappings, threads");
}

/// The executor is killed or stopped at every point, also while it starts.
#[test]
fn executors_are_struck() {
    if !is_alone("executors_are_struck") {
        return;
    }
    session_with_a_blow(0, Blow::Pause);
    let before = held_at_rest();
    let rounds = number("FARLINK_CAMPAIGN_ROUNDS", 1);
    for _ in 0..rounds {
        for point in 0..STEPS.len() {
            session_with_a_blow(point, Blow::Kill);
            session_with_a_blow(point, Blow::Pause);
        }
        executor_dies_while_it_starts();
    }
    assert_nothing_left(before);
    eprintln!("{rounds} rounds, {} points, 2 blows: nothing left of {before:?}", STEPS.len() + 1);
}

/// An executor that is killed at a random moment while it starts is an error that says so, or starts before.
fn executor_dies_while_it_starts() {
    let delay = random(3000);
    let script = format!(
        "import os,signal,sys,time\npid=os.getpid()\nif os.fork()==0:\n time.sleep({delay}e-6)\n os.kill(pid,signal.SIGKILL)\n os._exit(0)\nos.execv(sys.argv[1], sys.argv[1:])"
    );
    let args = ["-c", &script, env!("CARGO_BIN_EXE_farlink"), "executor"].map(Into::into).to_vec();
    match Session::builder().executor("python3", args).spawn() {
        Ok(session) => {
            let library = session.create_library("main");
            let start = Instant::now();
            while round(&library).is_ok() {
                assert!(start.elapsed() < PATIENCE);
            }
        }
        Err(error) => {
            let text = error.to_string();
            assert!(text.contains("SIGKILL") || text.contains("closed"), "{text}");
        }
    }
}

/// The controller is killed or stopped at random moments while eight threads link, call and remove: its executor ends, and
/// nothing is left.
#[test]
fn controllers_are_struck() {
    const MARK: &str = "FARLINK_CAMPAIGN_MARK";
    if std::env::var_os(MARK).is_some() {
        let session = spawn().unwrap();
        println!("ready");
        thread::scope(|scope| {
            for _ in 0..THREADS {
                scope.spawn(|| {
                    let library = session.create_library("work");
                    while round(&library).is_ok() {}
                });
            }
        });
        return;
    }
    let rounds = number("FARLINK_CAMPAIGN_ROUNDS", 1) * 10;
    for index in 0..rounds {
        let mark = format!("{}-{index}", std::process::id());
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "controllers_are_struck", "--nocapture"])
            .env(MARK, &mark)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let pid = rustix::process::Pid::from_child(&child);
        thread::sleep(Duration::from_micros(random(150_000)));
        if index % 3 == 0 {
            rustix::process::kill_process(pid, rustix::process::Signal::STOP).unwrap();
            thread::sleep(Duration::from_millis(random(20)));
            rustix::process::kill_process(pid, rustix::process::Signal::CONT).unwrap();
            thread::sleep(Duration::from_micros(random(20_000)));
        }
        child.kill().unwrap();
        child.wait().unwrap();
        let marked = || {
            let entry = format!("{MARK}={mark}");
            let processes = fs::read_dir("/proc").unwrap().filter_map(Result::ok);
            let environ = |entry: fs::DirEntry| fs::read(entry.path().join("environ")).unwrap_or_default();
            processes
                .map(environ)
                .filter(|text| text.split(|&byte| byte == 0).any(|item| item == entry.as_bytes()))
                .count()
        };
        let start = Instant::now();
        while marked() > 0 {
            assert!(start.elapsed() < PATIENCE, "round {index}: an executor is left");
            thread::sleep(Duration::from_millis(5));
        }
    }
    let names = fs::read_dir("/dev/shm").unwrap().filter_map(|entry| entry.unwrap().file_name().into_string().ok());
    let own: Vec<_> = names.filter(|name| name.starts_with(&format!("farlink_{}_", std::process::id()))).collect();
    assert!(own.is_empty(), "{own:?}");
    eprintln!("{rounds} controllers killed: nothing left");
}

/// Memory in KiB, descriptors and mappings of a process. What is read from files the system drops and reads again as it likes.
fn size_of(pid: u32) -> (u64, usize, usize) {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let value = |name: &str| -> u64 {
        let line = status.lines().find(|line| line.starts_with(name)).unwrap();
        line.split_whitespace().nth(1).unwrap().parse().unwrap()
    };
    let kib = value("RssAnon:") + value("RssShmem:");
    let descriptors = fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count();
    (kib, descriptors, fs::read_to_string(format!("/proc/{pid}/maps")).unwrap().lines().count())
}

/// Starts threads that link, call and remove until `end`, and give each outcome to `done`.
fn work_until<'scope>(
    scope: &'scope thread::Scope<'scope, '_>,
    session: &'scope Session,
    end: Instant,
    done: impl Fn(Result<(), Error>) + Copy + Send + 'scope,
) {
    for _ in 0..THREADS {
        scope.spawn(move || {
            let library = session.create_library("work");
            while Instant::now() < end {
                done(round(&library));
            }
        });
    }
}

/// Links, calls and removes at full speed: memory, descriptors and mappings of both processes stay as they were after the
/// first part.
#[test]
fn soak() {
    if !is_alone("soak") {
        return;
    }
    let seconds = number("FARLINK_SOAK_SECONDS", 3);
    let session = spawn().unwrap();
    let rounds = AtomicU64::new(0);
    let done = |result: Result<(), Error>| {
        result.unwrap();
        rounds.fetch_add(1, Ordering::Relaxed);
    };
    let work = |time: Duration| {
        let end = Instant::now() + time;
        thread::scope(|scope| work_until(scope, &session, end, done));
    };
    let pids = [std::process::id(), session.process_id().unwrap()];
    work(Duration::from_millis(1000 * seconds / 4).max(Duration::from_secs(1)));
    let (before, rounds_before) = (pids.map(size_of), rounds.load(Ordering::Relaxed));
    work(Duration::from_secs(seconds));
    let after = pids.map(size_of);
    let rounds = rounds.into_inner() - rounds_before;
    eprintln!("{rounds} rounds in {seconds} s; KiB, descriptors, mappings: {before:?}, then {after:?}");
    for ((memory, descriptors, mappings), (memory_after, descriptors_after, mappings_after)) in
        before.into_iter().zip(after)
    {
        // Threads and the C library's arenas come and go: 6 MiB, and less than 16 bytes for each round.
        assert!(memory_after < memory + 6 * 1024 + rounds / 64, "{rounds} rounds: {memory} KiB became {memory_after}");
        assert!(descriptors_after <= descriptors + 2, "{descriptors} descriptors became {descriptors_after}");
        assert!(mappings_after <= mappings + 32, "{mappings} mappings became {mappings_after}");
    }
}

/// Executors that are killed all the time while threads link, call and remove in them, and others take their places: this
/// process stays as it was after the first part, and what linked code had is free in the end.
#[test]
fn soak_with_restarts() {
    if !is_alone("soak_with_restarts") {
        return;
    }
    let seconds = number("FARLINK_SOAK_SECONDS", 3);
    let executor = env!("CARGO_BIN_EXE_farlink");
    let builder = Session::builder().executor(executor, vec!["executor".into()]).reservation_bytes(64 << 20);
    let session = builder.executors(2).restart(Restart::OnNextCall).spawn().unwrap();
    let (rounds, failed, killed) = (AtomicU64::new(0), AtomicU64::new(0), AtomicU64::new(0));
    let done = |result: Result<(), Error>| {
        failed.fetch_add(result.is_err().into(), Ordering::Relaxed);
        explains("restarts", Blow::Kill, result);
        rounds.fetch_add(1, Ordering::Relaxed);
    };
    let work = |time: Duration| {
        let end = Instant::now() + time;
        thread::scope(|scope| {
            work_until(scope, &session, end, done);
            scope.spawn(|| {
                while Instant::now() < end {
                    thread::sleep(Duration::from_micros(5000 + random(10_000)));
                    let pids = session.process_ids();
                    let pid = rustix::process::Pid::from_raw(pids[random(2) as usize] as i32).unwrap();
                    let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
                    killed.fetch_add(1, Ordering::Relaxed);
                }
            });
        });
        session.restart().unwrap();
    };
    let own = std::process::id();
    work(Duration::from_millis(1000 * seconds / 4).max(Duration::from_secs(1)));
    held_at_rest();
    let (before, used) = (size_of(own), session.memory_stats().requested_bytes);
    let counts = [&rounds, &failed, &killed].map(|count| count.load(Ordering::Relaxed));
    work(Duration::from_secs(seconds));
    held_at_rest();
    let after = size_of(own);
    let [rounds, failed, killed] = [rounds, failed, killed].map(AtomicU64::into_inner);
    let (rounds, failed, killed) = (rounds - counts[0], failed - counts[1], killed - counts[2]);
    eprintln!(
        "{rounds} rounds, {failed} of them failed, {killed} executors killed in {seconds} s; KiB, descriptors, mappings: \
         {before:?}, then {after:?}"
    );
    assert!(after.0 < before.0 + 6 * 1024 + rounds / 64, "{} KiB became {}", before.0, after.0);
    assert!(after.1 <= before.1 + 2 && after.2 <= before.2 + 32, "{before:?} became {after:?}");
    assert_eq!(session.memory_stats().requested_bytes, used, "bytes in use");
    round(&session.create_library("after")).unwrap();
    // Two executors, and what they are forked from.
    let children = fs::read_to_string(format!("/proc/{own}/task/{own}/children")).unwrap_or_default();
    drop(session);
    assert!(children.split_whitespace().count() <= 3, "{children}");
    assert_eq!(fs::read_to_string(format!("/proc/{own}/task/{own}/children")).unwrap_or_default(), "");
}

//! Linked code under a real debugger and a real profiler.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on panics")]

mod common;

use common::{Farlink, available, compile, tool};
use farlink::Session;
use farlink::addr::ExecutorAddr;
use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// Longer than gdb takes on a busy machine.
const DEADLINE: Duration = Duration::from_secs(100);

/// A program of two sources. `total` is called by `main`; line 5 of it is where its result is known.
const TOTAL: &str = "int total(const int *values, int count) {\n    int sum = 0;\n    for (int i = 0; i < count; i++)\n        sum += values[i];\n    return sum;\n}\n";
const MAIN: &str = "int total(const int *values, int count);\nint main(void) {\n    int numbers[] = {1, 2, 39};\n    int answer = total(numbers, 3);\n    return answer;\n}\n";

/// What a person asks a debugger that has stopped in `total`.
const QUESTIONS: [&str; 5] = ["backtrace 2", "print sum", "print count", "up", "print numbers[2]"];

struct Program {
    dir: TempDir,
    objects: [PathBuf; 2],
}

fn program() -> Program {
    let dir = TempDir::new().unwrap();
    let flags = ["-fPIC", "-g"];
    let objects = [compile(dir.path(), "main.c", MAIN, &flags), compile(dir.path(), "total.c", TOTAL, &flags)];
    Program { dir, objects }
}

/// Runs gdb with these commands; gives what it prints.
fn gdb(dir: &Path, before: &[&str], commands: &[&str], args: &[&str]) -> String {
    let mut gdb = Command::new("gdb");
    gdb.current_dir(dir).args([
        "-nx",
        "-q",
        "-batch",
        "-ex",
        "set breakpoint pending on",
        "-ex",
        "set debuginfod enabled off",
    ]);
    gdb.args(before);
    for command in commands {
        gdb.args(["-ex", command]);
    }
    let output = dir.join("gdb");
    let file = fs::File::create(&output).unwrap();
    let gdb = gdb.args(args).stdin(Stdio::null()).stdout(file.try_clone().unwrap()).stderr(file);
    let mut child = gdb.spawn().unwrap();
    let start = Instant::now();
    while child.try_wait().unwrap().is_none() {
        if start.elapsed() > DEADLINE {
            let _ = child.kill();
            panic!("gdb does not end: {}", fs::read_to_string(&output).unwrap_or_default());
        }
        thread::sleep(Duration::from_millis(20));
    }
    fs::read_to_string(output).unwrap()
}

/// Checks the answers to [`QUESTIONS`].
fn check_answers(text: &str) {
    let shows = |what: &str| assert!(text.contains(what), "no {what:?} in {text}");
    shows("total (values=0x");
    shows("count=3) at");
    shows("total.c:5");
    shows("#1 ");
    shows("main () at");
    shows("main.c:4");
    for answer in ["$1 = 42", "$2 = 3", "$3 = 39"] {
        shows(answer);
    }
}

/// gdb runs a program in-process: a breakpoint by line and one by name, set before anything is linked, stop it; frames and
/// variables are shown.
#[test]
fn gdb_runs_a_program() {
    if !available("gdb_runs_a_program", "gdb") {
        return;
    }
    let Program { dir, objects } = program();
    for place in ["total.c:5", "total"] {
        let stop = format!("break {place}");
        let mut commands = vec![stop.as_str(), "run"];
        if place == "total" {
            commands.push("until 5");
        }
        commands.extend(QUESTIONS);
        let farlink = env!("CARGO_BIN_EXE_farlink");
        let [main, total] = objects.each_ref().map(|object| object.to_str().unwrap());
        let text = gdb(dir.path(), &[], &commands, &["--args", farlink, "run", "-g", "--in-process", main, total]);
        check_answers(&text);
    }
}

/// Thread-local variables do not keep gdb from what it does: it looks at what the dynamic linker loads for them. What stops in a
/// program of C++ with sections of its own for each function, compressed debug information and a template is shown too.
#[test]
fn gdb_and_thread_local_variables() {
    if !available("gdb_and_thread_local_variables", "gdb") {
        return;
    }
    let dir = TempDir::new().unwrap();
    let source = "thread_local int per_thread = 5;\nint shared = 7;\ntemplate <class T> T twice(T value) {\n    T result = value + value;\n    \
    return result;\n}\nint main() {\n    per_thread += 1;\n    return twice(per_thread);\n}\n";
    let commands = ["break twice.cc:5", "run", "backtrace 2", "print result", "print shared", "print per_thread"];
    for flags in [&["-fPIC", "-g"][..], &["-fPIC", "-g", "-gz", "-ffunction-sections"]] {
        let object = compile(dir.path(), "twice.cc", source, flags);
        let args = ["--args", env!("CARGO_BIN_EXE_farlink"), "run", "-g", "--in-process", object.to_str().unwrap()];
        let text = gdb(dir.path(), &[], &commands, &args);
        for what in ["twice<int> (value=6) at", "twice.cc:5", "main () at", "$1 = 12", "$2 = 7"] {
            assert!(text.contains(what), "no {what:?} in {text}");
        }
        // It does not know where the variable is, and says so; what it says of compressed information is not looked at.
        assert!(text.contains("Unhandled DWARF expression") || flags.contains(&"-gz"), "{text}");
    }
}

/// gdb attaches to the executor, over every kind of memory, while the program waits for it; the program goes on to its end.
#[test]
fn gdb_attaches_to_an_executor() {
    if !available("gdb_attaches_to_an_executor", "gdb") {
        return;
    }
    for options in [&[][..], &["--memory", "posix"], &["--memory", "remote"]] {
        let Program { dir, objects } = program();
        let run = Farlink::new().args(["run", "--wait-for-debugger"]).args(options).args(&objects);
        let mut running = run.start();
        let mut stderr = BufReader::new(running.child.stderr.take().unwrap());
        let mut line = String::new();
        stderr.read_line(&mut line).unwrap();
        let process = line.trim().strip_prefix("farlink: waiting for a debugger: gdb -p ").unwrap();
        let mut commands = vec!["break total.c:5", "continue"];
        commands.extend(QUESTIONS);
        commands.push("continue");
        let text = gdb(dir.path(), &["-p", process], &commands, &[]);
        check_answers(&text);
        assert_eq!(running.wait().code(), Some(42), "{options:?}");
        running.check_clean();
    }
}

/// gdb runs an executor that a controller connects to: the breakpoint is set before there is anything to stop in.
#[test]
fn gdb_runs_an_executor() {
    if !available("gdb_runs_an_executor", "gdb") {
        return;
    }
    let Program { dir, objects } = program();
    let socket = dir.path().join("socket");
    let farlink = env!("CARGO_BIN_EXE_farlink");
    let mut commands = vec!["handle SIGPIPE nostop", "break total.c:5", "run"];
    commands.extend(QUESTIONS);
    commands.push("continue");
    let text = thread::scope(|scope| {
        let run = || {
            while !socket.exists() {
                thread::sleep(Duration::from_millis(10));
            }
            let spec = format!("unix:{}", socket.display());
            Farlink::new().args(["run", "-g", "--connect", &spec]).args(&objects).output()
        };
        let run = scope.spawn(run);
        let text =
            gdb(dir.path(), &[], &commands, &["--args", farlink, "executor", "--unix", socket.to_str().unwrap()]);
        assert_eq!(run.join().unwrap().code, Some(42), "{text}");
        text
    });
    check_answers(&text);
}

/// The addresses and lengths of the files that debuggers of a session's executor are shown, the newest first.
fn shown(session: &Session) -> Vec<(u64, u64)> {
    let library = session.create_library("debugger");
    // The third word of the descriptor is its list: see GDB's manual, "JIT Declarations".
    let descriptor = library.lookup("__jit_debug_descriptor").unwrap();
    let words = |at: u64, count: usize| {
        let mut bytes = vec![0; 8 * count];
        session.read_memory(ExecutorAddr::new(at), &mut bytes).unwrap();
        bytes.chunks(8).map(|word| u64::from_le_bytes(word.try_into().unwrap())).collect::<Vec<_>>()
    };
    let mut found = Vec::new();
    let mut entry = words(descriptor.as_u64(), 3)[2];
    while entry != 0 {
        let [next, _, file, bytes] = words(entry, 4).try_into().unwrap();
        found.push((file, bytes));
        entry = next;
    }
    found
}

/// What is removed is taken back from debuggers; what they are shown is the object's file with its address in it. Buffers are
/// shared all the same, and a session that is not for debuggers shows nothing.
#[test]
fn objects_are_shown_and_taken_back() {
    let Program { dir: _dir, objects } = program();
    let [main, total] = objects.map(|object| fs::read(object).unwrap());
    for debug in [false, true] {
        let executor = (env!("CARGO_BIN_EXE_farlink"), vec!["executor".into()]);
        let session = Session::builder().debug(debug).executor(executor.0, executor.1).spawn().unwrap();
        let library = session.create_library("main");
        let total_object = library.add_object("total.o", total.clone()).unwrap();
        let address = library.lookup("total").unwrap();
        let main_object = library.add_object("main.o", main.clone()).unwrap();
        library.lookup("main").unwrap();
        if !debug {
            assert_eq!(shown(&session), []);
            continue;
        }
        let files = shown(&session);
        assert_eq!(files.iter().map(|file| file.1 as usize).collect::<Vec<_>>(), [main.len(), total.len()]);
        let mut file = vec![0; total.len()];
        session.read_memory(ExecutorAddr::new(files[1].0), &mut file).unwrap();
        assert!(file != total && file.windows(8).any(|word| word == address.as_u64().to_le_bytes()));
        let buffer = session.shared_buffer::<u64>(100).unwrap();
        session.write_memory(buffer.executor_addr(), &[7; 8]).unwrap();
        library.remove(main_object).unwrap();
        assert_eq!(shown(&session), files[1..]);
        library.remove(total_object).unwrap();
        assert_eq!(shown(&session), []);
    }
}

/// A profiler's map: where the functions are, with names as people write them, and nothing else.
fn names_in_map(text: &str) -> Vec<String> {
    let mut end = 0;
    let mut names = Vec::new();
    for line in text.lines() {
        let mut parts = line.splitn(3, ' ');
        let mut number = || u64::from_str_radix(parts.next().unwrap(), 16).unwrap();
        let (start, bytes) = (number(), number());
        assert!(start >= end && bytes > 0, "{text}");
        end = start + bytes;
        names.push(parts.next().unwrap().to_owned());
    }
    names
}

/// `--perf` leaves a map of the functions of the executor's process.
#[test]
fn perf_map() {
    let dir = TempDir::new().unwrap();
    let source = "namespace math { int twice(int x) { return 2 * x; } }\n\
                  #include <unistd.h>\n#include <cstdio>\nint main() { std::printf(\"%d\", getpid()); return math::twice(21); }\n";
    let object = compile(dir.path(), "twice.cc", source, &["-fPIC", "-O0"]);
    let output = Farlink::new().args(["run", "--perf"]).arg(object).output();
    assert_eq!(output.code, Some(42), "{output:?}");
    let path = format!("/tmp/perf-{}.map", output.stdout);
    let map = fs::read_to_string(&path).unwrap();
    fs::remove_file(path).unwrap();
    assert_eq!(names_in_map(&map), ["math::twice(int)", "main"]);
}

/// A program that does nothing but be in one function.
const BUSY: &str = "#include <time.h>\nvolatile unsigned long count;\n\
    __attribute__((noinline)) void spin_and_count(void) { for (int i = 0; i < 1000000; i++) count += i; }\n\
    int main(void) { clock_t end = clock() + CLOCKS_PER_SEC / 2; while (clock() < end) spin_and_count(); return 0; }\n";

/// Whether perf can record here. Where the kernel or the container forbids it there is nothing to test.
fn can_record(dir: &Path) -> bool {
    let record =
        Command::new("perf").args(["record", "-q", "-e", "cpu-clock", "-o"]).arg(dir.join("try")).arg("true").output();
    let can = record.is_ok_and(|output| output.status.success());
    if !can {
        eprintln!("SKIPPED perf_report: perf may not record here");
    }
    can
}

/// `perf report` shows linked functions by their names: from the map, and from the record that `perf inject` reads.
#[test]
fn perf_report() {
    let dir = TempDir::new().unwrap();
    if !available("perf_report", "perf") || !can_record(dir.path()) {
        return;
    }
    let object = compile(dir.path(), "busy.c", BUSY, &["-fPIC", "-O1"]);
    for form in ["map", "jitdump"] {
        let data = dir.path().join(form);
        let mut perf = Command::new("perf");
        perf.args(["record", "-q", "-k", "mono", "-e", "cpu-clock", "-F", "500", "-o"]).arg(&data);
        perf.env("JITDUMPDIR", dir.path()).arg(env!("CARGO_BIN_EXE_farlink")).args(["run", &format!("--perf={form}")]);
        let status = perf.arg(&object).status().unwrap();
        assert!(status.success(), "{status:?} {:?}", status.signal());
        let report = |data: &Path| {
            tool(
                Command::new("perf")
                    .current_dir(dir.path())
                    .args(["report", "--stdio", "--sort", "symbol", "-i"])
                    .arg(data),
            )
        };
        let text = if form == "map" {
            report(&data)
        } else {
            let injected = dir.path().join("injected");
            let mut inject = Command::new("perf");
            inject.current_dir(dir.path()).args(["inject", "--jit", "-i"]).arg(&data).arg("-o").arg(&injected);
            tool(&mut inject);
            report(&injected)
        };
        let share =
            text.lines().find(|line| line.contains("spin_and_count")).unwrap_or_else(|| panic!("{form}: {text}"));
        let percent: f64 = share.trim().split('%').next().unwrap().parse().unwrap();
        assert!(percent > 20.0, "{share}");
    }
    for entry in fs::read_dir("/tmp").unwrap().filter_map(Result::ok) {
        let name = entry.file_name().into_string().unwrap_or_default();
        let process = name.strip_prefix("perf-").and_then(|name| name.strip_suffix(".map"));
        if process.is_some_and(|process| !Path::new("/proc").join(process).exists()) {
            let _ = fs::remove_file(entry.path());
        }
    }
}

//! Seeing what a run does: `--trace`.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on panics")]

mod common;

use common::{Farlink, compile};
use serde_json::Value;
use tempfile::TempDir;

/// A program of two objects, one of which has an initializer.
const MAIN: &str = "int answer(void);\nint main(void) { return answer(); }\n";
const ANSWER: &str = "static int value;\n__attribute__((constructor)) static void set_up(void) { value = 42; }\n\
                      int answer(void) { return value; }\n";

struct Program {
    dir: TempDir,
    run: Farlink,
}

fn program(options: &[&str]) -> Program {
    let dir = TempDir::new().unwrap();
    let objects =
        [compile(dir.path(), "main.c", MAIN, &["-fPIC"]), compile(dir.path(), "answer.c", ANSWER, &["-fPIC"])];
    Program { run: Farlink::new().arg("run").args(options).args(objects), dir }
}

impl Program {
    /// Runs it with an option that names a file; gives what is in that.
    fn run(self, option: &str, file: &str) -> String {
        let path = self.dir.path().join(file);
        let output = self.run.arg(option).arg(&path).output();
        assert_eq!((output.code, output.stderr.as_str()), (Some(42), ""), "{output:?}");
        std::fs::read_to_string(path).unwrap()
    }
}

/// Begin and end of an event in microseconds.
fn span(event: &Value) -> (f64, f64) {
    let start = event["ts"].as_f64().unwrap();
    (start, start + event["dur"].as_f64().unwrap())
}

/// The trace has each phase for each object, the calls to the executor, and within each what the executor did for it: on the
/// same clock, in the other process, down to initializers by name.
#[test]
fn trace_of_two_processes() {
    for options in [&[][..], &["--memory", "remote"], &["--in-process"]] {
        let trace: Value = serde_json::from_str(&program(options).run("--trace", "trace.json")).unwrap();
        let events = trace["traceEvents"].as_array().unwrap();
        let of = |category: &str| -> Vec<&Value> { events.iter().filter(|event| event["cat"] == category).collect() };
        let names = |category: &str| -> Vec<&str> {
            of(category).into_iter().map(|event| event["name"].as_str().unwrap()).collect()
        };
        assert_eq!(names("run"), ["load inputs", "start executor", "link", "run"], "{options:?}");
        assert_eq!(names("phase"), ["prepare", "allocate", "resolve", "fix up", "finalize", "initialize"]);
        for phase in ["parse", "allocate", "fix up"] {
            for object in ["main.c.o", "answer.c.o"] {
                let is_it = |name: &&str| name.starts_with(phase) && name.ends_with(object);
                assert_eq!(names("object").into_iter().filter(is_it).count(), 1, "{phase} {object}");
            }
        }
        let initializer = of("linked");
        assert_eq!(initializer.len(), 1, "{initializer:?}");
        assert!(initializer[0]["name"].as_str().unwrap().starts_with("set_up ("), "{initializer:?}");
        let is_in_process = options == ["--in-process"];
        let calls = of("call");
        for service in of("service") {
            let (start, end) = span(service);
            let is_around = |call: &&&Value| {
                let (call_start, call_end) = span(call);
                call["name"] == service["name"] && call_start <= start && end <= call_end
            };
            // That of the question itself has not ended when it is answered.
            let call = calls.iter().find(is_around).unwrap_or_else(|| panic!("no call around {service} in {calls:#?}"));
            assert_eq!(call["pid"] == service["pid"], is_in_process);
        }
        assert!(of("service").iter().any(|event| event["name"] == "farlink.run_initializers"));
    }
}

/// A trace that cannot be written is an error of farlink's, before the program runs.
#[test]
fn trace_without_a_place() {
    let Program { dir: _dir, run } = program(&[]);
    let text = run.args(["--trace", "/nowhere/trace.json"]).failure();
    assert!(text.contains("/nowhere/trace.json"), "{text}");
}

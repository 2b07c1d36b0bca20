//! Seeing what a run does and has: `--trace`, `--map`.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on panics")]

mod common;

use common::{Farlink, available, compile, tool};
use serde_json::Value;
use std::process::Command;
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

/// The map as JSON has every byte of every stripe once, in order, and every section of every object, where it is as big as
/// in the object.
#[test]
fn map_of_the_memory() {
    for options in [&[][..], &["--memory", "remote"], &["--in-process"]] {
        let map: Value = serde_json::from_str(&program(options).run("--map", "map.json")).unwrap();
        let address =
            |value: &Value| u64::from_str_radix(value["addr"].as_str().unwrap().trim_start_matches("0x"), 16).unwrap();
        let bytes = |value: &Value| value["bytes"].as_u64().unwrap();
        let mut sections = Vec::new();
        for stripe in map["reservations"].as_array().unwrap().iter().flat_map(|one| one["stripes"].as_array().unwrap())
        {
            let mut at = address(stripe);
            for piece in stripe["pieces"].as_array().unwrap() {
                assert_eq!(address(piece), at, "{options:?}");
                at += bytes(piece);
                if let Some(section) = piece["section"].as_str() {
                    sections.push((piece["object"].as_str().unwrap().to_owned(), section.to_owned(), bytes(piece)));
                }
            }
            assert_eq!(at, address(stripe) + bytes(stripe), "{options:?}");
        }
        for (object, section, expected) in
            [("main.c.o", ".text", 9..30), ("answer.c.o", ".text", 7..30), ("answer.c.o", ".bss", 4..5)]
        {
            let is_it = |(name, found, _): &&(String, String, u64)| name.ends_with(object) && found == section;
            let found =
                sections.iter().find(is_it).unwrap_or_else(|| panic!("no {section} of {object} in {sections:?}"));
            assert!(expected.contains(&found.2), "{found:?}");
        }
        let total: u64 =
            map["objects"].as_array().unwrap().iter().map(|object| object["code_bytes"].as_u64().unwrap()).sum();
        assert!(total > 0 && map["live_bytes"].as_u64().unwrap() >= total);
    }
}

/// Picture and page are well-formed, whatever objects are called, name every object, and load nothing from elsewhere.
#[test]
fn map_as_a_picture() {
    if !available("map_as_a_picture", "python3") {
        return;
    }
    for file in ["map.svg", "map.html"] {
        let Program { dir, run } = program(&[]);
        let odd = dir.path().join("<odd> & \"named\".o");
        let object = compile(dir.path(), "odd.c", "int odd[1000] = {1};", &["-fPIC"]);
        std::fs::rename(object, &odd).unwrap();
        let path = dir.path().join(file);
        let output = run.arg(&odd).arg("--map").arg(&path).output();
        assert_eq!((output.code, output.stderr.as_str()), (Some(42), ""), "{output:?}");
        let text = std::fs::read_to_string(&path).unwrap();
        let svg = &text[text.find("<svg").unwrap()..text.find("</svg>").unwrap() + 6];
        let alone = dir.path().join("alone.svg");
        std::fs::write(&alone, svg).unwrap();
        let script = "import sys, xml.etree.ElementTree as e; print('\\n'.join(x.text or '' for x in \
                      e.parse(sys.argv[1]).iter('{http://www.w3.org/2000/svg}title')))";
        let titles = tool(Command::new("python3").arg("-c").arg(script).arg(&alone));
        for name in ["main.c.o", "answer.c.o", "<odd> & \"named\".o", ".text", "free"] {
            assert!(titles.lines().any(|line| line.ends_with(name)), "{name} is not in {titles}");
        }
        let links = text.matches("http").count();
        assert_eq!(links, 1, "only the name of the format: {file}");
    }
}

/// A map's format is told by the name of its file; one that tells none is refused before anything is linked.
#[test]
fn map_without_a_format() {
    let Program { dir: _dir, run } = program(&[]);
    let text = run.args(["--map", "map.png"]).failure();
    assert!(text.contains(".svg, .html or .json"), "{text}");
}

/// The statistics say what was linked and how long each phase took, as a table too.
#[test]
fn statistics_of_objects() {
    let Program { dir, run } = program(&["--stats=json"]);
    let output = run.output();
    assert_eq!(output.code, Some(42), "{output:?}");
    let stats: Value = serde_json::from_str(&output.stderr).unwrap();
    let linked = &stats["linked"];
    let sizes = ["main.c.o", "answer.c.o"].map(|name| std::fs::metadata(dir.path().join(name)).unwrap().len());
    assert_eq!((&linked["objects"], &linked["input_bytes"]), (&2.into(), &sizes.iter().sum::<u64>().into()));
    assert_eq!((&linked["global_symbols"], &linked["zero_fill_bytes"]), (&2.into(), &4.into()));
    // A call; two uses of the variable; the initializer in its array. Those of unwind information come on top.
    assert!(linked["relocations"].as_u64().unwrap() >= 4, "{linked}");
    assert!(linked["sections"].as_u64().unwrap() >= 6 && linked["content_bytes"].as_u64().unwrap() > 40, "{linked}");
    let phases: Vec<&String> = stats["milliseconds"].as_object().unwrap().keys().collect();
    assert_eq!(phases, ["allocate", "finalize", "fix_up", "initialize", "parse", "prepare", "resolve"]);
    assert!(stats["milliseconds"]["initialize"].as_f64().unwrap() > 0.0);
    let Program { dir: _dir, run } = program(&["--stats"]);
    let table = run.output().stderr;
    let row = |name: &str| table.lines().find(|line| line.trim_start().starts_with(name)).map(str::to_owned);
    assert!(row("objects").unwrap().trim().ends_with(" 2"), "{table}");
    assert!(table.contains("milliseconds\n") && row("fix_up").is_some(), "{table}");
}

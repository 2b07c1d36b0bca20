//! The examples do what they say.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on panics")]

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::Once;

/// The program of an example, which is built when all tests are.
fn example(name: &str) -> Command {
    let test = std::env::current_exe().unwrap();
    // Tests are in `deps`, examples beside it.
    let program = test.parent().and_then(std::path::Path::parent).unwrap().join("examples").join(name);
    static BUILD: Once = Once::new();
    if !program.exists() {
        // One test alone is being run.
        let build = || Command::new(env!("CARGO")).args(["build", "--package", "farlink", "--examples"]).status();
        BUILD.call_once(|| assert!(build().unwrap().success()));
    }
    Command::new(program)
}

fn output(command: &mut Command) -> String {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout).unwrap()
}

/// The calculator keeps its definitions over crashes and over what never ends, and says what was wrong.
#[test]
fn calculator() {
    let mut child = example("calculator").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let lines =
        ["double square(double x) { return x * x; }", "square(3) + sqrt(16)", "*(int *)8", "nonsense", "square(5)"];
    child.stdin.take().unwrap().write_all(lines.join("\n").as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let printed: Vec<&str> = text.lines().collect();
    assert!(output.status.success());
    assert_eq!(
        (printed[0], printed[2], printed.last()),
        ("13", "a new process has taken its place", Some(&"25")),
        "{text}"
    );
    assert!(printed[1].contains("SIGSEGV at the address 0x8") && printed[1].contains("in value"), "{text}");
    assert!(printed[3].starts_with("error: the compiler refused it"), "{text}");
}

/// A plugin is linked again when its source changes, and the value that it works on stays.
#[test]
fn hot_reload() {
    let dir = tempfile::tempdir().unwrap();
    let plugin = dir.path().join("plugin.c");
    let original = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../examples/plugin.c");
    fs::copy(original, &plugin).unwrap();
    let mut child = example("hot_reload").arg(&plugin).arg("600").stdout(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines().map(Result::unwrap);
    assert!(lines.next().unwrap().starts_with("linked "));
    let before: i64 = lines.next().unwrap().parse().unwrap();
    assert_eq!(before, 1);
    // Files' times may be coarse; the first source is older than this by a compilation.
    fs::write(&plugin, "long step(long value) { return value < 0 ? value : -value; }").unwrap();
    let after = lines.by_ref().take(300).find(|line| line.starts_with('-')).unwrap();
    assert!(after.parse::<i64>().unwrap() < 0);
    child.kill().unwrap();
    child.wait().unwrap();
}

/// A filter finds what the same condition finds here.
#[test]
fn query_filter() {
    let text = output(example("query_filter").arg("price == 999"));
    let rows: Vec<&str> = text.lines().filter(|line| line.starts_with("row ")).collect();
    assert_eq!(rows.len(), 3, "{text}");
    assert!(rows.iter().all(|row| row.ends_with(": 999")), "{text}");
    let none = output(example("query_filter").arg("price < 0"));
    assert!(none.contains(": 0 of them"), "{none}");
}

/// One plugin works, one crashes, one never ends: each is told of, and the host goes on.
#[test]
fn plugin_host() {
    let text = output(&mut example("plugin_host"));
    assert!(text.contains("count: 7, reported 28"), "{text}");
    assert!(text.contains("crash: ") && text.contains("SIGSEGV at the address 0x7"), "{text}");
    assert!(text.contains("stuck: ") && text.contains("did not return within 1s"), "{text}");
}

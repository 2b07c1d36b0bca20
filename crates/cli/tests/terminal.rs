//! What people see on a terminal, and programs in a pipe: progress, errors, help, completions and manual pages.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on panics")]

mod common;

use common::{Farlink, available, compile, tool};
use std::fs::{self, File};
use std::io::Read;
use std::path::Path;
use std::process::Command;
use tempfile::TempDir;

/// Runs the command on a terminal; gives what is seen there, and the exit status.
fn on_terminal(args: &[&str], env: &[(&str, &str)]) -> (String, Option<i32>) {
    use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
    let terminal = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
    grantpt(&terminal).unwrap();
    unlockpt(&terminal).unwrap();
    let path = ptsname(&terminal, Vec::new()).unwrap().into_string().unwrap();
    let open = || File::options().read(true).write(true).open(&path).unwrap();
    let mut child = {
        let mut command = Command::new(env!("CARGO_BIN_EXE_farlink"));
        command.args(args).env("TERM", "xterm").env_remove("NO_COLOR").env("LC_ALL", "C.UTF-8");
        command.envs(env.iter().copied()).stdin(open()).stdout(open()).stderr(open()).spawn().unwrap()
    };
    let mut seen = Vec::new();
    // The end of the last process on the terminal is an error here.
    let _ = File::from(terminal).read_to_end(&mut seen);
    (String::from_utf8_lossy(&seen).replace("\r\n", "\n"), child.wait().unwrap().code())
}

/// A program whose initializer takes longer than a moment, and that prints.
const SLOW: &str = "#include <stdio.h>\n#include <unistd.h>\n\
    __attribute__((constructor)) static void wait(void) { usleep(1200000); }\n\
    int main(void) { puts(\"ready\"); return 3; }\n";

/// A link that takes long says on a terminal what it is at, and leaves nothing of that behind. In a pipe it says nothing,
/// nor on a terminal if it is quick.
#[test]
fn progress() {
    let dir = TempDir::new().unwrap();
    let slow = compile(dir.path(), "slow.c", SLOW, &["-fPIC"]);
    let slow = slow.to_str().unwrap();
    for options in [&["run"][..], &["run", "--in-process"]] {
        let args = [options, &[slow]].concat();
        let (seen, code) = on_terminal(&args, &[]);
        assert_eq!(code, Some(3), "{seen}");
        assert!(seen.contains("linking, ") && seen.contains("initialize"), "{seen:?}");
        // The line is cleared before the program has the terminal.
        let last = seen.rfind("linking").unwrap();
        assert!(seen[last..].contains("\x1b[2K") && seen.ends_with("ready\n"), "{seen:?}");
        let output = Farlink::new().args(&args).output();
        assert_eq!((output.stdout.as_str(), output.stderr.as_str()), ("ready\n", ""));
    }
    let quick = compile(dir.path(), "quick.c", "int main(void) { return 4; }", &["-fPIC"]);
    assert_eq!(on_terminal(&["run", quick.to_str().unwrap()], &[]), (String::new(), Some(4)));
    let (seen, _) = on_terminal(&["run", slow], &[("TERM", "dumb")]);
    assert_eq!(seen, "ready\n");
}

/// Errors are reports on a terminal, in colours unless somebody wants none, and plain lines in a pipe.
#[test]
fn errors() {
    let dir = TempDir::new().unwrap();
    let source = "void missing(void); void absent(void); int main(void) { missing(); absent(); }";
    let object = compile(dir.path(), "main.c", source, &["-fPIC"]);
    let args = ["run", object.to_str().unwrap()];
    let (seen, code) = on_terminal(&args, &[("NO_COLOR", "1")]);
    assert_eq!(code, Some(125));
    let name = object.display();
    let expected = format!("  × 2 undefined symbols\n  ├─ missing, needed by {name}\n  ╰─ absent, needed by {name}\n");
    let other = format!("  × 2 undefined symbols\n  ├─ absent, needed by {name}\n  ╰─ missing, needed by {name}\n");
    assert!(seen == expected || seen == other, "{seen:?}");
    let (seen, _) = on_terminal(&args, &[]);
    assert!(seen.contains("\x1b[31m×\x1b[0m"), "{seen:?}");
    let (seen, _) = on_terminal(&args, &[("LC_ALL", "C"), ("NO_COLOR", "1")]);
    assert!(seen.starts_with("  x 2 undefined symbols\n  |- "), "{seen:?}");
    let plain = Farlink::new().args(args).failure();
    assert!(plain.starts_with("farlink: 2 undefined symbols\n  ") && plain.is_ascii(), "{plain:?}");
    let (seen, _) = on_terminal(&["run", "x.c"], &[("NO_COLOR", "1")]);
    assert!(seen.starts_with("  × cannot read x.c: "), "{seen:?}");
}

/// The subcommands, by the help of the command.
fn subcommands() -> Vec<String> {
    let help = Farlink::new().arg("--help").output().stdout;
    let commands = help.split("Commands:\n").nth(1).unwrap().split("\n\n").next().unwrap();
    let names =
        commands.lines().filter(|line| !line.starts_with("   ")).filter_map(|line| line.split_whitespace().next());
    names.map(str::to_owned).filter(|name| name != "help").collect()
}

/// Every subcommand's help has examples, and every one of them is a command that is understood.
#[test]
fn help_teaches_by_example() {
    let commands = subcommands();
    assert!(commands.len() >= 7, "{commands:?}");
    let mut tried = 0;
    for command in commands.iter().filter(|command| *command != "executor") {
        let help = Farlink::new().args([command, "--help"]).output().stdout;
        let examples = help.split("Examples:\n").nth(1).unwrap_or_else(|| panic!("no examples in {help}"));
        for line in examples.lines().filter(|line| line.contains("farlink ") && !line.contains("command:ssh")) {
            let example = &line[line.find("farlink ").unwrap()..];
            // What explains an example stands two blanks or more behind it.
            let example = example.split("  ").next().unwrap();
            let example = example.split(['|', '>', ')']).next().unwrap();
            let words: Vec<&str> = example.split_whitespace().skip(1).collect();
            let words: Vec<&str> = words.into_iter().take_while(|word| *word != "--").collect();
            let output = Farlink::new().args(&words).arg("--help").output();
            assert_eq!(output.code, Some(0), "{line}: {output:?}");
            let options: Vec<&&str> = words.iter().filter(|word| word.starts_with("--") && **word != "--dir").collect();
            for option in options {
                assert!(help.contains(option.split('=').next().unwrap()), "{option} of {line}");
            }
            tried += 1;
        }
    }
    assert!(tried > 15, "{tried}");
}

/// The script for bash completes subcommands and options; those of other shells name them all.
#[test]
fn completions() {
    let script = |shell: &str| {
        let output = Farlink::new().args(["completions", shell]).output();
        assert_eq!((output.code, output.stderr.as_str()), (Some(0), ""));
        output.stdout
    };
    for shell in ["zsh", "fish", "elvish", "powershell"] {
        let text = script(shell);
        for word in ["doctor", "trace", "wait-for-debugger"] {
            assert!(text.contains(word), "{word} is not in the script for {shell}");
        }
    }
    if !available("completions", "bash") {
        return;
    }
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("farlink.bash");
    fs::write(&path, script("bash")).unwrap();
    let complete = |words: &str, last: &str| {
        let count = words.split_whitespace().count();
        let program = format!(
            "source {}; COMP_WORDS=({words} {last}); COMP_CWORD={count}; _farlink farlink '{last}' '{}'; echo \"${{COMPREPLY[@]}}\"",
            path.display(),
            words.split_whitespace().last().unwrap_or_default()
        );
        tool(Command::new("bash").args(["-c", &program]))
    };
    assert_eq!(complete("farlink", "ru").trim(), "run");
    assert_eq!(complete("farlink run", "--wait").trim(), "--wait-for-debugger");
    assert_eq!(complete("farlink run --memory", "r").trim(), "remote");
}

/// There is a manual page for the command and for each subcommand, with its options.
#[test]
fn manual_pages() {
    let page = Farlink::new().arg("man").output().stdout;
    assert!(page.contains(".TH farlink 1"), "{page}");
    let dir = TempDir::new().unwrap();
    let output = Farlink::new().args(["man", "--dir"]).arg(dir.path()).output();
    assert_eq!(output.code, Some(0), "{output:?}");
    for command in subcommands() {
        let text = fs::read_to_string(dir.path().join(format!("farlink-{command}.1"))).unwrap();
        assert!(text.contains(".SH SYNOPSIS"), "{text}");
        if command == "run" {
            // Dashes are escaped so that they can be copied.
            assert!(text.contains("\\-\\-wait\\-for\\-debugger") && text.contains("Examples:"), "{text}");
        }
    }
    let text = Farlink::new().args(["man", "--dir", "/proc/nowhere"]).failure();
    assert!(text.contains("/proc/nowhere"), "{text}");
    assert!(Path::new("/proc").is_dir());
}

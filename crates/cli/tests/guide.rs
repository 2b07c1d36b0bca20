//! The guide's commands print what it says they print.
//!
//! In each file of `docs/guide`, a block of code after a line like "`sum.c`:" is a file; a block in `sh` is run in the
//! folder with those files; and a block in `text` after that is what all commands since the last such block have printed.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on panics")]

mod common;

use common::root;
use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use tempfile::TempDir;

/// A block of code with its language and the line of text before it.
struct Block {
    before: String,
    language: String,
    text: String,
}

fn blocks(text: &str) -> Vec<Block> {
    let mut blocks: Vec<Block> = Vec::new();
    let mut before = String::new();
    let mut is_inside = false;
    for line in text.lines() {
        match (line.strip_prefix("```"), is_inside) {
            (Some(language), false) => {
                let (before, language) = (std::mem::take(&mut before), language.to_owned());
                blocks.push(Block { before, language, text: String::new() });
                is_inside = true;
            }
            (Some(_), true) => is_inside = false,
            (None, true) => {
                let text = &mut blocks.last_mut().unwrap().text;
                text.push_str(line);
                text.push('\n');
            }
            (None, false) if !line.is_empty() => before = line.to_owned(),
            (None, false) => {}
        }
    }
    blocks
}

/// Runs commands with this command in `PATH`; gives what they print on both streams.
fn run(commands: &str, folder: &Path) -> String {
    let program = Path::new(env!("CARGO_BIN_EXE_farlink"));
    let path = format!("{}:{}", program.parent().unwrap().display(), std::env::var("PATH").unwrap());
    let output = folder.join("output");
    let file = fs::File::create(&output).unwrap();
    let mut shell = Command::new("sh");
    shell.args(["-eu", "-c", commands]).current_dir(folder).env("PATH", path).stdin(Stdio::null());
    let status = shell.stdout(file.try_clone().unwrap()).stderr(file).status().unwrap();
    let text = fs::read_to_string(&output).unwrap();
    assert!(status.success(), "{commands}{text}");
    text
}

/// Every file of the guide, in its own folder.
#[test]
fn commands_of_the_guide() {
    let mut run_blocks = 0;
    for entry in fs::read_dir(root().join("docs/guide")).unwrap() {
        let path = entry.unwrap().path();
        let folder = TempDir::new().unwrap();
        let mut printed = String::new();
        for block in blocks(&fs::read_to_string(&path).unwrap()) {
            let name = block.before.strip_prefix('`').and_then(|name| name.strip_suffix("`:"));
            match (block.language.as_str(), name) {
                (_, Some(name)) => fs::write(folder.path().join(name), block.text).unwrap(),
                ("sh", None) => {
                    printed += &run(&block.text, folder.path());
                    run_blocks += 1;
                }
                ("text", None) => {
                    let wanted: Vec<&str> = block.text.lines().map(str::trim_end).collect();
                    let found: Vec<&str> = printed.lines().map(str::trim_end).collect();
                    assert_eq!(found, wanted, "{}", path.display());
                    printed.clear();
                }
                _ => {}
            }
        }
        assert_eq!(printed, "", "{} does not say what its last commands print", path.display());
    }
    assert!(run_blocks >= 12, "{run_blocks}");
}

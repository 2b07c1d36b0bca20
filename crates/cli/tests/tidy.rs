//! Invariants of the source: what ARCHITECTURE.md promises about the crates holds.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on panics")]

use std::fs;
use std::path::{Path, PathBuf};

/// The crates from the bottom up: the folder, and whether unsafe code is forbidden in it.
const CRATES: [(&str, bool); 11] = [
    ("addr", true),
    ("wire", true),
    ("rpc", false),
    ("mem", false),
    ("graph", true),
    ("elf", true),
    ("executor", false),
    ("farlink", false),
    ("capi", false),
    ("cranelift", true),
    ("cli", false),
];

/// Longest source file in lines. A longer one wants to be two.
const MAX_LINES: usize = 450;

fn crates() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned()
}

fn sources(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            sources(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
}

/// Every crate is in the list, and depends only on crates that stand before it.
#[test]
fn crates_depend_downwards() {
    let mut folders: Vec<_> =
        fs::read_dir(crates()).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    folders.sort();
    let mut listed = CRATES.map(|(folder, _)| folder.to_owned()).to_vec();
    listed.sort();
    assert_eq!(folders, listed);
    for (position, (folder, _)) in CRATES.iter().enumerate() {
        let manifest = fs::read_to_string(crates().join(folder).join("Cargo.toml")).unwrap();
        let dependencies = manifest.lines().filter_map(|line| line.strip_suffix(".workspace = true"));
        for dependency in dependencies.filter(|name| name.starts_with("farlink")) {
            let name = dependency.strip_prefix("farlink-").unwrap_or("farlink");
            let below = CRATES.iter().position(|&(folder, _)| folder == name).unwrap();
            assert!(below < position, "{folder} depends on {name}");
        }
    }
}

/// Unsafe code is forbidden where it is said to be, and denied but for named rooms elsewhere.
#[test]
fn unsafe_code_is_where_it_is_said_to_be() {
    for (folder, is_forbidden) in CRATES {
        let source = crates().join(folder).join("src");
        let root = if source.join("lib.rs").exists() { source.join("lib.rs") } else { source.join("main.rs") };
        let level = if is_forbidden { "#![forbid(unsafe_code)]" } else { "#![deny(unsafe_code)]" };
        assert!(fs::read_to_string(&root).unwrap().contains(level), "{}: {level}", root.display());
    }
}

/// Every file says at its top what it holds, and is not too long to find one's way in.
#[test]
fn files_have_headers_and_an_end() {
    let mut found = Vec::new();
    for (folder, _) in CRATES {
        sources(&crates().join(folder).join("src"), &mut found);
    }
    assert!(found.len() > 50);
    for path in found {
        let text = fs::read_to_string(&path).unwrap();
        assert!(text.starts_with("//! "), "{} does not say what it holds", path.display());
        let code = text.split("\n#[cfg(test)]\nmod tests {").next().unwrap();
        assert!(code.lines().count() <= MAX_LINES, "{} has {} lines", path.display(), code.lines().count());
    }
}

/// Only one room of farlink-mem, and one file of farlink-rpc, make memory calls of the operating system. That file is all
/// the unsafe code of its crate.
#[test]
fn memory_calls_are_in_one_room() {
    let mut found = Vec::new();
    sources(&crates().join("mem").join("src"), &mut found);
    sources(&crates().join("rpc").join("src"), &mut found);
    let is_room = |path: &Path| path.iter().any(|part| part == "sys") || path.ends_with("rpc/src/ring/sys.rs");
    for path in found.iter().filter(|path| !is_room(path)) {
        let text = fs::read_to_string(path).unwrap();
        for call in ["rustix::mm", "rustix::shm", "libc::mmap", "libc::mprotect"] {
            assert!(!text.contains(call), "{} uses {call}", path.display());
        }
        let may_be_unsafe = path.iter().any(|part| part == "mem");
        assert!(may_be_unsafe || !text.contains("allow(unsafe_code)"), "{} has unsafe code", path.display());
    }
}

//! Damaged and outsized objects through a whole link, without running it: an error or a link, never a panic, and no time
//! or memory out of proportion.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on panics")]

use farlink::addr::ExecutorAddr;
use farlink::elf::Archive;
use farlink::{Error, Session};
use proptest::prelude::*;
use std::fmt::Write;
use std::fs;
use std::process::Command;
use std::sync::LazyLock;
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// Links an object by itself at an address that nothing runs at. Undefined symbols are at 0.
fn link(bytes: &[u8]) -> Result<(), Error> {
    let (session, _image) = Session::builder().image(ExecutorAddr::new(0x1000_0000), true)?;
    let library = session.create_library("hostile");
    library.add_object("hostile.o", bytes)?;
    library.link_all()
}

fn compile(name: &str, source: &str, compiler: &str, flags: &[&str]) -> Vec<u8> {
    let dir = TempDir::new().unwrap();
    let (path, object) = (dir.path().join(name), dir.path().join("object.o"));
    fs::write(&path, source).unwrap();
    let status = Command::new(compiler).arg("-c").args(flags).arg("-o").arg(&object).arg(&path).status().unwrap();
    assert!(status.success());
    fs::read(object).unwrap()
}

const C: &str = r#"
    #include <stdio.h>
    int common[10];
    static const char *const names[] = {"a", "b"};
    __attribute__((constructor)) static void init(void) { puts(names[0]); }
    __attribute__((destructor(200))) static void fini(void) { printf("%d\n", common[3]); }
    __attribute__((weak)) int weak(int n) { return n; }
    int main(int argc, char **argv) { return weak(argc) + common[argc]; }
    "#;

const CXX: &str = r#"
    #include <map>
    #include <stdexcept>
    #include <string>
    struct Base { virtual ~Base() {} virtual int f() { return 1; } };
    struct Derived : Base { int f() override { throw std::runtime_error("no"); } };
    static std::map<std::string, int> all;
    int run(Base &base) { try { return base.f() + all["x"]; } catch (std::exception &e) { return e.what()[0]; } }
    int main() { Derived derived; return run(derived); }
    "#;

/// Objects with everything that compilers write: debug information, groups, exceptions, initializers, common symbols.
static OBJECTS: LazyLock<Vec<Vec<u8>>> = LazyLock::new(|| {
    vec![
        compile("c.c", C, "cc", &["-O2", "-fPIC", "-fcommon", "-g", "-ffunction-sections"]),
        compile("cxx.cc", CXX, "c++", &["-O1", "-fPIE"]),
    ]
});

/// The objects link as they are, so that what the damage tests see is the damage.
#[test]
fn undamaged_objects_link() {
    for object in OBJECTS.iter() {
        link(object).unwrap();
    }
}

/// An object that ends anywhere is refused, or what is missing was not needed.
#[test]
fn cut_objects() {
    for object in OBJECTS.iter() {
        for len in (0..object.len()).step_by(97).chain(0..200) {
            let _ = link(&object[..len]);
        }
    }
}

/// Values that counts, sizes and offsets are not expected to have.
const EXTREMES: [u64; 6] = [0, 1, 0x7fff_ffff, 0xffff_ffff, 0x7fff_ffff_ffff_ffff, u64::MAX];

proptest! {
    #![proptest_config(ProptestConfig { cases: 1500, ..ProptestConfig::default() })]

    /// Bytes changed anywhere.
    #[test]
    fn damaged_objects(which in 0usize..2, changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..16)) {
        let mut bytes = OBJECTS[which].clone();
        for (at, value) in changes {
            let at = at.index(bytes.len());
            bytes[at] = value;
        }
        let _ = link(&bytes);
    }

    /// Extreme numbers at any word, headers and tables above all.
    #[test]
    fn extreme_numbers(which in 0usize..2, near_end in any::<bool>(), at in any::<prop::sample::Index>(), value in prop::sample::select(&EXTREMES[..])) {
        let mut bytes = OBJECTS[which].clone();
        // Section headers are at the end, the file header at the beginning.
        let words = bytes.len() / 8;
        let word = if near_end { words - 1 - at.index(words / 3) } else { at.index(words) };
        bytes[word * 8..word * 8 + 8].copy_from_slice(&value.to_le_bytes());
        let _ = link(&bytes);
    }

    /// An archive with bytes changed anywhere: its index and every member.
    #[test]
    fn damaged_archives(changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..12)) {
        static ARCHIVE: LazyLock<Vec<u8>> = LazyLock::new(|| {
            let dir = TempDir::new().unwrap();
            for (name, object) in ["a.o", "b_with_a_name_that_is_long.o"].iter().zip(OBJECTS.iter()) {
                fs::write(dir.path().join(name), object).unwrap();
            }
            let mut ar = Command::new("ar");
            ar.args(["rcs", "x.a", "a.o", "b_with_a_name_that_is_long.o"]).current_dir(dir.path());
            assert!(ar.status().unwrap().success());
            fs::read(dir.path().join("x.a")).unwrap()
        });
        let mut bytes = ARCHIVE.clone();
        let header_bytes = 4000.min(bytes.len());
        for (at, value) in changes {
            let at = at.index(header_bytes);
            bytes[at] = value;
        }
        if let Ok(archive) = Archive::parse("x.a", bytes.into()) {
            for member in archive.members().chain(archive.find("main")) {
                let _ = archive.member(member);
            }
        }
    }
}

fn assemble(source: &str) -> Vec<u8> {
    compile("generated.s", source, "cc", &[])
}

/// Links within a time that only an algorithm of the wrong kind needs more than, in a build without optimization too.
fn links_in_time(what: &str, object: &[u8]) {
    let start = Instant::now();
    link(object).unwrap();
    assert!(start.elapsed() < Duration::from_secs(20), "{what}: {:?}", start.elapsed());
}

/// Many functions in one section, each with unwind information; and as many sections, more than the numbers of an ELF
/// header count.
#[test]
fn large_objects() {
    let mut one_section = String::from(".text\n");
    for index in 0..40_000 {
        writeln!(one_section, ".globl f{index}\nf{index}: .cfi_startproc\n call f{}\n ret\n .cfi_endproc", index / 2)
            .unwrap();
    }
    links_in_time("one section", &assemble(&one_section));
    let mut many_sections = String::new();
    for index in 0..70_000 {
        writeln!(many_sections, ".section .text.f{index},\"ax\"\n.globl f{index}\nf{index}: call f{}@PLT", index / 2)
            .unwrap();
    }
    links_in_time("many sections", &assemble(&many_sections));
}

/// Terabytes of zeros cost nothing to link, and more than an address space has is an error.
#[test]
fn huge_zero_fill() {
    link(&assemble(".bss\n.globl big\nbig: .skip 0x100000000\n")).unwrap();
    let mut object = assemble(".bss\n.globl big\nbig: .skip 0x1122334455\n");
    let at = object.windows(8).position(|word| word == 0x11_2233_4455u64.to_le_bytes()).unwrap();
    object[at..at + 8].copy_from_slice(&(u64::MAX - 100).to_le_bytes());
    assert!(link(&object).is_err());
}

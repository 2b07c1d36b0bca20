//! `farlink link` and `farlink inspect` against tools that are not ours: GNU ld at the same addresses, and readelf.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on panics")]

mod common;

use common::{Farlink, compile, example, tool};
use serde_json::Value;
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use tempfile::TempDir;

const BASE: u64 = 0x1000_0000;

/// What `farlink link` wrote: the image, and its description.
struct Linked {
    image: Vec<u8>,
    json: Value,
}

fn hex(value: &Value) -> u64 {
    u64::from_str_radix(value.as_str().unwrap().strip_prefix("0x").unwrap(), 16).unwrap()
}

impl Linked {
    fn new(objects: &[PathBuf], options: &[&str]) -> Self {
        let dir = TempDir::new().unwrap();
        let (image, json) = (dir.path().join("image"), dir.path().join("json"));
        let run = Farlink::new().arg("link").args(objects).args(["--base", "0x10000000"]).args(options);
        let output = run.arg("--image").arg(&image).arg("--json").arg(&json).output();
        assert_eq!(output.code, Some(0), "{output:?}");
        let json = serde_json::from_slice(&fs::read(json).unwrap()).unwrap();
        Self { image: fs::read(image).unwrap(), json }
    }

    fn objects(&self) -> &Vec<Value> {
        self.json["objects"].as_array().unwrap()
    }

    /// The bytes at an address; zero past the end of the image.
    fn bytes(&self, addr: u64, len: u64) -> Vec<u8> {
        (addr..addr + len).map(|addr| self.image.get((addr - BASE) as usize).copied().unwrap_or(0)).collect()
    }
}

/// Links `object` with GNU ld so that every section that farlink placed is at the same address, and compares the bytes
/// of each. Sections that farlink makes itself (its GOT and stubs) are left out; ld has its own elsewhere.
fn same_as_ld(dir: &Path, object: &PathBuf, definitions: &[(&str, u64)], options_of_ld: &[&str]) -> usize {
    let options: Vec<String> =
        definitions.iter().flat_map(|(name, addr)| ["--define".to_owned(), format!("{name}={addr:#x}")]).collect();
    let options: Vec<&str> = options.iter().map(String::as_str).collect();
    let linked = Linked::new(std::slice::from_ref(object), &options);
    let sections: BTreeMap<u64, (String, u64)> = linked.objects()[0]["sections"]
        .as_array()
        .unwrap()
        .iter()
        .map(|section| {
            let (name, size) = (section["name"].as_str().unwrap().to_owned(), section["size"].as_u64().unwrap());
            (hex(&section["addr"]), (name, size))
        })
        .filter(|(_, (name, size))| !name.starts_with('$') && *size > 0)
        .collect();
    let mut script = String::from("SECTIONS {\n");
    for (addr, (name, _)) in &sections {
        script += &format!("  {name} {addr:#x} : {{ KEEP(*({name})) }}\n");
    }
    script += "  .tdata 0x20020000 : { *(.tdata) }\n  .tbss : { *(.tbss) }\n";
    script += "  .got 0x20000000 : { *(.got) *(.got.plt) }\n  .plt 0x20010000 : { *(.plt) *(.iplt) }\n";
    script += "  /DISCARD/ : { *(.note*) *(.comment) *(.eh_frame) }\n";
    for (name, addr) in definitions {
        script += &format!("  {name} = {addr:#x};\n");
    }
    script += "}\n";
    let (script_path, program) = (dir.join("script.ld"), dir.join("program"));
    fs::write(&script_path, script).unwrap();
    tool(Command::new("ld").args(options_of_ld).arg("-T").arg(&script_path).arg("-o").arg(&program).arg(object));
    let mut compared = 0;
    for (&addr, (name, size)) in &sections {
        let bytes = dir.join("section");
        let mut objcopy = Command::new("objcopy");
        tool(objcopy.args(["-O", "binary", "-j", name]).arg(&program).arg(&bytes));
        let expected = fs::read(&bytes).unwrap();
        if expected.is_empty() {
            // Zero fill has no bytes in the file.
            assert_eq!(linked.bytes(addr, *size), vec![0; *size as usize], "{name}");
            continue;
        }
        assert_eq!(expected.len() as u64, *size, "{name}");
        let ours = linked.bytes(addr, *size);
        let differs = (0..expected.len()).find(|&at| expected[at] != ours[at]);
        assert_eq!(differs, None, "{name} at {addr:#x} differs at this offset from ld's");
        compared += 1;
    }
    compared
}

const FREESTANDING: &str = r#"
    extern int far_function(int);
    extern int near_data;
    static const char *const words[] = {"zero", "one", "two", "three", "four", "five"};
    int table[64] = {1, 2, 3};
    int *const inside = &table[5];
    static int buffer[1000];
    __attribute__((noinline)) static int helper(int n) { return buffer[n & 511] + table[n & 63]; }
    __attribute__((noinline)) int recurse(int n) { return n ? recurse(n - 1) + helper(n) : near_data; }
    int choose(int n) {
        switch (n) {
        case 0: return helper(3);
        case 1: return recurse(5);
        case 2: return table[1] * 7;
        case 3: return *inside;
        case 4: return buffer[9] - 1;
        case 5: return far_function(n);
        default: return words[n % 6][0];
        }
    }
    int (*const functions[])(int) = {recurse, choose, far_function};
    double scale(double x) { return x * 3.25 + 1e100; }
    "#;

/// The linked bytes of every section are those of GNU ld for the same object at the same addresses: position-independent
/// or not, every optimization level, one section for each function or not.
#[test]
fn bytes_are_those_of_gnu_ld() {
    let dir = TempDir::new().unwrap();
    // In reach of a direct call, as ld makes it without a PLT for a symbol at a fixed address.
    let definitions = [("far_function", 0x1234_5678), ("near_data", 0x1300_0000)];
    for level in ["-O0", "-O1", "-O2", "-O3"] {
        for flags in
            [&["-fPIE"][..], &["-fno-pic", "-mcmodel=small"], &["-fPIE", "-ffunction-sections", "-fdata-sections"]]
        {
            let base = ["-ffreestanding", "-fno-asynchronous-unwind-tables", "-fno-stack-protector", level];
            let flags: Vec<&str> = base.iter().chain(flags).copied().collect();
            let object = compile(dir.path(), "oracle.c", FREESTANDING, &flags);
            let compared = same_as_ld(dir.path(), &object, &definitions, &["--no-relax"]);
            assert!(compared >= 3, "{flags:?}: only {compared} sections have bytes");
        }
    }
}

/// Every relocation of plain data and code that an assembler can be made to write, at the same addresses as GNU ld.
#[test]
fn relocations_are_those_of_gnu_ld() {
    let dir = TempDir::new().unwrap();
    let source = dir.path().join("relocations.s");
    let text = r#"
        .data
        .globl start
    start:
        .quad target, target+8, start-0x1000
        .long target, target-4, start+1
        .quad target-., start-.
        .long target-., start+16-.
        .word small, small+5
        .byte tiny, tiny+3
        .quad table@SIZE
        .long table@SIZE
        .text
        .globl code
        .type code, @function
    code:
        call target
        call local
        jne target
        movl $target, %eax
        movq $target, %rax
        movabsq $target, %rax
        leaq target(%rip), %rcx
        movl start(%rip), %edx
        cmpl $7, start+4(%rip)
        movb $1, start+8(%rip)
    local:
        ret
        .size code, .-code
        .section .rodata
        .globl table
    table:
        .long local-table, code-table
        .size table, 8
        .section .note.GNU-stack,""
        "#;
    fs::write(&source, text).unwrap();
    let object = dir.path().join("relocations.o");
    tool(Command::new("as").arg("-o").arg(&object).arg(&source));
    let definitions = [("target", 0x1555_0000), ("small", 0xfff0), ("tiny", 0x7f)];
    assert_eq!(same_as_ld(dir.path(), &object, &definitions, &["--no-relax"]), 3);
}

/// Loads through the GOT that need no GOT, and distances of thread-local variables, as GNU ld writes them.
#[test]
fn relaxations_are_those_of_gnu_ld() {
    let dir = TempDir::new().unwrap();
    let source = dir.path().join("relaxations.s");
    let mut text = String::from(".text\n.globl code\ncode:\n");
    for instruction in ["add", "or", "adc", "sbb", "and", "sub", "xor", "cmp"] {
        for register in ["rax", "rbx", "rdi", "r8", "r13"] {
            text += &format!(" {instruction} target@GOTPCREL(%rip), %{register}\n");
        }
    }
    text += r#"
        test %rax, target@GOTPCREL(%rip)
        test %r14, target@GOTPCREL(%rip)
        call *target@GOTPCREL(%rip)
        jmp *target@GOTPCREL(%rip)
        movq %fs:own@tpoff, %rax
        leaq zero@tpoff(%rax), %rcx
        movq $own@tpoff+4, %rdx
        .data
        .globl data
    data:
        .quad own@tpoff, zero@tpoff
        .section .tdata, "awT", @progbits
        .balign 16
        .quad 1
    own: .quad 2
        .section .tbss, "awT", @nobits
        .balign 32
        .skip 8
    zero: .skip 24
        .section .note.GNU-stack,""
        "#;
    fs::write(&source, text).unwrap();
    let object = dir.path().join("relaxations.o");
    tool(Command::new("as").arg("-o").arg(&object).arg(&source));
    assert_eq!(same_as_ld(dir.path(), &object, &[("target", 0x1555_0000)], &[]), 2);
}

/// Every global symbol that readelf shows in an object is shown by `farlink inspect`, with its size; so is every section
/// that has memory.
#[test]
fn inspect_shows_what_readelf_shows() {
    let dir = TempDir::new().unwrap();
    for (compiler, source) in [("cc", "hello.c"), ("c++", "words.cc")] {
        let object = dir.path().join("object.o");
        tool(Command::new(compiler).args(["-c", "-O1", "-fPIC", "-o"]).arg(&object).arg(example(source)));
        let shown = Farlink::new().arg("inspect").arg(&object).output();
        assert_eq!(shown.code, Some(0), "{shown:?}");
        let symbols = tool(Command::new("readelf").args(["-sW"]).arg(&object));
        let mut count = 0;
        for line in symbols.lines() {
            let fields: Vec<&str> = line.split_whitespace().collect();
            let [_, _, size, _, "GLOBAL" | "WEAK", _, section, name] = fields[..] else { continue };
            let line = shown.stdout.lines().find(|line| line.starts_with(&format!("symbol {name}:")));
            let line = line.unwrap_or_else(|| panic!("{name} is not shown"));
            assert!(line.contains(&format!(", {size} bytes,")), "{line} is not {size} bytes");
            assert_eq!(line.contains("external"), section == "UND", "{line}");
            count += 1;
        }
        assert!(count >= 2, "{symbols}");
        let sections = tool(Command::new("readelf").args(["-SW"]).arg(&object));
        for line in sections.lines().filter(|line| line.contains(" PROGBITS ") && line.contains(" AX ")) {
            let name = line.split(']').nth(1).unwrap().split_whitespace().next().unwrap();
            assert!(shown.stdout.contains(&format!("section {name} ")), "{name}");
        }
    }
}

/// Several objects link to one image; GOT entries and stubs are described and lead where they say.
#[test]
fn tables_are_described() {
    let dir = TempDir::new().unwrap();
    let source = "extern int far(int); extern int data; int f(void) { return far(data) + far(1); }";
    let f = compile(dir.path(), "f.c", source, &["-O2", "-fPIC", "-fno-asynchronous-unwind-tables"]);
    let data = compile(dir.path(), "data.c", "int data = 77;", &["-fPIC"]);
    let linked = Linked::new(&[f, data], &["--define", "far=0x7f0000001000"]);
    let [f, data] = &linked.objects()[..] else { panic!("two objects") };
    let address = |object: &Value, name: &str| {
        let symbols = object["symbols"].as_array().unwrap();
        hex(&symbols.iter().find(|symbol| symbol["name"] == name).unwrap()["addr"])
    };
    let word = |addr: u64| u64::from_le_bytes(linked.bytes(addr, 8).try_into().unwrap());
    assert_eq!(linked.bytes(address(data, "data"), 4), 77u32.to_le_bytes());
    for entry in f["got"].as_array().unwrap() {
        let wanted = match entry["symbol"].as_str().unwrap() {
            "far" => 0x7f00_0000_1000,
            name => address(data, name),
        };
        assert_eq!(word(hex(&entry["addr"])), wanted);
    }
    let stubs = f["stubs"].as_array().unwrap();
    assert_eq!((stubs.len(), stubs[0]["symbol"].as_str()), (1, Some("far")));
    let stub = hex(&stubs[0]["addr"]);
    let code = linked.bytes(stub, 6);
    assert_eq!(code[..2], [0xff, 0x25]);
    let slot = (stub + 6).wrapping_add_signed(i32::from_le_bytes(code[2..6].try_into().unwrap()).into());
    assert_eq!(word(slot), 0x7f00_0000_1000);
}

/// Undefined symbols are an error, or at 0 if that is asked for; a base that is not a page's, and a file that cannot be
/// written, are errors too; a description on standard output is JSON.
#[test]
fn options() {
    let dir = TempDir::new().unwrap();
    let object = compile(dir.path(), "u.c", "extern int missing; int f(void) { return missing; }", &["-fPIC"]);
    let link = |options: &[&str]| Farlink::new().arg("link").arg(&object).args(options);
    let message = link(&["--base", "0x10000"]).failure();
    assert!(message.contains("missing, needed by"), "{message}");
    let output = link(&["--base", "0x10000", "--undefined-zero", "--json", "-"]).output();
    let json: Value = serde_json::from_str(&output.stdout).unwrap();
    assert_eq!((output.code, json["base"].as_str()), (Some(0), Some("0x10000")));
    let message = link(&["--base", "0x10001", "--undefined-zero"]).failure();
    assert!(message.contains("0x10001") && message.contains("4096"), "{message}");
    let message = link(&["--base", "4096", "--undefined-zero", "--image", "/nonexistent/image"]).failure();
    assert!(message.contains("/nonexistent/image"), "{message}");
}

/// Every member of the system's static zlib and libpng links by itself.
#[test]
fn members_of_system_archives() {
    for name in ["libz.a", "libpng16.a"] {
        let archive = Path::new("/usr/lib/x86_64-linux-gnu").join(name);
        if !common::available("members_of_system_archives", &archive) {
            continue;
        }
        let dir = TempDir::new().unwrap();
        tool(Command::new("ar").arg("x").arg(&archive).current_dir(dir.path()));
        let mut count = 0;
        for entry in fs::read_dir(dir.path()).unwrap() {
            let path = entry.unwrap().path();
            let run = Farlink::new().arg("link").arg(&path).args(["--base", "0x10000000", "--undefined-zero"]);
            let output = run.output();
            assert_eq!(output.code, Some(0), "{}: {}", path.display(), output.stderr);
            count += 1;
        }
        assert!(count > 10, "{name} has {count} members");
    }
}

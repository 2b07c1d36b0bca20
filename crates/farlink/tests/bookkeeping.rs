//! What small objects take while they are linked: of the controller, counted by an allocator, and of linked memory. Being its
//! own executor, this test has a `main` of its own.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on panics")]

use farlink::{Library, Memory, Object, Session};
use object::read::elf::{ElfFile64, FileHeader, SectionHeader};
use object::{Endianness, elf};
use std::alloc::{GlobalAlloc, Layout, System};
use std::fs;
use std::process::Command;
use std::sync::atomic::{AtomicI64, Ordering};
use tempfile::TempDir;

/// Counts the bytes that are allocated, as the C library rounds them.
struct Counting;

#[global_allocator]
static COUNTING: Counting = Counting;

static LIVE_BYTES: AtomicI64 = AtomicI64::new(0);

/// Bytes that the C library's heap takes for so many: with its header, in multiples of 16, and 32 at least.
fn taken(bytes: usize) -> i64 {
    ((bytes + 8).next_multiple_of(16).max(32)) as i64
}

// SAFETY: everything is done by the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        LIVE_BYTES.fetch_add(taken(layout.size()), Ordering::Relaxed);
        // SAFETY: the caller keeps to the same contract.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        LIVE_BYTES.fetch_sub(taken(layout.size()), Ordering::Relaxed);
        // SAFETY: as above.
        unsafe { System.dealloc(memory, layout) }
    }

    unsafe fn realloc(&self, memory: *mut u8, layout: Layout, bytes: usize) -> *mut u8 {
        LIVE_BYTES.fetch_add(taken(bytes) - taken(layout.size()), Ordering::Relaxed);
        // SAFETY: as above.
        unsafe { System.realloc(memory, layout, bytes) }
    }
}

fn live_bytes() -> i64 {
    LIVE_BYTES.load(Ordering::Relaxed)
}

const OBJECTS: usize = 10_000;

/// Bytes that may be kept for each object.
const BYTES_PER_OBJECT: i64 = 400;

/// Bytes of linked memory that an object may take besides those of its sections.
const LINKED_BYTES_MORE: u64 = 64;

/// Bytes that may be left for each when all have been removed.
const BYTES_LEFT: i64 = 8;

fn main() {
    farlink::executor::init();
    if std::env::args().nth(1).as_deref() == Some("--list") {
        // What test runners ask for.
        println!("bookkeeping: test");
        return;
    }
    for memory in [Memory::Shared, Memory::Posix] {
        many_small_objects(&Session::builder().memory(memory).spawn().unwrap());
    }
    many_small_objects(&Session::in_process().unwrap());
    println!("bookkeeping: all tests passed");
}

/// A function with data, unwind information and a call of the C library, as a compiler writes it, that fills whole lines.
fn template() -> Vec<u8> {
    let source = "#include <stdlib.h>
        static volatile long data = 1000;
        int tiny_00000000(int x) { return abs(x) + data; }
        __asm__(\".text; .balign 32\");";
    let dir = TempDir::new().unwrap();
    let (text, object) = (dir.path().join("tiny.c"), dir.path().join("tiny.o"));
    fs::write(&text, source).unwrap();
    let flags = ["-c", "-O1", "-fPIC", "-fno-builtin", "-fno-toplevel-reorder", "-fasynchronous-unwind-tables", "-o"];
    assert!(Command::new("cc").args(flags).arg(&object).arg(&text).status().unwrap().success());
    fs::read(object).unwrap()
}

/// Bytes of the sections that are linked.
fn own_bytes(object: &[u8]) -> u64 {
    let file = ElfFile64::<Endianness>::parse(object).unwrap();
    let header = file.elf_header();
    let endian = header.endian().unwrap();
    let sections = header.section_headers(endian, object).unwrap().iter();
    let linked = sections.filter(|section| (section.sh_flags(endian).0 & elf::SHF_ALLOC.0) != 0);
    linked.map(|section| section.sh_size(endian)).sum()
}

fn name(number: usize) -> String {
    format!("tiny_{number:08}")
}

/// Adds and links a copy of the template, one by one.
fn link(library: &Library, template: &[u8], digits: &[usize], number: usize) -> Object {
    let (name, mut bytes) = (name(number), template.to_vec());
    for &at in digits {
        bytes[at..at + 8].copy_from_slice(&name.as_bytes()[5..]);
    }
    let object = library.add_object(&name, bytes).unwrap();
    library.lookup(&name).unwrap();
    object
}

/// What is kept of a small object is a few hundred bytes, whatever its file has, and what it takes of linked memory is little
/// more than its sections; all of it comes back when all have been removed.
fn many_small_objects(session: &Session) {
    let template = template();
    let starts = template.windows(14).enumerate().filter(|(_, window)| window.starts_with(b"tiny_00000000"));
    let digits: Vec<usize> = starts.map(|(at, _)| at + 5).collect();
    let library = session.create_library("main");
    // What is there once, however many objects there are.
    let first = link(&library, &template, &digits, OBJECTS);
    let mut objects = Vec::with_capacity(OBJECTS);
    let linked_before = session.memory_stats().live_bytes;
    let before = live_bytes();
    objects.extend((0..OBJECTS).map(|number| link(&library, &template, &digits, number)));
    let kept = (live_bytes() - before) / OBJECTS as i64;
    assert!(kept <= BYTES_PER_OBJECT, "{kept} bytes for each object, whose file has {} bytes", template.len());
    let linked = (session.memory_stats().live_bytes - linked_before) / OBJECTS as u64;
    let own = own_bytes(&template);
    assert!(linked <= own + LINKED_BYTES_MORE, "{linked} bytes of linked memory for an object of {own}");
    for number in [0, 1, OBJECTS / 2, OBJECTS - 1] {
        let function = library.function::<fn(i32) -> i32>(&name(number)).unwrap();
        // SAFETY: the function is declared so.
        assert_eq!(unsafe { function.call((-7,)) }.unwrap(), 1007);
    }
    for &object in &objects {
        library.remove(object).unwrap();
    }
    // Tables of what is there go with the last object.
    library.remove(first).unwrap();
    assert_eq!(session.memory_stats().live_bytes, 0);
    let left = (live_bytes() - before) / OBJECTS as i64;
    assert!(left <= BYTES_LEFT, "{left} bytes are left for each object");
    assert!(library.lookup(&name(0)).is_err());
    let again = link(&library, &template, &digits, 0);
    library.remove(again).unwrap();
}

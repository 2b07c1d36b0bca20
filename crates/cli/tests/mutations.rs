//! Real objects with damaged bytes: whatever the damage, linking ends, with a result or with an error that names the object.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on panics")]

mod common;

use common::{root, tool};
use farlink::Session;
use farlink::addr::ExecutorAddr;
use std::fs;
use std::process::Command;
use tempfile::TempDir;

/// Damaged copies of each object.
const COPIES: usize = 1500;

/// The same numbers in each run (xorshift64).
struct Random(u64);

impl Random {
    fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) as usize % limit
    }
}

#[test]
fn damaged_objects() {
    let dir = TempDir::new().unwrap();
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    let (mut linked, mut refused) = (0, 0);
    for (compiler, name, flags) in [
        ("cc", "tls.c", "-O1 -g"),
        ("cc", "tls.c", "-O2 -fPIC -mtls-dialect=gnu2"),
        ("cc", "ifunc.c", "-O1 -fno-pic"),
        ("cc", "life.c", "-O2 -fPIC"),
        ("cc", "symbols.c", "-O1 -fcommon -fPIC -mcmodel=large"),
        ("c++", "unwind.cc", "-O1 -fPIC -ffunction-sections"),
    ] {
        let object = dir.path().join("object.o");
        let source = root().join("crates/cli/tests/features").join(name);
        tool(Command::new(compiler).arg("-c").args(flags.split(' ')).arg("-o").arg(&object).arg(source));
        let bytes = fs::read(object).unwrap();
        for _ in 0..COPIES {
            let mut damaged = bytes.clone();
            for _ in 0..=random.below(4) {
                let at = random.below(damaged.len());
                match random.below(4) {
                    0 => damaged[at] = random.below(256) as u8,
                    1 => damaged[at] ^= 1 << random.below(8),
                    2 => damaged[at..].iter_mut().take(8).for_each(|byte| *byte = 0xff),
                    _ => damaged.truncate(at.max(1)),
                }
            }
            let (session, _) = Session::builder().image(ExecutorAddr::new(0x1000_0000), true).unwrap();
            let library = session.create_library("damaged");
            match library.add_object("damaged.o", damaged).and_then(|_| library.link_all()) {
                Ok(()) => {
                    linked += 1;
                    // What debuggers would be shown of it is as long as its file, or nothing.
                    for graph in library.linked_graphs() {
                        let shown = farlink::elf::debug_object(&graph);
                        assert!(shown.is_none_or(|shown| shown.len() == graph.bytes().len()));
                    }
                }
                Err(error) => {
                    refused += 1;
                    let text = error.to_string();
                    assert!(text.contains("damaged.o") || text.contains("bytes") || text.contains("section"), "{text}");
                }
            }
        }
    }
    // Damage in code and data goes unseen, that in structure does not.
    assert!(linked > 100 && refused > 100, "{linked} {refused}");
}

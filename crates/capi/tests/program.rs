//! A C program that uses the interface, built with the system's compiler, by the shared library and by the static one.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on panics")]

use std::path::{Path, PathBuf};
use std::process::Command;
use tempfile::TempDir;

const LINKED: &str = "
    #include <unistd.h>
    int noted = 3;
    int add(int a, int b) { return a + b; }
    double scale(double a, float b) { return a * b; }
    double sum(double *numbers, unsigned long count) {
        double sum = 0;
        for (unsigned long i = 0; i < count; i++) { sum += numbers[i]; numbers[i] = -numbers[i]; }
        return sum;
    }
    void note(int n) { noted = n; }
    void forever(void) { for (;;) pause(); }
    int entry(int argc, char **argv) { return argv[1][0] == 'a' ? argc : -1; }
    ";

fn cc(args: &[&std::ffi::OsStr]) {
    let output = Command::new("cc").args(["-std=c99", "-Wall", "-Wextra", "-Werror"]).args(args).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

/// Returns a library that was built with this test.
fn built(name: &str) -> PathBuf {
    let own = std::env::current_exe().unwrap();
    let folders = [own.parent().unwrap(), own.parent().unwrap().parent().unwrap()];
    let found = folders.iter().map(|folder| folder.join(name)).find(|path| path.exists());
    found.unwrap_or_else(|| panic!("{name} has not been built"))
}

/// The program does all that it does, in its own process and in another, and says so.
#[test]
fn a_c_program_uses_it() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR"));
    let dir = TempDir::new().unwrap();
    let [source, object, program] = ["linked.c", "linked.o", "program"].map(|name| dir.path().join(name));
    std::fs::write(&source, LINKED).unwrap();
    cc(&["-D_GNU_SOURCE", "-fPIC", "-O1", "-c", "-o"]
        .map(AsRef::as_ref)
        .into_iter()
        .chain([object.as_os_str(), source.as_os_str()])
        .collect::<Vec<_>>());
    let shared = built("libfarlink_capi.so");
    let (include, c) = (format!("-I{}", folder.display()), folder.join("tests/program.c"));
    let rpath = format!("-Wl,-rpath,{}", shared.parent().unwrap().display());
    let static_library = built("libfarlink_capi.a");
    for library in [&shared, &static_library] {
        cc(&[
            include.as_ref(),
            "-o".as_ref(),
            program.as_os_str(),
            c.as_os_str(),
            library.as_os_str(),
            rpath.as_ref(),
            // What Rust's standard library needs in a static one.
            "-lgcc_s".as_ref(),
            "-lm".as_ref(),
            "-lpthread".as_ref(),
            "-ldl".as_ref(),
        ]);
        let output = Command::new(&program).arg(&object).output().unwrap();
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{}: {stderr}", library.display());
        assert_eq!(String::from_utf8_lossy(&output.stdout), "all is well\n", "{stderr}");
    }
}

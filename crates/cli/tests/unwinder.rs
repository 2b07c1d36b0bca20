//! libgcc's unwinder in executors: there when it is needed, and not before.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on panics")]

mod common;

use common::Farlink;
use std::fs;
use tempfile::TempDir;

/// What programs find out whether the library is there by.
const IS_LOADED: &str = r#"
    #include <stdio.h>
    #include <string.h>
    static int is_loaded(void) {
        char line[512];
        int found = 0;
        FILE *maps = fopen("/proc/self/maps", "r");
        while (fgets(line, sizeof line, maps)) found |= strstr(line, "libgcc_s") != NULL;
        fclose(maps);
        return found;
    }
"#;

/// Runs a C program with these options; gives what it prints.
fn run(options: &[&str], program: &str) -> String {
    let dir = TempDir::new().unwrap();
    let source = dir.path().join("program.c");
    fs::write(&source, format!("{IS_LOADED}{program}")).unwrap();
    let output = Farlink::new().arg("run").args(options).arg(&source).output();
    assert_eq!(output.code, Some(0), "{output:?}");
    output.stdout
}

/// A program that unwinds nothing does without it; one that names what only that library has finds it.
#[test]
fn programs_that_unwind_have_it() {
    assert_eq!(run(&[], r#"int main(void) { printf("%d", is_loaded()); }"#), "0");
    let program = r#"
        #include <unwind.h>
        static _Unwind_Reason_Code count(struct _Unwind_Context *context, void *frames) {
            ++*(int *)frames;
            return _URC_NO_REASON;
        }
        __attribute__((noinline)) static int depth(int more) {
            int frames = 0;
            if (more) return depth(more - 1) + (more < 0);
            _Unwind_Backtrace(count, &frames);
            return frames;
        }
        int main(void) {
            int difference = depth(7) - depth(2);
            printf("%d %d", is_loaded(), difference);
        }
    "#;
    assert_eq!(run(&[], &format!("#pragma GCC optimize(\"O0\")\n{program}")), "1 5");
}

/// Where no library can be loaded any more it is there already: the C library wants it to end a thread.
#[test]
fn hardened_threads_end() {
    let program = r#"
        #include <pthread.h>
        static void *wait(void *unused) { for (;;) pthread_testcancel(); }
        static void *leave(void *unused) { pthread_exit("left"); }
        int main(void) {
            pthread_t waiting, leaving;
            void *result;
            pthread_create(&waiting, NULL, wait, NULL);
            pthread_create(&leaving, NULL, leave, NULL);
            pthread_cancel(waiting);
            pthread_join(waiting, &result);
            printf("%d ", result == PTHREAD_CANCELED);
            pthread_join(leaving, &result);
            printf("%s", (char *)result);
        }
    "#;
    for options in [&["--harden"][..], &["--sandbox"], &[]] {
        assert_eq!(run(options, program), "1 left", "{options:?}");
    }
}

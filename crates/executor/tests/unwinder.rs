//! The unwinder's library comes when something is first thrown.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on panics")]

use std::backtrace::Backtrace;
use std::panic::catch_unwind;

farlink_executor::unwinder_when_needed!();

fn is_loaded() -> bool {
    std::fs::read_to_string("/proc/self/maps").unwrap().contains("libgcc_s")
}

/// Panics of this program are caught as ever, with what is on the way dropped, and so is a backtrace had: the first of them
/// loads the library, on whichever thread it is.
#[test]
fn it_is_loaded_by_the_first_panic() {
    assert!(!is_loaded());
    let threads: Vec<_> = (0..4)
        .map(|number| {
            std::thread::spawn(move || {
                let kept = std::sync::Arc::new(number);
                let moved = std::sync::Arc::clone(&kept);
                let caught = catch_unwind(move || {
                    let on_the_way = moved;
                    std::panic::resume_unwind(Box::new(*on_the_way));
                });
                (caught.unwrap_err().downcast_ref::<i32>().copied(), std::sync::Arc::strong_count(&kept))
            })
        })
        .collect();
    for (number, thread) in (0..).zip(threads) {
        assert_eq!(thread.join().unwrap(), (Some(number), 1));
    }
    assert!(is_loaded());
    let backtrace = Backtrace::force_capture().to_string();
    assert!(backtrace.contains("it_is_loaded_by_the_first_panic"), "{backtrace}");
}

//! Work on many things that do not depend on each other, by as many threads as there are processors and as it is worth: a
//! thread takes tens of microseconds to start, so what is small is done without any.

use std::num::NonZero;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

/// Bytes of an object's file or content that are worth a thread: to read or to fix them up takes some milliseconds.
pub(crate) const BYTES_PER_THREAD: u64 = 1 << 20;

/// Returns how many threads work on so many bytes is worth.
pub(crate) fn threads_for(bytes: u64) -> usize {
    static PROCESSORS: OnceLock<usize> = OnceLock::new();
    match usize::try_from(bytes / BYTES_PER_THREAD).unwrap_or(usize::MAX) {
        0 | 1 => 1,
        // The system is asked once: that takes longer than a small link.
        wanted => wanted.min(*PROCESSORS.get_or_init(|| thread::available_parallelism().map_or(1, NonZero::get))),
    }
}

/// Does `work` for each number below `count`; gives the results in order, up to the first that failed, and its error. More
/// may have been done.
pub(crate) fn map<T: Send, E: Send>(
    count: usize,
    threads: usize,
    work: impl Fn(usize) -> Result<T, E> + Sync,
) -> (Vec<T>, Option<E>) {
    let next = AtomicUsize::new(0);
    let run = || {
        let mut done = Vec::new();
        loop {
            let number = next.fetch_add(1, Ordering::Relaxed);
            if number >= count {
                return done;
            }
            let result = work(number);
            if result.is_err() {
                // Numbers are given out in order: those before this one are done or being done, and nobody begins another.
                next.fetch_add(count, Ordering::Relaxed);
            }
            done.push((number, result));
        }
    };
    let mut done = thread::scope(|scope| {
        let others: Vec<_> = (1..threads.min(count)).map(|_| thread::Builder::new().spawn_scoped(scope, run)).collect();
        let mut done = run();
        // Where no thread can be had this one has done it all.
        for other in others.into_iter().flatten() {
            done.extend(other.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)));
        }
        done
    });
    done.sort_unstable_by_key(|&(number, _)| number);
    let mut results = Vec::with_capacity(done.len());
    for (_, result) in done {
        match result {
            Ok(result) => results.push(result),
            Err(error) => return (results, Some(error)),
        }
    }
    (results, None)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whoever does it, results are in order, and of several errors the first counts.
    #[test]
    fn results_are_in_order() {
        let failing = |at: usize| move |number: usize| if number >= at { Err(number) } else { Ok(number * 2) };
        for threads in [0, 1, 2, 7] {
            for count in [0, 1, 5, 1000] {
                let doubled: Vec<_> = (0..count).map(|number| number * 2).collect();
                assert_eq!(map(count, threads, failing(count)), (doubled.clone(), None));
                let at = count / 2;
                let error = (count > 0).then_some(at);
                assert_eq!(map(count, threads, failing(at)), (doubled[..at].to_vec(), error), "{threads} {count}");
            }
        }
    }

    /// What is small has no thread of its own, and nothing has more than there are processors.
    #[test]
    fn threads_are_few() {
        assert_eq!([0, BYTES_PER_THREAD, 2 * BYTES_PER_THREAD - 1].map(threads_for), [1; 3]);
        assert_eq!(threads_for(u64::MAX), thread::available_parallelism().map_or(1, NonZero::get));
    }
}

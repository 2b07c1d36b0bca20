//! Many objects at once: exceptions among them (W8), and how many can live.

use crate::observe::{Counters, MemoryOfBoth, check, since};
use crate::report::Report;
use crate::subject::{Template, call, session};
use crate::{Args, Result};
use std::collections::VecDeque;
use std::time::Instant;

/// As many links are timed beside each number of live objects.
const LAST: usize = 1000;

/// W8: an exception passes through a function of one of many objects that have unwind information.
pub(crate) fn throw(args: &Args, report: &Report) -> Result<()> {
    let (count, template) = (args.n(20_000), Template::read(args, "thru.o")?);
    let session = session(args)?;
    let library = session.create_library("main");
    library.add_shared_library("libstdc++.so.6")?;
    library.add_object("throw.o", args.read("throw.o")?)?;
    let start = Instant::now();
    for number in 0..count {
        library.add_object(&format!("thru_{number}"), template.copy(number))?;
    }
    library.link_all()?;
    report.times("W8", "link_all", &[since(start)]);
    let throw = || {
        let tens_of_nanoseconds = call(&library, "throw_time", 1)?;
        let caught = tens_of_nanoseconds >= 0;
        if caught { Ok(f64::from(tens_of_nanoseconds) * 10.0) } else { Err("the exception was not caught".into()) }
    };
    report.times("W8", "first_throw", &[throw()?]);
    let later = (0..300).map(|_| throw()).collect::<Result<Vec<_>>>()?;
    report.times("W8", "later_throw", &later);
    Ok(())
}

/// A million live tiny objects, and what they take at each power of ten on the way.
pub(crate) fn live(args: &Args, report: &Report) -> Result<()> {
    let (count, template) = (args.n(1_000_000), Template::read(args, "live.o")?);
    let session = session(args)?;
    let library = session.create_library("main");
    library.lookup("labs")?;
    let counters = Counters::now(&session)?;
    let memory = MemoryOfBoth::now(session.process_id())?;
    let name = |number: usize| format!("tiny_{number:08}");
    // What the last of so many cost.
    let mut times = VecDeque::with_capacity(LAST);
    for number in 0..count {
        let (name, bytes) = (name(number), template.copy(number));
        let start = Instant::now();
        library.add_object(&name, bytes)?;
        library.lookup(&name)?;
        let time = since(start);
        if times.len() == LAST {
            times.pop_front();
        }
        times.push_back(time);
        let live = number + 1;
        if live == count || [10_000, 100_000].contains(&live) {
            report.times("limit", &format!("live{live}_link_one"), times.make_contiguous());
            let prefix = format!("live{live}_");
            MemoryOfBoth::now(session.process_id())?.report_since(memory, report, "limit", &prefix, live);
        }
    }
    Counters::now(&session)?.report_since(&counters, report, "limit", "link", count);
    // Every function's value is that of the template.
    for number in (0..count).step_by((count / 1000).max(1)) {
        check(&name(number), &call(&library, &name(number), 1)?, &1001)?;
    }
    report.one("limit", "live_objects", "count", count as f64);
    let start = Instant::now();
    drop(library);
    report.times("limit", "remove_all", &[since(start)]);
    report.fact("limit", "failure_live", "none up to the number tried");
    Ok(())
}

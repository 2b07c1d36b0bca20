//! Workloads W1 to W3: tiny objects one by one and all at once, a big object, and objects of many functions.

use crate::observe::{Counters, MemoryOfBoth, check, rate, since};
use crate::report::Report;
use crate::subject::{call, check_tiny, session, tiny_name, tiny_objects};
use crate::{Args, Result};
use farlink::graph::Bytes;
use std::time::Instant;

/// W1: each tiny object is added and its function looked up; later each is removed.
pub(crate) fn one_by_one(args: &Args, report: &Report) -> Result<()> {
    let count = args.n(1000);
    // Always 150 or more, so that runs of 50 and 150 differ only in linking.
    let objects = tiny_objects(args, count.max(150))?;
    let names: Vec<_> = (0..count).map(tiny_name).collect();
    let session = session(args)?;
    let library = session.create_library("main");
    library.lookup("labs")?;
    let executor = session.process_id();
    // In this order: to be asked for its counters takes memory of the executor.
    let counters = Counters::now(&session)?;
    let memory = MemoryOfBoth::now(executor)?;
    let (mut times, mut linked) = (Vec::with_capacity(count), Vec::with_capacity(count));
    for (name, bytes) in names.iter().zip(&objects) {
        let bytes = bytes.clone();
        let start = Instant::now();
        linked.push(library.add_object(name, bytes)?);
        library.lookup(name)?;
        times.push(since(start));
    }
    Counters::now(&session)?.report_since(&counters, report, "W1", "link", count);
    MemoryOfBoth::now(executor)?.report_since(memory, report, "W1", "", count);
    for (number, name) in names.iter().enumerate() {
        check_tiny(&library, name, number)?;
    }
    report.times("W1", "link_one", &times);
    times.clear();
    let counters = Counters::now(&session)?;
    for object in linked {
        let start = Instant::now();
        library.remove(object)?;
        times.push(since(start));
    }
    Counters::now(&session)?.report_since(&counters, report, "W1", "remove", count);
    report.times("W1", "remove_one", &times);
    MemoryOfBoth::now(executor)?.report_sum_since(memory, report, "W1", "after_remove", count);
    Ok(())
}

/// W2: all tiny objects, one lookup.
pub(crate) fn all_at_once(args: &Args, report: &Report) -> Result<()> {
    let count = args.n(1000);
    let objects = tiny_objects(args, count)?;
    let names: Vec<_> = (0..count).map(tiny_name).collect();
    let names: Vec<_> = names.iter().map(String::as_str).collect();
    for _ in 0..args.iters(3) {
        let session = session(args)?;
        let library = session.create_library("main");
        library.lookup("labs")?;
        library.add_object("wrapper.o", args.read("wrapper.o")?)?;
        library.lookup("idfn")?;
        let objects = objects.clone();
        let counters = Counters::now(&session)?;
        let start = Instant::now();
        for (name, bytes) in names.iter().zip(objects) {
            library.add_object(name, bytes)?;
        }
        let added = since(start);
        let addresses = library.lookup_all(&names)?;
        let all = since(start);
        Counters::now(&session)?.report_since(&counters, report, "W2", "link_all", 1);
        check("addresses", &addresses.len(), &count)?;
        for (number, name) in names.iter().enumerate() {
            check_tiny(&library, name, number)?;
        }
        report.times("W2", "add_all", &[added]);
        report.times("W2", "link_all", &[all]);
        let start = Instant::now();
        drop(library);
        report.times("W2", "remove_all", &[since(start)]);
    }
    Ok(())
}

/// W3: sqlite3.o, from its bytes to the address of a function, with its unwind information; then SQL runs in it.
pub(crate) fn sqlite(args: &Args, report: &Report) -> Result<()> {
    let big: Bytes = args.read("sqlite3.o")?.into();
    let driver: Bytes = args.read("sqcheck.o")?.into();
    report.one("W3", "object_bytes", "bytes", big.len() as f64);
    let session = session(args)?;
    let rounds = args.iters(8);
    let counters = Counters::now(&session)?;
    for round in 0..rounds {
        let library = session.create_library(&format!("big{round}"));
        let bytes = big.clone();
        let start = Instant::now();
        library.add_object("sqlite3.o", bytes)?;
        library.lookup("sqlite3_open")?;
        let (time, rate) = (since(start), rate(big.len(), start));
        library.add_object("sqcheck.o", driver.clone())?;
        check("sq_check", &call(&library, "sq_check", 100)?, &4950)?;
        report.times("W3", if round == 0 { "link_first" } else { "link_warm" }, &[time]);
        if round > 0 {
            report.samples("W3", "link_warm_rate", "MB/s", &[rate]);
        }
        let start = Instant::now();
        drop(library);
        report.times("W3", "remove", &[since(start)]);
    }
    Counters::now(&session)?.report_since(&counters, report, "W3", "link+check+remove", rounds);
    Ok(())
}

/// The same without unwind information, and objects of many functions with it: how the cost grows.
pub(crate) fn many_functions(args: &Args, report: &Report) -> Result<()> {
    let cases = [
        ("sqlite3_noeh.o", "sqlite3_open", "link_sqlite3_without_eh_frame", 8),
        ("funcs_500.o", "f500", "link_500_functions", 12),
        ("funcs_1000.o", "f1000", "link_1000_functions", 12),
        ("funcs_2000.o", "f2000", "link_2000_functions", 12),
        ("funcs_4000.o", "f4000", "link_4000_functions", 12),
        ("funcs_4000_noeh.o", "f4000", "link_4000_functions_without_eh_frame", 12),
        ("funcs_100000.o", "f100000", "link_100000_functions", 3),
    ];
    let driver: Bytes = args.read("sqcheck.o")?.into();
    let session = session(args)?;
    let wanted = |file: &str| args.file.as_ref().is_none_or(|only| only == file);
    for (file, symbol, metric, rounds) in cases.into_iter().filter(|case| wanted(case.0)) {
        let object: Bytes = args.read(file)?.into();
        for _ in 0..args.iters(rounds) {
            let library = session.create_library(metric);
            let bytes = object.clone();
            let start = Instant::now();
            library.add_object(file, bytes)?;
            library.lookup(symbol)?;
            let time = since(start);
            if symbol.starts_with('f') {
                check(symbol, &call(&library, symbol, 41)?, &42)?;
            } else {
                library.add_object("sqcheck.o", driver.clone())?;
                check("sq_check", &call(&library, "sq_check", 100)?, &4950)?;
            }
            report.times("W3", metric, &[time]);
        }
    }
    Ok(())
}

//! Workload W4: calls of a linked function, one after another, and each after a pause.

use crate::observe::{Counters, check, since};
use crate::report::Report;
use crate::subject::{IntFunction, session};
use crate::{Args, Config, Result};
use farlink::addr::ExecutorAddr;
use farlink::{Library, Session};
use std::hint::black_box;
use std::time::{Duration, Instant};

/// How long the executor has nothing to do before each call.
const PAUSE: Duration = Duration::from_millis(1);

fn with_function(args: &Args) -> Result<(Session, Library)> {
    let session = session(args)?;
    let library = session.create_library("main");
    library.add_object("wrapper.o", args.read("wrapper.o")?)?;
    Ok((session, library))
}

fn timed_call(function: &IntFunction, round: usize) -> Result<f64> {
    let arg = i32::try_from(round)?;
    let start = Instant::now();
    let result = function.call(arg)?;
    let time = since(start);
    check("idfn", &result, &(arg + 1))?;
    Ok(time)
}

/// Calls without a pause: both sides are awake.
pub(crate) fn awake(args: &Args, report: &Report) -> Result<()> {
    let (session, library) = with_function(args)?;
    let (function, count) = (IntFunction::find(&library, "idfn")?, args.n(5000));
    for round in 0..count / 10 {
        timed_call(&function, round)?;
    }
    let counters = Counters::now(&session)?;
    let times = (0..count).map(|round| timed_call(&function, round)).collect::<Result<Vec<_>>>()?;
    Counters::now(&session)?.report_since(&counters, report, "W4", "call", count);
    report.times("W4", "runAsIntFunction", &times);
    if args.config == Config::Inproc {
        report.times("W4", "direct_call", &direct(library.lookup("idfn")?)?);
    }
    Ok(())
}

/// Calls after pauses: the executor sleeps, and the kernel has to wake it.
pub(crate) fn asleep(args: &Args, report: &Report) -> Result<()> {
    let (_session, library) = with_function(args)?;
    let function = IntFunction::find(&library, "idfn")?;
    let paused = |round| {
        std::thread::sleep(PAUSE);
        timed_call(&function, round)
    };
    let times = (0..args.n(500)).map(paused).collect::<Result<Vec<_>>>()?;
    report.times("W4", "call_asleep", &times);
    Ok(())
}

/// Calls a linked function of this process directly: what is left is the function.
#[allow(unsafe_code, reason = "linked code is called")]
fn direct(address: ExecutorAddr) -> Result<Vec<f64>> {
    // SAFETY: the address is that of `idfn` in wrapper.o, linked into this process, which takes and gives an `int`; the
    // library that it is in lives until the caller returns.
    let function: extern "C" fn(i32) -> i32 = unsafe { std::mem::transmute(address.as_u64() as usize) };
    let round = |_| {
        let start = Instant::now();
        let result = (0..1000).fold(0, |value, _| black_box(function)(value));
        let time = since(start) / 1000.0;
        check("idfn", &result, &1000)?;
        Ok(time)
    };
    (0..1000).map(round).collect()
}

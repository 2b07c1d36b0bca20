//! Workload W7: from nothing to an executor that has run linked code, and its end.

use crate::observe::{check, resident, since};
use crate::report::Report;
use crate::subject::{call, check_tiny, session, tiny_name, tiny_objects};
use crate::{Args, Result};
use std::time::Instant;

pub(crate) fn start(args: &Args, report: &Report) -> Result<()> {
    let object = tiny_objects(args, 1)?.remove(0);
    let name = tiny_name(0);
    for _ in 0..args.iters(10) {
        let start = Instant::now();
        let session = session(args)?;
        let connected = since(start);
        let library = session.create_library("main");
        check("abs", &call(&library, "abs", 2)?, &2)?;
        let called = since(start);
        library.add_object(&name, object.clone())?;
        check_tiny(&library, &name, 0)?;
        let linked = since(start);
        report.samples("W7", "controller_rss", "bytes", &[resident(std::process::id())?]);
        if let Some(executor) = session.process_id() {
            report.samples("W7", "executor_rss", "bytes", &[resident(executor)?]);
        }
        let end = Instant::now();
        drop(library);
        drop(session);
        report.times("W7", "start_to_connected", &[connected]);
        report.times("W7", "start_to_first_call_result", &[called]);
        report.times("W7", "start_to_first_linked_call_result", &[linked]);
        report.times("W7", "shutdown", &[since(end)]);
    }
    Ok(())
}

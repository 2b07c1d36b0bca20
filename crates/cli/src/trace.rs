//! `--trace`: what both processes did, in the JSON that Chrome and Perfetto show.
//!
//! See "Trace Event Format": complete events (`X`) in microseconds, and metadata (`M`) that names processes and threads.

use crate::error::Error;
use crate::run::Clock;
use farlink::graph::{LinkGraph, Place, SymbolType, with_demangled};
use farlink::{Session, TraceProcess, TraceSpan};
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::collections::HashMap;
use std::fs::File;
use std::io::{self, BufWriter, Write};

/// What is recorded while a program is linked, for [`write`] to add what came after.
pub(crate) struct Trace {
    spans: Vec<TraceSpan>,
    controller: u32,
    executor: u32,
}

/// Takes what a session has recorded, and gives linked functions their names.
pub(crate) fn take(session: &Session, in_process: bool, graphs: &[LinkGraph]) -> Result<Trace, Error> {
    let mut spans = session.take_trace()?;
    let functions = functions(graphs);
    for span in spans.iter_mut().filter(|span| span.name.is_empty()) {
        let address = span.function.map_or(0, farlink::addr::ExecutorAddr::as_u64);
        span.name = functions.get(&address).cloned().unwrap_or_else(|| format!("{address:#x}"));
    }
    let controller = std::process::id();
    // One that this process has not started has an id that is not known here, and 0 is nobody's.
    let executor = if in_process { controller } else { session.process_id().unwrap_or(0) };
    Ok(Trace { spans, controller, executor })
}

/// The names of linked functions by their addresses, with their objects.
fn functions(graphs: &[LinkGraph]) -> HashMap<u64, String> {
    let mut functions = HashMap::new();
    for graph in graphs {
        for symbol in graph.symbol_ids() {
            let info = graph.symbol(symbol);
            let is_function = matches!(info.kind, SymbolType::Function) && matches!(info.place, Place::Defined { .. });
            if let Some(address) = graph.symbol_address(symbol).filter(|_| is_function) {
                let name = format!("{} ({})", with_demangled(graph.symbol_name(symbol)), graph.name());
                functions.entry(address.as_u64()).or_insert(name);
            }
        }
    }
    functions
}

/// Writes what was recorded, and the parts of the run.
pub(crate) fn write(file: File, trace: &Trace, clock: &Clock) -> io::Result<()> {
    let origin = clock.started();
    let micros = |time: u64| time.saturating_sub(origin) as f64 / 1e3;
    let event = |name: &str, category: &str, process: u32, thread: u64, (start, end): (u64, u64), args: Value| {
        json!({
            "name": name, "cat": category, "ph": "X", "pid": process, "tid": thread,
            "ts": micros(start), "dur": end.saturating_sub(start) as f64 / 1e3, "args": args,
        })
    };
    let main_thread = u64::from(trace.controller);
    let parts = clock.spans().map(|(name, span)| event(name, "run", trace.controller, main_thread, span, json!({})));
    let spans = trace.spans.iter().map(|span| {
        let process = process_of(trace, span);
        let name = match span.phase {
            Some(phase) => format!("{phase} {}", span.name),
            None => span.name.clone(),
        };
        let mut args = serde_json::Map::new();
        if span.category == "object" {
            args.insert("object".to_owned(), span.name.clone().into());
        }
        if let Some(function) = span.function {
            args.insert("function".to_owned(), function.to_string().into());
        }
        event(&name, span.category, process, span.thread, (span.start, span.end), args.into())
    });
    let events: Vec<Value> = metadata(trace).into_iter().chain(parts).chain(spans).collect();
    let document = json!({ "traceEvents": events, "displayTimeUnit": "ms" });
    let mut out = BufWriter::new(file);
    write!(out, "{document}")?;
    out.flush()
}

fn process_of(trace: &Trace, span: &TraceSpan) -> u32 {
    match span.process {
        TraceProcess::Controller => trace.controller,
        TraceProcess::Executor => trace.executor,
    }
}

/// What processes and threads are called.
fn metadata(trace: &Trace) -> Vec<Value> {
    let name = |what: &str, process: u32, thread: u64, name: &str| json!({ "name": what, "ph": "M", "pid": process, "tid": thread, "args": { "name": name } });
    let mut events = vec![name("process_name", trace.controller, 0, "controller: farlink")];
    if trace.executor != trace.controller {
        events.push(name("process_name", trace.executor, 0, "executor"));
    }
    let threads: BTreeSet<(u32, u64)> = trace.spans.iter().map(|span| (process_of(trace, span), span.thread)).collect();
    events.extend(threads.into_iter().map(|(process, thread)| {
        let is_main = u64::from(process) == thread;
        name("thread_name", process, thread, if is_main { "main thread" } else { "calls" })
    }));
    events
}

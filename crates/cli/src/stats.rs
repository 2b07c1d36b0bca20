//! `--stats`: what is linked, and what it took of both processes.

use crate::args::StatsFormat;
use farlink::graph::LinkGraph;
use farlink::{Library, SessionStats};
use serde_json::{Map, Value, json};

/// Prints to stderr what a session has done, and what the objects of a library, whose graphs these are, consist of.
pub(crate) fn print(stats: &SessionStats, library: &Library, graphs: &[LinkGraph], format: StatsFormat) {
    let mut value = value(stats);
    value["linked"] = linked(graphs);
    value["milliseconds"] = milliseconds(library);
    match format {
        StatsFormat::Json => eprintln!("{value}"),
        StatsFormat::Table => {
            for (section, numbers) in value.as_object().into_iter().flatten() {
                eprintln!("{}", section.replace('_', " "));
                for (name, number) in numbers.as_object().into_iter().flatten() {
                    eprintln!("  {name:<48} {:>14}", shown(number));
                }
            }
        }
    }
}

fn shown(number: &Value) -> String {
    if number.is_null() { "unknown".to_owned() } else { number.to_string() }
}

/// What is linked of objects: sections with all that is in them, and what was left out does not count.
fn linked(graphs: &[LinkGraph]) -> Value {
    let (mut sections, mut relocations, mut symbols, mut content_bytes, mut zero_fill_bytes) = (0, 0, 0, 0, 0);
    for graph in graphs {
        sections += graph.sections().filter(|&section| graph.section_range(section).is_some()).count();
        symbols += graph.definitions().filter(|&symbol| graph.symbol_address(symbol).is_some()).count();
        let live = graph.sections().flat_map(|section| graph.section_blocks(section));
        for block in live.filter(|&block| graph.block(block).is_live()) {
            relocations += graph.block_edges(block).len();
            let info = graph.block(block);
            *if info.is_zero_fill() { &mut zero_fill_bytes } else { &mut content_bytes } += info.size;
        }
    }
    json!({
        "objects": graphs.len(),
        "input_bytes": graphs.iter().map(|graph| graph.bytes().len()).sum::<usize>(),
        "sections": sections,
        "global_symbols": symbols,
        "relocations": relocations,
        "content_bytes": content_bytes,
        "zero_fill_bytes": zero_fill_bytes,
    })
}

/// The time of each phase, to the microsecond.
fn milliseconds(library: &Library) -> Value {
    let phases = library.phase_times().phases().into_iter();
    let phases = phases.map(|(name, time)| (name.replace(' ', "_"), (time.as_micros() as f64 / 1e3).into()));
    Value::Object(phases.collect())
}

fn value(stats: &SessionStats) -> Value {
    let (memory, usage) = (&stats.memory, &stats.usage);
    let counts = |counts: &mut dyn Iterator<Item = (String, u64)>| -> Value {
        Value::Object(counts.map(|(name, count)| (name, count.into())).collect::<Map<_, _>>())
    };
    json!({
        "memory": {
            "reservations": memory.reservations,
            "reserved_bytes": memory.reserved_bytes,
            "committed_bytes": usage.committed_bytes,
            "live_allocations": memory.live_allocations,
            "live_bytes": memory.live_bytes,
            "table_bytes": memory.table_bytes,
            "requested_bytes": memory.requested_bytes,
            "bytes_lost_to_alignment": memory.live_bytes.saturating_sub(memory.requested_bytes),
            "free_bytes": memory.free_bytes,
            "largest_free_bytes": memory.largest_free_bytes,
        },
        "mappings": {
            "controller": usage.controller_mappings,
            "executor": usage.executor_mappings,
        },
        "round_trips": counts(&mut stats.calls.iter().map(|(name, &count)| (plain(name), count))),
        "system_calls_of_the_controller":
            counts(&mut stats.system_calls.iter().map(|(&name, &count)| (name.to_owned(), count))),
        "system_calls_of_the_executor":
            counts(&mut usage.executor_system_calls.iter().map(|(name, count)| (name.clone(), *count))),
    })
}

/// Leaves out what is the same in all names of functions.
fn plain(name: &str) -> String {
    let name = name.strip_prefix("__llvm_orc_").unwrap_or(name);
    name.strip_suffix("_wrapper").unwrap_or(name).to_owned()
}

//! `--stats`: what is linked, and what it took of both processes.

use crate::args::StatsFormat;
use farlink::SessionStats;
use serde_json::{Map, Value, json};

/// Prints to stderr.
pub(crate) fn print(stats: &SessionStats, format: StatsFormat) {
    let value = value(stats);
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

//! What a measurement sees from outside: memory, mappings and processor time of both processes as the kernel counts them,
//! and farlink's own counters.

use crate::Result;
use crate::report::Report;
use farlink::Session;
use std::collections::BTreeMap;
use std::fs;
use std::time::Instant;

/// Nanoseconds since `start`.
pub(crate) fn since(start: Instant) -> f64 {
    start.elapsed().as_nanos() as f64
}

/// Megabytes (of 10^6 bytes) per second.
pub(crate) fn rate(bytes: usize, start: Instant) -> f64 {
    bytes as f64 / 1e6 / start.elapsed().as_secs_f64()
}

/// An error unless what linked code gave is what it has to give.
pub(crate) fn check<T: PartialEq + std::fmt::Debug>(what: &str, got: &T, expected: &T) -> Result<()> {
    if got == expected { Ok(()) } else { Err(format!("{what}: got {got:?}, expected {expected:?}").into()) }
}

/// Memory of a process: proportional shares in bytes, and the number of mappings.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct ProcessMemory {
    anon: f64,
    shmem: f64,
    page_tables: f64,
    mappings: f64,
}

impl ProcessMemory {
    pub(crate) fn of(process: u32) -> Result<Self> {
        let rollup = fs::read_to_string(format!("/proc/{process}/smaps_rollup"))?;
        let status = fs::read_to_string(format!("/proc/{process}/status"))?;
        Ok(Self {
            anon: kibibytes(&rollup, "Pss_Anon:"),
            shmem: kibibytes(&rollup, "Pss_Shmem:"),
            page_tables: kibibytes(&status, "VmPTE:"),
            mappings: fs::read_to_string(format!("/proc/{process}/maps"))?.lines().count() as f64,
        })
    }

    fn values(self) -> [(&'static str, &'static str, f64); 4] {
        [
            ("pss_anon", "bytes", self.anon),
            ("pss_shmem", "bytes", self.shmem),
            ("pte", "bytes", self.page_tables),
            ("vmas", "count", self.mappings),
        ]
    }
}

/// The value of a line `KEY 123 kB`, in bytes; 0 if there is none.
fn kibibytes(text: &str, key: &str) -> f64 {
    let line = text.lines().find_map(|line| line.strip_prefix(key));
    line.and_then(|rest| rest.split_whitespace().next()?.parse::<f64>().ok()).unwrap_or(0.0) * 1024.0
}

/// Bytes of a process that are resident.
pub(crate) fn resident(process: u32) -> Result<f64> {
    Ok(kibibytes(&fs::read_to_string(format!("/proc/{process}/smaps_rollup"))?, "Rss:"))
}

/// Memory of this process and of the executor, if that is another.
#[derive(Clone, Copy)]
pub(crate) struct MemoryOfBoth {
    controller: ProcessMemory,
    executor: Option<ProcessMemory>,
}

impl MemoryOfBoth {
    pub(crate) fn now(executor: Option<u32>) -> Result<Self> {
        let controller = ProcessMemory::of(std::process::id())?;
        Ok(Self { controller, executor: executor.map(ProcessMemory::of).transpose()? })
    }

    /// Prints what each process has more of than `before`, for each of `count` objects.
    pub(crate) fn report_since(self, before: Self, report: &Report, workload: &str, prefix: &str, count: usize) {
        let processes = [
            ("controller", Some(self.controller), Some(before.controller)),
            ("executor", self.executor, before.executor),
        ];
        for (who, now, before) in processes {
            let (Some(now), Some(before)) = (now, before) else { continue };
            for ((name, unit, now), (_, _, before)) in now.values().into_iter().zip(before.values()) {
                let metric = format!("{prefix}{who}_{name}_per_obj");
                report.one(workload, &metric, unit, (now - before) / count as f64);
            }
        }
    }

    /// Prints what both together have more of than `before`, for each of `count` objects.
    pub(crate) fn report_sum_since(self, before: Self, report: &Report, workload: &str, prefix: &str, count: usize) {
        let sum = |both: Self| {
            let executor = both.executor.unwrap_or_default().values();
            both.controller.values().into_iter().zip(executor).map(|(a, b)| a.2 + b.2).collect::<Vec<_>>()
        };
        for (((name, unit, _), now), before) in self.controller.values().into_iter().zip(sum(self)).zip(sum(before)) {
            report.one(workload, &format!("{prefix}_{name}_per_obj"), unit, (now - before) / count as f64);
        }
    }
}

/// Processor time that a process and its threads have used, in nanoseconds; the kernel counts in steps of 10 ms.
fn processor_time(process: u32) -> Result<[f64; 2]> {
    let stat = fs::read_to_string(format!("/proc/{process}/stat"))?;
    let fields = stat.rsplit(')').next().ok_or("no process name")?;
    let ticks = |index: usize| fields.split_whitespace().nth(index)?.parse::<f64>().ok();
    // Fields 14 and 15 of proc_pid_stat(5); the state, field 3, is the first here.
    let (user, system) = ticks(11).zip(ticks(12)).ok_or("no processor time")?;
    Ok([user, system].map(|ticks| ticks * 1e9 / rustix::param::clock_ticks_per_second() as f64))
}

/// Counters at the beginning of some operations.
pub(crate) struct Counters {
    calls: BTreeMap<&'static str, u64>,
    system_calls: u64,
    processor: [f64; 2],
    executor_processor: Option<[f64; 2]>,
}

impl Counters {
    pub(crate) fn now(session: &Session) -> Result<Self> {
        Self::with_calls(session.stats()?.calls, session.process_id())
    }

    /// As [`Self::now`], where the calls to the executor are counted elsewhere.
    pub(crate) fn with_calls(calls: BTreeMap<&'static str, u64>, executor: Option<u32>) -> Result<Self> {
        let system_calls = farlink::mem::system_calls().chain(farlink::rpc::system_calls());
        Ok(Self {
            calls,
            system_calls: system_calls.map(|(_, count)| count).sum(),
            processor: processor_time(std::process::id())?,
            executor_processor: executor.map(processor_time).transpose()?,
        })
    }

    /// Prints what `count` operations took since `before`: round trips by name, the system calls that memory and the
    /// connection made in this process, and processor time of both.
    pub(crate) fn report_since(self, before: &Self, report: &Report, workload: &str, what: &str, count: usize) {
        let count = count as f64;
        // The counters themselves ask the executor what it holds.
        let own_question = "farlink.memory.usage";
        let delta = |name: &&'static str| self.calls[name] - before.calls.get(name).copied().unwrap_or(0);
        let names = self.calls.keys().filter(|&&name| name != own_question).map(|name| (name, delta(name)));
        let names: Vec<_> = names.filter(|&(_, calls)| calls > 0).collect();
        let calls: u64 = names.iter().map(|&(_, calls)| calls).sum();
        report.one(workload, &format!("{what}_rpc_per_op"), "count", calls as f64 / count);
        let names: Vec<_> = names.iter().map(|&(name, calls)| format!("{name}={:.3}", calls as f64 / count)).collect();
        report.fact(workload, &format!("{what}_rpc_names_per_op"), &names.join(" "));
        let system_calls = (self.system_calls - before.system_calls) as f64;
        report.one(workload, &format!("{what}_own_system_calls_per_op"), "count", system_calls / count);
        let both = [
            ("controller", Some(self.processor), Some(before.processor)),
            ("executor", self.executor_processor, before.executor_processor),
        ];
        for (who, now, before) in both {
            let (Some(now), Some(before)) = (now, before) else { continue };
            for (kind, (now, before)) in ["user", "sys"].into_iter().zip(now.into_iter().zip(before)) {
                report.one(workload, &format!("{what}_{who}_cpu_{kind}_per_op"), "ns", (now - before) / count);
            }
        }
    }
}

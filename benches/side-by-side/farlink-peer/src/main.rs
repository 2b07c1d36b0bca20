//! farlink's part in the side-by-side measurements: one configuration and one workload, in the lines that every peer
//! prints (see `benches/side-by-side/README.md`).
//!
//! Uses what every user of farlink can use. A number is printed only after what was linked has been called, or what was
//! written has been read back from the executor, and the result is right.

#![deny(unsafe_code)]

mod calls;
mod linking;
mod many;
mod memory;
mod observe;
mod report;
mod start;
mod subject;

use clap::{Parser, ValueEnum};
use report::Report;
use std::path::PathBuf;
use std::process::ExitCode;

/// What goes wrong is for whoever reads the driver's log.
type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

/// Measures one configuration of farlink with one workload.
#[derive(Debug, Parser)]
struct Args {
    /// Where the executor is and how code reaches it.
    config: Config,
    /// The workload; its name is the same for every peer.
    workload: String,
    /// Folder of the objects to link.
    #[arg(long)]
    objs: PathBuf,
    /// The program `farlink-executor`.
    #[arg(long)]
    executor: PathBuf,
    /// Operations, where the workload counts them.
    #[arg(long)]
    n: Option<usize>,
    /// Repetitions of the whole workload.
    #[arg(long)]
    iters: Option<usize>,
    /// W3eh: only the object of this name, to be profiled alone.
    #[arg(long)]
    file: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Config {
    /// Linked code runs in this process.
    Inproc,
    /// In a process of its own, over shared memory without a name.
    Memfd,
    /// In a process of its own, over POSIX shared memory.
    Posix,
}

impl Args {
    fn n(&self, default: usize) -> usize {
        self.n.unwrap_or(default)
    }

    fn iters(&self, default: usize) -> usize {
        self.iters.unwrap_or(default)
    }

    fn read(&self, name: &str) -> Result<Vec<u8>> {
        let path = self.objs.join(name);
        std::fs::read(&path).map_err(|error| format!("{}: {error}", path.display()).into())
    }

    fn run(&self) -> Result<()> {
        let name = self.config.to_possible_value().expect("no configuration is hidden");
        let report = Report::new(&format!("farlink-{}", name.get_name()));
        match self.workload.as_str() {
            "W1" => linking::one_by_one(self, &report),
            "W2" => linking::all_at_once(self, &report),
            "W3" => linking::sqlite(self, &report),
            "W3eh" => linking::many_functions(self, &report),
            "W4" => calls::awake(self, &report),
            "W4asleep" => calls::asleep(self, &report),
            "W5" => memory::cycle(self, &report),
            "W5scale" => memory::cycle_beside_live(self, &report),
            "W5million" => memory::cycle_beside_a_million(self, &report),
            "W6" => memory::bulk(self, &report),
            "W7" => start::start(self, &report),
            "W8" => many::throw(self, &report),
            "limit" => many::live(self, &report),
            other => Err(format!("unknown workload {other}").into()),
        }
    }
}

fn main() -> ExitCode {
    let args = Args::parse();
    match args.run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("farlink-peer {:?} {}: {error}", args.config, args.workload);
            ExitCode::FAILURE
        }
    }
}

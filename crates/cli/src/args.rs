//! The command line, as it is written.

use crate::doctor::{Probe, Target};
use crate::map::Format;
use clap::{Args, FromArgMatches, Parser, Subcommand, ValueEnum};
use clap_complete::Shell;
use farlink::{Memory, Perf};
use std::ffi::OsString;
use std::path::PathBuf;

/// Links object code straight into another process and runs it there.
#[derive(Parser)]
#[command(name = "farlink", version, max_term_width = 110, after_help = EXAMPLES)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,
}

impl Cli {
    /// Reads the command line.
    pub(crate) fn read() -> Result<Self, clap::Error> {
        if let Some(args) = RunArgs::read(std::env::args_os().skip(1)) {
            return Ok(Self { command: Command::Run(args) });
        }
        Self::try_parse()
    }
}

#[derive(Subcommand)]
pub(crate) enum Command {
    /// Link the inputs into an executor, run `main` there, and exit with its status.
    #[command(after_help = RUN_EXAMPLES)]
    Run(RunArgs),
    /// Link the inputs at a chosen address without running them; write the image and a description.
    #[command(after_help = LINK_EXAMPLES)]
    Link(LinkArgs),
    /// Show an object as the linker sees it.
    #[command(after_help = INSPECT_EXAMPLES)]
    Inspect(InspectArgs),
    /// Try every mechanism on this machine; say what works, what does not, why, and what farlink does about it.
    ///
    /// Ends with status 0 if farlink can run programs here.
    #[command(after_help = DOCTOR_EXAMPLES)]
    Doctor(DoctorArgs),
    /// Print what a shell needs to complete this command.
    #[command(after_help = COMPLETIONS_EXAMPLES)]
    Completions(CompletionsArgs),
    /// Print the manual page, or write those of all subcommands.
    #[command(after_help = MAN_EXAMPLES)]
    Man(ManArgs),
    /// Be an executor. `farlink executor --help` tells how.
    #[command(disable_help_flag = true)]
    Executor(ExecutorArgs),
}

const EXAMPLES: &str = "\
Examples:
  farlink run hello.c                       compile, link and run in a process of its own
  farlink run -g --wait-for-debugger sum.c  the same, for gdb -p PID
  farlink doctor                            what of this machine farlink can use
  farlink run --help                        more, and more examples";

const RUN_EXAMPLES: &str = "\
Examples:
  farlink run hello.c -- a b                compile a program and run it with two arguments
  farlink run main.o libfoo.a -l m          link objects, an archive and a library of the system
  farlink run main.rs                       a Rust program; C++, Fortran and assembly likewise
  farlink run --time --stats big.o          how long it takes, and what it takes
  farlink run --trace t.json --map m.html big.o
                                            when what happened, and where everything is
  farlink run -g --wait-for-debugger sum.c  wait for gdb -p PID
  perf record farlink run --perf busy.c     profile it; then perf report
  farlink run --connect 'command:ssh host farlink-executor --stdio' main.o
                                            run it on another machine

The exit status is the program's. 125 is farlink's own, and 128 and up say which signal ended the program.";

const LINK_EXAMPLES: &str = "\
Examples:
  farlink link --base 0x400000 --image out.bin --json out.json main.o
                                            the linked bytes, and where everything is
  farlink link --base 4096 --json - --undefined-zero main.o
                                            what is defined nowhere has the address 0
  farlink link --base 4096 --define puts=0x1000 --json - main.o
                                            or an address of your choice";

const INSPECT_EXAMPLES: &str = "\
Examples:
  farlink inspect main.o                    sections, blocks, edges and symbols
  farlink inspect libz.a | less             of all members of an archive";

const DOCTOR_EXAMPLES: &str = "\
Examples:
  farlink doctor                            what works here, what does not, and why
  farlink doctor --json | jq .can_run       for programs
  farlink doctor --executor ./my-executor   with another executor";

const COMPLETIONS_EXAMPLES: &str = "\
Examples:
  source <(farlink completions bash)        in this shell
  farlink completions zsh > ~/.zfunc/_farlink
  farlink completions fish > ~/.config/fish/completions/farlink.fish";

const MAN_EXAMPLES: &str = "\
Examples:
  farlink man | man -l -                    read it
  farlink man --dir ~/.local/share/man/man1
                                            install it";

/// What to link.
#[derive(Args)]
pub(crate) struct InputArgs {
    /// Objects (.o), archives (.a), shared libraries (.so), and sources (.c .cc .cpp .s .S .f90 .rs), which are
    /// compiled on the way by $CC, $CXX, $FC and $RUSTC with $CFLAGS, $CXXFLAGS, $FFLAGS and $RUSTFLAGS.
    #[arg(value_name = "INPUT", required = true)]
    pub(crate) inputs: Vec<PathBuf>,

    /// Link with libNAME.so or libNAME.a, or with the file FILE if NAME is :FILE.
    #[arg(short = 'l', value_name = "NAME")]
    pub(crate) libraries: Vec<String>,

    /// Link all members of the archive FILE, whether anything refers to them or not.
    #[arg(long, value_name = "FILE")]
    pub(crate) whole_archive: Vec<PathBuf>,

    /// Look for libraries in DIR before the system's directories.
    #[arg(short = 'L', value_name = "DIR")]
    pub(crate) library_dirs: Vec<PathBuf>,

    /// Compile sources with debug information and without optimization. Programs that are run are shown to debuggers: gdb
    /// sets breakpoints in them, by name or line, and shows their frames and variables.
    #[arg(short = 'g', long = "debug")]
    pub(crate) debug: bool,

    /// Define the symbol NAME as the address ADDR, decimal or with 0x.
    #[arg(long = "define", value_name = "NAME=ADDR", value_parser = parse_definition)]
    pub(crate) definitions: Vec<(String, u64)>,
}

#[derive(Args)]
pub(crate) struct RunArgs {
    #[command(flatten)]
    pub(crate) input: InputArgs,

    /// Call SYMBOL instead of main.
    #[arg(long, value_name = "SYMBOL", default_value = "main")]
    pub(crate) entry: String,

    /// Run the program in this process instead of one of its own.
    #[arg(long, conflicts_with_all = ["executor", "connect", "memory"])]
    pub(crate) in_process: bool,

    /// Run the program in the executor program at PATH instead of `farlink executor`.
    #[arg(long, value_name = "PATH")]
    pub(crate) executor: Option<PathBuf>,

    /// Run the program in the executor at SPEC: unix:PATH, tcp:HOST:PORT, or command:COMMAND for one on the standard
    /// streams of a shell command, as in 'command:ssh host farlink-executor --stdio'.
    #[arg(long, value_name = "SPEC", value_parser = parse_place, conflicts_with = "executor")]
    pub(crate) connect: Option<Address>,

    /// The file with the secret that an executor at tcp:HOST:PORT demands. Without it, one that was started with
    /// --insecure is expected.
    #[arg(long, value_name = "FILE", requires = "connect")]
    pub(crate) secret_file: Option<PathBuf>,

    /// How linked code reaches the executor: shared, or remote for tcp: and command:.
    #[arg(long, value_enum)]
    pub(crate) memory: Option<MemoryArg>,

    /// Keep linked code from making more code: no memory becomes executable but what is linked, no other program runs, and
    /// other processes are out of reach.
    #[arg(long, conflicts_with_all = ["in_process", "connect"])]
    pub(crate) harden: bool,

    /// As --harden, and no files by name and no network.
    #[arg(long, conflicts_with_all = ["in_process", "connect"])]
    pub(crate) sandbox: bool,

    /// Leave out what nothing refers to, from the entry on. Rust programs are always linked so.
    #[arg(long)]
    pub(crate) gc_sections: bool,

    /// Wait for a debugger to attach (gdb -p PID) before the program begins. Implies -g for what is linked, not for how
    /// sources are compiled.
    #[arg(long, conflicts_with = "connect")]
    pub(crate) wait_for_debugger: bool,

    /// Tell profilers where linked functions are: in /tmp/perf-PID.map, or with --perf=jitdump in a file for perf record
    /// -k mono and perf inject --jit, in $JITDUMPDIR or /tmp.
    #[arg(long, value_enum, value_name = "FORM", num_args = 0..=1, require_equals = true, default_missing_value = "map")]
    pub(crate) perf: Option<PerfForm>,

    /// Print to stderr how long each phase took.
    #[arg(long)]
    pub(crate) time: bool,

    /// Print to stderr what is linked and what it took of both processes, before the program begins: as a table or as
    /// JSON.
    #[arg(long, value_enum, value_name = "FORMAT", num_args = 0..=1, require_equals = true, default_missing_value = "table")]
    pub(crate) stats: Option<StatsFormat>,

    /// Write to FILE when each phase was, for each object, in both processes: JSON that chrome://tracing and
    /// ui.perfetto.dev show. What runs once the program has begun is one span.
    #[arg(long, value_name = "FILE")]
    pub(crate) trace: Option<PathBuf>,

    /// Draw the executor's memory once the program is linked: reservations, stripes, what each object has, what is free and
    /// what is lost, to FILE: a picture (.svg), a page with the picture and a table (.html), or the same as JSON (.json).
    #[arg(long, value_name = "FILE", value_parser = parse_map)]
    pub(crate) map: Option<(PathBuf, Format)>,

    /// The program's arguments.
    #[arg(last = true, value_name = "ARGS")]
    pub(crate) args: Vec<OsString>,
}

impl RunArgs {
    /// Reads a command line of `run`, for which the other subcommands need not be known: defining them takes longer than all
    /// the rest. `None` if it is another's, or not understood: the whole definition says why.
    fn read(mut args: impl Iterator<Item = OsString>) -> Option<Self> {
        args.next().filter(|subcommand| subcommand == "run")?;
        let alone = Self::augment_args(clap::Command::new("run").no_binary_name(true));
        Self::from_arg_matches(&alone.try_get_matches_from(args).ok()?).ok()
    }

    /// Whether the program is linked before it is run, because somebody wants to know what that takes; else running it does.
    pub(crate) fn wants_link_first(&self) -> bool {
        self.stats.is_some() || self.trace.is_some() || self.map.is_some() || self.wait_for_debugger
    }
}

/// Where an executor is.
#[derive(Clone)]
pub(crate) enum Address {
    Unix(PathBuf),
    Tcp(String),
    Command(String),
}

/// Reads where an executor is.
fn parse_place(text: &str) -> Result<Address, String> {
    match text.split_once(':') {
        Some(("unix", path)) if !path.is_empty() => Ok(Address::Unix(path.into())),
        Some(("tcp", address)) if address.contains(':') => Ok(Address::Tcp(address.to_owned())),
        Some(("command", command)) if !command.is_empty() => Ok(Address::Command(command.to_owned())),
        _ => Err("expected unix:PATH, tcp:HOST:PORT or command:COMMAND".to_owned()),
    }
}

/// How statistics are printed.
#[derive(Clone, Copy, ValueEnum)]
pub(crate) enum StatsFormat {
    /// A line for each number.
    Table,
    /// One JSON object.
    Json,
}

/// See [`Perf`].
#[derive(Clone, Copy, ValueEnum)]
pub(crate) enum PerfForm {
    /// A map of addresses and names. Linked code is in memory of the executor's own then, and comes in messages.
    Map,
    /// A record of the code and when it came.
    Jitdump,
}

impl From<PerfForm> for Perf {
    fn from(form: PerfForm) -> Self {
        match form {
            PerfForm::Map => Self::Map,
            PerfForm::Jitdump => Self::JitDump,
        }
    }
}

/// See [`Memory`].
#[derive(Clone, Copy, ValueEnum)]
pub(crate) enum MemoryArg {
    /// Memory that both processes map: nothing is copied. Without a name where that is possible, else as posix.
    Shared,
    /// POSIX shared memory (/dev/shm).
    Posix,
    /// Messages carry the content: needs no shared memory.
    Remote,
}

impl From<MemoryArg> for Memory {
    fn from(memory: MemoryArg) -> Self {
        match memory {
            MemoryArg::Shared => Self::Shared,
            MemoryArg::Posix => Self::Posix,
            MemoryArg::Remote => Self::Remote,
        }
    }
}

#[derive(Args)]
pub(crate) struct LinkArgs {
    #[command(flatten)]
    pub(crate) input: InputArgs,

    /// First address of the image, decimal or with 0x. A multiple of 4096.
    #[arg(long, value_name = "ADDR", value_parser = parse_address)]
    pub(crate) base: u64,

    /// Write the linked bytes to FILE, from the base to the last byte that is not zero fill.
    #[arg(long, value_name = "FILE")]
    pub(crate) image: Option<PathBuf>,

    /// Write a description of sections, symbols, GOT entries and stubs with their addresses to FILE; - is stdout.
    #[arg(long, value_name = "FILE")]
    pub(crate) json: Option<PathBuf>,

    /// Give symbols that are defined nowhere the address 0 instead of failing.
    #[arg(long)]
    pub(crate) undefined_zero: bool,
}

#[derive(Args)]
pub(crate) struct InspectArgs {
    /// Objects and archives.
    #[arg(value_name = "INPUT", required = true)]
    pub(crate) inputs: Vec<PathBuf>,
}

#[derive(Args)]
pub(crate) struct DoctorArgs {
    /// Print one JSON object.
    #[arg(long)]
    pub(crate) json: bool,

    /// Try the executor program at PATH instead of `farlink executor`.
    #[arg(long, value_name = "PATH")]
    pub(crate) executor: Option<PathBuf>,

    /// Run programs that try to get out of a hardened executor, and say what came of each attempt; or of a sandboxed one,
    /// or of one that is plain.
    #[arg(long, value_enum, value_name = "TARGET", num_args = 0..=1, require_equals = true, default_missing_value = "hardened")]
    pub(crate) attack: Option<Target>,

    /// Try one mechanism in this process: for the command's own use.
    #[arg(long, value_enum, hide = true)]
    pub(crate) probe: Option<Probe>,
}

#[derive(Args)]
pub(crate) struct CompletionsArgs {
    /// The shell.
    #[arg(value_enum)]
    pub(crate) shell: Shell,
}

#[derive(Args)]
pub(crate) struct ManArgs {
    /// Write the pages of the command and of its subcommands into the folder DIR.
    #[arg(long, value_name = "DIR")]
    pub(crate) dir: Option<PathBuf>,
}

#[derive(Args)]
pub(crate) struct ExecutorArgs {
    /// Passed on as they are.
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    pub(crate) args: Vec<OsString>,
}

/// Reads an address, decimal or with 0x.
fn parse_address(text: &str) -> Result<u64, String> {
    let parsed = match text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        Some(hex) => u64::from_str_radix(hex, 16),
        None => text.parse(),
    };
    parsed.map_err(|error| format!("{error}; write an address as 4096 or 0x1000"))
}

/// Reads where to write a map, and tells how by the name.
fn parse_map(text: &str) -> Result<(PathBuf, Format), String> {
    let path = PathBuf::from(text);
    let format = Format::of(&path).ok_or("name a file that ends in .svg, .html or .json")?;
    Ok((path, format))
}

/// Reads NAME=ADDR.
fn parse_definition(text: &str) -> Result<(String, u64), String> {
    match text.rsplit_once('=') {
        Some((name, addr)) if !name.is_empty() => Ok((name.to_owned(), parse_address(addr)?)),
        _ => Err("write NAME=ADDR, for example answer=0x1000".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    /// The definition of the command line is consistent.
    #[test]
    fn command_line_is_sound() {
        Cli::command().debug_assert();
    }

    /// Addresses are decimal or hexadecimal and nothing else.
    #[test]
    fn addresses() {
        assert_eq!(parse_address("4096"), Ok(4096));
        assert_eq!(parse_address("0x1000"), Ok(4096));
        assert_eq!(parse_definition("a=b=0x10"), Ok(("a=b".to_owned(), 16)));
        for bad in ["", "0x", "12k", "-1", "0x10000000000000000"] {
            assert!(parse_address(bad).is_err(), "{bad}");
        }
        for bad in ["name", "=1", "name="] {
            assert!(parse_definition(bad).is_err(), "{bad}");
        }
    }
}

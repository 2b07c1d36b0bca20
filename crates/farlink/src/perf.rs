//! Telling profilers where linked functions are, where a session is built for that.
//!
//! Two forms, both of which `perf` reads: a map of addresses and names, and the jitdump format, which has the code too and
//! says when it came, so that an address may be used again. See `tools/perf/Documentation/jit-interface.txt` and
//! `jitdump-specification.txt` of the kernel's sources.

use crate::Error;
use crate::claim::Claim;
use crate::runtime::Runtime;
use crate::session::SessionInner;
use crate::trace::trace_now;
use farlink_addr::{ExecutorAddr, ExecutorAddrRange};
use farlink_graph::{LinkGraph, Place, SymbolType};
use std::fs::{File, OpenOptions};
use std::io::{self, BufWriter, Write};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

/// How profilers are told of linked functions: see [`SessionBuilder::perf`](crate::SessionBuilder::perf).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Perf {
    /// `/tmp/perf-PID.map`, which `perf` and BPF's tools read of themselves. `perf` does so for memory of a process's own only:
    /// linked code then is in such memory, as with [`SessionBuilder::debug`](crate::SessionBuilder::debug).
    Map,
    /// `jit-PID.dump` in the folder that `JITDUMPDIR` names, or in `/tmp`, for `perf record -k mono` and
    /// `perf inject --jit`: for memory of all kinds.
    JitDump,
}

/// A file that profilers read.
pub(crate) struct PerfFile {
    form: Perf,
    path: PathBuf,
    process: u32,
    state: Mutex<State>,
}

struct State {
    file: BufWriter<File>,
    /// Number of the next function.
    next: u64,
}

/// `JiTD`, as its first four bytes are on a machine of the same byte order.
const MAGIC: u32 = 0x4a69_5444;
const VERSION: u32 = 1;
const HEADER_BYTES: u32 = 40;
const EM_X86_64: u32 = 62;
/// `JIT_CODE_LOAD`, and the bytes of such a record without its name and its code.
const CODE_LOAD: u32 = 0;
const CODE_LOAD_BYTES: u32 = 56;

/// A linked function.
struct LinkedFunction<'a> {
    name: &'a str,
    range: ExecutorAddrRange,
}

impl PerfFile {
    /// Makes the file for an executor of this machine, and has the executor map it if that is how profilers find it.
    pub(crate) fn create(form: Perf, runtime: &Runtime) -> Result<Self, Error> {
        let process = runtime.process_id()?;
        let (folder, name) = match form {
            Perf::Map => (PathBuf::from("/tmp"), format!("perf-{process}.map")),
            Perf::JitDump => {
                let folder = std::env::var_os("JITDUMPDIR").filter(|folder| !folder.is_empty());
                (folder.unwrap_or("/tmp".into()).into(), format!("jit-{process}.dump"))
            }
        };
        let path = std::path::absolute(folder.join(name)).map_err(|error| failed(&folder, error))?;
        let mut file = create(&path).map_err(|error| failed(&path, error))?;
        if form == Perf::JitDump {
            file.write_all(&header(process)).map_err(|error| failed(&path, error))?;
            runtime.map_for_perf(&path.to_string_lossy())?;
        }
        let state = Mutex::new(State { file: BufWriter::new(file), next: 0 });
        Ok(Self { form, path, process, state })
    }

    fn write(&self, session: &SessionInner, functions: &[LinkedFunction<'_>]) -> Result<(), Error> {
        // What was written half-way when something panicked is not made better by not writing more.
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        for function in functions {
            let written = match self.form {
                Perf::Map => {
                    let (start, bytes) = (function.range.start().as_u64(), function.range.len());
                    writeln!(state.file, "{start:x} {bytes:x} {}", one_line(function.name))
                }
                Perf::JitDump => {
                    let code = session.read_code(function.range)?;
                    let record = code_load(self.process, state.next, function, &code);
                    state.next += 1;
                    state.file.write_all(&record)
                }
            };
            written.map_err(|error| failed(&self.path, error))?;
        }
        state.file.flush().map_err(|error| failed(&self.path, error))
    }
}

fn failed(path: &std::path::Path, error: io::Error) -> Error {
    Error::Profile { path: path.to_owned(), error: Arc::new(error) }
}

/// Makes a file that is new: one that another process with this number has left is removed, and a link is not followed.
fn create(path: &std::path::Path) -> io::Result<File> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    OpenOptions::new().read(true).write(true).create_new(true).open(path)
}

fn header(process: u32) -> Vec<u8> {
    let mut header = Vec::with_capacity(HEADER_BYTES as usize);
    for word in [MAGIC, VERSION, HEADER_BYTES, EM_X86_64, 0, process] {
        header.extend(word.to_ne_bytes());
    }
    // The time, and flags: none.
    for double in [trace_now(), 0] {
        header.extend(double.to_ne_bytes());
    }
    header
}

fn code_load(process: u32, index: u64, function: &LinkedFunction<'_>, code: &[u8]) -> Vec<u8> {
    let name = one_line(function.name);
    let bytes = CODE_LOAD_BYTES as usize + name.len() + 1 + code.len();
    let mut record = Vec::with_capacity(bytes);
    record.extend(CODE_LOAD.to_ne_bytes());
    record.extend((bytes as u32).to_ne_bytes());
    record.extend(trace_now().to_ne_bytes());
    for word in [process, process] {
        record.extend(word.to_ne_bytes());
    }
    let start = function.range.start().as_u64();
    for double in [start, start, function.range.len(), index] {
        record.extend(double.to_ne_bytes());
    }
    record.extend(name.as_bytes());
    record.push(0);
    record.extend(code);
    record
}

/// Returns a name as people write it, without what would end it early.
fn one_line(name: &str) -> String {
    farlink_graph::demangled(name).unwrap_or_else(|| name.to_owned()).replace(['\n', '\r', '\0'], "?")
}

/// Tells profilers of the functions of a batch, which do not run yet.
pub(crate) fn tell(session: &SessionInner, claim: &Claim) -> Result<(), Error> {
    let Some(perf) = &session.perf else { return Ok(()) };
    for claimed in &claim.objects {
        perf.write(session, &functions(&claimed.graph))?;
    }
    Ok(())
}

/// Returns the functions of an object by address, each once. One without a size goes to the next, or the end of its block.
fn functions(graph: &LinkGraph) -> Vec<LinkedFunction<'_>> {
    let mut found: Vec<(ExecutorAddr, u64, u64, &str)> = Vec::new();
    for symbol in graph.symbol_ids() {
        let info = graph.symbol(symbol);
        let (Place::Defined { block, offset }, SymbolType::Function) = (info.place, info.kind) else { continue };
        let left = graph.block(block).size - offset;
        if let Some(address) = graph.symbol_address(symbol).filter(|_| left > 0) {
            found.push((address, info.size, left, graph.symbol_name(symbol)));
        }
    }
    // Of several names the first counts.
    found.sort_by_key(|&(address, size, _, _)| (address, std::cmp::Reverse(size)));
    found.dedup_by_key(|&mut (address, ..)| address);
    let mut functions = Vec::with_capacity(found.len());
    for (index, &(address, size, left, name)) in found.iter().enumerate() {
        let next = found.get(index + 1).and_then(|&(next, ..)| next.offset_from(address));
        let bytes = if size > 0 { size.min(left) } else { left.min(next.unwrap_or(left)) };
        functions.extend(ExecutorAddrRange::from_len(address, bytes).map(|range| LinkedFunction { name, range }));
    }
    functions
}

//! Decodes recorded sessions of LLVM's own tools, and encodes them again to the same bytes.
//!
//! Every message must be a frame whose header encodes to the bytes it came from. Every Setup, every call of a function
//! that the executor announced as a bootstrap symbol, the result of such a call, and every finalize or dealloc action
//! that names such a function must be a value of the type that `functions` gives, encode to the same bytes, and be
//! counted: the numbers per file are written down here, so a message that is passed over shows.
//!
//! What stays opaque are calls whose address is no bootstrap symbol: functions of LLVM's runtime library, which the
//! controller had linked into the executor itself, and tags by which that library calls the controller. One more
//! function is known by its name: LLVM 19's registration with the debugger, which is looked up like any symbol.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use farlink_addr::ExecutorAddr;
use farlink_wire::frame::{HEADER_BYTES, Header, Opcode};
use farlink_wire::functions::{self, Function};
use farlink_wire::msg::{ActionPair, FinalizeRequest, LookupName, SharedFinalizeRequest, SymbolDef};
use farlink_wire::setup::ExecutorInfo;
use farlink_wire::sps::{Decode, DecodeError, Encode, from_bytes, to_bytes};
use std::collections::{BTreeSet, HashMap};
use std::path::Path;

/// Decodes a value and encodes it again.
type Recode = fn(&'static [u8]) -> Result<Vec<u8>, DecodeError>;

/// A function with what it takes to check its calls.
#[derive(Clone, Copy)]
struct Codec {
    name: &'static str,
    find: fn(&ExecutorInfo) -> Option<ExecutorAddr>,
    args: Recode,
    result: Recode,
}

fn recode<T: Decode<'static> + Encode>(bytes: &'static [u8]) -> Result<Vec<u8>, DecodeError> {
    Ok(to_bytes(&from_bytes::<T>(bytes)?))
}

macro_rules! codecs {
    ($($function:ident)*) => {
        [$({
            const FUNCTION_NAME: &str = functions::$function.name();
            codec(functions::$function, FUNCTION_NAME, |info| functions::$function.find(info))
        }),*]
    };
}

fn codec<Args: Decode<'static> + Encode, Ret: Decode<'static> + Encode>(
    _types: Function<Args, Ret>,
    name: &'static str,
    find: fn(&ExecutorInfo) -> Option<ExecutorAddr>,
) -> Codec {
    Codec { name, find, args: recode::<Args>, result: recode::<Ret> }
}

/// Every function there is. `every_function_is_covered` checks that.
fn all_functions() -> Vec<Codec> {
    codecs! {
        SHARED_RESERVE SHARED_MAP SHARED_MAP_AT SHARED_RENEW SHARED_INITIALIZE SHARED_DEINITIALIZE SHARED_RELEASE SHARED_INITIALIZE_BATCH
        SIMPLE_RESERVE SIMPLE_INITIALIZE SIMPLE_DEINITIALIZE SIMPLE_RELEASE SIMPLE_FINALIZE SIMPLE_DEALLOCATE
        SIMPLE_INITIALIZE_BATCH
        MEMORY_USAGE
        DYLIB_OPEN DYLIB_RESOLVE DYLIB_LOOKUP RESOLVE
        RUN_AS_MAIN RUN_AS_VOID_FUNCTION RUN_AS_INT_FUNCTION RUN_INITIALIZERS RUN_EXITS RUN_PROGRAM TLS_OPEN TLS_CLOSE
        TLS_RESOLVE DYLIB_OPEN_STATIC ALLOW_EXECUTABLE_STACKS REGISTER_UNWIND_INDEX DEREGISTER_UNWIND_INDEX PLACE_BELOW
        REGISTER_UNWIND_DIRECTORY DEREGISTER_UNWIND_DIRECTORY ARE_CODE LEAVE_REPORTS HARDEN
        REGISTER_EH_FRAME DEREGISTER_EH_FRAME REGISTER_EH_FRAME_19 DEREGISTER_EH_FRAME_19
        REGISTER_GDB REGISTER_GDB_19 DEREGISTER_GDB ALLOW_DEBUGGERS TRACE_START TRACE_TAKE
        MAP_FOR_PERF CALL_NATIVE
        WRITE_UINT8S WRITE_UINT16S WRITE_UINT32S WRITE_UINT64S WRITE_POINTERS WRITE_BUFFERS
        READ_UINT8S READ_UINT16S READ_UINT32S READ_UINT64S READ_POINTERS READ_BUFFERS READ_STRINGS
    }
    .to_vec()
}

/// How many messages of a file were decoded with a type, and how many were left opaque.
#[derive(Debug, PartialEq, Eq)]
struct Counts {
    typed_calls: usize,
    typed_results: usize,
    typed_actions: usize,
    opaque_calls: usize,
    opaque_results: usize,
    opaque_actions: usize,
}

const fn counts(calls: [usize; 2], results: [usize; 2], actions: [usize; 2]) -> Counts {
    Counts {
        typed_calls: calls[0],
        opaque_calls: calls[1],
        typed_results: results[0],
        opaque_results: results[1],
        typed_actions: actions[0],
        opaque_actions: actions[1],
    }
}

/// Per file: calls, results and actions, each decoded with a type and opaque.
const EXPECTED: &[(&str, Counts)] = &[
    ("19-hello-rt", counts([21, 9], [21, 9], [0, 0])),
    ("19-hello-rt-shm", counts([15, 9], [15, 9], [0, 0])),
    ("19-tiny-g", counts([12, 0], [12, 0], [0, 0])),
    ("19-tiny-mem", counts([9, 0], [9, 0], [0, 0])),
    ("19-tiny-shm", counts([9, 0], [9, 0], [0, 0])),
    ("19-undef", counts([6, 0], [6, 0], [0, 0])),
    // The executor crashed in the last call.
    ("19-undef2", counts([9, 0], [8, 0], [0, 0])),
    ("22-clang-repl-shm", counts([44, 17], [44, 17], [10, 48])),
    ("22-ctor-tls-rt-shm", counts([16, 4], [16, 4], [0, 32])),
    ("22-cxx-throw-generic", counts([7, 0], [7, 0], [2, 0])),
    ("22-cxx-throw-rt-shm", counts([15, 3], [15, 3], [0, 30])),
    ("22-cxx-throw-shm", counts([6, 0], [6, 0], [2, 0])),
    ("22-hello-rt-generic", counts([22, 3], [22, 3], [0, 30])),
    ("22-hello-rt-shm", counts([15, 3], [15, 3], [0, 30])),
    ("22-hello-rt-simple-remote", counts([15, 3], [15, 3], [0, 30])),
    ("22-lazy-rt-shm", counts([20, 4], [20, 4], [0, 44])),
    ("22-tiny-g", counts([8, 0], [8, 0], [3, 0])),
    ("22-tiny-g-shm", counts([7, 0], [7, 0], [3, 0])),
    ("22-tiny-generic", counts([6, 0], [6, 0], [2, 0])),
    ("22-tiny-shm", counts([5, 0], [5, 0], [2, 0])),
    ("22-tiny-simple-remote", counts([5, 0], [5, 0], [2, 0])),
    ("22-undef-generic", counts([6, 0], [6, 0], [0, 0])),
    ("22-undef-shm", counts([5, 0], [5, 0], [0, 0])),
    // The controller closed its pipe before the last answer.
    ("22-undef-simple-remote", counts([5, 0], [4, 0], [0, 0])),
];

/// A session that is being checked.
struct Session {
    name: String,
    info: ExecutorInfo,
    /// Functions by address.
    functions: HashMap<ExecutorAddr, Codec>,
    /// Calls that have not been answered, by the side that made them and their number.
    calls: HashMap<(bool, u64), Call>,
    counts: Counts,
}

struct Call {
    codec: Option<Codec>,
    args: &'static [u8],
}

impl Session {
    fn new(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            info: ExecutorInfo::default(),
            functions: HashMap::new(),
            calls: HashMap::new(),
            counts: counts([0, 0], [0, 0], [0, 0]),
        }
    }

    fn message(&mut self, from_controller: bool, header: Header, payload: &'static [u8]) {
        match header.opcode {
            Opcode::Setup => self.setup(from_controller, header, payload),
            Opcode::Call => self.call(from_controller, header, payload),
            Opcode::Result => self.result(from_controller, header, payload),
            other => panic!("{}: none of these tools sends {other:?}", self.name),
        }
    }

    fn setup(&mut self, from_controller: bool, header: Header, payload: &'static [u8]) {
        assert!(!from_controller && self.functions.is_empty(), "{}: one Setup, from the executor", self.name);
        assert!(header.sequence == 0 && header.tag.is_null());
        self.info = from_bytes(payload).unwrap();
        assert_eq!(to_bytes(&self.info), payload);
        assert_eq!((self.info.triple.as_str(), self.info.page_size), ("x86_64-pc-linux-gnu", 4096));
        for codec in all_functions() {
            if let Some(addr) = (codec.find)(&self.info) {
                assert!(self.functions.insert(addr, codec).is_none(), "{}: two functions at {addr}", self.name);
            }
        }
    }

    fn is_bootstrap_symbol(&self, addr: ExecutorAddr) -> bool {
        self.info.bootstrap_symbols.iter().any(|(_, known)| *known == addr)
    }

    /// Checks arguments for the function at `addr`; returns the function if it is known.
    fn arguments(&self, addr: ExecutorAddr, args: &'static [u8]) -> Option<Codec> {
        let Some(codec) = self.functions.get(&addr) else {
            assert!(!self.is_bootstrap_symbol(addr), "{}: a bootstrap symbol without types at {addr}", self.name);
            return None;
        };
        let encoded = (codec.args)(args).unwrap_or_else(|error| panic!("{}: {}: {error}", self.name, codec.name));
        assert_eq!(encoded, args, "{}: arguments of {}", self.name, codec.name);
        Some(*codec)
    }

    fn call(&mut self, from_controller: bool, header: Header, payload: &'static [u8]) {
        assert!(from_controller || !self.is_bootstrap_symbol(header.tag), "{}: the executor calls tags", self.name);
        let codec = if from_controller { self.arguments(header.tag, payload) } else { None };
        match &codec {
            Some(codec) => {
                self.counts.typed_calls += 1;
                for pair in actions(codec.name, payload) {
                    self.actions(&pair);
                }
            }
            None => self.counts.opaque_calls += 1,
        }
        let call = Call { codec, args: payload };
        assert!(self.calls.insert((from_controller, header.sequence), call).is_none(), "{}", self.name);
    }

    fn actions(&mut self, pair: &ActionPair) {
        for call in [&pair.finalize, &pair.dealloc].into_iter().flatten() {
            let args = Box::leak(call.args.0.to_vec().into_boxed_slice());
            match self.arguments(call.function, args) {
                Some(_) => self.counts.typed_actions += 1,
                None => self.counts.opaque_actions += 1,
            }
        }
    }

    fn result(&mut self, from_controller: bool, header: Header, payload: &'static [u8]) {
        let call = self.calls.remove(&(!from_controller, header.sequence)).unwrap();
        assert!(header.tag.is_null(), "{}: these releases know values only", self.name);
        let Some(codec) = call.codec else {
            self.counts.opaque_results += 1;
            return;
        };
        let encoded = (codec.result)(payload).unwrap_or_else(|error| panic!("{}: {}: {error}", self.name, codec.name));
        assert_eq!(encoded, payload, "{}: result of {}", self.name, codec.name);
        self.counts.typed_results += 1;
        self.note_symbols(codec.name, call.args, payload);
    }

    /// Learns where a function is that LLVM 19 looks up by its name.
    fn note_symbols(&mut self, function: &str, args: &'static [u8], result: &'static [u8]) {
        if function != functions::DYLIB_LOOKUP.name() {
            return;
        }
        let (_, _, names): (ExecutorAddr, ExecutorAddr, Vec<LookupName>) = from_bytes(args).unwrap();
        let found: Result<Vec<SymbolDef>, String> = from_bytes(result).unwrap();
        let gdb = functions::REGISTER_GDB_19.name();
        for (asked, symbol) in names.iter().zip(found.unwrap()) {
            if asked.name == gdb && !symbol.addr.is_null() {
                let codec = all_functions().into_iter().find(|codec| codec.name == gdb).unwrap();
                self.functions.insert(symbol.addr, codec);
            }
        }
    }
}

/// The actions in the arguments of a call, if it finalizes memory.
fn actions(function: &str, args: &'static [u8]) -> Vec<ActionPair> {
    if function == functions::SHARED_INITIALIZE.name() {
        let (.., request): (ExecutorAddr, ExecutorAddr, SharedFinalizeRequest) = from_bytes(args).unwrap();
        request.actions
    } else if [functions::SIMPLE_INITIALIZE.name(), functions::SIMPLE_FINALIZE.name()].contains(&function) {
        let (_, request): (ExecutorAddr, FinalizeRequest<'_>) = from_bytes(args).unwrap();
        request.actions
    } else {
        Vec::new()
    }
}

fn from_hex(digits: &str) -> Vec<u8> {
    assert!(digits.len().is_multiple_of(2));
    (0..digits.len()).step_by(2).map(|at| u8::from_str_radix(&digits[at..at + 2], 16).unwrap()).collect()
}

/// Checks the session in a file; returns what was in it.
fn check(path: &Path) -> Counts {
    let name = path.file_stem().unwrap().to_str().unwrap();
    let text = std::fs::read_to_string(path).unwrap();
    let mut session = Session::new(name);
    let (mut ends, mut exits) = (0, 0);
    for line in text.lines() {
        let mut words = line.split_whitespace();
        let from_controller = match words.next().unwrap() {
            "C>E" => true,
            "E>C" => false,
            "EXIT" => {
                exits += 1;
                continue;
            }
            other => panic!("{name}: a line that begins with {other}"),
        };
        let first = words.next().unwrap();
        if first == "EOF" {
            assert_eq!(line.split_once(" EOF ").unwrap().1, "after 0", "{name}: these sessions end between messages");
            ends += 1;
            continue;
        }
        let bytes: [u8; HEADER_BYTES] = from_hex(first).try_into().unwrap();
        let header = Header::parse(&bytes).unwrap();
        assert_eq!(header.to_bytes(), bytes, "{name}");
        // Values of some types borrow the message they were decoded from, for as long as the test runs.
        let payload: &'static [u8] = Box::leak(from_hex(words.next().unwrap_or_default()).into_boxed_slice());
        assert_eq!(payload.len() as u64, header.payload_bytes, "{name}");
        assert_eq!(words.next(), None, "{name}");
        session.message(from_controller, header, payload);
    }
    assert_eq!((ends, exits), (2, 1), "{name}");
    session.counts
}

/// All recordings decode and encode to the same bytes, with exactly the expected number of typed messages.
#[test]
fn recordings_survive_decoding_and_encoding() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/sessions");
    let mut found = BTreeSet::new();
    for (name, expected) in EXPECTED {
        let path = dir.join(name).with_extension("hex");
        assert_eq!(check(&path), *expected, "{name}");
        found.insert(path);
    }
    let files = std::fs::read_dir(&dir).unwrap().map(|entry| entry.unwrap().path());
    let files: BTreeSet<_> = files.filter(|path| path.extension().is_some_and(|ext| ext == "hex")).collect();
    assert_eq!(files, found, "every recording is expected");
}

/// The functions listed here are those that the crate declares.
#[test]
fn every_function_is_covered() {
    let source = include_str!("../src/functions.rs");
    // A declaration of a function is a constant and a literal before a colon.
    let declared: BTreeSet<&str> =
        source.lines().filter_map(|line| line.split_once(" = \"")?.1.split_once("\":")).map(|(name, _)| name).collect();
    let listed: BTreeSet<&str> = all_functions().iter().map(|codec| codec.name).collect();
    assert!(declared.len() > 30);
    assert_eq!(declared, listed);
}

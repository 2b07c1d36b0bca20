//! A controller whose executor lies: every answer of a whole session is wrong in every way in turn. The controller gives an
//! error or goes on, in time; it never panics, and never writes where the executor says.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on panics")]

use farlink::addr::ExecutorAddr;
use farlink::rpc::{Endpoint, Handler, Options, Transport, accept};
use farlink::{Error, Memory, Session};
use farlink_wire::functions::*;
use farlink_wire::msg::{
    FinalizeRequest, MainCall, MemoryUsage, SharedFinalizeRequest, TlsName, TlsPlace, TlsTemplate,
};
use farlink_wire::setup::ExecutorInfo;
use farlink_wire::sps::{Encode, SpsError, from_bytes, to_bytes};
use std::collections::HashMap;
use std::fs;
use std::process::Command;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, LazyLock, OnceLock, mpsc};
use std::thread;
use std::time::Duration;
use tempfile::TempDir;

/// How long a whole session with a liar may take.
const DEADLINE: Duration = Duration::from_secs(60);

/// How long the controller waits for an answer.
const PATIENCE: Duration = Duration::from_millis(40);

/// An object that has a use for most of what an executor offers.
static OBJECT: LazyLock<Vec<u8>> = LazyLock::new(|| {
    let source = "
        extern int elsewhere(int);
        extern __thread int theirs;
        static __thread int mine = 7;
        static int data[100] = {1, 2, 3};
        static int zeros[1000];
        __attribute__((constructor)) static void begin(void) { zeros[0] = elsewhere(1); }
        __attribute__((destructor)) static void end(void) { elsewhere(zeros[0]); }
        int entry(int count) { return elsewhere(count) + theirs + mine + data[count] + zeros[count]; }";
    let dir = TempDir::new().unwrap();
    let (path, object) = (dir.path().join("object.c"), dir.path().join("object.o"));
    fs::write(&path, source).unwrap();
    let flags = ["-c", "-O1", "-fPIC", "-fexceptions", "-o"];
    assert!(Command::new("cc").args(flags).arg(&object).arg(&path).status().unwrap().success());
    fs::read(object).unwrap()
});

/// Memory of this process that nobody has a reason to write.
static CANARY: [AtomicU64; 1024] = [const { AtomicU64::new(0x5a5a_5a5a_5a5a_5a5a) }; 1024];

/// How one answer is wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Lie {
    /// It is not.
    None,
    Empty,
    Shortened,
    Lengthened,
    /// A word of it is this number, or one that is an address of the controller's.
    Word(usize, u64),
    Canary(usize),
    /// An error, of as many bytes.
    Failed(usize),
    Late,
    Panicked,
}

/// The executor: it answers as one that does everything, except once.
struct Liar {
    functions: HashMap<u64, &'static str>,
    calls: AtomicUsize,
    next_base: AtomicU64,
    lie: Lie,
    at: usize,
    endpoint: OnceLock<Endpoint>,
}

const INSTANCE: ExecutorAddr = ExecutorAddr::new(0x77);
const FIRST_BASE: u64 = 0x10_0000_0000;

fn ok<T: Encode>(value: &T) -> Vec<u8> {
    to_bytes(value)
}

impl Liar {
    /// Answers as an executor would that is honest, and does nothing.
    fn honest(&self, name: &str, args: &[u8]) -> Vec<u8> {
        let done = || ok(&SpsError(Ok(())));
        let base = |bytes: u64| {
            let size = bytes.next_multiple_of(4096);
            ok(&Expected::Ok(ExecutorAddr::new(self.next_base.fetch_add(size + 4096, Ordering::Relaxed))))
        };
        let lowest = |addresses: &mut dyn Iterator<Item = ExecutorAddr>| addresses.min().unwrap_or(ExecutorAddr::NULL);
        if name == SHARED_MAP.name() {
            let (_, tag, bytes, _): (ExecutorAddr, u64, u64, Vec<farlink_wire::msg::Stripe>) =
                from_bytes(args).unwrap();
            drop(self.endpoint.wait().take_descriptor(tag));
            base(bytes)
        } else if name == SIMPLE_RESERVE.name() {
            base(from_bytes::<(ExecutorAddr, u64)>(args).unwrap().1)
        } else if name == SHARED_INITIALIZE_BATCH.name() {
            type Requests = Vec<(ExecutorAddr, SharedFinalizeRequest)>;
            let (_, requests): (ExecutorAddr, Requests) = from_bytes(args).unwrap();
            let key = |(_, request): &(ExecutorAddr, SharedFinalizeRequest)| {
                lowest(&mut request.segments.iter().map(|segment| segment.addr))
            };
            ok(&Expected::Ok(requests.iter().map(key).collect::<Vec<_>>()))
        } else if name == SIMPLE_INITIALIZE_BATCH.name() {
            let (_, requests): (ExecutorAddr, Vec<FinalizeRequest<'_>>) = from_bytes(args).unwrap();
            let key = |request: &FinalizeRequest<'_>| lowest(&mut request.segments.iter().map(|segment| segment.addr));
            ok(&Expected::Ok(requests.iter().map(key).collect::<Vec<_>>()))
        } else if name == DYLIB_OPEN.name() || name == DYLIB_OPEN_STATIC.name() {
            ok(&Expected::Ok(ExecutorAddr::new(0x1234)))
        } else if name == RESOLVE.name() {
            let (_, names): (Vec<ExecutorAddr>, Vec<String>) = from_bytes(args).unwrap();
            // Near enough for any reference, as a library's stub would not be.
            ok(&Expected::Ok(vec![Some(ExecutorAddr::new(FIRST_BASE + 0x10)); names.len()]))
        } else if name == ARE_CODE.name() {
            let (addresses,): (Vec<ExecutorAddr>,) = from_bytes(args).unwrap();
            ok(&Expected::Ok(vec![true; addresses.len()]))
        } else if name == TLS_OPEN.name() {
            let _: TlsTemplate = from_bytes(args).unwrap();
            let place = TlsPlace { module: 3, offset: 0, tp_offset: Some(-64i64 as u64) };
            ok(&Expected::Ok((ExecutorAddr::new(0x4321), place)))
        } else if name == TLS_RESOLVE.name() {
            let (names,): (Vec<TlsName>,) = from_bytes(args).unwrap();
            let place = TlsPlace { module: 2, offset: 8, tp_offset: None };
            ok(&Expected::Ok(vec![Some(place); names.len()]))
        } else if name == RUN_AS_MAIN.name() {
            let _: MainCall = from_bytes(args).unwrap();
            ok(&5i64)
        } else if name == READ_BUFFERS.name() {
            let (ranges,): (Vec<farlink::addr::ExecutorAddrRange>,) = from_bytes(args).unwrap();
            ok(&ranges.iter().map(|range| vec![1u8; range.len() as usize]).collect::<Vec<_>>())
        } else if name == MEMORY_USAGE.name() {
            ok(&Expected::Ok(MemoryUsage {
                mappings: 3,
                system_calls: vec![("mmap".into(), 3)],
                ..MemoryUsage::default()
            }))
        } else if name == WRITE_BUFFERS.name() {
            ok(&())
        } else {
            done()
        }
    }
}

/// Returns an answer with a word replaced.
fn with_word(mut answer: Vec<u8>, index: usize, value: u64) -> Vec<u8> {
    // Results that can fail begin with one byte.
    let start = answer.len() % 8 + index * 8;
    if let Some(word) = answer.get_mut(start..start + 8) {
        word.copy_from_slice(&value.to_le_bytes());
    }
    answer
}

impl Handler for Liar {
    fn call(&self, function: ExecutorAddr, args: Vec<u8>) -> Result<Vec<u8>, String> {
        let name = self.functions.get(&function.as_u64()).copied().unwrap_or("linked code");
        let mut answer = self.honest(name, &args);
        if self.calls.fetch_add(1, Ordering::Relaxed) != self.at {
            return Ok(answer);
        }
        match self.lie {
            Lie::None => {}
            Lie::Empty => answer.clear(),
            Lie::Shortened => drop(answer.pop()),
            Lie::Lengthened => answer.extend([0xff; 100]),
            Lie::Word(index, value) => return Ok(with_word(answer, index, value)),
            Lie::Canary(index) => return Ok(with_word(answer, index, CANARY.as_ptr() as u64 & !0xfff)),
            Lie::Failed(len) => return Err("x".repeat(len)),
            Lie::Late => thread::sleep(3 * PATIENCE),
            Lie::Panicked => panic!("an executor that gives no answer of its own"),
        }
        Ok(answer)
    }
}

fn introduction() -> (ExecutorInfo, HashMap<u64, &'static str>) {
    let mut info =
        ExecutorInfo { triple: "x86_64-unknown-linux-gnu".into(), page_size: 4096, ..ExecutorInfo::default() };
    info.set_value(VERSION_KEY, &FARLINK_VERSION);
    for instance in [SHARED_INSTANCE, SIMPLE_INSTANCE, DYLIB_INSTANCE, DISPATCH_CONTEXT] {
        info.bootstrap_symbols.push((instance.to_owned(), INSTANCE));
    }
    let mut functions = HashMap::new();
    macro_rules! announce {
        ($($function:ident)*) => {$(
            let addr = 0x1000 + functions.len() as u64 * 16;
            $function.announce(ExecutorAddr::new(addr), &mut info);
            functions.insert(addr, $function.name());
        )*};
    }
    announce! {
        SHARED_INITIALIZE SHARED_INITIALIZE_BATCH SHARED_DEINITIALIZE SHARED_RELEASE SHARED_RESERVE SHARED_MAP
        SIMPLE_RESERVE SIMPLE_INITIALIZE SIMPLE_INITIALIZE_BATCH SIMPLE_DEINITIALIZE SIMPLE_RELEASE
        DYLIB_OPEN DYLIB_OPEN_STATIC RESOLVE ARE_CODE RUN_AS_MAIN RUN_INITIALIZERS RUN_EXITS RUN_PROGRAM
        TLS_OPEN TLS_CLOSE TLS_RESOLVE MEMORY_USAGE READ_BUFFERS WRITE_BUFFERS
        REGISTER_UNWIND_INDEX DEREGISTER_UNWIND_INDEX LEAVE_REPORTS
    }
    (info, functions)
}

/// A whole session: everything that a user does.
fn use_all(session: &Session) -> Result<(), Error> {
    let library = session.create_library("main");
    let object = library.add_object("object.o", OBJECT.as_slice())?;
    let results = [
        library.add_shared_library("libelsewhere.so"),
        library.lookup("entry").map(drop),
        library.run_as_main("entry", &["name".into()]).map(drop),
        session.read_memory(ExecutorAddr::new(0x10), &mut [0; 100]),
        session.write_memory(ExecutorAddr::new(0x10), &[0; 100]),
        session.shared_buffer::<u64>(100).map(drop),
        session.stats().map(drop),
        library.remove(object),
    ];
    let _ = (session.death(), session.threads(), session.memory_stats());
    // What fails has its reason, and the next is tried all the same.
    results.into_iter().collect()
}

/// Makes a session with an executor that lies in its call of this number; gives how many calls there were.
fn lie(memory: Memory, at: usize, lie: Lie) -> (usize, Result<(), Error>) {
    let (info, functions) = introduction();
    let (calls, next_base) = (AtomicUsize::new(0), AtomicU64::new(FIRST_BASE));
    let liar = Arc::new(Liar { functions, calls, next_base, lie, at, endpoint: OnceLock::new() });
    let (ours, theirs) = Transport::pair().unwrap();
    let executor = accept(theirs, &info, liar.clone(), Options::default()).unwrap();
    liar.endpoint.set(executor.clone()).unwrap();
    let (sender, done) = mpsc::channel();
    let controller = thread::spawn(move || {
        let builder = Session::builder().memory(memory).protocol_timeout(PATIENCE).call_timeout(PATIENCE);
        let result = builder.connect(ours).and_then(|session| use_all(&session));
        let _ = sender.send(result);
    });
    let result = done.recv_timeout(DEADLINE).unwrap_or_else(|_| panic!("{memory:?}, call {at}, {lie:?}: no end"));
    controller.join().unwrap();
    executor.close(farlink::rpc::Disconnected::Local);
    let is_whole = CANARY.iter().all(|word| word.load(Ordering::Relaxed) == 0x5a5a_5a5a_5a5a_5a5a);
    assert!(is_whole, "{memory:?}, call {at}, {lie:?}: the controller wrote where it was told to");
    (liar.calls.load(Ordering::Relaxed), result)
}

/// All lies at all calls.
#[test]
fn every_answer_is_wrong() {
    let extremes = [0, 1, 0xfff, 0x1000, 1 << 31, 1 << 47, 1 << 63, u64::MAX - 0xfff, u64::MAX];
    for memory in [Memory::Shared, Memory::Remote] {
        let (calls, result) = lie(memory, usize::MAX, Lie::None);
        match memory {
            Memory::Remote => assert!(matches!(result, Err(Error::Memory(_))), "buffers are not shared: {result:?}"),
            _ => result.unwrap(),
        }
        assert!(calls >= 10, "{calls}");
        let words = (0..4).flat_map(|index| extremes.map(|value| Lie::Word(index, value)));
        let canaries = (0..4).map(Lie::Canary);
        let others = [
            Lie::Empty,
            Lie::Shortened,
            Lie::Lengthened,
            Lie::Failed(0),
            Lie::Failed(2 << 20),
            Lie::Late,
            Lie::Panicked,
        ];
        let lies: Vec<Lie> = words.chain(canaries).chain(others).collect();
        let mut failures = 0;
        for at in 0..calls {
            for &what in &lies {
                let (_, result) = lie(memory, at, what);
                if let Err(error) = result {
                    assert!(!error.to_string().is_empty(), "{memory:?}, call {at}, {what:?}");
                    failures += 1;
                }
            }
        }
        // Answers that cannot be are mostly seen to be so.
        assert!(failures > calls * others.len() / 2, "{memory:?}: {failures} of {}", calls * lies.len());
    }
}

/// An executor that calls the controller as fast as it can, and waits for no answer, holds nothing up and gets errors.
#[test]
fn floods_of_calls() {
    let (info, functions) = introduction();
    let (calls, next_base) = (AtomicUsize::new(0), AtomicU64::new(FIRST_BASE));
    let liar = Liar { functions, calls, next_base, lie: Lie::None, at: usize::MAX, endpoint: OnceLock::new() };
    let liar = Arc::new(liar);
    let (ours, theirs) = Transport::pair().unwrap();
    let executor = accept(theirs, &info, liar.clone(), Options::default()).unwrap();
    liar.endpoint.set(executor.clone()).unwrap();
    let flood = thread::spawn(move || {
        let calls: Vec<_> = (0..3000).map(|tag| executor.call(ExecutorAddr::new(tag), vec![7; 1000])).collect();
        calls.into_iter().map(farlink::rpc::Pending::wait).filter(Result::is_ok).count()
    });
    let session = Session::builder().connect(ours).unwrap();
    for _ in 0..20 {
        use_all(&session).unwrap();
    }
    assert_eq!(flood.join().unwrap(), 0);
}

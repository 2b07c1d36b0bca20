//! The executor program: how it begins and ends, and what it answers to bad calls.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on panics")]

mod common;

use common::{Process, names_of, start, wait};
use farlink_addr::{AllocGroup, ExecutorAddr, ExecutorAddrRange, MemProt};
use farlink_mem::{FinalizeRequest, FinalizeSegment, MemoryMapper, RemoteMapper, SharedMemoryMapper};
use farlink_rpc::{CallError, Disconnected};
use farlink_wire::functions::{
    DEREGISTER_EH_FRAME, DYLIB_INSTANCE, DYLIB_OPEN, DYLIB_RESOLVE, READ_BUFFERS, READ_STRINGS, READ_UINT64S,
    REGISTER_EH_FRAME, RESOLVE, RUN_AS_MAIN, RUN_AS_VOID_FUNCTION, RUN_EXITS, RUN_INITIALIZERS, SHARED_INSTANCE,
    SHARED_MAP, SHARED_RESERVE, WRITE_UINT32S,
};
use farlink_wire::msg::{LookupName, MainCall, RunInitializers, SymbolDef};
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::process::Command;

const PAGE: u64 = 4096;

/// Places code in an executor; gives its address.
fn place(mapper: &dyn MemoryMapper, code: &[u8]) -> ExecutorAddr {
    let base = mapper.reserve(PAGE).wait().unwrap();
    let working = mapper.prepare(ExecutorAddrRange::from_len(base.start(), code.len() as u64).unwrap()).unwrap();
    working.write(0, code).unwrap();
    let group = AllocGroup::standard(MemProt::RX);
    let segment = FinalizeSegment { group, range: base, content_bytes: code.len() as u64, working };
    let request = FinalizeRequest { reservation: base.start(), segments: vec![segment], actions: Vec::new() };
    mapper.finalize(vec![request]).wait().unwrap()[0]
}

/// `jmp .`: never returns.
const LOOP: [u8; 2] = [0xeb, 0xfe];

fn stderr_of(process: &mut std::process::Child) -> String {
    let mut text = String::new();
    process.stderr.take().unwrap().read_to_string(&mut text).unwrap();
    text
}

/// When the controller's socket closes without a word, the executor ends well and leaves nothing, also while linked
/// code runs for ever.
#[test]
fn ends_with_its_controller() {
    for is_busy in [false, true] {
        let mut process = Process::spawn();
        let mapper = SharedMemoryMapper::posix(&process.executor).unwrap();
        let code = place(&mapper, &LOOP);
        let running = is_busy.then(|| process.executor.bind(RUN_AS_VOID_FUNCTION).unwrap().call(&(code,)));
        process.endpoint.close(Disconnected::Local);
        assert_eq!(wait(&mut process.child).code(), Some(0), "busy: {is_busy}");
        assert_eq!(names_of(process.child.id()), Vec::<String>::new());
        if let Some(running) = running {
            assert!(matches!(running.wait(), Err(CallError::Disconnected(_))));
        }
    }
}

/// A `main` that never returns does not keep the executor either: it runs on the main thread.
#[test]
fn ends_while_main_runs() {
    let mut process = Process::spawn();
    let mapper = RemoteMapper::new(&process.executor).unwrap();
    let main = place(&mapper, &LOOP);
    let running = process.executor.bind(RUN_AS_MAIN).unwrap().call(&MainCall { main, args: Vec::new() });
    process.endpoint.hang_up(Ok(()));
    assert_eq!(wait(&mut process.child).code(), Some(0));
    assert!(running.wait().is_err());
}

/// What is not a frame ends the session with a message and status 1.
#[test]
fn garbage_is_refused() {
    for (bytes, word) in
        [(&[0u8; 32][..], "size 0"), (&[0xff; 64], "above the limit"), (&[33, 0, 0], "within a message")]
    {
        let (mut child, mut socket) = start(&[]);
        socket.write_all(bytes).unwrap();
        socket.shutdown(std::net::Shutdown::Write).unwrap();
        let text = stderr_of(&mut child);
        assert_eq!(wait(&mut child).code(), Some(1), "{text}");
        assert!(text.starts_with("farlink-executor: ") && text.contains(word), "{text}");
    }
}

/// A command line that is not understood, or names descriptors that are not open, ends with usage or a message.
#[test]
fn command_line() {
    let run = |args: &[&str]| {
        let output = Command::new(env!("CARGO_BIN_EXE_farlink-executor")).args(args).output().unwrap();
        (output.status.code(), String::from_utf8(output.stderr).unwrap())
    };
    for args in [&[][..], &["filedescs=3"], &["--fd", "900"], &["filedescs=1,2"], &["nonsense"]] {
        let (code, text) = run(args);
        assert!(code == Some(1) && text.starts_with("farlink-executor: "), "{args:?}: {code:?} {text}");
    }
    assert_eq!(run(&["--help"]).0, Some(0));
    assert_eq!(run(&["--version"]).0, Some(0));
}

/// Libraries open and are found by handle; what is not there is told so; a handle that was never given is an error.
#[test]
fn libraries() {
    let process = Process::spawn();
    let executor = &process.executor;
    let instance = executor.object(DYLIB_INSTANCE).unwrap();
    let open =
        |path: &str, mode| executor.bind(DYLIB_OPEN).unwrap().call(&(instance, path.to_owned(), mode)).wait().unwrap();
    let this = open("", 0).unwrap();
    let libm = open("libm.so.6", 0).unwrap();
    assert!(open("libnonesuch.so", 0).unwrap_err().contains("libnonesuch.so"));
    assert!(open("libm.so.6", 1).is_err() && open("a\0b", 0).is_err());
    let resolve = executor.bind(DYLIB_RESOLVE).unwrap();
    let names = |names: &[(&str, bool)]| -> Vec<LookupName> {
        names.iter().map(|&(name, required)| LookupName { name: name.to_owned(), required }).collect()
    };
    let asked = names(&[("printf", true), ("nonesuch", false), ("nonesuch", true), ("", true), ("", false)]);
    let found = resolve.call(&(this, asked)).wait().unwrap().unwrap();
    assert!(!found[0].unwrap().addr.is_null() && found[0].unwrap().flags == SymbolDef::EXPORTED);
    assert_eq!(found[1..], [Some(SymbolDef::exported(ExecutorAddr::NULL)), None, None, None]);
    let bad = ExecutorAddr::new(0x1234);
    assert!(resolve.call(&(bad, names(&[("printf", true)]))).wait().unwrap().is_err());
    let batched = executor.bind(RESOLVE).unwrap();
    let asked = vec!["cos".to_owned(), "malloc".to_owned(), "nonesuch".to_owned(), "a\0b".to_owned()];
    let found = batched.call(&(vec![libm, this], asked.clone())).wait().unwrap().unwrap();
    assert!(found[0].is_some() && found[1].is_some() && found[2].is_none() && found[3].is_none());
    assert!(batched.call(&(vec![bad], asked)).wait().unwrap().is_err());
    process.end();
}

/// `main` gets its arguments, any bytes but NUL, and its result is that of a C `int`.
#[test]
fn main_gets_arguments() {
    let process = Process::spawn();
    let mapper = RemoteMapper::new(&process.executor).unwrap();
    // mov 8(%rsi), %rax; movzbl (%rax), %eax; sub %edi, %eax; ret: the first byte of argv[1] less argc.
    let main = place(&mapper, &[0x48, 0x8b, 0x46, 0x08, 0x0f, 0xb6, 0x00, 0x29, 0xf8, 0xc3]);
    let run = process.executor.bind(RUN_AS_MAIN).unwrap();
    let call = |args: &[&[u8]]| {
        let args = args.iter().map(|arg| arg.to_vec().into()).collect();
        run.call(&MainCall { main, args }).wait()
    };
    assert_eq!(call(&[b"name", b"\xff!"]).unwrap(), 255 - 2);
    assert_eq!(call(&[b"name", b"\x01", b"x"]).unwrap(), -2);
    assert!(matches!(call(&[b"name", b"a\0b"]), Err(CallError::OutOfBand(_))));
    let null = MainCall { main: ExecutorAddr::NULL, args: Vec::new() };
    assert!(matches!(run.call(&null).wait(), Err(CallError::OutOfBand(_))));
    process.end();
}

/// Memory that is not there is an error, and the executor lives on; what is there can be read and written.
#[test]
fn memory_access() {
    let process = Process::spawn();
    let executor = &process.executor;
    let mapper = RemoteMapper::new(executor).unwrap();
    let base = mapper.reserve(PAGE).wait().unwrap().start();
    for addr in [ExecutorAddr::NULL, ExecutorAddr::new(PAGE), ExecutorAddr::new(u64::MAX - 7)] {
        assert!(executor.bind(READ_UINT64S).unwrap().call(&(vec![addr],)).wait().is_err());
        assert!(executor.bind(WRITE_UINT32S).unwrap().call(&(vec![(addr, 1)],)).wait().is_err());
        assert!(executor.bind(READ_STRINGS).unwrap().call(&(vec![addr],)).wait().is_err());
    }
    let huge = ExecutorAddrRange::from_len(base, 1 << 40).unwrap();
    assert!(executor.bind(READ_BUFFERS).unwrap().call(&(vec![huge],)).wait().is_err());
    executor.bind(WRITE_UINT32S).unwrap().call(&(vec![(base, 0x0063_6261)],)).wait().unwrap();
    let strings = executor.bind(READ_STRINGS).unwrap().call(&(vec![base],)).wait().unwrap();
    assert_eq!(strings, [b"abc".to_vec()]);
    process.end();
}

/// Calls that name nothing the executor has are errors, not its end.
#[test]
fn bad_calls_are_errors() {
    let process = Process::spawn();
    let executor = &process.executor;
    let reserve = executor.bind(SHARED_RESERVE).unwrap();
    let instance = executor.object(SHARED_INSTANCE).unwrap();
    let wrong = ExecutorAddr::new(instance.as_u64() + 1000);
    assert!(
        matches!(reserve.call(&(wrong, PAGE)).wait(), Err(CallError::OutOfBand(text)) if text.contains("instance"))
    );
    // A descriptor that never came.
    let map = executor.bind(SHARED_MAP).unwrap();
    assert!(map.call(&(instance, 77, PAGE, Vec::new())).wait().unwrap().unwrap_err().contains("77"));
    // One that is too small, and one that is no memory.
    let empty = executor.send_descriptor(std::fs::File::open("/dev/null").unwrap().as_fd()).unwrap();
    assert!(map.call(&(instance, empty, PAGE, Vec::new())).wait().unwrap().is_err());
    let socket = std::os::unix::net::UnixStream::pair().unwrap().0;
    let socket = executor.send_descriptor(socket.as_fd()).unwrap();
    assert!(map.call(&(instance, socket, 0, Vec::new())).wait().unwrap().is_err());
    // Arguments that end early.
    assert!(
        matches!(reserve.call_encoded(vec![1, 2, 3]).wait(), Err(CallError::OutOfBand(text)) if text.contains("decoded"))
    );
    let range = ExecutorAddrRange::from_len(ExecutorAddr::new(0x1000), 16).unwrap();
    assert!(executor.bind(DEREGISTER_EH_FRAME).unwrap().call(&(range,)).wait().unwrap().0.is_err());
    let empty = ExecutorAddrRange::default();
    assert!(executor.bind(REGISTER_EH_FRAME).unwrap().call(&(empty,)).wait().unwrap().0.is_err());
    assert!(executor.bind(RUN_EXITS).unwrap().call(&(ExecutorAddr::NULL,)).wait().unwrap().0.is_err());
    let odd = ExecutorAddrRange::from_len(ExecutorAddr::new(0x1000), 12).unwrap();
    let request = RunInitializers { init: vec![odd], ..RunInitializers::default() };
    assert!(executor.bind(RUN_INITIALIZERS).unwrap().call(&request).wait().unwrap().0.is_err());
    process.end();
}

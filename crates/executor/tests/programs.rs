//! What linked programs do in the executor: initializers, `main` on the main thread, and what is left for the end.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on panics")]

mod common;

use common::{Process, wait};
use farlink_addr::{AllocGroup, ExecutorAddr, ExecutorAddrRange, MemProt};
use farlink_mem::{FinalizeRequest, FinalizeSegment, MemoryMapper, RemoteMapper, SharedMemoryMapper, WorkingMemory};
use farlink_rpc::{CallError, Endpoint, Executor, Handler, Options, Transport, connect};
use farlink_wire::functions::{
    DISPATCH_CONTEXT, DISPATCH_FN, DYLIB_INSTANCE, DYLIB_OPEN, READ_BUFFERS, RUN_AS_INT_FUNCTION, RUN_AS_MAIN,
    RUN_AS_VOID_FUNCTION, RUN_EXITS, RUN_INITIALIZERS, RUN_PROGRAM, WRITE_UINT64S,
};
use farlink_wire::msg::{ActionPair, FiniArray, MainCall, ObjectExits, RunInitializers, WrapperFunctionCall};
use farlink_wire::sps::Blob;
use std::io::Read;
use std::sync::Arc;

const PAGE: u64 = 4096;

/// `jmp .`: never returns.
const LOOP: [u8; 2] = [0xeb, 0xfe];

fn addr(base: ExecutorAddr, offset: u64) -> ExecutorAddr {
    base.checked_add(offset).unwrap()
}

fn range(start: ExecutorAddr, len: u64) -> ExecutorAddrRange {
    ExecutorAddrRange::from_len(start, len).unwrap()
}

/// Finalizes a page in a reservation of its own; gives its address and the controller's view of it.
fn place(
    mapper: &dyn MemoryMapper,
    prot: MemProt,
    content: &[u8],
    actions: Vec<ActionPair>,
) -> (ExecutorAddr, WorkingMemory) {
    let base = mapper.reserve(PAGE).wait().unwrap();
    let working = mapper.prepare(base).unwrap();
    working.write(0, content).unwrap();
    let group = AllocGroup::standard(prot);
    let segment = FinalizeSegment { group, range: base, content_bytes: content.len() as u64, working: working.clone() };
    let request = FinalizeRequest { reservation: base.start(), segments: vec![segment], actions };
    (mapper.finalize(vec![request]).wait().unwrap()[0], working)
}

fn args(args: &[&str]) -> Vec<Blob<'static>> {
    args.iter().map(|arg| arg.as_bytes().to_vec().into()).collect()
}

/// Functions that each append their own number to a log: a position byte, then entries.
struct Logger {
    log: ExecutorAddr,
    view: WorkingMemory,
    code: ExecutorAddr,
}

impl Logger {
    /// Bytes of each function.
    const BYTES: u64 = 32;

    /// The log is shared memory, which this process still sees when the executor has gone.
    fn new(mapper: &SharedMemoryMapper) -> Self {
        let (log, view) = place(mapper, MemProt::RW, b"", Vec::new());
        let mut code = Vec::new();
        for number in 0..100 {
            // movabs $log, %rdx; movzbl (%rdx), %ecx; movb $number, 1(%rdx,%rcx); incb (%rdx); ret
            let mut function = vec![0x48, 0xba];
            function.extend_from_slice(&log.as_u64().to_le_bytes());
            function.extend_from_slice(&[0x0f, 0xb6, 0x0a, 0xc6, 0x44, 0x0a, 0x01, number, 0xfe, 0x02, 0xc3]);
            function.resize(Self::BYTES as usize, 0xcc);
            code.extend_from_slice(&function);
        }
        let (code, _) = place(mapper, MemProt::RX, &code, Vec::new());
        Self { log, view, code }
    }

    fn function(&self, number: u8) -> u64 {
        addr(self.code, u64::from(number) * Self::BYTES).as_u64()
    }

    /// Places an array of functions; other entries are taken as they are.
    fn array(&self, mapper: &dyn MemoryMapper, entries: &[u64]) -> ExecutorAddrRange {
        let bytes: Vec<u8> = entries.iter().flat_map(|entry| entry.to_le_bytes()).collect();
        range(place(mapper, MemProt::READ, &bytes, Vec::new()).0, bytes.len() as u64)
    }

    fn entries(&self) -> Vec<u8> {
        let mut bytes = [0; 100];
        self.view.read(0, &mut bytes).unwrap();
        bytes[1..1 + usize::from(bytes[0])].to_vec()
    }
}

fn initialize(executor: &Executor, init: Vec<ExecutorAddrRange>, exits: Vec<ObjectExits>) {
    let request = RunInitializers { init, exits, args: args(&["program"]), ..RunInitializers::default() };
    executor.bind(RUN_INITIALIZERS).unwrap().call(&request).wait().unwrap().0.unwrap();
}

/// Initializers run in the order given, without the entries that are none; an object's finalizers run once when it
/// goes, those of the others when the program exits: the reverse order of priority, of objects and within arrays.
#[test]
fn initializers_and_finalizers_run_in_order() {
    let mut process = Process::spawn();
    let executor = &process.executor;
    let mapper = SharedMemoryMapper::posix(executor).unwrap();
    let logger = Logger::new(&mapper);
    let array = |numbers: &[u8]| {
        let entries: Vec<_> = numbers.iter().map(|&number| logger.function(number)).collect();
        logger.array(&mapper, &entries)
    };
    let fini = |numbers: &[u8], priority| FiniArray { array: array(numbers), priority };
    let handle = |number: u64| addr(logger.log, 2048 + 8 * number);
    let with_gaps = logger.array(&mapper, &[logger.function(1), 0, u64::MAX, logger.function(2)]);
    let exits = vec![
        ObjectExits { dso_handle: handle(1), fini: vec![fini(&[10, 11], 65535), fini(&[12], 100)] },
        ObjectExits { dso_handle: handle(2), fini: vec![fini(&[20, 21], 65535), fini(&[22], 100), fini(&[23], 200)] },
    ];
    initialize(executor, vec![with_gaps, array(&[3])], exits);
    initialize(
        executor,
        vec![array(&[4])],
        vec![ObjectExits { dso_handle: handle(3), fini: vec![fini(&[30], 65535)] }],
    );
    assert_eq!(logger.entries(), [1, 2, 3, 4]);
    let run_exits = executor.bind(RUN_EXITS).unwrap();
    for dso_handle in [handle(1), handle(1), handle(9)] {
        run_exits.call(&(dso_handle,)).wait().unwrap().0.unwrap();
    }
    assert_eq!(logger.entries(), [1, 2, 3, 4, 11, 10, 12]);
    // mov %edi, %eax; ret
    let (main, _) = place(&mapper, MemProt::RX, &[0x89, 0xf8, 0xc3], Vec::new());
    let program = MainCall { main, args: args(&["program", "x", "y"]) };
    let answer = executor.bind(RUN_PROGRAM).unwrap().call(&program).wait();
    assert!(matches!(answer, Err(CallError::Disconnected(_))), "{answer:?}");
    assert_eq!(wait(&mut process.child).code(), Some(3));
    assert_eq!(logger.entries(), [1, 2, 3, 4, 11, 10, 12, 30, 21, 20, 23, 22]);
}

/// Initializers get the program's arguments, which stay where they are.
#[test]
fn initializers_get_arguments() {
    let process = Process::spawn();
    let mapper = RemoteMapper::new(&process.executor).unwrap();
    let (data, _) = place(&mapper, MemProt::RW, b"", Vec::new());
    // movabs $data, %rax; mov %rdi, (%rax); mov (%rsi), %rcx; mov %rcx, 8(%rax); mov %rdx, 16(%rax); ret
    let mut code = vec![0x48, 0xb8];
    code.extend_from_slice(&data.as_u64().to_le_bytes());
    code.extend_from_slice(&[0x48, 0x89, 0x38, 0x48, 0x8b, 0x0e, 0x48, 0x89, 0x48, 8, 0x48, 0x89, 0x50, 16, 0xc3]);
    let (code, _) = place(&mapper, MemProt::RX, &code, Vec::new());
    let (array, _) = place(&mapper, MemProt::READ, &code.as_u64().to_le_bytes(), Vec::new());
    let read = |at, len| {
        let buffers = process.executor.bind(READ_BUFFERS).unwrap().call(&(vec![range(at, len)],));
        buffers.wait().unwrap().remove(0)
    };
    let word = |index: u64| u64::from_le_bytes(read(addr(data, 8 * index), 8).try_into().unwrap());
    initialize(&process.executor, vec![range(array, 8)], Vec::new());
    assert_eq!(word(0) as u32, 1);
    assert_eq!(read(ExecutorAddr::new(word(1)), 8), b"program\0");
    assert_ne!(word(2), 0);
    process.end();
}

/// A program that cannot run on the main thread is refused and the executor lives on: while another call has that
/// thread, and with arguments that C cannot have.
#[test]
fn program_needs_the_main_thread() {
    let process = Process::spawn();
    let executor = &process.executor;
    let mapper = RemoteMapper::new(executor).unwrap();
    let (flag, _) = place(&mapper, MemProt::RW, b"", Vec::new());
    // movabs $flag, %rdx; lock incb (%rdx); 1: cmpb $2, (%rdx); jne 1b; xor %eax, %eax; ret
    let mut code = vec![0x48, 0xba];
    code.extend_from_slice(&flag.as_u64().to_le_bytes());
    code.extend_from_slice(&[0xf0, 0xfe, 0x02, 0x80, 0x3a, 2, 0x75, 0xfb, 0x31, 0xc0, 0xc3]);
    let (waits, _) = place(&mapper, MemProt::RX, &code, Vec::new());
    let program = executor.bind(RUN_PROGRAM).unwrap();
    let call = |main, arguments| program.call(&MainCall { main, args: arguments }).wait().unwrap().0.unwrap_err();
    assert!(call(waits, args(&["a\0b"])).contains("NUL"));
    assert!(call(ExecutorAddr::NULL, args(&["a"])).contains("null"));
    let running = executor.bind(RUN_AS_MAIN).unwrap().call(&MainCall { main: waits, args: args(&["a"]) });
    let read = executor.bind(READ_BUFFERS).unwrap();
    while read.call(&(vec![range(flag, 1)],)).wait().unwrap() != [[1]] {
        std::thread::yield_now();
    }
    assert!(call(waits, args(&["a"])).contains("main thread"));
    executor.bind(WRITE_UINT64S).unwrap().call(&(vec![(flag, 2)],)).wait().unwrap();
    assert_eq!(running.wait().unwrap(), 0);
    process.end();
}

/// A dealloc action that never returns does not keep the executor when its controller has gone.
#[test]
fn ends_while_a_dealloc_action_runs() {
    let mut process = Process::spawn();
    let mapper = RemoteMapper::new(&process.executor).unwrap();
    let (code, _) = place(&mapper, MemProt::RX, &LOOP, Vec::new());
    let dealloc = Some(WrapperFunctionCall::new(code, &()));
    place(&mapper, MemProt::READ, b"x", vec![ActionPair { finalize: None, dealloc }]);
    process.endpoint.hang_up(Ok(()));
    assert_eq!(wait(&mut process.child).code(), Some(0));
    let mut text = String::new();
    process.child.stderr.take().unwrap().read_to_string(&mut text).unwrap();
    assert!(text.contains("for its end"), "{text}");
}

/// A library is opened for a session that there is, and for no other.
#[test]
fn libraries_belong_to_a_session() {
    let process = Process::spawn();
    for executor in [process.executor.clone(), farlink_executor::local()] {
        let instance = executor.object(DYLIB_INSTANCE).unwrap();
        let open = executor.bind(DYLIB_OPEN).unwrap();
        let wrong = addr(instance, 1000);
        let answer = open.call(&(wrong, String::new(), 0)).wait();
        assert!(matches!(&answer, Err(CallError::OutOfBand(text)) if text.contains("instance")), "{answer:?}");
        assert!(open.call(&(instance, String::new(), 0)).wait().unwrap().is_ok());
    }
    process.end();
}

/// Answers each call with its tag and its arguments reversed.
struct Reverse;

impl Handler for Reverse {
    fn call(&self, function: ExecutorAddr, mut args: Vec<u8>) -> Result<Vec<u8>, String> {
        args.reverse();
        args.push(function.as_u64() as u8);
        Ok(args)
    }
}

/// Linked code calls the controller through the dispatch function, and has its answer as a wrapper function has.
#[test]
fn linked_code_calls_the_controller() {
    let (mut child, socket) = common::start(&["--farlink"]);
    let transport = Transport::from_socket(socket.into()).unwrap();
    let (endpoint, info): (Endpoint, _) = connect(transport, Arc::new(Reverse), Options::default()).unwrap();
    let executor = Executor::new(info, Arc::new(endpoint.clone())).unwrap();
    let mapper = RemoteMapper::new(&executor).unwrap();
    let (context, function) = (executor.object(DISPATCH_CONTEXT).unwrap(), executor.object(DISPATCH_FN).unwrap());
    let (args, _) = place(&mapper, MemProt::READ, b"abc", Vec::new());
    // movabs $context, %rdi; mov $7, %esi; movabs $args, %rdx; mov $3, %ecx; movabs $function, %rax; jmp *%rax
    let mut code = vec![0x48, 0xbf];
    code.extend_from_slice(&context.as_u64().to_le_bytes());
    code.extend_from_slice(&[0xbe, 7, 0, 0, 0, 0x48, 0xba]);
    code.extend_from_slice(&args.as_u64().to_le_bytes());
    code.extend_from_slice(&[0xb9, 3, 0, 0, 0, 0x48, 0xb8]);
    code.extend_from_slice(&function.as_u64().to_le_bytes());
    code.extend_from_slice(&[0xff, 0xe0]);
    let (code, _) = place(&mapper, MemProt::RX, &code, Vec::new());
    assert_eq!(endpoint.call(code, Vec::new()).wait().unwrap(), b"cba\x07");
    endpoint.hang_up(Ok(()));
    assert_eq!(wait(&mut child).code(), Some(0));
}

/// An executor in this process runs code on the calling thread and tears down what is left when it is dropped.
#[test]
fn local_executor_ends_with_its_last_clone() {
    let executor = farlink_executor::local();
    let mapper = RemoteMapper::new(&executor).unwrap();
    // mov %edi, %eax; inc %eax; ret
    let (increment, _) = place(&mapper, MemProt::RX, &[0x89, 0xf8, 0xff, 0xc0, 0xc3], Vec::new());
    assert_eq!(executor.bind(RUN_AS_INT_FUNCTION).unwrap().call(&(increment, 41)).wait().unwrap(), 42);
    // mov $186, %eax (gettid); syscall; ret
    let (tid, _) = place(&mapper, MemProt::RX, &[0xb8, 186, 0, 0, 0, 0x0f, 0x05, 0xc3], Vec::new());
    let own = rustix::thread::gettid().as_raw_nonzero().get();
    assert_eq!(executor.bind(RUN_AS_VOID_FUNCTION).unwrap().call(&(tid,)).wait().unwrap(), own);
    let main = MainCall { main: tid, args: args(&["program"]) };
    assert_eq!(executor.bind(RUN_AS_MAIN).unwrap().call(&main).wait().unwrap(), i64::from(own));
    let other = farlink_executor::local();
    assert_ne!(other.object(DYLIB_INSTANCE).unwrap(), executor.object(DYLIB_INSTANCE).unwrap());
    drop((mapper, executor));
    let gone = other.bind(READ_BUFFERS).unwrap().call(&(vec![range(tid, 8)],)).wait();
    assert!(matches!(gone, Err(CallError::OutOfBand(_))), "{gone:?}");
}

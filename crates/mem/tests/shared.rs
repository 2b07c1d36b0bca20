//! [`SharedMemoryMapper`] and [`RemoteMapper`] with an executor in this process that serves calls with a
//! [`MemoryService`], and lies when it is told to.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use farlink_addr::{Align, AllocGroup, ExecutorAddr, ExecutorAddrRange, MemProt};
use farlink_mem::{
    Allocation, Error, FinalizeRequest, FinalizeSegment, MemoryManager, MemoryMapper, MemoryService, RemoteMapper,
    SegmentLayout, SharedMemoryMapper, WorkingMemory, page_size,
};
use farlink_rpc::{CallError, Caller, Disconnected, Executor, Pending};
use farlink_wire::functions::*;
use farlink_wire::msg::{FinalizeRequest as Message, Segment, SharedFinalizeRequest};
use farlink_wire::setup::ExecutorInfo;
use farlink_wire::sps::{Blob, SpsError, from_bytes, to_bytes};
use std::collections::VecDeque;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

const INSTANCE: ExecutorAddr = ExecutorAddr::new(0x77);
const FUNCTIONS: [&str; 5] = ["reserve", "initialize", "deinitialize", "release", "initialize_batch"];

type Keys = Vec<ExecutorAddr>;
type SharedBatch = Vec<(ExecutorAddr, SharedFinalizeRequest)>;

/// How a call is answered.
enum Answer {
    Truth,
    /// Asks the service, then answers to reserve with another base and name.
    Reserved(Box<dyn FnOnce(ExecutorAddr, String) -> (ExecutorAddr, String) + Send>),
    /// Asks the service, then answers with other keys.
    Keys(fn(Keys) -> Keys),
    /// Asks the service, then sends bytes that are no answer.
    Garbage,
    /// Asks nobody.
    Refuse,
    Disconnect,
}

/// An executor in this process.
struct Fake {
    service: MemoryService,
    is_shared: bool,
    /// The answers to come; then the truth.
    answers: Mutex<VecDeque<Answer>>,
    /// Function and, if it takes them, keys or bases.
    calls: Mutex<Vec<(&'static str, Keys)>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Fake {
    fn new(is_shared: bool, answers: Vec<Answer>) -> Arc<Self> {
        let service = MemoryService::new();
        Arc::new(Self { service, is_shared, answers: Mutex::new(answers.into()), calls: Mutex::default() })
    }

    /// Returns the executor, which announces batches if it has them.
    fn executor(self: &Arc<Self>, has_batch: bool, pid: u64) -> Executor {
        let mut info = ExecutorInfo { page_size: page_size().bytes(), ..ExecutorInfo::default() };
        let at = |index: u64| ExecutorAddr::new(0x1000 + index);
        info.set_value(PID_KEY, &pid);
        info.set_value(VERSION_KEY, &FARLINK_VERSION);
        let instance = if self.is_shared { SHARED_INSTANCE } else { SIMPLE_INSTANCE };
        info.bootstrap_symbols.push((instance.to_owned(), INSTANCE));
        if self.is_shared {
            SHARED_RESERVE.announce(at(0), &mut info);
            SHARED_INITIALIZE.announce(at(1), &mut info);
            SHARED_DEINITIALIZE.announce(at(2), &mut info);
            SHARED_RELEASE.announce(at(3), &mut info);
        } else {
            SIMPLE_RESERVE.announce(at(0), &mut info);
            SIMPLE_INITIALIZE.announce(at(1), &mut info);
            SIMPLE_DEINITIALIZE.announce(at(2), &mut info);
            SIMPLE_RELEASE.announce(at(3), &mut info);
        }
        match (has_batch, self.is_shared) {
            (true, true) => SHARED_INITIALIZE_BATCH.announce(at(4), &mut info),
            (true, false) => SIMPLE_INITIALIZE_BATCH.announce(at(4), &mut info),
            _ => {}
        }
        Executor::new(info, Arc::clone(self) as Arc<dyn Caller>).unwrap()
    }

    fn mapper(self: &Arc<Self>, has_batch: bool) -> Box<dyn MemoryMapper> {
        let executor = self.executor(has_batch, u64::from(std::process::id()));
        if self.is_shared {
            Box::new(SharedMemoryMapper::new(&executor).unwrap())
        } else {
            Box::new(RemoteMapper::new(&executor).unwrap())
        }
    }

    fn reserve(&self, bytes: u64, answer: Answer) -> Vec<u8> {
        let reserved = match self.is_shared {
            true => self.service.reserve_shared(bytes),
            false => self.service.reserve_private(bytes).map(|range| (range, String::new())),
        };
        let reserved = reserved.map(|(range, name)| (range.start(), name)).map_err(|error| error.to_string());
        let reserved = match answer {
            Answer::Reserved(lie) => reserved.map(|(base, name)| lie(base, name)),
            _ => reserved,
        };
        if self.is_shared { to_bytes(&reserved) } else { to_bytes(&reserved.map(|(base, _)| base)) }
    }

    /// Decodes an initialize call's arguments.
    fn requests(&self, is_batch: bool, args: &[u8]) -> Vec<Allocation<'static>> {
        let shared = |(base, request): (ExecutorAddr, SharedFinalizeRequest)| Allocation {
            slab: Some(base),
            segments: request
                .segments
                .into_iter()
                .map(|segment| Segment {
                    group: segment.group,
                    addr: segment.addr,
                    size: segment.size,
                    content: Blob::default(),
                })
                .collect(),
            actions: request.actions,
        };
        let simple = |request: Message<'_>| Allocation {
            slab: None,
            segments: request
                .segments
                .into_iter()
                .map(|segment| Segment { content: segment.content.into_owned().into(), ..segment })
                .collect(),
            actions: request.actions,
        };
        match (self.is_shared, is_batch) {
            (true, true) => {
                let (_, batch): (ExecutorAddr, SharedBatch) = from_bytes(args).unwrap();
                batch.into_iter().map(shared).collect()
            }
            (true, false) => {
                let (_, base, request): (ExecutorAddr, ExecutorAddr, SharedFinalizeRequest) = from_bytes(args).unwrap();
                vec![shared((base, request))]
            }
            (false, true) => {
                let (_, batch): (ExecutorAddr, Vec<Message<'_>>) = from_bytes(args).unwrap();
                batch.into_iter().map(simple).collect()
            }
            (false, false) => {
                let (_, request): (ExecutorAddr, Message<'_>) = from_bytes(args).unwrap();
                vec![simple(request)]
            }
        }
    }

    fn serve(&self, name: &'static str, args: &[u8], answer: Answer) -> Vec<u8> {
        let keys = || from_bytes::<(ExecutorAddr, Keys)>(args).unwrap().1;
        let done = |result: Result<(), Error>| to_bytes(&SpsError(result.map_err(|error| error.to_string())));
        match name {
            "reserve" => {
                let (instance, bytes): (ExecutorAddr, u64) = from_bytes(args).unwrap();
                assert_eq!(instance, INSTANCE);
                self.reserve(bytes, answer)
            }
            "deinitialize" => done(self.service.deinitialize(&keys())),
            "release" => done(self.service.release(&keys())),
            _ => {
                let is_batch = name == "initialize_batch";
                let made = self.service.initialize(self.requests(is_batch, args)).map_err(|error| error.to_string());
                let made = made.map(|keys| if let Answer::Keys(lie) = answer { lie(keys) } else { keys });
                if is_batch { to_bytes(&made) } else { to_bytes(&made.map(|keys| keys[0])) }
            }
        }
    }

    fn names_called(&self) -> Vec<&'static str> {
        lock(&self.calls).iter().map(|&(name, _)| name).collect()
    }

    fn was_told(&self, name: &'static str, keys: &[ExecutorAddr]) -> bool {
        lock(&self.calls).contains(&(name, keys.to_vec()))
    }
}

impl Caller for Fake {
    fn call(&self, function: ExecutorAddr, args: Vec<u8>) -> Pending<Result<Vec<u8>, CallError>> {
        let name = FUNCTIONS[(function.as_u64() - 0x1000) as usize];
        let keys = match name {
            "deinitialize" | "release" => from_bytes::<(ExecutorAddr, Keys)>(&args).unwrap().1,
            _ => Vec::new(),
        };
        lock(&self.calls).push((name, keys));
        let answer = lock(&self.answers).pop_front().unwrap_or(Answer::Truth);
        Pending::ready(match answer {
            Answer::Disconnect => Err(CallError::Disconnected(Disconnected::Eof)),
            Answer::Refuse => Ok(to_bytes(&Expected::<ExecutorAddr>::Err("refused".to_owned()))),
            Answer::Garbage => {
                self.serve(name, &args, Answer::Truth);
                Ok(vec![0xff; 3])
            }
            answer => Ok(self.serve(name, &args, answer)),
        })
    }
}

/// Names in `/dev/shm`, descriptors and mappings of shared memory that are this process's. Tests take turns, so that
/// each sees its own only.
#[derive(Debug, PartialEq, Eq, Clone, Copy)]
struct Held {
    names: usize,
    descriptors: usize,
    mappings: usize,
}

const NOTHING: Held = Held { names: 0, descriptors: 0, mappings: 0 };

fn held() -> Held {
    let prefix = format!("farlink_{}_", std::process::id());
    let is_ours = |name: &str| name.contains(&prefix);
    let files = |path: &str| std::fs::read_dir(path).unwrap().map(|entry| entry.unwrap());
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    Held {
        names: files("/dev/shm").filter(|entry| is_ours(&entry.file_name().to_string_lossy())).count(),
        descriptors: files("/proc/self/fd")
            .filter(|entry| std::fs::read_link(entry.path()).is_ok_and(|path| is_ours(&path.to_string_lossy())))
            .count(),
        mappings: maps.lines().filter(|line| is_ours(line)).count(),
    }
}

static SERIAL: Mutex<()> = Mutex::new(());

fn begin() -> MutexGuard<'static, ()> {
    let guard = lock(&SERIAL);
    assert_eq!(held(), NOTHING);
    guard
}

/// A file in `/dev/shm` with a name as this process's, which is removed at the end.
struct Object(String);

impl Object {
    fn new(what: &str, bytes: u64) -> Self {
        let object = Self(format!("/farlink_{}_{what}", std::process::id()));
        std::fs::File::create_new(object.path()).unwrap().set_len(bytes).unwrap();
        object
    }

    fn path(&self) -> PathBuf {
        PathBuf::from(format!("/dev/shm{}", self.0))
    }
}

impl Drop for Object {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(self.path());
    }
}

fn read(addr: ExecutorAddr) -> u8 {
    // SAFETY: the tests read readable memory of the service's slabs.
    unsafe { (addr.as_u64() as *const u8).read_volatile() }
}

fn is_executable(addr: ExecutorAddr) -> bool {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    maps.lines().any(|line| {
        let (range, rest) = line.split_once(' ').unwrap();
        let (start, end) = range.split_once('-').unwrap();
        let parse = |text| u64::from_str_radix(text, 16).unwrap();
        (parse(start)..parse(end)).contains(&addr.as_u64()) && rest.starts_with("r-x")
    })
}

fn page(base: ExecutorAddrRange, index: u64) -> ExecutorAddrRange {
    let bytes = page_size().bytes();
    ExecutorAddrRange::from_len(base.start().checked_add(index * bytes).unwrap(), bytes).unwrap()
}

/// A page of code with this content at its start.
fn request(mapper: &dyn MemoryMapper, base: ExecutorAddrRange, index: u64, content: &[u8]) -> FinalizeRequest {
    let range = page(base, index);
    let working = mapper.prepare(range).unwrap();
    let mut before = [0xff; 16];
    working.read(0, &mut before).unwrap();
    assert_eq!(before, [0; 16]);
    working.write(0, content).unwrap();
    let content_bytes = content.len() as u64;
    let segment = FinalizeSegment { group: AllocGroup::standard(MemProt::RX), range, content_bytes, working };
    FinalizeRequest { reservation: base.start(), segments: vec![segment], actions: Vec::new() }
}

fn reserve(mapper: &dyn MemoryMapper, pages: u64) -> Result<ExecutorAddrRange, Error> {
    mapper.reserve(pages * page_size().bytes()).wait()
}

/// Content that is written here is what the executor runs, through both mappers, with and without batches; at the
/// end nothing is left on either side.
#[test]
fn round_trip() {
    let _serial = begin();
    for (is_shared, has_batch) in [(true, true), (true, false), (false, true), (false, false)] {
        let fake = Fake::new(is_shared, vec![]);
        let mapper = fake.mapper(has_batch);
        let base = reserve(&*mapper, 4).unwrap();
        assert_eq!(base.len(), 4 * page_size().bytes());
        let both = usize::from(is_shared);
        assert_eq!(held(), Held { names: 0, descriptors: 2 * both, mappings: 2 * both });
        let requests = vec![request(&*mapper, base, 0, b"first"), request(&*mapper, base, 2, b"second")];
        let keys = mapper.finalize(requests).wait().unwrap();
        assert_eq!(keys, [page(base, 0).start(), page(base, 2).start()]);
        assert_eq!((read(keys[0]), read(keys[1])), (b'f', b's'));
        assert!(keys.iter().all(|&key| is_executable(key)) && !is_executable(page(base, 1).start()));
        let calls = fake.names_called();
        let expected: &[_] = if has_batch { &["initialize_batch"] } else { &["initialize", "initialize"] };
        assert_eq!(calls[1..], *expected);
        mapper.deallocate(keys.clone()).wait().unwrap();
        assert!(mapper.deallocate(keys.clone()).wait().is_err());
        // The same memory again, which has to be zero (`request` looks).
        let keys = mapper.finalize(vec![request(&*mapper, base, 0, b"third")]).wait().unwrap();
        assert_eq!(read(keys[0]), b't');
        mapper.release(vec![base.start()]).wait().unwrap();
        assert!(!is_executable(keys[0]));
        assert!(matches!(mapper.release(vec![base.start()]).wait(), Err(Error::UnknownReservation(_))));
        assert!(matches!(mapper.prepare(page(base, 0)), Err(Error::OutsideReservation(_))));
        assert_eq!(held(), NOTHING);
    }
}

/// The manager works over both, and its reservation goes with it.
#[test]
fn the_manager_over_an_executor() {
    let _serial = begin();
    for is_shared in [true, false] {
        let fake = Fake::new(is_shared, vec![]);
        let manager = MemoryManager::new(Arc::from(fake.mapper(true)), 1 << 20);
        let layout = |prot, content_bytes, zero_fill_bytes| SegmentLayout {
            group: AllocGroup::standard(prot),
            content_bytes,
            zero_fill_bytes,
            align: Align::new(16).unwrap(),
        };
        let segments = vec![layout(MemProt::RX, 5, 0), layout(MemProt::RW, 3, 100_000)];
        let alloc = manager.allocate(segments).wait().unwrap();
        for segment in alloc.segments() {
            segment.working.write(0, &vec![0x90; segment.content_bytes as usize]).unwrap();
        }
        let data = alloc.segments()[1].range;
        let finalized = manager.finalize(vec![(alloc, vec![])]).wait().unwrap();
        assert_eq!((read(finalized[0].key()), read(data.start())), (0x90, 0x90));
        assert_eq!(read(data.end().checked_sub(1).unwrap()), 0);
        manager.deallocate(finalized).wait().unwrap();
        // Stripes are made once; what has no actions is then nobody's business.
        let expected =
            if is_shared { &["reserve", "initialize"][..] } else { &["reserve", "initialize_batch", "deinitialize"] };
        assert_eq!(fake.names_called(), expected);
        drop(manager);
        assert_eq!(fake.names_called().last(), Some(&"release"));
        assert_eq!(held(), NOTHING);
    }
}

/// An executor that does not make stripes as it is told to gives no reservation, and nothing is left of it.
#[test]
fn stripes_that_are_not_made() {
    let _serial = begin();
    for (answer, expected) in [
        (Answer::Keys(|_| vec![ExecutorAddr::new(0x5000)]), "instead of"),
        (Answer::Garbage, "cannot be decoded"),
        (Answer::Refuse, "protect stripes"),
        (Answer::Disconnect, "connection"),
    ] {
        let fake = Fake::new(true, vec![Answer::Truth, answer]);
        let error = fake.mapper(true).reserve(1 << 20).wait().unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
        assert_eq!(fake.names_called(), ["reserve", "initialize", "release"]);
        assert_eq!(held(), NOTHING);
    }
}

/// Physical memory is there for all that was prepared or secured, content or not.
#[test]
fn pages_are_secured() {
    let _serial = begin();
    let fake = Fake::new(true, vec![]);
    let mapper = fake.mapper(true);
    let base = reserve(&*mapper, 100).unwrap();
    let blocks = || {
        let mut descriptors = std::fs::read_dir("/proc/self/fd").unwrap().map(|entry| entry.unwrap().path());
        let is_ours = |path: &PathBuf| std::fs::read_link(path).is_ok_and(|to| to.starts_with("/dev/shm"));
        std::os::unix::fs::MetadataExt::blocks(&std::fs::metadata(descriptors.find(is_ours).unwrap()).unwrap())
    };
    let pages = |count| count * page_size().bytes() / 512;
    assert_eq!(blocks(), 0);
    mapper.prepare(page(base, 3)).unwrap();
    assert_eq!(blocks(), pages(1));
    let unaligned = ExecutorAddrRange::new(
        page(base, 10).start().checked_add(100).unwrap(),
        page(base, 19).start().checked_add(1).unwrap(),
    );
    mapper.secure(unaligned.unwrap()).unwrap();
    assert_eq!(blocks(), pages(11));
    assert!(matches!(mapper.secure(page(base, 100)), Err(Error::OutsideReservation(_))));
    mapper.release(vec![base.start()]).wait().unwrap();
}

/// Reserves once with this answer; gives the error after checking that the mapper has left nothing, and the executor.
fn hostile_reserve(answer: Answer, is_told: bool) -> Error {
    let fake = Fake::new(true, vec![answer]);
    let mapper = fake.mapper(true);
    let error = reserve(&*mapper, 2).unwrap_err();
    // The executor keeps a descriptor with its mapping.
    assert_eq!((held().names, held().descriptors), (0, held().mappings), "{error}");
    assert_eq!(fake.names_called().contains(&"release"), is_told, "{error}");
    // Our own mapping has gone; the executor has its mapping only if it was not told the right base.
    assert!(held().mappings <= 1);
    // The mapper works for an answer that is true.
    let base = reserve(&*mapper, 2).unwrap();
    mapper.release(vec![base.start()]).wait().unwrap();
    drop(mapper);
    drop(fake);
    assert_eq!(held(), NOTHING, "{error}");
    error
}

/// Bases that cannot be are refused.
#[test]
fn hostile_bases() {
    let _serial = begin();
    let with_base =
        |change: fn(ExecutorAddr) -> ExecutorAddr| Answer::Reserved(Box::new(move |base, name| (change(base), name)));
    let error = hostile_reserve(with_base(|_| ExecutorAddr::NULL), false);
    assert!(matches!(error, Error::BadAnswer { .. }), "{error}");
    let error = hostile_reserve(with_base(|base| base.checked_add(8).unwrap()), true);
    assert!(matches!(error, Error::BadAnswer { .. }), "{error}");
    let error = hostile_reserve(with_base(|_| ExecutorAddr::new(u64::MAX - 4095)), true);
    assert!(matches!(error, Error::BadAnswer { .. }), "{error}");
}

/// A base that is in use, or inside what is in use, is refused, and what is in use is not harmed.
#[test]
fn overlapping_bases() {
    let _serial = begin();
    for is_shared in [true, false] {
        for offset in [0, page_size().bytes()] {
            let fake = Fake::new(is_shared, vec![]);
            let mapper = fake.mapper(true);
            let first = reserve(&*mapper, 2).unwrap();
            let base = first.start().checked_add(offset).unwrap();
            lock(&fake.answers).push_back(Answer::Reserved(Box::new(move |_, name| (base, name))));
            let error = reserve(&*mapper, 2).unwrap_err();
            assert!(matches!(error, Error::BadAnswer { .. }), "{error}");
            // Ours of the first, and the executor's of both.
            assert_eq!((held().names, held().descriptors), (0, 3 * usize::from(is_shared)));
            assert_eq!(fake.was_told("release", &[base]), offset != 0);
            let keys = mapper.finalize(vec![request(&*mapper, first, 0, b"fine")]).wait().unwrap();
            assert_eq!(read(keys[0]), b'f');
            drop((mapper, fake));
            assert_eq!(held(), NOTHING);
        }
    }
}

/// Names that are none, and objects that are not there or too small, are refused; the executor gets the memory back.
#[test]
fn hostile_names() {
    let _serial = begin();
    let with_name = |name: String| Answer::Reserved(Box::new(move |base, _| (base, name)));
    let no_names = ["", "/", "no_slash", "/a/b", "/../etc/passwd", "/..", "/.", "//", "/nul\0", "é"];
    for name in no_names.into_iter().map(str::to_owned).chain([format!("/{}", "x".repeat(300))]) {
        let error = hostile_reserve(with_name(name.clone()), true);
        assert!(matches!(error, Error::BadAnswer { .. }), "{name}: {error}");
    }
    let absent = format!("/farlink_{}_absent", std::process::id());
    for name in [absent, format!("/{}", "x".repeat(254))] {
        let error = hostile_reserve(with_name(name), true);
        assert!(matches!(error, Error::SharedMemory { what: "opened", .. }), "{error}");
    }
    for bytes in [0, 1, 2 * page_size().bytes() - 1] {
        let small = Object::new("small", bytes);
        let error = hostile_reserve(with_name(small.0.clone()), true);
        assert!(matches!(error, Error::BadAnswer { .. }), "{error}");
    }
}

/// A name that is a link to a file elsewhere is not followed.
#[test]
fn links_are_not_followed() {
    let _serial = begin();
    let target = std::env::temp_dir().join(format!("farlink_target_{}", std::process::id()));
    std::fs::write(&target, vec![1; 1 << 16]).unwrap();
    let link = Object(format!("/farlink_{}_link", std::process::id()));
    std::os::unix::fs::symlink(&target, link.path()).unwrap();
    let name = link.0.clone();
    let error = hostile_reserve(Answer::Reserved(Box::new(move |base, _| (base, name))), true);
    let is_whole = std::fs::metadata(&target).unwrap().len() == 1 << 16;
    std::fs::remove_file(&target).unwrap();
    assert!(is_whole && matches!(error, Error::SharedMemory { what: "opened", .. }), "{error}");
}

/// The name that an executor has made by the time the connection ends is removed.
#[test]
fn names_of_the_dead_are_removed() {
    let _serial = begin();
    // No process has a number as great as this.
    let pid = (1 << 40) + u64::from(std::process::id());
    let orphans = [1, 2, 3].map(|number| Object(format!("/farlink_{pid}_{number}")));
    for orphan in &orphans {
        std::fs::File::create_new(orphan.path()).unwrap();
    }
    let fake = Fake::new(true, vec![Answer::Refuse, Answer::Disconnect]);
    let mapper = SharedMemoryMapper::new(&fake.executor(true, pid)).unwrap();
    assert!(matches!(reserve(&mapper, 1), Err(Error::Refused { .. })));
    assert!(orphans.iter().all(|orphan| orphan.path().exists()));
    assert!(reserve(&mapper, 1).unwrap_err().is_disconnected());
    // As many as were asked for.
    assert_eq!(orphans.each_ref().map(|orphan| orphan.path().exists()), [false, false, true]);
}

/// Keys that are not those of the request are an error, as are too few, and an answer that is none.
#[test]
fn hostile_keys() {
    let _serial = begin();
    let wrong: [fn(Keys) -> Keys; 4] = [
        |keys| keys[..1].to_vec(),
        |_| Vec::new(),
        |keys| keys.into_iter().rev().collect(),
        |keys| vec![keys[0], keys[0].checked_add(1).unwrap()],
    ];
    for is_shared in [true, false] {
        for answer in wrong.map(Answer::Keys).into_iter().chain([Answer::Garbage, Answer::Disconnect, Answer::Refuse]) {
            let is_lie = matches!(answer, Answer::Keys(_));
            let fake = Fake::new(is_shared, vec![Answer::Truth, answer]);
            let mapper = fake.mapper(true);
            let base = reserve(&*mapper, 2).unwrap();
            let requests = vec![request(&*mapper, base, 0, b"a"), request(&*mapper, base, 1, b"b")];
            let error = mapper.finalize(requests).wait().unwrap_err();
            assert_eq!(matches!(error, Error::BadAnswer { .. }), is_lie, "{error}");
            mapper.release(vec![base.start()]).wait().unwrap();
            assert_eq!(held(), NOTHING);
        }
    }
}

/// Without batches, one call that fails undoes those that did not; the memory is as it was reserved.
#[test]
fn one_by_one_is_all_or_none() {
    let _serial = begin();
    for is_shared in [true, false] {
        for failing in 0..3 {
            let mut answers: Vec<_> = (0..4).map(|_| Answer::Truth).collect();
            answers[1 + failing] = Answer::Refuse;
            let fake = Fake::new(is_shared, answers);
            let mapper = fake.mapper(false);
            let base = reserve(&*mapper, 3).unwrap();
            let requests =
                |mapper: &dyn MemoryMapper| (0..3).map(|n| request(mapper, base, n, b"x")).collect::<Vec<_>>();
            let error = mapper.finalize(requests(&*mapper)).wait().unwrap_err();
            assert!(matches!(error, Error::Refused { .. }), "{error}");
            let undone: Vec<_> = (0..3).filter(|&n| n != failing as u64).map(|n| page(base, n).start()).collect();
            assert!(fake.was_told("deinitialize", &undone));
            // `request` looks whether the memory is zero, also that of the one that was refused.
            let keys = mapper.finalize(requests(&*mapper)).wait().unwrap();
            assert_eq!(keys.len(), 3);
            mapper.release(vec![base.start()]).wait().unwrap();
        }
        // Nothing succeeded, so there is nothing to undo.
        let fake = Fake::new(is_shared, vec![Answer::Truth, Answer::Refuse]);
        let mapper = fake.mapper(false);
        let base = reserve(&*mapper, 1).unwrap();
        mapper.finalize(vec![request(&*mapper, base, 0, b"x")]).wait().unwrap_err();
        assert_eq!(fake.names_called(), ["reserve", "initialize"]);
    }
    assert_eq!(held(), NOTHING);
}

/// A batch that the executor refuses leaves zeros, also if it refused before it touched anything.
#[test]
fn refused_memory_is_zero() {
    let _serial = begin();
    for is_shared in [true, false] {
        let fake = Fake::new(is_shared, vec![Answer::Truth, Answer::Refuse]);
        let mapper = fake.mapper(true);
        let base = reserve(&*mapper, 1).unwrap();
        mapper.finalize(vec![request(&*mapper, base, 0, b"dirt")]).wait().unwrap_err();
        assert_eq!(read(base.start()), 0);
        mapper.finalize(vec![request(&*mapper, base, 0, b"x")]).wait().unwrap();
    }
}

/// Requests whose lengths do not fit are refused before anything is sent.
#[test]
fn lengths_are_checked() {
    let _serial = begin();
    for is_shared in [true, false] {
        let fake = Fake::new(is_shared, vec![]);
        let mapper = fake.mapper(true);
        let base = reserve(&*mapper, 1).unwrap();
        let with = |content_bytes, working: WorkingMemory| {
            let mut request = request(&*mapper, base, 0, b"");
            let range = request.segments[0].range;
            let group = request.segments[0].group;
            request.segments[0] = FinalizeSegment { group, range, content_bytes, working };
            mapper.finalize(vec![request]).wait().unwrap_err()
        };
        let small = WorkingMemory::in_heap(4).unwrap();
        assert!(matches!(with(5, small.clone()), Error::OutOfBounds { .. }));
        assert!(matches!(with(u64::MAX, small), Error::ContentTooLong { .. }));
        let none = FinalizeRequest { reservation: base.start(), segments: vec![], actions: vec![] };
        assert!(matches!(mapper.finalize(vec![none]).wait(), Err(Error::NoSegments)));
        assert_eq!(fake.names_called(), ["reserve"]);
    }
}

/// This side's mapping goes also if the executor refuses to release, or cannot be reached.
#[test]
fn release_that_fails() {
    let _serial = begin();
    for answer in [Answer::Disconnect, Answer::Garbage] {
        let fake = Fake::new(true, vec![Answer::Truth, answer]);
        let mapper = fake.mapper(true);
        let base = reserve(&*mapper, 1).unwrap();
        assert!(matches!(mapper.release(vec![base.start()]).wait(), Err(Error::Call(_))));
        assert!(held().mappings <= 1);
        assert_eq!(held().descriptors, held().mappings);
        drop(fake.service.shut_down());
        assert_eq!(held(), NOTHING);
    }
}

/// An executor without the service is told from one that has it.
#[test]
fn services_that_are_missing() {
    let info = ExecutorInfo { page_size: page_size().bytes(), ..ExecutorInfo::default() };
    let executor = Executor::new(info, Fake::new(true, vec![])).unwrap();
    assert!(matches!(SharedMemoryMapper::new(&executor), Err(Error::Call(CallError::Missing(_)))));
    assert!(matches!(RemoteMapper::new(&executor), Err(Error::Call(CallError::Missing(_)))));
}

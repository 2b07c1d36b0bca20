//! [`MemoryService`] with real wrapper functions as actions.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use farlink_addr::{AllocGroup, ExecutorAddr, ExecutorAddrRange, MemProt};
use farlink_mem::wrapper::WrapperResult;
use farlink_mem::{Allocation, Error, MemoryService, page_size};
use farlink_wire::msg::{ActionPair, Segment, WrapperFunctionCall};
use farlink_wire::sps::{Blob, from_bytes};
use std::sync::{Arc, Barrier, Mutex, MutexGuard, PoisonError};

/// What the actions of this process did. Every test holds `SERIAL`: actions, names and mappings are the process's.
static LOG: Mutex<Vec<u64>> = Mutex::new(Vec::new());
static SERIAL: Mutex<()> = Mutex::new(());
/// The service that `reenter` calls.
static REENTERED: Mutex<Option<Arc<MemoryService>>> = Mutex::new(None);
/// What `reenter` got.
static ANSWERS: Mutex<Vec<String>> = Mutex::new(Vec::new());
/// Where `meet` waits for the test, before and after.
static MEETING: Mutex<Option<Arc<(Barrier, Barrier)>>> = Mutex::new(None);

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Begins a test.
fn begin() -> MutexGuard<'static, ()> {
    let guard = lock(&SERIAL);
    lock(&LOG).clear();
    lock(&ANSWERS).clear();
    guard
}

fn log() -> Vec<u64> {
    std::mem::take(&mut lock(&LOG))
}

unsafe fn number(args: *const u8, size: usize) -> u64 {
    // SAFETY: the service passes the bytes of the call.
    from_bytes(unsafe { std::slice::from_raw_parts(args, size) }).unwrap()
}

unsafe extern "C" fn succeed(args: *const u8, size: usize) -> WrapperResult {
    // SAFETY: as the caller.
    lock(&LOG).push(unsafe { number(args, size) });
    WrapperResult::from_result(Ok(vec![0]))
}

/// Fails with an SPS error.
unsafe extern "C" fn fail(args: *const u8, size: usize) -> WrapperResult {
    // SAFETY: as the caller.
    let number = unsafe { number(args, size) };
    lock(&LOG).push(number);
    let text = farlink_wire::sps::SpsError(Err(format!("err-{number}")));
    WrapperResult::from_result(Ok(farlink_wire::sps::to_bytes(&text)))
}

unsafe extern "C" fn fail_out_of_band(_: *const u8, _: usize) -> WrapperResult {
    WrapperResult::from_result(Err("out-of-band".to_owned()))
}

unsafe extern "C" fn no_result(_: *const u8, _: usize) -> WrapperResult {
    WrapperResult::from_result(Ok(Vec::new()))
}

/// Calls the service that runs it, about the page whose address it gets.
unsafe extern "C" fn reenter(args: *const u8, size: usize) -> WrapperResult {
    // SAFETY: as the caller.
    let addr = ExecutorAddr::new(unsafe { number(args, size) });
    let service = lock(&REENTERED).clone().unwrap();
    let page = page_size().bytes();
    let other = service.reserve_private(page).unwrap();
    let elsewhere = service.initialize(vec![allocation(&[(other.start(), page, MemProt::RW)])]).unwrap();
    service.deinitialize(&elsewhere).unwrap();
    let answers = [
        format!("{:?}", service.initialize(vec![allocation(&[(addr, page, MemProt::RW)])])),
        format!("{:?}", service.deinitialize(&[addr])),
        format!("{:?}", service.release(&[addr])),
    ];
    lock(&ANSWERS).extend(answers);
    service.release(&[other.start()]).unwrap();
    WrapperResult::from_result(Ok(vec![0]))
}

/// Waits for the test while it runs.
unsafe extern "C" fn meet(_: *const u8, _: usize) -> WrapperResult {
    let meeting = lock(&MEETING).clone().unwrap();
    meeting.0.wait();
    meeting.1.wait();
    WrapperResult::from_result(Ok(vec![0]))
}

type Action = unsafe extern "C" fn(*const u8, usize) -> WrapperResult;

fn call(action: Action, number: u64) -> Option<WrapperFunctionCall> {
    Some(WrapperFunctionCall::new(ExecutorAddr::new(action as *const () as u64), &number))
}

fn pair(finalize: Option<WrapperFunctionCall>, dealloc: Option<WrapperFunctionCall>) -> ActionPair {
    ActionPair { finalize, dealloc }
}

fn segment(addr: ExecutorAddr, size: u64, prot: MemProt, content: &[u8]) -> Segment<'_> {
    Segment { group: AllocGroup::standard(prot), addr, size, content: Blob::from(content) }
}

fn allocation(segments: &[(ExecutorAddr, u64, MemProt)]) -> Allocation<'static> {
    let segments = segments.iter().map(|&(addr, size, prot)| segment(addr, size, prot, b"")).collect();
    Allocation { slab: None, segments, actions: Vec::new() }
}

fn with_actions(addr: ExecutorAddr, actions: Vec<ActionPair>) -> Allocation<'static> {
    Allocation { actions, ..allocation(&[(addr, 8, MemProt::RX)]) }
}

fn at(base: ExecutorAddrRange, pages: u64) -> ExecutorAddr {
    base.start().checked_add(pages * page_size().bytes()).unwrap()
}

/// The permissions of the mapping that has `addr`, from `/proc/self/maps`; empty if there is none.
fn permissions(addr: ExecutorAddr) -> String {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    for line in maps.lines() {
        let mut fields = line.split_whitespace();
        let (start, end) = fields.next().unwrap().split_once('-').unwrap();
        let parse = |text| u64::from_str_radix(text, 16).unwrap();
        if (parse(start)..parse(end)).contains(&addr.as_u64()) {
            return fields.next().unwrap().to_owned();
        }
    }
    String::new()
}

fn read(addr: ExecutorAddr) -> u8 {
    // SAFETY: the tests read readable memory of slabs that are there.
    unsafe { (addr.as_u64() as *const u8).read_volatile() }
}

fn write(addr: ExecutorAddr, value: u8) {
    // SAFETY: the tests write writable memory of slabs that are there.
    unsafe { (addr.as_u64() as *mut u8).write_volatile(value) };
}

/// Finalize actions run in order, dealloc actions in reverse, absent ones not at all.
#[test]
fn actions_run_in_order() {
    let _serial = begin();
    let service = MemoryService::new();
    let slab = service.reserve_private(1).unwrap();
    let actions = (0..3).map(|n| pair(call(succeed, 10 + n), call(succeed, 20 + n))).collect();
    let keys = service.initialize(vec![with_actions(slab.start(), actions)]).unwrap();
    assert_eq!((keys.as_slice(), log()), (&[slab.start()][..], vec![10, 11, 12]));
    service.deinitialize(&keys).unwrap();
    assert_eq!(log(), [22, 21, 20]);

    let actions = vec![pair(None, call(succeed, 20)), pair(call(succeed, 11), None), pair(None, None)];
    let keys = service.initialize(vec![with_actions(slab.start(), actions)]).unwrap();
    service.deinitialize(&keys).unwrap();
    assert_eq!(log(), [11, 20]);
}

/// When the second of three fails, the first is undone, the failed one and the third are not; the texts are joined in
/// the order of events.
#[test]
fn a_failure_undoes_what_ran() {
    let _serial = begin();
    let service = MemoryService::new();
    let slab = service.reserve_private(1).unwrap();
    let three = |first_dealloc, second| {
        vec![
            pair(call(succeed, 10), call(first_dealloc, 20)),
            pair(call(second, 11), call(succeed, 21)),
            pair(call(succeed, 12), call(succeed, 22)),
        ]
    };
    let initialize = |actions| service.initialize(vec![with_actions(slab.start(), actions)]).unwrap_err().to_string();
    let text = initialize(three(succeed, fail));
    assert_eq!(log(), [10, 11, 20]);
    assert!(text.contains("err-11") && text.contains("action 2 of 3"), "{text}");
    let text = initialize(three(fail, fail));
    let (first, second) = (text.find("err-11").unwrap(), text.find("\ndealloc action 1 of 1 failed: err-20").unwrap());
    assert!(first < second, "{text}");
    assert!(initialize(three(succeed, fail_out_of_band)).contains("out-of-band"));
    assert!(initialize(three(succeed, no_result)).contains("cannot be decoded"));
    let null = Some(WrapperFunctionCall { function: ExecutorAddr::NULL, args: Blob::default() });
    assert!(initialize(vec![pair(null, None)]).contains("null"));
}

/// Every dealloc action runs, also after one has failed; the texts are joined, and the memory is free.
#[test]
fn all_dealloc_actions_run() {
    let _serial = begin();
    let service = MemoryService::new();
    let slab = service.reserve_private(1).unwrap();
    let actions = vec![
        pair(None, call(succeed, 20)),
        pair(None, call(fail, 21)),
        pair(None, call(no_result, 22)),
        pair(None, call(fail, 23)),
    ];
    let keys = service.initialize(vec![with_actions(slab.start(), actions)]).unwrap();
    let text = service.deinitialize(&keys).unwrap_err().to_string();
    assert_eq!(log(), [23, 21, 20]);
    assert!(text.find("err-23").unwrap() < text.find("decoded").unwrap(), "{text}");
    assert!(text.find("decoded").unwrap() < text.find("err-21").unwrap(), "{text}");
    assert!(matches!(service.deinitialize(&keys), Err(Error::UnknownAllocation(_))));
    service.initialize(vec![with_actions(slab.start(), vec![])]).unwrap();
}

/// A failed request leaves protections and content as they were reserved, and its range free, in both kinds of slab.
#[test]
fn a_failure_leaves_memory_as_it_was() {
    let _serial = begin();
    let service = MemoryService::new();
    let page = page_size().bytes();
    for slab in [service.reserve_private(4 * page).unwrap(), service.reserve_shared(4 * page).unwrap().0] {
        let before = permissions(slab.start());
        let request = |finalize| {
            let good = Allocation {
                actions: vec![pair(call(succeed, 1), call(succeed, 2))],
                segments: vec![segment(slab.start(), page, MemProt::RX, b"code")],
                slab: Some(slab.start()),
            };
            let other = Allocation {
                actions: vec![pair(call(finalize, 3), call(succeed, 4))],
                segments: vec![
                    segment(at(slab, 2), page, MemProt::READ, b"data"),
                    segment(at(slab, 1), 1, MemProt::RX, b"c"),
                ],
                slab: None,
            };
            service.initialize(vec![good, other])
        };
        request(fail).unwrap_err();
        assert_eq!(log(), [1, 3, 2]);
        for pages in 0..4 {
            assert_eq!((permissions(at(slab, pages)), read(at(slab, pages))), (before.clone(), 0));
        }
        let keys = request(succeed).unwrap();
        assert_eq!(keys, [slab.start(), at(slab, 1)]);
        assert!(permissions(slab.start()).starts_with("r-x"));
        assert!(permissions(at(slab, 2)).starts_with("r--"));
        assert_eq!((read(at(slab, 1)), read(at(slab, 2))), (b'c', b'd'));
        service.deinitialize(&keys).unwrap();
        assert_eq!(log(), [1, 3, 4, 2]);
        for pages in 0..4 {
            assert_eq!((permissions(at(slab, pages)), read(at(slab, pages))), (before.clone(), 0));
        }
    }
}

/// What a request may not ask for is refused, alone and as the last of a batch, and changes nothing.
#[test]
fn bad_requests_change_nothing() {
    let _serial = begin();
    let service = MemoryService::new();
    let page = page_size().bytes();
    let slab = service.reserve_private(8 * page).unwrap();
    let other = service.reserve_private(8 * page).unwrap();
    let (low, high) = if slab.start() < other.start() { (slab, other) } else { (other, slab) };
    let live = service.initialize(vec![allocation(&[(at(slab, 4), 2 * page, MemProt::RX)])]).unwrap();
    let rw = MemProt::RW;
    let one = |addr, size| allocation(&[(addr, size, rw)]);
    let add = |addr: ExecutorAddr, bytes| addr.checked_add(bytes).unwrap();
    let null = ExecutorAddr::NULL;
    type IsExpected = fn(&Error) -> bool;
    let overlap: IsExpected = |error| matches!(error, Error::Overlap(..));
    let outside: IsExpected = |error| matches!(error, Error::OutsideReservation(_));
    let bad_size: IsExpected = |error| matches!(error, Error::BadSize { .. });
    let spans_both = high.end().offset_from(low.start()).unwrap();
    let bad: Vec<(Allocation<'_>, IsExpected)> = vec![
        (one(add(slab.start(), 1), 8), |error| matches!(error, Error::Misaligned(_))),
        (one(null, page), outside),
        (one(slab.end(), page), outside),
        (one(at(slab, 7), 2 * page), outside),
        (one(at(slab, 7), page + 1), outside),
        (one(low.start(), spans_both), outside),
        (allocation(&[(slab.start(), page, rw), (other.start(), page, rw)]), outside),
        (Allocation { slab: Some(other.start()), ..one(slab.start(), page) }, outside),
        (Allocation { slab: Some(at(slab, 1)), ..one(at(slab, 1), page) }, |error| {
            matches!(error, Error::UnknownReservation(_))
        }),
        (one(at(slab, 4), page), overlap),
        (one(at(slab, 5), page), overlap),
        (one(at(slab, 3), 1 + page), overlap),
        (one(slab.start(), 8 * page), overlap),
        (allocation(&[(slab.start(), 2 * page, rw), (at(slab, 1), page, rw)]), overlap),
        (allocation(&[(at(slab, 1), 1, rw), (slab.start(), page + 1, rw)]), overlap),
        (allocation(&[(slab.start(), page, rw), (slab.start(), page, rw)]), overlap),
        (one(slab.start(), u64::MAX), bad_size),
        (one(slab.start(), u64::MAX - page), bad_size),
        (one(slab.start(), 0), bad_size),
        (Allocation::default(), |error| matches!(error, Error::NoSegments)),
        (Allocation { segments: vec![segment(slab.start(), 3, rw, b"four")], ..Allocation::default() }, |error| {
            matches!(error, Error::ContentTooLong { .. })
        }),
    ];
    for (request, is_expected) in bad {
        let error = service.initialize(vec![request.clone()]).unwrap_err();
        assert!(is_expected(&error), "{error}: {request:?}");
        // In a batch the good one before it, which it does not touch, is not done either.
        let good = Allocation { segments: vec![segment(at(slab, 6), page, MemProt::RX, b"good")], ..one(null, 0) };
        let error = service.initialize(vec![good, request.clone()]).unwrap_err();
        assert!(is_expected(&error) || overlap(&error), "{error}: {request:?}");
        assert!(matches!(service.deinitialize(&[at(slab, 6)]), Err(Error::UnknownAllocation(_))));
        assert_eq!((permissions(at(slab, 6)).as_str(), read(at(slab, 6))), ("rw-p", 0));
    }
    // Two that overlap each other in one batch.
    let error = service.initialize(vec![one(slab.start(), page), one(slab.start(), 2 * page)]).unwrap_err();
    assert!(overlap(&error), "{error}");
    // Keys and bases that are unknown or given twice spare the others.
    let (key, base) = (live[0], slab.start());
    assert!(matches!(service.deinitialize(&[key, null]), Err(Error::UnknownAllocation(_))));
    assert!(matches!(service.deinitialize(&[key, at(slab, 5)]), Err(Error::UnknownAllocation(_))));
    assert!(matches!(service.deinitialize(&[key, key]), Err(Error::Busy(_))));
    assert!(matches!(service.release(&[base, at(slab, 1)]), Err(Error::UnknownReservation(_))));
    assert!(matches!(service.release(&[base, base]), Err(Error::Busy(_))));
    for bytes in [0, 1 << 60, u64::MAX, (1 << 47) + 1] {
        assert!(matches!(service.reserve_private(bytes), Err(Error::BadSize { .. })), "{bytes}");
        assert!(matches!(service.reserve_shared(bytes), Err(Error::BadSize { .. })), "{bytes}");
    }
    // All of it is still there and free.
    assert!(permissions(key).starts_with("r-x"));
    service.deinitialize(&live).unwrap();
    service.initialize(vec![one(slab.start(), 8 * page)]).unwrap();
}

/// An empty segment is no obstacle in an allocation that has others, wherever it stands.
#[test]
fn empty_segments_are_allowed_beside_others() {
    let _serial = begin();
    let service = MemoryService::new();
    let page = page_size().bytes();
    let slab = service.reserve_private(2 * page).unwrap();
    let rw = MemProt::RW;
    let segments =
        [(slab.start(), 0, MemProt::RX), (slab.start(), page, rw), (at(slab, 1), page, rw), (slab.end(), 0, rw)];
    let keys = service.initialize(vec![allocation(&segments)]).unwrap();
    assert_eq!(keys, [slab.start()]);
    assert_eq!(permissions(slab.start()), "rw-p");
    service.deinitialize(&keys).unwrap();
}

/// An action can call the service that runs it. What is under way is busy; the rest works.
#[test]
fn actions_can_call_the_service() {
    let _serial = begin();
    let service = Arc::new(MemoryService::new());
    *lock(&REENTERED) = Some(Arc::clone(&service));
    let slab = service.reserve_private(1).unwrap();
    let again = slab.start().as_u64();
    let actions = vec![pair(call(reenter, again), call(reenter, again))];
    let keys = service.initialize(vec![with_actions(slab.start(), actions)]).unwrap();
    service.deinitialize(&keys).unwrap();
    *lock(&REENTERED) = None;
    let answers = std::mem::take(&mut *lock(&ANSWERS));
    assert_eq!(answers.len(), 6);
    for answer in answers.chunks(3) {
        assert!(
            answer[0].starts_with("Err(Overlap") && answer[1..].iter().all(|a| a.starts_with("Err(Busy")),
            "{answer:?}"
        );
    }
    service.initialize(vec![with_actions(slab.start(), vec![])]).unwrap();
}

/// An allocation that is being finalized while the service is shut down is undone, exactly once.
#[test]
fn shut_down_while_actions_run() {
    let _serial = begin();
    let service = Arc::new(MemoryService::new());
    let meeting = Arc::new((Barrier::new(2), Barrier::new(2)));
    *lock(&MEETING) = Some(Arc::clone(&meeting));
    let slab = service.reserve_private(1).unwrap();
    let finalizing = Arc::clone(&service);
    let actions = vec![pair(call(succeed, 10), call(succeed, 20)), pair(call(meet, 0), call(succeed, 21))];
    let thread = std::thread::spawn(move || finalizing.initialize(vec![with_actions(slab.start(), actions)]));
    meeting.0.wait();
    service.shut_down().unwrap();
    assert_eq!(log(), [10]);
    meeting.1.wait();
    assert!(matches!(thread.join().unwrap(), Err(Error::ShutDown)));
    assert_eq!(log(), [21, 20]);
    assert!(!permissions(slab.start()).starts_with("r-x"));
}

/// Deallocated memory is zero, in pages that were writable and in pages that were not.
#[test]
fn deallocated_memory_is_zero() {
    let _serial = begin();
    let service = MemoryService::new();
    let page = page_size().bytes();
    for slab in [service.reserve_private(2 * page).unwrap(), service.reserve_shared(2 * page).unwrap().0] {
        let mut request = allocation(&[(slab.start(), page, MemProt::RX), (at(slab, 1), page, MemProt::RW)]);
        request.segments[0].content = Blob::from(&b"code"[..]);
        let keys = service.initialize(vec![request]).unwrap();
        let last = slab.end().checked_sub(1).unwrap();
        write(last, 7);
        assert_eq!((read(slab.start()), read(last)), (b'c', 7));
        service.deinitialize(&keys).unwrap();
        assert_eq!((read(slab.start()), read(last)), (0, 0));
        write(slab.start(), 1);
    }
}

/// Releasing slabs deallocates what is in them, newest first over all of them, and leaves no mapping.
#[test]
fn release_is_newest_first() {
    let _serial = begin();
    let service = MemoryService::new();
    let page = page_size().bytes();
    let slabs = [service.reserve_private(4 * page).unwrap(), service.reserve_shared(4 * page).unwrap().0];
    for number in 0..8 {
        // Alternating, each slab from its end: neither addresses nor slabs are in the order of time.
        let addr = at(slabs[number as usize % 2], 3 - number / 2);
        service.initialize(vec![with_actions(addr, vec![pair(None, call(succeed, number))])]).unwrap();
    }
    service.release(&slabs.map(ExecutorAddrRange::start)).unwrap();
    assert_eq!(log(), [7, 6, 5, 4, 3, 2, 1, 0]);
    for slab in slabs {
        // Something of the test harness may be there by now; it is not executable.
        assert!((0..4).all(|pages| !permissions(at(slab, pages)).starts_with("r-x")));
    }
}

/// Shutting down runs everything once, newest first, also if an action fails and also if the service is dropped
/// later; nothing works afterwards.
#[test]
fn shut_down_happens_once() {
    let _serial = begin();
    for explicit in [true, false] {
        let service = MemoryService::new();
        let slab = service.reserve_private(2 * page_size().bytes()).unwrap();
        let (shared, name) = service.reserve_shared(1).unwrap();
        for (number, addr) in [at(slab, 1), shared.start(), slab.start()].into_iter().enumerate() {
            let action = if number == 1 { fail } else { succeed };
            let actions = vec![pair(None, call(action, number as u64))];
            service.initialize(vec![with_actions(addr, actions)]).unwrap();
        }
        if explicit {
            assert!(service.shut_down().unwrap_err().to_string().contains("err-1"));
            service.shut_down().unwrap();
            assert!(matches!(service.reserve_private(1), Err(Error::ShutDown)));
            assert!(matches!(service.reserve_shared(1), Err(Error::ShutDown)));
            let request = with_actions(slab.start(), vec![]);
            assert!(matches!(service.initialize(vec![request]), Err(Error::ShutDown)));
            assert!(service.deinitialize(&[slab.start()]).is_err() && service.release(&[slab.start()]).is_err());
        }
        drop(service);
        assert_eq!(log(), [2, 1, 0]);
        assert!(!exists(&name));
        assert!([slab, shared].iter().all(|slab| !permissions(slab.start()).starts_with("r-x")));
    }
}

fn exists(name: &str) -> bool {
    std::path::Path::new(&format!("/dev/shm{name}")).exists()
}

/// The name of a shared memory object is there until the slab goes, unless someone takes it, and not after a failed
/// reserve.
#[test]
fn names_go_with_their_slabs() {
    let _serial = begin();
    let service = MemoryService::new();
    let (first, first_name) = service.reserve_shared(1).unwrap();
    let (_second, second_name) = service.reserve_shared(1).unwrap();
    assert!(exists(&first_name) && exists(&second_name) && first_name != second_name);
    service.release(&[first.start()]).unwrap();
    assert!(!exists(&first_name) && exists(&second_name));
    // The size is one that the checks let pass and no system can map.
    assert!(service.reserve_shared(1 << 47).is_err());
    drop(service);
    let prefix = format!("farlink_{}_", std::process::id());
    let ours = [first_name, second_name];
    assert!(ours.iter().all(|name| !exists(name)), "{ours:?}");
    let shut = MemoryService::new();
    shut.shut_down().unwrap();
    assert!(matches!(shut.reserve_shared(1), Err(Error::ShutDown)));
    let mut entries = std::fs::read_dir("/dev/shm").unwrap();
    let left = entries.find(|entry| entry.as_ref().unwrap().file_name().to_string_lossy().starts_with(&prefix));
    assert!(left.is_none(), "{left:?}");
}

/// A name that a process left which had this process's number is passed over.
#[test]
fn names_that_are_taken_are_passed_over() {
    let _serial = begin();
    let service = MemoryService::new();
    let (range, name) = service.reserve_shared(1).unwrap();
    let (stem, number) = name.rsplit_once('_').unwrap();
    let number: u64 = number.parse().unwrap();
    let taken: Vec<_> = (number + 1..number + 65).map(|number| format!("/dev/shm{stem}_{number}")).collect();
    let made: Vec<_> = taken.iter().filter(|path| std::fs::File::create_new(path).is_ok()).collect();
    let next = service.reserve_shared(1);
    let left = made.iter().all(|path| std::fs::metadata(path).unwrap().len() == 0);
    for path in made {
        std::fs::remove_file(path).unwrap();
    }
    assert!(left && next.is_ok(), "{next:?}");
    service.release(&[range.start()]).unwrap();
}

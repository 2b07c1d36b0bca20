//! Calls over every kind of connection, in both directions.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod common;

use common::*;
use farlink_rpc::{CallError, Disconnected, Options, SetupError, accept, connect};
use farlink_wire::frame::{MAX_FRAME_BYTES, Opcode};
use farlink_wire::functions::{FARLINK_VERSION, VERSION_KEY};
use farlink_wire::setup::ExecutorInfo;
use farlink_wire::sps::to_bytes;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::thread;
use std::time::Duration;

/// A result reaches its call whatever the order in which results come, over every kind of connection.
#[test]
fn results_come_in_any_order() {
    for (name, ends) in WAYS {
        within_deadline(name, move || {
            let (release, released) = mpsc::channel();
            let (release, released) = (Mutex::new(release), Mutex::new(released));
            // Call 1 returns only after call 2.
            let handler = Serve(move |function, args| {
                match function {
                    1 => released.lock().unwrap().recv().unwrap(),
                    _ => release.lock().unwrap().send(()).unwrap(),
                }
                Ok(args)
            });
            let (controller, _executor) = session(ends(), echo(), Arc::new(handler), options());
            let first = controller.call(addr(1), b"first".to_vec());
            let second = controller.call(addr(2), b"second".to_vec());
            assert_eq!(second.wait().unwrap(), b"second");
            assert_eq!(first.wait().unwrap(), b"first");
        });
    }
}

/// Handlers that call back nest to any depth: here ten, five on each side.
#[test]
fn calls_nest_in_both_directions() {
    for (name, ends) in WAYS {
        within_deadline(name, move || {
            // A call of function n is answered by calling n - 1 at the peer.
            let nesting = |slot: &Slot, own: &'static str| {
                let slot = Arc::clone(slot);
                Arc::new(Serve(move |function, mut args: Vec<u8>| {
                    args.extend_from_slice(own.as_bytes());
                    match function {
                        0 => Ok(args),
                        n => endpoint_in(&slot).call(addr(n - 1), args).wait().map_err(|error| error.to_string()),
                    }
                }))
            };
            let slots = [Slot::default(), Slot::default()];
            let (controller, executor) = session(ends(), nesting(&slots[0], "C"), nesting(&slots[1], "E"), options());
            *slots[0].lock().unwrap() = Some(controller.clone());
            *slots[1].lock().unwrap() = Some(executor.clone());
            let call = |endpoint: &farlink_rpc::Endpoint| endpoint.call(addr(9), Vec::new()).wait().unwrap();
            assert_eq!(call(&controller), b"ECECECECEC");
            assert_eq!(call(&executor), b"CECECECECE");
            controller.hang_up(Ok(()));
            executor.wait_disconnected();
        });
    }
}

/// Many threads on both sides call at once, with messages from nothing to more than any buffer holds.
#[test]
fn many_threads_call_at_once() {
    const THREADS: usize = 8;
    const CALLS: usize = 60;
    for (name, ends) in WAYS {
        within_deadline(name, move || {
            let (controller, executor) = session(ends(), echo(), echo(), options());
            thread::scope(|scope| {
                for number in 0..THREADS * 2 {
                    let endpoint = if number % 2 == 0 { &controller } else { &executor };
                    scope.spawn(move || {
                        for call in 0..CALLS {
                            let len = [0, 1, 31, 4096, 70_000, 300_000][(number + call) % 6];
                            let args: Vec<u8> = (0..len).map(|i: usize| (i * 7 + number + call) as u8).collect();
                            assert!(endpoint.call(addr(1), args.clone()).wait().unwrap() == args);
                        }
                    });
                }
            });
        });
    }
}

/// A megabytes-long message arrives whole though it comes in pieces, and so does the message behind it.
#[test]
fn long_messages_arrive_whole() {
    for (name, ends) in WAYS {
        within_deadline(name, move || {
            let (controller, _executor) = session(ends(), echo(), echo(), options());
            let args: Vec<u8> = (0..40_000_000u32).map(|i| (i % 255) as u8).collect();
            let long = controller.call(addr(1), args.clone());
            let short = controller.call(addr(1), b"short".to_vec());
            assert!(long.wait().unwrap() == args);
            assert_eq!(short.wait().unwrap(), b"short");
        });
    }
}

/// A peer that sends a byte at a time is understood.
#[test]
fn bytes_may_come_one_by_one() {
    within_deadline("a slow peer", || {
        let (mut raw, transport) = RawPeer::new();
        let slow_peer = thread::spawn(move || {
            let one_by_one = |raw: &mut RawPeer, bytes: &[u8]| bytes.iter().for_each(|&byte| raw.send(&[byte]));
            one_by_one(&mut raw, &setup());
            let (call, _) = raw.receive();
            assert_eq!(call.opcode, Opcode::Call);
            one_by_one(&mut raw, &frame(Opcode::Call, 0, 5, b"back"));
            assert_eq!(raw.receive().1, b"back");
            one_by_one(&mut raw, &frame(Opcode::Result, call.sequence, 0, &[3; 70_000]));
            raw
        });
        let (endpoint, _) = connect(transport, echo(), options()).unwrap();
        assert_eq!(endpoint.call(addr(1), Vec::new()).wait().unwrap(), vec![3; 70_000]);
        slow_peer.join().unwrap();
    });
}

/// Sequence numbers begin at 0 and count the calls of each direction.
#[test]
fn sequence_numbers_count_from_zero() {
    within_deadline("numbering", || {
        let (mut raw, endpoint) = RawPeer::executor(echo());
        for sequence in 0..3 {
            let pending = endpoint.call(addr(1), Vec::new());
            assert_eq!(raw.receive().0.sequence, sequence);
            raw.send(&frame(Opcode::Call, sequence, 1, &[]));
            assert_eq!(raw.receive().0.sequence, sequence);
            raw.send(&frame(Opcode::Result, sequence, 0, &[]));
            pending.wait().unwrap();
        }
    });
}

/// A handler's error arrives as an out-of-band error where the peer can take it, as an empty value where not.
#[test]
fn handler_errors_go_out_of_band() {
    within_deadline("errors", || {
        let refusing = || Arc::new(Serve(|_, _| Err("no such function".to_owned())));
        let ends = farlink_rpc::Transport::pair().unwrap();
        let (controller, _executor) = session(ends, echo(), refusing(), options());
        let error = controller.call(addr(1), Vec::new()).wait().unwrap_err();
        assert!(matches!(&error, CallError::OutOfBand(text) if text == "no such function"), "{error}");

        let ends = farlink_rpc::Transport::pair().unwrap();
        let (controller, _executor) = session(ends, echo(), refusing(), Options::default());
        assert_eq!(controller.call(addr(1), Vec::new()).wait().unwrap(), b"");
    });
}

/// A controller answers farlink's executor with out-of-band errors without being told to.
#[test]
fn own_executor_is_recognized() {
    within_deadline("errors", || {
        let ends = farlink_rpc::Transport::pair().unwrap();
        let mut info = ExecutorInfo::default();
        info.set_value(VERSION_KEY, &FARLINK_VERSION);
        let executor = accept(ends.1, &info, echo(), Options::default()).unwrap();
        let refusing = Arc::new(Serve(|_, _| Err("no handler".to_owned())));
        let (_controller, _) = connect(ends.0, refusing, Options::default()).unwrap();
        assert!(matches!(executor.call(addr(1), Vec::new()).wait(), Err(CallError::OutOfBand(_))));
    });
}

/// A handler that panics gives an error to its caller; the calls beside it and after it are served.
#[test]
fn a_panic_hurts_only_its_call() {
    within_deadline("a panic", || {
        let handler = Serve(|function, args| match function {
            1 => panic!("thirteen is not allowed"),
            _ => Ok(args),
        });
        let ends = farlink_rpc::Transport::pair().unwrap();
        let (controller, _executor) = session(ends, echo(), Arc::new(handler), options());
        let beside = controller.call(addr(2), b"beside".to_vec());
        let error = controller.call(addr(1), Vec::new()).wait().unwrap_err().to_string();
        assert!(error.contains("panicked") && error.contains("thirteen is not allowed"), "{error}");
        assert_eq!(beside.wait().unwrap(), b"beside");
        assert_eq!(controller.call(addr(2), b"after".to_vec()).wait().unwrap(), b"after");
    });
}

/// Calls above the limit get an out-of-band error, also while every thread is busy; later calls are served.
#[test]
fn calls_above_the_limit_are_refused() {
    within_deadline("the limit", || {
        let (release, released) = mpsc::channel::<()>();
        let released = Mutex::new(released);
        let running = Arc::new(AtomicUsize::new(0));
        let handler = {
            let running = Arc::clone(&running);
            Serve(move |function, args| {
                if function == 1 {
                    running.fetch_add(1, Ordering::SeqCst);
                    released.lock().unwrap().recv().unwrap();
                }
                Ok(args)
            })
        };
        let ends = farlink_rpc::Transport::pair().unwrap();
        let (controller, executor) =
            session(ends, echo(), Arc::new(handler), Options { max_concurrent_calls: 3, ..options() });
        let blocked: Vec<_> = (0..3).map(|_| controller.call(addr(1), Vec::new())).collect();
        for _ in 0..100 {
            let error = controller.call(addr(2), Vec::new()).wait().unwrap_err();
            assert!(matches!(&error, CallError::OutOfBand(text) if text.contains("too many")), "{error}");
        }
        assert!(!executor.wait_quiet(Duration::ZERO));
        (0..3).for_each(|_| release.send(()).unwrap());
        for pending in blocked {
            pending.wait().unwrap();
        }
        assert!(executor.wait_quiet(DEADLINE));
        assert_eq!(controller.call(addr(2), b"later".to_vec()).wait().unwrap(), b"later");
    });
}

/// Arguments longer than a message can be fail before anything is sent.
#[test]
fn too_long_arguments_are_refused() {
    within_deadline("a long call", || {
        let (mut raw, endpoint) = RawPeer::executor(echo());
        let error = endpoint.call(addr(1), vec![0; MAX_FRAME_BYTES as usize - 31]).wait().unwrap_err();
        assert!(matches!(error, CallError::TooLarge { bytes } if bytes == MAX_FRAME_BYTES + 1), "{error}");
        let _pending = endpoint.call(addr(1), b"fits".to_vec());
        assert_eq!(raw.receive().1, b"fits");
    });
}

/// What is no valid Setup is refused with the reason: another message, numbers that are not 0, names given twice,
/// garbage. An executor that says why it ends instead is quoted.
#[test]
fn setup_is_checked() {
    let twice = ExecutorInfo { bootstrap_symbols: vec![("f".into(), addr(1)), ("f".into(), addr(2))], ..info() };
    let twice_in_map = ExecutorInfo { bootstrap_map: vec![("k".into(), vec![]), ("k".into(), vec![1])], ..info() };
    let cases = [
        (frame(Opcode::Call, 0, 0, &[]), "Call message"),
        (frame(Opcode::Setup, 1, 0, &to_bytes(&info())), "sequence number is 1"),
        (frame(Opcode::Setup, 0, 7, &to_bytes(&info())), "tag 0x7"),
        (frame(Opcode::Setup, 0, 0, &to_bytes(&info())[..9]), "needed"),
        (frame(Opcode::Setup, 0, 0, &to_bytes(&twice)), "\"f\" is announced twice"),
        (frame(Opcode::Setup, 0, 0, &to_bytes(&twice_in_map)), "\"k\" is announced twice"),
        (b"usage: executor [options] this is the help text of some other program\n".to_vec(), "message size"),
    ];
    for (bytes, expected) in cases {
        let (mut raw, transport) = RawPeer::new();
        raw.send(&bytes);
        match connect(transport, echo(), options()) {
            Err(SetupError::Invalid(text)) => assert!(text.contains(expected), "{text} should name {expected}"),
            other => panic!("{expected}: {other:?}"),
        }
    }
    let (mut raw, transport) = RawPeer::new();
    raw.send(&frame(
        Opcode::Hangup,
        0,
        0,
        &to_bytes(&Err::<(), _>("no memory".to_owned()).map_or_else(
            |text: String| farlink_wire::sps::SpsError(Err(text)),
            |()| farlink_wire::sps::SpsError(Ok(())),
        )),
    ));
    let error = connect(transport, echo(), options()).unwrap_err();
    assert!(
        matches!(&error, SetupError::Disconnected(Disconnected::HangupWithError(text)) if text == "no memory"),
        "{error}"
    );
}

/// An executor that says nothing, or stops in the middle of its Setup, is given up after the time set; so is a
/// controller that does not read.
#[test]
fn setup_times_out() {
    let short = Options { setup_timeout: Duration::from_millis(30), ..options() };
    for bytes in [&setup()[..0], &setup()[..40]] {
        let (mut raw, transport) = RawPeer::new();
        raw.send(bytes);
        let options = short.clone();
        let result = within_deadline("setup", move || connect(transport, echo(), options));
        assert!(matches!(result, Err(SetupError::TimedOut(time)) if time == short.setup_timeout));
        drop(raw);
    }
    let long_info = ExecutorInfo { triple: "x".repeat(50 << 20), ..info() };
    let (_raw, transport) = RawPeer::new();
    let result = within_deadline("setup", move || accept(transport, &long_info, echo(), short));
    assert_eq!(result.unwrap_err().kind(), std::io::ErrorKind::TimedOut);
}

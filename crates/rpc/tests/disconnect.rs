//! How sessions end, and that nothing hangs when they do.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod common;

use common::*;
use farlink_rpc::{
    CallError, Disconnected, Endpoint, Options, Pending, SetupError, Transport, accept, accept_unread, connect,
};
use farlink_wire::frame::{HEADER_BYTES, MAX_FRAME_BYTES, Opcode};
use farlink_wire::sps::{SpsError, to_bytes};
use std::future::Future;
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::pin::Pin;
use std::sync::{Arc, Mutex, mpsc};
use std::task::{Context, Wake};
use std::thread;

fn hangup(reason: Result<(), &str>) -> Vec<u8> {
    frame(Opcode::Hangup, 0, 0, &to_bytes(&SpsError(reason.map_err(str::to_owned))))
}

/// Why a stream of messages that was cut off must have ended, from the lengths of the whole messages.
fn reason_of_cut(messages: &[Vec<u8>], cut: usize) -> (usize, String) {
    let mut start = 0;
    for (index, message) in messages.iter().enumerate() {
        if cut < start + message.len() {
            let received = (cut - start) as u64;
            let expected = if received < HEADER_BYTES as u64 { HEADER_BYTES } else { message.len() } as u64;
            let reason = if received == 0 { Disconnected::Eof } else { Disconnected::Truncated { received, expected } };
            return (index, reason.to_string());
        }
        start += message.len();
    }
    (messages.len(), Disconnected::Hangup.to_string())
}

/// A peer that is driven byte by byte over pipes or sockets.
type Raw = (Box<dyn Read + Send>, Box<dyn Write + Send>);

fn raw_ends(pipes: bool) -> (Raw, Transport) {
    if pipes {
        let (raw_in, out) = std::io::pipe().unwrap();
        let (input, raw_out) = std::io::pipe().unwrap();
        let transport = Transport::from_fds(input.into(), out.into()).unwrap();
        ((Box::new(raw_in), Box::new(raw_out)), transport)
    } else {
        let (raw, transport) = RawPeer::new();
        ((Box::new(raw.0.try_clone().unwrap()), Box::new(raw.0)), transport)
    }
}

/// An executor that vanishes after any number of bytes leaves a controller whose calls have all ended, with the
/// right reason: those that were answered with their values, the others with an error.
#[test]
fn executor_vanishes_at_every_byte() {
    let messages = [
        setup(),
        frame(Opcode::Result, 1, 0, b"one"),
        frame(Opcode::Call, 0, 9, b"callback"),
        frame(Opcode::Result, 0, 1, &to_bytes("out of band")),
        hangup(Ok(())),
    ];
    let whole = messages.concat();
    for (cut, pipes) in (0..=whole.len()).flat_map(|cut| [(cut, false), (cut, true)]) {
        let (complete, reason) = reason_of_cut(&messages, cut);
        let ((mut raw_in, mut raw_out), transport) = raw_ends(pipes);
        let (setup_bytes, bytes) = (messages[0].len(), whole[..cut].to_vec());
        let peer = thread::spawn(move || {
            let (first, rest) = bytes.split_at(setup_bytes.min(bytes.len()));
            raw_out.write_all(first).unwrap();
            if first.len() == setup_bytes {
                // Two calls without arguments.
                raw_in.read_exact(&mut [0; 2 * HEADER_BYTES]).unwrap();
                raw_out.write_all(rest).unwrap();
            }
        });
        within_deadline("a cut session", move || {
            let endpoint = match connect(transport, echo(), options()) {
                Ok((endpoint, _)) => endpoint,
                Err(SetupError::Disconnected(error)) => {
                    assert_eq!((complete, error.to_string()), (0, reason));
                    return;
                }
                Err(error) => panic!("{error}"),
            };
            let calls = [endpoint.call(addr(1), Vec::new()), endpoint.call(addr(2), Vec::new())];
            let [zero, one] = calls.map(|pending| pending.wait().map_err(|error| error.to_string()));
            let failed = || Err(reason.clone());
            assert_eq!(one, if complete > 1 { Ok(b"one".to_vec()) } else { failed() }, "cut at {cut}");
            let out_of_band = Err(CallError::OutOfBand("out of band".to_owned()).to_string());
            assert_eq!(zero, if complete > 3 { out_of_band } else { failed() }, "cut at {cut}");
            assert_eq!(endpoint.wait_disconnected().to_string(), reason, "cut at {cut}");
            assert_eq!(endpoint.call(addr(1), Vec::new()).wait().unwrap_err().to_string(), reason);
        });
        peer.join().unwrap();
    }
}

/// The same for a controller that vanishes: the executor serves the calls that came whole.
#[test]
fn controller_vanishes_at_every_byte() {
    let messages = [
        frame(Opcode::Call, 0, 1, b"one"),
        frame(Opcode::Call, 1, 2, b""),
        frame(Opcode::Result, 0, 0, b"result"),
        hangup(Ok(())),
    ];
    let whole = messages.concat();
    for (cut, pipes) in (0..=whole.len()).flat_map(|cut| [(cut, false), (cut, true)]) {
        let (complete, reason) = reason_of_cut(&messages, cut);
        let ((mut raw_in, mut raw_out), transport) = raw_ends(pipes);
        let bytes = whole[..cut].to_vec();
        within_deadline("a cut session", move || {
            let served = Arc::new(Mutex::new(Vec::new()));
            let handler = {
                let served = Arc::clone(&served);
                Serve(move |function, args| {
                    served.lock().unwrap().push(function);
                    Ok(args)
                })
            };
            let endpoint = accept(transport, &info(), Arc::new(handler), options()).unwrap();
            let pending = endpoint.call(addr(3), Vec::new());
            raw_in.read_exact(&mut vec![0; setup().len() + HEADER_BYTES]).unwrap();
            raw_out.write_all(&bytes).unwrap();
            drop((raw_in, raw_out));
            let expected = if complete > 2 { Ok(b"result".to_vec()) } else { Err(reason.clone()) };
            assert_eq!(pending.wait().map_err(|error| error.to_string()), expected, "cut at {cut}");
            assert_eq!(endpoint.wait_disconnected().to_string(), reason, "cut at {cut}");
            assert!(endpoint.wait_quiet(DEADLINE));
            let mut served = served.lock().unwrap().clone();
            served.sort_unstable();
            assert_eq!(served, [1, 2][..complete.min(2)], "cut at {cut}");
        });
    }
}

/// A peer that is gone fails every pending call, over every kind of connection, whichever side it is.
#[test]
fn pending_calls_end_with_the_peer() {
    for (name, ends) in WAYS {
        for executor_goes in [true, false] {
            within_deadline(name, move || {
                let (release, released) = mpsc::channel::<()>();
                let (started, starts) = mpsc::channel();
                let released = Mutex::new(released);
                let started = Mutex::new(started);
                let stuck = Arc::new(Serve(move |_, _| {
                    started.lock().unwrap().send(()).unwrap();
                    let _ = released.lock().unwrap().recv();
                    Ok(Vec::new())
                }));
                let (mut stays, mut goes) = session(ends(), stuck.clone(), stuck, options());
                if !executor_goes {
                    std::mem::swap(&mut stays, &mut goes);
                }
                let pending: Vec<_> = (0..20).map(|_| stays.call(addr(1), Vec::new())).collect();
                starts.recv().unwrap();
                drop(goes);
                for call in pending {
                    assert!(matches!(call.wait(), Err(CallError::Disconnected(Disconnected::Eof))));
                }
                assert!(matches!(stays.disconnected(), Some(Disconnected::Eof)));
                drop(release);
            });
        }
    }
}

/// Each side can end the session, in order or with a reason; both learn of it, and a call afterwards says so.
#[test]
fn each_side_can_hang_up() {
    for (name, ends) in WAYS {
        for executor_hangs_up in [true, false] {
            for reason in [Ok(()), Err("out of memory".to_owned())] {
                within_deadline(name, move || {
                    let (mut hears, mut says) = session(ends(), echo(), echo(), options());
                    if !executor_hangs_up {
                        std::mem::swap(&mut hears, &mut says);
                    }
                    says.hang_up(reason.clone());
                    match (hears.wait_disconnected(), reason) {
                        (Disconnected::Hangup, Ok(())) => {}
                        (Disconnected::HangupWithError(text), Err(reason)) => assert_eq!(text, reason),
                        (other, _) => panic!("{other}"),
                    }
                    assert!(matches!(says.wait_disconnected(), Disconnected::Local));
                    let error = says.call(addr(1), Vec::new()).wait().unwrap_err();
                    assert!(matches!(error, CallError::Disconnected(Disconnected::Local)));
                });
            }
        }
    }
}

/// The reason of a peer that hung up is not lost to a call that finds the connection broken.
#[test]
fn the_peers_reason_outlives_a_failed_write() {
    within_deadline("hangup", || {
        for _ in 0..200 {
            let (mut raw, endpoint) = RawPeer::executor(echo());
            raw.send(&hangup(Err("no more")));
            drop(raw);
            let error = endpoint.call(addr(1), vec![0; 100_000]).wait().unwrap_err();
            assert_eq!(error.to_string(), Disconnected::HangupWithError("no more".to_owned()).to_string());
        }
    });
}

/// Closing from another thread frees a call that is waiting for its result and one that cannot be sent because the
/// peer does not read, and gives both the reason.
#[test]
fn closing_frees_all_who_wait() {
    for (name, ends) in WAYS {
        within_deadline(name, move || {
            let (ours, theirs) = ends();
            let endpoint = accept(ours, &info(), echo(), options()).unwrap();
            let waiting = endpoint.call(addr(1), Vec::new());
            let (about_to, sending) = mpsc::channel();
            let writer = {
                let endpoint = endpoint.clone();
                thread::spawn(move || {
                    about_to.send(()).unwrap();
                    endpoint.call(addr(1), vec![0; 64 << 20]).wait()
                })
            };
            sending.recv().unwrap();
            endpoint.close(Disconnected::ProcessEnded("the executor was killed by signal 9".to_owned()));
            for result in [waiting.wait(), writer.join().unwrap()] {
                assert!(result.unwrap_err().to_string().contains("signal 9"));
            }
            assert!(endpoint.wait_disconnected().to_string().contains("signal 9"));
            drop(theirs);
        });
    }
}

/// Hanging up on a peer that does not read gives up after a while.
#[test]
fn hanging_up_does_not_hang() {
    within_deadline("hanging up", || {
        let (_raw, endpoint) = RawPeer::executor(echo());
        let writer = {
            let endpoint = endpoint.clone();
            thread::spawn(move || endpoint.call(addr(1), vec![0; 64 << 20]).wait())
        };
        // Whether the writer is first or not, the message cannot be delivered or the call cannot.
        endpoint.hang_up(Ok(()));
        assert!(writer.join().unwrap().is_err());
        assert!(matches!(endpoint.wait_disconnected(), Disconnected::Local));
    });
}

/// Holds up the reader that wakes it, until told otherwise.
struct BlockingWaker {
    woken: Mutex<mpsc::Sender<()>>,
    go_on: Mutex<mpsc::Receiver<()>>,
}

impl Wake for BlockingWaker {
    fn wake(self: Arc<Self>) {
        self.woken.lock().unwrap().send(()).unwrap();
        let _ = self.go_on.lock().unwrap().recv();
    }
}

/// Closing with a reason lets the results that have arrived be delivered before the reason is given to the rest.
#[test]
fn what_has_arrived_is_delivered_before_closing() {
    within_deadline("closing", || {
        let (mut raw, endpoint) = RawPeer::executor(echo());
        let mut calls: [Pending<_>; 4] = std::array::from_fn(|_| endpoint.call(addr(1), Vec::new()));
        let ((woken, wakes), (release, go_on)) = (mpsc::channel(), mpsc::channel());
        let waker = Arc::new(BlockingWaker { woken: Mutex::new(woken), go_on: Mutex::new(go_on) }).into();
        assert!(Pin::new(&mut calls[0]).poll(&mut Context::from_waker(&waker)).is_pending());
        raw.send(&frame(Opcode::Result, 0, 0, b""));
        wakes.recv().unwrap();
        // The reader is held up, so this stays in the socket.
        raw.send(&frame(Opcode::Result, 1, 0, b"arrived"));
        endpoint.close(Disconnected::ProcessEnded("the executor exited".to_owned()));
        let early = endpoint.call(addr(1), Vec::new()).wait().unwrap_err();
        drop(release);
        let [_, arrived, pending, other] = calls;
        assert_eq!(arrived.wait().unwrap(), b"arrived");
        for error in [early, pending.wait().unwrap_err(), other.wait().unwrap_err()] {
            assert_eq!(error.to_string(), "the executor exited");
        }
    });
}

/// What the protocol does not have ends the session, and the reason names the message. Pending calls get it too.
#[test]
fn garbage_ends_the_session() {
    let mut too_small = frame(Opcode::Call, 0, 0, b"");
    too_small[0] = 31;
    let mut too_large = frame(Opcode::Call, 0, 0, b"");
    too_large[..8].copy_from_slice(&(MAX_FRAME_BYTES + 1).to_le_bytes());
    let mut enormous = frame(Opcode::Call, 0, 0, b"");
    enormous[..8].copy_from_slice(&u64::MAX.to_le_bytes());
    let mut unknown = frame(Opcode::Call, 0, 0, b"");
    unknown[8] = 4;
    let cases = [
        (too_small, "message size 31"),
        (too_large, "above the limit"),
        (enormous, "above the limit"),
        (unknown, "unknown opcode 4"),
        (frame(Opcode::Result, 77, 0, b""), "Result message for call 77, which is not pending"),
        (frame(Opcode::Result, 0, 7, b""), "Result message for call 0 of unknown kind 7"),
        (frame(Opcode::Result, 0, 1, b"short"), "the error in the Result message for call 0"),
        (frame(Opcode::Hangup, 0, 0, b""), "the reason in a Hangup message"),
    ];
    let check = |bytes: &[u8], expected: &'static str, (mut raw, endpoint): (RawPeer, Endpoint)| {
        let pending = endpoint.call(addr(1), Vec::new());
        raw.send(bytes);
        within_deadline(expected, move || {
            let reason = endpoint.wait_disconnected();
            assert!(matches!(&reason, Disconnected::Protocol(text) if text.contains(expected)), "{reason}");
            assert_eq!(pending.wait().unwrap_err().to_string(), reason.to_string());
            // The peer sees the end.
            assert!(raw.0.read_to_end(&mut Vec::new()).is_ok());
        });
    };
    for (bytes, expected) in &cases {
        check(bytes, expected, RawPeer::executor(echo()));
        check(bytes, expected, RawPeer::controller(echo()));
    }
    check(&setup(), "a second Setup message", RawPeer::executor(echo()));
    check(&setup(), "a Setup message from a controller", RawPeer::controller(echo()));
}

/// A peer that floods this one with calls and reads no answers is cut off; its calls do not pile up.
#[test]
fn a_flood_of_calls_ends_the_session() {
    within_deadline("a flood", || {
        let (mut raw, transport) = RawPeer::new();
        let options = Options { max_concurrent_calls: 4, ..options() };
        let endpoint = accept(transport, &info(), echo(), options).unwrap();
        let calls = frame(Opcode::Call, 0, 1, b"").repeat(1000);
        // At some point the connection is closed.
        while raw.0.write_all(&calls).is_ok() {}
        let reason = endpoint.wait_disconnected();
        assert!(matches!(&reason, Disconnected::Protocol(text) if text.contains("refused calls")), "{reason}");
    });
}

/// A handler that ends its own session gets away with it.
#[test]
fn a_handler_may_close_its_endpoint() {
    within_deadline("closing", || {
        let slot = Slot::default();
        let handler = {
            let slot = Arc::clone(&slot);
            Serve(move |_, _| {
                slot.lock().unwrap().take().unwrap().hang_up(Err("enough".to_owned()));
                Ok(Vec::new())
            })
        };
        let (controller, executor) = session(Transport::pair().unwrap(), echo(), Arc::new(handler), options());
        *slot.lock().unwrap() = Some(executor);
        let error = controller.call(addr(1), Vec::new()).wait().unwrap_err();
        assert!(error.to_string().contains("enough"), "{error}");
    });
}

/// Panics when it wakes.
struct PanickingWaker;

impl Wake for PanickingWaker {
    fn wake(self: Arc<Self>) {
        panic!("a waker's own fault");
    }
}

/// A waker that panics hurts neither other calls nor the end of the session.
#[test]
fn a_panicking_waker_hurts_nobody_else() {
    within_deadline("a panicking waker", || {
        let (mut raw, endpoint) = RawPeer::executor(echo());
        let mut calls: [Pending<_>; 4] = std::array::from_fn(|_| endpoint.call(addr(1), Vec::new()));
        let waker = Arc::new(PanickingWaker).into();
        for call in [0, 2] {
            assert!(Pin::new(&mut calls[call]).poll(&mut Context::from_waker(&waker)).is_pending());
        }
        raw.send(&frame(Opcode::Result, 0, 0, b""));
        raw.send(&frame(Opcode::Result, 1, 0, b"fine"));
        let [_, fine, _pending, failed] = calls;
        assert_eq!(fine.wait().unwrap(), b"fine");
        drop(raw);
        assert!(matches!(failed.wait(), Err(CallError::Disconnected(Disconnected::Eof))));
        assert!(matches!(endpoint.wait_disconnected(), Disconnected::Eof));
    });
}

/// A thread that reads for a while stops when it is woken, however much there is to read, and what goes on after it misses
/// nothing; when nobody goes on, the session has ended.
#[test]
fn reading_changes_hands() {
    within_deadline("reading", || {
        for ends in WAYS.map(|(_, ends)| ends()) {
            let (wake, mut woken) = std::io::pipe().unwrap();
            let (_executor, reading) = accept_unread(ends.1, &info(), echo(), options()).unwrap();
            let (controller, _) = connect(ends.0, echo(), options()).unwrap();
            let (handed, over) = mpsc::channel();
            thread::spawn(move || handed.send(reading.run_until(wake.as_fd())).unwrap());
            let calls: Vec<_> = (0..100u8).map(|number| controller.call(addr(1), vec![number; 3000])).collect();
            woken.write_all(&[1]).unwrap();
            let reading = over.recv().unwrap().expect("the session has not ended");
            reading.spawn().unwrap();
            for (number, call) in (0..).zip(calls) {
                assert_eq!(call.wait().unwrap(), vec![number; 3000]);
            }
        }
        let (ours, theirs) = Transport::pair().unwrap();
        let (executor, reading) = accept_unread(theirs, &info(), echo(), options()).unwrap();
        let (controller, _) = connect(ours, echo(), options()).unwrap();
        drop(reading);
        assert!(matches!(executor.wait_disconnected(), Disconnected::Local));
        controller.wait_disconnected();
    });
}

//! Peers that take no bytes, or do not answer: calls do not wait for ever.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on panics")]

mod common;

use common::options;
use farlink_addr::ExecutorAddr;
use farlink_rpc::{CallError, Disconnected, Executor, Handler, Options, Transport, accept, connect};
use farlink_wire::functions::READ_STRINGS;
use farlink_wire::setup::ExecutorInfo;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

/// Answers after a while.
struct Slow(Duration);

impl Handler for Slow {
    fn call(&self, _function: ExecutorAddr, _args: Vec<u8>) -> Result<Vec<u8>, String> {
        thread::sleep(self.0);
        Ok(vec![0; 8])
    }
}

/// A result that does not come within the limit of the executor is an error that names the function; it may come later, and
/// harms nobody. Without the limit it is waited for.
#[test]
fn results_that_are_late() {
    let (ours, theirs) = Transport::pair().unwrap();
    let mut info = ExecutorInfo { page_size: 4096, ..ExecutorInfo::default() };
    READ_STRINGS.announce(ExecutorAddr::new(0x1000), &mut info);
    let _executor = accept(theirs, &info, Arc::new(Slow(Duration::from_millis(300))), options()).unwrap();
    let (endpoint, info) = connect(ours, Arc::new(Slow(Duration::ZERO)), options()).unwrap();
    let executor = Executor::new(info, Arc::new(endpoint.clone())).unwrap();
    let limited = executor.limited(Duration::from_millis(1));
    let error = limited.bind(READ_STRINGS).unwrap().call(&(Vec::new(),)).wait().unwrap_err();
    assert!(matches!(error, CallError::TimedOut { function, .. } if function == READ_STRINGS.name()), "{error}");
    assert_eq!(executor.bind(READ_STRINGS).unwrap().call(&(Vec::new(),)).wait().unwrap(), Vec::<Vec<u8>>::new());
    assert!(endpoint.disconnected().is_none());
}

/// A peer that does not read ends the connection when a call has waited for room as long as it may, and so do those that
/// wait for their turn.
#[test]
fn peers_that_do_not_read() {
    let (ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
    let ours = Transport::from_socket(ours.into()).unwrap();
    let introduction = thread::spawn(move || {
        use std::io::Write;
        let payload = farlink_wire::sps::to_bytes(&ExecutorInfo::default());
        let mut frame = Vec::new();
        for word in [32 + payload.len() as u64, 0, 0, 0] {
            frame.extend(word.to_le_bytes());
        }
        (&theirs).write_all(&[frame, payload].concat()).unwrap();
        theirs
    });
    let options = Options { write_timeout: Duration::from_millis(100), ..options() };
    let (endpoint, _) = connect(ours, Arc::new(Slow(Duration::ZERO)), options).unwrap();
    let _theirs = introduction.join().unwrap();
    thread::scope(|scope| {
        let calls = [(); 3]
            .map(|()| scope.spawn(|| endpoint.call(ExecutorAddr::new(0x1000), vec![0; 16 << 20]).wait().unwrap_err()));
        for call in calls {
            let error = call.join().unwrap();
            assert!(matches!(&error, CallError::Disconnected(Disconnected::Io(_))), "{error}");
        }
    });
}

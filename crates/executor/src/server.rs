//! Serving one controller, from the first message to the end of the process.

use crate::registry::Registered;
use crate::{fork, main_thread, report, services, trace};
use farlink_addr::ExecutorAddr;
use farlink_mem::wrapper::call_wrapper;
use farlink_rpc::{Disconnected, Endpoint, Handler, Options, Transport, accept_unread};
use farlink_wire::functions::{
    DISPATCH_CONTEXT, DYLIB_INSTANCE, FARLINK_VERSION, PID_KEY, RING_KEY, RING_VERSION, SHARED_INSTANCE,
    SIMPLE_INSTANCE, VERSION_KEY,
};
use farlink_wire::setup::ExecutorInfo;
use std::sync::Arc;
use std::sync::atomic::{AtomicI32, Ordering};
use std::thread;
use std::time::Duration;

/// How long calls that are running when the connection ends may take to return. An executor does not outlive its
/// controller by more.
const GRACE: Duration = Duration::from_millis(100);

/// How long what linked code left for its end may take after that: dealloc actions, and what runs at exit.
const END_PATIENCE: Duration = Duration::from_secs(5);

/// Returns what an executor of this process announces: `token` stands for the session, and some functions are only for
/// a connection that passes descriptors.
pub(crate) fn announcement(token: ExecutorAddr, passes_descriptors: bool) -> ExecutorInfo {
    let mut info = ExecutorInfo {
        triple: format!("{}-unknown-linux-gnu", std::env::consts::ARCH),
        page_size: farlink_mem::page_size().bytes(),
        ..ExecutorInfo::default()
    };
    info.set_value(VERSION_KEY, &FARLINK_VERSION);
    info.set_value(PID_KEY, &u64::from(std::process::id()));
    for instance in [SHARED_INSTANCE, SIMPLE_INSTANCE, DYLIB_INSTANCE, DISPATCH_CONTEXT] {
        info.bootstrap_symbols.push((instance.to_owned(), token));
    }
    if passes_descriptors {
        info.set_value(RING_KEY, &RING_VERSION);
    }
    services::announce(&mut info, passes_descriptors);
    info
}

/// Calls what the controller names.
struct Calls;

impl Handler for Calls {
    #[allow(unsafe_code)]
    fn call(&self, function: ExecutorAddr, args: Vec<u8>) -> Result<Vec<u8>, String> {
        report::prepare_thread();
        // SAFETY: the controller names a function of this process, announced or linked. The executor trusts its
        // controller with its own memory; the null address is refused.
        let result = trace::span(function, || unsafe { call_wrapper(function, &args) });
        fork::exit_if_child(0);
        result
    }

    fn is_brief(&self, function: ExecutorAddr) -> bool {
        services::is_brief(function)
    }
}

/// Serves the controller at the other end of `transport` until the connection ends; gives the exit status.
///
/// Must be called on the process's main thread, where linked programs run. The caller is to exit with the status: if
/// linked code is still running shortly after the connection has ended, or what it left for its end takes more than a
/// few seconds, the process ends at once.
///
/// # Errors
///
/// Fails if there is no memory, or the first message cannot be sent.
pub fn run(transport: Transport, options: Options) -> std::io::Result<i32> {
    fork::register()?;
    let registered = Registered::remote(options.out_of_band_results);
    let info = announcement(registered.token, transport.passes_descriptors());
    let jobs = main_thread::prepare()?;
    let accepted = accept_unread(transport, &info, Arc::new(Calls), options);
    let (endpoint, reading) = accepted.inspect_err(|_| main_thread::stop())?;
    registered.session.set_endpoint(&endpoint);
    let (ended, status) = (endpoint.clone(), Arc::new(AtomicI32::new(1)));
    let (found, stop, this_thread) = (Arc::clone(&status), StopOnDrop, thread::current().id());
    endpoint.when_disconnected(move |reason| {
        // The main thread stops also if this does not get to run.
        let _stop = stop;
        let patience = limit_the_end(&reason, &ended, &found);
        if thread::current().id() == this_thread {
            // It is what is limited. Without another the end takes as long as it takes.
            let started = thread::Builder::new().name("farlink-end".to_owned()).spawn(patience);
            drop(started);
        } else {
            patience();
        }
    });
    drop(endpoint);
    main_thread::serve(&jobs, reading);
    let status = status.load(Ordering::Acquire);
    if let Err(text) = registered.session.shut_down() {
        eprintln!("farlink-executor: while ending: {text}");
        return Ok(status.max(1));
    }
    Ok(status)
}

/// Ends the main thread's service.
struct StopOnDrop;

impl Drop for StopOnDrop {
    fn drop(&mut self) {
        main_thread::stop();
    }
}

/// Sends the main thread to its end, after the connection has ended. Gives what ends the process if that takes too long, for
/// another thread to run: an executor never outlives its controller for long.
fn limit_the_end(reason: &Disconnected, endpoint: &Endpoint, status: &AtomicI32) -> impl FnOnce() + Send + use<> {
    let found = exit_status(reason);
    if !endpoint.wait_quiet(GRACE) {
        services::end_process(found);
    }
    status.store(found, Ordering::Release);
    main_thread::stop();
    move || {
        thread::sleep(END_PATIENCE);
        eprintln!("farlink-executor: what linked code left for its end takes more than {END_PATIENCE:?}");
        services::end_process(found)
    }
}

/// Returns the exit status for the end of a connection, and says what was wrong if something was.
fn exit_status(reason: &Disconnected) -> i32 {
    match reason {
        Disconnected::Hangup | Disconnected::Eof | Disconnected::Local => 0,
        reason => {
            eprintln!("farlink-executor: {reason}");
            1
        }
    }
}

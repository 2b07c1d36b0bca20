//! The sessions of this process, by the tokens that stand for them.
//!
//! A controller sends a token back with each call as the `instance` of a service. It is a number that is looked up,
//! never an address that is followed.

use farlink_addr::ExecutorAddr;
use farlink_mem::MemoryService;
use farlink_rpc::{CallError, Endpoint, Handler};
use std::collections::HashMap;
use std::os::fd::RawFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, OnceLock, PoisonError, Weak};

/// What belongs to one session.
#[derive(Default)]
pub(crate) struct Session {
    /// Memory that the controller shares.
    pub(crate) shared: MemoryService,
    /// Memory whose content arrives in messages.
    pub(crate) private: MemoryService,
    /// Whether the controller is farlink's, which asks for nothing that makes no sense.
    pub(crate) is_farlink: bool,
    /// The connection to the controller, set as soon as there is one; none for a controller in this process.
    endpoint: Option<OnceLock<Endpoint>>,
    /// The functions of a controller in this process, if it has any.
    handler: Option<Arc<dyn Handler>>,
}

impl Session {
    pub(crate) fn set_endpoint(&self, endpoint: &Endpoint) {
        if let Some(slot) = &self.endpoint {
            // Set once, by who opened the connection.
            let _ = slot.set(endpoint.clone());
        }
    }

    /// Returns the connection to the controller. A call may come before it has been set.
    pub(crate) fn endpoint(&self) -> Result<&Endpoint, String> {
        let slot = self.endpoint.as_ref().ok_or("the controller is in this process and has no connection")?;
        Ok(slot.wait())
    }

    /// Calls a function of the controller; gives its encoded result. Does not return if the connection ends, which ends the
    /// process.
    pub(crate) fn call_controller(&self, tag: ExecutorAddr, args: Vec<u8>) -> Result<Vec<u8>, String> {
        if let Some(handler) = &self.handler {
            return handler.call(tag, args);
        }
        match self.endpoint()?.call(tag, args).wait() {
            Ok(result) => Ok(result),
            Err(CallError::Disconnected(_)) => loop {
                std::thread::park();
            },
            Err(CallError::OutOfBand(text)) => Err(text),
            Err(error) => Err(error.to_string()),
        }
    }

    /// Returns the numbers of the descriptors of the connection to the controller, if there is one.
    pub(crate) fn descriptor_numbers(&self) -> Vec<RawFd> {
        self.endpoint.as_ref().and_then(OnceLock::get).map(Endpoint::descriptor_numbers).unwrap_or_default()
    }

    /// Tears down the session's memory, the newest allocation first.
    pub(crate) fn shut_down(&self) -> Result<(), String> {
        let results = [self.shared.shut_down(), self.private.shut_down()];
        let texts: Vec<_> =
            results.into_iter().filter_map(|result| result.err().map(|error| error.to_string())).collect();
        if texts.is_empty() { Ok(()) } else { Err(texts.join("\n")) }
    }
}

static SESSIONS: LazyLock<Mutex<HashMap<u64, Weak<Session>>>> = LazyLock::new(Mutex::default);

fn lock() -> MutexGuard<'static, HashMap<u64, Weak<Session>>> {
    // No code that can panic half-way through a change runs under this lock.
    SESSIONS.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Returns the sessions of this process.
pub(crate) fn sessions() -> Vec<Arc<Session>> {
    lock().values().filter_map(Weak::upgrade).collect()
}

/// A session and the token that stands for it while this lives.
pub(crate) struct Registered {
    pub(crate) session: Arc<Session>,
    pub(crate) token: ExecutorAddr,
}

impl Registered {
    /// Registers a session whose controller is in this process.
    pub(crate) fn local(handler: Option<Arc<dyn Handler>>) -> Self {
        Self::new(Session { is_farlink: true, handler, ..Session::default() })
    }

    /// Registers a session that is about to get a connection.
    pub(crate) fn remote(is_farlink: bool) -> Self {
        Self::new(Session { endpoint: Some(OnceLock::new()), is_farlink, ..Session::default() })
    }

    fn new(session: Session) -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        let session = Arc::new(session);
        let token = NEXT.fetch_add(1, Ordering::Relaxed);
        lock().insert(token, Arc::downgrade(&session));
        Self { session, token: ExecutorAddr::new(token) }
    }
}

impl Drop for Registered {
    fn drop(&mut self) {
        lock().remove(&self.token.as_u64());
    }
}

/// Returns the session that `token` stands for.
pub(crate) fn session(token: ExecutorAddr) -> Result<Arc<Session>, String> {
    let session = lock().get(&token.as_u64()).and_then(Weak::upgrade);
    session.ok_or_else(|| format!("{token} is no instance of this service"))
}

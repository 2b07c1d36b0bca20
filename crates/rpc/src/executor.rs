//! What a controller holds of an executor.

use crate::{CallError, Pending, SetupError};
use farlink_addr::{ExecutorAddr, PageSize};
use farlink_wire::functions::Function;
use farlink_wire::setup::ExecutorInfo;
use farlink_wire::sps::{Decode, Encode, from_bytes, to_bytes};
use std::collections::BTreeMap;
use std::marker::PhantomData;
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Calls wrapper functions of an executor, in another process or in this one.
pub trait Caller: Send + Sync {
    /// Calls the wrapper function at `function` with encoded arguments; gives its encoded result.
    fn call(&self, function: ExecutorAddr, args: Vec<u8>) -> Pending<Result<Vec<u8>, CallError>>;

    /// Sends a copy of `descriptor` to the executor; gives the tag that later calls name it by.
    ///
    /// # Errors
    ///
    /// Fails if the connection has ended or does not pass descriptors, as is so unless an implementation says otherwise.
    fn send_descriptor(&self, descriptor: BorrowedFd<'_>) -> Result<u64, CallError> {
        let _ = descriptor;
        Err(CallError::Missing("a connection that passes descriptors"))
    }
}

/// Is told of calls to an executor.
pub trait CallObserver: Send + Sync {
    /// Returns the time, on a clock of the observer's choice.
    fn now(&self) -> u64;

    /// A call of the function that is called `name`, which was made at `start`, has a result.
    fn call_ended(&self, name: &'static str, start: u64);
}

/// An executor: what it announced, and the means to call it. Cheap to clone.
#[derive(Clone)]
pub struct Executor {
    info: Arc<ExecutorInfo>,
    page_size: PageSize,
    caller: Arc<dyn Caller>,
    /// Calls so far, by the function's name.
    counts: Arc<Mutex<BTreeMap<&'static str, Arc<AtomicU64>>>>,
    observer: Option<Arc<dyn CallObserver>>,
    limit: Option<Duration>,
}

impl Executor {
    /// Returns the executor that introduced itself with `info` and is reached by `caller`.
    ///
    /// # Errors
    ///
    /// Fails if the page size it claims is not one.
    pub fn new(info: ExecutorInfo, caller: Arc<dyn Caller>) -> Result<Self, SetupError> {
        let page_size = PageSize::new(info.page_size).ok_or(SetupError::BadPageSize(info.page_size))?;
        let (info, counts) = (Arc::new(info), Arc::default());
        Ok(Self { info, page_size, caller, counts, observer: None, limit: None })
    }

    /// Has `observer` told of all calls to come, of clones that are made from now on too.
    #[must_use]
    pub fn observed_by(mut self, observer: Arc<dyn CallObserver>) -> Self {
        self.observer = Some(observer);
        self
    }

    /// Returns the same executor, with a limit to how long results of functions that are bound from now on are waited for:
    /// after that they are [`CallError::TimedOut`].
    #[must_use]
    pub fn limited(&self, limit: Duration) -> Self {
        Self { limit: Some(limit), ..self.clone() }
    }

    /// Returns what the executor announced.
    #[must_use]
    pub fn info(&self) -> &ExecutorInfo {
        &self.info
    }

    /// Returns the executor's page size.
    #[must_use]
    pub fn page_size(&self) -> PageSize {
        self.page_size
    }

    /// Returns whether the executor offers `function`.
    #[must_use]
    pub fn offers<Args, Ret>(&self, function: Function<Args, Ret>) -> bool {
        function.find(&self.info).is_some()
    }

    /// Returns `function` of this executor, ready to be called.
    ///
    /// # Errors
    ///
    /// Fails if the executor does not offer it.
    pub fn bind<Args, Ret>(&self, function: Function<Args, Ret>) -> Result<Callee<Args, Ret>, CallError> {
        let addr = function.find(&self.info).ok_or(CallError::Missing(function.name()))?;
        Ok(self.callee(function.name(), addr))
    }

    /// Returns the function at `addr`, which is called `name` and is not announced: one that has been linked.
    #[must_use]
    pub fn callee<Args, Ret>(&self, name: &'static str, addr: ExecutorAddr) -> Callee<Args, Ret> {
        let count = Arc::clone(self.counts().entry(name).or_default());
        let (caller, observer) = (Arc::clone(&self.caller), self.observer.clone());
        Callee { name, addr, caller, count, observer, limit: self.limit, types: PhantomData }
    }

    fn counts(&self) -> MutexGuard<'_, BTreeMap<&'static str, Arc<AtomicU64>>> {
        // Nothing that can panic half-way through a change runs under this lock.
        self.counts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns how many calls have been made through this executor and its clones, by the functions' names.
    #[must_use]
    pub fn calls(&self) -> BTreeMap<&'static str, u64> {
        let counts = self.counts();
        let counts = counts.iter().map(|(&name, count)| (name, count.load(Ordering::Relaxed)));
        counts.filter(|&(_, count)| count > 0).collect()
    }

    /// Sends a copy of `descriptor` to the executor; gives the tag that later calls name it by.
    ///
    /// # Errors
    ///
    /// Fails if the connection has ended or does not pass descriptors.
    pub fn send_descriptor(&self, descriptor: BorrowedFd<'_>) -> Result<u64, CallError> {
        self.caller.send_descriptor(descriptor)
    }

    /// Returns the address announced under `name`, which is not that of a function.
    ///
    /// # Errors
    ///
    /// Fails if the executor does not announce it.
    pub fn object(&self, name: &'static str) -> Result<ExecutorAddr, CallError> {
        self.info.symbol(name).ok_or(CallError::Missing(name))
    }
}

/// A function of an executor.
pub struct Callee<Args, Ret> {
    name: &'static str,
    addr: ExecutorAddr,
    caller: Arc<dyn Caller>,
    count: Arc<AtomicU64>,
    observer: Option<Arc<dyn CallObserver>>,
    limit: Option<Duration>,
    types: PhantomData<fn(Args) -> Ret>,
}

// Not derived: the types need not be cloned.
impl<Args, Ret> Clone for Callee<Args, Ret> {
    fn clone(&self) -> Self {
        let (caller, count, observer) = (Arc::clone(&self.caller), Arc::clone(&self.count), self.observer.clone());
        Self { name: self.name, addr: self.addr, caller, count, observer, limit: self.limit, types: PhantomData }
    }
}

impl<Args: Encode, Ret: for<'a> Decode<'a> + Send + 'static> Callee<Args, Ret> {
    /// Calls the function.
    pub fn call(&self, args: &Args) -> Pending<Result<Ret, CallError>> {
        self.call_encoded(to_bytes(args))
    }
}

impl<Args, Ret: for<'a> Decode<'a> + Send + 'static> Callee<Args, Ret> {
    /// Returns the function's address.
    #[must_use]
    pub fn addr(&self) -> ExecutorAddr {
        self.addr
    }

    /// Returns the same function of another executor, which has it at the same address and is reached by `caller`.
    #[must_use]
    pub fn of(&self, caller: &Arc<dyn Caller>) -> Self {
        Self { caller: Arc::clone(caller), ..self.clone() }
    }

    /// Calls the function with arguments that have been encoded, for example from borrowed parts.
    pub fn call_encoded(&self, args: Vec<u8>) -> Pending<Result<Ret, CallError>> {
        let function = self.name;
        self.count.fetch_add(1, Ordering::Relaxed);
        let observed = self.observer.clone().map(|observer| (observer.now(), observer));
        let called = self.caller.call(self.addr, args);
        let limit = self.limit.and_then(|timeout| Some((timeout, Instant::now().checked_add(timeout)?)));
        let called = match limit {
            Some((timeout, deadline)) => {
                called.limited(deadline, move || Err(CallError::TimedOut { function, timeout }))
            }
            None => called,
        };
        called.map(move |result| {
            if let Some((start, observer)) = observed {
                observer.call_ended(function, start);
            }
            from_bytes(&result?).map_err(|error| CallError::BadResult { function, error })
        })
    }
}

//! Functions of the controller that linked code calls.
//!
//! To linked code each is a stub of its own, which names a descriptor in the same place and jumps to the executor's code
//! that calls back (see [`farlink_wire::native`]). The closure runs in this process, on a thread of the connection's, or
//! on the calling thread if the executor is in this process.

use crate::function::Callback;
use crate::session::Session;
use crate::{Error, Library};
use farlink_addr::{Align, AllocGroup, ExecutorAddr, MemProt};
use farlink_mem::{FinalizedAlloc, SegmentLayout};
use farlink_rpc::Handler;
use farlink_wire::functions::{CALLBACK_ENTRY_KEY, DISPATCH_CONTEXT};
use farlink_wire::native::{Arguments, CallbackDescriptor, Returned};
use farlink_wire::sps::{from_bytes, to_bytes};
use std::any::Any;
use std::collections::HashMap;
use std::marker::PhantomData;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};

/// What linked code calls, and where the descriptor and the address of the executor's code are.
///
/// ```text
/// lea descriptor(%rip), %r10         the descriptor is at 24
/// jmp *entry(%rip)                   the address is at 16
/// ```
const STUB: [u8; 16] = [0x4c, 0x8d, 0x15, 0x11, 0, 0, 0, 0xff, 0x25, 0x03, 0, 0, 0, 0xcc, 0xcc, 0xcc];
const ENTRY_OFFSET: u64 = 16;
const DESCRIPTOR_OFFSET: u64 = 24;
const STUB_BYTES: u64 = DESCRIPTOR_OFFSET + size_of::<CallbackDescriptor>() as u64;

/// Gives nothing if the arguments have another shape than the closure's.
type Closure = Arc<dyn Fn(&Arguments) -> Option<Returned> + Send + Sync>;

/// The closures of a session, by the tags that descriptors name.
#[derive(Default)]
pub(crate) struct Callbacks {
    closures: RwLock<HashMap<u64, (String, Closure)>>,
    next: AtomicU64,
    /// What the first closure that panicked said.
    panic: Mutex<Option<String>>,
}

impl Callbacks {
    fn add(&self, name: &str, closure: Closure) -> u64 {
        let tag = self.next.fetch_add(1, Ordering::Relaxed);
        self.closures.write().unwrap_or_else(PoisonError::into_inner).insert(tag, (name.to_owned(), closure));
        tag
    }

    fn remove(&self, tag: u64) {
        let closure = self.closures.write().unwrap_or_else(PoisonError::into_inner).remove(&tag);
        // It is somebody else's code that runs here, not under the lock.
        drop(closure);
    }

    /// Forgets what a closure that panicked said: another executor has taken the place of the one that ended by it.
    pub(crate) fn forget_panic(&self) {
        *self.panic.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// Returns what a closure that panicked said.
    pub(crate) fn panic(&self) -> Option<String> {
        self.panic.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Handler for Callbacks {
    fn call(&self, function: ExecutorAddr, args: Vec<u8>) -> Result<Vec<u8>, String> {
        let found = self.closures.read().unwrap_or_else(PoisonError::into_inner).get(&function.as_u64()).cloned();
        let (name, closure) = found.ok_or_else(|| format!("the controller has no function with the tag {function}"))?;
        let arguments: Arguments = from_bytes(&args).map_err(|error| format!("the arguments of {name}: {error}"))?;
        match catch_unwind(AssertUnwindSafe(|| closure(&arguments))) {
            Ok(Some(returned)) => Ok(to_bytes(&returned)),
            Ok(None) => Err(format!("the arguments of {name} have the shape {:?}", arguments.shape())),
            Err(panic) => {
                let text = format!("the controller's function {name} panicked: {}", panic_text(&*panic));
                self.panic.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert_with(|| text.clone());
                Err(text)
            }
        }
    }
}

fn panic_text(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<&str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("no text")
}

/// A closure as a C function for linked code, which can have its address as a pointer: see [`Session::callback`].
///
/// Dropping it ends that: linked code must not call it any more.
pub struct CallbackFunction<S> {
    session: Session,
    tag: u64,
    addr: ExecutorAddr,
    /// None only while it is dropped.
    memory: Option<FinalizedAlloc>,
    signature: PhantomData<fn(S)>,
}

impl<S> CallbackFunction<S> {
    /// Returns the address of the C function in the executor.
    #[must_use]
    pub fn addr(&self) -> ExecutorAddr {
        self.addr
    }
}

impl<S> Drop for CallbackFunction<S> {
    fn drop(&mut self) {
        let inner = self.session.inner();
        inner.callbacks.remove(self.tag);
        // If the executor has ended, so has its memory.
        let _ = inner.memory.deallocate(self.memory.take().into_iter().collect()).wait();
    }
}

impl Session {
    /// Makes a closure a C function for linked code: see [`Library::define_callback`]. It has no name, but an address, which
    /// linked code can be given. `name` is what errors call it.
    ///
    /// # Errors
    ///
    /// Fails if the executor cannot call back, as LLVM's cannot, or has no memory.
    pub fn callback<S, F: Callback<S>>(&self, name: &str, closure: F) -> Result<CallbackFunction<S>, Error> {
        let executor = self.inner().runtime()?.executor();
        let entry = executor.info().value(CALLBACK_ENTRY_KEY).and_then(|value| from_bytes(value).ok());
        self.callback_at(entry.ok_or(farlink_rpc::CallError::Missing(CALLBACK_ENTRY_KEY))?, name, closure)
    }

    /// As [`Self::callback`], by the executor's code at `entry`.
    pub(crate) fn callback_at<S, F: Callback<S>>(
        &self,
        entry: ExecutorAddr,
        name: &str,
        closure: F,
    ) -> Result<CallbackFunction<S>, Error> {
        let inner = self.inner();
        let session = inner.runtime()?.executor().object(DISPATCH_CONTEXT)?.as_u64();
        let (arguments, result) = F::SHAPES;
        let checked = move |given: &Arguments| (given.shape() == arguments).then(|| closure.call(given));
        let tag = inner.callbacks.add(name, Arc::new(checked));
        let (result, arguments) = (result.to_word(), arguments.to_word());
        let made = self.place_stub(entry, &CallbackDescriptor { session, tag, result, arguments });
        let made = made.inspect_err(|_| inner.callbacks.remove(tag));
        let (addr, memory) = made.map_err(|error| inner.explain(error))?;
        Ok(CallbackFunction { session: self.clone(), tag, addr, memory: Some(memory), signature: PhantomData })
    }

    fn place_stub(
        &self,
        entry: ExecutorAddr,
        descriptor: &CallbackDescriptor,
    ) -> Result<(ExecutorAddr, FinalizedAlloc), Error> {
        let memory = &self.inner().memory;
        let layout = SegmentLayout {
            group: AllocGroup::standard(MemProt::RX),
            content_bytes: STUB_BYTES,
            zero_fill_bytes: 0,
            align: Align::new(16).expect("16 is a power of two"),
        };
        let alloc = memory.allocate(vec![layout]).wait()?;
        let segment = &alloc.segments()[0];
        let CallbackDescriptor { session, tag, result, arguments } = *descriptor;
        segment.working.write(0, &STUB)?;
        segment.working.write(ENTRY_OFFSET, &entry.as_u64().to_le_bytes())?;
        let words: Vec<u8> = [session, tag, result, arguments].into_iter().flat_map(u64::to_le_bytes).collect();
        segment.working.write(DESCRIPTOR_OFFSET, &words)?;
        let addr = segment.range.start();
        Ok((addr, memory.finalize(vec![(alloc, Vec::new())]).wait()?.remove(0)))
    }
}

impl Library {
    /// Defines `name` as a closure, which linked code calls as a C function.
    ///
    /// Its signature is that of the closure, whose arguments are values that C passes ([`CValue`](crate::CValue)):
    ///
    /// ```no_run
    /// # let session = farlink::Session::spawn()?;
    /// # let library = session.create_library("main");
    /// // void log_number(int level, double number);
    /// library.define_callback("log_number", |level: i32, number: f64| println!("{level}: {number}"))?;
    /// # Ok::<(), farlink::Error>(())
    /// ```
    ///
    /// It may be called from any thread of the executor's, from several at once, and while linked code that this process has
    /// called is running; and it may itself call linked code. The closure lives as long as the library: one that holds the
    /// library or its session keeps both forever.
    ///
    /// If the closure panics, there is nothing that it could return to linked code: the executor's process ends
    /// (in-process: this one), and the call that led there fails with [`Error::CallbackPanicked`].
    ///
    /// # Errors
    ///
    /// As [`Self::define`], and as [`Session::callback`].
    pub fn define_callback<S: 'static, F: Callback<S>>(&self, name: &str, closure: F) -> Result<(), Error> {
        let callback = self.session().callback(name, closure)?;
        self.define(name, callback.addr())?;
        self.keep(Box::new(callback));
        Ok(())
    }
}

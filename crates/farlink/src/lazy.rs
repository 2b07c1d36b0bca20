//! Definitions that are made when they are needed: when a symbol is looked up, or when a function is called.

use crate::Error;
use crate::library::{Library, LibraryInner, Object};
use farlink_addr::ExecutorAddr;
use farlink_rpc::CallError;
use farlink_wire::functions::LAZY_ENTRY_KEY;
use farlink_wire::sps::from_bytes;
use std::collections::HashMap;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::thread::{self, ThreadId};

/// Why a closure could not make a definition.
pub type MaterializeError = Box<dyn std::error::Error + Send + Sync>;

type MakeFunction = Box<dyn FnOnce(&Library) -> Result<Object, MaterializeError> + Send>;

type Make = Box<dyn FnMut(&Library) -> Result<(), MaterializeError> + Send>;

/// The names of a library that closures stand for.
#[derive(Default)]
pub(crate) struct LazyNames {
    names: HashMap<Box<str>, Arc<Materializer>>,
    /// Those that are needed and have not been asked for.
    wanted: Vec<Arc<Materializer>>,
}

impl LazyNames {
    /// Returns whether closures stand for any names.
    pub(crate) fn is_there(&self) -> bool {
        !self.names.is_empty()
    }

    /// Takes note that a name is needed, if a closure stands for it. Returns whether one does.
    pub(crate) fn want(&mut self, name: &str) -> bool {
        let Some(materializer) = self.names.get(name) else { return false };
        if !self.wanted.iter().any(|wanted| Arc::ptr_eq(wanted, materializer)) {
            self.wanted.push(Arc::clone(materializer));
        }
        true
    }

    /// Returns what has been needed since this was called last.
    pub(crate) fn take_wanted(&mut self) -> Vec<Arc<Materializer>> {
        std::mem::take(&mut self.wanted)
    }
}

/// A closure that defines symbols when one of them is needed.
pub(crate) struct Materializer {
    names: Vec<String>,
    state: Mutex<Progress>,
    settled: Condvar,
}

enum Progress {
    Ready(Make),
    Running(ThreadId),
    Done,
}

impl Materializer {
    fn lock(&self) -> MutexGuard<'_, Progress> {
        // The closure does not run under this lock.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs the closure, or waits for another thread that does.
    fn run(&self, library: &Arc<LibraryInner>) -> Result<(), Error> {
        let mut progress = self.lock();
        loop {
            match &*progress {
                Progress::Done => return Ok(()),
                Progress::Running(who) if *who == thread::current().id() => {
                    let text = "it is looked up by the closure that is to define it";
                    return Err(self.failed(text.into()));
                }
                Progress::Running(_) => {
                    progress = self.settled.wait(progress).unwrap_or_else(PoisonError::into_inner);
                }
                Progress::Ready(_) => break,
            }
        }
        let running = Progress::Running(thread::current().id());
        let Progress::Ready(mut make) = std::mem::replace(&mut *progress, running) else { return Ok(()) };
        drop(progress);
        // If the closure panics, it has had its chance.
        let mut outcome = Outcome { materializer: self, library, next: Progress::Done };
        let made = make(&Library::from_inner(Arc::clone(library)));
        if made.is_err() {
            outcome.next = Progress::Ready(make);
        }
        drop(outcome);
        made.map_err(|error| self.failed(error))
    }

    fn failed(&self, error: MaterializeError) -> Error {
        Error::Materialize { symbols: self.names.join(", "), error: error.into() }
    }
}

/// Tells those who wait for a closure that it has returned.
struct Outcome<'a> {
    materializer: &'a Materializer,
    library: &'a LibraryInner,
    next: Progress,
}

impl Drop for Outcome<'_> {
    fn drop(&mut self) {
        if matches!(self.next, Progress::Done) {
            let mut state = self.library.lock();
            self.materializer.names.iter().for_each(|name| drop(state.lazy.names.remove(name.as_str())));
        }
        *self.materializer.lock() = std::mem::replace(&mut self.next, Progress::Done);
        self.materializer.settled.notify_all();
    }
}

/// Has what is needed defined.
pub(crate) fn materialize(library: &Arc<LibraryInner>, wanted: &[Arc<Materializer>]) -> Result<(), Error> {
    wanted.iter().try_for_each(|materializer| materializer.run(library))
}

impl Library {
    /// Has `make` called when one of `names` is needed for the first time, by a lookup or by an object that is linked, and no
    /// object defines it: it adds to the library what defines them, and may look up other symbols. Its objects come before
    /// those of archives.
    ///
    /// ```no_run
    /// # let session = farlink::Session::spawn()?;
    /// # let library = session.create_library("main");
    /// library.define_lazily(&["square"], |library| {
    ///     library.add_object("square.o", std::fs::read("square.o")?)?;
    ///     Ok(())
    /// });
    /// # Ok::<(), farlink::Error>(())
    /// ```
    ///
    /// It is called once, on the thread that needs it, while others that need the same names wait; again if it fails.
    /// Closures that look up each other's names, on different threads, wait for each other forever.
    pub fn define_lazily<F>(&self, names: &[&str], make: F)
    where
        F: FnMut(&Self) -> Result<(), MaterializeError> + Send + 'static,
    {
        let owned = names.iter().map(|&name| name.to_owned()).collect();
        let state = Mutex::new(Progress::Ready(Box::new(make)));
        let materializer = Arc::new(Materializer { names: owned, state, settled: Condvar::new() });
        let mut state = self.inner().lock();
        for &name in names {
            state.lazy.names.insert(name.into(), Arc::clone(&materializer));
        }
    }

    /// Defines `name` as a redirectable symbol, as [`Self::define_redirectable`] does, and has `make` called when linked code
    /// calls the function for the first time: it adds the object that defines it, which is then linked, and the call goes
    /// there, as do all after it. Registers of arguments stay as they are, whatever the function's signature.
    ///
    /// It is called once, on a thread of this process's, while calls that need it wait. So the object's initializers must not
    /// call the function: they would wait for themselves.
    ///
    /// # Errors
    ///
    /// As [`Self::define_redirectable`], and as [`Session::callback`](crate::Session::callback). If `make` fails, the call has
    /// nowhere to go: the executor ends, as when a closure panics, and says why.
    pub fn define_lazy_function<F>(&self, name: &str, make: F) -> Result<crate::Redirect, Error>
    where
        F: FnOnce(&Self) -> Result<Object, MaterializeError> + Send + 'static,
    {
        let session = self.session();
        let entry = session.inner().runtime()?.executor().info().value(LAZY_ENTRY_KEY);
        let entry = entry.and_then(|value| from_bytes(value).ok()).ok_or(CallError::Missing(LAZY_ENTRY_KEY))?;
        let redirect = self.define_redirectable(name)?;
        let first_call = FirstCall {
            library: Arc::downgrade(self.inner()),
            name: name.to_owned(),
            progress: Mutex::new(FirstCallProgress::Ready(Box::new(make))),
        };
        let callback = session.callback_at(entry, name, move || first_call.target())?;
        redirect.set(callback.addr())?;
        self.keep(Box::new(callback));
        Ok(redirect)
    }
}

/// What finds the function at its first call.
struct FirstCall {
    library: Weak<LibraryInner>,
    name: String,
    progress: Mutex<FirstCallProgress>,
}

enum FirstCallProgress {
    Ready(MakeFunction),
    Done(ExecutorAddr),
    Failed,
}

impl FirstCall {
    /// Returns where the call goes on.
    ///
    /// # Panics
    ///
    /// Panics if there is nowhere: whoever serves linked code makes that the executor's end.
    fn target(&self) -> ExecutorAddr {
        // Others that call the function meanwhile wait here.
        let mut progress = self.progress.lock().unwrap_or_else(PoisonError::into_inner);
        let make = match std::mem::replace(&mut *progress, FirstCallProgress::Failed) {
            FirstCallProgress::Ready(make) => make,
            FirstCallProgress::Done(addr) => {
                *progress = FirstCallProgress::Done(addr);
                return addr;
            }
            FirstCallProgress::Failed => panic!("its definition could not be made before"),
        };
        let library = self.library.upgrade().map(Library::from_inner).expect("the library is gone");
        let made = make(&library).and_then(|object| Ok(library.redirect_one(&self.name, object)?));
        match made {
            Ok(addr) => {
                *progress = FirstCallProgress::Done(addr);
                addr
            }
            Err(error) => panic!("its definition cannot be made: {error}"),
        }
    }
}

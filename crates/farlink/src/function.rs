//! Linked functions that are called as they are declared in C.

use crate::abi::{self, CResult, CType};
use crate::pool::{Given, Running};
use crate::session::{Connection, Session, SessionInner};
use crate::{Error, Library};
use farlink_addr::ExecutorAddr;
use farlink_rpc::{CallError, Callee, Pending};
use farlink_wire::functions::CALL_NATIVE;
use farlink_wire::native::{ArgumentShape, Arguments, NativeCall, RegisterClass, ResultShape, Returned};
use std::fmt;
use std::marker::PhantomData;
use std::sync::Arc;
use std::time::Duration;

/// The signature of a C function, as the type of a pointer to it: `fn(*const f64, usize) -> f64`, or the same with
/// `extern "C"`. Up to twelve arguments, each a [`CType`], and a [`CResult`].
pub trait Signature: 'static {
    /// The values of the arguments, as a tuple.
    type Args;
    /// The result.
    type Result: CResult;

    /// Where the arguments go, and where the result is.
    #[doc(hidden)]
    const SHAPES: (ArgumentShape, ResultShape);

    /// Returns where the arguments go.
    #[doc(hidden)]
    fn arguments(args: Self::Args) -> Arguments;
}

/// A closure that linked code can call as a C function: up to twelve arguments, each a [`CValue`](crate::CValue), and a
/// result, which is one too or `()`. `S` is its signature, which is inferred.
pub trait Callback<S>: Send + Sync + 'static {
    /// Where the arguments are when it is called, and where its result goes.
    #[doc(hidden)]
    const SHAPES: (ArgumentShape, ResultShape);

    /// Calls the closure with arguments of that shape.
    #[doc(hidden)]
    fn call(&self, arguments: &Arguments) -> Returned;
}

/// Begins the arguments of a function whose result has this shape: the address of one in memory comes first.
#[inline]
fn begin(result: ResultShape) -> Arguments {
    let mut arguments = Arguments::default();
    if matches!(result, ResultShape::Memory(_)) {
        arguments.push([0; 2], RegisterClass::Int, None);
    }
    arguments
}

macro_rules! signatures {
    ($($arg:ident)*) => {
        signatures!(@function fn($($arg),*) -> R, $($arg)*);
        signatures!(@function extern "C" fn($($arg),*) -> R, $($arg)*);
        signatures!(@function unsafe extern "C" fn($($arg),*) -> R, $($arg)*);

        impl<Closure, R, $($arg),*> Callback<fn($($arg),*) -> R> for Closure
        where
            Closure: Fn($($arg),*) -> R + Send + Sync + 'static,
            R: CResult<Value = R>,
            $($arg: abi::CValue),*
        {
            const SHAPES: (ArgumentShape, ResultShape) =
                (abi::argument_shape(&[$(<$arg as abi::CField>::LAYOUT),*], R::SHAPE), R::SHAPE);

            #[allow(non_snake_case, unused_mut, unused_variables)]
            fn call(&self, arguments: &Arguments) -> Returned {
                let mut taker = abi::Taker::new(arguments, R::SHAPE);
                $(let $arg: $arg = taker.take();)*
                R::to_returned(self($($arg),*))
            }
        }
    };
    (@function $function:ty, $($arg:ident)*) => {
        impl<R: CResult + 'static, $($arg: CType + 'static),*> Signature for $function {
            type Args = ($($arg::Value,)*);
            type Result = R;

            const SHAPES: (ArgumentShape, ResultShape) =
                (abi::argument_shape(&[$(<$arg::Value as abi::CField>::LAYOUT),*], R::SHAPE), R::SHAPE);

            #[inline]
            #[allow(non_snake_case, unused_mut)]
            fn arguments(($($arg,)*): Self::Args) -> Arguments {
                // Too many bytes are an error when this is compiled.
                let (_, result) = const { Self::SHAPES };
                let mut arguments = begin(result);
                $(abi::push(&mut arguments, $arg);)*
                arguments
            }
        }
    };
}

signatures!();
signatures!(A);
signatures!(A B);
signatures!(A B C);
signatures!(A B C D);
signatures!(A B C D E);
signatures!(A B C D E F);
signatures!(A B C D E F G);
signatures!(A B C D E F G H);
signatures!(A B C D E F G H I);
signatures!(A B C D E F G H I J);
signatures!(A B C D E F G H I J K);
signatures!(A B C D E F G H I J K L);

/// A linked function that is called as it is declared in C. Cheap to clone; may be called from any number of threads, and
/// the calls run beside each other.
///
/// It keeps its library and the session, but not the object that the function is in: that can be removed.
pub struct Function<S> {
    session: Session,
    library: Option<Library>,
    name: Arc<str>,
    addr: ExecutorAddr,
    timeout: Option<Duration>,
    /// Which of several executors is called.
    pub(crate) executor: Option<usize>,
    /// How an executor in another process is called.
    callee: Option<Callee<NativeCall, Returned>>,
    signature: PhantomData<S>,
}

impl<S> Clone for Function<S> {
    fn clone(&self) -> Self {
        Self {
            session: self.session.clone(),
            library: self.library.clone(),
            name: Arc::clone(&self.name),
            callee: self.callee.clone(),
            ..*self
        }
    }
}

impl<S> fmt::Debug for Function<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Function").field("name", &self.name).field("addr", &self.addr).finish_non_exhaustive()
    }
}

impl Library {
    /// Links what the function `name` needs, as [`Self::lookup`] does, and returns it to be called.
    ///
    /// The signature is what C declares, with pointers of the executor's:
    ///
    /// ```no_run
    /// # let session = farlink::Session::spawn()?;
    /// # let library = session.create_library("main");
    /// // double sum(const double *numbers, size_t count);
    /// let sum = library.function::<fn(*const f64, usize) -> f64>("sum")?;
    /// let data = session.shared_buffer::<f64>(1000)?;
    /// // SAFETY: sum.c declares `sum` so, and it reads as many numbers as it is told.
    /// let total = unsafe { sum.call((data.executor_ptr(), data.len())) }?;
    /// # Ok::<(), farlink::Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// As [`Self::lookup`]; also fails if the executor does not call functions of any signature, as LLVM's do not.
    pub fn function<S: Signature>(&self, name: &str) -> Result<Function<S>, Error> {
        let addr = self.lookup(name)?;
        Ok(Function { library: Some(self.clone()), ..self.session().named_function(name, addr)? })
    }
}

impl Session {
    /// Returns the function at an address of the executor's to be called, as [`Library::function`] does.
    ///
    /// # Errors
    ///
    /// Fails if the executor does not call functions of any signature, as LLVM's do not.
    pub fn function_at<S: Signature>(&self, addr: ExecutorAddr) -> Result<Function<S>, Error> {
        self.named_function("the function", addr)
    }

    /// Calls the function at an address of the executor's with words that are known only when the program runs: for those who
    /// know signatures only then. With a `timeout`, a call in another process is waited for that long.
    ///
    /// # Errors
    ///
    /// As [`Function::call`].
    ///
    /// # Safety
    ///
    /// As [`Function::call`]. If the result is in memory, the first integer is for its address.
    pub unsafe fn call_words(
        &self,
        function: ExecutorAddr,
        arguments: Arguments,
        result: ResultShape,
        timeout: Option<Duration>,
    ) -> Result<Returned, Error> {
        let inner = self.inner();
        let (flight, call) = (inner.flights.take_off(), NativeCall { function, result, arguments });
        let returned = if let Connection::InProcess = inner.connection {
            // SAFETY: the executor is this process, and the function may be called so (caller).
            unsafe { farlink_executor::call_native(&call) }.map_err(CallError::OutOfBand)
        } else {
            let pending = inner.runtime()?.executor().bind(CALL_NATIVE)?.call(&call);
            let timed_out = |timeout| inner.stuck(&format!("the function at {function}"), timeout, None);
            match timeout {
                None => pending.wait(),
                Some(timeout) => pending.wait_timeout(timeout).ok_or_else(|| timed_out(timeout))?,
            }
        };
        inner.flights.land(flight);
        let returned = returned.map_err(|error| inner.explain(error.into()))?;
        if returned.bytes().len() == result.bytes() {
            return Ok(returned);
        }
        let text = format!("{} bytes came back for a result of {}", returned.bytes().len(), result.bytes());
        Err(Error::Refused { operation: "call a function", text })
    }

    pub(crate) fn named_function<S: Signature>(&self, name: &str, addr: ExecutorAddr) -> Result<Function<S>, Error> {
        let inner = self.inner();
        let callee = match inner.connection {
            Connection::InProcess => None,
            _ => Some(inner.runtime()?.executor().bind(CALL_NATIVE)?),
        };
        let (session, name, timeout) = (self.clone(), name.into(), inner.call_timeout);
        Ok(Function { session, library: None, name, addr, timeout, executor: None, callee, signature: PhantomData })
    }
}

impl<S: Signature> Function<S> {
    /// Returns the function's address in the executor.
    #[must_use]
    pub fn addr(&self) -> ExecutorAddr {
        self.addr
    }

    /// Sets how long [`Self::call`] waits for a result. The call itself goes on: whoever cannot have that ends the executor
    /// ([`Session::kill`]). In-process, calls run on the calling thread, and take as long as they take.
    #[must_use]
    pub fn with_timeout(mut self, timeout: Duration) -> Self {
        self.timeout = Some(timeout);
        self
    }

    /// Calls the function and waits for its result. In-process it runs on this thread, else on one of the executor's.
    ///
    /// # Errors
    ///
    /// Fails if the executor ends, or the result does not come in time ([`Error::TimedOut`]). An exception or a panic that
    /// the function does not catch ends the executor as it ends a program.
    ///
    /// # Safety
    ///
    /// The function must have this signature, its object must not be removed before it returns, and it must be right to
    /// call it with these arguments. In another process, code that goes wrong can do no harm to this one, except by what it
    /// writes into memory that both share.
    #[inline]
    pub unsafe fn call(&self, args: S::Args) -> Result<<S::Result as CResult>::Value, Error> {
        if self.callee.is_some() {
            return self.call_remote(args);
        }
        let (function, result) = (self.addr, S::Result::SHAPE);
        let call = NativeCall { function, result, arguments: S::arguments(args) };
        let flight = self.inner().flights.take_off();
        // SAFETY: the executor is this process, and the function may be called so (caller).
        let returned = unsafe { farlink_executor::call_native(&call) };
        self.inner().flights.land(flight);
        let returned = returned.map_err(|text| Error::Call(CallError::OutOfBand(text)))?;
        decode::<S>(&returned)
    }

    fn call_remote(&self, args: S::Args) -> Result<<S::Result as CResult>::Value, Error> {
        let given = self.choose()?;
        let running = given.as_ref().map(|given| Arc::clone(&given.0));
        let flight = self.inner().flights.take_off();
        let pending = self.send(args, given);
        let result = match self.timeout {
            None => pending.wait(),
            Some(timeout) => {
                let timed_out = || self.inner().stuck(&self.name, timeout, running.as_deref());
                pending.wait_timeout(timeout).ok_or_else(timed_out)?
            }
        };
        self.inner().flights.land(flight);
        self.finish(result, running)
    }

    /// Chooses an executor for a call, if they are a pool.
    fn choose(&self) -> Result<Option<Given>, Error> {
        let pool = self.inner().pool();
        pool.map(|pool| pool.give(self.executor)).transpose().map_err(|error| self.inner().explain(error))
    }

    /// Calls the function without waiting for its result. In-process it has returned when this returns.
    ///
    /// # Safety
    ///
    /// As [`Self::call`].
    pub unsafe fn start(&self, args: S::Args) -> Pending<Result<<S::Result as CResult>::Value, Error>>
    where
        Self: Send + 'static,
    {
        if self.callee.is_none() {
            // SAFETY: as for this function (caller).
            return Pending::ready(unsafe { self.call(args) });
        }
        let given = match self.choose() {
            Ok(given) => given,
            Err(error) => return Pending::ready(Err(error)),
        };
        let running = given.as_ref().map(|given| Arc::clone(&given.0));
        let (function, flight) = (self.clone(), self.inner().flights.take_off());
        self.send(args, given).map(move |result| {
            function.inner().flights.land(flight);
            function.finish(result, running)
        })
    }

    fn send(&self, args: S::Args, given: Option<Given>) -> Pending<Result<Returned, CallError>> {
        let call = NativeCall { function: self.addr, result: S::Result::SHAPE, arguments: S::arguments(args) };
        match (&self.callee, given) {
            (Some(callee), None) => callee.call(&call),
            (Some(callee), Some(given)) => callee.of(given.0.caller()).call(&call).map(move |result| {
                drop(given);
                result
            }),
            (None, _) => Pending::ready(Err(CallError::Missing(CALL_NATIVE.name()))),
        }
    }

    fn finish(
        &self,
        result: Result<Returned, CallError>,
        running: Option<Arc<Running>>,
    ) -> Result<<S::Result as CResult>::Value, Error> {
        let error = match result {
            Ok(returned) => return decode::<S>(&returned),
            Err(error) => error,
        };
        if let (Some(pool), Some(running)) = (self.inner().pool(), &running) {
            pool.returned(running, &error);
        }
        Err(self.inner().explain_of(running.as_deref(), error.into()))
    }

    fn inner(&self) -> &SessionInner {
        self.session.inner()
    }
}

#[inline]
fn decode<S: Signature>(returned: &Returned) -> Result<<S::Result as CResult>::Value, Error> {
    S::Result::from_returned(returned).ok_or_else(|| Error::Refused {
        operation: "call a function",
        text: format!("{} bytes came back for a result of {}", returned.bytes().len(), S::Result::SHAPE.bytes()),
    })
}

//! What a session asks of its executor besides memory: libraries, symbols, initializers and calls.

use crate::Error;
use crate::support::{FINALIZE, Support};
use crate::thread_local::OpenModule;
use farlink_addr::{ExecutorAddr, ExecutorAddrRange};
use farlink_mem::{DirectoryActions, MemoryManager};
use farlink_rpc::{CallError, Executor, Pending};
use farlink_wire::functions::{
    ALLOW_DEBUGGERS, ALLOW_EXECUTABLE_STACKS, ARE_CODE, DEREGISTER_EH_FRAME, DEREGISTER_EH_FRAME_19, DEREGISTER_GDB,
    DEREGISTER_UNWIND_DIRECTORY, DEREGISTER_UNWIND_INDEX, DYLIB_INSTANCE, DYLIB_LOOKUP, DYLIB_OPEN, DYLIB_OPEN_STATIC,
    DYLIB_RESOLVE, Expected, MAP_FOR_PERF, PID_KEY, PLACE_BELOW, READ_BUFFERS, REGISTER_EH_FRAME, REGISTER_EH_FRAME_19,
    REGISTER_GDB, REGISTER_UNWIND_DIRECTORY, REGISTER_UNWIND_INDEX, RESOLVE, RUN_AS_MAIN, RUN_EXITS, RUN_INITIALIZERS,
    RUN_PROGRAM, SHARED_INSTANCE, SHARED_RENEW, SIMPLE_INSTANCE, TLS_CLOSE, TLS_OPEN, TLS_RESOLVE, TRACE_TAKE,
    WRITE_BUFFERS,
};
use farlink_wire::msg::{
    ActionPair, FiniArray, LookupName, MainCall, RunInitializers, SymbolDef, TlsName, TlsPlace, TlsTemplate, TraceSpan,
    WrapperFunctionCall,
};
use farlink_wire::sps::{SpsError, from_bytes};
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// Why an executor has no thread-local variables for linked code.
const NO_TLS: &str = "it is not farlink's, and has no such function; recompile with -femulated-tls";

/// Spans that are taken of an executor at most: it keeps fewer.
const MAX_TRACE_SPANS: u64 = 1 << 22;

/// Definitions that an executor is asked for.
type Found = Pending<Result<Expected<Vec<Option<SymbolDef>>>, CallError>>;

pub(crate) struct Runtime {
    executor: Executor,
    /// The same, for what takes no longer than the protocol allows: everything but what runs linked code.
    protocol: Executor,
    /// Handle of the executor's process among its libraries, once asked for.
    process: Mutex<Option<ExecutorAddr>>,
    /// How many shared libraries have been opened.
    opened: AtomicU64,
    /// What an executor that is not ours lacks, once it is needed.
    support: Mutex<Option<Arc<Support>>>,
}

impl Runtime {
    pub(crate) fn new(executor: Executor, protocol_timeout: Duration) -> Self {
        let protocol = executor.limited(protocol_timeout);
        Self { executor, protocol, process: Mutex::new(None), opened: AtomicU64::new(0), support: Mutex::new(None) }
    }

    /// Returns the executor for what takes no longer than the protocol allows.
    pub(crate) fn protocol(&self) -> &Executor {
        &self.protocol
    }

    pub(crate) fn executor(&self) -> &Executor {
        &self.executor
    }

    /// Returns how often each function of the executor has been called.
    pub(crate) fn calls(&self) -> BTreeMap<&'static str, u64> {
        self.executor.calls()
    }

    /// Takes what the executor has recorded.
    pub(crate) fn take_trace(&self) -> Result<Vec<TraceSpan>, Error> {
        const AT_ONCE: u64 = 1 << 16;
        let mut all = Vec::new();
        if self.executor.offers(TRACE_TAKE) {
            let take = self.executor.bind(TRACE_TAKE)?;
            // The call itself is recorded: one that gives less than was asked for is the last.
            loop {
                let spans = take.call(&(AT_ONCE,)).wait()?;
                let is_last = (spans.len() as u64) < AT_ONCE;
                all.extend(spans);
                if is_last || all.len() as u64 > MAX_TRACE_SPANS {
                    break;
                }
            }
        }
        Ok(all)
    }

    /// Returns the name under which the executor announces the function at `addr`.
    pub(crate) fn name_of(&self, addr: ExecutorAddr) -> Option<String> {
        let info = self.executor.info();
        let symbols = info.bootstrap_symbols.iter().map(|(name, addr)| (name, *addr));
        let values = info.bootstrap_map.iter().filter_map(|(name, value)| Some((name, from_bytes(value).ok()?)));
        symbols.chain(values).find(|&(_, known)| known == addr).map(|(name, _)| name.clone())
    }

    /// Reads memory by a call.
    pub(crate) fn read(&self, range: ExecutorAddrRange) -> Result<Vec<u8>, Error> {
        let buffers = self.protocol.bind(READ_BUFFERS)?.call(&(vec![range],)).wait()?;
        match <[Vec<u8>; 1]>::try_from(buffers) {
            Ok([bytes]) if bytes.len() as u64 == range.len() => Ok(bytes),
            _ => Err(Error::Refused { operation: "read memory", text: format!("it sent other than {range}") }),
        }
    }

    /// Writes memory by a call.
    pub(crate) fn write(&self, addr: ExecutorAddr, bytes: &[u8]) -> Result<(), Error> {
        Ok(self.protocol.bind(WRITE_BUFFERS)?.call(&(vec![(addr, bytes.to_vec().into())],)).wait()?)
    }

    /// Returns how many shared libraries have been opened.
    pub(crate) fn opened(&self) -> u64 {
        self.opened.load(Ordering::Acquire)
    }

    /// Opens a shared library in the executor. An empty path is the process itself.
    pub(crate) fn open_library(&self, path: &str) -> Result<ExecutorAddr, Error> {
        let instance = self.executor.object(DYLIB_INSTANCE)?;
        let open = self.protocol.bind(DYLIB_OPEN)?.call(&(instance, path.to_owned(), 0)).wait();
        // Also if it failed: some of what it needs may be there.
        self.opened.fetch_add(1, Ordering::Release);
        answer("open the shared library", open?)
    }

    /// As [`Self::open_library`], so that code can count on the distance of these thread-local variables from the thread
    /// pointer, if the executor can do that.
    pub(crate) fn open_static(&self, path: &str, names: Vec<String>) -> Result<ExecutorAddr, Error> {
        if names.is_empty() || !self.executor.offers(DYLIB_OPEN_STATIC) {
            return self.open_library(path);
        }
        let instance = self.executor.object(DYLIB_INSTANCE)?;
        let open = self.protocol.bind(DYLIB_OPEN_STATIC)?.call(&(instance, path.to_owned(), names)).wait();
        self.opened.fetch_add(1, Ordering::Release);
        answer("open the shared library", open?)
    }

    fn process_handle(&self) -> Result<ExecutorAddr, Error> {
        let known = *self.process.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(handle) = known {
            return Ok(handle);
        }
        // Two threads may both ask; every answer names the process.
        let handle = self.open_library("")?;
        *self.process.lock().unwrap_or_else(PoisonError::into_inner) = Some(handle);
        Ok(handle)
    }

    /// Returns the address of each name in the first of `libraries`, or else in the process, that has it.
    pub(crate) fn resolve(
        &self,
        libraries: &[ExecutorAddr],
        names: &[String],
    ) -> Result<Vec<Option<ExecutorAddr>>, Error> {
        if names.is_empty() {
            return Ok(Vec::new());
        }
        let mut handles = libraries.to_vec();
        let found = if self.executor.offers(RESOLVE) {
            // The process.
            handles.push(ExecutorAddr::NULL);
            let call = self.protocol.bind(RESOLVE)?.call(&(handles, names.to_vec()));
            answer("resolve symbols", call.wait()?)?
        } else {
            handles.push(self.process_handle()?);
            self.resolve_one_by_one(&handles, names)?
        };
        if found.len() != names.len() {
            let text = format!("{} addresses came back for {} names", found.len(), names.len());
            return Err(Error::Refused { operation: "resolve symbols", text });
        }
        Ok(found)
    }

    /// As [`Self::resolve`], for an executor that searches one library in a call: all calls are sent, then awaited.
    fn resolve_one_by_one(
        &self,
        handles: &[ExecutorAddr],
        names: &[String],
    ) -> Result<Vec<Option<ExecutorAddr>>, Error> {
        let set: Vec<_> = names.iter().map(|name| LookupName { name: name.clone(), required: false }).collect();
        let calls: Vec<Found> = if let Ok(resolve) = self.protocol.bind(DYLIB_RESOLVE) {
            handles.iter().map(|&handle| resolve.call(&(handle, set.clone()))).collect()
        } else {
            // LLVM 19.
            let lookup = self.protocol.bind(DYLIB_LOOKUP)?;
            let instance = self.executor.object(DYLIB_INSTANCE)?;
            let call = |&handle: &ExecutorAddr| lookup.call(&(instance, handle, set.clone()));
            let some = |definitions: Vec<SymbolDef>| definitions.into_iter().map(Some).collect();
            handles.iter().map(call).map(|call| call.map(move |answer| answer.map(|found| found.map(some)))).collect()
        };
        let mut found = vec![None; names.len()];
        for call in calls {
            let definitions: Vec<Option<SymbolDef>> = answer("resolve symbols", call.wait()?)?;
            for (found, definition) in found.iter_mut().zip(definitions) {
                *found = found.or(definition.map(|definition| definition.addr).filter(|addr| !addr.is_null()));
            }
        }
        Ok(found)
    }

    /// Returns the action that makes pages of data what was linked there, in an executor that has its own copies of them.
    pub(crate) fn renew_action(&self, pages: ExecutorAddrRange) -> Result<ActionPair, Error> {
        let (renew, instance) = (self.executor.bind(SHARED_RENEW)?.addr(), self.executor.object(SHARED_INSTANCE)?);
        Ok(ActionPair { finalize: None, dealloc: Some(WrapperFunctionCall::new(renew, &(instance, pages))) })
    }

    /// Returns the actions that tell the executor's unwinder of an object's unwind information and take it back.
    pub(crate) fn unwind_actions(
        &self,
        index: Option<ExecutorAddrRange>,
        section: Option<ExecutorAddrRange>,
    ) -> Result<Option<ActionPair>, Error> {
        match (index, section) {
            (Some(index), _) if self.executor.offers(REGISTER_UNWIND_INDEX) => {
                let register = self.protocol.bind(REGISTER_UNWIND_INDEX)?.addr();
                let deregister = self.protocol.bind(DEREGISTER_UNWIND_INDEX)?.addr();
                Ok(Some(ActionPair {
                    finalize: Some(WrapperFunctionCall::new(register, &(index,))),
                    dealloc: Some(WrapperFunctionCall::new(deregister, &(index,))),
                }))
            }
            (Some(_), Some(section)) => self.eh_frame_actions(section).map(Some),
            _ => Ok(None),
        }
    }

    /// Returns whether each address is that of code.
    pub(crate) fn are_code(&self, addrs: Vec<ExecutorAddr>) -> Result<Vec<bool>, Error> {
        let operation = "tell functions from data";
        let count = addrs.len();
        let are_code = answer(operation, self.executor.bind(ARE_CODE)?.call(&(addrs,)).wait()?)?;
        if are_code.len() != count {
            let text = format!("{} answers came back for {count} addresses", are_code.len());
            return Err(Error::Refused { operation, text });
        }
        Ok(are_code)
    }

    /// Makes a module of thread-local variables; gives its handle and its place.
    pub(crate) fn open_tls(&self, template: &TlsTemplate) -> Result<(ExecutorAddr, TlsPlace), Error> {
        let operation = "give threads the variables of linked code";
        if !self.executor.offers(TLS_OPEN) {
            return Err(Error::Refused { operation, text: NO_TLS.to_owned() });
        }
        answer(operation, self.protocol.bind(TLS_OPEN)?.call(template).wait()?)
    }

    /// Returns the action that closes a module of thread-local variables.
    pub(crate) fn close_tls_action(&self, handle: ExecutorAddr) -> Result<ActionPair, Error> {
        let close = self.protocol.bind(TLS_CLOSE)?.addr();
        Ok(ActionPair { finalize: None, dealloc: Some(WrapperFunctionCall::new(close, &(handle,))) })
    }

    /// Closes a module that nothing has come to use.
    pub(crate) fn close_tls(&self, module: &OpenModule) {
        let Ok(close) = self.protocol.bind(TLS_CLOSE) else { return };
        for _ in module.users.iter().filter(|&&user| user) {
            // Something has failed before this, which counts; the executor may have closed it already.
            let _ = close.call(&(module.handle,)).wait();
        }
    }

    /// Returns where thread-local variables of shared libraries are.
    pub(crate) fn resolve_tls(&self, names: &[TlsName]) -> Result<Vec<Option<TlsPlace>>, Error> {
        let operation = "find thread-local variables of shared libraries";
        if !self.executor.offers(TLS_RESOLVE) {
            return Err(Error::Refused { operation, text: NO_TLS.to_owned() });
        }
        let places = self.protocol.bind(TLS_RESOLVE)?.call(&(names.to_vec(),)).wait()?;
        let places = answer(operation, places)?;
        if places.len() != names.len() {
            let text = format!("{} places came back for {} names", places.len(), names.len());
            return Err(Error::Refused { operation, text });
        }
        Ok(places)
    }

    /// Lets code run on the stacks of all threads.
    pub(crate) fn allow_executable_stacks(&self) -> Result<(), Error> {
        let operation = "run code on stacks, as pointers to nested functions need it";
        if !self.executor.offers(ALLOW_EXECUTABLE_STACKS) {
            return Err(Error::Refused { operation, text: "it is not farlink's".to_owned() });
        }
        let SpsError(result) = self.protocol.bind(ALLOW_EXECUTABLE_STACKS)?.call(&()).wait()?;
        answer(operation, result)
    }

    fn eh_frame_actions(&self, section: ExecutorAddrRange) -> Result<ActionPair, Error> {
        let either = |name, name_19| self.protocol.bind(name).or_else(|_| self.protocol.bind(name_19));
        let register = either(REGISTER_EH_FRAME, REGISTER_EH_FRAME_19)?.addr();
        let deregister = either(DEREGISTER_EH_FRAME, DEREGISTER_EH_FRAME_19)?.addr();
        Ok(ActionPair {
            finalize: Some(WrapperFunctionCall::new(register, &(section,))),
            dealloc: Some(WrapperFunctionCall::new(deregister, &(section,))),
        })
    }

    /// Returns what an executor that is not ours lacks, or nothing if this one is ours.
    fn support(&self, memory: &MemoryManager) -> Result<Option<Arc<Support>>, Error> {
        if self.executor.offers(RUN_EXITS) && self.executor.offers(RUN_INITIALIZERS) {
            return Ok(None);
        }
        if let Some(support) = &*self.support.lock().unwrap_or_else(PoisonError::into_inner) {
            return Ok(Some(Arc::clone(support)));
        }
        let finalize = self.resolve(&[], &[FINALIZE.to_owned()])?[0];
        let finalize =
            finalize.ok_or(Error::Refused { operation: "find __cxa_finalize", text: "it has none".to_owned() })?;
        // Two threads may both make it; one of them is kept, and the other harms nobody.
        let support = Arc::new(Support::new(memory, finalize)?);
        *self.support.lock().unwrap_or_else(PoisonError::into_inner) = Some(Arc::clone(&support));
        Ok(Some(support))
    }

    /// Returns the id of the executor's process, as it says.
    pub(crate) fn process_id(&self) -> Result<u32, Error> {
        let value = self.executor.info().value(PID_KEY);
        let process = value.and_then(|value| u32::try_from(from_bytes::<u64>(value).ok()?).ok());
        let text = "it is not farlink's, and does not say which process it is".to_owned();
        process.ok_or(Error::Refused { operation: "be told of to profilers", text })
    }

    /// Has the executor map a file, so that profilers see that there is one.
    pub(crate) fn map_for_perf(&self, path: &str) -> Result<(), Error> {
        let SpsError(result) = self.executor.bind(MAP_FOR_PERF)?.call(&(path.to_owned(),)).wait()?;
        answer("map the file for profilers", result)
    }

    /// Has the executor show objects to debuggers from now on.
    pub(crate) fn allow_debuggers(&self) -> Result<(), Error> {
        let operation = "show objects to debuggers";
        if !self.executor.offers(DEREGISTER_GDB) {
            return Err(Error::Refused { operation, text: "it is not farlink's".to_owned() });
        }
        let SpsError(result) = self.executor.bind(ALLOW_DEBUGGERS)?.call(&()).wait()?;
        answer(operation, result)
    }

    /// Returns the actions that show debuggers the file at `file`, and take it back.
    pub(crate) fn debugger_actions(&self, file: ExecutorAddrRange) -> Result<ActionPair, Error> {
        let register = self.executor.bind(REGISTER_GDB)?.addr();
        let deregister = self.executor.bind(DEREGISTER_GDB)?.addr();
        Ok(ActionPair {
            finalize: Some(WrapperFunctionCall::new(register, &(file, true))),
            dealloc: Some(WrapperFunctionCall::new(deregister, &(file,))),
        })
    }

    /// Returns the actions that run what an object left for its end: the last runs first.
    pub(crate) fn end_actions(
        &self,
        memory: &MemoryManager,
        dso_handle: ExecutorAddr,
        fini: &[FiniArray],
    ) -> Result<Vec<ActionPair>, Error> {
        let Some(support) = self.support(memory)? else {
            let exits = self.protocol.bind(RUN_EXITS)?.addr();
            let dealloc = Some(WrapperFunctionCall::new(exits, &(dso_handle,)));
            return Ok(vec![ActionPair { finalize: None, dealloc }]);
        };
        let mut fini = fini.to_vec();
        fini.sort_by_key(|array| array.priority);
        let mut actions: Vec<_> = fini.iter().map(|array| support.fini_action(array.array)).collect();
        actions.push(support.exits_action(dso_handle));
        Ok(actions)
    }

    pub(crate) fn run_initializers(&self, memory: &MemoryManager, request: &RunInitializers) -> Result<(), Error> {
        if let Some(support) = self.support(memory)? {
            if !request.ifuncs.is_empty() {
                let text = "it is not farlink's, and has no such function".to_owned();
                return Err(Error::Refused { operation: "choose among the implementations of an IFUNC", text });
            }
            // What runs at the end are actions there.
            return request.init.iter().try_for_each(|&array| support.run(&self.executor, array));
        }
        let SpsError(result) = self.executor.bind(RUN_INITIALIZERS)?.call(request).wait()?;
        answer("run initializers", result)
    }

    pub(crate) fn run_as_main(&self, call: &MainCall) -> Result<Pending<Result<i64, CallError>>, Error> {
        Ok(self.executor.bind(RUN_AS_MAIN)?.call(call))
    }

    /// Runs `main` and then ends the executor's process. Returns only with why that was not possible, or with the
    /// end of the connection.
    pub(crate) fn run_program(&self, call: &MainCall) -> Result<std::convert::Infallible, Error> {
        let SpsError(result) = self.executor.bind(RUN_PROGRAM)?.call(call).wait()?;
        answer("run the program", result)?;
        let unexpected = "the program's end was answered instead of ending the process";
        Err(Error::Refused { operation: "run the program", text: unexpected.to_owned() })
    }

    /// Whether programs can be run to the end of the executor's process.
    pub(crate) fn can_run_programs(&self) -> bool {
        self.executor.offers(RUN_PROGRAM)
    }
}

/// Returns the actions that tell an executor's unwinder of the directories of reservations, if it knows such.
pub(crate) fn directory_actions(executor: &Executor) -> Option<DirectoryActions> {
    let register = executor.bind(REGISTER_UNWIND_DIRECTORY).ok()?.addr();
    let deregister = executor.bind(DEREGISTER_UNWIND_DIRECTORY).ok()?.addr();
    Some(Arc::new(move |code, table, indexes| ActionPair {
        finalize: Some(WrapperFunctionCall::new(register, &(code, table, indexes))),
        dealloc: Some(WrapperFunctionCall::new(deregister, &(table,))),
    }))
}

/// Has the executor place what it reserves from now on below `limit`.
pub(crate) fn place_below(executor: &Executor, limit: ExecutorAddr) -> Result<(), Error> {
    let operation = "place linked code in low memory";
    if !executor.offers(PLACE_BELOW) {
        return Err(Error::Refused { operation, text: "it is not farlink's; recompile with -fPIC".to_owned() });
    }
    let instance = executor.object(SIMPLE_INSTANCE)?;
    let SpsError(result) = executor.bind(PLACE_BELOW)?.call(&(instance, limit.as_u64())).wait()?;
    answer(operation, result)
}

fn answer<T>(operation: &'static str, answer: Expected<T>) -> Result<T, Error> {
    answer.map_err(|text| Error::Refused { operation, text })
}

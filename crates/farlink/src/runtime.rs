//! What a session asks of its executor besides memory: libraries, symbols, initializers and calls.

use crate::Error;
use crate::support::{FINALIZE, Support};
use farlink_addr::{ExecutorAddr, ExecutorAddrRange};
use farlink_mem::MemoryManager;
use farlink_rpc::{CallError, Executor, Pending};
use farlink_wire::functions::{
    DEREGISTER_EH_FRAME, DEREGISTER_EH_FRAME_19, DYLIB_INSTANCE, DYLIB_LOOKUP, DYLIB_OPEN, DYLIB_RESOLVE, Expected,
    READ_BUFFERS, REGISTER_EH_FRAME, REGISTER_EH_FRAME_19, RESOLVE, RUN_AS_MAIN, RUN_EXITS, RUN_INITIALIZERS,
    RUN_PROGRAM, WRITE_BUFFERS,
};
use farlink_wire::msg::{ActionPair, FiniArray, LookupName, MainCall, RunInitializers, SymbolDef, WrapperFunctionCall};
use farlink_wire::sps::SpsError;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

/// Definitions that an executor is asked for.
type Found = Pending<Result<Expected<Vec<Option<SymbolDef>>>, CallError>>;

pub(crate) struct Runtime {
    executor: Executor,
    /// Handle of the executor's process among its libraries, once asked for.
    process: Mutex<Option<ExecutorAddr>>,
    /// What an executor that is not ours lacks, once it is needed.
    support: Mutex<Option<Arc<Support>>>,
}

impl Runtime {
    pub(crate) fn new(executor: Executor) -> Self {
        Self { executor, process: Mutex::new(None), support: Mutex::new(None) }
    }

    /// Returns how often each function of the executor has been called.
    pub(crate) fn calls(&self) -> BTreeMap<&'static str, u64> {
        self.executor.calls()
    }

    /// Reads memory by a call.
    pub(crate) fn read(&self, range: ExecutorAddrRange) -> Result<Vec<u8>, Error> {
        let buffers = self.executor.bind(READ_BUFFERS)?.call(&(vec![range],)).wait()?;
        match <[Vec<u8>; 1]>::try_from(buffers) {
            Ok([bytes]) if bytes.len() as u64 == range.len() => Ok(bytes),
            _ => Err(Error::Refused { operation: "read memory", text: format!("it sent other than {range}") }),
        }
    }

    /// Writes memory by a call.
    pub(crate) fn write(&self, addr: ExecutorAddr, bytes: &[u8]) -> Result<(), Error> {
        Ok(self.executor.bind(WRITE_BUFFERS)?.call(&(vec![(addr, bytes.to_vec().into())],)).wait()?)
    }

    /// Opens a shared library in the executor. An empty path is the process itself.
    pub(crate) fn open_library(&self, path: &str) -> Result<ExecutorAddr, Error> {
        let instance = self.executor.object(DYLIB_INSTANCE)?;
        let open = self.executor.bind(DYLIB_OPEN)?;
        answer("open the shared library", open.call(&(instance, path.to_owned(), 0)).wait()?)
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
        handles.push(self.process_handle()?);
        let found = if self.executor.offers(RESOLVE) {
            let call = self.executor.bind(RESOLVE)?.call(&(handles, names.to_vec()));
            answer("resolve symbols", call.wait()?)?
        } else {
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
        let calls: Vec<Found> = if let Ok(resolve) = self.executor.bind(DYLIB_RESOLVE) {
            handles.iter().map(|&handle| resolve.call(&(handle, set.clone()))).collect()
        } else {
            // LLVM 19.
            let lookup = self.executor.bind(DYLIB_LOOKUP)?;
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

    /// Returns the actions that register an `.eh_frame` section with the executor's unwinder and remove it again.
    pub(crate) fn eh_frame_actions(&self, section: ExecutorAddrRange) -> Result<ActionPair, Error> {
        let either = |name, name_19| self.executor.bind(name).or_else(|_| self.executor.bind(name_19));
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

    /// Returns the actions that run what an object left for its end: the last runs first.
    pub(crate) fn end_actions(
        &self,
        memory: &MemoryManager,
        dso_handle: ExecutorAddr,
        fini: &[FiniArray],
    ) -> Result<Vec<ActionPair>, Error> {
        let Some(support) = self.support(memory)? else {
            let exits = self.executor.bind(RUN_EXITS)?.addr();
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
            // What runs at the end are actions there.
            return request.init.iter().try_for_each(|&array| support.run(&self.executor, array));
        }
        let SpsError(result) = self.executor.bind(RUN_INITIALIZERS)?.call(request).wait()?;
        answer("run initializers", result)
    }

    pub(crate) fn run_as_main(&self, call: &MainCall) -> Result<i64, Error> {
        Ok(self.executor.bind(RUN_AS_MAIN)?.call(call).wait()?)
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

fn answer<T>(operation: &'static str, answer: Expected<T>) -> Result<T, Error> {
    answer.map_err(|text| Error::Refused { operation, text })
}

//! Every function that an executor offers, by the name it is announced under, with its types.
//!
//! Names of LLVM's are bootstrap symbols. Names that begin `farlink.` are keys of the bootstrap map whose values
//! are addresses; an executor that is not ours has none of them. Functions marked *19* or *22* belong to the
//! dialect of that LLVM release only.
//!
//! A function taking an `instance` wants the address announced under the service's `_Instance` name, unchanged.

use crate::msg::{
    FinalizeRequest, LookupName, MainCall, MemoryUsage, RunInitializers, SharedFinalizeRequest, Stripe, SymbolDef,
    TlsName, TlsPlace, TlsTemplate, TraceSpan,
};
use crate::native::{NativeCall, Returned};
use crate::setup::ExecutorInfo;
use crate::sps::{Blob, SpsError, from_bytes};
use farlink_addr::{ExecutorAddr, ExecutorAddrRange};
use std::marker::PhantomData;

/// A wrapper function: the name it is announced under and the types of its arguments and its result.
pub struct Function<Args, Ret> {
    name: &'static str,
    types: PhantomData<fn(Args) -> Ret>,
}

impl<Args, Ret> Clone for Function<Args, Ret> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<Args, Ret> Copy for Function<Args, Ret> {}

impl<Args, Ret> Function<Args, Ret> {
    const fn new(name: &'static str) -> Self {
        Self { name, types: PhantomData }
    }

    /// Returns the name that the function is announced under.
    #[must_use]
    pub const fn name(self) -> &'static str {
        self.name
    }

    /// Returns the function's address in the executor that introduced itself with `info`.
    #[must_use]
    pub fn find(self, info: &ExecutorInfo) -> Option<ExecutorAddr> {
        if is_own(self.name) { from_bytes(info.value(self.name)?).ok() } else { info.symbol(self.name) }
            .filter(|addr: &ExecutorAddr| !addr.is_null())
    }

    /// Announces that the function is at `addr`.
    pub fn announce(self, addr: ExecutorAddr, info: &mut ExecutorInfo) {
        if is_own(self.name) {
            info.set_value(self.name, &addr);
        } else {
            info.bootstrap_symbols.push((self.name.to_owned(), addr));
        }
    }
}

fn is_own(name: &str) -> bool {
    name.starts_with("farlink.")
}

/// What an operation of a service gives back.
pub type Expected<T> = Result<T, String>;

macro_rules! functions {
    ($($(#[$doc:meta])* $const:ident = $name:literal: ($args:ty) -> $ret:ty;)*) => {$(
        $(#[$doc])*
        pub const $const: Function<$args, $ret> = Function::new($name);
    )*};
}

/// Key of the version of farlink's additions, a u64: see [`FARLINK_VERSION`].
pub const VERSION_KEY: &str = "farlink.version";

/// The version of farlink's additions to the protocol that this crate describes.
pub const FARLINK_VERSION: u64 = 1;

/// Key of the executor's process id, a u64.
pub const PID_KEY: &str = "farlink.pid";

/// Key of the version of the shared ring that the executor understands, a u64: see [`RING_VERSION`]. Announced over a
/// connection that passes descriptors.
pub const RING_KEY: &str = "farlink.ring";

/// The version of the shared ring that this crate describes.
///
/// A controller that wants one makes shared memory for it and sends the descriptor with the tag [`RING_TAG`]; from then
/// on both ends may put Call and Result messages into it in place of the connection.
pub const RING_VERSION: u64 = 1;

/// Tag of the Descriptor message that brings the memory of the shared ring.
pub const RING_TAG: u64 = u64::MAX;

// The shared memory service: ranges that both processes map.

/// Instance of the shared memory service.
pub const SHARED_INSTANCE: &str = "__llvm_orc_ExecutorSharedMemoryMapperService_Instance";

functions! {
    /// (instance, bytes): reserves a range; gives its base and the name of the POSIX shared memory object behind it.
    SHARED_RESERVE = "__llvm_orc_ExecutorSharedMemoryMapperService_Reserve":
        ((ExecutorAddr, u64)) -> Expected<(ExecutorAddr, String)>;
    /// (instance, reservation, request): finalizes; gives the key, which is the lowest address.
    SHARED_INITIALIZE = "__llvm_orc_ExecutorSharedMemoryMapperService_Initialize":
        ((ExecutorAddr, ExecutorAddr, SharedFinalizeRequest)) -> Expected<ExecutorAddr>;
    /// (instance, keys): runs dealloc actions, last key first, and gives the memory back to its reservation.
    SHARED_DEINITIALIZE = "__llvm_orc_ExecutorSharedMemoryMapperService_Deinitialize":
        ((ExecutorAddr, Vec<ExecutorAddr>)) -> SpsError;
    /// (instance, bases): ends reservations, with whatever is still allocated in them.
    SHARED_RELEASE = "__llvm_orc_ExecutorSharedMemoryMapperService_Release":
        ((ExecutorAddr, Vec<ExecutorAddr>)) -> SpsError;
    /// (instance, tag, bytes, stripes): maps the shared memory object whose descriptor was sent with that tag; gives the
    /// base. With stripes, each is mapped with its protection, and nothing between them; finalizing changes no
    /// protection. Without, all is readable and writable until it is finalized. Announced over a connection that passes
    /// descriptors.
    SHARED_MAP = "farlink.shared.map": ((ExecutorAddr, u64, u64, Vec<Stripe>)) -> Expected<ExecutorAddr>;
    /// (instance, tag, bytes, stripes, base): as [`SHARED_MAP`], at `base` or not at all. Each page that can be written and
    /// that children do not share becomes this process's own when it first writes it: what the object has stays as it is.
    /// Announced likewise.
    SHARED_MAP_AT = "farlink.shared.map_at": ((ExecutorAddr, u64, u64, Vec<Stripe>, ExecutorAddr)) -> Expected<ExecutorAddr>;
    /// (instance, pages): an action. Pages of data of a reservation of [`SHARED_MAP_AT`] are what the object has, again.
    SHARED_RENEW = "farlink.shared.renew": ((ExecutorAddr, ExecutorAddrRange)) -> SpsError;
    /// (instance, (reservation, request) of each allocation): finalizes all or none; gives their keys.
    SHARED_INITIALIZE_BATCH = "farlink.shared.initialize_batch":
        ((ExecutorAddr, Vec<(ExecutorAddr, SharedFinalizeRequest)>)) -> Expected<Vec<ExecutorAddr>>;
}

/// Instance of the simple memory manager.
pub const SIMPLE_INSTANCE: &str = "__llvm_orc_SimpleExecutorMemoryManager_Instance";

// The simple memory manager: private memory, whose content arrives in messages.
functions! {
    /// (instance, bytes): reserves a range; gives its base.
    SIMPLE_RESERVE = "__llvm_orc_SimpleExecutorMemoryManager_reserve_wrapper":
        ((ExecutorAddr, u64)) -> Expected<ExecutorAddr>;
    /// *22.* (instance, request): copies content in and finalizes; gives the key, which is the lowest address.
    SIMPLE_INITIALIZE = "__llvm_orc_SimpleExecutorMemoryManager_initialize_wrapper":
        ((ExecutorAddr, FinalizeRequest<'static>)) -> Expected<ExecutorAddr>;
    /// *22.* (instance, keys): runs dealloc actions, last key first, and gives the memory back to its reservation.
    SIMPLE_DEINITIALIZE = "__llvm_orc_SimpleExecutorMemoryManager_deinitialize_wrapper":
        ((ExecutorAddr, Vec<ExecutorAddr>)) -> SpsError;
    /// *22.* (instance, bases): ends reservations, with whatever is still allocated in them.
    SIMPLE_RELEASE = "__llvm_orc_SimpleExecutorMemoryManager_release_wrapper":
        ((ExecutorAddr, Vec<ExecutorAddr>)) -> SpsError;
    /// *19.* (instance, request): as initialize, the key being the reservation's base.
    SIMPLE_FINALIZE = "__llvm_orc_SimpleExecutorMemoryManager_finalize_wrapper":
        ((ExecutorAddr, FinalizeRequest<'static>)) -> SpsError;
    /// *19.* (instance, bases): as release.
    SIMPLE_DEALLOCATE = "__llvm_orc_SimpleExecutorMemoryManager_deallocate_wrapper":
        ((ExecutorAddr, Vec<ExecutorAddr>)) -> SpsError;
    /// (instance, request of each allocation): finalizes all or none; gives their keys.
    SIMPLE_INITIALIZE_BATCH = "farlink.simple.initialize_batch":
        ((ExecutorAddr, Vec<FinalizeRequest<'static>>)) -> Expected<Vec<ExecutorAddr>>;
}

functions! {
    /// (instance of either memory service, limit): places what is reserved from now on below the address `limit`; 0 is
    /// none.
    PLACE_BELOW = "farlink.memory.place_below": ((ExecutorAddr, u64)) -> SpsError;
    /// (instance of either memory service): what it holds of the system.
    MEMORY_USAGE = "farlink.memory.usage": ((ExecutorAddr,)) -> Expected<MemoryUsage>;
}

/// Instance of the dynamic library manager.
pub const DYLIB_INSTANCE: &str = "__llvm_orc_SimpleExecutorDylibManager_Instance";

functions! {
    /// (instance, path, mode): opens a library; an empty path is the process itself, the mode is 0.
    DYLIB_OPEN = "__llvm_orc_SimpleExecutorDylibManager_open_wrapper":
        ((ExecutorAddr, String, u64)) -> Expected<ExecutorAddr>;
    /// (instance, path, names): opens a library as [`DYLIB_OPEN`] does. Where it has thread-local variables of these names,
    /// they are at the same distance from every thread's pointer, if there is room for that.
    DYLIB_OPEN_STATIC = "farlink.dylib.open_static":
        ((ExecutorAddr, String, Vec<String>)) -> Expected<ExecutorAddr>;
    /// *22.* (handle, names): addresses, in the order asked. A required name that is missing has none; another has
    /// the null address.
    DYLIB_RESOLVE = "__llvm_orc_SimpleExecutorDylibManager_resolve_wrapper":
        ((ExecutorAddr, Vec<LookupName>)) -> Expected<Vec<Option<SymbolDef>>>;
    /// *19.* (instance, handle, names): addresses, in the order asked. A missing name that is required is an error.
    DYLIB_LOOKUP = "__llvm_orc_SimpleExecutorDylibManager_lookup_wrapper":
        ((ExecutorAddr, ExecutorAddr, Vec<LookupName>)) -> Expected<Vec<SymbolDef>>;
    /// (handles, names): the address of each name in the first library that has it. The null handle is the process itself.
    RESOLVE = "farlink.resolve": ((Vec<ExecutorAddr>, Vec<String>)) -> Expected<Vec<Option<ExecutorAddr>>>;
    /// (addresses): whether each is that of code.
    ARE_CODE = "farlink.are_code": ((Vec<ExecutorAddr>,)) -> Expected<Vec<bool>>;
}

// Calls.
functions! {
    /// (main, arguments): calls a function like C's `main`; gives its result. No program name is added.
    RUN_AS_MAIN = "__llvm_orc_bootstrap_run_as_main_wrapper": (MainCall) -> i64;
    /// (function): calls an `int32_t f(void)`.
    RUN_AS_VOID_FUNCTION = "__llvm_orc_bootstrap_run_as_void_function_wrapper": ((ExecutorAddr,)) -> i32;
    /// (function, argument): calls an `int32_t f(int32_t)`.
    RUN_AS_INT_FUNCTION = "__llvm_orc_bootstrap_run_as_int_function_wrapper": ((ExecutorAddr, i32)) -> i32;
    /// Calls a C function of any arguments; gives what it returned. Runs on a thread of its own, beside others.
    CALL_NATIVE = "farlink.call": (NativeCall) -> Returned;
    /// Runs initializers, and records what is to be done at the end.
    RUN_INITIALIZERS = "farlink.run_initializers": (RunInitializers) -> SpsError;
    /// An action: runs what the object with this `__dso_handle` left for its end, if it has not run.
    RUN_EXITS = "farlink.run_exits": ((ExecutorAddr,)) -> SpsError;
    /// Calls `main` on the process's main thread, then `exit` with its result. Answers only if it cannot.
    RUN_PROGRAM = "farlink.run_program": (MainCall) -> SpsError;
}

// Tracing.
functions! {
    /// Records from now on what is called and when; gives the time on the executor's monotonic clock, in nanoseconds.
    TRACE_START = "farlink.trace.start": (()) -> u64;
    /// What has been recorded and not been taken: at most as many spans as asked for, the first first.
    TRACE_TAKE = "farlink.trace.take": ((u64,)) -> Vec<TraceSpan>;
}

// Profiling.
functions! {
    /// (path): maps the beginning of a file, executable, so that profilers see that this process has it.
    MAP_FOR_PERF = "farlink.perf.map": ((String,)) -> SpsError;
}

// Thread-local storage.
functions! {
    /// Makes a module of a template; gives its handle and its place.
    TLS_OPEN = "farlink.tls.open": (TlsTemplate) -> Expected<(ExecutorAddr, TlsPlace)>;
    /// (handle): an action. When a module has been closed as often as it has users, it goes.
    TLS_CLOSE = "farlink.tls.close": ((ExecutorAddr,)) -> SpsError;
    /// (names): where thread-local variables of shared libraries are. Names that no library has are absent.
    TLS_RESOLVE = "farlink.tls.resolve": ((Vec<TlsName>,)) -> Expected<Vec<Option<TlsPlace>>>;
    /// Lets code run on the stacks of all threads.
    ALLOW_EXECUTABLE_STACKS = "farlink.allow_executable_stacks": (()) -> SpsError;
}

// Actions.
functions! {
    /// (code, table, indexes): has the unwinder look for unwind information in a directory of a reservation: see
    /// `farlink_mem`'s `directory`.
    REGISTER_UNWIND_DIRECTORY = "farlink.unwind.register_directory":
        ((ExecutorAddrRange, ExecutorAddrRange, ExecutorAddrRange)) -> SpsError;
    /// (table): undoes [`REGISTER_UNWIND_DIRECTORY`].
    DEREGISTER_UNWIND_DIRECTORY = "farlink.unwind.deregister_directory": ((ExecutorAddrRange,)) -> SpsError;
    /// Registers the index of an object's unwind information: see `farlink_graph`.
    REGISTER_UNWIND_INDEX = "farlink.unwind.register": ((ExecutorAddrRange,)) -> SpsError;
    /// Undoes [`REGISTER_UNWIND_INDEX`].
    DEREGISTER_UNWIND_INDEX = "farlink.unwind.deregister": ((ExecutorAddrRange,)) -> SpsError;
    /// *22.* Registers an `.eh_frame` section with the unwinder.
    REGISTER_EH_FRAME = "llvm_orc_registerEHFrameAllocAction": ((ExecutorAddrRange,)) -> SpsError;
    /// *22.* Undoes [`REGISTER_EH_FRAME`].
    DEREGISTER_EH_FRAME = "llvm_orc_deregisterEHFrameAllocAction": ((ExecutorAddrRange,)) -> SpsError;
    /// *19.* Registers an `.eh_frame` section with the unwinder.
    REGISTER_EH_FRAME_19 = "llvm_orc_registerEHFrameSectionWrapper": ((ExecutorAddrRange,)) -> SpsError;
    /// *19.* Undoes [`REGISTER_EH_FRAME_19`].
    DEREGISTER_EH_FRAME_19 = "llvm_orc_deregisterEHFrameSectionWrapper": ((ExecutorAddrRange,)) -> SpsError;
    /// *22.* (debug object, notify): shows an object to a debugger.
    REGISTER_GDB = "llvm_orc_registerJITLoaderGDBAllocAction": ((ExecutorAddrRange, bool)) -> SpsError;
    /// (debug object): undoes [`REGISTER_GDB`].
    DEREGISTER_GDB = "farlink.gdb.deregister": ((ExecutorAddrRange,)) -> SpsError;
    /// Lets processes of the same user debug this one where the system lets only its ancestors. No action.
    ALLOW_DEBUGGERS = "farlink.gdb.allow": (()) -> SpsError;
    /// *19.* (debug object, notify): shows an object to a debugger.
    REGISTER_GDB_19 = "llvm_orc_registerJITLoaderGDBWrapper": ((ExecutorAddrRange, bool)) -> SpsError;
}

// Memory of the executor. Results are plain: an address that cannot be accessed has no encoding but failure.
functions! {
    /// (address, value) of each write.
    WRITE_UINT8S = "__llvm_orc_bootstrap_mem_write_uint8s_wrapper": ((Vec<(ExecutorAddr, u8)>,)) -> ();
    /// (address, value) of each write.
    WRITE_UINT16S = "__llvm_orc_bootstrap_mem_write_uint16s_wrapper": ((Vec<(ExecutorAddr, u16)>,)) -> ();
    /// (address, value) of each write.
    WRITE_UINT32S = "__llvm_orc_bootstrap_mem_write_uint32s_wrapper": ((Vec<(ExecutorAddr, u32)>,)) -> ();
    /// (address, value) of each write.
    WRITE_UINT64S = "__llvm_orc_bootstrap_mem_write_uint64s_wrapper": ((Vec<(ExecutorAddr, u64)>,)) -> ();
    /// *22.* (address, pointer) of each write.
    WRITE_POINTERS = "__llvm_orc_bootstrap_mem_write_pointers_wrapper":
        ((Vec<(ExecutorAddr, ExecutorAddr)>,)) -> ();
    /// (address, bytes) of each write.
    WRITE_BUFFERS = "__llvm_orc_bootstrap_mem_write_buffers_wrapper":
        ((Vec<(ExecutorAddr, Blob<'static>)>,)) -> ();
    /// *22.* The value at each address.
    READ_UINT8S = "__llvm_orc_bootstrap_mem_read_uint8s_wrapper": ((Vec<ExecutorAddr>,)) -> Vec<u8>;
    /// *22.* The value at each address.
    READ_UINT16S = "__llvm_orc_bootstrap_mem_read_uint16s_wrapper": ((Vec<ExecutorAddr>,)) -> Vec<u16>;
    /// *22.* The value at each address.
    READ_UINT32S = "__llvm_orc_bootstrap_mem_read_uint32s_wrapper": ((Vec<ExecutorAddr>,)) -> Vec<u32>;
    /// *22.* The value at each address.
    READ_UINT64S = "__llvm_orc_bootstrap_mem_read_uint64s_wrapper": ((Vec<ExecutorAddr>,)) -> Vec<u64>;
    /// *22.* The pointer at each address.
    READ_POINTERS = "__llvm_orc_bootstrap_mem_read_pointers_wrapper":
        ((Vec<ExecutorAddr>,)) -> Vec<ExecutorAddr>;
    /// *22.* The bytes in each range.
    READ_BUFFERS = "__llvm_orc_bootstrap_mem_read_buffers_wrapper":
        ((Vec<ExecutorAddrRange>,)) -> Vec<Vec<u8>>;
    /// *22.* The C string at each address, without its NUL.
    READ_STRINGS = "__llvm_orc_bootstrap_mem_read_strings_wrapper": ((Vec<ExecutorAddr>,)) -> Vec<Vec<u8>>;
}

functions! {
    /// (instance, tag): leaves a report of a fault in the memory whose descriptor was sent with that tag, should this
    /// process die of one: see [`report`](crate::report). Announced over a connection that passes descriptors.
    LEAVE_REPORTS = "farlink.reports.leave": ((ExecutorAddr, u64)) -> SpsError;
    /// (instance, flags): locks the process: from now on no memory becomes executable in it but what the controller writes.
    /// Gives what has been done for that, each with the reason if it could not be done. Flags: [`HARDEN_SANDBOX`].
    HARDEN = "farlink.harden": ((ExecutorAddr, u64)) -> Expected<Vec<(String, String)>>;
}

/// A flag of [`HARDEN`]: no files by name, and no network.
pub const HARDEN_SANDBOX: u64 = 1;

// Calls from the executor to the controller.

/// What to pass to [`DISPATCH_FN`] as its context.
pub const DISPATCH_CONTEXT: &str = "__llvm_orc_SimpleRemoteEPC_dispatch_ctx";

/// A C function of the executor through which linked code calls the controller.
pub const DISPATCH_FN: &str = "__llvm_orc_SimpleRemoteEPC_dispatch_fn";

/// Key of the code that stubs for functions of the controller jump to, with the address of their
/// [`CallbackDescriptor`](crate::native::CallbackDescriptor) in r10. It calls the controller's function with the arguments
/// that the C function was called with, as [`Arguments`](crate::native::Arguments), and returns to C what comes back, a
/// [`Returned`]. If that is an error, the process ends.
pub const CALLBACK_ENTRY_KEY: &str = "farlink.callback.entry";

/// Key of code that is entered as that of [`CALLBACK_ENTRY_KEY`], for a function of the controller without arguments that
/// returns an address. The call that led there goes on at that address, with all its arguments as they were.
pub const LAZY_ENTRY_KEY: &str = "farlink.callback.lazy_entry";

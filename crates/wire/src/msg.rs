//! The composite values that calls carry.

use crate::sps::{Blob, Decode, DecodeError, Encode, Input, sps_struct};
use farlink_addr::{AllocGroup, ExecutorAddr, ExecutorAddrRange, MemLifetime, MemProt};

/// One byte: read 1, write 2, execute 4, finalize lifetime 8 (LLVM: `RemoteAllocGroup`).
///
/// Memory without a place in the executor is never sent, so its lifetime has no encoding and is sent as standard.
impl Encode for AllocGroup {
    fn encode(&self, out: &mut Vec<u8>) {
        let lifetime = if self.lifetime == MemLifetime::Finalize { 8 } else { 0 };
        out.push(self.prot.bits() | lifetime);
    }
}

impl Decode<'_> for AllocGroup {
    const MIN_BYTES: usize = 1;

    fn decode(input: &mut Input<'_>) -> Result<Self, DecodeError> {
        let bits = u8::decode(input)?;
        let prot = MemProt::from_bits(bits & !8)
            .ok_or(DecodeError::InvalidValue { what: "an allocation group", value: u64::from(bits) })?;
        let lifetime = if bits & 8 == 0 { MemLifetime::Standard } else { MemLifetime::Finalize };
        Ok(Self { lifetime, prot })
    }
}

/// A call of a wrapper function with its encoded arguments.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WrapperFunctionCall {
    /// The function's address in the executor. Null where a call is absent.
    pub function: ExecutorAddr,
    /// The SPS encoding of the arguments.
    pub args: Blob<'static>,
}

impl WrapperFunctionCall {
    /// Returns the call of `function` with `args`.
    #[must_use]
    pub fn new(function: ExecutorAddr, args: &impl Encode) -> Self {
        Self { function, args: crate::sps::to_bytes(args).into() }
    }

    const ABSENT: Self = Self { function: ExecutorAddr::NULL, args: Blob(std::borrow::Cow::Borrowed(&[])) };
}

impl Encode for WrapperFunctionCall {
    fn encode(&self, out: &mut Vec<u8>) {
        (self.function, &self.args).encode(out);
    }
}

impl Decode<'_> for WrapperFunctionCall {
    const MIN_BYTES: usize = 16;

    fn decode(input: &mut Input<'_>) -> Result<Self, DecodeError> {
        let function = Decode::decode(input)?;
        Ok(Self { function, args: Blob::decode(input)?.into_owned().into() })
    }
}

/// What runs when memory is finalized, and what undoes it when the memory is deallocated (LLVM:
/// `AllocActionCallPair`). On the wire an absent call is one of the null address without arguments.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct ActionPair {
    /// Runs after protections have been applied, in the order of the request.
    pub finalize: Option<WrapperFunctionCall>,
    /// Runs when the memory is deallocated, in reverse order, if `finalize` is absent or succeeded.
    pub dealloc: Option<WrapperFunctionCall>,
}

impl Encode for ActionPair {
    fn encode(&self, out: &mut Vec<u8>) {
        for call in [&self.finalize, &self.dealloc] {
            call.as_ref().unwrap_or(&WrapperFunctionCall::ABSENT).encode(out);
        }
    }
}

impl Decode<'_> for ActionPair {
    const MIN_BYTES: usize = 32;

    fn decode(input: &mut Input<'_>) -> Result<Self, DecodeError> {
        let mut call = || WrapperFunctionCall::decode(input).map(|call| (!call.function.is_null()).then_some(call));
        Ok(Self { finalize: call()?, dealloc: call()? })
    }
}

/// A segment whose content is in shared memory already.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SharedSegment {
    /// Protection and lifetime.
    pub group: AllocGroup,
    /// First address.
    pub addr: ExecutorAddr,
    /// Length in bytes, zero fill included.
    pub size: u64,
}

sps_struct!(SharedSegment { group: AllocGroup, addr: ExecutorAddr, size: u64 });

/// What to finalize in a shared reservation (LLVM: `SharedMemoryFinalizeRequest`).
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct SharedFinalizeRequest {
    /// The segments, in the order in which protections are applied.
    pub segments: Vec<SharedSegment>,
    /// The actions, in the order in which they run.
    pub actions: Vec<ActionPair>,
}

sps_struct!(SharedFinalizeRequest { segments: Vec<SharedSegment>, actions: Vec<ActionPair> });

/// A segment that carries its content (LLVM: `SegFinalizeRequest`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Segment<'a> {
    /// Protection and lifetime.
    pub group: AllocGroup,
    /// First address.
    pub addr: ExecutorAddr,
    /// Length in bytes. What `content` leaves of it is zero.
    pub size: u64,
    /// The first bytes, at most `size`.
    pub content: Blob<'a>,
}

sps_struct!(Segment<'a> { group: AllocGroup, addr: ExecutorAddr, size: u64, content: Blob<'a> });

/// What to finalize in memory that the controller does not share (LLVM: `FinalizeRequest`).
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct FinalizeRequest<'a> {
    /// The segments, in the order in which they are filled and protected.
    pub segments: Vec<Segment<'a>>,
    /// The actions, in the order in which they run.
    pub actions: Vec<ActionPair>,
}

sps_struct!(FinalizeRequest<'a> { segments: Vec<Segment<'a>>, actions: Vec<ActionPair> });

/// A part of a reservation that has one protection for its whole life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stripe {
    /// Its protection. The lifetime is standard.
    pub group: AllocGroup,
    /// Where it begins, in bytes from the start of the reservation and of the memory behind it. Whole pages.
    pub offset: u64,
    /// Length in bytes. Whole pages.
    pub size: u64,
    /// Whether children that the executor forks share it, instead of getting a copy, if it can be written.
    pub shared_with_children: bool,
}

sps_struct!(Stripe { group: AllocGroup, offset: u64, size: u64, shared_with_children: bool });

impl Stripe {
    /// Returns whether a child that the executor forks gets a copy.
    #[must_use]
    pub fn is_copied_on_fork(&self) -> bool {
        self.group.prot.contains(MemProt::WRITE) && !self.shared_with_children
    }
}

/// Something that an executor did, and when.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TraceSpan {
    /// The function that was called: one of those announced, or linked code.
    pub function: ExecutorAddr,
    /// The system's number of the thread.
    pub thread: u64,
    /// When it began, in nanoseconds of the system's monotonic clock.
    pub start: u64,
    /// When it ended.
    pub end: u64,
}

sps_struct!(TraceSpan { function: ExecutorAddr, thread: u64, start: u64, end: u64 });

/// What an executor's memory service holds of the system.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MemoryUsage {
    /// Bytes of physical memory behind its reservations.
    pub committed_bytes: u64,
    /// Mappings that its reservations consist of, guards included.
    pub mappings: u64,
    /// System calls that its memory layer has made, by name.
    pub system_calls: Vec<(String, u64)>,
}

sps_struct!(MemoryUsage { committed_bytes: u64, mappings: u64, system_calls: Vec<(String, u64)> });

/// A name to look up (LLVM: `RemoteSymbolLookupSetElement`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LookupName {
    /// The symbol's name.
    pub name: String,
    /// Whether its absence is an error.
    pub required: bool,
}

sps_struct!(LookupName { name: String, required: bool });

/// An address and what is known of it (LLVM: `ExecutorSymbolDef`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SymbolDef {
    /// The address, null where a symbol that was not required is missing.
    pub addr: ExecutorAddr,
    /// LLVM's `JITSymbolFlags`: see [`SymbolDef::EXPORTED`].
    pub flags: u8,
    /// Flags of the target, unused on x86-64.
    pub target_flags: u8,
}

impl SymbolDef {
    /// The flag that every symbol of a library has.
    pub const EXPORTED: u8 = 0x10;

    /// Returns the definition of an exported symbol at `addr`.
    #[must_use]
    pub const fn exported(addr: ExecutorAddr) -> Self {
        Self { addr, flags: Self::EXPORTED, target_flags: 0 }
    }
}

sps_struct!(SymbolDef { addr: ExecutorAddr, flags: u8, target_flags: u8 });

/// Functions that an object runs when the program ends or the object is removed, for example its `.fini_array`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FiniArray {
    /// An array of function pointers.
    pub array: ExecutorAddrRange,
    /// Order among all arrays: those with a lower number run later, as their initializers ran earlier.
    pub priority: u32,
}

sps_struct!(FiniArray { array: ExecutorAddrRange, priority: u32 });

/// What an object leaves to be done at its end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ObjectExits {
    /// The object's `__dso_handle`: what it passes to `__cxa_atexit`, and its identity here.
    pub dso_handle: ExecutorAddr,
    /// Its arrays of finalizers.
    pub fini: Vec<FiniArray>,
}

sps_struct!(ObjectExits { dso_handle: ExecutorAddr, fini: Vec<FiniArray> });

/// A request to run initializers.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct RunInitializers {
    /// Arrays of function pointers, in the order in which they run.
    pub init: Vec<ExecutorAddrRange>,
    /// What is to be done at the end of the objects that are initialized here, recorded before `init` runs.
    pub exits: Vec<ObjectExits>,
    /// (resolver, slot) of each IFUNC: before all else each resolver is called, and its result goes into the slot.
    pub ifuncs: Vec<(ExecutorAddr, ExecutorAddr)>,
    /// The program's arguments: initializers get them as `main` does. Not empty: the program's name is the first.
    pub args: Vec<Blob<'static>>,
}

/// Owned copies of arguments: texts of any bytes.
fn decode_args(input: &mut Input<'_>) -> Result<Vec<Blob<'static>>, DecodeError> {
    Ok(Vec::<Blob<'_>>::decode(input)?.into_iter().map(|arg| arg.into_owned().into()).collect())
}

impl Encode for RunInitializers {
    fn encode(&self, out: &mut Vec<u8>) {
        (&self.init, &self.exits, &self.ifuncs, &self.args).encode(out);
    }
}

impl Decode<'_> for RunInitializers {
    const MIN_BYTES: usize = 32;

    fn decode(input: &mut Input<'_>) -> Result<Self, DecodeError> {
        Ok(Self {
            init: Decode::decode(input)?,
            exits: Decode::decode(input)?,
            ifuncs: Decode::decode(input)?,
            args: decode_args(input)?,
        })
    }
}

/// Thread-local variables that every thread is to have.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TlsTemplate {
    /// The initial values of the first of them. The others are zero.
    pub content: Blob<'static>,
    /// Length in bytes of all of them.
    pub size: u64,
    /// Alignment of the first byte: a power of two.
    pub align: u64,
    /// Whether their distance from the thread pointer has to be the same in all threads.
    pub is_static: bool,
    /// How often the module is to be closed before it goes.
    pub users: u64,
}

impl Encode for TlsTemplate {
    fn encode(&self, out: &mut Vec<u8>) {
        (&self.content, self.size, self.align, self.is_static, self.users).encode(out);
    }
}

impl Decode<'_> for TlsTemplate {
    const MIN_BYTES: usize = 33;

    fn decode(input: &mut Input<'_>) -> Result<Self, DecodeError> {
        let content: Blob<'_> = Decode::decode(input)?;
        Ok(Self {
            content: content.into_owned().into(),
            size: Decode::decode(input)?,
            align: Decode::decode(input)?,
            is_static: Decode::decode(input)?,
            users: Decode::decode(input)?,
        })
    }
}

/// A thread-local variable of a shared library.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TlsName {
    /// The symbol's name.
    pub name: String,
    /// Whether its distance from the thread pointer has to be the same in all threads.
    pub is_static: bool,
}

sps_struct!(TlsName { name: String, is_static: bool });

/// A module with thread-local variables, or one variable of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TlsPlace {
    /// The dynamic linker's number of the module.
    pub module: u64,
    /// Offset in the module.
    pub offset: u64,
    /// Distance from the thread pointer, if that is the same in all threads: a two's complement number.
    pub tp_offset: Option<u64>,
}

sps_struct!(TlsPlace { module: u64, offset: u64, tp_offset: Option<u64> });

/// A call of a function like C's `main`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MainCall {
    /// Address of the function.
    pub main: ExecutorAddr,
    /// The arguments, the program's name first. Any bytes but NUL.
    pub args: Vec<Blob<'static>>,
}

impl Encode for MainCall {
    fn encode(&self, out: &mut Vec<u8>) {
        (self.main, &self.args).encode(out);
    }
}

impl Decode<'_> for MainCall {
    const MIN_BYTES: usize = 16;

    fn decode(input: &mut Input<'_>) -> Result<Self, DecodeError> {
        Ok(Self { main: Decode::decode(input)?, args: decode_args(input)? })
    }
}

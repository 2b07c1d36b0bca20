//! What executors that are not ours lack, as code that is put into them: running initializers and finalizers, and what an
//! object has registered for its end.
//!
//! Three wrapper functions, each of which takes encoded addresses and returns that all went well. The program's arguments
//! do not get to initializers this way: they see none.

use crate::Error;
use farlink_addr::{Align, AllocGroup, ExecutorAddr, ExecutorAddrRange, MemProt};
use farlink_mem::{FinalizedAlloc, MemoryManager, SegmentLayout};
use farlink_rpc::Executor;
use farlink_wire::msg::{ActionPair, WrapperFunctionCall};
use farlink_wire::sps::SpsError;

/// The function of the C library that runs what was registered for the end of an object.
pub(crate) const FINALIZE: &str = "__cxa_finalize";

/// (handle): calls [`FINALIZE`].
///
/// ```text
/// push %rbx
/// mov (%rdi), %rdi
/// movabs $__cxa_finalize, %rax       its address is at 6
/// call *%rax
/// xor %eax, %eax                     one byte, 0: an SPS error that is none
/// mov $1, %edx
/// pop %rbx
/// ret
/// ```
const EXITS: [u8; 32] = [
    0x53, 0x48, 0x8b, 0x3f, 0x48, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xd0, 0x31, 0xc0, 0xba, 1, 0, 0, 0, 0x5b, 0xc3,
    0xcc, 0xcc, 0xcc, 0xcc, 0xcc, 0xcc, 0xcc,
];
const FINALIZE_OFFSET: u64 = 6;

/// (start, end): calls the functions of an array from its start, with no arguments of a program. Entries of 0 and -1 are
/// none.
///
/// ```text
///    push %rbx; push %r12; push %rax
///    mov (%rdi), %rbx; mov 8(%rdi), %r12
/// 1: cmp %r12, %rbx; jae 2f
///    mov (%rbx), %rax; add $8, %rbx
///    lea -1(%rax), %rcx; cmp $-3, %rcx; ja 1b
///    xor %edi, %edi                  argc
///    lea null(%rip), %rsi            argv and the environment: a null pointer
///    mov %rsi, %rdx
///    call *%rax; jmp 1b
/// 2: xor %eax, %eax; mov $1, %edx
///    pop %rcx; pop %r12; pop %rbx; ret
/// ```
const FORWARD: [u8; 64] = [
    0x53, 0x41, 0x54, 0x50, 0x48, 0x8b, 0x1f, 0x4c, 0x8b, 0x67, 0x08, 0x4c, 0x39, 0xe3, 0x73, 0x21, 0x48, 0x8b, 0x03,
    0x48, 0x83, 0xc3, 0x08, 0x48, 0x8d, 0x48, 0xff, 0x48, 0x83, 0xf9, 0xfd, 0x77, 0xea, 0x31, 0xff, 0x48, 0x8d, 0x35,
    0x56, 0, 0, 0, 0x48, 0x89, 0xf2, 0xff, 0xd0, 0xeb, 0xda, 0x31, 0xc0, 0xba, 1, 0, 0, 0, 0x59, 0x41, 0x5c, 0x5b,
    0xc3, 0xcc, 0xcc, 0xcc,
];
const FORWARD_OFFSET: u64 = 32;

/// (start, end): calls the functions of an array from its end.
///
/// ```text
///    push %rbx; push %r12; push %rax
///    mov (%rdi), %rbx; mov 8(%rdi), %r12
/// 1: cmp %rbx, %r12; jbe 2f
///    sub $8, %r12; mov (%r12), %rax
///    lea -1(%rax), %rcx; cmp $-3, %rcx; ja 1b
///    call *%rax; jmp 1b
/// 2: xor %eax, %eax; mov $1, %edx
///    pop %rcx; pop %r12; pop %rbx; ret
/// ```
const BACKWARD: [u8; 64] = [
    0x53, 0x41, 0x54, 0x50, 0x48, 0x8b, 0x1f, 0x4c, 0x8b, 0x67, 0x08, 0x49, 0x39, 0xdc, 0x76, 0x16, 0x49, 0x83, 0xec,
    0x08, 0x49, 0x8b, 0x04, 0x24, 0x48, 0x8d, 0x48, 0xff, 0x48, 0x83, 0xf9, 0xfd, 0x77, 0xe9, 0xff, 0xd0, 0xeb, 0xe5,
    0x31, 0xc0, 0xba, 1, 0, 0, 0, 0x59, 0x41, 0x5c, 0x5b, 0xc3, 0xcc, 0xcc, 0xcc, 0xcc, 0xcc, 0xcc, 0xcc, 0xcc, 0xcc,
    0xcc, 0xcc, 0xcc, 0xcc, 0xcc,
];
const BACKWARD_OFFSET: u64 = 96;

/// Where the null pointer is, and the end.
const NULL_OFFSET: u64 = 160;
const BYTES: u64 = 168;

/// The functions, in the executor.
pub(crate) struct Support {
    start: ExecutorAddr,
    _memory: FinalizedAlloc,
}

impl Support {
    /// Puts the functions into the executor.
    pub(crate) fn new(memory: &MemoryManager, finalize: ExecutorAddr) -> Result<Self, Error> {
        let layout = SegmentLayout {
            group: AllocGroup::standard(MemProt::RX),
            content_bytes: BYTES,
            zero_fill_bytes: 0,
            align: Align::new(16).expect("16 is a power of two"),
        };
        let alloc = memory.allocate(vec![layout]).wait()?;
        let working = &alloc.segments()[0].working;
        working.write(0, &EXITS)?;
        working.write(FINALIZE_OFFSET, &finalize.as_u64().to_le_bytes())?;
        working.write(FORWARD_OFFSET, &FORWARD)?;
        working.write(BACKWARD_OFFSET, &BACKWARD)?;
        working.write(NULL_OFFSET, &[0; 8])?;
        let start = alloc.segments()[0].range.start();
        let _memory = memory.finalize(vec![(alloc, Vec::new())]).wait()?.remove(0);
        Ok(Self { start, _memory })
    }

    fn at(&self, offset: u64) -> ExecutorAddr {
        self.start.checked_add(offset).expect("the functions are inside their segment")
    }

    /// Returns the action that runs what an object has registered for its end.
    pub(crate) fn exits_action(&self, dso_handle: ExecutorAddr) -> ActionPair {
        self.at_the_end(WrapperFunctionCall::new(self.start, &(dso_handle,)))
    }

    /// Makes a call an action for the end. LLVM 19 calls the null function where there is none for the beginning, so there
    /// is one: it runs an array of no functions.
    fn at_the_end(&self, dealloc: WrapperFunctionCall) -> ActionPair {
        let nothing = (ExecutorAddr::NULL, ExecutorAddr::NULL);
        let finalize = WrapperFunctionCall::new(self.at(BACKWARD_OFFSET), &nothing);
        ActionPair { finalize: Some(finalize), dealloc: Some(dealloc) }
    }

    /// Returns the action that runs an array of finalizers.
    pub(crate) fn fini_action(&self, array: ExecutorAddrRange) -> ActionPair {
        self.at_the_end(WrapperFunctionCall::new(self.at(BACKWARD_OFFSET), &(array.start(), array.end())))
    }

    /// Runs an array of initializers.
    pub(crate) fn run(&self, executor: &Executor, array: ExecutorAddrRange) -> Result<(), Error> {
        let forward =
            executor.callee::<(ExecutorAddr, ExecutorAddr), SpsError>("initializers", self.at(FORWARD_OFFSET));
        match forward.call(&(array.start(), array.end())).wait()? {
            SpsError(Ok(())) => Ok(()),
            SpsError(Err(text)) => Err(Error::Refused { operation: "run initializers", text }),
        }
    }
}

//! Reading and writing this process's memory for the controller.
//!
//! The kernel does the access (`process_vm_readv(2)`, `process_vm_writev(2)` on the own process), so that an address
//! that is not mapped, or not writable, is an error and not the end of the process.

use crate::wrap::{OutOfBand, wrappers};
use farlink_addr::{ExecutorAddr, ExecutorAddrRange};

wrappers! { announce:
    WRITE_UINT8S => write_uint8s = write_values::<u8>;
    WRITE_UINT16S => write_uint16s = write_values::<u16>;
    WRITE_UINT32S => write_uint32s = write_values::<u32>;
    WRITE_UINT64S => write_uint64s = write_values::<u64>;
    WRITE_POINTERS => write_pointers = write_values::<ExecutorAddr>;
    WRITE_BUFFERS => write_buffers = write_all_buffers;
    READ_UINT8S => read_uint8s = read_values::<u8>;
    READ_UINT16S => read_uint16s = read_values::<u16>;
    READ_UINT32S => read_uint32s = read_values::<u32>;
    READ_UINT64S => read_uint64s = read_values::<u64>;
    READ_POINTERS => read_pointers = read_values::<ExecutorAddr>;
    READ_BUFFERS => read_buffers = read_all_buffers;
    READ_STRINGS => read_strings = read_all_strings;
}

/// Most bytes that one call reads.
const MAX_READ_BYTES: u64 = 256 << 20;

/// Strings are read in pieces that do not cross a multiple of this, and so no page boundary.
const STRING_PIECE_BYTES: u64 = 256;

/// A value as memory has it.
trait Value: Copy {
    const BYTES: usize;
    fn from_bytes(bytes: &[u8]) -> Self;
    fn to_bytes(self) -> [u8; 8];
}

macro_rules! values {
    ($($int:ty),*) => {$(
        impl Value for $int {
            const BYTES: usize = size_of::<$int>();

            fn from_bytes(bytes: &[u8]) -> Self {
                let mut value = [0; Self::BYTES];
                value.copy_from_slice(bytes);
                <$int>::from_le_bytes(value)
            }

            fn to_bytes(self) -> [u8; 8] {
                u64::from(self).to_le_bytes()
            }
        }
    )*};
}

values!(u8, u16, u32, u64);

impl Value for ExecutorAddr {
    const BYTES: usize = 8;

    fn from_bytes(bytes: &[u8]) -> Self {
        Self::new(u64::from_bytes(bytes))
    }

    fn to_bytes(self) -> [u8; 8] {
        self.as_u64().to_le_bytes()
    }
}

fn write_values<T: Value>((writes,): (Vec<(ExecutorAddr, T)>,)) -> Result<(), OutOfBand> {
    writes.into_iter().try_for_each(|(addr, value)| write(addr, &value.to_bytes()[..T::BYTES]))
}

fn write_all_buffers((writes,): (Vec<(ExecutorAddr, Vec<u8>)>,)) -> Result<(), OutOfBand> {
    writes.iter().try_for_each(|(addr, bytes)| write(*addr, bytes))
}

fn read_values<T: Value>((addrs,): (Vec<ExecutorAddr>,)) -> Result<Vec<T>, OutOfBand> {
    let value = |addr| {
        let mut bytes = [0; 8];
        read(addr, &mut bytes[..T::BYTES])?;
        Ok(T::from_bytes(&bytes[..T::BYTES]))
    };
    addrs.into_iter().map(value).collect()
}

fn read_all_buffers((ranges,): (Vec<ExecutorAddrRange>,)) -> Result<Vec<Vec<u8>>, OutOfBand> {
    let mut left = MAX_READ_BYTES;
    let buffer = |range: ExecutorAddrRange| {
        left = left.checked_sub(range.len()).ok_or_else(too_much)?;
        let mut bytes = vec![0; range.len() as usize];
        read(range.start(), &mut bytes)?;
        Ok(bytes)
    };
    ranges.into_iter().map(buffer).collect()
}

fn read_all_strings((addrs,): (Vec<ExecutorAddr>,)) -> Result<Vec<Vec<u8>>, OutOfBand> {
    let mut left = MAX_READ_BYTES;
    addrs.into_iter().map(|addr| read_string(addr, &mut left)).collect()
}

fn read_string(mut addr: ExecutorAddr, left: &mut u64) -> Result<Vec<u8>, OutOfBand> {
    let mut string = Vec::new();
    loop {
        let piece_bytes = STRING_PIECE_BYTES - addr.as_u64() % STRING_PIECE_BYTES;
        *left = left.checked_sub(piece_bytes).ok_or_else(too_much)?;
        let mut piece = [0; STRING_PIECE_BYTES as usize];
        let piece = &mut piece[..piece_bytes as usize];
        read(addr, piece)?;
        if let Some(end) = piece.iter().position(|&byte| byte == 0) {
            string.extend_from_slice(&piece[..end]);
            return Ok(string);
        }
        string.extend_from_slice(piece);
        addr = addr.checked_add(piece_bytes).ok_or("a string passes the end of the address space")?;
    }
}

fn too_much() -> String {
    format!("more than {MAX_READ_BYTES} bytes cannot be read in one call")
}

fn read(addr: ExecutorAddr, bytes: &mut [u8]) -> Result<(), OutOfBand> {
    let local = libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() };
    let remote = libc::iovec { iov_base: addr.as_u64() as usize as *mut _, iov_len: bytes.len() };
    // SAFETY: `local` is the slice; the kernel checks `remote`, and only reads it.
    let count = unsafe { libc::process_vm_readv(own_pid(), &local, 1, &remote, 1, 0) };
    if count == bytes.len() as isize { Ok(()) } else { Err(failed("read", addr, bytes.len(), count)) }
}

fn write(addr: ExecutorAddr, bytes: &[u8]) -> Result<(), OutOfBand> {
    let local = libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() };
    let remote = libc::iovec { iov_base: addr.as_u64() as usize as *mut _, iov_len: bytes.len() };
    // SAFETY: `local` is the slice, which the kernel only reads; it checks `remote`. What may be written is for the
    // controller to know: this process trusts it with its own memory.
    let count = unsafe { libc::process_vm_writev(own_pid(), &local, 1, &remote, 1, 0) };
    if count == bytes.len() as isize { Ok(()) } else { Err(failed("written", addr, bytes.len(), count)) }
}

/// Writes this process's memory; an address that cannot be written is an error.
pub(crate) fn write_own_memory(addr: u64, bytes: &[u8]) -> Result<(), OutOfBand> {
    write(ExecutorAddr::new(addr), bytes)
}

fn own_pid() -> libc::pid_t {
    // Process ids are small positive numbers.
    std::process::id() as libc::pid_t
}

/// Describes an access of which the kernel did `count` bytes, or none if that is negative.
fn failed(what: &str, addr: ExecutorAddr, len: usize, count: isize) -> String {
    match u64::try_from(count) {
        Ok(count) => format!("{len} bytes at {addr} cannot be {what}: only {count} are accessible"),
        Err(_) => format!("{len} bytes at {addr} cannot be {what}: {}", std::io::Error::last_os_error()),
    }
}

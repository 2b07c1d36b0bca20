//! Seals on the code and the constants of the program and its libraries: their mappings stay as they are.
//!
//! What the dynamic linker has made read-only once it was done is part of that: linked code cannot open it again and put
//! other addresses there. See mseal(2).

use libc::{c_int, c_void, dl_phdr_info, size_t};

const SYS_MSEAL: libc::c_long = 462;

/// Seals what is loaded.
pub(super) fn loaded_objects() -> Result<(), String> {
    let mut result: Result<(), String> = Ok(());
    // SAFETY: the function takes what is passed with it, which lives until the call returns.
    unsafe { libc::dl_iterate_phdr(Some(seal_object), (&raw mut result).cast()) };
    result
}

/// Seals one loaded object. Those without code are not sealed: modules of thread-local variables come and go.
unsafe extern "C" fn seal_object(info: *mut dl_phdr_info, _size: size_t, result: *mut c_void) -> c_int {
    // SAFETY: the dynamic linker passes a description of an object.
    let info = unsafe { info.read() };
    let count = usize::from(info.dlpi_phnum);
    // SAFETY: the object has as many program headers there, and stays loaded during the call.
    let headers = unsafe { std::slice::from_raw_parts(info.dlpi_phdr, count) };
    if !headers.iter().any(|header| header.p_type == libc::PT_LOAD && header.p_flags & libc::PF_X != 0) {
        return 0;
    }
    let is_fixed = |header: &&libc::Elf64_Phdr| {
        header.p_type == libc::PT_GNU_RELRO || header.p_type == libc::PT_LOAD && header.p_flags & libc::PF_W == 0
    };
    for header in headers.iter().filter(is_fixed) {
        let page = farlink_mem::page_size().bytes();
        let start = info.dlpi_addr + header.p_vaddr;
        let end = start + header.p_memsz;
        // The dynamic linker protects whole pages inside what it is told, and maps whole pages around what it loads.
        let (start, end) = match header.p_type {
            libc::PT_GNU_RELRO => (start & !(page - 1), end & !(page - 1)),
            _ => (start & !(page - 1), end.next_multiple_of(page)),
        };
        if start >= end {
            continue;
        }
        // SAFETY: sealing changes nothing about what is there.
        if unsafe { libc::syscall(SYS_MSEAL, start, end - start, 0usize) } != 0 {
            let error = std::io::Error::last_os_error();
            // SAFETY: the caller passes its result.
            unsafe { result.cast::<Result<(), String>>().write(Err(error.to_string())) };
            return 1;
        }
    }
    0
}

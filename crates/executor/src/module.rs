//! Modules made for the dynamic linker: shared objects of a few bytes, which ask it for what only it can give.
//!
//! Every thread's block of thread-local variables is the C library's to make, for threads that are there and for those to
//! come. It does so for the shared objects that it has loaded. So linked code's variables are given to it as such an
//! object: nothing but a template, and relocations by which it says where it has put them.
//!
//! See the gABI, "Dynamic Linking", and the psABI, "Thread-Local Storage".

use libc::{c_int, c_void};
use rustix::fs::MemfdFlags;
use std::ffi::{CStr, CString};
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};

/// What a module is made of.
#[derive(Default)]
pub(crate) struct Module<'a> {
    /// Initial values of thread-local variables, if it has any.
    pub(crate) template: Option<Template<'a>>,
    /// Relocations against thread-local variables of other modules, or of its own.
    pub(crate) requests: Vec<Request<'a>>,
    /// A library that is to be loaded with it, for all to see.
    pub(crate) needs: Option<&'a CStr>,
    /// Whether it wants stacks that code can run on.
    pub(crate) executable_stack: bool,
}

/// Thread-local variables.
pub(crate) struct Template<'a> {
    pub(crate) content: &'a [u8],
    /// Length in bytes, at least that of the content.
    pub(crate) size: u64,
    /// A power of two.
    pub(crate) align: u64,
}

/// What the dynamic linker is asked to write into a word of the module.
pub(crate) struct Request<'a> {
    /// The variable; none is the first byte of the module's own template.
    pub(crate) name: Option<&'a CStr>,
    pub(crate) what: What,
}

/// See the psABI, "Relocation Types".
#[derive(Clone, Copy)]
pub(crate) enum What {
    /// `R_X86_64_DTPMOD64`.
    ModuleId = 16,
    /// `R_X86_64_DTPOFF64`.
    Offset = 17,
    /// `R_X86_64_TPOFF64`.
    TpOffset = 18,
}

const HEADER_BYTES: u64 = 64;
const PROGRAM_HEADER_BYTES: u64 = 56;
const SYMBOL_BYTES: u64 = 24;
const RELA_BYTES: u64 = 24;
const DYNAMIC_BYTES: u64 = 16;
const WORD_BYTES: u64 = 8;

/// Alignment of what is mapped.
const PAGE_BYTES: u64 = 4096;

// Types and flags of program headers.
const PT_LOAD: u32 = 1;
const PT_DYNAMIC: u32 = 2;
const PT_TLS: u32 = 7;
const PT_GNU_STACK: u32 = 0x6474_e551;
const PF_X: u32 = 1;
const PF_RW: u32 = 6;

// Tags of dynamic entries.
const DT_NEEDED: u64 = 1;
const DT_STRTAB: u64 = 5;
const DT_SYMTAB: u64 = 6;
const DT_RELA: u64 = 7;
const DT_RELASZ: u64 = 8;
const DT_RELAENT: u64 = 9;
const DT_STRSZ: u64 = 10;
const DT_SYMENT: u64 = 11;

/// A weak symbol that is thread-local: its absence is no error.
const WEAK_TLS: u8 = 2 << 4 | 6;

/// Where the parts of a module are: offsets in the file, and from its base in memory.
struct Layout {
    dynamic: u64,
    symbols: u64,
    strings: u64,
    relocations: u64,
    words: u64,
    template: u64,
    end: u64,
}

/// Dynamic entries: eight, and the null one that ends them.
const DYNAMIC_ENTRIES: u64 = 9;

impl Module<'_> {
    fn names(&self) -> impl Iterator<Item = &CStr> {
        self.requests.iter().filter_map(|request| request.name)
    }

    /// The strings: after an empty one, the names of symbols, then that of the library.
    fn strings(&self) -> impl Iterator<Item = &CStr> {
        self.names().chain(self.needs)
    }

    fn layout(&self) -> Layout {
        let dynamic = HEADER_BYTES + 4 * PROGRAM_HEADER_BYTES;
        let symbols = dynamic + DYNAMIC_ENTRIES * DYNAMIC_BYTES;
        let strings = symbols + (1 + self.names().count() as u64) * SYMBOL_BYTES;
        let string_bytes = 1 + self.strings().map(|name| name.count_bytes() as u64 + 1).sum::<u64>();
        let relocations = (strings + string_bytes).next_multiple_of(WORD_BYTES);
        let words = relocations + self.requests.len() as u64 * RELA_BYTES;
        let words_end = words + self.requests.len() as u64 * WORD_BYTES;
        let (align, content) =
            self.template.as_ref().map_or((1, 0), |template| (template.align, template.content.len() as u64));
        let template = words_end.next_multiple_of(align);
        Layout { dynamic, symbols, strings, relocations, words, template, end: template + content }
    }

    /// Returns the file up to its template.
    fn head(&self, layout: &Layout) -> Vec<u8> {
        let mut file = Writer(Vec::with_capacity(layout.words as usize));
        file.bytes(&[0x7f, b'E', b'L', b'F', 2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        // A shared object for x86-64, version 1, without an entry; program headers follow at once, no sections.
        file.half(3).half(62).word(1).double(0).double(HEADER_BYTES).double(0).word(0);
        file.half(HEADER_BYTES as u16).half(PROGRAM_HEADER_BYTES as u16).half(4).half(64).half(0).half(0);
        let mut segment = |kind: u32, flags: u32, start: u64, file_bytes: u64, memory_bytes: u64, align: u64| {
            file.word(kind).word(flags).double(start).double(start).double(start);
            file.double(file_bytes).double(memory_bytes).double(align);
        };
        segment(PT_LOAD, PF_RW, 0, layout.end, layout.end, PAGE_BYTES);
        segment(PT_DYNAMIC, PF_RW, layout.dynamic, DYNAMIC_ENTRIES * DYNAMIC_BYTES, DYNAMIC_ENTRIES * DYNAMIC_BYTES, 8);
        let stack_flags = PF_RW | if self.executable_stack { PF_X } else { 0 };
        segment(PT_GNU_STACK, stack_flags, 0, 0, 0, 16);
        match &self.template {
            Some(template) => {
                let content = template.content.len() as u64;
                segment(PT_TLS, 4, layout.template, content, template.size, template.align);
            }
            None => segment(0, 0, 0, 0, 0, 0),
        }
        let string_bytes = 1 + self.strings().map(|name| name.count_bytes() as u64 + 1).sum::<u64>();
        let entries = [
            (DT_STRTAB, layout.strings),
            (DT_STRSZ, layout.relocations - layout.strings),
            (DT_SYMTAB, layout.symbols),
            (DT_SYMENT, SYMBOL_BYTES),
            (DT_RELA, layout.relocations),
            (DT_RELASZ, layout.words - layout.relocations),
            (DT_RELAENT, RELA_BYTES),
            self.needs.map_or((0, 0), |name| (DT_NEEDED, string_bytes - name.count_bytes() as u64 - 1)),
            (0, 0),
        ];
        for (tag, value) in entries {
            file.double(tag).double(value);
        }
        file.bytes(&[0; SYMBOL_BYTES as usize]);
        let mut string = 1;
        for name in self.names() {
            file.word(string).bytes(&[WEAK_TLS, 0]).half(0).double(0).double(0);
            string += name.count_bytes() as u32 + 1;
        }
        file.bytes(&[0]);
        for name in self.strings() {
            file.bytes(name.to_bytes_with_nul());
        }
        file.0.resize(layout.relocations as usize, 0);
        let mut symbol = 0;
        for (request, position) in self.requests.iter().zip(0..) {
            symbol += u64::from(request.name.is_some());
            let number = if request.name.is_some() { symbol } else { 0 };
            file.double(layout.words + position * WORD_BYTES).double(number << 32 | request.what as u64).double(0);
        }
        file.0
    }

    /// Has the dynamic linker load the module.
    ///
    /// # Errors
    ///
    /// Gives the dynamic linker's words if it cannot.
    pub(crate) fn load(&self) -> Result<LoadedModule, String> {
        let layout = self.layout();
        let failed = |what: &str, error: rustix::io::Errno| format!("{what}: {error}");
        let flags = MemfdFlags::CLOEXEC;
        // It is no program, which a hardened executor has to say. Kernels before 6.3 do not know the flag.
        let file = rustix::fs::memfd_create(c"farlink-module", flags | MemfdFlags::NOEXEC_SEAL)
            .or_else(|_| rustix::fs::memfd_create(c"farlink-module", flags))
            .map_err(|error| failed("no memory for a module", error))?;
        let write = |bytes: &[u8], offset| write_at(&file, bytes, offset);
        rustix::fs::ftruncate(&file, layout.end.next_multiple_of(PAGE_BYTES))
            .and_then(|()| write(&self.head(&layout), 0))
            .and_then(|()| write(self.template.as_ref().map_or(&[], |template| template.content), layout.template))
            .map_err(|error| failed("a module cannot be written", error))?;
        let path = unique_path(&file);
        let scope = if self.needs.is_some() { libc::RTLD_GLOBAL } else { libc::RTLD_LOCAL };
        // SAFETY: the path is a C string. The module has no code; what runs is what a library begins with that its user
        // wants to have opened.
        let handle = unsafe { libc::dlopen(path.as_ptr(), libc::RTLD_NOW | scope) };
        if handle.is_null() {
            let text = crate::services::dl_error();
            // The path means nothing to anybody else.
            let own = format!("{}: ", path.to_string_lossy());
            return Err(text.strip_prefix(&own).unwrap_or(&text).to_owned());
        }
        let base = load_address(handle).ok_or("the dynamic linker does not say where a module is")?;
        let words = (base + layout.words) as usize as *const u64;
        // SAFETY: the module has been loaded there, with as many words.
        let results = (0..self.requests.len()).map(|index| unsafe { words.wrapping_add(index).read() }).collect();
        Ok(LoadedModule { handle: handle as u64, results, template: base + layout.template })
    }
}

/// A module that is loaded. Dropping it does not unload it.
pub(crate) struct LoadedModule {
    pub(crate) handle: u64,
    /// The answers to its requests.
    pub(crate) results: Vec<u64>,
    /// Where its initial values are: what threads that start from now on begin with.
    pub(crate) template: u64,
}

impl LoadedModule {
    pub(crate) fn unload(self) {
        // SAFETY: the handle is one that dlopen gave, and is not used again.
        unsafe { libc::dlclose(self.handle as usize as *mut c_void) };
    }
}

struct Writer(Vec<u8>);

impl Writer {
    fn bytes(&mut self, bytes: &[u8]) -> &mut Self {
        self.0.extend_from_slice(bytes);
        self
    }

    fn half(&mut self, value: u16) -> &mut Self {
        self.bytes(&value.to_le_bytes())
    }

    fn word(&mut self, value: u32) -> &mut Self {
        self.bytes(&value.to_le_bytes())
    }

    fn double(&mut self, value: u64) -> &mut Self {
        self.bytes(&value.to_le_bytes())
    }
}

fn write_at(file: &OwnedFd, mut bytes: &[u8], mut offset: u64) -> rustix::io::Result<()> {
    while !bytes.is_empty() {
        let written = rustix::io::pwrite(file, bytes, offset)?;
        bytes = &bytes[written..];
        offset += written as u64;
    }
    Ok(())
}

/// Returns a path to an open file that no other has had: the dynamic linker takes two of one path for one. The digits of a
/// number are written as ways to stay in a folder.
fn unique_path(file: &OwnedFd) -> CString {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    let digits = (0..u64::BITS - number.leading_zeros()).map(|bit| if number >> bit & 1 == 0 { "//" } else { "/." });
    // Not `self`: a debugger opens it too.
    let path = format!("/proc/{}/fd{}/{}", std::process::id(), digits.collect::<String>(), file.as_raw_fd());
    CString::new(path).expect("digits and slashes have no NUL")
}

/// The beginning of what the dynamic linker tells of a module.
#[repr(C)]
struct LinkMap {
    base: u64,
}

fn load_address(handle: *mut c_void) -> Option<u64> {
    const RTLD_DI_LINKMAP: c_int = 2;
    let mut map: *const LinkMap = std::ptr::null();
    // SAFETY: the handle is one that dlopen gave, and the dynamic linker writes one pointer.
    let result = unsafe { libc::dlinfo(handle, RTLD_DI_LINKMAP, (&raw mut map).cast()) };
    // SAFETY: the pointer is to a structure that begins with the base, and stays while the module does.
    (result == 0 && !map.is_null()).then(|| unsafe { (*map).base })
}

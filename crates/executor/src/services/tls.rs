//! Thread-local variables of linked code, and where those of shared libraries are.
//!
//! Each link's variables are a module of the dynamic linker's, which gives every thread its own, with their initial values,
//! when the thread starts or first uses them. Where code wants them at one distance from every thread's pointer, they come
//! from what the C library keeps for that, which is little and is never given back but from its end. So such modules stay
//! when they are closed, and are taken for others when there is no more.

use crate::module::{LoadedModule, Module, Request, Template, What};
use crate::wrap::{OutOfBand, wrappers};
use farlink_addr::ExecutorAddr;
use farlink_wire::functions::Expected;
use farlink_wire::msg::{TlsName, TlsPlace, TlsTemplate};
use farlink_wire::sps::SpsError;
use libc::c_long;
use std::collections::HashMap;
use std::ffi::{CStr, CString};
use std::sync::{LazyLock, Mutex, MutexGuard, PoisonError};

wrappers! { announce:
    TLS_OPEN => tls_open = open;
    TLS_CLOSE => tls_close = close;
    TLS_RESOLVE => tls_resolve = resolve;
    ALLOW_EXECUTABLE_STACKS => allow_executable_stacks = make_stacks_executable;
}

/// Most bytes of one module, of which every thread may have its own.
const MAX_BYTES: u64 = 1 << 30;

/// Most bytes of one module at one distance from every thread's pointer.
const MAX_STATIC_BYTES: u64 = 1 << 20;

/// Largest alignment in bytes.
const MAX_ALIGN_BYTES: u64 = 2 << 20;

/// A module in use, or one that waits to be taken for another.
struct Open {
    module: LoadedModule,
    place: TlsPlace,
    size: u64,
    align: u64,
    users: u64,
}

#[derive(Default)]
struct Modules {
    /// By their handles, which are their numbers to the dynamic linker: the same in executors that open the same.
    open: HashMap<u64, Open>,
    /// Static ones that have been closed.
    free: Vec<Open>,
}

fn modules() -> MutexGuard<'static, Modules> {
    static MODULES: LazyLock<Mutex<Modules>> = LazyLock::new(Mutex::default);
    // Nothing that can panic runs under this lock.
    MODULES.lock().unwrap_or_else(PoisonError::into_inner)
}

type Opened = Expected<(ExecutorAddr, TlsPlace)>;

fn open(template: TlsTemplate) -> Result<Opened, OutOfBand> {
    let limit = if template.is_static { MAX_STATIC_BYTES } else { MAX_BYTES };
    if template.size > limit || template.content.0.len() as u64 > template.size {
        let size = template.size;
        return Ok(Err(format!("{size} bytes of thread-local variables are more than the {limit} that there can be")));
    }
    if !template.align.is_power_of_two() || template.align > MAX_ALIGN_BYTES {
        return Ok(Err(format!("thread-local variables cannot be aligned to {} bytes", template.align)));
    }
    let mut modules = modules();
    let opened = match load(&template) {
        Err(text) if template.is_static => reuse(&mut modules, &template).ok_or(text),
        opened => opened,
    };
    let open = match opened {
        Ok(open) => open,
        Err(text) => return Ok(Err(explain(&template, &text))),
    };
    let place = open.place;
    modules.open.insert(place.module, open);
    Ok(Ok((ExecutorAddr::new(place.module), place)))
}

fn explain(template: &TlsTemplate, text: &str) -> String {
    let size = template.size;
    let hint = if template.is_static {
        "; recompile with -fPIC, or set GLIBC_TUNABLES=glibc.rtld.optional_static_tls=BYTES before the executor starts"
    } else {
        ""
    };
    format!("no room for {size} bytes of thread-local variables: {text}{hint}")
}

/// Has the dynamic linker make a module.
fn load(template: &TlsTemplate) -> Result<Open, String> {
    // A static module may be taken for another later, whose initial values then have to have room.
    let size = if template.is_static { template.size as usize } else { template.content.0.len() };
    let mut content = template.content.0.to_vec();
    content.resize(size, 0);
    let request = |what| Request { name: None, what };
    let mut requests = vec![request(What::ModuleId)];
    if template.is_static {
        requests.push(request(What::TpOffset));
    }
    let (size, align, users) = (template.size, template.align, template.users.max(1));
    let template = Some(Template { content: &content, size, align });
    let module = Module { template, requests, ..Module::default() }.load()?;
    let place = TlsPlace { module: module.results[0], offset: 0, tp_offset: module.results.get(1).copied() };
    Ok(Open { module, place, size, align, users })
}

/// Takes the smallest free static module that will do, and gives every thread its new values.
fn reuse(modules: &mut Modules, template: &TlsTemplate) -> Option<Open> {
    let fits = |open: &Open| open.size >= template.size && open.align >= template.align;
    let candidates = modules.free.iter().enumerate().filter(|(_, open)| fits(open));
    let (index, _) = candidates.min_by_key(|(_, open)| open.size)?;
    let mut open = modules.free.swap_remove(index);
    let mut content = template.content.0.to_vec();
    content.resize(open.size as usize, 0);
    let image = open.module.template as usize as *mut u8;
    // SAFETY: a static module's initial values are that long, in memory of the module that can be written; nobody else
    // writes there, and the C library reads it under no lock of ours, only for threads that start now.
    unsafe { std::ptr::copy_nonoverlapping(content.as_ptr(), image, content.len()) };
    // Threads that start from here on have the new values; those that are there get them now.
    let tp_offset = open.place.tp_offset?;
    for_each_thread_pointer(|thread_pointer| {
        // A thread may be gone just now: then its memory cannot be written, or is nobody's.
        let _ = crate::services::write_own_memory(thread_pointer.wrapping_add(tp_offset), &content);
    });
    open.users = template.users.max(1);
    Some(open)
}

/// Calls `f` with the thread pointer of each of this process's threads, as soon as it is known.
///
/// The kernel has, for each thread, the address of a list head that the C library keeps at one distance from the thread
/// pointer (`get_robust_list(2)`).
fn for_each_thread_pointer(f: impl Fn(u64)) {
    let Some(distance) = list_head(0).map(|head| head.wrapping_sub(thread_pointer())) else { return };
    let Ok(threads) = std::fs::read_dir("/proc/self/task") else { return };
    let ids = threads.filter_map(|thread| thread.ok()?.file_name().to_str()?.parse().ok());
    ids.filter_map(list_head).for_each(|head| f(head.wrapping_sub(distance)));
}

fn list_head(thread: c_long) -> Option<u64> {
    let (mut head, mut size) = (0u64, 0usize);
    // SAFETY: the kernel writes one pointer and one size.
    let result = unsafe { libc::syscall(libc::SYS_get_robust_list, thread, &raw mut head, &raw mut size) };
    (result == 0 && head != 0).then_some(head)
}

fn thread_pointer() -> u64 {
    let pointer: u64;
    // SAFETY: the first word at the thread pointer is the thread pointer (psABI, "Thread-Local Storage").
    unsafe { std::arch::asm!("mov {}, fs:0", out(reg) pointer, options(nostack, preserves_flags, readonly)) };
    pointer
}

fn close((handle,): (ExecutorAddr,)) -> Result<SpsError, OutOfBand> {
    let mut modules = modules();
    let Some(open) = modules.open.get_mut(&handle.as_u64()) else {
        return Ok(SpsError(Err(format!("{handle} is no module of thread-local variables"))));
    };
    open.users -= 1;
    if open.users == 0
        && let Some(open) = modules.open.remove(&handle.as_u64())
    {
        if open.place.tp_offset.is_some() {
            modules.free.push(open);
        } else {
            open.module.unload();
        }
    }
    Ok(SpsError(Ok(())))
}

type Places = Expected<Vec<Option<TlsPlace>>>;

fn resolve((names,): (Vec<TlsName>,)) -> Result<Places, OutOfBand> {
    let c_names: Vec<Option<CString>> = names.iter().map(|name| CString::new(name.name.as_str()).ok()).collect();
    let mut requests = Vec::new();
    for (name, c_name) in names.iter().zip(&c_names) {
        let Some(c_name) = c_name.as_deref() else { continue };
        let ask = |what| Request { name: Some::<&CStr>(c_name), what };
        requests.extend([ask(What::ModuleId), ask(What::Offset)]);
        if name.is_static {
            requests.push(ask(What::TpOffset));
        }
    }
    let module = match (Module { requests, ..Module::default() }).load() {
        Ok(module) => module,
        Err(text) => return Ok(Err(format!("thread-local variables of shared libraries have no fixed place: {text}"))),
    };
    let mut results = module.results.iter().copied();
    let mut next = || results.next().unwrap_or_default();
    let place = |(name, c_name): (&TlsName, &Option<CString>)| {
        c_name.as_ref()?;
        let (module, offset) = (next(), next());
        let tp_offset = name.is_static.then(&mut next);
        (module != 0).then_some(TlsPlace { module, offset, tp_offset })
    };
    let places = names.iter().zip(&c_names).map(place).collect();
    module.unload();
    Ok(Ok(places))
}

fn make_stacks_executable((): ()) -> Result<SpsError, OutOfBand> {
    static DONE: Mutex<bool> = Mutex::new(false);
    let mut done = DONE.lock().unwrap_or_else(PoisonError::into_inner);
    if !*done {
        // The module stays: threads to come need it to be there.
        match (Module { executable_stack: true, ..Module::default() }).load() {
            Ok(_) => *done = true,
            Err(text) => return Ok(SpsError(Err(format!("stacks cannot be made executable: {text}")))),
        }
    }
    Ok(SpsError(Ok(())))
}

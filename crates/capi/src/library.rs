//! Libraries: what is linked together.

use crate::error::{attempt, attempt_handle, described, elements, free, give, reference, text};
use crate::session::FarlinkSession;
use farlink::addr::ExecutorAddr;
use farlink::{Library, Object};
use std::ffi::{OsStr, OsString, c_char, c_int};
use std::os::unix::ffi::OsStrExt;
use std::sync::{Mutex, PoisonError};

/// A set of definitions. When it has been freed, its objects are removed.
pub struct FarlinkLibrary {
    pub(crate) library: Library,
    /// Indexed by the numbers of their handles.
    objects: Mutex<Vec<Object>>,
}

impl FarlinkLibrary {
    fn keep(&self, object: Object) -> FarlinkObject {
        let mut objects = self.objects.lock().unwrap_or_else(PoisonError::into_inner);
        objects.push(object);
        FarlinkObject { number: objects.len() as u64 - 1 }
    }

    fn object(&self, handle: FarlinkObject) -> Result<Object, String> {
        let objects = self.objects.lock().unwrap_or_else(PoisonError::into_inner);
        let object = usize::try_from(handle.number).ok().and_then(|number| objects.get(number));
        object.copied().ok_or_else(|| "this is no object of the library".to_owned())
    }
}

/// An object of a library. It need not be freed.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct FarlinkObject {
    /// Its number in the library.
    pub number: u64,
}

/// Makes a library. `name` is for messages.
///
/// # Safety
///
/// `session` must be NULL or a session that has not been freed, `name` NULL or a C string.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn farlink_library_create(
    session: *const FarlinkSession,
    name: *const c_char,
) -> *mut FarlinkLibrary {
    attempt_handle(|| {
        // SAFETY: as for this function (caller).
        let session = unsafe { reference(session, "the session") }?;
        // SAFETY: as for this function (caller).
        let name = unsafe { text(name, "the name") }?;
        Ok(FarlinkLibrary { library: session.0.create_library(name), objects: Mutex::default() })
    })
}

/// Frees a library. NULL is none.
///
/// # Safety
///
/// `library` must be NULL or a library that has not been freed and that no other thread uses; none of its code may be
/// running.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn farlink_library_free(library: *mut FarlinkLibrary) {
    // SAFETY: as for this function (caller).
    unsafe { free(library) };
}

/// Declares a relocatable object, whose bytes are copied. `name` is what messages call it. `object` gets a handle of it,
/// unless it is NULL.
///
/// # Safety
///
/// `library` must be NULL or a library that has not been freed, `name` NULL or a C string, `bytes` NULL or `count` bytes,
/// `object` NULL or a place for a handle.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn farlink_library_add_object(
    library: *const FarlinkLibrary,
    name: *const c_char,
    bytes: *const u8,
    count: usize,
    object: *mut FarlinkObject,
) -> bool {
    let add = || {
        // SAFETY: as for this function (caller).
        let library = unsafe { reference(library, "the library") }?;
        // SAFETY: as for this function (caller).
        let name = unsafe { text(name, "the name") }?;
        // SAFETY: as for this function (caller).
        let bytes = unsafe { elements(bytes, count, "the object") }?;
        let added = library.library.add_object(name, bytes).map_err(described)?;
        // SAFETY: as for this function (caller).
        unsafe { give(object, library.keep(added)) };
        Ok(())
    };
    attempt(add).is_some()
}

/// Adds an archive, whose bytes are copied, and whose members are linked when something refers to what they define.
///
/// # Safety
///
/// `library` must be NULL or a library that has not been freed, `name` NULL or a C string, `bytes` NULL or `count` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn farlink_library_add_archive(
    library: *const FarlinkLibrary,
    name: *const c_char,
    bytes: *const u8,
    count: usize,
) -> bool {
    let add = || {
        // SAFETY: as for this function (caller).
        let library = unsafe { reference(library, "the library") }?;
        // SAFETY: as for this function (caller).
        let name = unsafe { text(name, "the name") }?;
        // SAFETY: as for this function (caller).
        let bytes = unsafe { elements(bytes, count, "the archive") }?;
        library.library.add_archive(name, bytes).map_err(described)
    };
    attempt(add).is_some()
}

/// Opens a shared library in the executor, by a path or a name that its dynamic linker finds.
///
/// # Safety
///
/// `library` must be NULL or a library that has not been freed, `path` NULL or a C string.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn farlink_library_add_shared_library(
    library: *const FarlinkLibrary,
    path: *const c_char,
) -> bool {
    let add = || {
        // SAFETY: as for this function (caller).
        let library = unsafe { reference(library, "the library") }?;
        // SAFETY: as for this function (caller).
        let path = unsafe { text(path, "the path") }?;
        library.library.add_shared_library(path).map_err(described)
    };
    attempt(add).is_some()
}

/// Defines a symbol as an address of the executor's.
///
/// # Safety
///
/// `library` must be NULL or a library that has not been freed, `name` NULL or a C string.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn farlink_library_define(
    library: *const FarlinkLibrary,
    name: *const c_char,
    addr: u64,
) -> bool {
    let define = || {
        // SAFETY: as for this function (caller).
        let library = unsafe { reference(library, "the library") }?;
        // SAFETY: as for this function (caller).
        let name = unsafe { text(name, "the name") }?;
        library.library.define(name, ExecutorAddr::new(addr)).map_err(described)
    };
    attempt(define).is_some()
}

/// Links what a symbol needs and gives its address.
///
/// # Safety
///
/// `library` must be NULL or a library that has not been freed, `name` NULL or a C string, `addr` NULL or a place for an
/// address.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn farlink_library_lookup(
    library: *const FarlinkLibrary,
    name: *const c_char,
    addr: *mut u64,
) -> bool {
    let lookup = || {
        // SAFETY: as for this function (caller).
        let library = unsafe { reference(library, "the library") }?;
        // SAFETY: as for this function (caller).
        let name = unsafe { text(name, "the name") }?;
        let found = library.library.lookup(name).map_err(described)?;
        // SAFETY: as for this function (caller).
        unsafe { give(addr, found.as_u64()) };
        Ok(())
    };
    attempt(lookup).is_some()
}

/// Removes an object: what it left for its end runs, and its memory comes back. Fails if other objects refer to it.
///
/// # Safety
///
/// `library` must be NULL or a library that has not been freed. None of the object's code may be running.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn farlink_library_remove(library: *const FarlinkLibrary, object: FarlinkObject) -> bool {
    let remove = || {
        // SAFETY: as for this function (caller).
        let library = unsafe { reference(library, "the library") }?;
        library.library.remove(library.object(object)?).map_err(described)
    };
    attempt(remove).is_some()
}

/// Links every object and calls `entry` as C's main, with `argc` arguments of `argv`, the program's name first. `status` gets
/// its result, unless it is NULL.
///
/// # Safety
///
/// `library` must be NULL or a library that has not been freed, `entry` NULL or a C string, `argv` NULL or `argc` C strings,
/// `status` NULL or a place for a number.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn farlink_library_run_main(
    library: *const FarlinkLibrary,
    entry: *const c_char,
    argc: usize,
    argv: *const *const c_char,
    status: *mut c_int,
) -> bool {
    let run = || {
        // SAFETY: as for this function (caller).
        let library = unsafe { reference(library, "the library") }?;
        // SAFETY: as for this function (caller).
        let entry = unsafe { text(entry, "the entry") }?;
        // SAFETY: as for this function (caller).
        let args = unsafe { elements(argv, argc, "the arguments") }?;
        let owned = |&arg: &*const c_char| {
            if arg.is_null() {
                return Err("an argument is NULL".to_owned());
            }
            // SAFETY: every argument is a C string (caller).
            let arg = unsafe { std::ffi::CStr::from_ptr(arg) };
            Ok(OsStr::from_bytes(arg.to_bytes()).to_owned())
        };
        let args: Vec<OsString> = args.iter().map(owned).collect::<Result<_, _>>()?;
        let result = library.library.run_as_main(entry, &args).map_err(described)?;
        // SAFETY: as for this function (caller).
        unsafe { give(status, result) };
        Ok(())
    };
    attempt(run).is_some()
}

//! A Landlock domain for this process: files can be written everywhere but below `/proc`, and the memory, descriptors and
//! signals of processes outside are out of reach, whoever the user is.
//!
//! `/proc/self/mem` writes memory whatever its protection. The second part comes with any domain: a process in one may not
//! trace others. A domain is for the thread that enters it and those that it makes, so it is entered first.
//!
//! See landlock(7).

use std::ffi::CString;
use std::fs::{File, OpenOptions};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

const SYS_CREATE_RULESET: libc::c_long = 444;
const SYS_ADD_RULE: libc::c_long = 445;
const SYS_RESTRICT_SELF: libc::c_long = 446;

/// `LANDLOCK_CREATE_RULESET_VERSION`.
const VERSION: u32 = 1;
/// `LANDLOCK_RULE_PATH_BENEATH`.
const PATH_BENEATH: u32 = 1;
/// `LANDLOCK_ACCESS_FS_WRITE_FILE`.
const WRITE_FILE: u64 = 1 << 1;
/// `LANDLOCK_SCOPE_ABSTRACT_UNIX_SOCKET` and `LANDLOCK_SCOPE_SIGNAL`.
const SCOPES: u64 = 3;
/// The version that knows scopes, and the bytes of the structure before them and with them.
const VERSION_WITH_SCOPES: i64 = 6;
const BYTES_WITHOUT_SCOPES: usize = 8;

/// `struct landlock_ruleset_attr`.
#[repr(C)]
struct Ruleset {
    handled_access_fs: u64,
    handled_access_net: u64,
    scoped: u64,
}

/// `struct landlock_path_beneath_attr`.
#[repr(C, packed)]
struct PathBeneath {
    allowed_access: u64,
    parent_fd: i32,
}

fn failed(what: &str) -> String {
    format!("{what}: {}", std::io::Error::last_os_error())
}

/// Makes the rules of a domain, which can be entered any number of times.
pub(super) fn rules() -> Result<OwnedFd, String> {
    // SAFETY: with this flag and no structure the call only tells its version.
    let version = unsafe { libc::syscall(SYS_CREATE_RULESET, std::ptr::null::<Ruleset>(), 0usize, VERSION) };
    if version < 1 {
        return Err(failed("the system has no Landlock"));
    }
    let has_scopes = version >= VERSION_WITH_SCOPES;
    let rules =
        Ruleset { handled_access_fs: WRITE_FILE, handled_access_net: 0, scoped: if has_scopes { SCOPES } else { 0 } };
    let size = if has_scopes { size_of::<Ruleset>() } else { BYTES_WITHOUT_SCOPES };
    // SAFETY: the structure has at least that many bytes.
    let ruleset = unsafe { libc::syscall(SYS_CREATE_RULESET, &raw const rules, size, 0u32) };
    if ruleset < 0 {
        return Err(failed("no rules can be made"));
    }
    // SAFETY: the call has just made this descriptor, which is a small number.
    let ruleset = unsafe { OwnedFd::from_raw_fd(ruleset as i32) };
    let entries = std::fs::read_dir("/").map_err(|error| format!("/ cannot be read: {error}"))?;
    for entry in entries.filter_map(Result::ok).filter(|entry| entry.file_name() != "proc") {
        // What cannot be opened cannot be written below either.
        if let Ok(folder) = open_path(&entry.path()) {
            allow_writing(&ruleset, &folder)?;
        }
    }
    Ok(ruleset)
}

/// Enters a new domain with these rules, for good.
pub(super) fn enter_domain(ruleset: &OwnedFd) -> Result<(), String> {
    // SAFETY: the descriptor is that of the rules.
    match unsafe { libc::syscall(SYS_RESTRICT_SELF, ruleset.as_raw_fd(), 0u32) } {
        0 => Ok(()),
        _ => Err(failed("the domain cannot be entered")),
    }
}

fn open_path(path: &Path) -> std::io::Result<File> {
    // Checked here, so that a name with a NUL is an error before anything is done.
    CString::new(path.as_os_str().as_bytes())?;
    OpenOptions::new().read(true).custom_flags(libc::O_PATH | libc::O_CLOEXEC).open(path)
}

fn allow_writing(ruleset: &OwnedFd, folder: &File) -> Result<(), String> {
    let rule = PathBeneath { allowed_access: WRITE_FILE, parent_fd: folder.as_raw_fd() };
    // SAFETY: the descriptor is that of the rules, and the structure is of the kind that is named.
    match unsafe { libc::syscall(SYS_ADD_RULE, ruleset.as_raw_fd(), PATH_BENEATH, &raw const rule, 0u32) } {
        0 => Ok(()),
        _ => Err(failed("a rule cannot be added")),
    }
}

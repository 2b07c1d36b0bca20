//! The filter of system calls: a table of what is refused, with the reasons, and the program for the kernel that is made of
//! it.
//!
//! What is refused fails with `EPERM`. The filter is for all threads at once, those to come included, and for children.
//!
//! See seccomp(2).

use libc::c_long;

/// What is refused of a system call.
#[derive(Clone, Copy)]
enum When {
    Always,
    /// If the argument of this number has any of these bits.
    Has(u32, u32),
    /// If it has none of them.
    Lacks(u32, u32),
    /// If it is another value.
    IsNot(u32, u32),
}

struct Rule {
    call: c_long,
    when: When,
}

/// Writes a table of rules. The reasons are for its readers.
macro_rules! rules {
    ($($call:ident $when:expr, $reason:literal;)*) => {
        &[$(
            Rule { call: libc::$call, when: $when },
        )*]
    };
}

const EXEC: u32 = libc::PROT_EXEC as u32;

/// `MFD_NOEXEC_SEAL`, of Linux 6.3.
const NOEXEC_SEAL: u32 = 8;

/// `SHM_EXEC`.
const SHM_EXEC: u32 = 0o100_000;

/// The argument with which `personality` only tells.
const PERSONALITY_QUERY: u32 = 0xffff_ffff;

/// Stands for this process's id, which is put in when the filter is made.
const OWN_PID: u32 = u32::MAX - 1;

use When::{Always, Has, IsNot, Lacks};

/// What a locked executor is refused.
const HARDENED: &[Rule] = rules! {
    SYS_mmap Has(2, EXEC), "New code: all that is to be executed has been mapped.";
    SYS_mprotect Has(2, EXEC), "Data that is made code.";
    SYS_pkey_mprotect Has(2, EXEC), "As `mprotect`.";
    SYS_remap_file_pages Always, "Puts writable pages of a shared object where its code is.";
    SYS_shmat Has(2, SHM_EXEC), "Shared memory of System V that is executed.";
    SYS_personality IsNot(0, PERSONALITY_QUERY), "With `READ_IMPLIES_EXEC` all that can be read can be executed.";
    SYS_memfd_create Lacks(1, NOEXEC_SEAL), "A program without a name, to be executed.";
    SYS_execve Always, "Another program has code of its own.";
    SYS_execveat Always, "As `execve`.";
    SYS_uselib Always, "Maps code; what is left of an old way to load libraries.";
    SYS_ptrace Always, "Writes the memory of others, code included.";
    SYS_process_vm_writev IsNot(0, OWN_PID), "Writes the memory of others; of its own, only where it may.";
    SYS_process_vm_readv IsNot(0, OWN_PID), "Reads the memory of others.";
    SYS_process_madvise Always, "Changes the memory of others.";
    SYS_pidfd_getfd Always, "Takes the descriptors of others.";
    SYS_kcmp Always, "Tells of others.";
    SYS_userfaultfd Always, "Decides what is in a page while somebody reads it, also the system.";
    SYS_io_uring_setup Always, "Makes system calls that no filter sees.";
    SYS_perf_event_open Always, "Watches others.";
    SYS_bpf Always, "Code for the kernel.";
    SYS_modify_ldt Always, "Segments of other widths, in which bytes are other instructions.";
    SYS_mount Always, "Another view of /proc.";
    SYS_move_mount Always, "As `mount`.";
    SYS_open_tree Always, "As `mount`.";
    SYS_fsopen Always, "As `mount`.";
    SYS_unshare Always, "Namespaces, in which more is allowed.";
    SYS_setns Always, "As `unshare`.";
    SYS_chroot Always, "Another root, below which the rules for /proc do not hold.";
    SYS_pivot_root Always, "As `chroot`.";
    SYS_init_module Always, "Code for the kernel.";
    SYS_finit_module Always, "As `init_module`.";
    SYS_kexec_load Always, "Another kernel.";
};

/// What a sandbox is refused in addition: files by name, and the network. Descriptors that are open stay so.
const SANDBOX: &[Rule] = rules! {
    SYS_open Always, "Files.";
    SYS_openat Always, "Files.";
    SYS_openat2 Always, "Files.";
    SYS_creat Always, "Files.";
    SYS_open_by_handle_at Always, "Files.";
    SYS_truncate Always, "Files.";
    SYS_mkdir Always, "Folders.";
    SYS_mkdirat Always, "Folders.";
    SYS_rmdir Always, "Folders.";
    SYS_mknod Always, "Special files.";
    SYS_mknodat Always, "Special files.";
    SYS_link Always, "Names.";
    SYS_linkat Always, "Names.";
    SYS_symlink Always, "Names.";
    SYS_symlinkat Always, "Names.";
    SYS_unlink Always, "Names.";
    SYS_unlinkat Always, "Names.";
    SYS_rename Always, "Names.";
    SYS_renameat Always, "Names.";
    SYS_renameat2 Always, "Names.";
    SYS_chmod Always, "Rights.";
    SYS_fchmodat Always, "Rights.";
    SYS_chown Always, "Owners.";
    SYS_lchown Always, "Owners.";
    SYS_fchownat Always, "Owners.";
    SYS_setxattr Always, "Attributes.";
    SYS_lsetxattr Always, "Attributes.";
    SYS_removexattr Always, "Attributes.";
    SYS_lremovexattr Always, "Attributes.";
    SYS_utimensat Always, "Times.";
    SYS_chdir Always, "Folders.";
    SYS_readlink Always, "Names.";
    SYS_readlinkat Always, "Names.";
    SYS_inotify_add_watch Always, "Tells of files.";
    SYS_fanotify_init Always, "Tells of files.";
    SYS_socket Always, "The network, and sockets with names.";
    SYS_connect Always, "As `socket`.";
    SYS_bind Always, "As `socket`.";
    SYS_listen Always, "As `socket`.";
    SYS_accept Always, "As `socket`.";
    SYS_accept4 Always, "As `socket`.";
    SYS_shmget Always, "Memory of System V, which others can find.";
    SYS_msgget Always, "Queues of System V.";
    SYS_semget Always, "Semaphores of System V.";
    SYS_mq_open Always, "Queues with names.";
};

// Instructions: see linux/filter.h.
const LOAD_WORD: u16 = 0x20;
const JUMP_EQUAL: u16 = 0x15;
const JUMP_AT_LEAST: u16 = 0x35;
const JUMP_ANY_BIT: u16 = 0x45;
const RETURN: u16 = 0x06;

// Where the system call is described: see `struct seccomp_data`.
const NUMBER_AT: u32 = 0;
const ARCHITECTURE_AT: u32 = 4;
const ARGUMENTS_AT: u32 = 16;

/// `AUDIT_ARCH_X86_64`.
const ARCHITECTURE: u32 = 0xc000_003e;

/// System calls from here on are those of programs with short pointers.
const SHORT_POINTERS: u32 = 0x4000_0000;

const ALLOW: u32 = libc::SECCOMP_RET_ALLOW;
const REFUSE: u32 = libc::SECCOMP_RET_ERRNO | libc::EPERM as u32;

fn instruction(code: u16, jump_true: u8, jump_false: u8, k: u32) -> libc::sock_filter {
    libc::sock_filter { code, jt: jump_true, jf: jump_false, k }
}

/// Makes the program of the rules.
fn program<'a>(rules: impl Iterator<Item = &'a Rule>, own_pid: u32) -> Vec<libc::sock_filter> {
    let mut program = vec![
        instruction(LOAD_WORD, 0, 0, ARCHITECTURE_AT),
        // Other instruction sets have other numbers, none of which is needed.
        instruction(JUMP_EQUAL, 1, 0, ARCHITECTURE),
        instruction(RETURN, 0, 0, REFUSE),
        instruction(LOAD_WORD, 0, 0, NUMBER_AT),
        instruction(JUMP_AT_LEAST, 0, 1, SHORT_POINTERS),
        instruction(RETURN, 0, 0, REFUSE),
    ];
    for rule in rules {
        // Numbers of system calls are small and not negative.
        let number = rule.call as u32;
        let load = |argument: u32| instruction(LOAD_WORD, 0, 0, ARGUMENTS_AT + 8 * argument);
        let (refuse, allow) = (instruction(RETURN, 0, 0, REFUSE), instruction(RETURN, 0, 0, ALLOW));
        match rule.when {
            Always => program.extend([instruction(JUMP_EQUAL, 0, 1, number), refuse]),
            When::Has(argument, bits) => program.extend([
                instruction(JUMP_EQUAL, 0, 4, number),
                load(argument),
                instruction(JUMP_ANY_BIT, 0, 1, bits),
                refuse,
                allow,
            ]),
            When::Lacks(argument, bits) => program.extend([
                instruction(JUMP_EQUAL, 0, 4, number),
                load(argument),
                instruction(JUMP_ANY_BIT, 1, 0, bits),
                refuse,
                allow,
            ]),
            When::IsNot(argument, value) => program.extend([
                instruction(JUMP_EQUAL, 0, 4, number),
                load(argument),
                instruction(JUMP_EQUAL, 1, 0, if value == OWN_PID { own_pid } else { value }),
                refuse,
                allow,
            ]),
        }
    }
    program.push(instruction(RETURN, 0, 0, ALLOW));
    program
}

/// Installs the filter for all threads.
pub(super) fn install(is_sandboxed: bool) -> std::io::Result<()> {
    let sandbox = if is_sandboxed { SANDBOX } else { &[] };
    let mut program = program(HARDENED.iter().chain(sandbox), std::process::id());
    let len = u16::try_from(program.len()).expect("the tables are much smaller");
    let filter = libc::sock_fprog { len, filter: program.as_mut_ptr() };
    // SAFETY: the program has that many instructions, and the kernel copies it.
    let result = unsafe {
        libc::syscall(
            libc::SYS_seccomp,
            libc::SECCOMP_SET_MODE_FILTER,
            libc::SECCOMP_FILTER_FLAG_TSYNC,
            &raw const filter,
        )
    };
    match result {
        0 => Ok(()),
        -1 => Err(std::io::Error::last_os_error()),
        thread => Err(std::io::Error::other(format!("thread {thread} has a filter of its own"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs the program on a system call, as the kernel does.
    fn verdict(program: &[libc::sock_filter], number: u32, arch: u32, arguments: [u32; 6]) -> u32 {
        let (mut at, mut accumulator) = (0, 0);
        loop {
            let instruction = program[at];
            at += 1;
            let jump = |holds: bool| usize::from(if holds { instruction.jt } else { instruction.jf });
            match instruction.code {
                LOAD_WORD if instruction.k == NUMBER_AT => accumulator = number,
                LOAD_WORD if instruction.k == ARCHITECTURE_AT => accumulator = arch,
                LOAD_WORD => accumulator = arguments[(instruction.k - ARGUMENTS_AT) as usize / 8],
                JUMP_EQUAL => at += jump(accumulator == instruction.k),
                JUMP_AT_LEAST => at += jump(accumulator >= instruction.k),
                JUMP_ANY_BIT => at += jump(accumulator & instruction.k != 0),
                RETURN => return instruction.k,
                code => panic!("instruction {code:#x}"),
            }
        }
    }

    /// Every rule refuses what it is for and lets pass what it is not for; what has no rule passes; other instruction sets
    /// do not.
    #[test]
    fn verdicts() {
        let program = program(HARDENED.iter().chain(SANDBOX), 100);
        let with = |argument: u32, value: u32| {
            let mut arguments = [0; 6];
            arguments[argument as usize] = value;
            arguments
        };
        for rule in HARDENED.iter().chain(SANDBOX) {
            let (refused, passed) = match rule.when {
                Always => (vec![[0; 6], [u32::MAX; 6]], vec![]),
                Has(argument, bits) => (vec![with(argument, bits), with(argument, u32::MAX)], vec![[0; 6]]),
                Lacks(argument, bits) => (vec![[0; 6]], vec![with(argument, bits)]),
                IsNot(argument, value) => {
                    let value = if value == OWN_PID { 100 } else { value };
                    (vec![with(argument, value - 1)], vec![with(argument, value)])
                }
            };
            let verdict = |arguments| verdict(&program, rule.call as u32, ARCHITECTURE, arguments);
            assert!(refused.into_iter().all(|arguments| verdict(arguments) == REFUSE), "{}", rule.call);
            assert!(passed.into_iter().all(|arguments| verdict(arguments) == ALLOW), "{}", rule.call);
        }
        assert_eq!(verdict(&program, libc::SYS_read as u32, ARCHITECTURE, [u32::MAX; 6]), ALLOW);
        assert_eq!(verdict(&program, libc::SYS_read as u32, 0x4000_0003, [0; 6]), REFUSE);
        assert_eq!(verdict(&program, libc::SYS_read as u32 | SHORT_POINTERS, ARCHITECTURE, [0; 6]), REFUSE);
    }
}

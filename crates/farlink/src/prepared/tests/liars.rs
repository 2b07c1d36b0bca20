//! Prepared processes that lie: what they name as an executor is none, or they answer with anything, or not at all.

use super::*;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, recvmsg};
use std::io::IoSliceMut;
use std::os::fd::FromRawFd;

/// The argument that makes the program of the tests a prepared process that lies; the lie comes after it.
pub(super) const ARG: &str = "--lie";

/// Is a prepared process that answers with the first argument, or does what it says.
pub(super) fn lie(args: &[String]) -> ! {
    let numbers = args[1].strip_prefix("filedescs=").unwrap().split_once(',').unwrap();
    // SAFETY: the descriptor was inherited, and nobody else has it.
    let control = unsafe { OwnedFd::from_raw_fd(numbers.0.parse().unwrap()) };
    let answer = |message: &[u8]| send(&control, message, None).map_err(drop).unwrap();
    match args[0].as_str() {
        "nothing at all" => drop(receive_request(&control)),
        what => {
            answer(&Answer(Ok(0)).to_message());
            let connection = receive_request(&control);
            match what {
                "nothing" => drop(receive_request(&control)),
                "garbage" => answer(&[0; 100]),
                "too much" => answer(&[0; MAX_MESSAGE_BYTES + 100]),
                "itself" => answer(&Answer(Ok(std::process::id())).to_message()),
                "death" => fork_and_die(connection),
                number => answer(&Answer(Ok(number.parse().unwrap())).to_message()),
            }
        }
    }
    receive_request(&control);
    std::process::exit(0)
}

/// Waits for a request; gives the descriptor that came with it.
fn receive_request(control: &OwnedFd) -> Option<OwnedFd> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    recvmsg(control, &mut [IoSliceMut::new(&mut [0; 100])], &mut ancillary, RecvFlags::CMSG_CLOEXEC).unwrap();
    ancillary.drain().find_map(|part| match part {
        RecvAncillaryMessage::ScmRights(mut descriptors) => descriptors.next(),
        _ => None,
    })
}

/// Forks an executor and dies before that is said.
fn fork_and_die(connection: Option<OwnedFd>) {
    let flags = i64::from(libc::CLONE_PARENT | libc::SIGCHLD);
    // SAFETY: the child has a copy of this process, which has one thread.
    if unsafe { libc::syscall(libc::SYS_clone, flags, 0, 0, 0, 0) } != 0 {
        std::process::abort();
    }
    let transport = Transport::from_socket(connection.unwrap()).unwrap();
    let options = Options { out_of_band_results: true, ..Options::default() };
    std::process::exit(farlink_executor::run(transport, options).unwrap());
}

fn liar(what: &str) -> Program {
    Program { args: [ARG, what].map(Into::into).to_vec(), ..Program::this_one() }
}

fn lied(prepared: &Prepared) -> String {
    let options = Options { setup_timeout: Duration::from_millis(500), ..Options::default() };
    prepared.fork(Arc::new(NoCallbacks), options).map(drop).unwrap_err().to_string()
}

/// What answers wrongly or not at all is ended, in time; what it names as an executor and is none is left alone.
#[test]
fn lies() {
    let _alone = alone();
    let mut bystander = Command::new("sleep").arg("1000").spawn().unwrap();
    for (what, expected) in [
        ("garbage", "answered wrongly"),
        ("too much", "answered wrongly"),
        ("nothing", "did not answer within 500ms"),
        ("itself", "is no executor that it can have forked"),
        ("0", "is no executor that it can have forked"),
        ("1", "is no executor that it can have forked"),
        ("4294967295", "is no executor that it can have forked"),
        (&std::process::id().to_string(), "is no executor that it can have forked"),
        (&bystander.id().to_string(), "is no executor that it can have forked"),
    ] {
        let prepared = Prepared::start(&liar(what)).unwrap();
        let text = lied(&prepared);
        assert!(text.contains(expected), "{what}: {text}");
    }
    assert!(bystander.try_wait().unwrap().is_none());
    bystander.kill().unwrap();
    bystander.wait().unwrap();
}

/// An executor that is forked at the moment at which the prepared process dies is ended and waited for.
#[test]
fn an_executor_that_nobody_names() {
    let _alone = alone();
    let own = std::process::id().to_string();
    let children = || -> Vec<String> {
        let tasks = fs::read_dir("/proc/self/task").unwrap().map(|task| task.unwrap().path().join("children"));
        tasks
            .flat_map(|path| {
                fs::read_to_string(path).unwrap_or_default().split_whitespace().map(str::to_owned).collect::<Vec<_>>()
            })
            .collect()
    };
    assert_eq!(children(), Vec::<String>::new(), "of {own}");
    let prepared = Prepared::start(&liar("death")).unwrap();
    let text = lied(&prepared);
    assert!(text.contains("was killed by SIGABRT"), "{text}");
    assert_eq!(children(), Vec::<String>::new());
}

/// A program that does not even say that it is ready is ended.
#[test]
fn silence() {
    let _alone = alone();
    let begin = Instant::now();
    let started = Prepared::start_within(&liar("nothing at all"), Duration::from_millis(100));
    let text = started.map(drop).unwrap_err().to_string();
    assert!(text.contains("did not answer within 100ms") && begin.elapsed() < DEADLINE, "{text}");
}

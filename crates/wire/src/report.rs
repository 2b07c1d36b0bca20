//! The report that a process leaves of a fault: its place in memory that it shares with its controller, and a reading that
//! believes nothing.
//!
//! A process that dies can do little, so the report is raw: registers, a part of the stack, and the list of mappings as the
//! system gives it. Whoever reads it unwinds the stack and finds the names.
//!
//! The memory begins with words of 8 bytes ([`words`]). The mappings are at [`MAPS_OFFSET`], the stack is at
//! [`STACK_OFFSET`]. The sum in [`words::SUM`] is over everything but itself and what is before it, so a report that
//! something wrote over is told from one that is whole. A process that is hostile can still write what it likes.

use farlink_addr::{ExecutorAddr, ExecutorAddrRange};

/// Bytes of the memory that a report is left in. What is not written takes no physical memory.
pub const REPORT_BYTES: u64 = STACK_OFFSET + MAX_STACK_BYTES;

/// Where the list of mappings is.
pub const MAPS_OFFSET: u64 = 4096;

/// Most bytes of it: more than ten thousand mappings.
pub const MAX_MAPS_BYTES: u64 = 1 << 20;

/// Where the part of the stack is.
pub const STACK_OFFSET: u64 = MAPS_OFFSET + MAX_MAPS_BYTES;

/// Most bytes of it.
pub const MAX_STACK_BYTES: u64 = 256 << 10;

/// What a report begins with.
pub const MAGIC: u64 = u64::from_le_bytes(*b"farlink\x01");

/// The numbers of the words.
pub mod words {
    /// [`MAGIC`](super::MAGIC).
    pub const MAGIC: usize = 0;
    /// A [`state`](super::state).
    pub const STATE: usize = 1;
    /// The sum over what follows.
    pub const SUM: usize = 2;
    /// The signal.
    pub const SIGNAL: usize = 3;
    /// Why it came: `si_code`.
    pub const CODE: usize = 4;
    /// The address that the fault was about: `si_addr`.
    pub const ADDRESS: usize = 5;
    /// The process.
    pub const PID: usize = 6;
    /// The thread.
    pub const TID: usize = 7;
    /// The thread's name, two words.
    pub const NAME: usize = 8;
    /// The process that sent the signal, if one did: `si_pid`.
    pub const SENDER: usize = 10;
    /// Bytes of the list of mappings, and whether it is not all of them.
    pub const MAPS_BYTES: usize = 11;
    /// Whether the list of mappings is cut off.
    pub const MAPS_CUT: usize = 12;
    /// The first address of the part of the stack, and its length in bytes.
    pub const STACK_START: usize = 13;
    /// Its length in bytes.
    pub const STACK_BYTES: usize = 14;
    /// The registers, in the order of the system's `gregset_t`.
    pub const REGISTERS: usize = 16;
    /// How many words there are.
    pub const COUNT: usize = REGISTERS + super::REGISTERS;
}

/// How many registers are reported.
pub const REGISTERS: usize = 23;

/// Names of the first of them, which are general.
pub const REGISTER_NAMES: [&str; 17] = [
    "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15", "rdi", "rsi", "rbp", "rbx", "rdx", "rax", "rcx", "rsp", "rip",
];

/// Where a report is in its life.
pub mod state {
    /// Nothing has been written.
    pub const EMPTY: u64 = 0;
    /// Somebody is writing it.
    pub const BEGUN: u64 = 1;
    /// It is whole.
    pub const WHOLE: u64 = 2;
}

/// Adds a word to a sum: FNV-1a, by words.
#[must_use]
pub fn add_to_sum(sum: u64, word: u64) -> u64 {
    (sum ^ word).wrapping_mul(0x0000_0100_0000_01b3)
}

/// What a sum begins with.
pub const SUM_START: u64 = 0xcbf2_9ce4_8422_2325;

/// What a process has left of a fault. Everything here is its word.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Report {
    /// The signal.
    pub signal: i32,
    /// Why it came: `si_code`.
    pub code: i32,
    /// The address that the fault was about, where the signal has one.
    pub address: ExecutorAddr,
    /// The process.
    pub pid: u32,
    /// The thread.
    pub tid: u32,
    /// The thread's name.
    pub thread: String,
    /// The process that sent the signal, if one did.
    pub sender: u32,
    /// The registers, in the order of [`REGISTER_NAMES`] and then of the system's `gregset_t`.
    pub registers: [u64; REGISTERS],
    /// Where the part of the stack begins.
    pub stack_start: ExecutorAddr,
    /// The part of the stack.
    pub stack: Vec<u8>,
    /// The mappings, as `proc_pid_maps(5)` has them.
    pub maps: String,
    /// Whether there are more.
    pub maps_cut: bool,
}

/// What is wrong with a report.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ReportError {
    /// The process began to write it and could not end.
    #[error("its report of the fault was cut off")]
    CutOff,
    /// A field is none that a report can have.
    #[error("its report of the fault is damaged: {0}")]
    Damaged(&'static str),
}

/// Reads a copy of the memory that a report is left in; none has been if the result is empty.
///
/// # Errors
///
/// Fails if what is there is not a whole report.
pub fn parse(bytes: &[u8]) -> Result<Option<Report>, ReportError> {
    let word = |index: usize| {
        let bytes = bytes.get(index * 8..index * 8 + 8)?;
        Some(u64::from_le_bytes(bytes.try_into().expect("there are 8")))
    };
    let word = |index: usize| word(index).ok_or(ReportError::Damaged("it is too short"));
    match (word(words::MAGIC)?, word(words::STATE)?) {
        (0, state::EMPTY) => return Ok(None),
        (MAGIC | 0, state::BEGUN) => return Err(ReportError::CutOff),
        (MAGIC, state::WHOLE) => {}
        _ => return Err(ReportError::Damaged("it has no valid beginning")),
    }
    let part = |offset: u64, len: u64, most: u64, what| {
        let range = (len <= most && len.is_multiple_of(8)).then(|| offset as usize..(offset + len) as usize);
        range.and_then(|range| bytes.get(range)).ok_or(ReportError::Damaged(what))
    };
    let maps_bytes = word(words::MAPS_BYTES)?;
    let maps = part(MAPS_OFFSET, maps_bytes, MAX_MAPS_BYTES, "the length of its list of mappings")?;
    let stack = part(STACK_OFFSET, word(words::STACK_BYTES)?, MAX_STACK_BYTES, "the length of its stack")?;
    let mut header = [0; words::COUNT];
    for (index, value) in header.iter_mut().enumerate() {
        *value = word(index)?;
    }
    if sum(&header, &[maps, stack]) != header[words::SUM] {
        return Err(ReportError::Damaged("its sum is another"));
    }
    checked(&header, maps, stack).map(Some)
}

/// Returns the sum of a report.
fn sum(header: &[u64; words::COUNT], parts: &[&[u8]]) -> u64 {
    let own = header[words::SUM + 1..].iter().fold(SUM_START, |sum, &word| add_to_sum(sum, word));
    let parts = parts.iter().flat_map(|part| part.chunks_exact(8));
    parts.fold(own, |sum, word| add_to_sum(sum, u64::from_le_bytes(word.try_into().expect("there are 8"))))
}

/// Checks every field.
fn checked(header: &[u64; words::COUNT], maps: &[u8], stack: &[u8]) -> Result<Report, ReportError> {
    let small = |index: usize, what| u32::try_from(header[index]).map_err(|_| ReportError::Damaged(what));
    let signal = small(words::SIGNAL, "its signal")?;
    if !(1..=64).contains(&signal) {
        return Err(ReportError::Damaged("its signal"));
    }
    let stack_start = ExecutorAddr::new(header[words::STACK_START]);
    if ExecutorAddrRange::from_len(stack_start, stack.len() as u64).is_none() {
        return Err(ReportError::Damaged("the address of its stack"));
    }
    let name: Vec<u8> = header[words::NAME..words::NAME + 2].iter().flat_map(|word| word.to_le_bytes()).collect();
    let name = name.split(|&byte| byte == 0).next().unwrap_or_default();
    let maps = maps.split(|&byte| byte == 0).next().unwrap_or_default();
    let mut registers = [0; REGISTERS];
    registers.copy_from_slice(&header[words::REGISTERS..]);
    Ok(Report {
        signal: signal as i32,
        // Sign-extended when it was written.
        code: header[words::CODE] as i32,
        address: ExecutorAddr::new(header[words::ADDRESS]),
        pid: small(words::PID, "its process")?,
        tid: small(words::TID, "its thread")?,
        thread: String::from_utf8_lossy(name).into_owned(),
        sender: small(words::SENDER, "the sender of its signal")?,
        registers,
        stack_start,
        stack: stack.to_vec(),
        maps: String::from_utf8_lossy(maps).into_owned(),
        maps_cut: header[words::MAPS_CUT] != 0,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn written() -> Vec<u8> {
        let mut bytes = vec![0; REPORT_BYTES as usize];
        let mut header = [0u64; words::COUNT];
        let fields = [
            (words::MAGIC, MAGIC),
            (words::STATE, state::WHOLE),
            (words::SIGNAL, 11),
            (words::CODE, -6i64 as u64),
            (words::ADDRESS, 8),
            (words::PID, 100),
            (words::TID, 101),
            (words::NAME, u64::from_le_bytes(*b"main\0\0\0\0")),
            (words::MAPS_BYTES, 16),
            (words::STACK_START, 0x7000),
            (words::STACK_BYTES, 24),
            (words::REGISTERS + 16, 0x1234),
        ];
        for (index, value) in fields {
            header[index] = value;
        }
        bytes[MAPS_OFFSET as usize..][..11].copy_from_slice(b"1000-2000 r");
        bytes[STACK_OFFSET as usize..][..3].copy_from_slice(&[1, 2, 3]);
        let (maps, stack) = (MAPS_OFFSET as usize, STACK_OFFSET as usize);
        header[words::SUM] = sum(&header, &[&bytes[maps..maps + 16], &bytes[stack..stack + 24]]);
        for (index, value) in header.iter().enumerate() {
            bytes[index * 8..index * 8 + 8].copy_from_slice(&value.to_le_bytes());
        }
        bytes
    }

    /// A report that was written whole is read as it was written; memory that nothing was written to has none.
    #[test]
    fn whole_reports() {
        let report = parse(&written()).unwrap().unwrap();
        assert_eq!((report.signal, report.code, report.pid, report.tid), (11, -6, 100, 101));
        assert_eq!((report.thread.as_str(), report.maps.as_str()), ("main", "1000-2000 r"));
        assert_eq!((report.stack_start.as_u64(), report.stack.len()), (0x7000, 24));
        assert_eq!(report.registers[16], 0x1234);
        assert_eq!(parse(&vec![0; REPORT_BYTES as usize]), Ok(None));
    }

    /// A report that was begun and not ended is cut off; one of any other shape is damaged.
    #[test]
    fn reports_that_are_not_whole() {
        let mut begun = written();
        begun[words::STATE * 8] = state::BEGUN as u8;
        assert_eq!(parse(&begun), Err(ReportError::CutOff));
        for cut in [0, 1, 8, 100, MAPS_OFFSET as usize] {
            assert!(matches!(parse(&written()[..cut]), Err(ReportError::Damaged(_))), "{cut}");
        }
        for index in [words::MAPS_BYTES, words::STACK_BYTES] {
            let mut bytes = written();
            bytes[index * 8..index * 8 + 8].copy_from_slice(&(u64::MAX - 7).to_le_bytes());
            assert!(matches!(parse(&bytes), Err(ReportError::Damaged(_))));
        }
    }

    proptest! {
        /// One byte that something wrote over anywhere in it is noticed.
        #[test]
        fn damage_is_noticed(at in prop::sample::select(vec![0usize, 8, 16, 24, 30, 40, 64, 128, 300, 4096, 4111, 1052672, 1052695]), bit in 0u8..8) {
            let mut bytes = written();
            bytes[at] ^= 1 << bit;
            prop_assert!(parse(&bytes).is_err());
        }

        /// Any bytes are a report or an error.
        #[test]
        fn anything_is_read(bytes in prop::collection::vec(any::<u8>(), 0..8192)) {
            let _ = parse(&bytes);
        }
    }
}

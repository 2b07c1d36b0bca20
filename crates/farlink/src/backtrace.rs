//! The way back from where a process has stopped, found by its registers and a copy of its stack.
//!
//! Nothing is asked of the process, which may be gone: unwind information comes from the bytes of the objects that were
//! linked, and from the files of libraries that its list of mappings names. That list, the registers and the stack are what
//! the process says of itself; nothing more follows from them than what is shown.

use crate::known_code::Notes;
use crate::symbols::{Code, Reader};
use farlink_graph::Bytes;
use gimli::{CfaRule, EvaluationResult, Register, RegisterRule, UnwindContext, UnwindSection, Value};
use std::collections::HashMap;
use std::fs::File;
use std::io::Read;
use std::os::unix::fs::OpenOptionsExt;
use std::rc::Rc;

/// Most frames that are looked for.
pub(crate) const MAX_FRAMES: usize = 128;

/// Largest file that is read for its names, in bytes.
const MAX_FILE_BYTES: u64 = 1 << 30;

/// Most steps of an expression of unwind information.
const MAX_EVALUATION_STEPS: u32 = 1000;

/// Where each register of the unwind information is in the system's order, up to the return address.
const SYSTEM_ORDER: [usize; 17] = [13, 12, 14, 11, 9, 8, 10, 15, 0, 1, 2, 3, 4, 5, 6, 7, 16];

const RBP: usize = 6;
const RSP: usize = 7;
const RETURN_ADDRESS: usize = 16;

/// Registers that a function leaves as it found them, unless its unwind information says where they are.
const PRESERVED: [usize; 6] = [3, RBP, 12, 13, 14, 15];

/// Code that was linked, at some address.
pub(crate) struct LinkedPlace {
    /// The object.
    pub(crate) object: String,
    /// Tells it from others that are called the same.
    pub(crate) number: usize,
    pub(crate) file: LinkedFile,
    /// Where in the object's file the code is, or the address if there are notes; none for code that the linker made.
    pub(crate) file_offset: Option<u64>,
}

/// What there is of an object that was linked.
pub(crate) enum LinkedFile {
    Whole(Bytes),
    /// Notes, and the unwind information as it is linked.
    Notes(Notes, Option<Vec<u8>>),
}

/// A mapping of a file with code.
struct Mapping {
    start: u64,
    end: u64,
    offset: u64,
    path: String,
}

/// A place in code, by what is known of it.
struct Place {
    name: String,
    /// What its file says, and the address as the file has it.
    code: Option<(Rc<Code>, u64)>,
}

/// A stack frame, with the address that is executed, or is returned to.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct Frame {
    /// The address.
    pub address: u64,
    /// The object that was linked, or the library.
    pub object: Option<String>,
    /// Whether it was linked.
    pub is_linked: bool,
    /// The function, as people write it, and how far in it the address is.
    pub function: Option<(String, u64)>,
    /// The source file and the line, if there is debug information.
    pub line: Option<(String, u32)>,
}

/// Finds what is at addresses of a process.
pub(crate) struct Finder<'a> {
    linked: &'a dyn Fn(u64) -> Option<LinkedPlace>,
    mappings: Vec<Mapping>,
    objects: HashMap<usize, Option<Rc<Code>>>,
    files: HashMap<String, Option<Rc<Code>>>,
}

impl<'a> Finder<'a> {
    /// Returns a finder for what `linked` knows and what a list of mappings names.
    pub(crate) fn new(maps: &str, linked: &'a dyn Fn(u64) -> Option<LinkedPlace>) -> Self {
        let mappings = maps.lines().filter_map(executable_mapping).collect();
        Self { linked, mappings, objects: HashMap::new(), files: HashMap::new() }
    }

    fn place(&mut self, addr: u64) -> Option<Place> {
        if let Some(LinkedPlace { object, number, file, file_offset }) = (self.linked)(addr) {
            let read = || match file {
                LinkedFile::Whole(bytes) => Code::of_object(&bytes).map(Rc::new),
                LinkedFile::Notes(notes, eh_frame) => Some(Rc::new(Code::of_notes(notes, eh_frame))),
            };
            let code = self.objects.entry(number).or_insert_with(read).clone();
            let code = code.and_then(|code| Some((Rc::clone(&code), code.address_of(file_offset?)?)));
            return Some(Place { name: object, code });
        }
        let mapping = self.mappings.iter().find(|mapping| (mapping.start..mapping.end).contains(&addr))?;
        let read = || read_file(&mapping.path).and_then(|bytes| Code::of_library(&bytes)).map(Rc::new);
        let code = self.files.entry(mapping.path.clone()).or_insert_with(read).clone();
        let offset = (addr - mapping.start).checked_add(mapping.offset);
        let code = code.and_then(|code| Some((Rc::clone(&code), code.address_of(offset?)?)));
        Some(Place { name: mapping.path.clone(), code })
    }

    fn is_code(&self, addr: u64) -> bool {
        (self.linked)(addr).is_some()
            || self.mappings.iter().any(|mapping| (mapping.start..mapping.end).contains(&addr))
    }

    /// Says what is at `address`; what counts is the instruction at `looked_up`.
    fn describe(&mut self, address: u64, looked_up: u64) -> Frame {
        let is_linked = (self.linked)(looked_up).is_some();
        let Some(place) = self.place(looked_up) else { return Frame { address, ..Frame::default() } };
        let function = place.code.as_ref().and_then(|(code, at)| code.function_at(*at));
        let function = function.map(|(name, offset)| {
            let name = farlink_graph::demangled(name).unwrap_or_else(|| name.to_owned());
            (name, offset + (address - looked_up))
        });
        let line = place.code.as_ref().and_then(|(code, at)| code.line_at(*at));
        Frame { address, object: Some(place.name), is_linked, function, line }
    }
}

/// Reads a line of `proc_pid_maps(5)`, if it is about code of a file.
fn executable_mapping(line: &str) -> Option<Mapping> {
    let mut words = line.splitn(6, ' ');
    let (start, end) = words.next()?.split_once('-')?;
    let is_code = words.next()?.contains('x');
    let hex = |digits: &str| u64::from_str_radix(digits, 16).ok();
    let offset = hex(words.next()?)?;
    let path = words.nth(2)?.trim_start();
    let mapping = Mapping { start: hex(start)?, end: hex(end)?, offset, path: path.to_owned() };
    (is_code && path.starts_with('/') && mapping.start < mapping.end).then_some(mapping)
}

/// Reads a file that a process says it has mapped: it is looked at only if it is an ordinary one of an ordinary size.
fn read_file(path: &str) -> Option<Vec<u8>> {
    let file = File::options().read(true).custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY).open(path).ok()?;
    let metadata = file.metadata().ok()?;
    if !metadata.is_file() || metadata.len() > MAX_FILE_BYTES {
        return None;
    }
    let mut bytes = Vec::new();
    file.take(MAX_FILE_BYTES).read_to_end(&mut bytes).ok()?;
    Some(bytes)
}

/// A thread as it has stopped.
pub(crate) struct Stopped<'a> {
    /// In the system's order, as far as they are known.
    pub(crate) registers: &'a [Option<u64>],
    pub(crate) stack_start: u64,
    pub(crate) stack: &'a [u8],
}

/// The registers of a frame, by the numbers of the unwind information.
#[derive(Clone)]
struct Registers([Option<u64>; 17]);

impl Stopped<'_> {
    fn read(&self, addr: u64) -> Option<u64> {
        let offset = usize::try_from(addr.checked_sub(self.stack_start)?).ok()?;
        let bytes = self.stack.get(offset..offset.checked_add(8)?)?;
        Some(u64::from_le_bytes(bytes.try_into().expect("there are 8")))
    }

    /// Returns the frames from the innermost on, and whether there may be more.
    pub(crate) fn frames(&self, finder: &mut Finder<'_>) -> (Vec<Frame>, bool) {
        let mut registers = Registers(SYSTEM_ORDER.map(|index| self.registers.get(index).copied().flatten()));
        let mut frames = Vec::new();
        // The innermost address is executed; the others are returned to, and what counts is the call before.
        let mut is_exact = true;
        while let Some(address) = registers.0[RETURN_ADDRESS].filter(|&address| address != 0 || frames.is_empty()) {
            if frames.len() == MAX_FRAMES {
                return (frames, true);
            }
            let looked_up = if is_exact { address } else { address.wrapping_sub(1) };
            frames.push(finder.describe(address, looked_up));
            let step = self.step(finder, &registers, looked_up, frames.len() == 1);
            let Some((caller, is_interrupted)) = step else { break };
            if caller.0[RSP] <= registers.0[RSP] && !is_interrupted {
                break;
            }
            (registers, is_exact) = (caller, is_interrupted);
        }
        (frames, false)
    }

    /// Returns the registers of the caller, and whether that was interrupted by a signal.
    fn step(
        &self,
        finder: &mut Finder<'_>,
        registers: &Registers,
        addr: u64,
        is_innermost: bool,
    ) -> Option<(Registers, bool)> {
        let place = finder.place(addr);
        let code = place.and_then(|place| place.code);
        let unwound = code.and_then(|(code, at)| self.unwind(&code, at, registers));
        unwound.or_else(|| is_innermost.then(|| self.guess(finder, registers)).flatten().map(|caller| (caller, false)))
    }

    /// Unwinds one frame by the unwind information of its code.
    fn unwind(&self, code: &Code, addr: u64, registers: &Registers) -> Option<(Registers, bool)> {
        let (section, bases) = code.eh_frame()?;
        let fde = section.fde_for_address(bases, addr, gimli::EhFrame::cie_from_offset).ok()?;
        let mut context = UnwindContext::new();
        let row = fde.unwind_info_for_address(&section, bases, &mut context, addr).ok()?;
        let evaluate = |expression: &gimli::UnwindExpression<usize>, initial: Option<u64>| {
            let expression = expression.get(&section).ok()?;
            self.evaluate(expression, fde.cie().encoding(), registers, initial)
        };
        let cfa = match row.cfa() {
            CfaRule::RegisterAndOffset { register, offset } => {
                registers.0.get(usize::from(register.0)).copied().flatten()?.wrapping_add_signed(*offset)
            }
            CfaRule::Expression(expression) => evaluate(expression, None)?,
        };
        let mut caller = Registers([None; 17]);
        for register in PRESERVED {
            caller.0[register] = registers.0[register];
        }
        caller.0[RSP] = Some(cfa);
        for &(Register(number), ref rule) in row.registers() {
            let own = |number: u16| registers.0.get(usize::from(number)).copied().flatten();
            let value = match rule {
                RegisterRule::SameValue => own(number),
                RegisterRule::Offset(offset) => self.read(cfa.wrapping_add_signed(*offset)),
                RegisterRule::ValOffset(offset) => Some(cfa.wrapping_add_signed(*offset)),
                RegisterRule::Register(Register(other)) => own(*other),
                RegisterRule::Expression(expression) => {
                    evaluate(expression, Some(cfa)).and_then(|addr| self.read(addr))
                }
                RegisterRule::ValExpression(expression) => evaluate(expression, Some(cfa)),
                _ => None,
            };
            if let Some(slot) = caller.0.get_mut(usize::from(number)) {
                *slot = value;
            }
        }
        Some((caller, fde.cie().is_signal_trampoline()))
    }

    fn evaluate(
        &self,
        expression: gimli::Expression<Reader>,
        encoding: gimli::Encoding,
        registers: &Registers,
        initial: Option<u64>,
    ) -> Option<u64> {
        let mut evaluation = expression.evaluation(encoding);
        evaluation.set_max_iterations(MAX_EVALUATION_STEPS);
        if let Some(initial) = initial {
            evaluation.set_initial_value(initial);
        }
        let mut result = evaluation.evaluate().ok()?;
        for _ in 0..MAX_EVALUATION_STEPS {
            result = match result {
                EvaluationResult::Complete => return evaluation.value_result()?.to_u64(u64::MAX).ok(),
                EvaluationResult::RequiresMemory { address, size: 8, .. } => {
                    evaluation.resume_with_memory(Value::Generic(self.read(address)?)).ok()?
                }
                EvaluationResult::RequiresRegister { register: Register(number), .. } => {
                    let value = registers.0.get(usize::from(number)).copied().flatten()?;
                    evaluation.resume_with_register(Value::Generic(value)).ok()?
                }
                _ => return None,
            };
        }
        None
    }

    /// Guesses the caller where there is no unwind information: where a call has just gone wrong, or code has none. The
    /// return address is on top of the stack, or there is a frame pointer.
    fn guess(&self, finder: &Finder<'_>, registers: &Registers) -> Option<Registers> {
        let top = registers.0[RSP].map(|rsp| (rsp, registers.0[RBP]));
        let framed = registers.0[RBP].map(|rbp| (rbp.wrapping_add(8), self.read(rbp)));
        [top, framed].into_iter().flatten().find_map(|(at, rbp)| {
            let address = self.read(at).filter(|&address| finder.is_code(address.wrapping_sub(1)))?;
            let mut caller = registers.clone();
            caller.0[RETURN_ADDRESS] = Some(address);
            caller.0[RSP] = Some(at.wrapping_add(8));
            caller.0[RBP] = rbp;
            Some(caller)
        })
    }
}

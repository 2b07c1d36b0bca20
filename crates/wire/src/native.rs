//! Calls of C functions, as they travel: the words that are in registers and on the stack when the call is made.
//!
//! By the System V convention of x86-64, arguments are words in six integer registers, eight floating-point registers and
//! on the stack, whichever have room; a result is up to two words in registers, or it is in memory whose address is
//! passed as a first argument. Which words of which types go where is the business of who makes the call, or serves it.
//!
//! | | bytes |
//! | --- | --- |
//! | [`Arguments`] | 8: how many of each (1 integer, 1 floating-point, 2 zero, 4 stack), then the words |
//! | [`NativeCall`] | 8 function, 8 [`ResultShape`], then its arguments |
//! | [`Returned`] | the words of the result, or its bytes in memory |

use crate::sps::{Decode, DecodeError, Encode, Input};
use farlink_addr::ExecutorAddr;

/// Integer registers for arguments: rdi, rsi, rdx, rcx, r8, r9.
pub const INT_REGISTERS: usize = 6;

/// Floating-point registers for arguments: xmm0 to xmm7, of which a word is used.
pub const FLOAT_REGISTERS: usize = 8;

/// Most words on the stack: 64 KiB. A thread's stack has to have room for them.
pub const MAX_STACK_WORDS: usize = 8192;

/// Most bytes of a result in memory.
pub const MAX_RESULT_BYTES: u64 = 1 << 16;

/// Bytes of a word.
pub const WORD_BYTES: usize = 8;

/// A kind of register.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RegisterClass {
    /// For integers and pointers.
    Int,
    /// For floating-point numbers.
    Float,
}

/// Where a function leaves its result.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ResultShape {
    /// There is none.
    Void,
    /// In the first register of a kind (rax, xmm0), and its second word in the next of its kind (rdx, xmm1).
    Registers(RegisterClass, Option<RegisterClass>),
    /// In memory of so many bytes, more than 16 and at most [`MAX_RESULT_BYTES`], at the address that the first integer
    /// register has.
    Memory(u32),
}

impl ResultShape {
    /// Returns how many bytes a result takes as [`Returned`].
    #[must_use]
    pub const fn bytes(self) -> usize {
        match self {
            Self::Void => 0,
            Self::Registers(_, None) => WORD_BYTES,
            Self::Registers(_, Some(_)) => 2 * WORD_BYTES,
            Self::Memory(bytes) => bytes as usize,
        }
    }

    /// Returns the number that stands for the shape.
    #[must_use]
    pub const fn to_word(self) -> u64 {
        const fn class(class: RegisterClass) -> u64 {
            match class {
                RegisterClass::Int => 1,
                RegisterClass::Float => 2,
            }
        }
        match self {
            Self::Void => 0,
            Self::Registers(first, None) => class(first),
            Self::Registers(first, Some(second)) => class(first) | class(second) << 4,
            Self::Memory(bytes) => (bytes as u64) << 8,
        }
    }

    /// Returns the shape that `word` stands for.
    ///
    /// # Errors
    ///
    /// Fails if there is none.
    pub fn from_word(word: u64) -> Result<Self, DecodeError> {
        let class = |nibble: u64| match nibble {
            1 => Some(RegisterClass::Int),
            2 => Some(RegisterClass::Float),
            _ => None,
        };
        let bytes = word >> 8;
        let shape = match (word & 0xf, word >> 4 & 0xf) {
            (0, 0) if word == 0 => Some(Self::Void),
            (0, 0) if (17..=MAX_RESULT_BYTES).contains(&bytes) => Some(Self::Memory(bytes as u32)),
            (first, 0) if bytes == 0 => class(first).map(|first| Self::Registers(first, None)),
            (first, second) if bytes == 0 => {
                class(first).zip(class(second)).map(|(first, second)| Self::Registers(first, Some(second)))
            }
            _ => None,
        };
        shape.ok_or(DecodeError::InvalidValue { what: "the shape of a result", value: word })
    }
}

/// How many words arguments have in each place.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ArgumentShape {
    /// Words in integer registers, at most [`INT_REGISTERS`].
    pub ints: usize,
    /// Words in floating-point registers, at most [`FLOAT_REGISTERS`].
    pub floats: usize,
    /// Words on the stack, at most [`MAX_STACK_WORDS`].
    pub stack: usize,
}

impl ArgumentShape {
    /// Returns the number of words in all places.
    #[must_use]
    pub const fn words(self) -> usize {
        self.ints + self.floats + self.stack
    }

    /// Returns the number that stands for the shape.
    #[must_use]
    pub const fn to_word(self) -> u64 {
        self.ints as u64 | (self.floats as u64) << 8 | (self.stack as u64) << 32
    }

    /// Returns the shape that `word` stands for.
    ///
    /// # Errors
    ///
    /// Fails if there is none.
    pub fn from_word(word: u64) -> Result<Self, DecodeError> {
        let shape =
            Self { ints: word as usize & 0xff, floats: word as usize >> 8 & 0xff, stack: (word >> 32) as usize };
        let fits = shape.ints <= INT_REGISTERS && shape.floats <= FLOAT_REGISTERS && shape.stack <= MAX_STACK_WORDS;
        if fits && word >> 16 & 0xffff == 0 {
            Ok(shape)
        } else {
            Err(DecodeError::InvalidValue { what: "the shape of arguments", value: word })
        }
    }
}

/// The arguments of a call.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Arguments {
    ints: [u64; INT_REGISTERS],
    floats: [u64; FLOAT_REGISTERS],
    int_count: usize,
    float_count: usize,
    stack: Vec<u64>,
}

impl Arguments {
    /// Returns how many words there are in each place.
    #[must_use]
    pub fn shape(&self) -> ArgumentShape {
        ArgumentShape { ints: self.int_count, floats: self.float_count, stack: self.stack.len() }
    }

    /// Returns the words of the integer registers. Those that are not used are 0.
    #[must_use]
    pub fn ints(&self) -> &[u64; INT_REGISTERS] {
        &self.ints
    }

    /// Returns the words of the floating-point registers. Those that are not used are 0.
    #[must_use]
    pub fn floats(&self) -> &[u64; FLOAT_REGISTERS] {
        &self.floats
    }

    /// Returns the words on the stack, that at the lowest address first.
    #[must_use]
    pub fn stack(&self) -> &[u64] {
        &self.stack
    }

    /// Sets the word of the first integer register, which is the address of a result in memory.
    pub fn set_first_int(&mut self, word: u64) {
        self.ints[0] = word;
    }

    /// Adds the word or the two words of a value whose kinds are known. If the registers do not suffice for both, both are
    /// on the stack.
    #[inline]
    pub fn push(&mut self, words: [u64; 2], first: RegisterClass, second: Option<RegisterClass>) {
        let is = |class, wanted| usize::from(class == wanted);
        let count = |wanted| is(Some(first), Some(wanted)) + is(second, Some(wanted));
        if self.int_count + count(RegisterClass::Int) > INT_REGISTERS
            || self.float_count + count(RegisterClass::Float) > FLOAT_REGISTERS
        {
            return self.push_stack(&words[..1 + usize::from(second.is_some())]);
        }
        self.push_register(words[0], first);
        if let Some(second) = second {
            self.push_register(words[1], second);
        }
    }

    #[inline]
    fn push_register(&mut self, word: u64, class: RegisterClass) {
        match class {
            RegisterClass::Int => {
                self.ints[self.int_count] = word;
                self.int_count += 1;
            }
            RegisterClass::Float => {
                self.floats[self.float_count] = word;
                self.float_count += 1;
            }
        }
    }

    /// Adds the words of a value that is in memory.
    pub fn push_stack(&mut self, words: &[u64]) {
        self.stack.extend_from_slice(words);
    }

    /// Returns the arguments that have these words. What is more than the shape has is left out.
    #[must_use]
    pub fn from_words(shape: ArgumentShape, ints: &[u64], floats: &[u64], stack: &[u64]) -> Self {
        let mut arguments = Self {
            int_count: shape.ints,
            float_count: shape.floats,
            stack: stack[..shape.stack].to_vec(),
            ..Self::default()
        };
        arguments.ints[..shape.ints].copy_from_slice(&ints[..shape.ints]);
        arguments.floats[..shape.floats].copy_from_slice(&floats[..shape.floats]);
        arguments
    }
}

impl Encode for Arguments {
    fn encode(&self, out: &mut Vec<u8>) {
        let shape = self.shape();
        out.reserve(WORD_BYTES * (1 + shape.words()));
        shape.to_word().encode(out);
        let registers = self.ints[..self.int_count].iter().chain(&self.floats[..self.float_count]);
        for word in registers.chain(&self.stack) {
            word.encode(out);
        }
    }
}

impl Decode<'_> for Arguments {
    const MIN_BYTES: usize = WORD_BYTES;

    fn decode(input: &mut Input<'_>) -> Result<Self, DecodeError> {
        let shape = ArgumentShape::from_word(u64::decode(input)?)?;
        let words = input.take((shape.words() * WORD_BYTES) as u64)?;
        let mut words = words.chunks_exact(WORD_BYTES).map(to_word);
        let mut arguments = Self { int_count: shape.ints, float_count: shape.floats, ..Self::default() };
        arguments.ints.iter_mut().take(shape.ints).zip(&mut words).for_each(|(register, word)| *register = word);
        arguments.floats.iter_mut().take(shape.floats).zip(&mut words).for_each(|(register, word)| *register = word);
        arguments.stack = words.collect();
        Ok(arguments)
    }
}

/// Returns the word that a chunk of bytes is.
fn to_word(bytes: &[u8]) -> u64 {
    u64::from_le_bytes(bytes.try_into().expect("chunks have the length of a word"))
}

/// A call of a C function.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NativeCall {
    /// The function.
    pub function: ExecutorAddr,
    /// Where it leaves its result.
    pub result: ResultShape,
    /// Its arguments. If the result is in memory, the first integer is for its address.
    pub arguments: Arguments,
}

impl Encode for NativeCall {
    fn encode(&self, out: &mut Vec<u8>) {
        out.reserve(WORD_BYTES * (3 + self.arguments.shape().words()));
        self.function.encode(out);
        self.result.to_word().encode(out);
        self.arguments.encode(out);
    }
}

impl Decode<'_> for NativeCall {
    const MIN_BYTES: usize = 3 * WORD_BYTES;

    fn decode(input: &mut Input<'_>) -> Result<Self, DecodeError> {
        let function = ExecutorAddr::decode(input)?;
        let result = ResultShape::from_word(u64::decode(input)?)?;
        let arguments = Arguments::decode(input)?;
        if matches!(result, ResultShape::Memory(_)) && arguments.int_count == 0 {
            return Err(DecodeError::InvalidValue {
                what: "the place of a result in memory among arguments",
                value: 0,
            });
        }
        Ok(Self { function, result, arguments })
    }
}

/// What a C function returned: its words, or its bytes in memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Returned(Bytes);

#[derive(Clone, Debug, PartialEq, Eq)]
enum Bytes {
    Words([u8; 2 * WORD_BYTES], usize),
    Memory(Vec<u8>),
}

impl Returned {
    /// Returns a result of so many words.
    ///
    /// # Panics
    ///
    /// Panics if there are more than two.
    #[must_use]
    pub fn from_words(words: [u64; 2], count: usize) -> Self {
        assert!(count <= 2, "a result has at most two words");
        let mut bytes = [0; 2 * WORD_BYTES];
        bytes[..WORD_BYTES].copy_from_slice(&words[0].to_le_bytes());
        bytes[WORD_BYTES..].copy_from_slice(&words[1].to_le_bytes());
        Self(Bytes::Words(bytes, count * WORD_BYTES))
    }

    /// Returns a result that is in memory.
    #[must_use]
    pub fn from_memory(bytes: Vec<u8>) -> Self {
        Self(Bytes::Memory(bytes))
    }

    /// Returns the result's bytes.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        match &self.0 {
            Bytes::Words(bytes, len) => &bytes[..*len],
            Bytes::Memory(bytes) => bytes,
        }
    }

    /// Returns the result's words, if it has any. Those that are not there are 0.
    #[must_use]
    pub fn words(&self) -> [u64; 2] {
        let mut words = self.bytes().chunks_exact(WORD_BYTES).map(to_word);
        [(); 2].map(|()| words.next().unwrap_or(0))
    }
}

impl Encode for Returned {
    fn encode(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(self.bytes());
    }
}

impl Decode<'_> for Returned {
    const MIN_BYTES: usize = 0;

    fn decode(input: &mut Input<'_>) -> Result<Self, DecodeError> {
        let rest = input.take(input.rest().len() as u64)?;
        if rest.len() > 2 * WORD_BYTES {
            return Ok(Self::from_memory(rest.to_vec()));
        }
        let mut bytes = [0; 2 * WORD_BYTES];
        bytes[..rest.len()].copy_from_slice(rest);
        Ok(Self(Bytes::Words(bytes, rest.len())))
    }
}

/// What a stub of linked code knows of the controller's function that it stands for. The stub passes its address in r10 to
/// the code at [`CALLBACK_ENTRY_KEY`](crate::functions::CALLBACK_ENTRY_KEY).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct CallbackDescriptor {
    /// What stands for the session: see [`DISPATCH_CONTEXT`](crate::functions::DISPATCH_CONTEXT).
    pub session: u64,
    /// The tag of the controller's function.
    pub tag: u64,
    /// A [`ResultShape`], as a word.
    pub result: u64,
    /// An [`ArgumentShape`], as a word.
    pub arguments: u64,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sps::{from_bytes, to_bytes};
    use RegisterClass::{Float, Int};

    /// Every shape of a result and of arguments is the number that stands for it; other numbers are errors.
    #[test]
    fn shapes_are_words() {
        use ResultShape::{Memory, Registers, Void};
        for shape in [Void, Registers(Int, None), Registers(Float, Some(Int)), Memory(17), Memory(1 << 16)] {
            assert_eq!(ResultShape::from_word(shape.to_word()), Ok(shape));
        }
        for bad in [3, 0x10, 0x31, 0x101, 16 << 8, (MAX_RESULT_BYTES + 1) << 8, u64::MAX] {
            assert!(ResultShape::from_word(bad).is_err(), "{bad:#x}");
        }
        let shape = ArgumentShape { ints: 6, floats: 8, stack: MAX_STACK_WORDS };
        assert_eq!(ArgumentShape::from_word(shape.to_word()), Ok(shape));
        for bad in [7, 9 << 8, 1 << 16, (MAX_STACK_WORDS as u64 + 1) << 32] {
            assert!(ArgumentShape::from_word(bad).is_err(), "{bad:#x}");
        }
    }

    /// Values take registers while both of their words find room, and stack words after that; later ones may still find a
    /// register.
    #[test]
    fn arguments_find_their_places() {
        let mut arguments = Arguments::default();
        for word in 0..5 {
            arguments.push([word, 0], Int, None);
        }
        arguments.push([10, 11], Int, Some(Int));
        arguments.push([20, 21], Int, Some(Float));
        arguments.push([30, 0], Int, None);
        arguments.push_stack(&[40, 41, 42]);
        assert_eq!(arguments.ints(), &[0, 1, 2, 3, 4, 20]);
        assert_eq!(arguments.floats()[0], 21);
        assert_eq!(arguments.stack(), &[10, 11, 30, 40, 41, 42]);
        let call = NativeCall { function: ExecutorAddr::new(0x1000), result: ResultShape::Memory(24), arguments };
        let bytes = to_bytes(&call);
        assert_eq!(from_bytes(&bytes), Ok(call));
        assert!((0..bytes.len()).all(|len| from_bytes::<NativeCall>(&bytes[..len]).is_err()));
    }

    /// Results come back as words or as bytes.
    #[test]
    fn results_are_words_or_bytes() {
        for returned in [
            Returned::from_words([0, 0], 0),
            Returned::from_words([7, 0], 1),
            Returned::from_words([7, 8], 2),
            Returned::from_memory(vec![1; 17]),
        ] {
            assert_eq!(from_bytes(&to_bytes(&returned)), Ok(returned));
        }
        assert_eq!(Returned::from_words([7, 8], 2).words(), [7, 8]);
        assert_eq!(Returned::from_words([7, 8], 1).words(), [7, 0]);
    }
}

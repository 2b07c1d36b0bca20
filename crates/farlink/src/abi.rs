//! Values that C functions take and give: which registers they are in, by the System V convention of x86-64.
//!
//! A value of up to 16 bytes is one or two words. A word that has an integer or a pointer in any of its bytes is in an
//! integer register, one that has floating-point numbers alone in a floating-point register. Larger values are in memory.
//! Everything is known when the caller is compiled.

use crate::pointer::ExecutorPtr;
use farlink_addr::ExecutorAddr;
use farlink_wire::native::{
    ArgumentShape, Arguments, FLOAT_REGISTERS, INT_REGISTERS, MAX_RESULT_BYTES, MAX_STACK_WORDS, RegisterClass,
    ResultShape, Returned, WORD_BYTES,
};

/// Bytes of the largest value that is in registers.
const REGISTER_BYTES: usize = 2 * WORD_BYTES;

/// The bytes of a type, as C lays it out.
#[derive(Clone, Copy, Debug)]
pub struct Layout {
    /// Size in bytes.
    size: usize,
    /// A bit for each of the first 16 bytes that belongs to an integer or a pointer.
    ints: u16,
    /// A bit for each of the first 16 bytes that belongs to a floating-point number.
    floats: u16,
}

impl Layout {
    const fn int(size: usize) -> Self {
        Self { size, ints: ((1u32 << size) - 1) as u16, floats: 0 }
    }

    const fn float(size: usize) -> Self {
        Self { size, ints: 0, floats: ((1u32 << size) - 1) as u16 }
    }

    /// Returns the layout of a structure without fields yet.
    #[must_use]
    pub const fn empty(size: usize) -> Self {
        Self { size, ints: 0, floats: 0 }
    }

    /// Returns the layout with a field at `offset`.
    #[must_use]
    pub const fn with(self, offset: usize, field: Self) -> Self {
        if offset >= REGISTER_BYTES {
            return self;
        }
        Self { size: self.size, ints: self.ints | field.ints << offset, floats: self.floats | field.floats << offset }
    }

    const fn class(self, word: usize) -> RegisterClass {
        // Padding alone counts as floating-point numbers do.
        if (self.ints >> (word * WORD_BYTES)) & 0xff != 0 { RegisterClass::Int } else { RegisterClass::Float }
    }

    /// Returns the kinds of its words, or nothing if it is in memory.
    const fn classes(self) -> Option<(RegisterClass, Option<RegisterClass>)> {
        if self.size > REGISTER_BYTES {
            return None;
        }
        let second = if self.size > WORD_BYTES { Some(self.class(1)) } else { None };
        Some((self.class(0), second))
    }

    const fn words(self) -> usize {
        self.size.div_ceil(WORD_BYTES)
    }

    const fn result(self) -> ResultShape {
        assert!(self.size as u64 <= MAX_RESULT_BYTES, "a result has at most 64 KiB");
        match self.classes() {
            Some((first, second)) => ResultShape::Registers(first, second),
            None => ResultShape::Memory(self.size as u32),
        }
    }
}

/// A field of a structure of C's: a [`CValue`], or an array of them.
pub trait CField: Copy + Send + 'static {
    /// Its bytes.
    #[doc(hidden)]
    const LAYOUT: Layout;

    /// Writes the value at the front of `bytes`. What is padding stays as it is.
    #[doc(hidden)]
    fn store(self, bytes: &mut [u8]);

    /// Reads a value from the front of `bytes`, which may be any.
    #[doc(hidden)]
    fn load(bytes: &[u8]) -> Self;
}

/// A value that C functions take and give: an integer, a floating-point number, a `bool`, an [`ExecutorPtr`], an
/// [`ExecutorAddr`], or a structure of such, which [`c_struct!`](crate::c_struct) makes one.
pub trait CValue: CField {
    /// Returns the words of a value of at most 16 bytes.
    #[doc(hidden)]
    fn words(self) -> [u64; 2] {
        let mut bytes = [0; REGISTER_BYTES];
        self.store(&mut bytes);
        to_words(&bytes)
    }
}

fn to_words(bytes: &[u8; REGISTER_BYTES]) -> [u64; 2] {
    [0, WORD_BYTES].map(|at| u64::from_le_bytes(*bytes[at..].first_chunk().expect("there are two words")))
}

fn to_bytes(words: [u64; 2]) -> [u8; REGISTER_BYTES] {
    let mut bytes = [0; REGISTER_BYTES];
    bytes[..WORD_BYTES].copy_from_slice(&words[0].to_le_bytes());
    bytes[WORD_BYTES..].copy_from_slice(&words[1].to_le_bytes());
    bytes
}

macro_rules! scalars {
    ($($kind:ident $wide:ty: $($scalar:ty),*;)*) => {$($(
        impl CField for $scalar {
            const LAYOUT: Layout = Layout::$kind(size_of::<Self>());

            fn store(self, bytes: &mut [u8]) {
                bytes[..size_of::<Self>()].copy_from_slice(&self.to_le_bytes());
            }

            fn load(bytes: &[u8]) -> Self {
                Self::from_le_bytes(*bytes.first_chunk().expect("the bytes are those of a value"))
            }
        }

        impl CValue for $scalar {
            scalars!(@words $kind $wide);
        }
    )*)*};
    (@words int $wide:ty) => {
        // Compilers count on it that what is shorter than 32 bits has been extended.
        #[inline]
        fn words(self) -> [u64; 2] {
            [<$wide>::from(self) as u64, 0]
        }
    };
    (@words float $bits:ty) => {
        #[inline]
        fn words(self) -> [u64; 2] {
            [<$bits>::from(self.to_bits()) as u64, 0]
        }
    };
}

scalars! {
    int i64: i8, i16, i32, i64;
    int u64: u8, u16, u32, u64;
    float u64: f32, f64;
}

/// Values that are stored as others are.
macro_rules! stored_as {
    ($([$($generics:tt)*] $value:ty: $as:ty, $to:expr, $from:expr;)*) => {$(
        impl<$($generics)*> CField for $value {
            const LAYOUT: Layout = <$as as CField>::LAYOUT;

            fn store(self, bytes: &mut [u8]) {
                let to: fn(Self) -> $as = $to;
                to(self).store(bytes);
            }

            fn load(bytes: &[u8]) -> Self {
                let from: fn($as) -> Self = $from;
                from(<$as>::load(bytes))
            }
        }

        impl<$($generics)*> CValue for $value {
            #[inline]
            fn words(self) -> [u64; 2] {
                let to: fn(Self) -> $as = $to;
                to(self).words()
            }
        }
    )*};
}

stored_as! {
    [] bool: u8, u8::from, |byte| byte != 0;
    [] usize: u64, |value| value as u64, |value| value as usize;
    [] isize: i64, |value| value as i64, |value| value as isize;
    [] ExecutorAddr: u64, ExecutorAddr::as_u64, ExecutorAddr::new;
    [T: 'static] ExecutorPtr<T>: ExecutorAddr, ExecutorPtr::addr, ExecutorPtr::new;
}

impl<T: CField, const N: usize> CField for [T; N] {
    const LAYOUT: Layout = {
        let mut layout = Layout::empty(size_of::<Self>());
        let mut index = 0;
        while index < N && index * size_of::<T>() < REGISTER_BYTES {
            layout = layout.with(index * size_of::<T>(), T::LAYOUT);
            index += 1;
        }
        layout
    };

    fn store(self, bytes: &mut [u8]) {
        for (element, bytes) in self.into_iter().zip(bytes.chunks_exact_mut(size_of::<T>())) {
            element.store(bytes);
        }
    }

    fn load(bytes: &[u8]) -> Self {
        std::array::from_fn(|index| T::load(&bytes[index * size_of::<T>()..]))
    }
}

/// Defines structures that C functions take and give by value, laid out as in C.
///
/// ```
/// farlink::c_struct! {
///     /// As C's `struct point { double x, y; int tag[2]; }`.
///     #[derive(Debug, PartialEq)]
///     pub struct Point {
///         pub x: f64,
///         pub y: f64,
///         pub tag: [i32; 2],
///     }
/// }
/// ```
///
/// The fields are integers, floating-point numbers, `bool`, executor pointers, such structures, and arrays of those.
#[macro_export]
macro_rules! c_struct {
    ($($(#[$meta:meta])* $vis:vis struct $name:ident {
        $($(#[$field_meta:meta])* $field_vis:vis $field:ident: $type:ty),+ $(,)?
    })*) => {$(
        $(#[$meta])*
        #[derive(Clone, Copy)]
        #[repr(C)]
        $vis struct $name {
            $($(#[$field_meta])* $field_vis $field: $type),+
        }

        impl $crate::CValue for $name {}

        impl $crate::abi::CField for $name {
            const LAYOUT: $crate::abi::Layout = {
                assert!(align_of::<Self>() <= 8, "fields have at most the alignment of a word");
                $crate::abi::Layout::empty(size_of::<Self>())
                    $(.with(::core::mem::offset_of!(Self, $field), <$type as $crate::abi::CField>::LAYOUT))+
            };

            fn store(self, bytes: &mut [u8]) {
                $(<$type as $crate::abi::CField>::store(
                    self.$field,
                    &mut bytes[::core::mem::offset_of!(Self, $field)..],
                );)+
            }

            fn load(bytes: &[u8]) -> Self {
                Self {
                    $($field: <$type as $crate::abi::CField>::load(
                        &bytes[::core::mem::offset_of!(Self, $field)..],
                    )),+
                }
            }
        }
    )*};
}

/// A type in the signature of a C function: a [`CValue`], or a pointer of the executor's, whose value is an
/// [`ExecutorPtr`].
pub trait CType {
    /// What is passed for it.
    type Value: CValue;
}

impl<T: CValue> CType for T {
    type Value = T;
}

impl<T: 'static> CType for *const T {
    type Value = ExecutorPtr<T>;
}

impl<T: 'static> CType for *mut T {
    type Value = ExecutorPtr<T>;
}

/// The type of a C function's result: a [`CType`], or `()` for none.
pub trait CResult {
    /// What comes back.
    type Value: Send + 'static;

    /// Where the function leaves it.
    #[doc(hidden)]
    const SHAPE: ResultShape;

    /// Returns the value, if that is as long as it has to be.
    #[doc(hidden)]
    fn from_returned(returned: &Returned) -> Option<Self::Value>;

    /// Returns how the value comes back.
    #[doc(hidden)]
    fn to_returned(value: Self::Value) -> Returned;
}

impl CResult for () {
    type Value = ();
    const SHAPE: ResultShape = ResultShape::Void;

    fn from_returned(returned: &Returned) -> Option<()> {
        returned.bytes().is_empty().then_some(())
    }

    fn to_returned((): ()) -> Returned {
        Returned::from_words([0; 2], 0)
    }
}

impl<T: CType> CResult for T {
    type Value = T::Value;
    const SHAPE: ResultShape = T::Value::LAYOUT.result();

    #[inline]
    fn from_returned(returned: &Returned) -> Option<T::Value> {
        (returned.bytes().len() == Self::SHAPE.bytes()).then(|| T::Value::load(returned.bytes()))
    }

    fn to_returned(value: T::Value) -> Returned {
        let layout = T::Value::LAYOUT;
        if layout.classes().is_some() {
            return Returned::from_words(value.words(), layout.words());
        }
        let mut bytes = vec![0; layout.size];
        value.store(&mut bytes);
        Returned::from_memory(bytes)
    }
}

/// Adds a value to the arguments of a call.
#[inline]
pub(crate) fn push<T: CValue>(arguments: &mut Arguments, value: T) {
    match const { T::LAYOUT.classes() } {
        Some((first, second)) => arguments.push(value.words(), first, second),
        None => {
            let mut bytes = vec![0; T::LAYOUT.words() * WORD_BYTES];
            value.store(&mut bytes);
            let word = |bytes: &[u8]| u64::from_le_bytes(*bytes.first_chunk().expect("a chunk is a word"));
            let words: Vec<u64> = bytes.chunks_exact(WORD_BYTES).map(word).collect();
            arguments.push_stack(&words);
        }
    }
}

/// Returns where the arguments of a function go that has these types and this result.
pub(crate) const fn argument_shape(layouts: &[Layout], result: ResultShape) -> ArgumentShape {
    let mut shape = ArgumentShape { ints: 0, floats: 0, stack: 0 };
    if matches!(result, ResultShape::Memory(_)) {
        shape.ints = 1;
    }
    let mut index = 0;
    while index < layouts.len() {
        shape = take(shape, layouts[index]).1;
        index += 1;
    }
    assert!(shape.stack <= MAX_STACK_WORDS, "arguments have at most 64 KiB on the stack");
    shape
}

/// Returns whether the next value is in registers, and what has been used after it.
const fn take(used: ArgumentShape, layout: Layout) -> (bool, ArgumentShape) {
    if let Some((first, second)) = layout.classes() {
        let mut next = used;
        match first {
            RegisterClass::Int => next.ints += 1,
            RegisterClass::Float => next.floats += 1,
        }
        match second {
            Some(RegisterClass::Int) => next.ints += 1,
            Some(RegisterClass::Float) => next.floats += 1,
            None => {}
        }
        if next.ints <= INT_REGISTERS && next.floats <= FLOAT_REGISTERS {
            return (true, next);
        }
    }
    (false, ArgumentShape { ints: used.ints, floats: used.floats, stack: used.stack + layout.words() })
}

/// Takes the values out of the arguments of a call, in order.
pub(crate) struct Taker<'a> {
    arguments: &'a Arguments,
    used: ArgumentShape,
}

impl<'a> Taker<'a> {
    /// Begins with the arguments of a function with this result.
    pub(crate) fn new(arguments: &'a Arguments, result: ResultShape) -> Self {
        Self { arguments, used: argument_shape(&[], result) }
    }

    /// Returns the next value. There has to be one.
    pub(crate) fn take<T: CValue>(&mut self) -> T {
        let used = self.used;
        let (in_registers, next) = take(used, T::LAYOUT);
        self.used = next;
        let Some((first, second)) = T::LAYOUT.classes().filter(|_| in_registers) else {
            let words = &self.arguments.stack()[used.stack..next.stack];
            let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
            return T::load(&bytes);
        };
        let mut ints = self.arguments.ints()[used.ints..next.ints].iter();
        let mut floats = self.arguments.floats()[used.floats..next.floats].iter();
        let mut word = |class| if class == RegisterClass::Int { ints.next() } else { floats.next() };
        let words = [Some(first), second].map(|class| class.and_then(&mut word).copied().unwrap_or(0));
        T::load(&to_bytes(words))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use RegisterClass::{Float, Int};

    crate::c_struct! {
        #[derive(Debug, PartialEq)]
        struct Mixed { a: f32, b: i32, c: f64 }
        #[derive(Debug, PartialEq)]
        struct Floats { a: [f32; 3] }
        #[derive(Debug, PartialEq)]
        struct Nested { a: Floats, b: bool }
        #[derive(Debug, PartialEq)]
        struct Big { a: [u8; 17] }
    }

    /// Structures are in the registers that the psABI says: a word with an integer in it is one.
    #[test]
    fn classes() {
        assert_eq!(Mixed::LAYOUT.classes(), Some((Int, Some(Float))));
        assert_eq!(Floats::LAYOUT.classes(), Some((Float, Some(Float))));
        assert_eq!(Nested::LAYOUT.classes(), Some((Float, Some(Int))));
        assert_eq!(Big::LAYOUT.classes(), None);
        assert_eq!(<u8 as CResult>::SHAPE, ResultShape::Registers(Int, None));
        assert_eq!(<*const u8 as CResult>::SHAPE, ResultShape::Registers(Int, None));
        assert_eq!(<Big as CResult>::SHAPE, ResultShape::Memory(17));
    }

    /// What is pushed is taken out as it was, also when registers have run out.
    #[test]
    fn pushed_values_are_taken() {
        let nested = Nested { a: Floats { a: [1.0, -2.0, 3.5] }, b: true };
        let mixed = Mixed { a: 0.5, b: -7, c: 1e300 };
        let mut arguments = Arguments::default();
        for _ in 0..4 {
            push(&mut arguments, nested);
            push(&mut arguments, mixed);
            push(&mut arguments, -1i8);
            push(&mut arguments, Big { a: [9; 17] });
        }
        let of_each = [Nested::LAYOUT, Mixed::LAYOUT, i8::LAYOUT, Big::LAYOUT];
        assert_eq!(arguments.shape(), argument_shape(&of_each.repeat(4), ResultShape::Void));
        let mut taker = Taker::new(&arguments, ResultShape::Void);
        for _ in 0..4 {
            assert_eq!(taker.take::<Nested>(), nested);
            assert_eq!(taker.take::<Mixed>(), mixed);
            assert_eq!(taker.take::<i8>(), -1);
            assert_eq!(taker.take::<Big>(), Big { a: [9; 17] });
        }
    }

    /// A result of any bytes is a value; one of another length is none.
    #[test]
    fn results_are_checked() {
        assert_eq!(<bool as CResult>::from_returned(&Returned::from_words([2, 0], 1)), Some(true));
        assert_eq!(<bool as CResult>::from_returned(&Returned::from_words([2, 0], 2)), None);
        assert_eq!(<() as CResult>::from_returned(&Returned::from_words([2, 0], 1)), None);
        let big = Big { a: [7; 17] };
        assert_eq!(Big::from_returned(&Big::to_returned(big)), Some(big));
        assert_eq!(Big::from_returned(&Returned::from_memory(vec![0; 18])), None);
    }
}

//! The Simple Packed Serialization of LLVM ORC.
//!
//! | type here | SPS type | bytes |
//! | --- | --- | --- |
//! | `bool`, `u8` | bool, u8 | 1 |
//! | `u16`, `u32`, `u64`, `i32`, `i64` | the same | 2, 4, 8, 4, 8, little-endian |
//! | [`ExecutorAddr`] | ExecutorAddr | 8 |
//! | [`ExecutorAddrRange`] | ExecutorAddrRange | 8 start, 8 end |
//! | `Vec<T>` | Sequence | 8 count, then the elements |
//! | `String`, [`Blob`] | Sequence of char | 8 length, then the bytes |
//! | tuples, structs | Tuple | the elements in order |
//! | `Option<T>` | Optional | 1 present, then the value if it is |
//! | [`SpsError`] | Error | 1 failed, then the text if it did |
//! | `Result<T, String>` | Expected | 1 has a value, then the value, else the text |
//!
//! Decoders read what they need; [`from_bytes`] ignores what follows, as LLVM's do.
//!
//! ```
//! use farlink_addr::ExecutorAddr;
//! use farlink_wire::sps::{DecodeError, from_bytes, to_bytes};
//!
//! let bytes = to_bytes(&(ExecutorAddr::new(0x1000), "abc"));
//! assert_eq!(bytes, b"\0\x10\0\0\0\0\0\0\x03\0\0\0\0\0\0\0abc");
//! let (addr, text): (ExecutorAddr, String) = from_bytes(&bytes)?;
//! assert_eq!((addr.as_u64(), text.as_str()), (0x1000, "abc"));
//! # Ok::<(), DecodeError>(())
//! ```

use farlink_addr::{ExecutorAddr, ExecutorAddrRange};
use std::borrow::Cow;

/// Why bytes are not the value that was expected.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum DecodeError {
    /// The bytes end within a value.
    #[error("{needed} bytes needed, {left} left")]
    TooShort {
        /// Bytes that the value takes.
        needed: u64,
        /// Bytes that are there.
        left: u64,
    },
    /// A sequence claims more elements than the bytes that follow can hold.
    #[error("a sequence of {count} elements of at least {min_bytes} bytes each cannot be in the {left} bytes left")]
    SequenceTooLong {
        /// Elements claimed.
        count: u64,
        /// Smallest size of an element in bytes.
        min_bytes: u64,
        /// Bytes that are there.
        left: u64,
    },
    /// A text is not UTF-8.
    #[error("a text of {len} bytes is not UTF-8")]
    NotUtf8 {
        /// Length of the text in bytes.
        len: u64,
    },
    /// A value that its type does not have.
    #[error("{what} cannot be {value:#x}")]
    InvalidValue {
        /// The type or field.
        what: &'static str,
        /// The value received.
        value: u64,
    },
}

/// A value with an SPS encoding.
pub trait Encode {
    /// Appends the encoding of `self` to `out`.
    fn encode(&self, out: &mut Vec<u8>);
}

/// A value that can be read from its SPS encoding.
pub trait Decode<'a>: Sized {
    /// Smallest number of bytes that a value takes; bounds the count of a sequence before anything is allocated.
    const MIN_BYTES: usize;

    /// Reads a value from the front of `input`.
    ///
    /// # Errors
    ///
    /// Fails if the bytes end early or are not a value of this type.
    fn decode(input: &mut Input<'a>) -> Result<Self, DecodeError>;
}

/// Returns the encoding of `value`.
pub fn to_bytes(value: &(impl Encode + ?Sized)) -> Vec<u8> {
    let mut out = Vec::new();
    value.encode(&mut out);
    out
}

/// Reads a value from the front of `bytes` and ignores what follows it.
///
/// # Errors
///
/// Fails if the bytes end early or are not a value of this type.
pub fn from_bytes<'a, T: Decode<'a>>(bytes: &'a [u8]) -> Result<T, DecodeError> {
    T::decode(&mut Input::new(bytes))
}

/// Bytes that are being decoded, from the front.
#[derive(Clone, Debug)]
pub struct Input<'a>(&'a [u8]);

impl<'a> Input<'a> {
    /// Starts at the front of `bytes`.
    #[must_use]
    pub fn new(bytes: &'a [u8]) -> Self {
        Self(bytes)
    }

    /// Returns the bytes that have not been decoded.
    #[must_use]
    pub fn rest(&self) -> &'a [u8] {
        self.0
    }

    /// Takes `len` bytes from the front.
    ///
    /// # Errors
    ///
    /// Fails if fewer are left.
    pub fn take(&mut self, len: u64) -> Result<&'a [u8], DecodeError> {
        let left = self.0.len() as u64;
        if len > left {
            return Err(DecodeError::TooShort { needed: len, left });
        }
        let (front, rest) = self.0.split_at(len as usize);
        self.0 = rest;
        Ok(front)
    }

    fn take_array<const N: usize>(&mut self) -> Result<[u8; N], DecodeError> {
        let bytes = self.take(N as u64)?;
        let mut array = [0; N];
        array.copy_from_slice(bytes);
        Ok(array)
    }
}

macro_rules! integers {
    ($($int:ty),*) => {$(
        impl Encode for $int {
            fn encode(&self, out: &mut Vec<u8>) {
                out.extend_from_slice(&self.to_le_bytes());
            }
        }

        impl Decode<'_> for $int {
            const MIN_BYTES: usize = size_of::<$int>();

            fn decode(input: &mut Input<'_>) -> Result<Self, DecodeError> {
                Ok(<$int>::from_le_bytes(input.take_array()?))
            }
        }
    )*};
}

integers!(u8, u16, u32, u64, i32, i64);

impl Encode for bool {
    fn encode(&self, out: &mut Vec<u8>) {
        out.push(u8::from(*self));
    }
}

impl Decode<'_> for bool {
    const MIN_BYTES: usize = 1;

    fn decode(input: &mut Input<'_>) -> Result<Self, DecodeError> {
        Ok(u8::decode(input)? != 0)
    }
}

/// Nothing: the arguments of a call without any, the result of one that gives none.
impl Encode for () {
    fn encode(&self, _out: &mut Vec<u8>) {}
}

impl Decode<'_> for () {
    const MIN_BYTES: usize = 0;

    fn decode(_input: &mut Input<'_>) -> Result<Self, DecodeError> {
        Ok(())
    }
}

impl Encode for ExecutorAddr {
    fn encode(&self, out: &mut Vec<u8>) {
        self.as_u64().encode(out);
    }
}

impl Decode<'_> for ExecutorAddr {
    const MIN_BYTES: usize = 8;

    fn decode(input: &mut Input<'_>) -> Result<Self, DecodeError> {
        Ok(Self::new(u64::decode(input)?))
    }
}

impl Encode for ExecutorAddrRange {
    fn encode(&self, out: &mut Vec<u8>) {
        (self.start(), self.end()).encode(out);
    }
}

impl Decode<'_> for ExecutorAddrRange {
    const MIN_BYTES: usize = 16;

    fn decode(input: &mut Input<'_>) -> Result<Self, DecodeError> {
        let (start, end) = Decode::decode(input)?;
        Self::new(start, end)
            .ok_or(DecodeError::InvalidValue { what: "the end of a range that starts later", value: end.as_u64() })
    }
}

impl<T: Encode> Encode for [T] {
    fn encode(&self, out: &mut Vec<u8>) {
        (self.len() as u64).encode(out);
        for element in self {
            element.encode(out);
        }
    }
}

impl<T: Encode> Encode for Vec<T> {
    fn encode(&self, out: &mut Vec<u8>) {
        self.as_slice().encode(out);
    }
}

impl<'a, T: Decode<'a>> Decode<'a> for Vec<T> {
    const MIN_BYTES: usize = 8;

    fn decode(input: &mut Input<'a>) -> Result<Self, DecodeError> {
        let count = u64::decode(input)?;
        let left = input.rest().len() as u64;
        // An element without bytes would leave the count unbounded.
        let min_bytes = T::MIN_BYTES.max(1) as u64;
        if count > left / min_bytes {
            return Err(DecodeError::SequenceTooLong { count, min_bytes, left });
        }
        // An element may be larger here than its encoding. Memory is taken at first for what the bytes are worth.
        let affordable = left as usize / size_of::<T>().max(1);
        let mut elements = Vec::with_capacity(affordable.min(count as usize));
        for _ in 0..count {
            elements.push(T::decode(input)?);
        }
        Ok(elements)
    }
}

impl Encode for str {
    fn encode(&self, out: &mut Vec<u8>) {
        Blob::from(self.as_bytes()).encode(out);
    }
}

impl Encode for String {
    fn encode(&self, out: &mut Vec<u8>) {
        self.as_str().encode(out);
    }
}

impl Decode<'_> for String {
    const MIN_BYTES: usize = 8;

    fn decode(input: &mut Input<'_>) -> Result<Self, DecodeError> {
        let bytes = Blob::decode(input)?.into_owned();
        let len = bytes.len() as u64;
        String::from_utf8(bytes).map_err(|_| DecodeError::NotUtf8 { len })
    }
}

/// Bytes, borrowed from a message or from whoever sends them. The same encoding as a text, without its rules.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Blob<'a>(pub Cow<'a, [u8]>);

impl Blob<'_> {
    /// Returns the bytes, copied if they were borrowed.
    #[must_use]
    pub fn into_owned(self) -> Vec<u8> {
        self.0.into_owned()
    }
}

impl<'a> From<&'a [u8]> for Blob<'a> {
    fn from(bytes: &'a [u8]) -> Self {
        Self(Cow::Borrowed(bytes))
    }
}

impl From<Vec<u8>> for Blob<'_> {
    fn from(bytes: Vec<u8>) -> Self {
        Self(Cow::Owned(bytes))
    }
}

impl Encode for Blob<'_> {
    fn encode(&self, out: &mut Vec<u8>) {
        (self.0.len() as u64).encode(out);
        out.extend_from_slice(&self.0);
    }
}

impl<'a> Decode<'a> for Blob<'a> {
    const MIN_BYTES: usize = 8;

    fn decode(input: &mut Input<'a>) -> Result<Self, DecodeError> {
        let len = u64::decode(input)?;
        Ok(input.take(len)?.into())
    }
}

impl<T: Encode> Encode for Option<T> {
    fn encode(&self, out: &mut Vec<u8>) {
        self.is_some().encode(out);
        if let Some(value) = self {
            value.encode(out);
        }
    }
}

impl<'a, T: Decode<'a>> Decode<'a> for Option<T> {
    const MIN_BYTES: usize = 1;

    fn decode(input: &mut Input<'a>) -> Result<Self, DecodeError> {
        bool::decode(input)?.then(|| T::decode(input)).transpose()
    }
}

/// The outcome of an operation that gives no value: LLVM's `Error`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SpsError(pub Result<(), String>);

impl Encode for SpsError {
    fn encode(&self, out: &mut Vec<u8>) {
        self.0.is_err().encode(out);
        if let Err(text) = &self.0 {
            text.encode(out);
        }
    }
}

impl Decode<'_> for SpsError {
    const MIN_BYTES: usize = 1;

    fn decode(input: &mut Input<'_>) -> Result<Self, DecodeError> {
        Ok(Self(if bool::decode(input)? { Err(decode_text(input)?) } else { Ok(()) }))
    }
}

/// The outcome of an operation that gives a value: LLVM's `Expected`.
impl<T: Encode> Encode for Result<T, String> {
    fn encode(&self, out: &mut Vec<u8>) {
        self.is_ok().encode(out);
        match self {
            Ok(value) => value.encode(out),
            Err(text) => text.encode(out),
        }
    }
}

impl<'a, T: Decode<'a>> Decode<'a> for Result<T, String> {
    const MIN_BYTES: usize = 1;

    fn decode(input: &mut Input<'a>) -> Result<Self, DecodeError> {
        Ok(if bool::decode(input)? { Ok(T::decode(input)?) } else { Err(decode_text(input)?) })
    }
}

/// Reads an error text. Its only use is to be shown, so what is not UTF-8 is replaced.
fn decode_text(input: &mut Input<'_>) -> Result<String, DecodeError> {
    Ok(String::from_utf8_lossy(&Blob::decode(input)?.0).into_owned())
}

macro_rules! tuples {
    ($(($($name:ident $index:tt),*))*) => {$(
        impl<$($name: Encode),*> Encode for ($($name,)*) {
            fn encode(&self, out: &mut Vec<u8>) {
                $(self.$index.encode(out);)*
            }
        }

        impl<'a, $($name: Decode<'a>),*> Decode<'a> for ($($name,)*) {
            const MIN_BYTES: usize = 0 $(+ $name::MIN_BYTES)*;

            fn decode(input: &mut Input<'a>) -> Result<Self, DecodeError> {
                Ok(($($name::decode(input)?,)*))
            }
        }
    )*};
}

tuples! { (A 0) (A 0, B 1) (A 0, B 1, C 2) (A 0, B 1, C 2, D 3) (A 0, B 1, C 2, D 3, E 4) }

impl<T: Encode + ?Sized> Encode for &T {
    fn encode(&self, out: &mut Vec<u8>) {
        (**self).encode(out);
    }
}

/// Implements the encoding of a struct as the tuple of its fields, in the order given.
macro_rules! sps_struct {
    ($name:ident $(<$life:lifetime>)? { $($field:ident: $type:ty),* $(,)? }) => {
        impl $(<$life>)? $crate::sps::Encode for $name $(<$life>)? {
            fn encode(&self, out: &mut Vec<u8>) {
                $($crate::sps::Encode::encode(&self.$field, out);)*
            }
        }

        $crate::sps::sps_struct!(@decode $name [$($life)?] $($field: $type),*);
    };
    (@decode $name:ident [] $($field:ident: $type:ty),*) => {
        impl $crate::sps::Decode<'_> for $name {
            const MIN_BYTES: usize = 0 $(+ <$type as $crate::sps::Decode<'_>>::MIN_BYTES)*;

            fn decode(input: &mut $crate::sps::Input<'_>) -> Result<Self, $crate::sps::DecodeError> {
                Ok(Self { $($field: $crate::sps::Decode::decode(input)?),* })
            }
        }
    };
    (@decode $name:ident [$life:lifetime] $($field:ident: $type:ty),*) => {
        impl<$life> $crate::sps::Decode<$life> for $name<$life> {
            const MIN_BYTES: usize = 0 $(+ <$type as $crate::sps::Decode<$life>>::MIN_BYTES)*;

            fn decode(input: &mut $crate::sps::Input<$life>) -> Result<Self, $crate::sps::DecodeError> {
                Ok(Self { $($field: $crate::sps::Decode::decode(input)?),* })
            }
        }
    };
}

pub(crate) use sps_struct;

//! The bytes of an object, shared by whoever refers to them.

use std::fmt;
use std::ops::{Deref, Range};
use std::sync::Arc;

/// Bytes that are cheap to clone and to cut: a whole file, or a part of one, as an archive's member.
#[derive(Clone)]
pub struct Bytes {
    /// Not a slice: that would be a copy of what somebody has read.
    all: Arc<Vec<u8>>,
    range: Range<usize>,
}

impl Bytes {
    /// Returns the part `range` of these bytes, or `None` if it is not inside.
    #[must_use]
    pub fn slice(&self, range: Range<usize>) -> Option<Self> {
        let start = self.range.start.checked_add(range.start)?;
        let end = self.range.start.checked_add(range.end)?;
        (start <= end && end <= self.range.end).then(|| Self { all: Arc::clone(&self.all), range: start..end })
    }
}

impl From<Vec<u8>> for Bytes {
    fn from(bytes: Vec<u8>) -> Self {
        let range = 0..bytes.len();
        Self { all: Arc::new(bytes), range }
    }
}

impl From<&[u8]> for Bytes {
    fn from(bytes: &[u8]) -> Self {
        bytes.to_vec().into()
    }
}

impl Deref for Bytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.all[self.range.clone()]
    }
}

impl fmt::Debug for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Bytes({})", self.range.len())
    }
}

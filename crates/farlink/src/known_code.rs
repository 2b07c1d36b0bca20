//! What is kept of a linked object to say where in it its executor has stopped.
//!
//! Of a large object, or one with line numbers, that is its file. There may be a million small ones, whose files would be
//! most of what the controller has of them, so of those it is notes: where the code is, which functions are there, and where
//! their unwind information has been linked to, in memory that this process has mapped. Notes are numbers in LEB128, as in
//! DWARF, and names: the pieces of code after their number, where the unwind information is, and functions up to the end.

use crate::symbols::Function;
use farlink_addr::{ExecutorAddr, ExecutorAddrRange};
use farlink_graph::{Bytes, CodePlace, LinkGraph, Place, SymbolType};
use gimli::{EndianSlice, LittleEndian, Reader};
use smallvec::SmallVec;

/// Largest file that notes are made of, in bytes. To make them of larger ones takes longer than their memory is worth.
const NOTED_BYTES: usize = 16 << 10;

/// What is known of a linked object's code.
#[derive(Clone)]
pub(crate) enum KnownCode {
    Nothing,
    /// Where its code is, and its file.
    File(Box<(Box<[CodePlace]>, Bytes)>),
    Notes(Box<[u8]>),
}

/// Notes, read.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Notes {
    /// Addresses and lengths of pieces of code.
    pub(crate) places: Vec<(u64, u64)>,
    /// Where the unwind information is, if there is any.
    pub(crate) eh_frame: Option<ExecutorAddrRange>,
    pub(crate) functions: Vec<Function>,
}

impl KnownCode {
    /// Returns what is to be kept of a graph that has been linked, to memory that this process has mapped or to other.
    pub(crate) fn of(graph: &LinkGraph, is_mapped: bool) -> Self {
        if is_mapped && graph.bytes().len() <= NOTED_BYTES && !graph.has_lines() {
            return Self::Notes(make(graph));
        }
        Self::File(Box::new((graph.code_places().collect(), graph.bytes().clone())))
    }

    /// Returns where its code is: in the place of an offset in the file, notes have the address.
    pub(crate) fn places(&self) -> Vec<CodePlace> {
        match self {
            Self::Nothing => Vec::new(),
            Self::File(file) => file.0.to_vec(),
            Self::Notes(notes) => {
                let place = |(addr, size)| CodePlace { addr: ExecutorAddr::new(addr), size, file_offset: Some(addr) };
                read(notes).unwrap_or_default().places.into_iter().map(place).collect()
            }
        }
    }
}

/// Writes numbers and names. Addresses are written as what they are more than the one before.
#[derive(Default)]
struct Writer {
    /// On the stack as a rule, since what is kept is cut to its length: to shorten an allocation leaves holes.
    bytes: SmallVec<[u8; 256]>,
    last: u64,
}

impl Writer {
    fn number(&mut self, mut value: u64) {
        while value >= 0x80 {
            self.bytes.push(value as u8 | 0x80);
            value >>= 7;
        }
        self.bytes.push(value as u8);
    }

    fn address(&mut self, addr: ExecutorAddr) {
        let distance = addr.as_u64().wrapping_sub(self.last) as i64;
        self.last = addr.as_u64();
        // The sign is the lowest bit, so that small distances in either direction are short.
        self.number(((distance << 1) ^ (distance >> 63)) as u64);
    }
}

fn make(graph: &LinkGraph) -> Box<[u8]> {
    let mut writer = Writer::default();
    writer.number(graph.code_places().count() as u64);
    for place in graph.code_places() {
        writer.address(place.addr);
        writer.number(place.size);
    }
    let eh_frame = graph.eh_frame();
    writer.number(eh_frame.map_or(0, |range| range.len()));
    if let Some(range) = eh_frame.filter(|range| !range.is_empty()) {
        writer.address(range.start());
    }
    for id in graph.symbol_ids() {
        let (symbol, name) = (graph.symbol(id), graph.symbol_name(id));
        let is_function = matches!(symbol.kind, SymbolType::None | SymbolType::Function | SymbolType::IndirectFunction);
        let Place::Defined { block, .. } = symbol.place else { continue };
        if !is_function || name.is_empty() || !graph.is_code(block) {
            continue;
        }
        if let Some(addr) = graph.symbol_address(id) {
            writer.address(addr);
            writer.number(symbol.size);
            writer.number(name.len() as u64);
            writer.bytes.extend_from_slice(name.as_bytes());
        }
    }
    writer.bytes.as_slice().into()
}

/// Reads notes; none if they make no sense.
pub(crate) fn read(notes: &[u8]) -> Option<Notes> {
    let mut reader = EndianSlice::new(notes, LittleEndian);
    let mut last = 0u64;
    let mut address = |reader: &mut EndianSlice<'_, LittleEndian>| {
        let value = reader.read_uleb128().ok()?;
        last = last.wrapping_add((value >> 1) ^ (value & 1).wrapping_neg());
        Some(last)
    };
    let mut read = Notes::default();
    for _ in 0..reader.read_uleb128().ok()? {
        read.places.push((address(&mut reader)?, reader.read_uleb128().ok()?));
    }
    let eh_frame_bytes = reader.read_uleb128().ok()?;
    if eh_frame_bytes > 0 {
        read.eh_frame = ExecutorAddrRange::from_len(ExecutorAddr::new(address(&mut reader)?), eh_frame_bytes);
    }
    while !reader.is_empty() {
        let (start, size) = (address(&mut reader)?, reader.read_uleb128().ok()?);
        let length = usize::try_from(reader.read_uleb128().ok()?).ok()?;
        let name = reader.split(length).ok()?.to_string().ok()?.to_owned();
        read.functions.push(Function { start, size, name });
    }
    Some(read)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Numbers of any length and addresses in any order are read as they were written, and what is cut short is no notes.
    #[test]
    fn notes_are_read_as_written() {
        let mut writer = Writer::default();
        writer.number(3);
        let places = [(u64::MAX, 1), (0x7f12_3456_7000, 0x1234_5678_9abc), (0, u64::MAX)];
        for (addr, size) in places {
            writer.address(ExecutorAddr::new(addr));
            writer.number(size);
        }
        writer.number(56);
        writer.address(ExecutorAddr::new(0x7f00_0000_0000));
        let before = writer.bytes.len();
        writer.address(ExecutorAddr::new(0x10));
        writer.number(0);
        writer.number(2);
        writer.bytes.extend_from_slice(b"ab");
        let notes = read(&writer.bytes).unwrap();
        assert_eq!(notes.places, places);
        assert_eq!(notes.eh_frame, ExecutorAddrRange::from_len(ExecutorAddr::new(0x7f00_0000_0000), 56));
        assert_eq!(notes.functions, [Function { start: 0x10, size: 0, name: "ab".to_owned() }]);
        for end in (0..writer.bytes.len()).filter(|&end| end != before) {
            assert_eq!(read(&writer.bytes[..end]), None, "{end}");
        }
    }
}

//! `--map`: the executor's memory as it is divided after the link, as a picture (.svg, or .html with tables) or as JSON.
//!
//! Here is what is shown: for each stripe its pieces, each of which is a section of an object, or why nothing is there.

mod html;
mod json;
mod page;
mod style;
mod svg;

use farlink::addr::{ExecutorAddr, ExecutorAddrRange, MemProt};
use farlink::graph::{LinkGraph, SectionKind};
use farlink::mem::{AreaLayout, ReservationLayout};
use farlink::{Library, ObjectMemory, Session};
use std::path::Path;

/// How a map is written, by the name of its file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Format {
    Svg,
    Html,
    Json,
}

impl Format {
    pub(crate) fn of(path: &Path) -> Option<Self> {
        match path.extension()?.to_str()? {
            "svg" => Some(Self::Svg),
            "html" | "htm" => Some(Self::Html),
            "json" => Some(Self::Json),
            _ => None,
        }
    }
}

/// An object, and how many bytes it has of each kind.
#[derive(Default)]
struct Object {
    name: String,
    code: u64,
    read_only: u64,
    data: u64,
}

impl Object {
    fn total(&self) -> u64 {
        self.code + self.read_only + self.data
    }

    /// Returns the bytes that belong to memory of this protection.
    fn bytes(&mut self, prot: MemProt) -> &mut u64 {
        if prot.contains(MemProt::EXEC) {
            &mut self.code
        } else if prot.contains(MemProt::WRITE) {
            &mut self.data
        } else {
            &mut self.read_only
        }
    }
}

/// What a piece of memory is.
#[derive(Clone, PartialEq, Eq)]
enum What {
    /// A section of an object, or all that the object has there if its sections are not known.
    Section { object: usize, section: Option<String> },
    /// Allocated, and lost to alignment.
    Padding,
    /// Allocated by farlink for itself, for buffers, or for several objects together.
    Other(&'static str),
    /// Free, in a page of which other parts are used.
    RestOfPage,
    /// Free in whole pages, which take no memory unless they did before.
    Free,
}

/// What objects have together.
const SEVERAL: &str = "sections of several objects";

/// What farlink has there for itself: tables by which the executor finds code, which take memory only as they are filled.
const OWN: &str = "farlink's own";

/// A piece of memory.
struct Piece {
    range: ExecutorAddrRange,
    what: What,
}

/// A stripe, or a reservation without stripes.
struct Stripe {
    prot: Option<MemProt>,
    range: ExecutorAddrRange,
    pieces: Vec<Piece>,
}

struct Reservation {
    range: ExecutorAddrRange,
    is_for_buffers: bool,
    stripes: Vec<Stripe>,
}

/// Everything that is shown.
pub(crate) struct Map {
    objects: Vec<Object>,
    reservations: Vec<Reservation>,
    /// Bytes of physical memory, if that is known.
    committed_bytes: Option<u64>,
    page_bytes: u64,
}

/// A named part of an object's memory.
struct Named {
    range: ExecutorAddrRange,
    what: What,
}

impl Map {
    /// Makes the map of what `library` has linked; `graphs` are those of its objects.
    pub(crate) fn new(session: &Session, library: &Library, graphs: &[LinkGraph]) -> Result<Self, farlink::Error> {
        let memory = library.object_memory();
        let committed_bytes = Some(session.stats()?.usage.committed_bytes).filter(|&bytes| bytes > 0);
        let page_bytes = farlink::mem::page_size().bytes();
        Ok(Self::of(&session.memory_layout(), &memory, graphs, committed_bytes, page_bytes))
    }

    fn of(
        layout: &[ReservationLayout],
        memory: &[ObjectMemory],
        graphs: &[LinkGraph],
        committed_bytes: Option<u64>,
        page_bytes: u64,
    ) -> Self {
        let (objects, named) = named_parts(memory, graphs);
        let mut reservations = Vec::with_capacity(layout.len());
        for reservation in layout {
            let stripe = |area: &AreaLayout| {
                let pieces = pieces(area, &named, reservation.is_for_buffers, page_bytes);
                Stripe { prot: area.prot, range: area.range, pieces }
            };
            let stripes: Vec<Stripe> = reservation.areas.iter().map(stripe).collect();
            let (range, is_for_buffers) = (reservation.range, reservation.is_for_buffers);
            reservations.push(Reservation { range, is_for_buffers, stripes });
        }
        Self { objects, reservations, committed_bytes, page_bytes }
    }

    /// Writes the map.
    pub(crate) fn write(&self, format: Format) -> String {
        match format {
            Format::Svg => svg::document(self),
            Format::Html => html::document(self),
            Format::Json => json::document(self),
        }
    }

    fn pieces(&self) -> impl Iterator<Item = &Piece> {
        self.reservations.iter().flat_map(|reservation| &reservation.stripes).flat_map(|stripe| &stripe.pieces)
    }

    /// Returns the bytes of all pieces that `counts` is true of.
    fn sum(&self, counts: impl Fn(&What) -> bool) -> u64 {
        self.pieces().filter(|piece| counts(&piece.what)).map(|piece| piece.range.len()).sum()
    }
}

/// Returns the objects, and the parts of their memory by address.
fn named_parts(memory: &[ObjectMemory], graphs: &[LinkGraph]) -> (Vec<Object>, Vec<Named>) {
    let mut sections: Vec<(ExecutorAddrRange, &str)> = graphs.iter().flat_map(sections).collect();
    sections.sort_unstable();
    let mut objects = Vec::with_capacity(memory.len());
    let mut named = Vec::new();
    for (index, ObjectMemory { name, segments, with_others, debug_info, .. }) in memory.iter().enumerate() {
        let mut object = Object { name: name.clone(), ..Object::default() };
        for &(group, segment) in segments {
            *object.bytes(group.prot) += segment.len();
            named.extend(parts(segment, &sections, index));
        }
        objects.push(object);
        named.extend(debug_info.iter().map(|&(_, range)| Named { range, what: What::Other("debug information") }));
        named.extend(with_others.iter().map(|&(_, range)| Named { range, what: What::Other(SEVERAL) }));
    }
    named.sort_by_key(|named| named.range);
    named.dedup_by_key(|named| named.range);
    (objects, named)
}

fn sections(graph: &LinkGraph) -> impl Iterator<Item = (ExecutorAddrRange, &str)> {
    graph.sections().filter(|&section| graph.section(section).kind != SectionKind::Tls).filter_map(|section| {
        let range = graph.section_range(section).filter(|range| !range.is_empty())?;
        Some((range, graph.section_name(section)))
    })
}

/// Divides a segment of an object by its sections. What is between them is padding.
fn parts(segment: ExecutorAddrRange, sections: &[(ExecutorAddrRange, &str)], object: usize) -> Vec<Named> {
    let first = sections.partition_point(|(range, _)| range.start() < segment.start());
    let inside = sections[first..].iter().take_while(|(range, _)| range.end() <= segment.end());
    let mut parts: Vec<Named> = Vec::new();
    let mut end = segment.start();
    let padding = |start, end| {
        let range = ExecutorAddrRange::new(start, end).filter(|range| !range.is_empty())?;
        Some(Named { range, what: What::Padding })
    };
    // Sections that lie among the parts of another are shown as a part of that.
    for &(range, name) in inside {
        if range.start() >= end {
            parts.extend(padding(end, range.start()));
            parts.push(Named { range, what: What::Section { object, section: Some(name.to_owned()) } });
            end = range.end();
        }
    }
    if parts.is_empty() {
        parts.push(Named { range: segment, what: What::Section { object, section: None } });
    } else {
        parts.extend(padding(end, segment.end()));
    }
    parts
}

/// Divides an area into pieces, without gaps.
fn pieces(area: &AreaLayout, named: &[Named], is_for_buffers: bool, page_bytes: u64) -> Vec<Piece> {
    // Allocations are multiples of this, in bytes: where there are no stripes they are whole pages.
    let granule = if area.prot.is_some() { 16 } else { page_bytes };
    let mut divided = Divided { pieces: Vec::new(), at: area.range.start(), granule };
    let first = named.partition_point(|named| named.range.start() < area.range.start());
    let mut named = named[first..].iter().take_while(|named| named.range.end() <= area.range.end()).peekable();
    let other = if is_for_buffers { "buffers" } else { OWN };
    let ends = area.free.iter().copied().chain(ExecutorAddrRange::new(area.range.end(), area.range.end()));
    for free in ends {
        // What is live up to here: named parts, and what is around them.
        while let Some(part) = named.next_if(|part| part.range.end() <= free.start()) {
            divided.add_gap(part.range.start(), other);
            divided.add(part.range.end(), part.what.clone());
        }
        divided.add_gap(free.start(), other);
        // A free range: the rest of a page that is in use, whole pages, and the beginning of the next page in use.
        let page = |addr: ExecutorAddr| ExecutorAddr::new(addr.as_u64() / page_bytes * page_bytes);
        let first_page = page(ExecutorAddr::new(free.start().as_u64().saturating_add(page_bytes - 1))).min(free.end());
        let last_page = if free.end() == area.range.end() { free.end() } else { page(free.end()) };
        divided.add(first_page, What::RestOfPage);
        divided.add(last_page.max(first_page), What::Free);
        divided.add(free.end(), What::RestOfPage);
    }
    divided.pieces
}

/// Pieces, up to an address.
struct Divided {
    pieces: Vec<Piece>,
    at: ExecutorAddr,
    granule: u64,
}

impl Divided {
    /// Adds what is up to `end`, if there is anything.
    fn add(&mut self, end: ExecutorAddr, what: What) {
        if let Some(range) = ExecutorAddrRange::new(self.at, end).filter(|range| !range.is_empty()) {
            self.pieces.push(Piece { range, what });
            self.at = end;
        }
    }

    /// Adds a live range without a name: padding if it is too short for anything else, else something of farlink's.
    fn add_gap(&mut self, end: ExecutorAddr, other: &'static str) {
        let is_short = end.offset_from(self.at).is_some_and(|bytes| bytes < self.granule);
        self.add(end, if is_short { What::Padding } else { What::Other(other) });
    }
}

/// Returns what memory of this protection is called.
fn prot_name(prot: Option<MemProt>) -> &'static str {
    match prot {
        Some(prot) if prot.contains(MemProt::EXEC) => "code",
        Some(prot) if prot.contains(MemProt::WRITE) => "data",
        Some(_) => "read-only data",
        None => "code and data",
    }
}

/// Returns a number of bytes as people write it.
fn human(bytes: u64) -> String {
    const UNITS: [&str; 4] = ["KiB", "MiB", "GiB", "TiB"];
    if bytes < 1024 {
        return format!("{bytes} B");
    }
    let mut size = bytes as f64 / 1024.0;
    let mut unit = 0;
    while size >= 1023.95 && unit + 1 < UNITS.len() {
        size /= 1024.0;
        unit += 1;
    }
    if size < 9.95 && size.fract() > 0.0 {
        format!("{size:.1} {}", UNITS[unit])
    } else {
        format!("{size:.0} {}", UNITS[unit])
    }
}

/// Returns the last part of an object's name, which says most: without folders, and of an archive the member.
fn short(name: &str) -> &str {
    let member = name.strip_suffix(')').and_then(|name| name.rsplit_once('(')).map(|(_, member)| member);
    let name = member.filter(|member| !member.is_empty()).unwrap_or(name);
    match name.rsplit_once('/') {
        Some((_, last)) if !last.is_empty() => last,
        _ => name,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::PathBuf;

    fn range(start: u64, end: u64) -> ExecutorAddrRange {
        ExecutorAddrRange::new(ExecutorAddr::new(start), ExecutorAddr::new(end)).unwrap()
    }

    /// Pieces of an area follow each other from its start to its end: what has a name, what is lost, what is farlink's, and
    /// what is free, told apart by whether its page is in use.
    #[test]
    fn pieces_of_an_area() {
        let section = |object| What::Section { object, section: None };
        let named = [
            Named { range: range(0x0f00, 0x0f10), what: section(9) },
            Named { range: range(0x1010, 0x1020), what: section(0) },
            Named { range: range(0x1028, 0x1030), what: section(1) },
            Named { range: range(0x5010, 0x5020), what: section(2) },
            Named { range: range(0x9000, 0x9010), what: section(9) },
        ];
        let free = vec![range(0x1040, 0x5008), range(0x5020, 0x5030), range(0x6800, 0x8000)];
        let found = pieces(&area(range(0x1000, 0x8000), free), &named, false, 0x1000);
        let own = What::Other(OWN);
        let expected = [
            (0x1010, own.clone()),
            (0x1020, section(0)),
            (0x1028, What::Padding),
            (0x1030, section(1)),
            (0x1040, own.clone()),
            (0x2000, What::RestOfPage),
            (0x5000, What::Free),
            (0x5008, What::RestOfPage),
            (0x5010, What::Padding),
            (0x5020, section(2)),
            (0x5030, What::RestOfPage),
            (0x6800, own),
            (0x7000, What::RestOfPage),
            (0x8000, What::Free),
        ];
        let mut at = 0x1000;
        assert_eq!(found.len(), expected.len());
        for (piece, (end, what)) in found.iter().zip(expected) {
            assert!(piece.range == range(at, end) && piece.what == what, "{at:#x}..{end:#x}");
            at = end;
        }
    }

    fn area(range: ExecutorAddrRange, free: Vec<ExecutorAddrRange>) -> AreaLayout {
        AreaLayout { prot: Some(MemProt::RX), range, free }
    }

    /// A segment is divided by its sections; one that lies among the parts of another is not shown twice.
    #[test]
    fn parts_of_a_segment() {
        let sections = [
            (range(0, 8), "a"),
            (range(16, 32), "b"),
            (range(20, 24), "c"),
            (range(40, 48), "d"),
            (range(64, 72), "e"),
        ];
        let found = parts(range(16, 64), &sections, 3);
        let found: Vec<_> = found.iter().map(|part| part.range).collect();
        assert_eq!(found, [range(16, 32), range(32, 40), range(40, 48), range(48, 64)]);
        assert!(parts(range(48, 64), &sections, 3)[0].what == What::Section { object: 3, section: None });
    }

    /// Sizes and names as people write them, and formats by the name of a file.
    #[test]
    fn words() {
        let sizes = [0, 1023, 1024, 1536, 10_240, 1_048_575, 1 << 20, 1 << 30, 268_431_360].map(human);
        assert_eq!(sizes, ["0 B", "1023 B", "1 KiB", "1.5 KiB", "10 KiB", "1.0 MiB", "1 MiB", "1 GiB", "256 MiB"]);
        assert_eq!(["a/b/c.o", "/lib/libz.a(inflate.o)", "x/", "()"].map(short), ["c.o", "inflate.o", "x/", "()"]);
        let formats = ["m.svg", "m.html", "m.json", "m.png", "svg"].map(|name| Format::of(&PathBuf::from(name)));
        assert_eq!(formats, [Some(Format::Svg), Some(Format::Html), Some(Format::Json), None, None]);
    }
}

//! Reserved space and what is taken from it: areas with their free ranges, and what a request needs of them.

use super::SegmentLayout;
use crate::directory::{Directory, table_bytes};
use crate::free_list::FreeList;
use crate::{Error, MemoryMapper, StripeBytes, StripedView};
use farlink_addr::{Align, AllocGroup, ExecutorAddr, ExecutorAddrRange, MemProt, PageSize};
use smallvec::SmallVec;

/// Largest alignment of a segment in bytes: that of a large page.
const MAX_ALIGN_BYTES: u64 = 2 << 20;

/// The smallest stripe is this part of a reservation, a page less.
const STRIPE_SHARE: u64 = 4;

/// Reserved space: one area for all protections, or one for each.
pub(super) struct Reservation {
    pub(super) range: ExecutorAddrRange,
    pub(super) areas: Vec<Area>,
    /// By which what is in stripes is written and wiped, if the mapper offers that.
    pub(super) view: Option<StripedView>,
    /// Number of allocations.
    pub(super) live: u64,
    /// Room for the table by which the executor finds code in it, which has been nothing else: it is zero.
    pub(super) directory_place: Option<DirectoryPlace>,
    /// Whether somebody is telling the executor of it.
    pub(super) is_telling: bool,
    /// How the executor finds code in it, once some is to be found.
    pub(super) directory: Option<Directory>,
}

/// The parts of a reservation that a directory is about.
#[derive(Clone, Copy)]
pub(super) struct DirectoryPlace {
    /// The stripe of code.
    pub(super) code: ExecutorAddrRange,
    /// The stripe of read-only data.
    pub(super) indexes: ExecutorAddrRange,
    /// Where in that the table is.
    pub(super) table: ExecutorAddrRange,
}

pub(super) struct Area {
    /// The protection of the stripe; none if the area is a whole reservation without stripes.
    pub(super) prot: Option<MemProt>,
    pub(super) range: ExecutorAddrRange,
    pub(super) free: FreeList,
    /// Bytes that became free and were not taken again: as many may still have physical memory.
    stale_bytes: u64,
    /// The fewest of them since somebody looked: nobody has needed these.
    unneeded_bytes: u64,
}

impl Area {
    fn new(prot: Option<MemProt>, range: ExecutorAddrRange) -> Self {
        Self { prot, range, free: FreeList::new(range), stale_bytes: 0, unneeded_bytes: 0 }
    }

    fn take(
        &mut self,
        bytes: u64,
        align: Align,
        is_usable: impl Fn(ExecutorAddrRange) -> bool,
    ) -> Option<ExecutorAddrRange> {
        let range = take_usable(&mut self.free, bytes, align, is_usable)?;
        self.stale_bytes = self.stale_bytes.saturating_sub(bytes);
        self.unneeded_bytes = self.unneeded_bytes.min(self.stale_bytes);
        Some(range)
    }

    /// Returns whether so much has become free that it may be worth giving back. Freed code traps, so it keeps its pages until
    /// its reservation has nothing at all.
    fn is_stale(&self, is_empty: bool) -> bool {
        let is_code = |prot: MemProt| prot.contains(MemProt::EXEC);
        self.stale_bytes >= STALE_BYTES && self.prot.is_some_and(|prot| is_empty || !is_code(prot))
    }
}

/// Free ranges of at least this many bytes give their physical memory back.
const SWEPT_BYTES: u64 = 64 << 10;

/// Fewer bytes than this that have become free in a stripe, in pieces, keep it for good.
const STALE_BYTES: u64 = 8 << 20;

impl Reservation {
    /// Returns what `mapper` has reserved.
    pub(super) fn new(range: ExecutorAddrRange, mapper: &dyn MemoryMapper) -> Self {
        let (stripes, view) = (mapper.stripes(range.start()), mapper.striped_view(range.start()));
        let mut areas: Vec<_> = stripes.into_iter().map(|(prot, stripe)| Area::new(Some(prot), stripe)).collect();
        if areas.is_empty() {
            areas.push(Area::new(None, range));
        }
        Self { range, areas, view, live: 0, directory_place: None, is_telling: false, directory: None }
    }

    /// Takes what a request needs: a range for each segment in its stripe, or one for all of them.
    pub(super) fn take(&mut self, request: &Request) -> Option<Ranges> {
        if let [Area { prot: None, free, .. }] = &mut self.areas[..] {
            let is_usable = |range| !request.has_code_at_bad_address(range);
            let range = take_usable(free, request.bytes, request.align, is_usable)?;
            self.live += 1;
            return Some(Ranges::from_slice(&[range]));
        }
        let mut ranges = Ranges::new();
        for (layout, _) in &request.segments {
            let mut area = self.areas.iter_mut().find(|area| area.prot == Some(layout.group.prot));
            let (bytes, align) = (packed_bytes(layout), layout.align.max(granule(layout.group.prot)));
            let is_usable = |range| !is_code(layout) || !has_bad_address(range);
            match area.as_mut().and_then(|area| area.take(bytes, align, is_usable)) {
                Some(range) => ranges.push(range),
                None => {
                    self.give_ranges(&ranges);
                    return None;
                }
            }
        }
        self.live += 1;
        Some(ranges)
    }

    /// Gives back what [`Self::take`] has taken.
    pub(super) fn give(&mut self, ranges: &[ExecutorAddrRange]) {
        self.live -= 1;
        self.give_ranges(ranges);
    }

    fn give_ranges(&mut self, ranges: &[ExecutorAddrRange]) {
        for &range in ranges {
            if let Some(area) = self.area_of(range) {
                area.free.give(range);
                area.stale_bytes += range.len();
            }
        }
    }

    /// Takes room for the table of a directory, if there are stripes. Nothing must have been taken before.
    pub(super) fn make_room_for_directory(&mut self) {
        let stripe = |prot| self.areas.iter().position(|area| area.prot == Some(prot));
        let (Some(code), Some(indexes)) = (stripe(MemProt::RX), stripe(MemProt::READ)) else { return };
        let code = self.areas[code].range;
        let area = &mut self.areas[indexes];
        let table = area.free.take(table_bytes(code.len()), granule(MemProt::READ));
        self.directory_place = table.map(|table| DirectoryPlace { code, indexes: area.range, table });
    }

    /// Returns the bytes of that.
    pub(super) fn table_bytes(&self) -> u64 {
        self.directory_place.map_or(0, |place| place.table.len())
    }

    fn area_of(&mut self, range: ExecutorAddrRange) -> Option<&mut Area> {
        self.areas.iter_mut().find(|area| area.range.contains_range(range))
    }

    /// Returns whether a stripe has so much that became free that it may be worth giving back.
    pub(super) fn is_stale(&self) -> bool {
        self.areas.iter().any(|area| area.is_stale(self.live == 0))
    }

    /// Returns the stripes with much that became free and that nobody has taken again since the last look, and then they have
    /// none; or all that became free, if not only that is wanted.
    pub(super) fn unneeded(&mut self, is_any_wanted: bool) -> Vec<ExecutorAddrRange> {
        let is_empty = self.live == 0;
        let look = |area: &mut Area| {
            let is_unneeded = area.is_stale(is_empty) && area.unneeded_bytes >= STALE_BYTES;
            if !is_unneeded && !is_any_wanted {
                area.unneeded_bytes = area.stale_bytes;
                return None;
            }
            area.prot.filter(|prot| is_empty || !prot.contains(MemProt::EXEC))?;
            (area.stale_bytes, area.unneeded_bytes) = (0, 0);
            Some(area.range)
        };
        self.areas.iter_mut().filter_map(look).collect()
    }

    /// Returns the large free ranges of `area`.
    pub(super) fn large_free(&mut self, area: ExecutorAddrRange) -> Vec<ExecutorAddrRange> {
        self.area_of(area).map(|area| area.free.of_length(SWEPT_BYTES)).unwrap_or_default()
    }

    /// Takes what is still free of `piece`, which is in a range that ended at `end`: whoever took it may drop its physical
    /// memory, and gives it back by [`Self::give_swept`]. If nothing of it is, `left` bytes are as they were before the look.
    pub(super) fn take_to_sweep(
        &mut self,
        end: ExecutorAddr,
        piece: ExecutorAddrRange,
        left: u64,
    ) -> Option<ExecutorAddrRange> {
        let area = self.area_of(piece)?;
        let taken = area.free.take_of(end, piece);
        if taken.is_none() {
            area.stale_bytes += left;
        }
        taken
    }

    pub(super) fn give_swept(&mut self, range: ExecutorAddrRange) {
        if let Some(area) = self.area_of(range) {
            area.free.give(range);
        }
    }

    pub(super) fn is_striped(&self) -> bool {
        self.areas.iter().any(|area| area.prot.is_some())
    }
}

/// Takes a range for which `is_usable` holds.
fn take_usable(
    free: &mut FreeList,
    bytes: u64,
    align: Align,
    is_usable: impl Fn(ExecutorAddrRange) -> bool,
) -> Option<ExecutorAddrRange> {
    // What cannot be used is kept while something else is looked for, and given back after.
    let mut unusable = Vec::new();
    let found = loop {
        match free.take(bytes, align) {
            Some(taken) if !is_usable(taken) => unusable.push(taken),
            other => break other,
        }
    };
    unusable.into_iter().for_each(|range| free.give(range));
    found
}

pub(super) fn is_code(layout: &SegmentLayout) -> bool {
    layout.group.prot.contains(MemProt::EXEC)
}

/// Whether a range has an address whose low 32 bits are zero. A function must not be at one: unwinders of libgcc take
/// the 32 bits of its address that unwind information has for those of a function that was removed.
fn has_bad_address(range: ExecutorAddrRange) -> bool {
    const BAD: Align = match Align::new(1 << 32) {
        Some(align) => align,
        None => unreachable!(),
    };
    range.start().align_up(BAD).is_some_and(|bad| range.contains(bad))
}

/// Ranges in stripes are multiples of this, in bytes: of the size of a pointer, but for code, which compilers align to 16 or
/// 32 so that processors fetch it well. A gap after each of a million functions would have to be remembered.
const fn granule(prot: MemProt) -> Align {
    let bytes = if prot.contains(MemProt::EXEC) { 32 } else { 8 };
    match Align::new(bytes) {
        Some(align) => align,
        None => unreachable!(),
    }
}

/// Bytes that a segment takes in a stripe. The sum was checked when the request was made.
fn packed_bytes(layout: &SegmentLayout) -> u64 {
    packed(layout.group.prot, layout.content_bytes + layout.zero_fill_bytes)
}

fn packed(prot: MemProt, bytes: u64) -> u64 {
    granule(prot).align_up(bytes.max(1)).unwrap_or(u64::MAX)
}

/// Ranges that were taken: as a rule one for each of three protections.
pub(super) type Ranges = SmallVec<[ExecutorAddrRange; 3]>;

/// Ranges of a reservation: one for each segment in stripes, else one for all segments.
pub(super) struct Place {
    pub(super) reservation: ExecutorAddr,
    pub(super) ranges: Ranges,
    pub(super) is_striped: bool,
    /// Bytes that were asked for.
    pub(super) requested_bytes: u64,
    /// That of the reservation, while the allocation is in flight.
    pub(super) view: Option<StripedView>,
}

impl Place {
    /// Returns the place that was taken for an allocation with these segments.
    pub(super) fn of(
        reservation: ExecutorAddr,
        is_striped: bool,
        segments: &[(AllocGroup, ExecutorAddrRange)],
        page_size: PageSize,
    ) -> Self {
        let range = |start, end: u64| ExecutorAddrRange::from_len(start, end);
        let requested_bytes = segments.iter().map(|(_, segment)| segment.len()).sum();
        let ranges: Ranges = if is_striped {
            segments
                .iter()
                .filter_map(|(group, segment)| range(segment.start(), packed(group.prot, segment.len())))
                .collect()
        } else {
            // The first begins where the range does, and the last has its last page.
            let ends = segments.first().zip(segments.last());
            let bytes = ends.and_then(|((_, first), (_, last))| last.end().offset_from(first.start()));
            let bytes = bytes.and_then(|bytes| page_size.round_up(bytes)).zip(segments.first());
            bytes.and_then(|(bytes, (_, first))| range(first.start(), bytes)).into_iter().collect()
        };
        Self { reservation, ranges, is_striped, requested_bytes, view: None }
    }
}

/// Segments with their offsets.
pub(super) struct Request {
    pub(super) segments: SmallVec<[(SegmentLayout, u64); 3]>,
    pub(super) bytes: u64,
    pub(super) align: Align,
}

impl Request {
    pub(super) fn new(layouts: Vec<SegmentLayout>, page_size: PageSize) -> Result<Self, Error> {
        let mut segments = SmallVec::with_capacity(layouts.len());
        let (mut end, mut align) = (0u64, page_size.align());
        for layout in layouts {
            if layout.align.bytes() > MAX_ALIGN_BYTES.max(page_size.bytes()) {
                return Err(Error::Alignment(layout.align.bytes()));
            }
            align = align.max(layout.align);
            let too_big = || Error::BadSize {
                what: "allocated",
                bytes: layout.content_bytes.saturating_add(layout.zero_fill_bytes),
            };
            let offset = layout.align.max(page_size.align()).align_up(end).ok_or_else(too_big)?;
            let size = layout.content_bytes.checked_add(layout.zero_fill_bytes).ok_or_else(too_big)?;
            end = offset.checked_add(size).and_then(|end| page_size.round_up(end)).ok_or_else(too_big)?;
            segments.push((layout, offset));
        }
        if end == 0 {
            return Err(Error::BadSize { what: "allocated", bytes: 0 });
        }
        Ok(Self { segments, bytes: end, align })
    }

    /// Returns the bytes that were asked for.
    pub(super) fn requested_bytes(&self) -> u64 {
        self.segments.iter().map(|(layout, _)| layout.content_bytes + layout.zero_fill_bytes).sum()
    }

    /// Whether code of this request, placed in `range`, would be where a function must not be.
    fn has_code_at_bad_address(&self, range: ExecutorAddrRange) -> bool {
        let code = self.segments.iter().filter(|(layout, _)| is_code(layout));
        let place = |&(layout, offset): &(SegmentLayout, u64)| {
            let start = range.start().checked_add(offset)?;
            ExecutorAddrRange::from_len(start, layout.content_bytes + layout.zero_fill_bytes)
        };
        code.filter_map(place).any(has_bad_address)
    }

    /// Returns how much to reserve for this request, at least `usual`.
    pub(super) fn reserve_bytes(&self, usual: u64, page_size: PageSize) -> u64 {
        // A reservation begins at a page boundary; a larger alignment may cost up to its size.
        let extra = if self.align > page_size.align() { self.align.bytes() } else { 0 };
        self.bytes.saturating_add(extra).max(usual)
    }

    /// Returns what the segments take of each stripe; none if they have other protections, or take more than there can be.
    pub(super) fn stripe_bytes(&self, page_size: PageSize) -> Option<StripeBytes> {
        let mut needs = StripeBytes { code: 0, read_only: 0, data: 0 };
        for (layout, _) in &self.segments {
            let need = match layout.group.prot {
                MemProt::RX => &mut needs.code,
                MemProt::READ => &mut needs.read_only,
                MemProt::RW => &mut needs.data,
                _ => return None,
            };
            // A stripe begins at a page boundary; an alignment may cost up to its size.
            *need = need.checked_add(packed_bytes(layout))?.checked_add(layout.align.bytes())?;
        }
        let whole = |bytes| page_size.round_up(bytes);
        let code = whole(needs.code)?;
        // The directory of the code is there too.
        let read_only = whole(needs.read_only.checked_add(table_bytes(code))?)?;
        Some(StripeBytes { code, read_only, data: whole(needs.data)? })
    }

    /// Returns how much to reserve so that every stripe has room for the whole request.
    pub(super) fn striped_bytes(&self, page_size: PageSize) -> u64 {
        let bytes = self.reserve_bytes(0, page_size);
        // The table of a directory is a thousandth of the stripe of code, which is as long.
        let table = (bytes / 512).saturating_add(page_size.bytes());
        bytes.saturating_add(page_size.bytes()).saturating_add(table).saturating_mul(STRIPE_SHARE)
    }
}

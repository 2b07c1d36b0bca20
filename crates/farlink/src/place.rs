//! Places for the objects of a batch: memory for each, for what several have together, and the bounds of both.

use crate::Error;
use crate::claim::{Claim, Of};
use crate::library::LibraryInner;
use crate::parallel;
use crate::session::SessionInner;
use farlink_addr::{ExecutorAddr, ExecutorAddrRange, MemProt};
use farlink_graph::{Bound, Layout, LinkGraph, Together};
use farlink_mem::{AllocatedSegment, InFlightAlloc, SegmentLayout};

/// The places of a batch.
pub(crate) struct Places {
    /// The layout of each object, and its memory if it needs any.
    pub(crate) objects: Vec<(Layout, Option<InFlightAlloc>)>,
    /// The sets of sections, and their memory if they have any.
    pub(crate) sets: Vec<(Together, Option<InFlightAlloc>)>,
}

/// Bytes of an object's content that a thread fixes up at a time, where there are several.
const PART_BYTES: u64 = 256 << 10;

/// Gives every object of the batch its memory and its addresses.
pub(crate) fn place(session: &SessionInner, claim: &mut Claim) -> Result<Places, Error> {
    let names: Vec<&str> = claim.sets.iter().map(String::as_str).collect();
    let mut objects = Vec::with_capacity(claim.objects.len());
    for claimed in &mut claim.objects {
        objects.push(place_object(session, &mut claimed.graph, &names)?);
    }
    let mut sets = Vec::with_capacity(names.len());
    for name in names {
        let graphs: Vec<&LinkGraph> = claim.objects.iter().map(|claimed| &*claimed.graph).collect();
        let set = Together::set(name, &graphs)?;
        let allocation = match set.segment() {
            Some(segment) => Some(session.memory.allocate(session.apart(vec![segment])).wait()?),
            None => None,
        };
        let start = start_of(&allocation);
        for (position, claimed) in claim.objects.iter_mut().enumerate() {
            set.assign(position, &mut claimed.graph, start);
        }
        sets.push((set, allocation));
    }
    Ok(Places { objects, sets })
}

/// Gives an object its memory and its addresses.
fn place_object(
    session: &SessionInner,
    graph: &mut LinkGraph,
    sets: &[&str],
) -> Result<(Layout, Option<InFlightAlloc>), Error> {
    let traced = session.trace.now();
    let layout = farlink_graph::lay_out(graph, sets)?;
    let segments = session.apart(layout.segments());
    let allocation = if segments.is_empty() { None } else { Some(session.memory.allocate(segments).wait()?) };
    let ranges: Vec<ExecutorAddrRange> = segments_of(&allocation).map(|segment| segment.range).collect();
    farlink_graph::assign(graph, &layout, &ranges);
    session.trace.object("allocate", graph.name(), traced);
    Ok((layout, allocation))
}

/// Gives objects of the batch all entries in their tables, and other places, if something turns out to be out of their reach
/// now that everything has its address: those objects, or else `every_object`. Returns whether there were any.
pub(crate) fn add_missing_entries(
    library: &LibraryInner,
    claim: &mut Claim,
    places: &mut Places,
    every_object: bool,
) -> Result<bool, Error> {
    let mut positions = Vec::new();
    for (position, claimed) in claim.objects.iter().enumerate() {
        let missing = farlink_graph::missing_entries(&claimed.graph);
        if !missing.is_empty() {
            positions.push(position);
            let far = &mut library.lock().far;
            missing.into_iter().for_each(|symbol| far.add(claimed.graph.symbol_name(symbol)));
        }
    }
    let is_missing = !positions.is_empty();
    if is_missing && every_object {
        positions = (0..claim.objects.len()).collect();
    }
    let names: Vec<&str> = claim.sets.iter().map(String::as_str).collect();
    for position in positions {
        let graph = &mut claim.objects[position].graph;
        farlink_graph::add_entries(graph);
        // What it had is free before it takes anything else.
        places.objects[position].1 = None;
        places.objects[position] = place_object(&library.session, graph, &names)?;
    }
    Ok(is_missing)
}

impl SessionInner {
    /// Gives data whole pages, where executors copy the pages of data that they write: one that has been copied does not show
    /// what is linked later.
    fn apart(&self, mut segments: Vec<SegmentLayout>) -> Vec<SegmentLayout> {
        if self.pool().is_none() {
            return segments;
        }
        let page = self.memory.page_size();
        for segment in segments.iter_mut().filter(|segment| segment.group.prot.contains(MemProt::WRITE)) {
            let bytes = segment.content_bytes.saturating_add(segment.zero_fill_bytes);
            // One that is too large to be rounded is too large to be allocated.
            segment.zero_fill_bytes += page.round_up(bytes).unwrap_or(bytes) - bytes;
            segment.align = segment.align.max(page.align());
        }
        segments
    }
}

fn segments_of(allocation: &Option<InFlightAlloc>) -> impl Iterator<Item = &AllocatedSegment> {
    allocation.iter().flat_map(InFlightAlloc::segments)
}

fn start_of(allocation: &Option<InFlightAlloc>) -> ExecutorAddr {
    segments_of(allocation).next().map_or(ExecutorAddr::NULL, |segment| segment.range.start())
}

impl Places {
    /// Returns the address of a bound; none if it is that of sections that no object has.
    pub(crate) fn bound(&self, claim: &Claim, (of, bound): (Of, Bound)) -> Option<ExecutorAddr> {
        let (start, end) = match of {
            // Arrays of functions are there even if they have no entries. What is empty is somewhere within reach.
            Of::Set(index) if self.sets[index].1.is_some() || !claim.sets[index].starts_with('.') => {
                let (set, allocation) = &self.sets[index];
                let start = allocation.is_some().then(|| start_of(allocation))?;
                (Some(start), start.checked_add(set.size()))
            }
            Of::Nothing | Of::Set(_) => (self.start(), self.start()),
            Of::Program => (self.start(), self.ends(|_| true, false)),
            Of::Code => (None, self.ends(|segment| segment.group.prot.contains(MemProt::EXEC), false)),
            Of::Data => (None, self.ends(|segment| segment.group.prot.contains(MemProt::WRITE), true)),
        };
        let found = if bound == Bound::Start { start } else { end };
        Some(found.unwrap_or(ExecutorAddr::NULL))
    }

    fn start(&self) -> Option<ExecutorAddr> {
        self.all().map(|segment| segment.range.start()).min()
    }

    fn all(&self) -> impl Iterator<Item = &AllocatedSegment> {
        let objects = self.objects.iter().flat_map(|(_, allocation)| segments_of(allocation));
        objects.chain(self.sets.iter().flat_map(|(_, allocation)| segments_of(allocation)))
    }

    /// Returns where the last of some segments ends, with its zero fill or without.
    fn ends(&self, counts: impl Fn(&AllocatedSegment) -> bool, without_zero_fill: bool) -> Option<ExecutorAddr> {
        let end = |segment: &AllocatedSegment| {
            let content_end = segment.range.start().checked_add(segment.content_bytes);
            if without_zero_fill { content_end } else { Some(segment.range.end()) }
        };
        self.all().filter(|segment| counts(segment)).filter_map(end).max()
    }

    /// Copies content into memory and applies fixups.
    pub(crate) fn fix_up(&self, session: &SessionInner, claim: &Claim) -> Result<(), Error> {
        let content = self.all().map(|segment| segment.content_bytes).sum();
        let threads = parallel::threads_for(content);
        if threads == 1 {
            return (0..claim.objects.len())
                .try_for_each(|position| self.fix_up_part(session, claim, (position, 0, 1)));
        }
        // Large objects are done in parts, so that every thread has something to do up to the end.
        let parts = claim.objects.iter().zip(&self.objects).enumerate().flat_map(|(position, (_, (_, allocation)))| {
            let bytes: u64 = segments_of(allocation).map(|segment| segment.content_bytes).sum();
            let count = (bytes / PART_BYTES + 1) as usize;
            (0..count).map(move |part| (position, part, count))
        });
        let parts: Vec<_> = parts.collect();
        let work = |number: usize| self.fix_up_part(session, claim, parts[number]);
        parallel::map(parts.len(), threads, work).1.map_or(Ok(()), Err)
    }

    /// As [`Self::fix_up`], for one of so many parts of the object at a position.
    fn fix_up_part(
        &self,
        session: &SessionInner,
        claim: &Claim,
        (position, part, count): (usize, usize, usize),
    ) -> Result<(), Error> {
        let (traced, graph) = (session.trace.now(), &claim.objects[position].graph);
        let (layout, allocation) = &self.objects[position];
        if let Some(allocation) = allocation {
            farlink_graph::fix_up_part(graph, layout, allocation.segments(), part, count)?;
        }
        if part > 0 {
            return Ok(());
        }
        for (set, allocation) in &self.sets {
            if let Some(segment) = segments_of(allocation).next() {
                set.fix_up(position, graph, &segment.working)?;
            }
        }
        session.trace.object("fix up", graph.name(), traced);
        Ok(())
    }
}

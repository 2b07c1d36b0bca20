//! Showing linked objects to debuggers, through GDB's JIT interface, where a session is built for that.
//!
//! A debugger reads a copy of each object's file in which sections have their addresses. The copy is in the executor's
//! memory, and goes with the object.

use crate::Error;
use crate::claim::Claim;
use crate::session::SessionInner;
use farlink_addr::{Align, AllocGroup, MemProt};
use farlink_mem::{FinalizedAlloc, SegmentLayout};

/// Alignment of a file in memory in bytes: that of its header.
const FILE_ALIGN: Align = match Align::new(8) {
    Some(align) => align,
    None => unreachable!(),
};

/// Shows the objects of a batch, which have been fixed up and do not run yet; gives the memory of each one's file.
pub(crate) fn show(session: &SessionInner, claim: &Claim) -> Result<Vec<Option<Box<FinalizedAlloc>>>, Error> {
    if !session.shows_debuggers {
        return Ok(Vec::new());
    }
    let mut has_file = Vec::with_capacity(claim.objects.len());
    let mut request = Vec::with_capacity(claim.objects.len());
    for claimed in &claim.objects {
        let file = farlink_elf::debug_object(&claimed.graph);
        has_file.push(file.is_some());
        let Some(file) = file else { continue };
        let layout = SegmentLayout {
            group: AllocGroup::standard(MemProt::READ),
            content_bytes: file.len() as u64,
            zero_fill_bytes: 0,
            align: FILE_ALIGN,
        };
        let alloc = session.memory.allocate(vec![layout]).wait()?;
        let segment = &alloc.segments()[0];
        segment.working.write(0, &file)?;
        let actions = vec![session.runtime()?.debugger_actions(segment.range)?];
        request.push((alloc, actions));
    }
    let mut files = session.memory.finalize(request).wait()?.into_iter();
    let file = |has_file: bool| if has_file { files.next().map(Box::new) } else { None };
    Ok(has_file.into_iter().map(file).collect())
}

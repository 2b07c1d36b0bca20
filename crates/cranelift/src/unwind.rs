//! Unwind information of compiled functions, as `.eh_frame`.

use cranelift_codegen::gimli::constants::{DW_EH_PE_pcrel, DW_EH_PE_sdata4};
use cranelift_codegen::gimli::write::{Address, EhFrame, EndianVec, FrameTable};
use cranelift_codegen::gimli::{DwEhPe, LittleEndian};
use cranelift_codegen::isa::TargetIsa;
use cranelift_codegen::isa::unwind::UnwindInfo;

/// Bytes of a record's length, and of a frame description's distance to what it has in common with others.
const FIELD_BYTES: usize = 4;

/// A `.eh_frame` section of one function, whose address is to be written at an offset, as a distance of 4 bytes.
pub(crate) struct EhFrameSection {
    pub(crate) bytes: Vec<u8>,
    pub(crate) function_offset: u64,
}

/// Returns the section for a function; nothing if Cranelift has no such information for it.
pub(crate) fn eh_frame(isa: &dyn TargetIsa, info: &UnwindInfo) -> anyhow::Result<Option<EhFrameSection>> {
    let (UnwindInfo::SystemV(info), Some(mut cie)) = (info, isa.create_systemv_cie()) else { return Ok(None) };
    cie.fde_address_encoding = DwEhPe(DW_EH_PE_pcrel.0 | DW_EH_PE_sdata4.0);
    let mut table = FrameTable::default();
    let cie = table.add_cie(cie);
    table.add_fde(cie, info.to_fde(Address::Constant(0)));
    let mut section = EhFrame(EndianVec::new(LittleEndian));
    table.write_eh_frame(&mut section)?;
    let bytes = section.0.into_vec();
    // The first record is what descriptions have in common, and the second is the description.
    let common = bytes.first_chunk().map_or(0, |bytes| u32::from_le_bytes(*bytes) as usize);
    let function_offset = (FIELD_BYTES + common + 2 * FIELD_BYTES) as u64;
    Ok(Some(EhFrameSection { bytes, function_offset }))
}

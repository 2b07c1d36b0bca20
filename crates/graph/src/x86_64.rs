//! Instruction sequences of x86-64: stubs, support code, and instructions that need no GOT slot after all.

use crate::edge::EdgeKind;

/// Bytes of a GOT slot, and of a stub with its padding.
pub(crate) const ENTRY_BYTES: u64 = 8;

/// `jmp *slot(%rip)`, and two bytes that trap if they are ever reached. The slot's distance is at offset 2.
pub(crate) const STUB: [u8; ENTRY_BYTES as usize] = [0xff, 0x25, 0, 0, 0, 0, 0xcc, 0xcc];

/// Offset in a stub of the distance to its slot.
pub(crate) const STUB_SLOT_OFFSET: u64 = 2;

/// From the field to the end of an instruction that ends with it, negated: what such an instruction's addend is.
pub(crate) const FIELD_IS_LAST: i64 = -4;

/// A function that the C library defines for each program, made of one that it has for all.
pub(crate) struct SupportFunction {
    pub(crate) name: &'static str,
    pub(crate) code: &'static [u8],
    /// Offset of the distance to `__dso_handle`.
    pub(crate) handle_offset: u64,
    /// Offset of the distance to the function jumped to.
    pub(crate) jump_offset: u64,
    /// The function jumped to.
    pub(crate) callee: &'static str,
}

/// The support functions. Each passes the object's handle as the last argument and jumps.
pub(crate) const SUPPORT: [SupportFunction; 3] = [
    // atexit(f): __cxa_atexit(f, NULL, handle). The handler ignores the argument that it gets.
    // xor %esi, %esi; lea handle(%rip), %rdx; jmp __cxa_atexit
    SupportFunction {
        name: "atexit",
        code: &[0x31, 0xf6, 0x48, 0x8d, 0x15, 0, 0, 0, 0, 0xe9, 0, 0, 0, 0],
        handle_offset: 5,
        jump_offset: 10,
        callee: "__cxa_atexit",
    },
    // at_quick_exit(f): __cxa_at_quick_exit(f, handle).
    // lea handle(%rip), %rsi; jmp __cxa_at_quick_exit
    SupportFunction {
        name: "at_quick_exit",
        code: &[0x48, 0x8d, 0x35, 0, 0, 0, 0, 0xe9, 0, 0, 0, 0],
        handle_offset: 3,
        jump_offset: 8,
        callee: "__cxa_at_quick_exit",
    },
    // pthread_atfork(prepare, parent, child): __register_atfork(prepare, parent, child, handle).
    // lea handle(%rip), %rcx; jmp __register_atfork
    SupportFunction {
        name: "pthread_atfork",
        code: &[0x48, 0x8d, 0x0d, 0, 0, 0, 0, 0xe9, 0, 0, 0, 0],
        handle_offset: 3,
        jump_offset: 8,
        callee: "__register_atfork",
    },
];

/// Whether the field at `offset` of `code` is that of a call or jump, conditional ones included.
pub(crate) fn is_branch_field(code: &[u8], offset: usize) -> bool {
    let before = |back: usize| offset.checked_sub(back).and_then(|at| code.get(at)).copied();
    match before(1) {
        Some(0xe8 | 0xe9) => true,
        Some(0x80..=0x8f) => before(2) == Some(0x0f),
        _ => false,
    }
}

/// An instruction written anew so that it needs no GOT slot.
pub(crate) struct Relaxed {
    /// Where its bytes go, relative to the edge's offset.
    pub(crate) start: i64,
    pub(crate) bytes: [u8; 7],
    /// How many of the bytes count.
    pub(crate) len: usize,
}

/// Returns the form without a GOT slot of the instruction in `code` whose field at `offset` an edge of `kind` writes,
/// with `distance` from the field's address to the target at `target`, or `None` if it has none or the target is out of
/// reach.
///
/// | instruction | becomes | if |
/// | --- | --- | --- |
/// | `mov slot(%rip), %reg` | `lea target(%rip), %reg` | the distance has 32 bits |
/// | the same, with a REX prefix | `mov $target, %reg` | else, if the target has |
/// | `test %reg, slot(%rip)`, with a REX prefix | `test $target, %reg` | the target has 32 bits |
/// | `add slot(%rip), %reg`, with a REX prefix; also `or`, `adc`, `sbb`, `and`, `sub`, `xor`, `cmp` | `add $target, %reg` | the target has 32 bits |
/// | `call *slot(%rip)` | `addr32 call target` | the distance has 32 bits |
/// | `jmp *slot(%rip)` | `jmp target; nop` | the distance has 32 bits |
///
/// See the psABI, "Optimize GOTPCRELX Relocations".
pub(crate) fn relax(kind: EdgeKind, code: &[u8], offset: usize, distance: i64, target: u64) -> Option<Relaxed> {
    let before = |back: usize| offset.checked_sub(back).and_then(|at| code.get(at)).copied();
    let (opcode, modrm) = (before(2)?, before(1)?);
    let field = |distance: i64| i32::try_from(distance).ok().map(i32::to_le_bytes);
    let replaced = |start, bytes, len| Some(Relaxed { start, bytes, len });
    match (kind, opcode, modrm) {
        // The call of `__tls_get_addr` may be padded by prefixes, which would change the meaning of a direct call.
        (EdgeKind::GotPcRelX, 0xff, 0x15) if (before(4), before(3)) == (Some(0x66), Some(0x48)) => None,
        (EdgeKind::GotPcRelX, 0xff, 0x15) => {
            let [a, b, c, d] = field(distance.checked_add(FIELD_IS_LAST)?)?;
            replaced(-2, [0x67, 0xe8, a, b, c, d, 0], 6)
        }
        (EdgeKind::GotPcRelX, 0xff, 0x25) => {
            // The field moves one byte forward, and the instruction is one byte shorter.
            let [a, b, c, d] = field(distance.checked_add(FIELD_IS_LAST + 1)?)?;
            replaced(-2, [0xe9, a, b, c, d, 0x90, 0], 6)
        }
        _ if !is_rip_relative(modrm) => None,
        (_, 0x8b, _) if let Some([a, b, c, d]) = field(distance.checked_add(FIELD_IS_LAST)?) => {
            replaced(-2, [0x8d, modrm, a, b, c, d, 0], 6)
        }
        (EdgeKind::RexGotPcRelX, ..) => {
            // The register is where the destination is now: in the low bits of the byte, and of the prefix.
            let (rex, register) = (before(3)?, (modrm >> 3) & 7);
            let [a, b, c, d] = field(target as i64)?;
            let (opcode, modrm) = match opcode {
                0x8b => (0xc7, 0xc0 | register),
                0x85 => (0xf7, 0xc0 | register),
                binary if binary & 0xc7 == 0x03 => (0x81, 0xc0 | (binary & 0x38) | register),
                _ => return None,
            };
            let is_rex_with_64_bits = rex & 0xf8 == 0x48;
            let rex = (rex & 0xfb) | (rex & 4) >> 2;
            if is_rex_with_64_bits { replaced(-3, [rex, opcode, modrm, a, b, c, d], 7) } else { None }
        }
        _ => None,
    }
}

/// Turns the load of a descriptor's address, whose field is at `offset` of `code`, into that of a distance from the
/// thread pointer: `lea x@tlsdesc(%rip), %reg` into `mov x@gottpoff(%rip), %reg`. Returns the opcode that goes two bytes
/// before the field, or `None` if this is another instruction.
///
/// See the psABI, "Thread-Local Storage Descriptors", from general dynamic to initial exec.
pub(crate) fn relax_descriptor(code: &[u8], offset: usize) -> Option<u8> {
    let before = |back: usize| offset.checked_sub(back).and_then(|at| code.get(at)).copied();
    (before(2)? == 0x8d && is_rip_relative(before(1)?)).then_some(0x8b)
}

/// `xchg %ax, %ax`, where the call of a descriptor was.
pub(crate) const NO_DESCRIPTOR_CALL: [u8; 2] = [0x66, 0x90];

/// `call *(%rax)`: the call of a descriptor.
pub(crate) const DESCRIPTOR_CALL: [u8; 2] = [0xff, 0x10];

/// Whether the byte after the opcode says that the field is relative to the instruction pointer.
fn is_rip_relative(modrm: u8) -> bool {
    modrm & 0xc7 == 0x05
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A target that is no 32-bit address.
    const FAR: u64 = 1 << 40;

    fn relaxed(kind: EdgeKind, code: &[u8], distance: i64) -> Option<Vec<u8>> {
        let relaxed = relax(kind, code, code.len() - 4, distance, FAR)?;
        assert_eq!(relaxed.start, -2);
        Some(relaxed.bytes[..relaxed.len].to_vec())
    }

    /// Each form keeps its length and reaches what the slot held; `distance` counts from the old field.
    #[test]
    fn relaxations() {
        let load = [0x48, 0x8b, 0x05, 0, 0, 0, 0];
        assert_eq!(relaxed(EdgeKind::RexGotPcRelX, &load, 0x104).unwrap(), [0x8d, 0x05, 0, 1, 0, 0]);
        let call = [0xff, 0x15, 0, 0, 0, 0];
        assert_eq!(relaxed(EdgeKind::GotPcRelX, &call, 0x104).unwrap(), [0x67, 0xe8, 0, 1, 0, 0]);
        let jump = [0xff, 0x25, 0, 0, 0, 0];
        assert_eq!(relaxed(EdgeKind::GotPcRelX, &jump, 0x103).unwrap(), [0xe9, 0, 1, 0, 0, 0x90]);
    }

    /// What has no other form, or does not reach, is left alone; both ends of the reach are exact.
    #[test]
    fn no_relaxation() {
        let test = [0x85, 0x05, 0, 0, 0, 0];
        assert!(relaxed(EdgeKind::GotPcRelX, &test, 4).is_none());
        let call = [0xff, 0x15, 0, 0, 0, 0];
        let (least, most) = (i64::from(i32::MIN) + 4, i64::from(i32::MAX) + 4);
        assert!(
            relaxed(EdgeKind::GotPcRelX, &call, least).is_some() && relaxed(EdgeKind::GotPcRelX, &call, most).is_some()
        );
        assert!(
            relaxed(EdgeKind::GotPcRelX, &call, least - 1).is_none()
                && relaxed(EdgeKind::GotPcRelX, &call, most + 1).is_none()
        );
        assert!(relax(EdgeKind::GotPcRelX, &[0; 4], 0, 0, 0).is_none());
        assert!(relaxed(EdgeKind::GotPcRelX, &[0x66, 0x48, 0xff, 0x15, 0, 0, 0, 0], 4).is_none());
        // A load that is not relative to the instruction pointer.
        assert!(relaxed(EdgeKind::RexGotPcRelX, &[0x48, 0x8b, 0x83, 0, 0, 0, 0], 4).is_none());
    }

    /// With a target that is a 32-bit address, the address itself goes into the instruction; the register moves from one
    /// operand's place to the other's.
    #[test]
    fn absolute_relaxations() {
        let absolute = |code: &[u8], target: u64| {
            let relaxed = relax(EdgeKind::RexGotPcRelX, code, 3, 1 << 40, target)?;
            Some((relaxed.start, relaxed.bytes[..relaxed.len].to_vec()))
        };
        // mov slot(%rip), %r9; test %rdx, slot(%rip); cmp slot(%rip), %r12; sub slot(%rip), %rax
        let rows: [(&[u8], &[u8]); 4] = [
            (&[0x4c, 0x8b, 0x0d, 0, 0, 0, 0], &[0x49, 0xc7, 0xc1]),
            (&[0x48, 0x85, 0x15, 0, 0, 0, 0], &[0x48, 0xf7, 0xc2]),
            (&[0x4c, 0x3b, 0x25, 0, 0, 0, 0], &[0x49, 0x81, 0xfc]),
            (&[0x48, 0x2b, 0x05, 0, 0, 0, 0], &[0x48, 0x81, 0xe8]),
        ];
        for (code, start) in rows {
            let largest = i32::MAX as u64;
            assert_eq!(absolute(code, largest), Some((-3, [start, &[0xff, 0xff, 0xff, 0x7f]].concat())));
            assert_eq!(absolute(code, largest + 1), None);
        }
        assert_eq!(absolute(&[0x48, 0x89, 0x05, 0, 0, 0, 0], 0), None, "a store has no such form");
    }

    /// Calls, jumps and conditional jumps are branches; loads and what is cut off are not.
    #[test]
    fn branch_fields() {
        for code in [&[0xe8][..], &[0xe9], &[0x0f, 0x84]] {
            assert!(is_branch_field(code, code.len()));
        }
        for code in [&[][..], &[0x84], &[0x48, 0x8d, 0x05]] {
            assert!(!is_branch_field(code, code.len()));
        }
    }
}

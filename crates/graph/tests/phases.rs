//! The phases on graphs made by hand: relocation arithmetic at its limits, tables, pruning, groups, unwind records.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on panics")]

use farlink_addr::{Align, AllocGroup, ExecutorAddr, ExecutorAddrRange, MemProt};
use farlink_graph::{
    Arch, BlockId, Content, Edge, EdgeKind, GraphBuilder, LinkError, LinkGraph, Linkage, NewSection, Place, Scope,
    SectionKind, SymbolId, SymbolType, TableEntry, Text, TlsAddress, TlsModule, Together, add_entries, assign,
    build_tables, fix_up, lay_out, missing_entries, provide, prune,
};
use farlink_mem::{AllocatedSegment, WorkingMemory};

const PAGE: u64 = 4096;

const TLS_MODULE: TlsModule = TlsModule { id: 9, tp_offset: Some(-0x100) };

/// A graph whose sections and symbols are added by name.
struct Maker {
    builder: GraphBuilder,
    edges: Vec<(BlockId, Vec<Edge>)>,
}

impl Maker {
    fn new() -> Self {
        Self { builder: GraphBuilder::new("test.o", Arch::X86_64, Vec::new().into()), edges: Vec::new() }
    }

    fn section(&mut self, name: &'static str, prot: MemProt, bytes: &[u8], edges: Vec<Edge>) -> BlockId {
        self.section_of_kind(name, SectionKind::Regular, prot, bytes, edges)
    }

    fn section_of_kind(
        &mut self,
        name: &'static str,
        kind: SectionKind,
        prot: MemProt,
        bytes: &[u8],
        edges: Vec<Edge>,
    ) -> BlockId {
        let new = NewSection { kind, ..new_section(name, prot, Content::Own(bytes.to_vec()), bytes.len() as u64, 8) };
        let (_, block) = self.builder.add_section(new);
        self.edges.push((block, edges));
        block
    }

    fn symbol(&mut self, name: &'static str, place: Place, scope: Scope) -> SymbolId {
        self.builder.add_symbol(Text::Own(name), place, 0, Linkage::Strong, scope, SymbolType::None)
    }

    fn global(&mut self, name: &'static str, block: BlockId) -> SymbolId {
        self.symbol(name, Place::Defined { block, offset: 0 }, Scope::Default)
    }

    fn external(&mut self, name: &'static str, weak: bool) -> SymbolId {
        self.symbol(name, Place::External { weak }, Scope::Default)
    }

    fn finish(mut self) -> LinkGraph {
        for (block, edges) in self.edges {
            self.builder.add_edges(block, edges);
        }
        self.builder.finish().unwrap()
    }
}

fn new_section(name: &'static str, prot: MemProt, content: Content, size: u64, align: u64) -> NewSection {
    NewSection {
        name: Text::Own(name),
        kind: SectionKind::Regular,
        group: AllocGroup::standard(prot),
        comdat: None,
        retain: false,
        is_large: false,
        content,
        size,
        align: Align::new(align).unwrap(),
    }
}

fn edge(offset: u64, kind: EdgeKind, target: SymbolId, addend: i64) -> Edge {
    Edge { offset, kind, target, addend }
}

/// Takes a graph through the phases, its segments page after page from `base`; gives the linked bytes of each.
fn link(
    graph: &mut LinkGraph,
    base: u64,
    addresses: &[(&str, u64)],
) -> Result<Vec<(ExecutorAddrRange, Vec<u8>)>, LinkError> {
    prune(graph, true);
    for external in graph.take_new_externals() {
        provide(graph, external);
    }
    build_tables(graph, |_| true)?;
    place(graph, base, addresses)
}

/// Takes a graph with its tables through the other phases.
fn place(
    graph: &mut LinkGraph,
    base: u64,
    addresses: &[(&str, u64)],
) -> Result<Vec<(ExecutorAddrRange, Vec<u8>)>, LinkError> {
    let variables = Together::thread_local(&[graph])?;
    if let Some(variables) = &variables {
        variables.assign(0, graph, ExecutorAddr::NULL);
        graph.set_tls_module(TLS_MODULE);
    }
    let layout = lay_out(graph, &[])?;
    let mut next = base;
    let segments: Vec<AllocatedSegment> = layout
        .segments()
        .into_iter()
        .map(|segment| {
            let size = segment.content_bytes + segment.zero_fill_bytes;
            let range = ExecutorAddrRange::from_len(ExecutorAddr::new(next), size).unwrap();
            next += size.next_multiple_of(PAGE);
            let working = WorkingMemory::in_heap(segment.content_bytes).unwrap();
            AllocatedSegment { group: segment.group, range, content_bytes: segment.content_bytes, working }
        })
        .collect();
    let ranges: Vec<_> = segments.iter().map(|segment| segment.range).collect();
    assign(graph, &layout, &ranges);
    for external in graph.externals().collect::<Vec<_>>() {
        let name = graph.symbol_name(external).to_owned();
        let address = addresses.iter().find(|(known, _)| *known == name).map_or(0, |&(_, address)| address);
        graph.set_address(external, ExecutorAddr::new(address));
    }
    fix_up(graph, &layout, &segments)?;
    let bytes = |segment: &AllocatedSegment| {
        let mut bytes = vec![0; segment.content_bytes as usize];
        segment.working.read(0, &mut bytes).unwrap();
        (segment.range, bytes)
    };
    Ok(segments.iter().map(bytes).collect())
}

/// Links one read-only block of 16 bytes at `base` whose field at offset 8 refers to a symbol at `target`.
fn field(kind: EdgeKind, base: u64, target: u64, addend: i64) -> Result<u64, LinkError> {
    let mut maker = Maker::new();
    let external = maker.external("target", false);
    let block = maker.section(".rodata", MemProt::READ, &[0x55; 16], vec![edge(8, kind, external, addend)]);
    maker.global("root", block);
    let mut graph = maker.finish();
    let segments = link(&mut graph, base, &[("target", target)])?;
    let (range, bytes) = &segments[0];
    assert_eq!(range.start().as_u64(), base);
    let width = kind.width() as usize;
    assert!(bytes[..8].iter().chain(&bytes[8 + width..16]).all(|&byte| byte == 0x55), "only the field is written");
    let mut value = [0; 8];
    value[..width].copy_from_slice(&bytes[8..8 + width]);
    Ok(u64::from_le_bytes(value))
}

/// Every kind at its smallest and largest value, and one past each.
#[test]
fn ranges_are_exact() {
    const BASE: u64 = 0x1_0000_0000_0000;
    const P: u64 = BASE + 8;
    let low = |bits: u32, value: i128| (value as u128 & ((1u128 << bits) - 1)) as u64;
    // Absolute kinds: (kind, least value, greatest value). The target has the value; the addend moves it.
    for (kind, least, most) in [
        (EdgeKind::Pointer32, 0, i128::from(u32::MAX)),
        (EdgeKind::Pointer32Signed, i128::from(i32::MIN), i128::from(i32::MAX)),
        (EdgeKind::Pointer16, i128::from(i16::MIN), i128::from(u16::MAX)),
        (EdgeKind::Pointer8, i128::from(i8::MIN), i128::from(u8::MAX)),
    ] {
        let bits = kind.width() as u32 * 8;
        for value in [least, most, 0] {
            assert_eq!(field(kind, BASE, value as u64, 0), Ok(low(bits, value)), "{kind} {value}");
            assert_eq!(field(kind, BASE, (value - 5) as u64, 5), Ok(low(bits, value)), "{kind} {value} with an addend");
        }
        for value in [least - 1, most + 1] {
            assert!(matches!(field(kind, BASE, value as u64, 0), Err(LinkError::OutOfRange { .. })), "{kind} {value}");
        }
    }
    for (kind, least, most) in [
        (EdgeKind::Delta32, i64::from(i32::MIN), i64::from(i32::MAX)),
        (EdgeKind::Delta16, i64::from(i16::MIN), i64::from(i16::MAX)),
        (EdgeKind::Delta8, i64::from(i8::MIN), i64::from(i8::MAX)),
    ] {
        let bits = kind.width() as u32 * 8;
        for value in [least, most, 0] {
            let target = P.wrapping_add_signed(value);
            assert_eq!(field(kind, BASE, target, 0), Ok(low(bits, value.into())), "{kind} {value}");
            assert_eq!(field(kind, BASE, target.wrapping_add(4), -4), Ok(low(bits, value.into())), "{kind} {value}");
        }
        for value in [least - 1, most + 1] {
            assert!(field(kind, BASE, P.wrapping_add_signed(value), 0).is_err(), "{kind} {value}");
        }
    }
    for target in [0, 1, P, u64::MAX] {
        assert_eq!(field(EdgeKind::Pointer64, BASE, target, 3), Ok(target.wrapping_add(3)));
        assert_eq!(field(EdgeKind::Delta64, BASE, target, -3), Ok(target.wrapping_sub(3).wrapping_sub(P)));
    }
}

/// An error of range names object, section, offset, symbol, relocation, both addresses, and the way out.
#[test]
fn out_of_range_says_everything() {
    let error = field(EdgeKind::Delta32, 0x7f00_0000_0000, 0x1000, -4).unwrap_err().to_string();
    for word in ["test.o(.rodata+0x8)", "R_X86_64_PC32", "target", "0x1000", "0x7f0000000008", "-fPIC"] {
        assert!(error.contains(word), "{word}: {error}");
    }
}

/// A call of something far goes through a stub and its GOT slot; of something near, or null, as it should.
#[test]
fn stubs_and_slots() {
    let run = |target: u64, weak: bool| {
        let mut maker = Maker::new();
        let external = maker.external("f", weak);
        let call = [0xe8, 0, 0, 0, 0, 0xc3, 0x90, 0x90];
        let edges = vec![edge(1, EdgeKind::Branch32, external, -4)];
        let block = maker.section(".text", MemProt::RX, &call, edges);
        maker.global("main", block);
        let mut graph = maker.finish();
        let segments = link(&mut graph, 0x7f00_0000_0000, &[("f", target)]).unwrap();
        let code_start = segments[1].0.start().as_u64();
        let distance = i32::from_le_bytes(segments[1].1[1..5].try_into().unwrap());
        let reached = (code_start + 5).wrapping_add_signed(distance.into());
        let (got, stubs) = (graph.got_entries(), graph.stubs());
        assert_eq!((got.len(), stubs.len()), (1, 1));
        let slot = (got[0].addr.as_u64() - segments[0].0.start().as_u64()) as usize;
        assert_eq!(u64::from_le_bytes(segments[0].1[slot..slot + 8].try_into().unwrap()), target);
        // The stub jumps through the slot.
        let stub = (stubs[0].addr.as_u64() - code_start) as usize;
        let to_slot = i32::from_le_bytes(segments[1].1[stub + 2..stub + 6].try_into().unwrap());
        assert_eq!(segments[1].1[stub..stub + 2], [0xff, 0x25]);
        assert_eq!((stubs[0].addr.as_u64() + 6).wrapping_add_signed(to_slot.into()), got[0].addr.as_u64());
        (reached, stubs[0].addr.as_u64())
    };
    let (reached, stub) = run(0x1000, false);
    assert_eq!(reached, stub);
    let (reached, _) = run(0x7f00_7000_0000, false);
    assert_eq!(reached, 0x7f00_7000_0000);
    let (reached, stub) = run(0, true);
    assert_eq!(reached, stub);
}

/// A load through the GOT becomes the address itself when that is near, and stays a load when it is far, null, or the
/// relocation is not one that may change the instruction.
#[test]
fn got_loads_are_relaxed() {
    let run = |kind, target: u64, addend| {
        let mut maker = Maker::new();
        let external = maker.external("x", target == 0);
        let load = [0x48, 0x8b, 0x05, 0, 0, 0, 0, 0xc3];
        let block = maker.section(".text", MemProt::RX, &load, vec![edge(3, kind, external, addend)]);
        maker.global("f", block);
        let mut graph = maker.finish();
        let segments = link(&mut graph, 0x7f00_0000_0000, &[("x", target)]).unwrap();
        segments[1].1[1]
    };
    let near = 0x7f00_0001_0000;
    assert_eq!(run(EdgeKind::RexGotPcRelX, near, -4), 0x8d);
    assert_eq!(run(EdgeKind::RexGotPcRelX, near, 4), 0x8b);
    assert_eq!(run(EdgeKind::GotPcRel32, near, -4), 0x8b);
    // An address of 32 bits goes into the instruction itself.
    assert_eq!(run(EdgeKind::RexGotPcRelX, 0x1000, -4), 0xc7);
    assert_eq!(run(EdgeKind::RexGotPcRelX, 1 << 31, -4), 0x8b);
    assert_eq!(run(EdgeKind::RexGotPcRelX, 0, -4), 0x8b);
}

/// A graph whose code calls `f`, loads the address of `x` and tests that of `y`, in this order, by way of the GOT.
fn caller_and_loader() -> LinkGraph {
    let mut maker = Maker::new();
    let [f, x, y] = ["f", "x", "y"].map(|name| maker.external(name, false));
    let code = [0xe8, 0, 0, 0, 0, 0x48, 0x8b, 0x05, 0, 0, 0, 0, 0x48, 0x85, 0x05, 0, 0, 0, 0, 0xc3];
    let edges = vec![
        edge(1, EdgeKind::Branch32, f, -4),
        edge(8, EdgeKind::RexGotPcRelX, x, -4),
        edge(15, EdgeKind::RexGotPcRelX, y, -4),
    ];
    let block = maker.section(".text", MemProt::RX, &code, edges);
    maker.global("main", block);
    let mut graph = maker.finish();
    prune(&mut graph, true);
    graph
}

/// What is in reach gets no stub and no slot of the GOT, but for instructions that have no other form; what turns out not
/// to be is named, is not linked without, and is reached by the entries that it is given then. Both ends are exact.
#[test]
fn entries_are_for_what_is_far() {
    const BASE: u64 = 0x7f00_0000_0000;
    let names = |graph: &LinkGraph, entries: Vec<TableEntry>| -> Vec<String> {
        entries.iter().map(|entry| graph.symbol_name(entry.target).to_owned()).collect()
    };
    // The GOT is in the first page and the code in the second; the distance is that from the end of the instruction.
    let (call_end, load_end) = (BASE + PAGE + 5, BASE + PAGE + 12);
    let (most, least) = (i32::MAX as u64, i64::from(i32::MIN));
    for (f, x, missing) in [
        (call_end + most, load_end + most, &[][..]),
        (call_end.wrapping_add_signed(least), load_end.wrapping_add_signed(least), &[]),
        (call_end + most + 1, load_end, &["f"]),
        (call_end.wrapping_add_signed(least - 1), load_end, &["f"]),
        (call_end, load_end + most + 1, &["x"]),
        (call_end, load_end.wrapping_add_signed(least - 1), &["x"]),
        (0, 0, &["f", "x"]),
    ] {
        let addresses = [("f", f), ("x", x), ("y", BASE)];
        let mut graph = caller_and_loader();
        build_tables(&mut graph, |_| false).unwrap();
        let placed = place(&mut graph, BASE, &addresses);
        assert_eq!((names(&graph, graph.got_entries()), graph.stubs()), (vec!["y".to_owned()], Vec::new()));
        let found = missing_entries(&graph);
        assert_eq!(found.iter().map(|&id| graph.symbol_name(id)).collect::<Vec<_>>(), missing);
        assert_eq!(placed.is_ok(), missing.is_empty(), "{placed:?}");
        let segments = match placed {
            Ok(segments) => segments,
            Err(_) => {
                add_entries(&mut graph);
                assert_eq!(names(&graph, graph.got_entries()), ["y", "f", "x"]);
                assert_eq!(names(&graph, graph.stubs()), ["f"]);
                place(&mut graph, BASE, &addresses).unwrap()
            }
        };
        let (got, code) = (&segments[0], &segments[1]);
        let field = |at: usize| i64::from(i32::from_le_bytes(code.1[at..at + 4].try_into().unwrap()));
        let slot = |addr: u64| {
            let at = (addr - got.0.start().as_u64()) as usize;
            u64::from_le_bytes(got.1[at..at + 8].try_into().unwrap())
        };
        let called = call_end.wrapping_add_signed(field(1));
        if missing.contains(&"f") {
            let stub = graph.stubs()[0].addr.as_u64();
            let at = (stub - code.0.start().as_u64()) as usize;
            assert_eq!((called, slot((stub + 6).wrapping_add_signed(field(at + 2)))), (stub, f));
        } else {
            assert_eq!(called, f);
        }
        let loaded = load_end.wrapping_add_signed(field(8));
        let is_load = missing.contains(&"x");
        assert_eq!(code.1[6], if is_load { 0x8b } else { 0x8d });
        assert_eq!(if is_load { slot(loaded) } else { loaded }, x);
        assert_eq!(slot((BASE + PAGE + 19).wrapping_add_signed(field(15))), BASE);
    }
}

/// Names that are said to be far have their entries at once, and so has what a weak reference may not find.
#[test]
fn entries_of_far_names_are_there_at_once() {
    let mut graph = caller_and_loader();
    build_tables(&mut graph, |name| name == "f").unwrap();
    assert_eq!((graph.got_entries().len(), graph.stubs().len()), (2, 1));
    let mut maker = Maker::new();
    let external = maker.external("f", true);
    let call = vec![edge(1, EdgeKind::Branch32, external, -4)];
    let block = maker.section(".text", MemProt::RX, &[0xe8, 0, 0, 0, 0, 0xc3], call);
    maker.global("main", block);
    let mut graph = maker.finish();
    prune(&mut graph, true);
    build_tables(&mut graph, |_| false).unwrap();
    assert_eq!((graph.got_entries().len(), graph.stubs().len()), (1, 1));
}

/// Only what something visible reaches is linked, however long the chain to it.
#[test]
fn pruning_follows_chains() {
    const LENGTH: usize = 100_000;
    let mut maker = Maker::new();
    let blocks: Vec<_> = (0..LENGTH).map(|_| maker.section(".text.f", MemProt::RX, &[0xc3; 8], Vec::new())).collect();
    let symbols: Vec<_> =
        blocks.iter().map(|&block| maker.symbol("", Place::Defined { block, offset: 0 }, Scope::Local)).collect();
    maker.edges.clear();
    for (block, next) in blocks.iter().zip(&symbols[1..]) {
        maker.edges.push((*block, vec![edge(0, EdgeKind::Delta32, *next, 0)]));
    }
    maker.global("start", blocks[LENGTH / 2]);
    let mut graph = maker.finish();
    let segments = link(&mut graph, 0x10_0000, &[]).unwrap();
    assert_eq!(segments[0].0.len(), (LENGTH as u64 / 2) * 8);
}

/// What is not supported is refused by name when it is needed, and only then.
#[test]
fn unsupported_is_refused_when_live() {
    for is_live in [false, true] {
        let mut maker = Maker::new();
        let external = maker.external("variable", false);
        let edges = vec![edge(0, EdgeKind::from_x86_64(5), external, 0)];
        let block = maker.section(".text", MemProt::RX, &[0; 8], edges);
        if is_live {
            maker.global("f", block);
        }
        let mut graph = maker.finish();
        match link(&mut graph, 0x1000, &[]) {
            Ok(_) => assert!(!is_live),
            Err(error) => {
                let text = error.to_string();
                assert!(is_live && text.contains("R_X86_64_COPY") && text.contains("variable"), "{text}");
            }
        }
    }
}

/// The functions that the C library defines for each program pass the object's own handle, which holds its address.
#[test]
fn support_functions() {
    let mut maker = Maker::new();
    let atexit = maker.external("atexit", false);
    let edges = vec![edge(1, EdgeKind::Branch32, atexit, -4)];
    let block = maker.section(".text", MemProt::RX, &[0xe8, 0, 0, 0, 0, 0xc3, 0, 0], edges);
    maker.global("main", block);
    let mut graph = maker.finish();
    let far = 0x10_0000;
    let segments = link(&mut graph, 0x7f00_0000_0000, &[("__cxa_atexit", far)]).unwrap();
    let handle = graph.dso_handle().unwrap().as_u64();
    let offset = (handle - segments[0].0.start().as_u64()) as usize;
    assert_eq!(u64::from_le_bytes(segments[0].1[offset..offset + 8].try_into().unwrap()), handle);
    assert_eq!(graph.externals().map(|id| graph.symbol_name(id).to_owned()).collect::<Vec<_>>(), ["__cxa_atexit"]);
}

/// Distances from the thread pointer, offsets in the module, and slots with both, of variables of the object and of others.
#[test]
fn thread_local_storage() {
    let mut maker = Maker::new();
    let tls = SectionKind::Tls;
    let variables = maker.section_of_kind(".tdata", tls, MemProt::RW, &[7; 24], Vec::new());
    let own = maker.builder.add_symbol(
        Text::Own("own"),
        Place::Defined { block: variables, offset: 16 },
        8,
        Linkage::Strong,
        Scope::Default,
        SymbolType::Tls,
    );
    let other = maker.external("other", false);
    let edges = vec![
        edge(0, EdgeKind::TpOff32, own, 0),
        edge(4, EdgeKind::DtpOff32, own, 4),
        edge(8, EdgeKind::TpOff64, other, 0),
        edge(16, EdgeKind::GotTpOff, other, -4),
        edge(20, EdgeKind::TlsGd, other, -4),
        edge(24, EdgeKind::TlsLd, own, -4),
        edge(28, EdgeKind::TlsGd, own, -4),
    ];
    let block = maker.section(".text", MemProt::RX, &[0; 32], edges);
    maker.global("f", block);
    let mut graph = maker.finish();
    prune(&mut graph, true);
    graph.set_tls_address(other, TlsAddress { module: 2, offset: 0x30, tp_offset: Some(-0x50) });
    let segments = link(&mut graph, 0x10_0000, &[]).unwrap();
    let targets: Vec<_> = graph.static_tls_targets().collect();
    assert_eq!(targets, [own, other]);
    let (slots, code) = (&segments[0], &segments[1]);
    let word = |at: usize| i32::from_le_bytes(code.1[at..at + 4].try_into().unwrap());
    assert_eq!((word(0), word(4), word(8), word(12)), (16 - 0x100, 20, -0x50, -1));
    let slot = |at: usize, count: usize| -> Vec<i64> {
        let address = code.0.start().as_u64() + at as u64 + 4;
        let start = (address.wrapping_add_signed(word(at).into()) - slots.0.start().as_u64()) as usize;
        let values = slots.1[start..].chunks(8).take(count);
        values.map(|value| i64::from_le_bytes(value.try_into().unwrap())).collect()
    };
    assert_eq!(slot(16, 1), [-0x50]);
    assert_eq!(slot(20, 2), [2, 0x30]);
    assert_eq!(slot(24, 2), [9, 0]);
    assert_eq!(slot(28, 2), [9, 16]);
}

/// Distances and offsets of thread-local variables at their least and greatest values, and one past each.
#[test]
fn thread_local_ranges_are_exact() {
    let run = |kind: EdgeKind, offset: u64, tp_offset: i64, addend| {
        let mut maker = Maker::new();
        let variables = maker.section_of_kind(".tdata", SectionKind::Tls, MemProt::RW, &[0; 8], Vec::new());
        let (own, other) = (maker.global("own", variables), maker.external("other", false));
        let edges = vec![edge(0, kind, other, addend), edge(8, EdgeKind::TpOff64, own, 0)];
        let block = maker.section(".rodata", MemProt::READ, &[0; 16], edges);
        maker.global("f", block);
        let mut graph = maker.finish();
        prune(&mut graph, true);
        let module = TLS_MODULE.id;
        graph.set_tls_address(other, TlsAddress { module, offset, tp_offset: Some(tp_offset) });
        let segments = link(&mut graph, 0x7f00_0000_0000, &[])?;
        Ok(i32::from_le_bytes(segments[0].1[..4].try_into().unwrap()))
    };
    let (least, most) = (i64::from(i32::MIN), i64::from(i32::MAX));
    for value in [least, most, 0, -1] {
        assert_eq!(run(EdgeKind::TpOff32, 0, value, 0), Ok(value as i32));
        assert_eq!(run(EdgeKind::TpOff32, 0, value - 7, 7), Ok(value as i32));
    }
    for value in [0, most] {
        assert_eq!(run(EdgeKind::DtpOff32, value as u64, 0, 0), Ok(value as i32));
    }
    for value in [least - 1, most + 1] {
        assert!(matches!(run(EdgeKind::TpOff32, 0, value, 0), Err(LinkError::OutOfRange { .. })), "{value}");
        assert!(matches!(run(EdgeKind::DtpOff32, 0, 0, value), Err(LinkError::OutOfRange { .. })), "{value}");
    }
}

/// What is thread-local in one place and not in the other is an error, and so is a distance that differs from thread to
/// thread.
#[test]
fn thread_local_mistakes() {
    let run = |kind, is_variable: bool, tp_offset| {
        let mut maker = Maker::new();
        let section_kind = if is_variable { SectionKind::Tls } else { SectionKind::Regular };
        let data = maker.section_of_kind(".data", section_kind, MemProt::RW, &[0; 8], Vec::new());
        let (own, other) = (maker.global("own", data), maker.external("other", false));
        let edges = vec![edge(0, kind, if tp_offset { own } else { other }, 0)];
        let block = maker.section(".text", MemProt::RX, &[0; 8], edges);
        maker.global("f", block);
        let mut graph = maker.finish();
        prune(&mut graph, true);
        graph.set_tls_address(other, TlsAddress { module: 2, offset: 0, tp_offset: None });
        link(&mut graph, 0x1000, &[]).map(drop)
    };
    assert_eq!(run(EdgeKind::TpOff32, true, true), Ok(()));
    assert!(matches!(run(EdgeKind::TpOff32, false, true), Err(LinkError::TlsMismatch { .. })));
    assert!(matches!(run(EdgeKind::Delta32, true, true), Err(LinkError::TlsMismatch { .. })));
    assert!(matches!(run(EdgeKind::TpOff32, true, false), Err(LinkError::DynamicTls { .. })));
    assert!(matches!(run(EdgeKind::DtpOff32, true, false), Err(LinkError::ForeignLocalDynamic { .. })));
    assert!(matches!(run(EdgeKind::TlsDescCall, true, true), Err(LinkError::UnknownCode { .. })));
}

/// Everything that refers to an IFUNC gets the address of one stub, whose slot and resolver are known afterwards.
#[test]
fn ifuncs_have_one_address() {
    let mut maker = Maker::new();
    let resolver = maker.section(".text.resolver", MemProt::RX, &[0xc3; 16], Vec::new());
    let ifunc = maker.builder.add_symbol(
        Text::Own("chosen"),
        Place::Defined { block: resolver, offset: 8 },
        8,
        Linkage::Strong,
        Scope::Default,
        SymbolType::IndirectFunction,
    );
    let edges = vec![edge(0, EdgeKind::Pointer64, ifunc, 0), edge(8, EdgeKind::Delta64, ifunc, 0)];
    let table = maker.section(".rodata", MemProt::READ, &[0; 16], edges);
    maker.global("table", table);
    let mut graph = maker.finish();
    let segments = link(&mut graph, 0x10_0000, &[]).unwrap();
    let chosen = graph.symbol_address(ifunc).unwrap().as_u64();
    let values: Vec<u64> =
        segments[0].1[..16].chunks(8).map(|value| u64::from_le_bytes(value.try_into().unwrap())).collect();
    let place = segments[0].0.start().as_u64() + 8;
    assert_eq!(values, [chosen, chosen.wrapping_sub(place)]);
    let code = &segments.iter().find(|(range, _)| range.contains(ExecutorAddr::new(chosen))).unwrap();
    let resolver = code.0.start().as_u64() + 8;
    let ifuncs = graph.ifuncs();
    assert_eq!((ifuncs.len(), ifuncs[0].resolver.as_u64()), (1, resolver));
    let stub = &code.1[(chosen - code.0.start().as_u64()) as usize..][..8];
    let slot = (chosen + 6).wrapping_add_signed(i32::from_le_bytes(stub[2..6].try_into().unwrap()).into());
    assert_eq!((&stub[..2], slot), (&[0xff, 0x25][..], ifuncs[0].slot.as_u64()));
}

/// A group that lost takes its sections with it: references to what it defined for others become external, and one to
/// what was its own is an error.
#[test]
fn discarded_groups() {
    for refers_to_local in [false, true] {
        let mut maker = Maker::new();
        let comdat = maker.builder.add_comdat(Text::Own("inline_function"));
        let inline = new_section(".text.inline", MemProt::RX, Content::Own(vec![0xc3; 8]), 8, 1);
        let (_, inline) = maker.builder.add_section(NewSection { comdat: Some(comdat), ..inline });
        let visible = maker.global("inline_function", inline);
        let local = maker.symbol("", Place::Defined { block: inline, offset: 4 }, Scope::Local);
        let target = if refers_to_local { local } else { visible };
        let edges = vec![edge(0, EdgeKind::Pointer64, target, 0)];
        let table = maker.section(".data", MemProt::RW, &[0; 8], edges);
        maker.global("table", table);
        let mut graph = maker.finish();
        graph.discard_comdat(comdat_of(&graph));
        let linked = link(&mut graph, 0x1000, &[("inline_function", 0x5000)]);
        if refers_to_local {
            assert!(matches!(linked, Err(LinkError::DiscardedTarget { .. })), "{linked:?}");
        } else {
            let segments = linked.unwrap();
            assert_eq!((segments.len(), &segments[0].1[..2]), (1, &[0x00, 0x50][..]));
        }
    }
}

fn comdat_of(graph: &LinkGraph) -> farlink_graph::ComdatId {
    graph.comdats().next().unwrap()
}

/// Zero fill comes after content and takes no bytes; alignments hold; too large ones are refused.
#[test]
fn layout_of_zero_fill() {
    let mut maker = Maker::new();
    let mut add = |name, content, size, align| {
        let new = new_section(name, MemProt::RW, content, size, align);
        maker.builder.add_section(NewSection { retain: true, ..new })
    };
    add(".bss", Content::ZeroFill, 4 << 30, 4096);
    add(".data", Content::Own(vec![1; 10]), 10, 1);
    add(".data2", Content::Own(vec![2; 3]), 3, 16);
    let mut graph = maker.finish();
    prune(&mut graph, true);
    let segments = lay_out(&graph, &[]).unwrap().segments();
    assert_eq!((segments.len(), segments[0].content_bytes), (1, 19));
    assert_eq!(segments[0].content_bytes + segments[0].zero_fill_bytes, 4096 + (4 << 30));
    assert_eq!(segments[0].align.bytes(), 4096);

    let mut maker = Maker::new();
    let new = new_section(".data", MemProt::RW, Content::Own(vec![1]), 1, 4 << 20);
    maker.builder.add_section(NewSection { retain: true, ..new });
    let mut graph = maker.finish();
    prune(&mut graph, true);
    assert!(matches!(lay_out(&graph, &[]), Err(LinkError::TooLarge { .. })));
}

/// Records whose length has 8 bytes are written with one of 4, and the distance to the CIE is right.
#[test]
fn large_unwind_records() {
    let mut maker = Maker::new();
    let text = maker.section(".text", MemProt::RX, &[0xc3; 8], Vec::new());
    let function = maker.global("f", text);
    let record = |id: u32, rest: &[u8]| {
        let length = 4 + rest.len() as u64;
        [&u32::MAX.to_le_bytes()[..], &length.to_le_bytes(), &id.to_le_bytes(), rest].concat()
    };
    let cie = record(0, b"\x01zR\0\x01\x78\x10\x01\x1b\0\0\0");
    // The distance is from its own field to the CIE's beginning.
    let fde = record(cie.len() as u32 + 12, &[0; 12]);
    let function_field = cie.len() as u64 + 16;
    let edges = vec![edge(function_field, EdgeKind::Delta32, function, 0)];
    maker.section_of_kind(".eh_frame", SectionKind::EhFrame, MemProt::READ, &[cie, fde].concat(), edges);
    let mut graph = maker.finish();
    let segments = link(&mut graph, 0x10_0000, &[]).unwrap();
    let (range, bytes) = segments.iter().find(|(_, bytes)| bytes.contains(&b'z')).unwrap();
    let start = graph.eh_frame().unwrap().start();
    let bytes_at = |addr: ExecutorAddr| &bytes[(addr.as_u64() - range.start().as_u64()) as usize..];
    let word = |at: usize| u32::from_le_bytes(bytes_at(start)[at..at + 4].try_into().unwrap());
    assert_eq!((word(0), word(4)), (16, 0));
    assert_eq!((word(20), word(24)), (16, 24));
    let field = start.as_u64() + 28;
    assert_eq!(field.wrapping_add_signed((word(28) as i32).into()), graph.symbol_address(function).unwrap().as_u64());
    assert_eq!(word(40), 0);
    // The index has one entry: the function and its description, as distances.
    let index = graph.unwind_index().unwrap();
    let after_link = &bytes_at(index.start())[farlink_mem::INDEX_LINK_BYTES as usize..];
    let entry: Vec<i32> = after_link[..16].chunks(4).map(|word| i32::from_le_bytes(word.try_into().unwrap())).collect();
    let distance = |to: ExecutorAddr| to.as_u64().wrapping_sub(index.start().as_u64()) as i32;
    let description = start.checked_add(20).unwrap();
    assert_eq!(entry, [1, distance(graph.symbol_address(function).unwrap()), 0, distance(description)]);
}

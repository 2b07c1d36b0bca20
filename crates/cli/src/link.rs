//! `farlink link`: linked bytes and where everything is, for other tools to check.

use crate::args::LinkArgs;
use crate::error::Error;
use crate::inputs::{self, Loaded};
use crate::signals::Signals;
use crate::start::ExitCode;
use farlink::addr::ExecutorAddr;
use farlink::graph::{LinkGraph, SectionKind, SymbolId, TableEntry};
use farlink::{ImageSegment, Session};
use serde_json::{Value, json};
use std::io::Write;
use std::path::Path;

pub(crate) fn link(args: &LinkArgs) -> Result<ExitCode, Error> {
    let signals = Signals::install()?;
    let loaded = inputs::load(&args.input, &signals)?;
    let base = ExecutorAddr::new(args.base);
    let (session, image) = Session::builder().image(base, args.undefined_zero)?;
    let library = session.create_library("image");
    // Nothing is running that could open a shared library: what it defines has to be given with --define.
    let loaded = loaded.into_iter().filter(|input| !matches!(input, Loaded::Shared { .. })).collect();
    inputs::add(&library, &args.input, loaded)?;
    library.link_all()?;
    let segments = image.segments();
    if let Some(path) = &args.image {
        write(path, &flatten(base, &segments))?;
    }
    if let Some(path) = &args.json {
        let objects: Vec<_> = library.linked_graphs().iter().map(describe).collect();
        let description = json!({ "base": hex(base), "objects": objects });
        write(path, format!("{description:#}\n").as_bytes())?;
    }
    Ok(ExitCode::SUCCESS)
}

fn write(path: &Path, bytes: &[u8]) -> Result<(), Error> {
    let written = if path == Path::new("-") { std::io::stdout().write_all(bytes) } else { std::fs::write(path, bytes) };
    written.map_err(|error| Error::Write { path: path.to_owned(), error })
}

/// Returns the bytes from `base` to the end of the last content.
fn flatten(base: ExecutorAddr, segments: &[ImageSegment]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for segment in segments.iter().filter(|segment| !segment.content.is_empty()) {
        let offset = segment.range.start().offset_from(base).expect("segments lie after the base") as usize;
        bytes.resize(bytes.len().max(offset), 0);
        bytes.truncate(offset);
        bytes.extend_from_slice(&segment.content);
    }
    bytes
}

fn hex(addr: ExecutorAddr) -> Value {
    Value::String(addr.to_string())
}

fn describe(graph: &LinkGraph) -> Value {
    let table = |entries: Vec<TableEntry>| -> Vec<Value> {
        let entry = |entry: TableEntry| json!({ "symbol": graph.symbol_name(entry.target), "addr": hex(entry.addr) });
        entries.into_iter().map(entry).collect()
    };
    let is_tls = |section| graph.section(section).kind == SectionKind::Tls;
    json!({
        "name": graph.name(),
        "sections": graph.sections().filter(|&section| !is_tls(section)).filter_map(|section| {
            let range = graph.section_range(section)?;
            let group = graph.section(section).group;
            Some(json!({
                "name": graph.section_name(section),
                "addr": hex(range.start()),
                "size": range.len(),
                "prot": group.prot.to_string(),
            }))
        }).collect::<Vec<_>>(),
        // Every thread has its own, so they have offsets and no addresses, and are not in the image.
        "thread_local": graph.sections().filter(|&section| is_tls(section)).filter_map(|section| {
            let range = graph.section_range(section)?;
            Some(json!({ "name": graph.section_name(section), "offset": range.start().as_u64(), "size": range.len() }))
        }).collect::<Vec<_>>(),
        "ifuncs": graph.ifuncs().iter().map(|ifunc| {
            json!({ "resolver": hex(ifunc.resolver), "slot": hex(ifunc.slot) })
        }).collect::<Vec<_>>(),
        "symbols": graph.symbol_ids().filter_map(|symbol| describe_symbol(graph, symbol)).collect::<Vec<_>>(),
        "got": table(graph.got_entries()),
        "stubs": table(graph.stubs()),
    })
}

fn describe_symbol(graph: &LinkGraph, symbol: SymbolId) -> Option<Value> {
    let info = graph.symbol(symbol);
    let name = Some(graph.symbol_name(symbol)).filter(|name| !name.is_empty())?;
    Some(json!({
        "name": name,
        "addr": hex(graph.symbol_address(symbol)?),
        "size": info.size,
        "defined": info.is_defined(),
        "linkage": format!("{:?}", info.linkage).to_lowercase(),
        "scope": format!("{:?}", info.scope).to_lowercase(),
    }))
}

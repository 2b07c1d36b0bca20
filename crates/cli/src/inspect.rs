//! `farlink inspect`: objects as the linker sees them.

use crate::args::InspectArgs;
use crate::error::Error;
use crate::start::ExitCode;
use farlink::elf::{Archive, InputKind, identify, parse_object};
use farlink::graph::{LinkGraph, Place, SymbolId};
use std::io::{self, Write};
use std::path::Path;

pub(crate) fn inspect(args: &InspectArgs) -> Result<ExitCode, Error> {
    let mut out = io::BufWriter::new(io::stdout().lock());
    for path in &args.inputs {
        let outcome = inspect_file(path, &mut out)?;
        // A reader that has seen enough (head, less) is no failure.
        match outcome.and_then(|()| out.flush()) {
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => return Ok(ExitCode::SUCCESS),
            Err(error) => return Err(Error::Write { path: "stdout".into(), error }),
            Ok(()) => {}
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// Prints an object, or every object of an archive. The outer error is about the input, the inner about the output.
fn inspect_file(path: &Path, out: &mut impl Write) -> Result<io::Result<()>, Error> {
    let bytes = std::fs::read(path).map_err(|error| Error::Read { path: path.to_owned(), error })?;
    let name = path.display().to_string();
    let error = |error: farlink::elf::ElfError| Error::Farlink(error.into());
    if !matches!(identify(&bytes), InputKind::Archive | InputKind::ThinArchive) {
        let graph = parse_object(&name, bytes.into()).map_err(error)?;
        return Ok(print(&graph, out));
    }
    let archive = Archive::parse(&name, bytes.into()).map_err(error)?;
    for member in archive.members() {
        let (name, bytes) = archive.member(member).map_err(error)?;
        let graph = parse_object(&name, bytes).map_err(error)?;
        if let Err(error) = print(&graph, out) {
            return Ok(Err(error));
        }
    }
    Ok(Ok(()))
}

fn print(graph: &LinkGraph, out: &mut impl Write) -> io::Result<()> {
    writeln!(out, "{}: {:?}", graph.name(), graph.arch())?;
    for section in graph.sections() {
        let info = graph.section(section);
        writeln!(out, "section {} {:?} {}", graph.section_name(section), info.kind, info.group)?;
        for block in graph.section_blocks(section) {
            let info = graph.block(block);
            let content = if info.is_zero_fill() { " zero fill" } else { "" };
            writeln!(out, "  block {} bytes, align {}{content}", info.size, info.align)?;
            for edge in graph.block_edges(block) {
                let target = label(graph, edge.target);
                writeln!(out, "    {:#06x} {} {target}{:+#x}", edge.offset, edge.kind, edge.addend)?;
            }
        }
    }
    for comdat in graph.comdats() {
        writeln!(out, "comdat {}", graph.comdat_signature(comdat))?;
    }
    // The first symbol of an ELF file stands for none.
    for symbol in graph.symbol_ids().skip(1) {
        let info = graph.symbol(symbol);
        let place = match info.place {
            Place::Defined { block, offset } => {
                format!("in {} + {offset:#x}", graph.section_name(graph.block(block).section))
            }
            Place::Absolute(value) => format!("absolute {value:#x}"),
            Place::External { weak: false } => "external".to_owned(),
            Place::External { weak: true } => "external, weak".to_owned(),
            Place::Discarded => "not linked".to_owned(),
        };
        let (linkage, scope) = (info.linkage, info.scope);
        writeln!(out, "symbol {}: {place}, {} bytes, {linkage:?}, {scope:?}", label(graph, symbol), info.size)?;
    }
    Ok(())
}

/// What a symbol is called: its name, or where it is if it has none.
fn label(graph: &LinkGraph, symbol: SymbolId) -> String {
    match (graph.symbol_name(symbol), graph.symbol(symbol).place) {
        ("", Place::Defined { block, offset }) => {
            format!("{}+{offset:#x}", graph.section_name(graph.block(block).section))
        }
        ("", _) => "(no name)".to_owned(),
        (name, _) => name.to_owned(),
    }
}

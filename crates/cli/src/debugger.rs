//! Waiting for a debugger.

use crate::error::Error;
use std::io;
use std::thread;
use std::time::Duration;

/// Says which process to debug (this one if none is named), and waits until a debugger has attached to it, or it has ended.
pub(crate) fn wait(process: Option<u32>) -> Result<(), Error> {
    let process = process.unwrap_or_else(std::process::id);
    eprintln!("farlink: waiting for a debugger: gdb -p {process}");
    while !has_tracer(process).map_err(Error::NoDebugger)? {
        thread::sleep(Duration::from_millis(50));
    }
    Ok(())
}

/// Whether a process is debugged; that it has ended is an answer too, which running the program will give.
fn has_tracer(process: u32) -> io::Result<bool> {
    let status = match std::fs::read_to_string(format!("/proc/{process}/status")) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(true),
        other => other?,
    };
    let tracer = status.lines().find_map(|line| line.strip_prefix("TracerPid:"));
    let tracer = tracer.ok_or_else(|| io::Error::other("/proc does not say whether a process is debugged"))?;
    Ok(tracer.trim() != "0")
}

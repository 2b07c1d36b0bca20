//! Completions of shells and manual pages, from the definition of the command line.

use crate::args::{Cli, CompletionsArgs, ManArgs};
use crate::error::Error;
use crate::start::ExitCode;
use clap::CommandFactory;
use clap_mangen::Man;
use std::io::{self, Write};
use std::path::Path;

/// Prints what a shell needs to complete the command.
pub(crate) fn completions(args: &CompletionsArgs) -> Result<ExitCode, Error> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), "farlink", &mut script);
    print(&script)
}

/// Prints the manual page of the command, or writes it and those of its subcommands into a folder.
pub(crate) fn man(args: &ManArgs) -> Result<ExitCode, Error> {
    let failed = |path: &Path, error| Error::Write { path: path.to_owned(), error };
    if let Some(folder) = &args.dir {
        std::fs::create_dir_all(folder).map_err(|error| failed(folder, error))?;
        clap_mangen::generate_to(Cli::command(), folder).map_err(|error| failed(folder, error))?;
        return Ok(ExitCode::SUCCESS);
    }
    let mut page = Vec::new();
    Man::new(Cli::command()).render(&mut page).map_err(|error| failed(Path::new("stdout"), error))?;
    print(&page)
}

/// Prints to standard output. A reader that has seen enough is no failure.
fn print(text: &[u8]) -> Result<ExitCode, Error> {
    let mut out = io::stdout().lock();
    match out.write_all(text).and_then(|()| out.flush()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(Error::Write { path: "stdout".into(), error }),
        _ => Ok(ExitCode::SUCCESS),
    }
}

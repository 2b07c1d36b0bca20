//! A calculator that survives what people type: each line is C, compiled and run in another process.
//!
//!     cargo run -p farlink --example calculator
//!
//! A line is an expression, whose value is printed, or a definition of a function. A line that crashes ends the other
//! process, not this one: the calculator says where it crashed, starts another process, and puts the functions that were
//! defined into that.

mod common;

use common::{Result, compile};
use farlink::{Error, Library, Session};
use std::io::{BufRead, Write, stdin, stdout};
use std::time::Duration;

/// What every line can use.
const PRELUDE: &str = "#include <math.h>\n#include <stdlib.h>\n#include <string.h>\n";

/// How long an expression may take.
const PATIENCE: Duration = Duration::from_secs(10);

struct Calculator {
    library: Library,
    /// Definitions: the declaration that later lines see, and the object.
    definitions: Vec<(String, Vec<u8>)>,
}

impl Calculator {
    fn new() -> Result<Self> {
        Ok(Self { library: start(&[])?, definitions: Vec::new() })
    }

    /// Returns the declarations of everything that has been defined.
    fn declarations(&self) -> String {
        self.definitions.iter().map(|(declaration, _)| format!("{declaration};\n")).collect()
    }

    /// Adds a function, as in `double square(double x) { return x * x; }`.
    fn define(&mut self, line: &str) -> Result<()> {
        let declaration = line.split('{').next().unwrap_or_default().trim().to_owned();
        let object = compile(&format!("{PRELUDE}{}{line}\n", self.declarations()), &["-O2"])?;
        self.library.add_object(&declaration, object.as_slice())?;
        self.definitions.push((declaration, object));
        Ok(())
    }

    /// Returns the value of an expression.
    fn evaluate(&self, line: &str) -> Result<f64> {
        let source = format!("{PRELUDE}{}double value(void) {{ return {line}; }}\n", self.declarations());
        let object = self.library.add_object("the line", compile(&source, &["-O1"])?)?;
        let value = self.library.function::<fn() -> f64>("value")?.with_timeout(PATIENCE);
        // SAFETY: it is compiled with this signature above. What else it does, it does in a process of its own.
        let result = unsafe { value.call(()) };
        if !matches!(result, Err(Error::ExecutorEnded(_) | Error::TimedOut { .. })) {
            self.library.remove(object)?;
        }
        Ok(result?)
    }

    /// Does what a line says, and gets over its consequences.
    fn take(&mut self, line: &str) -> Result<()> {
        let outcome =
            if line.contains('{') { self.define(line) } else { self.evaluate(line).map(|value| println!("{value}")) };
        let Err(error) = outcome else { return Ok(()) };
        println!("error: {error}");
        let is_lost = matches!(error.downcast_ref(), Some(Error::ExecutorEnded(_) | Error::TimedOut { .. }));
        if is_lost {
            let _ = self.library.session().kill();
            self.library = start(&self.definitions)?;
            println!("a new process has taken its place");
        }
        Ok(())
    }
}

/// Starts a process with these definitions.
fn start(definitions: &[(String, Vec<u8>)]) -> Result<Library> {
    let library = Session::spawn()?.create_library("calculator");
    library.add_shared_library("libm.so.6")?;
    for (declaration, object) in definitions {
        library.add_object(declaration, object.as_slice())?;
    }
    Ok(library)
}

fn main() -> Result<()> {
    farlink::executor::init();
    let mut calculator = Calculator::new()?;
    for line in stdin().lock().lines() {
        let line = line?;
        if !line.trim().is_empty() {
            calculator.take(line.trim())?;
        }
        stdout().flush()?;
    }
    Ok(())
}

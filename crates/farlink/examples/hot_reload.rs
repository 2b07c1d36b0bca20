//! A C plugin that is replaced while it runs, whenever its source changes.
//!
//!     cargo run -p farlink --example hot_reload -- examples/plugin.c
//!
//! The plugin has `long step(long value)`, and is called ten times a second. Change the source while this runs: the next
//! call goes to the new code, while the value stays. With a number as the second argument it ends after so many calls.

mod common;

use common::{Result, compile};
use farlink::{Library, Object, Session};
use std::fs;
use std::time::{Duration, SystemTime};

const PERIOD: Duration = Duration::from_millis(100);

struct Plugin<'a> {
    path: &'a str,
    library: Library,
    running: Option<Object>,
    changed: Option<SystemTime>,
}

impl Plugin<'_> {
    /// Links the source again if it has changed; gives whether it has.
    fn reload(&mut self) -> Result<bool> {
        let changed = fs::metadata(self.path)?.modified()?;
        if self.changed == Some(changed) {
            return Ok(false);
        }
        self.changed = Some(changed);
        let object = match compile(&fs::read_to_string(self.path)?, &["-O2"]) {
            Ok(object) => object,
            // Somebody is still typing; what runs goes on.
            Err(error) if self.running.is_some() => {
                println!("{}: {error}", self.path);
                return Ok(false);
            }
            Err(error) => return Err(error),
        };
        let version = self.library.add_object(self.path, object)?;
        self.library.redirect(version)?;
        if let Some(old) = self.running.replace(version) {
            self.library.retire(old)?;
        }
        Ok(true)
    }
}

fn main() -> Result<()> {
    farlink::executor::init();
    let args: Vec<String> = std::env::args().skip(1).collect();
    let path = args.first().ok_or("name a C source with `long step(long value)`: examples/plugin.c, for one")?;
    let calls = args.get(1).map_or(Ok(u64::MAX), |count| count.parse())?;

    let library = Session::spawn()?.create_library("plugin");
    library.define_redirectable("step")?;
    let step = library.function::<fn(i64) -> i64>("step")?;
    let mut plugin = Plugin { path, library, running: None, changed: None };
    let mut value = 0;
    for _ in 0..calls {
        if plugin.reload()? {
            println!("linked {path}");
        }
        // SAFETY: the plugin declares the function so.
        value = unsafe { step.call((value,)) }?;
        println!("{value}");
        std::thread::sleep(PERIOD);
    }
    Ok(())
}

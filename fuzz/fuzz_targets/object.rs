//! Any bytes as an object: parsed and linked, not run.

#![no_main]

use farlink::Session;
use farlink::addr::ExecutorAddr;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let base = ExecutorAddr::new(0x1000_0000);
    let Ok((session, _image)) = Session::builder().image(base, true) else { return };
    let library = session.create_library("fuzz");
    if library.add_object("fuzz.o", bytes).is_ok() {
        let _ = library.link_all();
    }
});

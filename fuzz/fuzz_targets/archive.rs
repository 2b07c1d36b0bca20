//! Any bytes as an archive: its index and every member, linked and not run.

#![no_main]

use farlink::Session;
use farlink::addr::ExecutorAddr;
use farlink::elf::Archive;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let Ok(archive) = Archive::parse("fuzz.a", bytes.into()) else { return };
    let base = ExecutorAddr::new(0x1000_0000);
    let Ok((session, _image)) = Session::builder().image(base, true) else { return };
    for (number, member) in archive.members().enumerate() {
        // A thin archive's members are files, which are not what is tested here.
        if bytes.starts_with(b"!<thin>") {
            return;
        }
        let Ok((name, bytes)) = archive.member(member) else { continue };
        let library = session.create_library(&number.to_string());
        if library.add_object(&name, bytes).is_ok() {
            let _ = library.link_all();
        }
    }
});

//! Any bytes as each message: decoding ends with a value or an error, and a value encodes to what decodes to itself.

#![no_main]

use farlink_wire::frame::Header;
use farlink_wire::msg::{
    ActionPair, FinalizeRequest, LookupName, MainCall, RunInitializers, SharedFinalizeRequest, SymbolDef,
};
use farlink_wire::setup::ExecutorInfo;
use farlink_wire::sps::{SpsError, from_bytes, to_bytes};
use libfuzzer_sys::fuzz_target;

macro_rules! round_trip {
    ($type:ty, $bytes:expr) => {
        if let Ok(value) = from_bytes::<$type>($bytes) {
            assert!(from_bytes::<$type>(&to_bytes(&value)).is_ok());
        }
    };
}

fuzz_target!(|bytes: &[u8]| {
    if let Some(header) = bytes.first_chunk() {
        let _ = Header::parse(header);
    }
    round_trip!(ExecutorInfo, bytes);
    round_trip!(FinalizeRequest<'_>, bytes);
    round_trip!(SharedFinalizeRequest, bytes);
    round_trip!(RunInitializers, bytes);
    round_trip!(MainCall, bytes);
    round_trip!(Vec<LookupName>, bytes);
    round_trip!(Result<Vec<Option<SymbolDef>>, String>, bytes);
    round_trip!(Vec<ActionPair>, bytes);
    round_trip!(SpsError, bytes);
});

//! Running finalize and dealloc actions.
//!
//! Finalize actions run in order. If one fails, the dealloc actions of the pairs before it run in reverse, not its
//! own. If all succeed, the dealloc actions are kept, and run in reverse when the memory is deallocated: every one,
//! also after one has failed. An action succeeds if it returns an SPS error that is none.

#![allow(unsafe_code)]

use crate::wrapper::call_wrapper;
use farlink_wire::msg::{ActionPair, WrapperFunctionCall};
use farlink_wire::sps::{SpsError, from_bytes};

/// Runs the finalize actions of `pairs`; gives the dealloc actions to keep.
///
/// On failure what ran has been undone, and the text says which action failed and what else did while undoing.
pub(crate) fn finalize(pairs: Vec<ActionPair>) -> Result<Vec<WrapperFunctionCall>, String> {
    let count = pairs.len();
    let mut dealloc = Vec::with_capacity(count);
    for (index, pair) in pairs.into_iter().enumerate() {
        if let Some(call) = &pair.finalize
            && let Err(text) = run(call)
        {
            let mut texts = vec![format!("finalize action {} of {count} failed: {text}", index + 1)];
            texts.extend(deallocate(dealloc).err());
            return Err(texts.join("\n"));
        }
        dealloc.extend(pair.dealloc);
    }
    Ok(dealloc)
}

/// Runs dealloc actions, last to first, all of them; the text joins what failed.
pub(crate) fn deallocate(calls: Vec<WrapperFunctionCall>) -> Result<(), String> {
    let count = calls.len();
    let failed: Vec<String> = calls
        .iter()
        .enumerate()
        .rev()
        .filter_map(|(index, call)| {
            run(call).err().map(|text| format!("dealloc action {} of {count} failed: {text}", index + 1))
        })
        .collect();
    if failed.is_empty() { Ok(()) } else { Err(failed.join("\n")) }
}

fn run(call: &WrapperFunctionCall) -> Result<(), String> {
    // SAFETY: the controller names the functions that act on memory it has allocated here; this process trusts its
    // controller with its own memory, and calls only what the controller could call directly.
    let result = unsafe { call_wrapper(call.function, &call.args.0) }?;
    let decoded = from_bytes::<SpsError>(&result);
    decoded.map_err(|error| format!("its result cannot be decoded: {error}"))?.0
}

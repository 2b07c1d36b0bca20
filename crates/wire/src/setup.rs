//! The Setup message: what an executor says of itself before anything else.

use crate::sps::{Encode, sps_struct, to_bytes};
use farlink_addr::ExecutorAddr;

/// Payload of a Setup message (LLVM: `SimpleRemoteEPCExecutorInfo`). Entries keep the order they were sent in.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct ExecutorInfo {
    /// The executor's target triple, for example `x86_64-unknown-linux-gnu`.
    pub triple: String,
    /// The executor's page size in bytes, as claimed.
    pub page_size: u64,
    /// Values by key. farlink's additions to the protocol are announced here, under keys that begin `farlink.`.
    pub bootstrap_map: Vec<(String, Vec<u8>)>,
    /// Addresses by name: the functions and objects a controller may name before anything is looked up.
    pub bootstrap_symbols: Vec<(String, ExecutorAddr)>,
}

sps_struct!(ExecutorInfo {
    triple: String,
    page_size: u64,
    bootstrap_map: Vec<(String, Vec<u8>)>,
    bootstrap_symbols: Vec<(String, ExecutorAddr)>,
});

impl ExecutorInfo {
    /// Returns the bootstrap symbol `name`.
    #[must_use]
    pub fn symbol(&self, name: &str) -> Option<ExecutorAddr> {
        self.bootstrap_symbols.iter().find(|(known, _)| known == name).map(|&(_, addr)| addr)
    }

    /// Returns the value of `key` in the bootstrap map.
    #[must_use]
    pub fn value(&self, key: &str) -> Option<&[u8]> {
        self.bootstrap_map.iter().find(|(known, _)| known == key).map(|(_, value)| value.as_slice())
    }

    /// Adds `value` to the bootstrap map.
    pub fn set_value(&mut self, key: &str, value: &impl Encode) {
        self.bootstrap_map.push((key.to_owned(), to_bytes(value)));
    }
}

//! POSIX shared memory objects that an executor makes.

use super::bad_answer;
use super::view::View;
use crate::Error;
use crate::sys::{Place, SharedObject};
use farlink_wire::msg::Stripe;
use std::sync::Arc;

/// Longest name of a shared memory object in bytes: what a file system takes.
const MAX_NAME_BYTES: usize = 255;

/// Removes the names that an executor may have left if it died between creating an object and telling us.
pub(super) fn unlink_orphans(pid: Option<u64>, asked: u64) {
    if let Some(pid) = pid {
        for number in 1..=asked {
            SharedObject::unlink(&format!("/farlink_{pid}_{number}"));
        }
    }
}

/// Opens the shared memory object that an executor has made, and removes its name.
pub(super) fn take(name: &str) -> Result<SharedObject, Error> {
    let is_plain = name.starts_with('/') && !name[1..].contains('/') && !name.contains('\0') && name.len() > 1;
    if !is_plain || name.len() > MAX_NAME_BYTES || matches!(name, "/." | "/..") {
        return Err(bad_answer("reserve", format!("{name:?} is not the name of a shared memory object")));
    }
    SharedObject::take(name)
}

/// Maps a shared memory object that an executor has made.
pub(super) fn attach(object: SharedObject, name: &str, bytes: u64, stripes: Vec<Stripe>) -> Result<View, Error> {
    let size = object.len().map_err(|error| Error::shared(name, "examined", error))?;
    if size < bytes {
        return Err(bad_answer("reserve", format!("the object {name} has {size} bytes instead of {bytes}")));
    }
    let mapping = object.map(bytes as usize, Place::Anywhere).map_err(|error| Error::shared(name, "mapped", error))?;
    Ok(View::new(Some(object), Arc::new(mapping), None, stripes))
}

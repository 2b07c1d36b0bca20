//! stub
/// stub
pub struct Endpoint;
/// stub
pub trait Handler {}
/// stub
pub struct Limits;
/// stub
pub fn accept() {}
/// stub
pub fn connect() {}

//! stub
/// stub
pub struct Transport;

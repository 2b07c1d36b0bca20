//! Calls of linked functions with values whose types are known when the program runs.

use crate::error::{attempt, described, elements, reference};
use crate::session::{FarlinkSession, timeout};
use farlink::addr::ExecutorAddr;
use farlink_wire::native::{Arguments, RegisterClass, ResultShape};

/// The type of a value that C functions take and give.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub enum FarlinkType {
    /// No value: the result of a function that returns none.
    Void = 0,
    /// An integer of any length, a bool or a pointer: in `number.integer`, extended to 64 bits. Of a result, the bits beyond
    /// its length mean nothing.
    Integer = 1,
    /// A double, in `number.real`.
    Double = 2,
    /// A float, in `number.single`.
    Float = 3,
}

/// A number.
#[derive(Clone, Copy)]
#[repr(C)]
pub union FarlinkNumber {
    /// Of the type INTEGER.
    pub integer: u64,
    /// Of the type DOUBLE.
    pub real: f64,
    /// Of the type FLOAT.
    pub single: f32,
}

/// A value that C functions take and give.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct FarlinkValue {
    /// Its type: one of farlink_type.
    pub kind: u32,
    /// The number, in the field of that type.
    pub number: FarlinkNumber,
}

impl FarlinkValue {
    fn kind(&self) -> Result<FarlinkType, String> {
        let kinds = [FarlinkType::Void, FarlinkType::Integer, FarlinkType::Double, FarlinkType::Float];
        let kind = kinds.into_iter().find(|&kind| kind as u32 == self.kind);
        kind.ok_or_else(|| format!("a value has no type of the number {}", self.kind))
    }
}

/// Calls the function at an address of the executor's, with `count` arguments. The type of its result is in `result` before,
/// and its value afterwards; NULL is for none. In another process it is waited for at most `timeout_ms` milliseconds, unless
/// that is 0; after that the call goes on there.
///
/// # Safety
///
/// `session` must be NULL or a session that has not been freed, `arguments` NULL or `count` values, `result` NULL or a value.
/// The function must be one that may be called with such arguments and has such a result.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn farlink_call(
    session: *const FarlinkSession,
    function: u64,
    arguments: *const FarlinkValue,
    count: usize,
    result: *mut FarlinkValue,
    timeout_ms: u64,
) -> bool {
    let call = || {
        // SAFETY: as for this function (caller).
        let session = unsafe { reference(session, "the session") }?;
        // SAFETY: as for this function (caller).
        let values = unsafe { elements(arguments, count, "the arguments") }?;
        let mut arguments = Arguments::default();
        for value in values {
            push(&mut arguments, value)?;
        }
        // SAFETY: as for this function (caller).
        let mut result = unsafe { result.as_mut() };
        let kind = result.as_ref().map_or(Ok(FarlinkType::Void), |result| result.kind())?;
        let shape = match kind {
            FarlinkType::Void => ResultShape::Void,
            FarlinkType::Integer => ResultShape::Registers(RegisterClass::Int, None),
            FarlinkType::Double | FarlinkType::Float => ResultShape::Registers(RegisterClass::Float, None),
        };
        let function = ExecutorAddr::new(function);
        // SAFETY: the function may be called so (caller).
        let returned = unsafe { session.0.call_words(function, arguments, shape, timeout(timeout_ms)) };
        let [word, _] = returned.map_err(described)?.words();
        if let (Some(result), true) = (&mut result, kind != FarlinkType::Void) {
            result.number = FarlinkNumber { integer: word };
        }
        Ok(())
    };
    attempt(call).is_some()
}

/// Adds a value to the arguments of a call.
fn push(arguments: &mut Arguments, value: &FarlinkValue) -> Result<(), String> {
    let class = match value.kind()? {
        FarlinkType::Void => return Err("an argument has the type VOID".to_owned()),
        FarlinkType::Integer => RegisterClass::Int,
        FarlinkType::Double | FarlinkType::Float => RegisterClass::Float,
    };
    let word = if value.kind()? == FarlinkType::Float {
        // SAFETY: every bit pattern is a value of the field.
        u64::from(unsafe { value.number.single }.to_bits())
    } else {
        // SAFETY: every bit pattern is a value of the field.
        unsafe { value.number.integer }
    };
    arguments.push([word, 0], class, None);
    Ok(())
}

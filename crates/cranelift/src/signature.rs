//! Signatures of Cranelift's beside those that functions are called with.

use cranelift_codegen::ir::{self, ArgumentPurpose, types};
use cranelift_codegen::isa::CallConv;
use farlink::Signature;
use farlink_wire::native::{ArgumentShape, Arguments, RegisterClass, ResultShape};

/// Returns whether a function that Cranelift knows by `signature` can be called as `S`, as far as registers tell. Where they
/// do not (vectors, structures in memory), nothing is said against it.
pub(crate) fn can_be_called_as<S: Signature>(signature: &ir::Signature) -> bool {
    shapes(signature).is_none_or(|shapes| shapes == S::SHAPES)
}

/// Returns where the arguments and the result are of a function with plain values and one result at most.
fn shapes(signature: &ir::Signature) -> Option<(ArgumentShape, ResultShape)> {
    let is_c = matches!(signature.call_conv, CallConv::SystemV | CallConv::Fast);
    let is_plain = |param: &&ir::AbiParam| param.purpose == ArgumentPurpose::Normal;
    if !is_c || !signature.params.iter().all(|param| is_plain(&param)) {
        return None;
    }
    let mut arguments = Arguments::default();
    for param in &signature.params {
        arguments.push([0; 2], class(param.value_type)?, None);
    }
    let result = match &signature.returns[..] {
        [] => ResultShape::Void,
        [only] if is_plain(&only) => ResultShape::Registers(class(only.value_type)?, None),
        _ => return None,
    };
    Some((arguments.shape(), result))
}

fn class(value: ir::Type) -> Option<RegisterClass> {
    match value {
        types::I8 | types::I16 | types::I32 | types::I64 => Some(RegisterClass::Int),
        types::F32 | types::F64 => Some(RegisterClass::Float),
        _ => None,
    }
}

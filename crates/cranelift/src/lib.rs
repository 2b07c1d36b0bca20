//! A [`cranelift_module::Module`] whose functions and data are linked into an executor of farlink's: another process, or
//! this one.
//!
//! Where a program has a `JITModule` of cranelift-jit's, it makes a [`FarlinkModule`] instead; what it declares, defines and
//! finalizes stays as it is, and finished functions are called as [`farlink::Function`]s.
//!
//! ```
//! use cranelift_codegen::ir::{AbiParam, InstBuilder, types};
//! use cranelift_frontend::{FunctionBuilder, FunctionBuilderContext};
//! use cranelift_module::{Linkage, Module, default_libcall_names};
//! use farlink_cranelift::{FarlinkBuilder, FarlinkModule};
//!
//! let session = farlink::Session::in_process()?; // or spawn(), in another process
//! let mut module = FarlinkModule::new(FarlinkBuilder::new(&session, default_libcall_names())?);
//!
//! let mut context = module.make_context();
//! context.func.signature.params.push(AbiParam::new(types::I32));
//! context.func.signature.returns.push(AbiParam::new(types::I32));
//! let double = module.declare_function("double", Linkage::Export, &context.func.signature)?;
//! let mut builder_context = FunctionBuilderContext::new();
//! let mut builder = FunctionBuilder::new(&mut context.func, &mut builder_context);
//! let block = builder.create_block();
//! builder.append_block_params_for_function_params(block);
//! builder.switch_to_block(block);
//! let number = builder.block_params(block)[0];
//! let sum = builder.ins().iadd(number, number);
//! builder.ins().return_(&[sum]);
//! builder.seal_all_blocks();
//! builder.finalize(module.target_config());
//! module.define_function(double, &mut context)?;
//! module.finalize_definitions()?;
//!
//! let double = module.function::<fn(i32) -> i32>(double)?;
//! // SAFETY: the function has this signature.
//! assert_eq!(unsafe { double.call((21,)) }?, 42);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! Unlike there, every function and data object can be removed alone and defined anew, an undefined symbol is an error and
//! no panic, thread-local data works (with the setting `tls_model=elf_gd`), and unwind information is registered, so
//! backtraces and exceptions go through compiled functions.

#![forbid(unsafe_code)]
#![allow(clippy::result_large_err, reason = "the error is Cranelift's")]

/// The guide's chapter, whose program is compiled.
#[cfg(doctest)]
#[doc = include_str!("../../../docs/guide/cranelift.md")]
pub struct Guide;

mod builder;
mod graph;
mod module;
mod signature;
mod unwind;

pub use builder::FarlinkBuilder;
pub use module::FarlinkModule;

pub use cranelift_module;
pub use farlink;

//! What a module is made of.

use cranelift_codegen::ir::LibCall;
use cranelift_codegen::isa::OwnedTargetIsa;
use cranelift_codegen::settings::{self, Configurable};
use cranelift_module::{ModuleError, ModuleResult};
use farlink::addr::ExecutorAddr;
use farlink::{Library, Session};

/// Returns the name of the function behind a [`LibCall`].
pub(crate) type LibcallNames = Box<dyn Fn(LibCall) -> String + Send + Sync>;

/// Makes a [`FarlinkModule`](crate::FarlinkModule).
pub struct FarlinkBuilder {
    pub(crate) isa: OwnedTargetIsa,
    pub(crate) libcall_names: LibcallNames,
    pub(crate) library: Library,
    pub(crate) hotswap: bool,
}

impl FarlinkBuilder {
    /// Begins a module in `session`, for this machine's processor.
    ///
    /// `libcall_names` names the functions that compiled code calls for operations that have no instruction:
    /// [`cranelift_module::default_libcall_names`] are those of the C library.
    ///
    /// # Errors
    ///
    /// Fails if Cranelift does not know the processor.
    pub fn new(session: &Session, libcall_names: LibcallNames) -> ModuleResult<Self> {
        Self::with_flags(session, &[], libcall_names)
    }

    /// As [`Self::new`], with settings of Cranelift's.
    ///
    /// # Errors
    ///
    /// As [`Self::new`]; also fails if a setting is not one.
    pub fn with_flags(session: &Session, flags: &[(&str, &str)], libcall_names: LibcallNames) -> ModuleResult<Self> {
        let mut builder = settings::builder();
        // Code reaches what is linked by distances, and what is far away through a table. Libraries may be far away. A
        // function for probing the stack is what nobody has.
        let defaults = [("is_pic", "true"), ("use_colocated_libcalls", "false"), ("probestack_strategy", "inline")];
        for (name, value) in defaults.iter().chain(flags) {
            builder.set(name, value)?;
        }
        let isa = cranelift_native::builder().map_err(|text| ModuleError::Backend(anyhow::anyhow!(text)))?;
        let isa = isa.finish(settings::Flags::new(builder))?;
        Ok(Self::with_isa(session, isa, libcall_names))
    }

    /// As [`Self::new`], for an `isa` of the caller's making: x86-64, position-independent or not.
    #[must_use]
    pub fn with_isa(session: &Session, isa: OwnedTargetIsa, libcall_names: LibcallNames) -> Self {
        Self { isa, libcall_names, library: session.create_library("cranelift"), hotswap: false }
    }

    /// Has functions with names be replaceable while others call them: all calls of them go through a jump, and
    /// [`FarlinkModule::prepare_for_function_redefine`](crate::FarlinkModule::prepare_for_function_redefine) lets one be
    /// defined anew.
    #[must_use]
    pub fn hotswap(mut self, hotswap: bool) -> Self {
        self.hotswap = hotswap;
        self
    }

    /// Returns the library that the module's definitions go to. What it is given before they are finalized, they can refer
    /// to: objects, archives, shared libraries, closures of the controller's.
    #[must_use]
    pub fn library(&self) -> &Library {
        &self.library
    }

    /// Defines a symbol that the module imports as an address in the executor. What nobody defines is looked for in its
    /// process.
    ///
    /// # Errors
    ///
    /// Fails if the symbol is defined already.
    pub fn symbol(&mut self, name: &str, addr: ExecutorAddr) -> ModuleResult<&mut Self> {
        self.library.define(name, addr).map_err(crate::module::backend)?;
        Ok(self)
    }
}

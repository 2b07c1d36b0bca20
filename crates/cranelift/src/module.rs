//! The module: declarations, definitions that wait to be finalized, and what has been linked.

use crate::builder::{FarlinkBuilder, LibcallNames};
use crate::graph::{Definition, Init, Kind, Reference, Target, graph};
use crate::signature::can_be_called_as;
use crate::unwind::{EhFrameSection, eh_frame};
use cranelift_codegen::binemit::Reloc;
use cranelift_codegen::entity::SecondaryMap;
use cranelift_codegen::isa::{OwnedTargetIsa, TargetIsa};
use cranelift_codegen::{Context, ir};
use cranelift_control::ControlPlane;
use cranelift_module::{
    DataDescription, DataId, FuncId, FuncOrDataId, Linkage, Module, ModuleDeclarations, ModuleError, ModuleReloc,
    ModuleRelocTarget, ModuleResult,
};
use farlink::addr::ExecutorAddr;
use farlink::{Function, Library, Object, Redirect, Signature};

/// Alignment of writable data that does not say which.
const WRITABLE_DATA_ALIGN: u64 = 8;

/// Alignment of read-only data that does not say which.
const READ_ONLY_DATA_ALIGN: u64 = 1;

/// An error of farlink's, as one of the module's.
pub(crate) fn backend(error: farlink::Error) -> ModuleError {
    ModuleError::Backend(error.into())
}

/// A function or data object that has been defined.
#[derive(Clone, Copy)]
struct Defined {
    object: Object,
    bytes: u64,
    /// Its address, once it has been finalized and if it has one: what is thread-local has none.
    addr: Option<ExecutorAddr>,
}

/// Functions and data that are linked into an executor. See the crate.
///
/// When it is dropped, everything that it has linked goes, unless a [`Function`] of it is left.
pub struct FarlinkModule {
    isa: OwnedTargetIsa,
    libcall_names: LibcallNames,
    library: Library,
    declarations: ModuleDeclarations,
    functions: SecondaryMap<FuncId, Option<Defined>>,
    data: SecondaryMap<DataId, Option<Defined>>,
    /// What has been defined since definitions were finalized.
    pending: Vec<FuncOrDataId>,
    mathematics: Mathematics,
    hotswap: bool,
    /// The stubs of functions that can be replaced.
    redirects: SecondaryMap<FuncId, Option<Redirect>>,
    /// What is to go when what takes its place has been linked.
    replaced: Vec<(FuncId, Object)>,
}

/// The C library's part with mathematical functions, which is a shared library of its own.
const MATHEMATICS: &str = "libm.so.6";

/// Whether the module has that library.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Mathematics {
    NotNeeded,
    Needed,
    Added,
}

impl FarlinkModule {
    /// Makes a module.
    #[must_use]
    pub fn new(builder: FarlinkBuilder) -> Self {
        let FarlinkBuilder { isa, libcall_names, library, hotswap } = builder;
        Self {
            isa,
            libcall_names,
            library,
            declarations: ModuleDeclarations::default(),
            functions: SecondaryMap::new(),
            data: SecondaryMap::new(),
            pending: Vec::new(),
            mathematics: Mathematics::NotNeeded,
            hotswap,
            redirects: SecondaryMap::new(),
            replaced: Vec::new(),
        }
    }

    /// Returns the library that the module's definitions are in.
    #[must_use]
    pub fn library(&self) -> &Library {
        &self.library
    }

    /// Links everything that has been defined since this was called last, and runs its initializers. What it refers to has to
    /// be defined by now.
    ///
    /// # Errors
    ///
    /// Fails if a symbol is defined nowhere, or the executor fails. Nothing is lost: this can be called again when what was
    /// missing is there.
    pub fn finalize_definitions(&mut self) -> ModuleResult<()> {
        let names: Vec<String> = self.pending.iter().map(|&id| self.linkage_name(id)).collect();
        if self.mathematics == Mathematics::Needed {
            self.library.add_shared_library(MATHEMATICS).map_err(backend)?;
            self.mathematics = Mathematics::Added;
        }
        self.library.link_all().map_err(backend)?;
        self.lead_to_new_functions()?;
        let (with_address, names): (Vec<_>, Vec<_>) =
            self.pending.iter().copied().zip(&names).filter(|&(id, _)| !self.is_thread_local(id)).unzip();
        let names: Vec<&str> = names.into_iter().map(String::as_str).collect();
        let addresses = self.library.lookup_all(&names).map_err(backend)?;
        for (id, addr) in with_address.into_iter().zip(addresses) {
            if let Some(defined) = self.defined(id) {
                defined.addr = Some(addr);
            }
        }
        self.pending.clear();
        Ok(())
    }

    /// Has calls reach the functions that have just been linked, and what they replace removed.
    fn lead_to_new_functions(&mut self) -> ModuleResult<()> {
        for &id in &self.pending {
            let FuncOrDataId::Func(id) = id else { continue };
            if let (Some(_), Some(defined)) = (&self.redirects[id], self.functions[id]) {
                self.library.redirect(defined.object).map_err(backend)?;
            }
        }
        let (done, waiting): (Vec<_>, _) =
            std::mem::take(&mut self.replaced).into_iter().partition(|&(id, _)| self.functions[id].is_some());
        self.replaced = waiting;
        done.into_iter().try_for_each(|(_, object)| self.library.retire(object)).map_err(backend)
    }

    /// Lets a function be defined anew while others call it: they reach the old one until the new one has been finalized, and
    /// the new one from then on. The old one's memory comes back when no call of a [`Function`] is running that began before.
    ///
    /// # Errors
    ///
    /// Fails if the function is not defined or anonymous, or the module was made without [`FarlinkBuilder::hotswap`].
    pub fn prepare_for_function_redefine(&mut self, id: FuncId) -> ModuleResult<()> {
        let name = self.linkage_name(FuncOrDataId::Func(id));
        if self.redirects[id].is_none() {
            let text = "cannot be replaced: it has no name, no definition, or FarlinkBuilder::hotswap has not been set";
            return Err(ModuleError::Backend(anyhow::anyhow!("{name} {text}")));
        }
        let defined = self.functions[id].take().ok_or(ModuleError::Undeclared(name))?;
        self.pending.retain(|&other| other != FuncOrDataId::Func(id));
        self.replaced.push((id, defined.object));
        Ok(())
    }

    /// Returns a function that has been finalized, to be called.
    ///
    /// # Errors
    ///
    /// Fails if the function has not been finalized, or was declared with another signature, as far as that can be told, or
    /// if the executor does not call functions of any signature.
    pub fn function<S: Signature>(&self, id: FuncId) -> ModuleResult<Function<S>> {
        let declaration = self.declarations.get_function_decl(id);
        let name = declaration.linkage_name(id);
        if !can_be_called_as::<S>(&declaration.signature) {
            let (declared, asked) = (&declaration.signature, std::any::type_name::<S>());
            return Err(ModuleError::Backend(anyhow::anyhow!("{name} has the signature {declared}, not {asked}")));
        }
        if self.get_finalized_function(id).is_none() {
            return Err(ModuleError::Backend(anyhow::anyhow!("{name} has not been finalized")));
        }
        self.library.function(&name).map_err(backend)
    }

    /// Returns the address in the executor of a function that has been finalized.
    #[must_use]
    pub fn get_finalized_function(&self, id: FuncId) -> Option<ExecutorAddr> {
        self.functions[id]?.addr
    }

    /// Returns the address in the executor of a data object that has been finalized, and its size in bytes.
    #[must_use]
    pub fn get_finalized_data(&self, id: DataId) -> Option<(ExecutorAddr, u64)> {
        let defined = self.data[id]?;
        Some((defined.addr?, defined.bytes))
    }

    /// Removes a function: its memory comes back, and it can be defined anew.
    ///
    /// # Errors
    ///
    /// Fails if it is not defined, or if others that have been finalized refer to it.
    pub fn remove_function(&mut self, id: FuncId) -> ModuleResult<()> {
        self.remove(FuncOrDataId::Func(id))
    }

    /// Removes a data object, as [`Self::remove_function`] removes a function.
    ///
    /// # Errors
    ///
    /// As [`Self::remove_function`].
    pub fn remove_data(&mut self, id: DataId) -> ModuleResult<()> {
        self.remove(FuncOrDataId::Data(id))
    }

    fn remove(&mut self, id: FuncOrDataId) -> ModuleResult<()> {
        let defined = self.slot(id).ok_or_else(|| ModuleError::Undeclared(self.linkage_name(id)))?;
        if let FuncOrDataId::Func(id) = id
            && let Some(redirect) = &self.redirects[id]
        {
            redirect.clear().map_err(backend)?;
        }
        self.library.remove(defined.object).map_err(backend)?;
        match id {
            FuncOrDataId::Func(id) => self.functions[id] = None,
            FuncOrDataId::Data(id) => self.data[id] = None,
        }
        self.pending.retain(|&other| other != id);
        Ok(())
    }

    fn slot(&self, id: FuncOrDataId) -> Option<Defined> {
        match id {
            FuncOrDataId::Func(id) => self.functions[id],
            FuncOrDataId::Data(id) => self.data[id],
        }
    }

    fn defined(&mut self, id: FuncOrDataId) -> Option<&mut Defined> {
        match id {
            FuncOrDataId::Func(id) => self.functions[id].as_mut(),
            FuncOrDataId::Data(id) => self.data[id].as_mut(),
        }
    }

    fn linkage_name(&self, id: FuncOrDataId) -> String {
        match id {
            FuncOrDataId::Func(id) => self.declarations.get_function_decl(id).linkage_name(id).into_owned(),
            FuncOrDataId::Data(id) => self.declarations.get_data_decl(id).linkage_name(id).into_owned(),
        }
    }

    fn is_thread_local(&self, id: FuncOrDataId) -> bool {
        matches!(id, FuncOrDataId::Data(id) if self.declarations.get_data_decl(id).tls)
    }

    /// Returns what a relocation refers to, and what is added to its addend.
    fn target(&self, target: &ModuleRelocTarget) -> anyhow::Result<(Target, i64)> {
        let global = |name| Target { name, weak: false, is_thread_local: false };
        match target {
            ModuleRelocTarget::User { .. } if ModuleDeclarations::is_function(target) => {
                let id = FuncId::from_name(target);
                let declaration = self.declarations.get_function_decl(id);
                let weak = declaration.linkage == Linkage::Preemptible;
                Ok((Target { weak, ..global(declaration.linkage_name(id).into_owned()) }, 0))
            }
            ModuleRelocTarget::User { .. } => {
                let id = DataId::from_name(target);
                let declaration = self.declarations.get_data_decl(id);
                let weak = declaration.linkage == Linkage::Preemptible;
                let name = declaration.linkage_name(id).into_owned();
                Ok((Target { name, weak, is_thread_local: declaration.tls }, 0))
            }
            ModuleRelocTarget::LibCall(libcall) => Ok((global((self.libcall_names)(*libcall)), 0)),
            ModuleRelocTarget::FunctionOffset(id, offset) => {
                let name = self.declarations.get_function_decl(*id).linkage_name(*id);
                Ok((global(name.into_owned()), i64::from(*offset)))
            }
            ModuleRelocTarget::KnownSymbol(symbol) => anyhow::bail!("{symbol} is not known to ELF for x86-64"),
        }
    }

    fn reference(&self, relocation: &ModuleReloc) -> anyhow::Result<Reference> {
        let (target, more) = self.target(&relocation.name)?;
        let addend = relocation.addend.checked_add(more).ok_or_else(|| anyhow::anyhow!("an addend is too large"))?;
        Ok(Reference { offset: u64::from(relocation.offset), kind: relocation.kind, target, addend })
    }

    /// Declares a definition in the library.
    fn define(&mut self, id: FuncOrDataId, linkage: Linkage, new: New<'_>) -> ModuleResult<()> {
        let name = self.linkage_name(id);
        if !linkage.is_definable() {
            return Err(ModuleError::InvalidImportDefinition(name));
        }
        if self.slot(id).is_some() {
            return Err(ModuleError::DuplicateDefinition(name));
        }
        let New { kind, section, content, align, relocations, eh_frame } = new;
        if self.mathematics == Mathematics::NotNeeded && relocations.iter().any(is_mathematical) {
            self.mathematics = Mathematics::Needed;
        }
        let references = relocations.iter().map(|relocation| self.reference(relocation)).collect::<Result<_, _>>();
        let references = references.map_err(ModuleError::Backend)?;
        let definition = Definition { name: &name, linkage, kind, section, content, align, references, eh_frame };
        let object = graph(definition).map_err(ModuleError::Backend)?;
        if let FuncOrDataId::Func(id) = id
            && self.hotswap
            && self.redirects[id].is_none()
            && self.declarations.get_function_decl(id).name.is_some()
        {
            self.redirects[id] = Some(self.library.define_redirectable(&name).map_err(backend)?);
        }
        let object = self.library.add_graph(object).map_err(backend)?;
        let bytes = match content {
            Init::Bytes(bytes) => bytes.len(),
            Init::Zeros(bytes) => bytes,
        };
        let defined = Some(Defined { object, bytes: bytes as u64, addr: None });
        match id {
            FuncOrDataId::Func(id) => self.functions[id] = defined,
            FuncOrDataId::Data(id) => self.data[id] = defined,
        }
        self.pending.push(id);
        Ok(())
    }

    fn function_align(&self, align: u64) -> u64 {
        align.max(u64::from(self.isa.function_alignment().minimum)).max(self.isa.symbol_alignment())
    }
}

/// Returns whether a relocation refers to an operation on floating-point numbers that is a function.
fn is_mathematical(relocation: &ModuleReloc) -> bool {
    use ir::LibCall::{
        CeilF32, CeilF64, FloorF32, FloorF64, FmaF32, FmaF64, NearestF32, NearestF64, TruncF32, TruncF64,
    };
    let ModuleRelocTarget::LibCall(libcall) = relocation.name else { return false };
    matches!(
        libcall,
        CeilF32 | CeilF64 | FloorF32 | FloorF64 | FmaF32 | FmaF64 | NearestF32 | NearestF64 | TruncF32 | TruncF64
    )
}

/// A definition, with relocations as Cranelift has them.
struct New<'a> {
    kind: Kind,
    section: Option<&'a str>,
    content: Init<'a>,
    align: u64,
    relocations: &'a [ModuleReloc],
    eh_frame: Option<EhFrameSection>,
}

impl Module for FarlinkModule {
    fn isa(&self) -> &dyn TargetIsa {
        &*self.isa
    }

    fn declarations(&self) -> &ModuleDeclarations {
        &self.declarations
    }

    fn declare_function(&mut self, name: &str, linkage: Linkage, signature: &ir::Signature) -> ModuleResult<FuncId> {
        Ok(self.declarations.declare_function(name, linkage, signature)?.0)
    }

    fn declare_anonymous_function(&mut self, signature: &ir::Signature) -> ModuleResult<FuncId> {
        self.declarations.declare_anonymous_function(signature)
    }

    fn declare_data(&mut self, name: &str, linkage: Linkage, writable: bool, tls: bool) -> ModuleResult<DataId> {
        Ok(self.declarations.declare_data(name, linkage, writable, tls)?.0)
    }

    fn declare_anonymous_data(&mut self, writable: bool, tls: bool) -> ModuleResult<DataId> {
        self.declarations.declare_anonymous_data(writable, tls)
    }

    fn define_function_with_control_plane(
        &mut self,
        id: FuncId,
        context: &mut Context,
        control_plane: &mut ControlPlane,
    ) -> ModuleResult<()> {
        context.compile(&*self.isa, control_plane)?;
        let code = context.compiled_code().expect("it has just been compiled");
        let unwind = code.create_unwind_info(&*self.isa).map_err(ModuleError::Compilation)?;
        let eh_frame = unwind.map(|info| eh_frame(&*self.isa, &info)).transpose().map_err(ModuleError::Backend)?;
        let relocations = code.buffer.relocs().iter();
        let relocations: Vec<_> =
            relocations.map(|relocation| ModuleReloc::from_mach_reloc(relocation, &context.func, id)).collect();
        let linkage = self.declarations.get_function_decl(id).linkage;
        self.define(
            FuncOrDataId::Func(id),
            linkage,
            New {
                kind: Kind::Function,
                section: None,
                content: Init::Bytes(code.code_buffer()),
                align: self.function_align(u64::from(code.buffer.alignment)),
                relocations: &relocations,
                eh_frame: eh_frame.flatten(),
            },
        )
    }

    fn define_function_bytes(
        &mut self,
        id: FuncId,
        align: u64,
        bytes: &[u8],
        relocations: &[ModuleReloc],
    ) -> ModuleResult<()> {
        let linkage = self.declarations.get_function_decl(id).linkage;
        let (content, align) = (Init::Bytes(bytes), self.function_align(align));
        let new = New { kind: Kind::Function, section: None, content, align, relocations, eh_frame: None };
        self.define(FuncOrDataId::Func(id), linkage, new)
    }

    fn define_data(&mut self, id: DataId, data: &DataDescription) -> ModuleResult<()> {
        let declaration = self.declarations.get_data_decl(id);
        let (kind, align) = match (declaration.tls, declaration.writable) {
            (true, _) => (Kind::ThreadLocalData, WRITABLE_DATA_ALIGN),
            (false, true) => (Kind::WritableData, WRITABLE_DATA_ALIGN),
            (false, false) => (Kind::ReadOnlyData, READ_ONLY_DATA_ALIGN),
        };
        let content = match &data.init {
            cranelift_module::Init::Uninitialized => {
                let name = declaration.linkage_name(id);
                return Err(ModuleError::Backend(anyhow::anyhow!("the content of {name} has not been given")));
            }
            // A byte, so that every object has an address of its own.
            cranelift_module::Init::Zeros { size } => Init::Zeros((*size).max(1)),
            cranelift_module::Init::Bytes { contents } if contents.is_empty() => Init::Zeros(1),
            cranelift_module::Init::Bytes { contents } => Init::Bytes(contents),
        };
        let relocations: Vec<_> = data.all_relocs(Reloc::Abs8).collect();
        let linkage = declaration.linkage;
        self.define(
            FuncOrDataId::Data(id),
            linkage,
            New {
                kind,
                section: data.custom_section.as_deref(),
                content,
                align: data.align.unwrap_or(align),
                relocations: &relocations,
                eh_frame: None,
            },
        )
    }
}

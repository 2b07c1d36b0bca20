//! The module: what Cranelift compiles runs in another process and in this one as it does with cranelift-jit, and comes and
//! goes function by function. Being its own executor, this test has a `main` of its own.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on panics")]
#![allow(clippy::result_large_err, reason = "the error is Cranelift's")]

use cranelift_codegen::Context;
use cranelift_codegen::binemit::Reloc;
use cranelift_codegen::ir::condcodes::IntCC;
use cranelift_codegen::ir::{
    AbiParam, BlockArg, InstBuilder, MemFlagsData as MemFlags, Signature, StackSlotData, StackSlotKind, Type, Value,
    types,
};
use cranelift_codegen::isa::{CallConv, OwnedTargetIsa};
use cranelift_codegen::settings::{self, Configurable};
use cranelift_frontend::{FunctionBuilder, FunctionBuilderContext, Switch};
use cranelift_jit::{JITBuilder, JITModule};
use cranelift_module::{
    DataDescription, DataId, FuncId, Linkage, Module, ModuleError, ModuleReloc, ModuleRelocTarget,
    default_libcall_names,
};
use farlink::{Error, Memory, Session};
use farlink_cranelift::{FarlinkBuilder, FarlinkModule};
use std::fs;
use std::process::Command;
use std::thread;
use tempfile::TempDir;

const TESTS: &[(&str, fn())] = &[
    ("same_results_as_cranelift_jit", same_results_as_cranelift_jit),
    ("declarations_are_checked", declarations_are_checked),
    ("an_undefined_symbol_is_an_error", an_undefined_symbol_is_an_error),
    ("functions_come_and_go", functions_come_and_go),
    ("data_of_every_kind", data_of_every_kind),
    ("thread_local_data", thread_local_data),
    ("unwinding_goes_through", unwinding_goes_through),
    ("functions_are_linked_without_calls", functions_are_linked_without_calls),
    ("signatures_are_checked", signatures_are_checked),
    ("gdb_knows_functions", gdb_knows_functions),
    ("functions_are_replaced_while_others_call_them", functions_are_replaced_while_others_call_them),
];

fn main() {
    farlink::executor::init();
    let wanted = std::env::args().skip(1).find(|arg| !arg.starts_with('-'));
    if std::env::args().any(|arg| arg == "--list") {
        TESTS.iter().for_each(|(name, _)| println!("{name}: test"));
        return;
    }
    for (name, test) in TESTS.iter().filter(|(name, _)| wanted.as_ref().is_none_or(|wanted| name.contains(&**wanted))) {
        test();
        println!("test {name} ... ok");
    }
}

/// Runs `test` in this process and in another, with each kind of code.
fn in_each_session(test: impl Fn(FarlinkModule)) {
    for session in [Session::in_process().unwrap(), Session::spawn().unwrap(), remote()] {
        for is_pic in ["true", "false"] {
            let flags = [("is_pic", is_pic), ("tls_model", "elf_gd")];
            let builder = FarlinkBuilder::with_flags(&session, &flags, default_libcall_names());
            test(FarlinkModule::new(builder.unwrap()));
        }
    }
}

fn remote() -> Session {
    Session::builder().memory(Memory::Remote).spawn().unwrap()
}

fn signature(params: &[Type], returns: &[Type]) -> Signature {
    let all = |types: &[Type]| types.iter().map(|&ty| AbiParam::new(ty)).collect();
    Signature { params: all(params), returns: all(returns), call_conv: CallConv::SystemV }
}

/// Defines a function by what `body` makes of its parameters.
fn define<M: Module>(
    module: &mut M,
    id: FuncId,
    signature: &Signature,
    body: impl FnOnce(&mut M, &mut FunctionBuilder<'_>, &[Value]) -> Vec<Value>,
) -> Result<(), ModuleError> {
    let mut context = Context::new();
    context.func.signature = signature.clone();
    let mut builder_context = FunctionBuilderContext::new();
    let mut builder = FunctionBuilder::new(&mut context.func, &mut builder_context);
    let block = builder.create_block();
    builder.append_block_params_for_function_params(block);
    builder.switch_to_block(block);
    let params = builder.block_params(block).to_vec();
    let results = body(module, &mut builder, &params);
    builder.ins().return_(&results);
    builder.seal_all_blocks();
    builder.finalize(module.target_config());
    module.define_function(id, &mut context)
}

fn declare<M: Module>(module: &mut M, name: &str, linkage: Linkage, signature: &Signature) -> FuncId {
    module.declare_function(name, linkage, signature).unwrap()
}

fn call<M: Module>(module: &mut M, builder: &mut FunctionBuilder<'_>, id: FuncId, args: &[Value]) -> Vec<Value> {
    let callee = module.declare_func_in_func(id, builder.func);
    let call = builder.ins().call(callee, args);
    builder.inst_results(call).to_vec()
}

/// What is built the same in any module: each takes two integers and gives one.
fn programs<M: Module>(module: &mut M) -> Vec<FuncId> {
    vec![recursion(module), loops(module), tables(module), library_calls(module), large_frames(module), floats(module)]
}

const INT: Type = types::I64;

/// Two functions that call each other, one of them local and not defined yet.
fn recursion<M: Module>(module: &mut M) -> FuncId {
    let sig = signature(&[INT, INT], &[INT]);
    let even = declare(module, "even", Linkage::Export, &sig);
    let odd = declare(module, "odd", Linkage::Local, &sig);
    for (this, other, step) in [(even, odd, 3), (odd, even, 5)] {
        let body = |module: &mut M, builder: &mut FunctionBuilder<'_>, params: &[Value]| {
            let (then, done) = (builder.create_block(), builder.create_block());
            let sum = builder.append_block_param(done, INT);
            builder.ins().brif(params[0], then, &[], done, &[BlockArg::Value(params[1])]);
            builder.switch_to_block(then);
            let less = builder.ins().iadd_imm_s(params[0], -1);
            let more = builder.ins().iadd_imm_s(params[1], step);
            let result = call(module, builder, other, &[less, more])[0];
            builder.ins().jump(done, &[BlockArg::Value(result)]);
            builder.switch_to_block(done);
            vec![sum]
        };
        define(module, this, &sig, body).unwrap();
    }
    even
}

/// A loop, and a jump table in it.
fn loops<M: Module>(module: &mut M) -> FuncId {
    let sig = signature(&[INT, INT], &[INT]);
    let id = declare(module, "loops", Linkage::Export, &sig);
    let body = |_: &mut M, builder: &mut FunctionBuilder<'_>, params: &[Value]| {
        let (count, sum) = (builder.declare_var(INT), builder.declare_var(INT));
        builder.def_var(count, params[0]);
        builder.def_var(sum, params[1]);
        let (head, step, done) = (builder.create_block(), builder.create_block(), builder.create_block());
        builder.ins().jump(head, &[]);
        builder.switch_to_block(head);
        let left = builder.use_var(count);
        builder.ins().brif(left, step, &[], done, &[]);
        builder.switch_to_block(step);
        let less = builder.ins().iadd_imm_s(left, -1);
        builder.def_var(count, less);
        let seven = builder.ins().band_imm_s(left, 7);
        let (cases, mut switch): (Vec<_>, _) = ((0..6).map(|_| builder.create_block()).collect(), Switch::new());
        cases.iter().take(5).enumerate().for_each(|(case, &block)| switch.set_entry(case as u128, block));
        switch.emit(builder, seven, cases[5]);
        for (case, block) in cases.into_iter().enumerate() {
            builder.switch_to_block(block);
            let so_far = builder.use_var(sum);
            let next = builder.ins().iadd_imm_s(so_far, 10_i64.pow(case as u32));
            builder.def_var(sum, next);
            builder.ins().jump(head, &[]);
        }
        builder.switch_to_block(done);
        vec![builder.use_var(sum)]
    };
    define(module, id, &sig, body).unwrap();
    id
}

/// Calls through a table of functions in read-only data, and a counter in writable data.
fn tables<M: Module>(module: &mut M) -> FuncId {
    let sig = signature(&[INT, INT], &[INT]);
    let id = declare(module, "tables", Linkage::Export, &sig);
    let entries: Vec<FuncId> = (0..4)
        .map(|entry| {
            let id = module.declare_anonymous_function(&sig).unwrap();
            let body = |_: &mut M, builder: &mut FunctionBuilder<'_>, params: &[Value]| {
                let scaled = builder.ins().imul_imm_s(params[1], 3 + entry);
                vec![builder.ins().iadd(scaled, params[0])]
            };
            define(module, id, &sig, body).unwrap();
            id
        })
        .collect();
    let table = module.declare_data("table", Linkage::Local, false, false).unwrap();
    let mut data = DataDescription::new();
    data.define(vec![0; 32].into());
    for (position, &entry) in entries.iter().enumerate() {
        let entry = module.declare_func_in_data(entry, &mut data);
        data.write_function_addr(8 * position as u32, entry);
    }
    module.define_data(table, &data).unwrap();
    let counter = module.declare_data("counter", Linkage::Hidden, true, false).unwrap();
    data.clear();
    data.define(100_u64.to_le_bytes().into());
    module.define_data(counter, &data).unwrap();
    let body = |module: &mut M, builder: &mut FunctionBuilder<'_>, params: &[Value]| {
        let [table, counter] = [table, counter].map(|data| address(module, builder, data));
        let count = builder.ins().load(INT, MemFlags::trusted(), counter, 0);
        let next = builder.ins().iadd_imm_s(count, 1);
        builder.ins().store(MemFlags::trusted(), next, counter, 0);
        let entry = builder.ins().band_imm_s(params[0], 3);
        let entry = builder.ins().imul_imm_s(entry, 8);
        let entry = builder.ins().iadd(table, entry);
        let function = builder.ins().load(INT, MemFlags::trusted(), entry, 0);
        let sig = builder.import_signature(signature(&[INT, INT], &[INT]));
        let call = builder.ins().call_indirect(sig, function, &[count, params[1]]);
        vec![builder.inst_results(call)[0]]
    };
    define(module, id, &sig, body).unwrap();
    id
}

fn address<M: Module>(module: &mut M, builder: &mut FunctionBuilder<'_>, data: DataId) -> Value {
    let data = module.declare_data_in_func(data, builder.func);
    builder.ins().symbol_value(INT, data)
}

/// Calls of the C library, by name and by what Cranelift makes of its operations.
fn library_calls<M: Module>(module: &mut M) -> FuncId {
    let sig = signature(&[INT, INT], &[INT]);
    let id = declare(module, "library_calls", Linkage::Export, &sig);
    let malloc = declare(module, "malloc", Linkage::Import, &signature(&[INT], &[INT]));
    let free = declare(module, "free", Linkage::Import, &signature(&[INT], &[]));
    let body = |module: &mut M, builder: &mut FunctionBuilder<'_>, params: &[Value]| {
        let size = builder.ins().iconst(INT, 1000);
        let buffer = call(module, builder, malloc, &[size])[0];
        let byte = builder.ins().ireduce(types::I8, params[1]);
        builder.call_memset(module.target_config(), buffer, byte, size);
        let result = builder.ins().load(INT, MemFlags::trusted(), buffer, 992);
        call(module, builder, free, &[buffer]);
        vec![result]
    };
    define(module, id, &sig, body).unwrap();
    id
}

/// A frame of several pages.
fn large_frames<M: Module>(module: &mut M) -> FuncId {
    let sig = signature(&[INT, INT], &[INT]);
    let id = declare(module, "large_frames", Linkage::Export, &sig);
    let body = |_: &mut M, builder: &mut FunctionBuilder<'_>, params: &[Value]| {
        let slot = builder.create_sized_stack_slot(StackSlotData::new(StackSlotKind::ExplicitSlot, 40_000, 3));
        builder.ins().stack_store(INT, params[0], slot, 8);
        builder.ins().stack_store(INT, params[1], slot, 39_000);
        let (first, second) =
            (builder.ins().stack_load(INT, INT, slot, 8), builder.ins().stack_load(INT, INT, slot, 39_000));
        vec![builder.ins().isub(first, second)]
    };
    define(module, id, &sig, body).unwrap();
    id
}

/// Numbers in the constant pool, and rounding, which old processors have no instruction for.
fn floats<M: Module>(module: &mut M) -> FuncId {
    let sig = signature(&[INT, INT], &[INT]);
    let id = declare(module, "floats", Linkage::Export, &sig);
    let body = |_: &mut M, builder: &mut FunctionBuilder<'_>, params: &[Value]| {
        let [a, b] = [params[0], params[1]].map(|int| builder.ins().fcvt_from_sint(types::F64, int));
        let factor = builder.ins().f64const(1.000_244_140_625);
        let product = builder.ins().fmul(a, factor);
        let quotient = builder.ins().fdiv(product, b);
        let rounded = builder.ins().ceil(quotient);
        let sign = builder.ins().fcopysign(rounded, b);
        vec![builder.ins().fcvt_to_sint_sat(INT, sign)]
    };
    define(module, id, &sig, body).unwrap();
    id
}

extern "C" fn ceil(number: f64) -> f64 {
    number.ceil()
}

/// What the programs give, by cranelift-jit.
fn expected(isa: OwnedTargetIsa) -> Vec<Vec<i64>> {
    let mut builder = JITBuilder::with_isa(isa, default_libcall_names());
    // It looks in this process, which has no function of this name.
    builder.symbol("ceil", ceil as *const u8);
    let mut module = JITModule::new(builder);
    let programs = programs(&mut module);
    module.finalize_definitions().unwrap();
    let results = |id: FuncId| {
        let pointer = module.get_finalized_function(id);
        // SAFETY: the function has been compiled with this signature.
        let function = unsafe { std::mem::transmute::<*const u8, extern "C" fn(i64, i64) -> i64>(pointer) };
        ARGUMENTS.iter().map(|&(a, b)| function(a, b)).collect()
    };
    programs.into_iter().map(results).collect()
}

const ARGUMENTS: [(i64, i64); 5] = [(0, 7), (1, -3), (10, 1), (1000, 40_000), (77, 255)];

fn isa(flags: &[(&str, &str)], features: &[(&str, &str)]) -> OwnedTargetIsa {
    let mut builder = settings::builder();
    for (name, value) in [("use_colocated_libcalls", "false"), ("probestack_strategy", "inline")].iter().chain(flags) {
        builder.set(name, value).unwrap();
    }
    let mut isa = cranelift_native::builder().unwrap();
    features.iter().for_each(|(name, value)| isa.set(name, value).unwrap());
    isa.finish(settings::Flags::new(builder)).unwrap()
}

/// Everything gives what it gives with cranelift-jit: for processors of now and of old, position-independent or not,
/// optimized or not, in each kind of session.
fn same_results_as_cranelift_jit() {
    let old =
        ["has_sse41", "has_sse42", "has_avx", "has_avx2", "has_fma", "has_bmi1", "has_bmi2", "has_lzcnt", "has_popcnt"];
    let old: Vec<_> = old.into_iter().map(|feature| (feature, "false")).collect();
    let sessions = [Session::in_process().unwrap(), Session::spawn().unwrap(), remote()];
    for (features, level) in [(&[][..], "speed"), (&[][..], "none"), (&old[..], "none")] {
        let expected = expected(isa(&[("is_pic", "false"), ("opt_level", level)], features));
        for session in &sessions {
            for is_pic in ["true", "false"] {
                let isa = isa(&[("is_pic", is_pic), ("opt_level", level)], features);
                let mut module = FarlinkModule::new(FarlinkBuilder::with_isa(session, isa, default_libcall_names()));
                let programs = programs(&mut module);
                module.finalize_definitions().unwrap();
                for (id, expected) in programs.into_iter().zip(&expected) {
                    let function = module.function::<fn(i64, i64) -> i64>(id).unwrap();
                    for (&args, &expected) in ARGUMENTS.iter().zip(expected) {
                        // SAFETY: the function has been compiled with this signature.
                        assert_eq!(unsafe { function.call(args) }.unwrap(), expected, "{function:?} {args:?} {is_pic}");
                    }
                }
            }
        }
    }
}

fn returns(value: i64) -> impl FnOnce(&mut FarlinkModule, &mut FunctionBuilder<'_>, &[Value]) -> Vec<Value> {
    move |_, builder, _| vec![builder.ins().iconst(INT, value)]
}

/// What contradicts a declaration is refused: another signature, a second definition, a definition of an import, and one
/// whose relocations do not fit.
fn declarations_are_checked() {
    in_each_session(|mut module| {
        let sig = signature(&[], &[INT]);
        let id = declare(&mut module, "f", Linkage::Local, &sig);
        assert!(module.declare_function("f", Linkage::Local, &signature(&[INT], &[])).is_err());
        define(&mut module, id, &sig, returns(1)).unwrap();
        let error = define(&mut module, id, &sig, returns(2)).unwrap_err();
        assert!(matches!(error, ModuleError::DuplicateDefinition(_)), "{error}");
        let import = declare(&mut module, "import", Linkage::Import, &sig);
        let error = define(&mut module, import, &sig, returns(2)).unwrap_err();
        assert!(matches!(error, ModuleError::InvalidImportDefinition(_)), "{error}");
        let bytes = declare(&mut module, "bytes", Linkage::Local, &sig);
        let relocation = |offset, kind| ModuleReloc { offset, kind, name: ModuleRelocTarget::from(id), addend: 0 };
        for (bad, text) in [(relocation(2, Reloc::Abs8), "lies outside"), (relocation(0, Reloc::Arm64Call), "x86-64")] {
            let error = module.define_function_bytes(bytes, 1, &[0xc3; 9], &[bad]).unwrap_err();
            assert!(format!("{error:?}").contains(text), "{error:?}");
        }
        let error = module.define_function_bytes(bytes, 3, &[0xc3], &[]).unwrap_err();
        assert!(format!("{error:?}").contains("power of two"), "{error:?}");
        // mov f, %rax; ret
        let code = [0x48, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0xc3];
        module.define_function_bytes(bytes, 1, &code, &[relocation(2, Reloc::Abs8)]).unwrap();
        module.finalize_definitions().unwrap();
        let address = module.function::<fn() -> i64>(bytes).unwrap();
        // SAFETY: the function has this signature.
        let address = unsafe { address.call(()) }.unwrap();
        assert_eq!(Some(address as u64), module.get_finalized_function(id).map(farlink::addr::ExecutorAddr::as_u64));
    });
}

/// A symbol that is defined nowhere is an error that names it; when it is there, the rest goes on. One that may be missing
/// is null.
fn an_undefined_symbol_is_an_error() {
    in_each_session(|mut module| {
        let sig = signature(&[], &[INT]);
        let [user, missing] = ["user", "missing"].map(|name| declare(&mut module, name, Linkage::Export, &sig));
        define(&mut module, user, &sig, |module, builder, _| call(module, builder, missing, &[])).unwrap();
        let maybe = module.declare_data("maybe", Linkage::Preemptible, false, false).unwrap();
        let test = declare(&mut module, "test", Linkage::Export, &sig);
        define(&mut module, test, &sig, |module, builder, _| vec![address(module, builder, maybe)]).unwrap();
        let error = module.finalize_definitions().unwrap_err();
        assert!(format!("{error:?}").contains("missing, needed by user"), "{error:?}");
        assert!(module.get_finalized_function(user).is_none());
        assert!(module.function::<fn() -> i64>(user).is_err());
        define(&mut module, missing, &sig, returns(42)).unwrap();
        module.finalize_definitions().unwrap();
        let results = [user, test].map(|id| {
            let function = module.function::<fn() -> i64>(id).unwrap();
            // SAFETY: the function has this signature.
            unsafe { function.call(()) }.unwrap()
        });
        assert_eq!(results, [42, 0]);
    });
}

/// A function that others call stays; one that nobody calls goes, its memory comes back, and it can be defined anew.
fn functions_come_and_go() {
    in_each_session(|mut module| {
        let sig = signature(&[], &[INT]);
        let [user, used] = ["user", "used"].map(|name| declare(&mut module, name, Linkage::Export, &sig));
        define(&mut module, used, &sig, returns(1)).unwrap();
        define(&mut module, user, &sig, |module, builder, _| call(module, builder, used, &[])).unwrap();
        module.finalize_definitions().unwrap();
        let memory = |module: &FarlinkModule| module.library().session().memory_stats().live_bytes;
        let before = memory(&module);
        let error = module.remove_function(used).unwrap_err();
        assert!(format!("{error:?}").contains("user refers to it"), "{error:?}");
        for value in 2..10 {
            module.remove_function(user).unwrap();
            module.remove_function(used).unwrap();
            assert!(memory(&module) < before);
            assert!(module.remove_function(used).is_err());
            define(&mut module, used, &sig, returns(value)).unwrap();
            // Removed before it has been linked, and defined again.
            define(&mut module, user, &sig, returns(0)).unwrap();
            module.remove_function(user).unwrap();
            define(&mut module, user, &sig, |module, builder, _| call(module, builder, used, &[])).unwrap();
            module.finalize_definitions().unwrap();
            let function = module.function::<fn() -> i64>(user).unwrap();
            // SAFETY: the function has this signature.
            assert_eq!(unsafe { function.call(()) }.unwrap(), value);
            assert_eq!(memory(&module), before);
        }
    });
}

/// Data is where it says and holds what it says: zeros, nothing at all, alignment above a page, references with offsets, and
/// arrays of initializers by the name of their section.
fn data_of_every_kind() {
    in_each_session(|mut module| {
        let mut data = DataDescription::new();
        let mut object = |module: &mut FarlinkModule,
                          name: &str,
                          writable,
                          describe: &dyn Fn(&mut FarlinkModule, &mut DataDescription)| {
            let id = module.declare_data(name, Linkage::Export, writable, false).unwrap();
            data.clear();
            describe(module, &mut data);
            module.define_data(id, &data).unwrap();
            id
        };
        let aligned = object(&mut module, "aligned", true, &|_, data| {
            data.define_zeroinit(100);
            data.set_align(8192);
        });
        let empty = object(&mut module, "empty", false, &|_, data| data.define(Box::new([])));
        let pointer = object(&mut module, "pointer", true, &|module, data| {
            data.define_zeroinit(16);
            let aligned = module.declare_data_in_data(aligned, data);
            data.write_data_addr(8, aligned, 40);
        });
        let sig = signature(&[], &[]);
        let init = declare(&mut module, "init", Linkage::Local, &sig);
        let body = |module: &mut FarlinkModule, builder: &mut FunctionBuilder<'_>, _: &[Value]| {
            let aligned = address(module, builder, aligned);
            let value = builder.ins().iconst(INT, 42);
            builder.ins().store(MemFlags::trusted(), value, aligned, 40);
            Vec::new()
        };
        define(&mut module, init, &sig, body).unwrap();
        object(&mut module, "init_array", false, &|module, data| {
            data.define(vec![0; 8].into());
            data.set_custom_section(".init_array");
            let init = module.declare_func_in_data(init, data);
            data.write_function_addr(0, init);
        });
        module.finalize_definitions().unwrap();
        let session = module.library().session();
        let (aligned, bytes) = module.get_finalized_data(aligned).unwrap();
        assert_eq!((aligned.as_u64() % 8192, bytes), (0, 100));
        assert!(module.get_finalized_data(empty).unwrap().0 != aligned);
        let word = |addr| {
            let mut word = [0; 8];
            session.read_memory(addr, &mut word).unwrap();
            u64::from_le_bytes(word)
        };
        let pointed = word(module.get_finalized_data(pointer).unwrap().0.checked_add(8).unwrap());
        assert_eq!(pointed, aligned.as_u64() + 40);
        assert_eq!(word(aligned.checked_add(40).unwrap()), 42);
        let late = module.declare_data("late", Linkage::Export, false, false).unwrap();
        assert!(module.define_data(late, &DataDescription::new()).is_err());
    });
}

/// Every thread has its own thread-local data, with its initial value.
fn thread_local_data() {
    in_each_session(|mut module| {
        let counter = module.declare_data("counter", Linkage::Local, true, true).unwrap();
        let zeros = module.declare_data("zeros", Linkage::Local, true, true).unwrap();
        let mut data = DataDescription::new();
        data.define(40_u64.to_le_bytes().into());
        module.define_data(counter, &data).unwrap();
        data.clear();
        data.define_zeroinit(64);
        module.define_data(zeros, &data).unwrap();
        let sig = signature(&[], &[INT]);
        let bump = declare(&mut module, "bump", Linkage::Export, &sig);
        let body = |module: &mut FarlinkModule, builder: &mut FunctionBuilder<'_>, _: &[Value]| {
            let [counter, zeros] = [counter, zeros].map(|data| {
                let data = module.declare_data_in_func(data, builder.func);
                builder.ins().tls_value(INT, data)
            });
            let count = builder.ins().load(INT, MemFlags::trusted(), counter, 0);
            let next = builder.ins().iadd_imm_s(count, 1);
            builder.ins().store(MemFlags::trusted(), next, counter, 0);
            let zero = builder.ins().load(INT, MemFlags::trusted(), zeros, 56);
            vec![builder.ins().iadd(next, zero)]
        };
        define(&mut module, bump, &sig, body).unwrap();
        let twice = declare(&mut module, "twice", Linkage::Export, &sig);
        let body = |module: &mut FarlinkModule, builder: &mut FunctionBuilder<'_>, _: &[Value]| {
            let [first, second] = [(); 2].map(|()| call(module, builder, bump, &[])[0]);
            vec![builder.ins().isub(second, first)]
        };
        define(&mut module, twice, &sig, body).unwrap();
        module.finalize_definitions().unwrap();
        let [bump, twice] = [bump, twice].map(|id| module.function::<fn() -> i64>(id).unwrap());
        // SAFETY: the functions have this signature.
        assert_eq!(unsafe { twice.call(()) }.unwrap(), 1);
        if module.library().session().process_id().is_none() {
            // SAFETY: as above.
            let call = move || unsafe { bump.call(()) }.unwrap();
            assert_eq!(call(), 43);
            assert_eq!(thread::spawn(move || [call(), call()]).join().unwrap(), [41, 42]);
        }
    });
}

fn compile(name: &str, source: &str) -> Vec<u8> {
    let dir = TempDir::new().unwrap();
    let (text, object) = (dir.path().join(name), dir.path().join("object.o"));
    fs::write(&text, source).unwrap();
    let compiler = if name.ends_with(".cc") { "c++" } else { "cc" };
    let status = Command::new(compiler).args(["-c", "-O1", "-fPIC", "-o"]).arg(&object).arg(&text).status();
    assert!(status.unwrap().success());
    fs::read(object).unwrap()
}

/// Backtraces and exceptions go through compiled functions, which call C++ and are called by it.
fn unwinding_goes_through() {
    let source = "
        #include <execinfo.h>
        #include <stdexcept>
        extern \"C\" long depth() { void *frames[64]; return backtrace(frames, 64); }
        extern \"C\" long throws() { throw std::runtime_error(\"*\"); }
        extern \"C\" long calls_depth();
        extern \"C\" long calls_throws();
        extern \"C\" long catches() {
            try { return calls_throws(); } catch (std::exception &error) { return error.what()[0]; }
        }
        extern \"C\" long deeper() { return calls_depth() - depth(); }";
    in_each_session(|mut module| {
        module.library().add_shared_library("libstdc++.so.6").unwrap();
        module.library().add_object("cxx.o", compile("cxx.cc", source)).unwrap();
        let sig = signature(&[], &[INT]);
        for name in ["depth", "throws"] {
            let import = declare(&mut module, name, Linkage::Import, &sig);
            let id = declare(&mut module, &format!("calls_{name}"), Linkage::Export, &sig);
            define(&mut module, id, &sig, |module, builder, _| call(module, builder, import, &[])).unwrap();
        }
        module.finalize_definitions().unwrap();
        let [deeper, catches] =
            ["deeper", "catches"].map(|name| module.library().function::<fn() -> i64>(name).unwrap());
        // SAFETY: the functions are declared so.
        assert_eq!(unsafe { deeper.call(()) }.unwrap(), 1);
        // SAFETY: as above.
        assert_eq!(unsafe { catches.call(()) }.unwrap(), i64::from(b'*'));
    });
}

/// Linking function after function asks the executor for nothing but what it imports.
fn functions_are_linked_without_calls() {
    let session = Session::spawn().unwrap();
    let builder = FarlinkBuilder::new(&session, default_libcall_names()).unwrap();
    let mut module = FarlinkModule::new(builder);
    let sig = signature(&[INT], &[INT]);
    let mut last = declare(&mut module, "f0", Linkage::Local, &sig);
    define(&mut module, last, &sig, |_, _, params| params.to_vec()).unwrap();
    module.finalize_definitions().unwrap();
    let calls = |session: &Session| session.stats().unwrap().calls.values().sum::<u64>();
    let before = calls(&session);
    for number in 1..300 {
        let next = declare(&mut module, &format!("f{number}"), Linkage::Local, &sig);
        let body = |module: &mut FarlinkModule, builder: &mut FunctionBuilder<'_>, params: &[Value]| {
            let result = call(module, builder, last, params)[0];
            let is_odd = builder.ins().icmp_imm_s(IntCC::SignedGreaterThan, result, number);
            let is_odd = builder.ins().uextend(INT, is_odd);
            vec![builder.ins().iadd(result, is_odd)]
        };
        define(&mut module, next, &sig, body).unwrap();
        module.finalize_definitions().unwrap();
        last = next;
    }
    // What asking takes itself.
    assert!(calls(&session) - before <= 2, "{:?}", session.stats().unwrap().calls);
    let function = module.function::<fn(i64) -> i64>(last).unwrap();
    // SAFETY: the function has this signature.
    assert_eq!(unsafe { function.call((1000,)) }.unwrap(), 1299);
}

/// A function is not called with another signature than it was compiled with.
fn signatures_are_checked() {
    in_each_session(|mut module| {
        let sig = signature(&[types::I32, types::F64], &[types::F32]);
        let id = declare(&mut module, "f", Linkage::Export, &sig);
        let body = |_: &mut FarlinkModule, builder: &mut FunctionBuilder<'_>, params: &[Value]| {
            vec![builder.ins().fdemote(types::F32, params[1])]
        };
        define(&mut module, id, &sig, body).unwrap();
        module.finalize_definitions().unwrap();
        assert!(module.function::<fn(i32, f64)>(id).is_err());
        assert!(module.function::<fn(i32, i64) -> f32>(id).is_err());
        let error = module.function::<fn(i32) -> f32>(id).unwrap_err();
        assert!(format!("{error:?}").contains("has the signature"), "{error:?}");
        let function = module.function::<extern "C" fn(i32, f64) -> f32>(id).unwrap();
        // SAFETY: the function has this signature.
        assert_eq!(unsafe { function.call((1, 0.5)) }.unwrap(), 0.5);
        let error = module.library().function::<fn()>("nowhere").unwrap_err();
        assert!(matches!(error, Error::Undefined(_)), "{error}");
    });
}

/// A function is defined anew while a call of it runs and another function calls it again and again: callers see the old one
/// or the new one, and the old ones' memory comes back.
fn functions_are_replaced_while_others_call_them() {
    for session in [Session::in_process().unwrap(), Session::spawn().unwrap(), remote()] {
        let builder = FarlinkBuilder::new(&session, default_libcall_names()).unwrap().hotswap(true);
        let mut module = FarlinkModule::new(builder);
        let sig = signature(&[INT], &[INT]);
        let [version, user] = ["version", "user"].map(|name| declare(&mut module, name, Linkage::Export, &sig));
        let add = |added: i64| {
            move |_: &mut FarlinkModule, builder: &mut FunctionBuilder<'_>, params: &[Value]| {
                vec![builder.ins().iadd_imm_s(params[0], added)]
            }
        };
        define(&mut module, version, &sig, add(1)).unwrap();
        // Calls it as often as it is told; gives the sum of what came back.
        let body = |module: &mut FarlinkModule, builder: &mut FunctionBuilder<'_>, params: &[Value]| {
            let [left, sum] = [(); 2].map(|()| builder.declare_var(INT));
            builder.def_var(left, params[0]);
            let zero = builder.ins().iconst(INT, 0);
            builder.def_var(sum, zero);
            let [head, step, done] = [(); 3].map(|()| builder.create_block());
            builder.ins().jump(head, &[]);
            builder.switch_to_block(head);
            let now = builder.use_var(left);
            builder.ins().brif(now, step, &[], done, &[]);
            builder.switch_to_block(step);
            let result = call(module, builder, version, &[zero])[0];
            let so_far = builder.use_var(sum);
            let more = builder.ins().iadd(so_far, result);
            builder.def_var(sum, more);
            let less = builder.ins().iadd_imm_s(now, -1);
            builder.def_var(left, less);
            builder.ins().jump(head, &[]);
            builder.switch_to_block(done);
            vec![builder.use_var(sum)]
        };
        define(&mut module, user, &sig, body).unwrap();
        module.finalize_definitions().unwrap();
        let user = module.function::<fn(i64) -> i64>(user).unwrap();
        let (calls, memory) = (1_000_000, session.memory_stats().live_bytes);
        thread::scope(|scope| {
            // SAFETY: the function has this signature.
            let caller = scope.spawn(|| unsafe { user.call((calls,)) }.unwrap());
            for added in 2..50 {
                module.prepare_for_function_redefine(version).unwrap();
                define(&mut module, version, &sig, add(added)).unwrap();
                module.finalize_definitions().unwrap();
            }
            let sum = caller.join().unwrap();
            assert!((calls..50 * calls).contains(&sum), "{sum}");
        });
        // SAFETY: as above.
        assert_eq!(unsafe { user.call((10,)) }.unwrap(), 490);
        assert_eq!(session.memory_stats().live_bytes, memory);
        module.remove_function(version).unwrap();
        assert!(module.prepare_for_function_redefine(version).is_err());
        define(&mut module, version, &sig, add(3)).unwrap();
        module.finalize_definitions().unwrap();
        // SAFETY: as above.
        assert_eq!(unsafe { user.call((10,)) }.unwrap(), 30);
    }
}

/// gdb, attached to the executor, names the compiled functions on the stack, and goes through them.
fn gdb_knows_functions() {
    let in_path = |name| std::env::split_paths(&std::env::var_os("PATH").unwrap()).any(|dir| dir.join(name).is_file());
    if !in_path("gdb") {
        assert!(std::env::var_os("FARLINK_REQUIRE_TOOLS").is_none(), "gdb is missing");
        eprintln!("SKIPPED gdb_knows_functions: gdb is not installed");
        return;
    }
    let session = Session::builder().debug(true).spawn().unwrap();
    let mut module = FarlinkModule::new(FarlinkBuilder::new(&session, default_libcall_names()).unwrap());
    let sig = signature(&[], &[INT]);
    let pause = declare(&mut module, "pause", Linkage::Import, &sig);
    let [inner, outer] =
        ["compiled_inner", "compiled_outer"].map(|name| declare(&mut module, name, Linkage::Export, &sig));
    define(&mut module, inner, &sig, |module, builder, _| call(module, builder, pause, &[])).unwrap();
    define(&mut module, outer, &sig, |module, builder, _| call(module, builder, inner, &[])).unwrap();
    module.finalize_definitions().unwrap();
    let outer = module.function::<fn() -> i64>(outer).unwrap();
    // SAFETY: the function has this signature.
    let waiting = unsafe { outer.start(()) };
    let pid = session.process_id().unwrap().to_string();
    let stacks = || {
        let mut gdb = Command::new("gdb");
        gdb.args([
            "-batch",
            "-nx",
            "-iex",
            "set debuginfod enabled off",
            "-p",
            &pid,
            "-ex",
            "thread apply all backtrace",
        ]);
        String::from_utf8_lossy(&gdb.output().unwrap().stdout).into_owned()
    };
    // The call may not have come there yet.
    let text = (0..10).map(|_| stacks()).find(|text| text.contains("compiled_inner")).unwrap_or_else(stacks);
    let (first, second) = (text.find("compiled_inner ()"), text.find("compiled_outer ()"));
    assert!(first.is_some() && first < second && text.contains("farlink_call_native"), "{text}");
    assert!(session.kill());
    assert!(waiting.wait().is_err());
}

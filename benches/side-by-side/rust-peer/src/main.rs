//! cranelift-jit and the jit-allocator crate, both in one process.
//!
//!     rust_peer PEER WORKLOAD [N]
//!
//! PEER: cranelift-sys, cranelift-arena, jitalloc-rwx, jitalloc-dual.
//! Cranelift links no object files, so the tiny object is given to it as the
//! same 32 bytes of code with its relocations, and as Cranelift IR.

use cranelift_codegen::binemit::Reloc;
use cranelift_codegen::ir::{types, AbiParam, InstBuilder, MemFlagsData, Signature};
use cranelift_codegen::isa::{CallConv, OwnedTargetIsa};
use cranelift_codegen::settings::{self, Configurable};
use cranelift_codegen::Context;
use cranelift_frontend::{FunctionBuilder, FunctionBuilderContext};
use cranelift_jit::{
    ArenaMemoryProvider, BranchProtection, JITBuilder, JITMemoryKind, JITMemoryProvider, JITModule,
    SystemMemoryProvider,
};
use cranelift_module::{
    default_libcall_names, DataDescription, DataId, FuncId, Linkage, Module, ModuleReloc,
    ModuleRelocTarget,
};
use jit_allocator::{JitAllocator, JitAllocatorOptions};
use std::fmt::Write as _;
use std::fs;
use std::hint::black_box;

fn now() -> u64 {
    let mut t = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &mut t) };
    t.tv_sec as u64 * 1_000_000_000 + t.tv_nsec as u64
}

struct Out {
    peer: String,
}
impl Out {
    fn samples(&self, w: &str, m: &str, u: &str, s: &[f64]) {
        let mut o = format!(
            "{{\"peer\":\"{}\",\"workload\":\"{w}\",\"metric\":\"{m}\",\"unit\":\"{u}\",\"samples\":[",
            self.peer
        );
        for (i, v) in s.iter().enumerate() {
            write!(o, "{}{v}", if i > 0 { "," } else { "" }).unwrap();
        }
        println!("{o}]}}");
    }
    fn fact(&self, w: &str, f: &str, t: &str) {
        println!(
            "{{\"peer\":\"{}\",\"workload\":\"{w}\",\"fact\":\"{f}\",\"text\":\"{}\"}}",
            self.peer,
            t.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "; ")
        );
    }
    fn mem(&self, w: &str, who: &str, a: &Mem, b: &Mem, n: f64) {
        self.samples(w, &format!("{who}_pss_anon_per_obj"), "bytes", &[(b.anon - a.anon) / n]);
        self.samples(w, &format!("{who}_pss_shmem_per_obj"), "bytes", &[(b.shmem - a.shmem) / n]);
        self.samples(w, &format!("{who}_vmas_per_obj"), "count", &[(b.vmas - a.vmas) / n]);
    }
}

struct Mem {
    anon: f64,
    shmem: f64,
    vmas: f64,
}
fn mem() -> Mem {
    let field = |k: &str| {
        fs::read_to_string("/proc/self/smaps_rollup")
            .unwrap()
            .lines()
            .find(|l| l.starts_with(k))
            .map(|l| l.split_whitespace().nth(1).unwrap().parse::<f64>().unwrap() * 1024.0)
            .unwrap_or(0.0)
    };
    Mem {
        anon: field("Pss_Anon:"),
        shmem: field("Pss_Shmem:"),
        vmas: fs::read_to_string("/proc/self/maps").unwrap().lines().count() as f64,
    }
}

const FILL: [u8; 4096] = {
    let mut f = [0u8; 4096];
    let mut i = 0;
    while i < 4096 {
        f[i] = (i * 31 + (i >> 8) + 1) as u8;
        i += 1;
    }
    f
};

fn tiny_value(i: usize) -> u64 {
    1000 + 7 * i as u64
}
fn check_tiny(addr: *const u8, i: usize) {
    let f: extern "C" fn(i32) -> i32 = unsafe { std::mem::transmute(addr) };
    let x = -(i as i32);
    assert_eq!(f(x), i as i32 + tiny_value(i) as i32, "tiny {i}");
}

/// int tiny(int x) = abs(x) + data, 32 bytes; 64-bit addresses at 3 and 15.
const TINY: [u8; 32] = [
    0x51, // push rcx
    0x48, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, // movabs rax, abs    (imm at 3)
    0xff, 0xd0, // call rax
    0x48, 0xb9, 0, 0, 0, 0, 0, 0, 0, 0, // movabs rcx, data   (imm at 15)
    0x03, 0x01, // add eax, [rcx]
    0x59, // pop rcx
    0xc3, // ret
    0x90, 0x90, 0x90, 0x90, 0x90, // pad
];
const ABS_AT: usize = 3;
const DATA_AT: usize = 15;

// ---------------------------------------------------------------- cranelift
fn isa() -> OwnedTargetIsa {
    let mut f = settings::builder();
    f.set("use_colocated_libcalls", "false").unwrap();
    f.set("is_pic", "false").unwrap();
    f.set("opt_level", "speed").unwrap();
    cranelift_native::builder().unwrap().finish(settings::Flags::new(f)).unwrap()
}
fn provider(arena: bool, size: usize) -> Box<dyn JITMemoryProvider + Send> {
    if arena {
        Box::new(ArenaMemoryProvider::new_with_size(size).unwrap())
    } else {
        Box::new(SystemMemoryProvider::new())
    }
}
fn module(isa: &OwnedTargetIsa, arena: bool, size: usize) -> JITModule {
    let mut b = JITBuilder::with_isa(isa.clone(), default_libcall_names());
    b.memory_provider(provider(arena, size));
    JITModule::new(b)
}
fn sig() -> Signature {
    let mut s = Signature::new(CallConv::SystemV);
    s.params.push(AbiParam::new(types::I32));
    s.returns.push(AbiParam::new(types::I32));
    s
}
fn define_data(m: &mut JITModule, i: usize) -> DataId {
    let d = m.declare_data(&format!("tdat_{i:04}"), Linkage::Local, true, false).unwrap();
    let mut desc = DataDescription::new();
    desc.define(tiny_value(i).to_le_bytes().to_vec().into_boxed_slice());
    m.define_data(d, &desc).unwrap();
    d
}
fn define_bytes(m: &mut JITModule, i: usize, s: &Signature) -> FuncId {
    let abs = m.declare_function("abs", Linkage::Import, s).unwrap();
    let d = define_data(m, i);
    let f = m.declare_function(&format!("tiny_{i:04}"), Linkage::Export, s).unwrap();
    let rel = |at: usize, name| ModuleReloc { offset: at as u32, kind: Reloc::Abs8, name, addend: 0 };
    m.define_function_bytes(
        f,
        16,
        &TINY,
        &[
            rel(ABS_AT, ModuleRelocTarget::user(0, abs.as_u32())),
            rel(DATA_AT, ModuleRelocTarget::user(1, d.as_u32())),
        ],
    )
    .unwrap();
    f
}
fn define_ir(
    m: &mut JITModule,
    i: usize,
    s: &Signature,
    ctx: &mut Context,
    fbc: &mut FunctionBuilderContext,
) -> FuncId {
    let abs = m.declare_function("abs", Linkage::Import, s).unwrap();
    let d = define_data(m, i);
    let f = m.declare_function(&format!("tiny_{i:04}"), Linkage::Export, s).unwrap();
    ctx.func.signature = s.clone();
    {
        let mut b = FunctionBuilder::new(&mut ctx.func, fbc);
        let blk = b.create_block();
        b.append_block_params_for_function_params(blk);
        b.switch_to_block(blk);
        b.seal_block(blk);
        let x = b.block_params(blk)[0];
        let callee = m.declare_func_in_func(abs, b.func);
        let call = b.ins().call(callee, &[x]);
        let r = b.inst_results(call)[0];
        let gv = m.declare_data_in_func(d, b.func);
        let p = b.ins().symbol_value(types::I64, gv);
        let v = b.ins().load(types::I32, MemFlagsData::new(), p, 0);
        let sum = b.ins().iadd(r, v);
        b.ins().return_(&[sum]);
        b.finalize(m.isa().frontend_config());
    }
    m.define_function(f, ctx).unwrap();
    m.clear_context(ctx);
    f
}

fn cl_w1(o: &Out, arena: bool, n: usize) {
    let isa = isa();
    let s = sig();
    // one module, one finalize per function
    {
        let mut m = module(&isa, arena, 64 << 20);
        let (m0, mut t, mut addrs) = (mem(), vec![], vec![]);
        for i in 0..n {
            let t0 = now();
            let f = define_bytes(&mut m, i, &s);
            m.finalize_definitions().unwrap();
            addrs.push(m.get_finalized_function(f));
            t.push((now() - t0) as f64);
        }
        o.mem("W1", "controller", &m0, &mem(), n as f64);
        o.samples("W1", "link_one", "ns", &t);
        for (i, a) in addrs.iter().enumerate() {
            check_tiny(*a, i);
        }
        let t0 = now();
        unsafe { m.free_memory() };
        o.samples("W1", "free_whole_module_per_obj", "ns", &[(now() - t0) as f64 / n as f64]);
        o.fact("W1", "removal", "JITModule cannot remove one function; only free_memory() of a whole module");
    }
    // the same from IR: what a Cranelift user really pays
    {
        let mut m = module(&isa, arena, 64 << 20);
        let (mut ctx, mut fbc) = (m.make_context(), FunctionBuilderContext::new());
        let (mut t, mut addrs) = (vec![], vec![]);
        for i in 0..n {
            let t0 = now();
            let f = define_ir(&mut m, i, &s, &mut ctx, &mut fbc);
            m.finalize_definitions().unwrap();
            addrs.push(m.get_finalized_function(f));
            t.push((now() - t0) as f64);
        }
        o.samples("W1", "compile_and_link_one", "ns", &t);
        for (i, a) in addrs.iter().enumerate() {
            check_tiny(*a, i);
        }
        unsafe { m.free_memory() };
    }
    // one module per function: the only way to remove them one by one
    {
        let (m0, mut t, mut addrs, mut mods) = (mem(), vec![], vec![], vec![]);
        for i in 0..n {
            let t0 = now();
            let mut m = module(&isa, arena, 16384);
            let f = define_bytes(&mut m, i, &s);
            m.finalize_definitions().unwrap();
            addrs.push(m.get_finalized_function(f));
            t.push((now() - t0) as f64);
            mods.push(m);
        }
        o.samples("W1", "link_one_module_each", "ns", &t);
        o.mem("W1", "module_each_controller", &m0, &mem(), n as f64);
        for (i, a) in addrs.iter().enumerate() {
            check_tiny(*a, i);
        }
        t.clear();
        for m in mods {
            let t0 = now();
            unsafe { m.free_memory() };
            t.push((now() - t0) as f64);
        }
        o.samples("W1", "remove_one", "ns", &t);
        o.mem("W1", "after_remove", &m0, &mem(), n as f64);
    }
}

fn cl_w2(o: &Out, arena: bool, n: usize) {
    let isa = isa();
    let s = sig();
    let (mut tl, mut tc, mut tr) = (vec![], vec![], vec![]);
    for _ in 0..3 {
        let mut m = module(&isa, arena, 64 << 20);
        let t0 = now();
        let fs: Vec<_> = (0..n).map(|i| define_bytes(&mut m, i, &s)).collect();
        m.finalize_definitions().unwrap();
        let addrs: Vec<_> = fs.iter().map(|f| m.get_finalized_function(*f)).collect();
        tl.push((now() - t0) as f64);
        for (i, a) in addrs.iter().enumerate() {
            check_tiny(*a, i);
        }
        let t0 = now();
        unsafe { m.free_memory() };
        tr.push((now() - t0) as f64);

        let mut m = module(&isa, arena, 64 << 20);
        let (mut ctx, mut fbc) = (m.make_context(), FunctionBuilderContext::new());
        let t0 = now();
        let fs: Vec<_> = (0..n).map(|i| define_ir(&mut m, i, &s, &mut ctx, &mut fbc)).collect();
        m.finalize_definitions().unwrap();
        let addrs: Vec<_> = fs.iter().map(|f| m.get_finalized_function(*f)).collect();
        tc.push((now() - t0) as f64);
        for (i, a) in addrs.iter().enumerate() {
            check_tiny(*a, i);
        }
        unsafe { m.free_memory() };
    }
    o.samples("W2", "link_all", "ns", &tl);
    o.samples("W2", "compile_and_link_all", "ns", &tc);
    o.samples("W2", "remove_all", "ns", &tr);
}

fn cl_w4(o: &Out, arena: bool) {
    let isa = isa();
    let s = sig();
    let mut m = module(&isa, arena, 1 << 20);
    let f = m.declare_function("idfn", Linkage::Export, &s).unwrap();
    m.define_function_bytes(f, 16, &[0x8d, 0x47, 0x01, 0xc3], &[]).unwrap();
    m.finalize_definitions().unwrap();
    let a = m.get_finalized_function(f);
    let f: extern "C" fn(i32) -> i32 = unsafe { std::mem::transmute(a) };
    direct(o, f);
}
fn direct(o: &Out, f: extern "C" fn(i32) -> i32) {
    let mut t = vec![];
    for _ in 0..1000 {
        let t0 = now();
        let mut x = 0;
        for _ in 0..1000 {
            x = black_box(f)(x);
        }
        t.push((now() - t0) as f64 / 1000.0);
        assert_eq!(x, 1000);
    }
    o.samples("W4", "direct_call", "ns", &t);
}

fn cl_cycle(arena: bool, code: usize, data: usize, t: Option<&mut [Vec<f64>; 5]>) -> Box<dyn JITMemoryProvider + Send> {
    let t0 = now();
    let mut p = provider(arena, code + data);
    let c = p.allocate(code, 16, JITMemoryKind::Executable).unwrap();
    let d = p.allocate(data, 16, JITMemoryKind::Writable).unwrap();
    let t1 = now();
    unsafe {
        for off in (0..code).step_by(4096) {
            std::ptr::copy_nonoverlapping(FILL.as_ptr(), c.add(off), 4096);
        }
        for off in (0..data).step_by(4096) {
            std::ptr::copy_nonoverlapping(FILL.as_ptr(), d.add(off), 4096);
        }
    }
    let t2 = now();
    p.finalize(BranchProtection::None).unwrap();
    let t3 = now();
    if let Some(t) = t {
        t[1].push((t1 - t0) as f64);
        t[2].push((t2 - t1) as f64);
        t[3].push((t3 - t2) as f64);
    }
    let (c, d) = unsafe { (std::slice::from_raw_parts(c, 4096), std::slice::from_raw_parts(d, 4096)) };
    assert!(c[4095] == FILL[4095] && d[17] == FILL[17]);
    p
}
fn cl_cycles(o: &Out, arena: bool, n: usize, sz: usize, tag: &str, split: bool) {
    let mut t: [Vec<f64>; 5] = Default::default();
    for _ in 0..n {
        let mut p = cl_cycle(arena, sz, sz, Some(&mut t));
        let t0 = now();
        unsafe { p.free_memory() };
        drop(p);
        t[4].push((now() - t0) as f64);
    }
    let cyc: Vec<f64> = (0..n).map(|i| t[1][i] + t[2][i] + t[3][i] + t[4][i]).collect();
    o.samples("W5", &format!("{tag}cycle"), "ns", &cyc);
    if split {
        for (i, m) in ["alloc", "fill", "finalize", "dealloc"].iter().enumerate() {
            o.samples("W5", m, "ns", &t[i + 1]);
        }
    }
}
fn cl_w5scale(o: &Out, arena: bool, n: usize) {
    let mut live = vec![];
    for l in [100, 1000, 10000] {
        while live.len() < l {
            live.push(cl_cycle(arena, 4096, 4096, None));
        }
        cl_cycles(o, arena, n, 4096, &format!("live{l}_"), false);
    }
    for mut p in live {
        unsafe { p.free_memory() };
    }
}
fn w6_source() -> Vec<u8> {
    let mut v = vec![0u8; 256 << 20];
    let mut x = 88172645463325252u64;
    for c in v.chunks_exact_mut(8) {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        c.copy_from_slice(&x.to_le_bytes());
    }
    v
}
fn cl_w6(o: &Out, arena: bool) {
    let src = w6_source();
    let (mut first, mut warm) = (vec![], vec![]);
    for k in 0..3 {
        let t0 = now();
        let mut p = provider(arena, 258 << 20);
        let mut at = vec![];
        for seg in src.chunks_exact(1 << 20) {
            let d = p.allocate(1 << 20, 16, JITMemoryKind::Writable).unwrap();
            unsafe { std::ptr::copy_nonoverlapping(seg.as_ptr(), d, 1 << 20) };
            p.finalize(BranchProtection::None).unwrap();
            at.push(d);
        }
        let mbs = src.len() as f64 / 1e6 / ((now() - t0) as f64 / 1e9);
        if k == 0 { first.push(mbs) } else { warm.push(mbs) }
        for (seg, d) in src.chunks_exact(1 << 20).zip(&at) {
            assert!(unsafe { std::slice::from_raw_parts(*d, 1 << 20) } == seg);
        }
        unsafe { p.free_memory() };
    }
    o.samples("W6", "first_256MiB_rate", "MB/s", &first);
    o.samples("W6", "again_256MiB_rate", "MB/s", &warm);
}
fn cl_limit(o: &Out, arena: bool) {
    let isa = isa();
    let s = sig();
    let mut m = module(&isa, arena, 4 << 30);
    let mut n = 0;
    let r = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        while n < 80000 {
            define_bytes(&mut m, n, &s);
            m.finalize_definitions().map_err(|e| format!("{e:?}")).unwrap();
            n += 1;
        }
    }));
    o.samples("limit", "functions_finalized_until_failure", "count", &[n as f64]);
    o.fact("limit", "failure", match &r {
        Ok(()) => "none up to 80000".to_string(),
        Err(e) => e.downcast_ref::<String>().cloned().unwrap_or_else(|| "panic".into()),
    }.chars().take(200).collect::<String>().as_str());
    std::process::exit(0);
}

// ------------------------------------------------------------- jit-allocator
fn ja(dual: bool) -> Box<JitAllocator> {
    let mut p = JitAllocatorOptions::default();
    p.use_dual_mapping = dual;
    JitAllocator::new(p)
}
fn ja_place(a: &mut JitAllocator, i: usize) -> *const u8 {
    let (rx, rw) = a.alloc(64).unwrap();
    unsafe {
        jit_allocator::protect_jit_memory(jit_allocator::ProtectJitAccess::ReadWrite);
        let mut c = TINY;
        c[ABS_AT..ABS_AT + 8].copy_from_slice(&(libc::abs as *const () as u64).to_le_bytes());
        c[DATA_AT..DATA_AT + 8].copy_from_slice(&(rx as u64 + 32).to_le_bytes());
        std::ptr::copy_nonoverlapping(c.as_ptr(), rw, 32);
        std::ptr::copy_nonoverlapping(tiny_value(i).to_le_bytes().as_ptr(), rw.add(32), 8);
        jit_allocator::protect_jit_memory(jit_allocator::ProtectJitAccess::ReadExecute);
        jit_allocator::flush_instruction_cache(rx, 64);
    }
    rx
}
fn ja_w1(o: &Out, dual: bool, n: usize) {
    let mut a = ja(dual);
    let (m0, mut t, mut addrs) = (mem(), vec![], vec![]);
    for i in 0..n {
        let t0 = now();
        addrs.push(ja_place(&mut a, i));
        t.push((now() - t0) as f64);
    }
    o.mem("W1", "controller", &m0, &mem(), n as f64);
    o.samples("W1", "link_one", "ns", &t);
    for (i, p) in addrs.iter().enumerate() {
        check_tiny(*p, i);
    }
    t.clear();
    for p in &addrs {
        let t0 = now();
        unsafe { a.release(*p).unwrap() };
        t.push((now() - t0) as f64);
    }
    o.samples("W1", "remove_one", "ns", &t);
    o.mem("W1", "after_remove", &m0, &mem(), n as f64);
    o.fact("W1", "meaning", "no object parsing: allocate 64 bytes, copy 32+8, patch 2 addresses");
    let mut t = vec![];
    for _ in 0..5 {
        let mut a = ja(dual);
        let t0 = now();
        for i in 0..n {
            black_box(ja_place(&mut a, i));
        }
        t.push((now() - t0) as f64);
    }
    o.samples("W2", "link_all", "ns", &t);
}
fn ja_pair(a: &mut JitAllocator, sz: usize, t: Option<&mut [Vec<f64>; 5]>) -> (*const u8, *const u8) {
    let t0 = now();
    let (cx, cw) = a.alloc(sz).unwrap();
    let (dx, dw) = a.alloc(sz).unwrap();
    let t1 = now();
    for off in (0..sz).step_by(4096) {
        unsafe {
            std::ptr::copy_nonoverlapping(FILL.as_ptr(), cw.add(off), 4096);
            std::ptr::copy_nonoverlapping(FILL.as_ptr(), dw.add(off), 4096);
        }
    }
    jit_allocator::flush_instruction_cache(cx, sz);
    let t2 = now();
    if let Some(t) = t {
        t[1].push((t1 - t0) as f64);
        t[2].push((t2 - t1) as f64);
    }
    unsafe { assert!(*cx.add(sz - 1) == FILL[4095] && *dx.add(17) == FILL[17]) };
    (cx, dx)
}
fn ja_cycles(o: &Out, a: &mut JitAllocator, n: usize, sz: usize, tag: &str, split: bool) {
    let mut t: [Vec<f64>; 5] = Default::default();
    for _ in 0..n {
        let (c, d) = ja_pair(a, sz, Some(&mut t));
        let t0 = now();
        unsafe {
            a.release(c).unwrap();
            a.release(d).unwrap();
        }
        t[4].push((now() - t0) as f64);
    }
    let cyc: Vec<f64> = (0..n).map(|i| t[1][i] + t[2][i] + t[4][i]).collect();
    o.samples("W5", &format!("{tag}cycle"), "ns", &cyc);
    if split {
        o.samples("W5", "alloc", "ns", &t[1]);
        o.samples("W5", "fill", "ns", &t[2]);
        o.samples("W5", "dealloc", "ns", &t[4]);
    }
}
fn ja_w5(o: &Out, dual: bool, n: usize, scale: bool) {
    let mut a = ja(dual);
    if !scale {
        return ja_cycles(o, &mut a, n, 4096, "", true);
    }
    let mut live = vec![];
    for l in [100, 1000, 10000] {
        while live.len() < l {
            live.push(ja_pair(&mut a, 4096, None));
        }
        ja_cycles(o, &mut a, n, 4096, &format!("live{l}_"), false);
    }
    let mut t = vec![];
    for p in live.iter().step_by(2) {
        let t0 = now();
        unsafe {
            a.release(p.0).unwrap();
            a.release(p.1).unwrap();
        }
        t.push((now() - t0) as f64);
    }
    o.samples("W5", "dealloc_at_10k_live", "ns", &t);
    ja_cycles(o, &mut a, n, 8192, "holes5k_16KiB_", false);
}
fn ja_w6(o: &Out, dual: bool) {
    let src = w6_source();
    let mut a = ja(dual);
    let (mut first, mut warm) = (vec![], vec![]);
    for k in 0..3 {
        let t0 = now();
        let mut at = vec![];
        for seg in src.chunks_exact(1 << 20) {
            let (rx, rw) = a.alloc(1 << 20).unwrap();
            unsafe { std::ptr::copy_nonoverlapping(seg.as_ptr(), rw, 1 << 20) };
            at.push(rx);
        }
        let mbs = src.len() as f64 / 1e6 / ((now() - t0) as f64 / 1e9);
        if k == 0 { first.push(mbs) } else { warm.push(mbs) }
        for (seg, d) in src.chunks_exact(1 << 20).zip(&at) {
            assert!(unsafe { std::slice::from_raw_parts(*d, 1 << 20) } == seg);
        }
        for d in at {
            unsafe { a.release(d).unwrap() };
        }
    }
    o.samples("W6", "first_256MiB_rate", "MB/s", &first);
    o.samples("W6", "again_256MiB_rate", "MB/s", &warm);
}

fn main() {
    let a: Vec<String> = std::env::args().collect();
    let (peer, w) = (a[1].as_str(), a[2].as_str());
    let n: Option<usize> = a.get(3).map(|s| s.parse().unwrap());
    let o = Out { peer: peer.to_string() };
    if let Some(kind) = peer.strip_prefix("cranelift-") {
        let arena = kind == "arena";
        match w {
            "W1" => cl_w1(&o, arena, n.unwrap_or(1000)),
            "W2" => cl_w2(&o, arena, n.unwrap_or(1000)),
            "W3" => o.fact("W3", "not_applicable", "cranelift-jit loads no object files"),
            "W4" => cl_w4(&o, arena),
            "W5" => cl_cycles(&o, arena, n.unwrap_or(10000), 4096, "", true),
            "W5scale" => cl_w5scale(&o, arena, n.unwrap_or(300)),
            "W6" => cl_w6(&o, arena),
            "limit" => cl_limit(&o, arena),
            _ => panic!("workload {w}"),
        }
    } else if let Some(kind) = peer.strip_prefix("jitalloc-") {
        let dual = kind == "dual";
        match w {
            "W1" => ja_w1(&o, dual, n.unwrap_or(1000)),
            "W5" => ja_w5(&o, dual, n.unwrap_or(10000), false),
            "W5scale" => ja_w5(&o, dual, n.unwrap_or(300), true),
            "W6" => ja_w6(&o, dual),
            _ => panic!("workload {w}"),
        }
    } else {
        panic!("peer {peer}");
    }
}

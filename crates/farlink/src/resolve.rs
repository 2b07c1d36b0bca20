//! The values of the external symbols of a batch.

use crate::Error;
use crate::claim::{AskedStub, Claim, Target};
use crate::error::UndefinedSymbol;
use crate::library::LibraryInner;
use crate::place::Places;
use crate::runtime::Runtime;
use crate::state::{ObjectState, State};
use crate::table::Value;
use crate::thread_local;
use farlink_addr::ExecutorAddr;
use farlink_graph::TlsAddress;
use std::collections::{BTreeMap, HashMap};
use std::sync::MutexGuard;

/// Finds the address of every external symbol of the batch that is not thread-local; gives those of its names.
pub(crate) fn resolve(
    library: &LibraryInner,
    claim: &mut Claim,
    places: &Places,
    names: &[&str],
) -> Result<Vec<ExecutorAddr>, Error> {
    let session = &library.session;
    let found = match &session.runtime {
        Some(runtime) => ask(library, runtime, claim)?,
        None => vec![session.undefined_zero.then_some(ExecutorAddr::NULL); claim.asked.len()],
    };
    let bounds: Vec<_> = claim.bounds.iter().map(|&bound| places.bound(claim, bound)).collect();
    check_defined(claim, &found, &bounds)?;
    let others = addresses_of_others(library, claim)?;
    let address = |claim: &Claim, target: Target, name: &str| match target {
        Target::Known(value) => value.address(),
        Target::Batch(position, symbol) => claim.objects[position].graph.symbol_address(symbol),
        Target::Other(_) => others.winner(name)?.address(),
        Target::Bound(position) => bounds[position],
        Target::Ask(position) => found[position],
    };
    for position in 0..claim.objects.len() {
        for index in 0..claim.objects[position].targets.len() {
            let (symbol, target) = claim.objects[position].targets[index];
            let found = address(claim, target, claim.objects[position].graph.symbol_name(symbol));
            // Only a weak reference can be left without a definition; it is null.
            claim.objects[position].graph.set_address(symbol, found.unwrap_or(ExecutorAddr::NULL));
        }
    }
    if let Some(runtime) = &session.runtime {
        place_functions(runtime, claim, &found)?;
    }
    let roots = claim.roots.iter().zip(names);
    roots
        .map(|(&target, &name)| {
            // What is defined nowhere has been found out above.
            address(claim, target, name).ok_or_else(|| Error::ThreadLocal { symbol: name.to_owned() })
        })
        .collect()
}

/// Gives functions that are too far away for 32-bit absolute addresses those of their stubs, for the whole batch.
fn place_functions(runtime: &Runtime, claim: &mut Claim, found: &[Option<ExecutorAddr>]) -> Result<(), Error> {
    let is_far = |addr: &ExecutorAddr| i32::try_from(addr.as_u64()).is_err();
    let far = |&asked: &AskedStub| Some((asked, found[asked.asked].filter(is_far)?));
    let far: Vec<(AskedStub, ExecutorAddr)> = claim.function_stubs.iter().filter_map(far).collect();
    if far.is_empty() {
        return Ok(());
    }
    let are_code = runtime.are_code(far.iter().map(|&(_, addr)| addr).collect())?;
    let functions = far.iter().zip(are_code).filter(|&(_, is_code)| is_code);
    let stub =
        |(asked, _): &(AskedStub, ExecutorAddr)| claim.objects[asked.position].graph.symbol_address(asked.stub.stub);
    let stubs: HashMap<usize, ExecutorAddr> =
        functions.filter_map(|(far, _)| Some((far.0.asked, stub(far)?))).collect();
    for claimed in &mut claim.objects {
        for &(symbol, target) in &claimed.targets {
            if let Target::Ask(asked) = target
                && let Some(&stub) = stubs.get(&asked)
            {
                claimed.graph.set_address(symbol, stub);
            }
        }
    }
    for (AskedStub { position, stub, .. }, addr) in far {
        claim.objects[position].graph.set_address(stub.function, addr);
    }
    Ok(())
}

/// Returns the addresses of the names that the batch asks for, with one call if any of them is not known.
fn ask(library: &LibraryInner, runtime: &Runtime, claim: &Claim) -> Result<Vec<Option<ExecutorAddr>>, Error> {
    if claim.asked.is_empty() {
        return Ok(Vec::new());
    }
    let opened = runtime.opened();
    let mut found = vec![None; claim.asked.len()];
    let mut unknown = Vec::new();
    {
        let mut state = library.lock();
        for (position, (name, is_weak)) in claim.asked.iter().enumerate() {
            match state.resolved.get(name, *is_weak, opened) {
                Some(known) => found[position] = known,
                None => unknown.push(position),
            }
        }
    }
    if unknown.is_empty() {
        return Ok(found);
    }
    let names: Vec<String> = unknown.iter().map(|&position| claim.asked[position].0.clone()).collect();
    let answers = runtime.resolve(&claim.shared, &names)?;
    let mut state = library.lock();
    for ((position, name), answer) in unknown.into_iter().zip(&names).zip(answers) {
        found[position] = answer;
        // What another shared library had to say counts for others only.
        if state.shared == claim.shared {
            state.resolved.insert(name, answer, opened);
        }
    }
    Ok(found)
}

/// Finds where every external thread-local variable of the batch is, once its own have their module.
pub(crate) fn resolve_thread_local(library: &LibraryInner, claim: &mut Claim) -> Result<(), Error> {
    let is_wanted = claim
        .objects
        .iter()
        .any(|claimed| claimed.targets.iter().any(|&(symbol, _)| claimed.graph.is_thread_local(symbol)));
    if !is_wanted {
        return Ok(());
    }
    let shared = thread_local::of_shared_libraries(&library.session, claim)?;
    let others = addresses_of_others(library, claim)?;
    let mut undefined: BTreeMap<usize, Vec<String>> = BTreeMap::new();
    for position in 0..claim.objects.len() {
        for index in 0..claim.objects[position].targets.len() {
            let graph = &claim.objects[position].graph;
            let (symbol, target) = claim.objects[position].targets[index];
            if !graph.is_thread_local(symbol) {
                continue;
            }
            let tls: Option<TlsAddress> = match target {
                Target::Known(value) => value.thread_local(),
                Target::Batch(position, symbol) => claim.objects[position].graph.tls_address(symbol),
                Target::Other(_) => others.winner(graph.symbol_name(symbol)).and_then(Value::thread_local),
                Target::Bound(_) => None,
                Target::Ask(asked) => shared.get(&asked).copied().flatten(),
            };
            if let (Target::Ask(asked), None, false) = (target, tls, graph.is_weak_external(symbol)) {
                undefined.entry(asked).or_default().push(graph.name().to_owned());
            }
            if let Some(tls) = tls {
                claim.objects[position].graph.set_tls_address(symbol, tls);
            }
        }
    }
    report(claim, undefined)
}

/// The library's definitions once the objects that other threads were linking have settled.
struct Others<'a>(Option<MutexGuard<'a, State>>);

impl Others<'_> {
    fn winner(&self, name: &str) -> Option<Value> {
        self.0.as_ref()?.table.winner(name)?.value()
    }
}

/// Waits for the objects of this batch's references that other threads are linking.
fn addresses_of_others<'a>(library: &'a LibraryInner, claim: &Claim) -> Result<Others<'a>, Error> {
    if claim.others.is_empty() {
        return Ok(Others(None));
    }
    let state = library.wait_settled(&claim.others);
    let failed = claim.others.iter().map(|&id| &state.objects[id.0 as usize]);
    match { failed }.find(|slot| !matches!(slot.state, ObjectState::Linked(_))) {
        Some(slot) => Err(Error::Dependency { object: slot.name.to_string() }),
        None => Ok(Others(Some(state))),
    }
}

/// Checks that every name that somebody needs was found; names all that were not, and who needs them.
fn check_defined(
    claim: &mut Claim,
    found: &[Option<ExecutorAddr>],
    bounds: &[Option<ExecutorAddr>],
) -> Result<(), Error> {
    let is_missing = |target: Target| match target {
        Target::Ask(position) if found[position].is_none() => Some(position),
        _ => None,
    };
    let mut undefined: BTreeMap<usize, Vec<String>> = BTreeMap::new();
    for root in claim.roots.iter().filter_map(|&root| is_missing(root)) {
        undefined.entry(root).or_default();
    }
    let mut missing_bounds = Vec::new();
    for claimed in &claim.objects {
        let graph = &claimed.graph;
        let strong = claimed.targets.iter().filter(|&&(symbol, _)| !graph.is_weak_external(symbol));
        for &(symbol, target) in strong {
            if let Target::Bound(position) = target
                && bounds[position].is_none()
            {
                missing_bounds.push((graph.symbol_name(symbol).to_owned(), graph.name().to_owned()));
            }
            // Those of threads are looked for elsewhere.
            if let Some(position) = is_missing(target).filter(|_| !graph.is_thread_local(symbol)) {
                let users = undefined.entry(position).or_default();
                // One object may refer to a name through several of its symbols.
                if users.last().map(String::as_str) != Some(graph.name()) {
                    users.push(graph.name().to_owned());
                }
            }
        }
    }
    for (name, user) in missing_bounds {
        claim.asked.push((name, false));
        undefined.entry(claim.asked.len() - 1).or_default().push(user);
    }
    report(claim, undefined)
}

fn report(claim: &Claim, undefined: BTreeMap<usize, Vec<String>>) -> Result<(), Error> {
    if undefined.is_empty() {
        return Ok(());
    }
    let named = undefined.into_iter();
    let named = named.map(|(position, users)| UndefinedSymbol { name: claim.asked[position].0.clone(), users });
    Err(Error::Undefined(named.collect()))
}

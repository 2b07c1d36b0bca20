//! The thread-local variables of a batch: a module of the executor's dynamic linker's, and those of shared libraries.

use crate::Error;
use crate::claim::{Claim, Claimed, Target};
use crate::session::SessionInner;
use farlink_addr::ExecutorAddr;
use farlink_graph::{LinkGraph, TlsAddress, TlsModule, Together};
use farlink_mem::WorkingMemory;
use farlink_wire::msg::{TlsName, TlsPlace, TlsTemplate};
use std::collections::{BTreeMap, HashSet};

/// What a batch's thread-local variables are called in a session without an executor: as natively in a program.
const IMAGE_MODULE: u64 = 1;

/// The module of a batch in the executor.
pub(crate) struct OpenModule {
    pub(crate) handle: ExecutorAddr,
    /// For each object of the batch, whether it has variables in it, and so closes it at its end.
    pub(crate) users: Vec<bool>,
}

/// Gives every thread the batch's own variables, and every external one its place. All addresses have to be known.
pub(crate) fn place(session: &SessionInner, claim: &mut Claim) -> Result<Option<OpenModule>, Error> {
    let graphs: Vec<&LinkGraph> = claim.objects.iter().map(|claimed| &*claimed.graph).collect();
    let Some(variables) = Together::thread_local(&graphs)? else { return Ok(None) };
    let (module, open) = open(session, claim, &variables)?;
    for (position, claimed) in claim.objects.iter_mut().enumerate() {
        // Their addresses are offsets in the module.
        variables.assign(position, &mut claimed.graph, ExecutorAddr::NULL);
        claimed.graph.set_tls_module(module);
    }
    Ok(open)
}

/// Makes the module of the batch.
fn open(session: &SessionInner, claim: &Claim, variables: &Together) -> Result<(TlsModule, Option<OpenModule>), Error> {
    let Some(runtime) = &session.runtime else {
        let size = variables.align().align_up(variables.size()).and_then(|size| i64::try_from(size).ok());
        return Ok((TlsModule { id: IMAGE_MODULE, tp_offset: size.map(|size| -size) }, None));
    };
    let memory = WorkingMemory::in_heap(variables.content_bytes())?;
    for (position, claimed) in claim.objects.iter().enumerate() {
        variables.fix_up(position, &claimed.graph, &memory)?;
    }
    let mut content = vec![0; memory.len() as usize];
    memory.read(0, &mut content)?;
    let users: Vec<bool> = (0..claim.objects.len()).map(|position| variables.has(position)).collect();
    let template = TlsTemplate {
        content: content.into(),
        size: variables.size(),
        align: variables.align().bytes(),
        is_static: claim.objects.iter().any(wants_static),
        users: users.iter().filter(|&&user| user).count() as u64,
    };
    let (handle, place) = runtime.open_tls(&template)?;
    let tp_offset = place.tp_offset.map(|offset| offset as i64);
    Ok((TlsModule { id: place.module, tp_offset }, Some(OpenModule { handle, users })))
}

/// Whether an object wants variables of this batch at one distance from every thread's pointer.
fn wants_static(claimed: &Claimed) -> bool {
    let elsewhere = claimed.targets.iter().filter(|(_, target)| !matches!(target, Target::Batch(..)));
    let elsewhere: HashSet<_> = elsewhere.map(|&(symbol, _)| symbol).collect();
    claimed.graph.static_tls_targets().any(|id| !elsewhere.contains(&id))
}

/// Asks the executor for the variables of shared libraries that the batch refers to: by their position among the names
/// that it is asked for.
pub(crate) fn of_shared_libraries(
    session: &SessionInner,
    claim: &Claim,
) -> Result<BTreeMap<usize, Option<TlsAddress>>, Error> {
    let mut wanted: BTreeMap<usize, bool> = BTreeMap::new();
    for claimed in &claim.objects {
        let is_static: HashSet<_> = claimed.graph.static_tls_targets().collect();
        for &(symbol, target) in &claimed.targets {
            if let (Target::Ask(position), true) = (target, claimed.graph.is_thread_local(symbol)) {
                *wanted.entry(position).or_default() |= is_static.contains(&symbol);
            }
        }
    }
    if wanted.is_empty() {
        return Ok(BTreeMap::new());
    }
    let Some(runtime) = &session.runtime else {
        let nowhere = TlsAddress { module: IMAGE_MODULE, offset: 0, tp_offset: Some(0) };
        return Ok(wanted.into_keys().map(|position| (position, session.undefined_zero.then_some(nowhere))).collect());
    };
    let names: Vec<TlsName> = wanted
        .iter()
        .map(|(&position, &is_static)| TlsName { name: claim.asked[position].0.clone(), is_static })
        .collect();
    let places = runtime.resolve_tls(&names)?;
    let address = |place: TlsPlace| TlsAddress {
        module: place.module,
        offset: place.offset,
        tp_offset: place.tp_offset.map(|offset| offset as i64),
    };
    Ok(wanted.into_keys().zip(places.into_iter().map(|place| place.map(address))).collect())
}

//! Memory: ranges that the controller shares (POSIX shared memory), and private ones whose content arrives in messages.

use crate::registry::{Session, session};
use crate::services::unwind;
use crate::wrap::{self, OutOfBand, wrappers};
use farlink_addr::{ExecutorAddr, ExecutorAddrRange};
use farlink_mem::wrapper::WrapperResult;
use farlink_mem::{Allocation, Error};
use farlink_wire::functions::{Expected, SIMPLE_FINALIZE, SIMPLE_INITIALIZE, SIMPLE_INITIALIZE_BATCH};
use farlink_wire::msg::{FinalizeRequest, MemoryUsage, Segment, SharedFinalizeRequest, Stripe};
use farlink_wire::setup::ExecutorInfo;
use farlink_wire::sps::{Blob, SpsError};

wrappers! { announce_plain:
    SHARED_RESERVE => shared_reserve = reserve_shared;
    SHARED_INITIALIZE => shared_initialize = initialize_shared;
    SHARED_INITIALIZE_BATCH => shared_initialize_batch = initialize_shared_batch;
    SHARED_DEINITIALIZE => shared_deinitialize = deinitialize_shared;
    SHARED_RELEASE => shared_release = release_shared;
    SIMPLE_RESERVE => simple_reserve = reserve_simple;
    SIMPLE_DEINITIALIZE => simple_deinitialize = deinitialize_simple;
    SIMPLE_RELEASE => simple_release = release_simple;
    SIMPLE_DEALLOCATE => simple_deallocate = release_simple;
    PLACE_BELOW => place_below = place;
    MEMORY_USAGE => memory_usage = usage;
}

wrappers! { announce_with_descriptors:
    SHARED_MAP => shared_map = map_shared;
    SHARED_MAP_AT => shared_map_at = map_shared_at;
    SHARED_RENEW => shared_renew = renew;
}

/// Announces the functions of both services.
pub(crate) fn announce(info: &mut ExecutorInfo) {
    announce_plain(info);
    SIMPLE_FINALIZE.announce(wrap::address(simple_finalize), info);
    SIMPLE_INITIALIZE.announce(wrap::address(simple_initialize), info);
    SIMPLE_INITIALIZE_BATCH.announce(wrap::address(simple_initialize_batch), info);
}

type Keys = Vec<ExecutorAddr>;

fn text<T>(result: Result<T, Error>) -> Expected<T> {
    result.map_err(|error| error.to_string())
}

fn reserve_shared((instance, bytes): (ExecutorAddr, u64)) -> Result<Expected<(ExecutorAddr, String)>, OutOfBand> {
    let reserved = session(instance)?.shared.reserve_shared(bytes);
    Ok(text(reserved.map(|(range, name)| (range.start(), name))))
}

fn map_shared(
    (instance, tag, bytes, stripes): (ExecutorAddr, u64, u64, Vec<Stripe>),
) -> Result<Expected<ExecutorAddr>, OutOfBand> {
    map_received(instance, tag, bytes, &stripes, None)
}

fn map_shared_at(
    (instance, tag, bytes, stripes, base): (ExecutorAddr, u64, u64, Vec<Stripe>, ExecutorAddr),
) -> Result<Expected<ExecutorAddr>, OutOfBand> {
    map_received(instance, tag, bytes, &stripes, Some(base))
}

fn map_received(
    instance: ExecutorAddr,
    tag: u64,
    bytes: u64,
    stripes: &[Stripe],
    base: Option<ExecutorAddr>,
) -> Result<Expected<ExecutorAddr>, OutOfBand> {
    let session = session(instance)?;
    let Some(object) = session.endpoint()?.take_descriptor(tag) else {
        return Ok(Err(format!("no descriptor has come with the tag {tag}")));
    };
    Ok(text(session.shared.reserve_received(object, bytes, stripes, base).map(|range| range.start())))
}

fn renew((instance, pages): (ExecutorAddr, ExecutorAddrRange)) -> Result<SpsError, OutOfBand> {
    Ok(SpsError(text(session(instance)?.shared.renew(pages))))
}

fn shared_allocation((base, request): (ExecutorAddr, SharedFinalizeRequest)) -> Allocation<'static> {
    let segments = request.segments.into_iter().map(|segment| Segment {
        group: segment.group,
        addr: segment.addr,
        size: segment.size,
        content: Blob::default(),
    });
    Allocation { slab: Some(base), segments: segments.collect(), actions: request.actions }
}

fn initialize_shared(
    (instance, base, request): (ExecutorAddr, ExecutorAddr, SharedFinalizeRequest),
) -> Result<Expected<ExecutorAddr>, OutOfBand> {
    if request.segments.is_empty() && request.actions.is_empty() {
        session(instance)?;
        return Ok(Ok(ExecutorAddr::new(u64::MAX)));
    }
    let keys = session(instance)?.shared.initialize(vec![shared_allocation((base, request))]);
    Ok(text(keys).map(|keys| keys[0]))
}

fn initialize_shared_batch(
    (instance, requests): (ExecutorAddr, Vec<(ExecutorAddr, SharedFinalizeRequest)>),
) -> Result<Expected<Keys>, OutOfBand> {
    Ok(text(session(instance)?.shared.initialize(requests.into_iter().map(shared_allocation).collect())))
}

fn deinitialize_shared((instance, keys): (ExecutorAddr, Keys)) -> Result<SpsError, OutOfBand> {
    let session = session(instance)?;
    let mut keys = something(&session, keys);
    if !session.is_farlink {
        // LLVM's controllers also deinitialize what they have abandoned and never initialized.
        keys.retain(|&key| session.shared.has_allocation(key) || !session.shared.is_reserved(key));
    }
    Ok(SpsError(text(session.shared.deinitialize(&keys))))
}

fn release_shared((instance, bases): (ExecutorAddr, Keys)) -> Result<SpsError, OutOfBand> {
    Ok(SpsError(text(session(instance)?.shared.release(&bases))))
}

/// What LLVM takes nothing to be: a reservation of no bytes, and an allocation without segments.
const NOTHING: [ExecutorAddr; 2] = [ExecutorAddr::NULL, ExecutorAddr::new(u64::MAX)];

fn something(session: &Session, mut addresses: Keys) -> Keys {
    if !session.is_farlink {
        addresses.retain(|address| !NOTHING.contains(address));
    }
    addresses
}

fn reserve_simple((instance, bytes): (ExecutorAddr, u64)) -> Result<Expected<ExecutorAddr>, OutOfBand> {
    if bytes == 0 {
        // Controllers reserve that much for objects that have no memory.
        session(instance)?;
        return Ok(Ok(ExecutorAddr::NULL));
    }
    Ok(text(session(instance)?.private.reserve_private(bytes).map(|range| range.start())))
}

fn simple_allocation(request: FinalizeRequest<'_>) -> Allocation<'_> {
    Allocation { slab: None, segments: request.segments, actions: request.actions }
}

fn ranges(allocation: &Allocation<'_>) -> Vec<ExecutorAddrRange> {
    let segments = allocation.segments.iter();
    segments.filter_map(|segment| ExecutorAddrRange::from_len(segment.addr, segment.size)).collect()
}

/// Content is copied once, from the message to its place, so these two take their arguments undecoded.
unsafe extern "C" fn simple_initialize(args: *const u8, size: usize) -> WrapperResult {
    let initialize = |bytes: &[u8]| {
        let (instance, request) = wrap::decode::<(ExecutorAddr, _)>(SIMPLE_INITIALIZE.name(), bytes)?;
        let allocation = simple_allocation(request);
        let ranges = ranges(&allocation);
        let keys = session(instance)?.private.initialize(vec![allocation]);
        if keys.is_ok() {
            ranges.into_iter().for_each(unwind::content_arrived);
        }
        Ok(text(keys).map(|keys| keys[0]))
    };
    // SAFETY: whoever calls a wrapper function passes `size` bytes.
    unsafe { wrap::call_with_bytes(SIMPLE_INITIALIZE.name(), args, size, initialize) }
}

/// LLVM 19's: the lowest segment begins at a reservation, which goes if this fails.
unsafe extern "C" fn simple_finalize(args: *const u8, size: usize) -> WrapperResult {
    let finalize = |bytes: &[u8]| {
        let (instance, request) = wrap::decode::<(ExecutorAddr, FinalizeRequest<'_>)>(SIMPLE_FINALIZE.name(), bytes)?;
        if request.segments.is_empty() && request.actions.is_empty() {
            session(instance)?;
            return Ok(SpsError(Ok(())));
        }
        let private = &session(instance)?.private;
        let Some(base) = request.segments.iter().map(|segment| segment.addr).min() else {
            return Ok(SpsError(Err(Error::NoSegments.to_string())));
        };
        let allocation = Allocation { slab: Some(base), ..simple_allocation(request) };
        let ranges = ranges(&allocation);
        let finalized = private.initialize(vec![allocation]).map(drop);
        if finalized.is_ok() {
            ranges.into_iter().for_each(unwind::content_arrived);
        } else {
            // The controller takes it to have gone. If it is no reservation, there is nothing to release.
            let _ = private.release(&[base]);
        }
        Ok(SpsError(text(finalized)))
    };
    // SAFETY: whoever calls a wrapper function passes `size` bytes.
    unsafe { wrap::call_with_bytes(SIMPLE_FINALIZE.name(), args, size, finalize) }
}

unsafe extern "C" fn simple_initialize_batch(args: *const u8, size: usize) -> WrapperResult {
    let initialize = |bytes: &[u8]| {
        let (instance, requests) = wrap::decode::<(ExecutorAddr, Vec<_>)>(SIMPLE_INITIALIZE_BATCH.name(), bytes)?;
        let keys = session(instance)?.private.initialize(requests.into_iter().map(simple_allocation).collect());
        Ok(text(keys))
    };
    // SAFETY: whoever calls a wrapper function passes `size` bytes.
    unsafe { wrap::call_with_bytes(SIMPLE_INITIALIZE_BATCH.name(), args, size, initialize) }
}

fn deinitialize_simple((instance, keys): (ExecutorAddr, Keys)) -> Result<SpsError, OutOfBand> {
    let session = session(instance)?;
    let mut keys = something(&session, keys);
    if !session.is_farlink {
        keys.retain(|&key| session.private.has_allocation(key) || !session.private.is_reserved(key));
    }
    Ok(SpsError(text(session.private.deinitialize(&keys))))
}

fn release_simple((instance, bases): (ExecutorAddr, Keys)) -> Result<SpsError, OutOfBand> {
    let session = session(instance)?;
    let bases = something(&session, bases);
    Ok(SpsError(text(session.private.release(&bases))))
}

fn place((instance, limit): (ExecutorAddr, u64)) -> Result<SpsError, OutOfBand> {
    let session = session(instance)?;
    session.shared.place_below(ExecutorAddr::new(limit));
    session.private.place_below(ExecutorAddr::new(limit));
    Ok(SpsError(Ok(())))
}

/// Adds up both services.
fn usage((instance,): (ExecutorAddr,)) -> Result<Expected<MemoryUsage>, OutOfBand> {
    let session = session(instance)?;
    let services = [session.shared.usage(), session.private.usage()];
    let mut sum = MemoryUsage::default();
    for usage in services {
        match usage {
            Ok(usage) => {
                sum.committed_bytes += usage.committed_bytes;
                sum.mappings += usage.mappings;
            }
            Err(error) => return Ok(Err(error.to_string())),
        }
    }
    let calls = farlink_mem::system_calls().chain(farlink_rpc::system_calls()).filter(|&(_, count)| count > 0);
    sum.system_calls = calls.map(|(name, count)| (name.to_owned(), count)).collect();
    Ok(Ok(sum))
}

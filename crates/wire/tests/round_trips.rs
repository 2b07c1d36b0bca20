//! Properties of the encoding of every type: values survive it, and no bytes are trusted.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use farlink_addr::{AllocGroup, ExecutorAddr, ExecutorAddrRange, MemLifetime, MemProt};
use farlink_wire::frame::{FrameError, HEADER_BYTES, Header, MAX_FRAME_BYTES, Opcode};
use farlink_wire::functions::{self, Function};
use farlink_wire::msg::*;
use farlink_wire::setup::ExecutorInfo;
use farlink_wire::sps::{Blob, Decode, DecodeError, Encode, SpsError, from_bytes, to_bytes};
use proptest::collection::vec;
use proptest::prelude::*;
use std::fmt::Debug;

/// What holds of any value of any type: it decodes to itself, whatever follows; it is not shorter than its type
/// says; none of its beginnings decodes.
fn survives<T: Encode + for<'a> Decode<'a> + PartialEq + Debug>(value: &T) -> Result<(), TestCaseError> {
    let mut bytes = to_bytes(value);
    prop_assert!(bytes.len() >= <T as Decode<'_>>::MIN_BYTES);
    prop_assert_eq!(&from_bytes::<T>(&bytes).unwrap(), value);
    for cut in 0..bytes.len() {
        prop_assert!(from_bytes::<T>(&bytes[..cut]).is_err(), "{cut} of {} bytes decode", bytes.len());
    }
    bytes.extend_from_slice(b"what follows");
    prop_assert_eq!(&from_bytes::<T>(&bytes).unwrap(), value);
    Ok(())
}

/// The same for types that borrow from the message.
macro_rules! borrowing_survives {
    ($value:expr, $type:ty) => {{
        let mut bytes = to_bytes(&$value);
        prop_assert!(bytes.len() >= <$type as Decode<'_>>::MIN_BYTES);
        prop_assert_eq!(&from_bytes::<$type>(&bytes).unwrap(), &$value);
        for cut in 0..bytes.len() {
            prop_assert!(from_bytes::<$type>(&bytes[..cut]).is_err(), "{cut} of {} bytes decode", bytes.len());
        }
        bytes.extend_from_slice(b"what follows");
        prop_assert_eq!(&from_bytes::<$type>(&bytes).unwrap(), &$value);
    }};
}

fn addr() -> impl Strategy<Value = ExecutorAddr> {
    any::<u64>().prop_map(ExecutorAddr::new)
}

fn range() -> impl Strategy<Value = ExecutorAddrRange> {
    (addr(), addr()).prop_map(|(a, b)| ExecutorAddrRange::new(a.min(b), a.max(b)).unwrap())
}

fn bytes() -> impl Strategy<Value = Vec<u8>> {
    vec(any::<u8>(), 0..20)
}

fn blob() -> impl Strategy<Value = Blob<'static>> {
    bytes().prop_map(Blob::from)
}

fn text() -> impl Strategy<Value = String> {
    vec(any::<char>(), 0..8).prop_map(String::from_iter)
}

fn group() -> impl Strategy<Value = AllocGroup> {
    (0u8..8, any::<bool>()).prop_map(|(prot, finalize)| AllocGroup {
        prot: MemProt::from_bits(prot).unwrap(),
        lifetime: if finalize { MemLifetime::Finalize } else { MemLifetime::Standard },
    })
}

/// A call that is there: the null address would mean that it is not.
fn wrapper_call() -> impl Strategy<Value = WrapperFunctionCall> {
    (1..=u64::MAX, blob())
        .prop_map(|(function, args)| WrapperFunctionCall { function: ExecutorAddr::new(function), args })
}

fn action_pair() -> impl Strategy<Value = ActionPair> {
    let call = || proptest::option::of(wrapper_call());
    (call(), call()).prop_map(|(finalize, dealloc)| ActionPair { finalize, dealloc })
}

fn actions() -> impl Strategy<Value = Vec<ActionPair>> {
    vec(action_pair(), 0..3)
}

fn shared_segment() -> impl Strategy<Value = SharedSegment> {
    (group(), addr(), any::<u64>()).prop_map(|(group, addr, size)| SharedSegment { group, addr, size })
}

fn shared_request() -> impl Strategy<Value = SharedFinalizeRequest> {
    (vec(shared_segment(), 0..4), actions()).prop_map(|(segments, actions)| SharedFinalizeRequest { segments, actions })
}

fn segment() -> impl Strategy<Value = Segment<'static>> {
    (group(), addr(), any::<u64>(), blob()).prop_map(|(group, addr, size, content)| Segment {
        group,
        addr,
        size,
        content,
    })
}

fn request() -> impl Strategy<Value = FinalizeRequest<'static>> {
    (vec(segment(), 0..4), actions()).prop_map(|(segments, actions)| FinalizeRequest { segments, actions })
}

fn lookup_name() -> impl Strategy<Value = LookupName> {
    (text(), any::<bool>()).prop_map(|(name, required)| LookupName { name, required })
}

fn symbol_def() -> impl Strategy<Value = SymbolDef> {
    (addr(), any::<u8>(), any::<u8>()).prop_map(|(addr, flags, target_flags)| SymbolDef { addr, flags, target_flags })
}

fn fini_array() -> impl Strategy<Value = FiniArray> {
    (range(), any::<u32>()).prop_map(|(array, priority)| FiniArray { array, priority })
}

fn object_exits() -> impl Strategy<Value = ObjectExits> {
    (addr(), vec(fini_array(), 0..3)).prop_map(|(dso_handle, fini)| ObjectExits { dso_handle, fini })
}

fn initializers() -> impl Strategy<Value = RunInitializers> {
    let ifuncs = vec((addr(), addr()), 0..3);
    (vec(range(), 0..3), vec(object_exits(), 0..3), ifuncs, vec(blob(), 0..3))
        .prop_map(|(init, exits, ifuncs, args)| RunInitializers { ifuncs, init, exits, args })
}

fn main_call() -> impl Strategy<Value = MainCall> {
    (addr(), vec(blob(), 0..4)).prop_map(|(main, args)| MainCall { main, args })
}

fn executor_info() -> impl Strategy<Value = ExecutorInfo> {
    (text(), any::<u64>(), vec((text(), bytes()), 0..4), vec((text(), addr()), 0..4)).prop_map(
        |(triple, page_size, bootstrap_map, bootstrap_symbols)| ExecutorInfo {
            triple,
            page_size,
            bootstrap_map,
            bootstrap_symbols,
        },
    )
}

fn header() -> impl Strategy<Value = Header> {
    let opcode = prop_oneof![Just(Opcode::Setup), Just(Opcode::Hangup), Just(Opcode::Result), Just(Opcode::Call)];
    let payload_bytes = 0..=MAX_FRAME_BYTES - HEADER_BYTES as u64;
    (opcode, any::<u64>(), addr(), payload_bytes).prop_map(|(opcode, sequence, tag, payload_bytes)| Header {
        opcode,
        sequence,
        tag,
        payload_bytes,
    })
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    /// Numbers, and tuples of up to five.
    #[test]
    fn numbers_survive(value in any::<(u8, u16, u32, u64)>(), signed in any::<(i32, i64, bool)>()) {
        survives(&(value.0,))?;
        survives(&value)?;
        survives(&signed)?;
        survives(&(signed.0, signed.1))?;
        survives(&(value.1, signed.2, value.2, signed.1, value.0))?;
        survives(&())?;
    }

    /// Addresses, ranges, texts, bytes and sequences of them.
    #[test]
    fn simple_values_survive(addr in addr(), range in range(), text in text(), bytes in bytes(), blob in blob()) {
        survives(&addr)?;
        survives(&range)?;
        survives(&vec![text.clone(), text.clone()])?;
        survives(&vec![bytes.clone(), bytes.clone()])?;
        survives(&vec![(addr, range); 3])?;
        survives(&text)?;
        survives(&bytes)?;
        borrowing_survives!(blob, Blob<'_>);
    }

    /// Options, errors and expected values.
    #[test]
    fn outcomes_survive(
        option in proptest::option::of(symbol_def()),
        error in proptest::option::of(text()),
        value in addr(),
    ) {
        survives(&vec![option, None, option])?;
        survives(&option)?;
        survives(&SpsError(error.clone().map_or(Ok(()), Err)))?;
        survives(&error.map_or(Ok(value), Err))?;
        survives(&Ok::<Vec<Option<ExecutorAddr>>, String>(vec![None, Some(value)]))?;
    }

    /// Requests to finalize, and what they are made of.
    #[test]
    fn finalize_requests_survive(
        group in group(),
        call in wrapper_call(),
        pair in action_pair(),
        shared in shared_request(),
        request in request(),
    ) {
        survives(&group)?;
        survives(&call)?;
        survives(&pair)?;
        survives(&shared)?;
        borrowing_survives!(request, FinalizeRequest<'_>);
    }

    /// Lookups, initializers, calls of main.
    #[test]
    fn other_messages_survive(
        name in lookup_name(),
        symbol in symbol_def(),
        initializers in initializers(),
        main in main_call(),
    ) {
        survives(&name)?;
        survives(&symbol)?;
        survives(&initializers)?;
        survives(&main)?;
    }

    /// The Setup message.
    #[test]
    fn setup_survives(info in executor_info()) {
        survives(&info)?;
    }

    /// A header decodes to itself.
    #[test]
    fn headers_survive(header in header()) {
        prop_assert_eq!(Header::parse(&header.to_bytes()), Ok(header));
    }

    /// Any 32 bytes are refused, or are a header that encodes to the same bytes. Small words make real headers
    /// likely.
    #[test]
    fn any_bytes_are_a_header_or_an_error(
        words in any::<[u64; 4]>(),
        small in [0u64..100, 0u64..6, 0u64..100, 0u64..100],
    ) {
        for words in [words, small] {
            let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
            let bytes: [u8; HEADER_BYTES] = bytes.try_into().unwrap();
            match Header::parse(&bytes) {
                Ok(header) => prop_assert_eq!(header.to_bytes(), bytes),
                Err(FrameError::TooSmall(size)) => prop_assert!(size < 32),
                Err(FrameError::TooLarge(size)) => prop_assert!(size > MAX_FRAME_BYTES),
                Err(FrameError::UnknownOpcode(opcode)) => prop_assert!(opcode > 3),
                Err(other) => panic!("{other}"),
            }
        }
    }

    /// Any bytes give a value or an error, for every type; and a value that they give is one that survives.
    #[test]
    fn any_bytes_decode_or_fail(bytes in vec(any::<u8>(), 0..200)) {
        all_types_are_total(&bytes)?;
    }

    /// The same for bytes in which lengths are likely to be possible.
    #[test]
    fn likely_bytes_decode_or_fail(words in vec(prop_oneof![0u64..5, any::<u64>()], 0..30), cut in 0usize..8) {
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        all_types_are_total(&bytes[cut.min(bytes.len())..])?;
    }

    /// The same for requests with one byte changed.
    #[test]
    fn damaged_requests_decode_or_fail(request in request(), at in any::<prop::sample::Index>(), byte in any::<u8>()) {
        let mut bytes = to_bytes(&request);
        let at = at.index(bytes.len());
        bytes[at] = byte;
        all_types_are_total(&bytes)?;
    }
}

/// Decodes `bytes` as a type; what they are the encoding of must decode to itself.
fn is_total<T: Encode + for<'a> Decode<'a> + PartialEq + Debug>(bytes: &[u8]) -> Result<(), TestCaseError> {
    if let Ok(value) = from_bytes::<T>(bytes) {
        prop_assert_eq!(&from_bytes::<T>(&to_bytes(&value)).unwrap(), &value);
    }
    Ok(())
}

fn all_types_are_total(bytes: &[u8]) -> Result<(), TestCaseError> {
    macro_rules! check {
        ($($type:ty),* $(,)?) => { $(is_total::<$type>(bytes)?;)* };
    }
    check!(u8, u16, u32, u64, i32, i64, bool, (), ExecutorAddr, ExecutorAddrRange, AllocGroup);
    check!(String, Vec<u8>, Vec<String>, Vec<Vec<u8>>, Option<String>, SpsError, Result<u64, String>);
    check!(Vec<(ExecutorAddr, u8)>, Result<Vec<Option<SymbolDef>>, String>, Result<(ExecutorAddr, String), String>);
    check!(WrapperFunctionCall, ActionPair, SharedSegment, SharedFinalizeRequest, LookupName, SymbolDef, FiniArray);
    check!(ObjectExits, RunInitializers, MainCall, ExecutorInfo);
    let _ = from_bytes::<Blob<'_>>(bytes);
    // What has no bytes cannot be counted by them: no message has a sequence of nothing.
    let _ = from_bytes::<Vec<()>>(bytes);
    if let Ok(value) = from_bytes::<FinalizeRequest<'_>>(bytes) {
        let encoded = to_bytes(&value);
        prop_assert_eq!(&from_bytes::<FinalizeRequest<'_>>(&encoded).unwrap(), &value);
    }
    Ok(())
}

/// A length that cannot be true is an error that names it, for sequences of anything, at any depth; taking memory for
/// it would end the test.
#[test]
fn impossible_lengths_are_refused() {
    fn refused<T: for<'a> Decode<'a> + Debug>(before: &[u8]) {
        for count in [1 << 60, 1 << 40, u64::MAX, 65] {
            let bytes = [before, &to_bytes(&count), &[0; 64]].concat();
            match from_bytes::<T>(&bytes).unwrap_err() {
                DecodeError::SequenceTooLong { count: claimed, left: 64, .. } => assert_eq!(claimed, count),
                DecodeError::TooShort { needed, left: 64 } => assert_eq!(needed, count),
                other => panic!("{other}"),
            }
        }
    }
    refused::<String>(&[]);
    refused::<Vec<()>>(&[]);
    refused::<Vec<u8>>(&[]);
    refused::<Vec<bool>>(&[]);
    refused::<Vec<Option<SymbolDef>>>(&[]);
    refused::<Vec<String>>(&[]);
    refused::<Vec<String>>(&to_bytes(&1u64));
    refused::<SpsError>(&[1]);
    refused::<Result<u64, String>>(&[0]);
    refused::<Result<Vec<u64>, String>>(&[1]);
    refused::<WrapperFunctionCall>(&[0; 8]);
    refused::<ActionPair>(&[0; 24]);
    refused::<SharedFinalizeRequest>(&[]);
    refused::<SharedFinalizeRequest>(&[0; 8]);
    refused::<LookupName>(&[]);
    refused::<ObjectExits>(&[0; 8]);
    refused::<RunInitializers>(&[0; 16]);
    refused::<MainCall>(&[0; 8]);
    refused::<ExecutorInfo>(&[]);
    refused::<ExecutorInfo>(&[0; 16]);
    refused::<ExecutorInfo>(&[0; 24]);
    let long = [to_bytes(&(1u64 << 60)), vec![0; 64]].concat();
    assert!(from_bytes::<Blob<'_>>(&long).is_err() && from_bytes::<FinalizeRequest<'_>>(&long).is_err());
}

/// A sequence is as long as its bytes allow and no longer.
#[test]
fn sequences_end_with_their_bytes() {
    let encoded = |count: u64| [to_bytes(&count), to_bytes(&(1u64, 2u64))].concat();
    assert_eq!(from_bytes::<Vec<u64>>(&encoded(2)), Ok(vec![1, 2]));
    let error = from_bytes::<Vec<u64>>(&encoded(3)).unwrap_err();
    assert_eq!(error, DecodeError::SequenceTooLong { count: 3, min_bytes: 8, left: 16 });
}

/// Values that a type does not have are refused: groups with unknown bits, ranges that end before they start, texts
/// that are not UTF-8. Error texts are shown all the same.
#[test]
fn invalid_values_are_refused() {
    assert!(matches!(from_bytes::<AllocGroup>(&[0x10]), Err(DecodeError::InvalidValue { value: 0x10, .. })));
    assert!(matches!(
        from_bytes::<ExecutorAddrRange>(&to_bytes(&(2u64, 1u64))),
        Err(DecodeError::InvalidValue { value: 1, .. })
    ));
    let latin = to_bytes(&b"caf\xe9".to_vec());
    assert_eq!(from_bytes::<String>(&latin), Err(DecodeError::NotUtf8 { len: 4 }));
    assert_eq!(from_bytes::<SpsError>(&[&[1], &latin[..]].concat()), Ok(SpsError(Err("caf\u{fffd}".to_owned()))));
}

/// A call of the null address is an absent one, whatever its arguments, and an absent one is sixteen zero bytes.
#[test]
fn absent_actions_are_null_calls() {
    assert_eq!(to_bytes(&ActionPair::default()), [0; 32]);
    let null_call = (ExecutorAddr::NULL, Blob::from(&b"ignored"[..]));
    assert_eq!(from_bytes::<ActionPair>(&to_bytes(&(&null_call, &null_call))), Ok(ActionPair::default()));
}

/// A function is found where it was announced: LLVM's among the symbols, farlink's own in the map. The null address
/// and a value that is no address count as not announced.
#[test]
fn functions_are_found_where_announced() {
    fn check<Args, Ret>(function: Function<Args, Ret>, own: bool) {
        let mut info = ExecutorInfo::default();
        assert_eq!(function.find(&info), None);
        function.announce(ExecutorAddr::new(0x1000), &mut info);
        assert_eq!((info.bootstrap_map.len(), info.bootstrap_symbols.len()), if own { (1, 0) } else { (0, 1) });
        let info: ExecutorInfo = from_bytes(&to_bytes(&info)).unwrap();
        assert_eq!(function.find(&info), Some(ExecutorAddr::new(0x1000)));
        let mut null = ExecutorInfo::default();
        function.announce(ExecutorAddr::NULL, &mut null);
        assert_eq!(function.find(&null), None);
    }
    check(functions::SHARED_RESERVE, false);
    check(functions::RESOLVE, true);
    let short = ExecutorInfo {
        bootstrap_map: vec![(functions::RESOLVE.name().to_owned(), vec![1, 2, 3])],
        ..ExecutorInfo::default()
    };
    assert_eq!(functions::RESOLVE.find(&short), None);
}

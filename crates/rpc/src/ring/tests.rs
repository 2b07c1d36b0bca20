//! The queue against a model of it, and against a peer that writes anything anywhere.

use super::queue::{Inbound, Memory, Outbound, Sent};
use farlink_wire::frame::{HEADER_BYTES, Header, Opcode};
use proptest::prelude::*;
use std::collections::VecDeque;

const WORDS: usize = 64;

/// Bytes that fit a message of this queue beside its header.
const MAX_PAYLOAD: usize = Memory::<WORDS>::MAX_BYTES - HEADER_BYTES;

fn header(sequence: u64, payload_bytes: usize) -> [u8; HEADER_BYTES] {
    let tag = farlink_addr::ExecutorAddr::NULL;
    Header { opcode: Opcode::Call, sequence, tag, payload_bytes: payload_bytes as u64 }.to_bytes()
}

proptest! {
    /// Messages of any length come out as they went in and in that order, however far the cursors have come; there is no
    /// room only if there is little.
    #[test]
    fn messages_come_out_as_they_went_in(
        lengths in prop::collection::vec(0..=MAX_PAYLOAD, 0..200),
        reads in prop::collection::vec(0..4usize, 200),
    ) {
        let (memory, outbound, inbound) = (Memory::<WORDS>::new(), Outbound::default(), Inbound::default());
        let mut sent = VecDeque::new();
        for (sequence, (len, reads)) in lengths.into_iter().zip(reads).enumerate() {
            let payload: Vec<u8> = (0..len).map(|index| (index + sequence) as u8).collect();
            let header = header(sequence as u64, len);
            match outbound.send(&memory, &header, &payload, 0) {
                Ok(Sent::Done | Sent::NobodyReads) => sent.push_back((header, payload)),
                Ok(Sent::NoRoom) => {
                    let waiting: usize = sent.iter().map(|(_, payload)| (HEADER_BYTES + payload.len()).next_multiple_of(64)).sum();
                    prop_assert!(waiting + (HEADER_BYTES + len).next_multiple_of(64) > WORDS * 8);
                }
                Err(corrupt) => prop_assert!(false, "{:?}", corrupt),
            }
            let mut attendant = inbound.attend(&memory).unwrap();
            for _ in 0..reads {
                prop_assert_eq!(attendant.receive().unwrap(), sent.pop_front());
            }
            let _ = attendant.leave();
        }
    }

    /// Whatever a peer writes to the shared memory, at any time: each step of this end returns, with a message that fits or
    /// with an error, and after a bounded number of messages there is no other.
    #[test]
    fn nothing_in_shared_memory_is_believed(
        steps in prop::collection::vec((0..5usize, 0..200usize, prop_oneof![any::<u64>(), 0..300u64]), 0..200),
    ) {
        let (memory, outbound, inbound) = (Memory::<WORDS>::new(), Outbound::default(), Inbound::default());
        for (step, place, value) in steps {
            match step {
                0 => {
                    let len = value as usize % (MAX_PAYLOAD + 1);
                    let _ = outbound.send(&memory, &header(value, len), &vec![1; len], value);
                }
                1 => {
                    let Some(mut attendant) = inbound.attend(&memory) else { continue };
                    for _ in 0..=Memory::<WORDS>::MAX_MESSAGES {
                        match attendant.receive() {
                            Ok(Some((_, payload))) => prop_assert!(payload.len() <= MAX_PAYLOAD),
                            Ok(None) | Err(_) => break,
                        }
                    }
                    prop_assert!(!matches!(attendant.receive(), Ok(Some(_))));
                    let _ = attendant.leave();
                }
                _ => memory.scribble(place, value),
            }
        }
    }
}

/// Cursors that pass the end of their range go on from its beginning.
#[test]
fn cursors_wrap_around() {
    let (memory, outbound, inbound) = (Memory::<WORDS>::new(), Outbound::default(), Inbound::default());
    let near_the_end = u64::MAX - 63;
    memory.scribble(1, near_the_end);
    outbound.start_at(near_the_end);
    inbound.start_at(near_the_end);
    for sequence in 0..20 {
        let header = header(sequence, 11);
        assert_ne!(outbound.send(&memory, &header, &[7; 11], 0), Ok(Sent::NoRoom));
        let mut attendant = inbound.attend(&memory).unwrap();
        assert_eq!(attendant.receive(), Ok(Some((header, vec![7; 11]))));
        assert_eq!(attendant.receive(), Ok(None));
    }
}

/// Whoever writes while a reader is expected need not call it: it finds the message when it comes. While none is, it is to be
/// called.
#[test]
fn a_reader_that_is_expected_need_not_be_called() {
    for is_expected in [true, false] {
        let (memory, outbound, inbound) = (Memory::<WORDS>::new(), Outbound::default(), Inbound::default());
        if is_expected {
            memory.expect_reader();
        }
        let header = header(1, 3);
        let sent = if is_expected { Sent::Done } else { Sent::NobodyReads };
        assert_eq!(outbound.send(&memory, &header, b"abc", 0), Ok(sent));
        let mut attendant = inbound.attend(&memory).unwrap();
        assert_eq!(attendant.receive(), Ok(Some((header, b"abc".to_vec()))));
    }
}

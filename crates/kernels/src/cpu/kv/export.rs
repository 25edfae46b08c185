//! The filled slots of a layer as bytes that do not depend on the block's capacity.
//!
//! Per head: keys, values, scales of keys, scales of values (bytes alone have scales). Keys are
//! interleaved by 16 slots as in memory, the rest of them by their own number; values have no
//! padding. Numbers are in this machine's byte order.

use std::ops::Range;

use super::{KvLayout, KvPlace, SlotNumber};
use crate::cpu::{AlignedBuf, simd::LANES};

impl KvLayout {
    /// Bytes of `slots` exported slots.
    pub fn exported_bytes(&self, number: SlotNumber, slots: usize) -> usize {
        let scales = if number.is_scaled() { 2 * size_of::<f32>() } else { 0 };
        self.kv_heads * slots * (2 * self.head_dim * number.bytes() + scales)
    }

    /// Ranges of the layer's bytes that `slots` slots have, in the order in which they are exported.
    fn exported(&self, number: SlotNumber, slots: usize) -> impl Iterator<Item = Range<usize>> {
        let layout = *self;
        let (size, dim) = (number.bytes(), layout.head_dim);
        let bytes = move |start: usize, len: usize| start * size..(start + len) * size;
        let (whole, rest) = (slots / LANES * LANES, slots % LANES);
        (0..layout.kv_heads).flat_map(move |head| {
            let keys = bytes(layout.key(head, 0), whole * dim);
            // There may be no slot `whole`, but then there is no rest either.
            let rest = (0..if rest > 0 { dim } else { 0 })
                .map(move |d| bytes(layout.key(head, whole) + d * LANES, rest));
            let values = (0..slots).map(move |slot| bytes(layout.value(head, slot), dim));
            std::iter::once(keys).chain(rest).chain(values).chain(layout.scales(head, 0, slots))
        })
    }
}

/// Appends the first `slots` slots of every head to `out`.
///
/// # Panics
/// If slots or the place do not exist, or the place is not one of `number`s.
pub fn export_layer(
    number: SlotNumber,
    memory: &AlignedBuf,
    place: KvPlace,
    slots: usize,
    out: &mut Vec<u8>,
) {
    assert!(slots <= place.layout.slots, "slots exist");
    let layer = &memory.as_slice::<u8>()[byte_range(number, place)];
    out.reserve(place.layout.exported_bytes(number, slots));
    for range in place.layout.exported(number, slots) {
        out.extend_from_slice(&layer[range]);
    }
}

/// Fills the first `slots` slots of every head with what [`export_layer`] wrote from a layer of the
/// same heads and number type, of whatever capacity. Returns whether `bytes` are that many and the
/// slots exist; if not, nothing is written.
///
/// # Panics
/// If the place does not exist or is not one of `number`s.
#[must_use]
pub fn import_layer(
    number: SlotNumber,
    memory: &mut AlignedBuf,
    place: KvPlace,
    slots: usize,
    bytes: &[u8],
) -> bool {
    if slots > place.layout.slots || bytes.len() != place.layout.exported_bytes(number, slots) {
        return false;
    }
    let layer = &mut memory.as_mut_slice::<u8>()[byte_range(number, place)];
    let mut rest = bytes;
    for range in place.layout.exported(number, slots) {
        let (part, after) = rest.split_at(range.len());
        layer[range].copy_from_slice(part);
        rest = after;
    }
    true
}

fn byte_range(number: SlotNumber, place: KvPlace) -> Range<usize> {
    let range = place.range(number);
    range.start * number.bytes()..range.end * number.bytes()
}

//! Keys and values of filled slots as rows of f32, and back: for methods that compare, mix or rotate
//! what is in the cache.

use std::ops::Range;

use half::{bf16, f16};

use super::{
    KvLayout, KvPlace, SlotNumber,
    store::{Source, Store, store},
};
use crate::cpu::{
    AlignedBuf, Isa,
    simd::{LANES, Simd},
};

/// Reads slots `slots` of `head`: keys and values, `[slots, head_dim]` each. An empty `keys` or
/// `values` is not wanted.
///
/// # Panics
/// If head, slots or the place do not exist, the place is not one of `number`s, or there is neither
/// room for all numbers nor none.
pub fn read_slots(
    number: SlotNumber,
    memory: &AlignedBuf,
    place: KvPlace,
    head: usize,
    slots: Range<usize>,
    keys: &mut [f32],
    values: &mut [f32],
) {
    check(place.layout, head, &slots, [keys.len(), values.len()]);
    let (layout, range) = (place.layout, place.range(number));
    let rows = Rows { layout, head, slots, keys, values };
    match number {
        SlotNumber::F32 => rows.read(&memory.as_slice::<f32>()[range], |x| x),
        SlotNumber::F16 => rows.read(&memory.as_slice::<u16>()[range], |x| f16::from_bits(x).to_f32()),
        SlotNumber::Bf16 => rows.read(&memory.as_slice::<u16>()[range], |x| bf16::from_bits(x).to_f32()),
        SlotNumber::I8 => rows.read_bytes(&memory.as_slice::<u8>()[range]),
    }
}

/// Writes slots `slots` of `head` from keys and values `[slots, head_dim]`, rounding as
/// [`append`](super::append) does. Where `keys` or `values` is empty, the slots keep theirs: bytes need
/// not be rounded again if only the other half changes.
///
/// # Panics
/// As [`read_slots`].
pub fn write_slots(
    number: SlotNumber,
    memory: &mut AlignedBuf,
    place: KvPlace,
    head: usize,
    slots: Range<usize>,
    keys: &[f32],
    values: &[f32],
) {
    check(place.layout, head, &slots, [keys.len(), values.len()]);
    let dim = place.layout.head_dim;
    // Bits do not depend on the instruction set.
    store(Isa::best(), number, memory, place, Write { dim, head, slots, keys, values });
}

fn check(layout: KvLayout, head: usize, slots: &Range<usize>, given: [usize; 2]) {
    assert!(head < layout.kv_heads && slots.end <= layout.slots, "head and slots exist");
    let wanted = slots.len() * layout.head_dim;
    assert!(
        given.into_iter().all(|given| given == 0 || given == wanted),
        "all keys or none, all values or none"
    );
}

struct Write<'a> {
    dim: usize,
    head: usize,
    slots: Range<usize>,
    keys: &'a [f32],
    values: &'a [f32],
}

impl Source for Write<'_> {
    #[inline(always)]
    fn feed<S: Simd>(self, s: S, store: &mut impl Store) {
        for (slot, key) in self.slots.clone().zip(self.keys.chunks_exact(self.dim)) {
            store.key(s, self.head, slot, key);
        }
        for (slot, value) in self.slots.zip(self.values.chunks_exact(self.dim)) {
            store.value(s, self.head, slot, value);
        }
    }
}

struct Rows<'a> {
    layout: KvLayout,
    head: usize,
    slots: Range<usize>,
    keys: &'a mut [f32],
    values: &'a mut [f32],
}

impl Rows<'_> {
    fn read<T: Copy>(self, layer: &[T], widen: impl Fn(T) -> f32) {
        let dim = self.layout.head_dim;
        for (slot, key) in self.slots.clone().zip(self.keys.chunks_exact_mut(dim)) {
            let column = layer[self.layout.key(self.head, slot)..].iter().step_by(LANES);
            key.iter_mut().zip(column).for_each(|(to, from)| *to = widen(*from));
        }
        for (slot, value) in self.slots.zip(self.values.chunks_exact_mut(dim)) {
            let from = &layer[self.layout.value(self.head, slot)..];
            value.iter_mut().zip(from).for_each(|(to, from)| *to = widen(*from));
        }
    }

    fn read_bytes(self, layer: &[u8]) {
        let (layout, head, slots, dim) = (self.layout, self.head, self.slots.clone(), self.layout.head_dim);
        let Rows { keys, values, .. } = self;
        let rows = Rows { layout, head, slots: slots.clone(), keys: &mut *keys, values: &mut *values };
        rows.read(layer, |x| f32::from(x.cast_signed()));
        let scale = |at: usize| f32::from_ne_bytes(std::array::from_fn(|i| layer[at + i]));
        for (slot, key) in slots.clone().zip(keys.chunks_exact_mut(dim)) {
            let scale = scale(layout.key_scale(head, slot));
            key.iter_mut().for_each(|x| *x *= scale);
        }
        for (slot, value) in slots.zip(values.chunks_exact_mut(dim)) {
            let scale = scale(layout.value_scale(head, slot));
            value.iter_mut().for_each(|x| *x *= scale);
        }
    }
}

//! Where keys and values of one layer of one block lie, and how they get there.
//!
//! Keys are interleaved by 16 slots, `[kv_heads, slots / 16, head_dim, 16]`: a register holds one
//! dimension of 16 keys, so that scores need no sums across lanes and no transposition, in decode
//! as in prefill. Values are `[kv_heads, slots, value_width]`, `value_width` being `head_dim`
//! rounded up to 16. Slots are rounded up to 16 too.
//!
//! Bytes ([`SlotNumber::I8`]) are followed by the f32 scales of the keys `[kv_heads, slots]` and those
//! of the values `[kv_heads, slots]`: `2 * head_dim + 8` bytes per slot and head.

mod export;
mod slots;
mod store;

use std::ops::Range;

pub(super) use self::store::load_part;
pub use self::{
    export::{export_layer, import_layer},
    slots::{read_slots, write_slots},
    store::{KvRows, append},
};
use super::{AlignedBuf, buffer::Plain, simd::LANES};

/// Alignment of a layer of bytes, for its scales.
const SCALE_ALIGN: usize = 64;

/// Number type of keys and values.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum SlotNumber {
    /// IEEE single.
    F32,
    /// IEEE half; larger magnitudes become ±65,504.
    F16,
    /// bfloat16.
    Bf16,
    /// Integers within ±127 with one f32 scale per key and one per value; the largest magnitude is
    /// 127, and a slot is rounded (to nearest even) once, when it is written. Magnitudes above 65,504
    /// become that first, as for halves; a NaN makes the whole key or value NaN.
    I8,
}

impl SlotNumber {
    /// Bytes of one number, scales apart.
    pub fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
            Self::I8 => 1,
        }
    }

    /// Whether keys and values have scales.
    pub fn is_scaled(self) -> bool {
        self == Self::I8
    }
}

/// Shape of the keys and values of one layer of one block. Offsets and lengths count numbers; scales
/// count as four (they go with numbers of one byte).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KvLayout {
    kv_heads: usize,
    head_dim: usize,
    /// A multiple of 16.
    slots: usize,
    scaled: bool,
}

impl KvLayout {
    /// A layer of `number`s with room for at least `slots` slots per head.
    ///
    /// # Panics
    /// If `head_dim` is no multiple of 8, or anything is 0.
    pub fn of(number: SlotNumber, kv_heads: usize, head_dim: usize, slots: usize) -> Self {
        Self { scaled: number.is_scaled(), ..Self::new(kv_heads, head_dim, slots) }
    }

    /// A layer of numbers without scales; see [`Self::of`].
    ///
    /// # Panics
    /// As [`Self::of`].
    pub fn new(kv_heads: usize, head_dim: usize, slots: usize) -> Self {
        assert!(kv_heads > 0 && head_dim > 0 && slots > 0, "an empty cache layer");
        assert_eq!(head_dim % 8, 0, "head_dim must be a multiple of 8");
        Self { kv_heads, head_dim, slots: slots.next_multiple_of(LANES), scaled: false }
    }

    /// Slots per head, padding included.
    pub fn slots(&self) -> usize {
        self.slots
    }

    /// Numbers of one layer: keys, values, scales. A multiple of 64 for bytes.
    pub fn layer_len(&self) -> usize {
        self.plain_len() + if self.scaled { 2 * 4 * self.kv_heads * self.slots } else { 0 }
    }

    /// Numbers of keys and values.
    fn plain_len(&self) -> usize {
        self.kv_heads * self.slots * (self.head_dim + self.value_width())
    }

    /// Whether a layer of this layout has `kv_heads` heads of `head_dim` `number`s.
    pub(super) fn fits(&self, number: SlotNumber, kv_heads: usize, head_dim: usize) -> bool {
        (self.kv_heads, self.head_dim, self.scaled) == (kv_heads, head_dim, number.is_scaled())
    }

    pub(super) fn head_dim(&self) -> usize {
        self.head_dim
    }

    pub(super) fn value_width(&self) -> usize {
        self.head_dim.next_multiple_of(LANES)
    }

    /// Where the key of `slot` starts; its dimensions are 16 numbers apart.
    pub(super) fn key(&self, head: usize, slot: usize) -> usize {
        (head * self.slots + slot / LANES * LANES) * self.head_dim + slot % LANES
    }

    /// Where the value of `slot` starts.
    pub(super) fn value(&self, head: usize, slot: usize) -> usize {
        self.kv_heads * self.slots * self.head_dim + (head * self.slots + slot) * self.value_width()
    }

    /// Byte where the scale of a key starts in a layer of bytes.
    pub(super) fn key_scale(&self, head: usize, slot: usize) -> usize {
        self.plain_len() + 4 * (head * self.slots + slot)
    }

    /// Byte where the scale of a value starts in a layer of bytes.
    pub(super) fn value_scale(&self, head: usize, slot: usize) -> usize {
        self.key_scale(self.kv_heads + head, slot)
    }

    /// Bytes of `slots` consecutive scales of keys, and those of values; none if there are no scales.
    fn scales(&self, head: usize, slot: usize, slots: usize) -> impl Iterator<Item = Range<usize>> + use<> {
        let scaled = self.scaled;
        let starts = [self.key_scale(head, slot), self.value_scale(head, slot)];
        starts.into_iter().filter(move |_| scaled).map(move |start| start..start + 4 * slots)
    }
}

/// A layer's place in a cache's memory.
#[derive(Debug, Clone, Copy)]
pub struct KvPlace {
    /// Shape of the layer.
    pub layout: KvLayout,
    /// First number of the layer in the memory; a multiple of 64 for bytes.
    pub base: usize,
}

impl KvPlace {
    /// The layer's numbers.
    ///
    /// # Panics
    /// If the layout is not that of `number`s, or the base is not aligned.
    fn range(&self, number: SlotNumber) -> Range<usize> {
        assert!(self.holds(number), "a layer of this number type");
        self.base..self.base + self.layout.layer_len()
    }

    /// Whether layout and base are right for `number`s.
    pub(super) fn holds(&self, number: SlotNumber) -> bool {
        self.layout.scaled == number.is_scaled()
            && (!self.layout.scaled || self.base.is_multiple_of(SCALE_ALIGN))
    }
}

/// Copies key and value of `head` from slot `from` to slot `to`.
///
/// # Panics
/// If head, slots or the place do not exist.
pub fn move_slot(
    number: SlotNumber,
    memory: &mut AlignedBuf,
    place: KvPlace,
    head: usize,
    from: usize,
    to: usize,
) {
    assert!(head < place.layout.kv_heads && from.max(to) < place.layout.slots, "head and slots exist");
    match number {
        SlotNumber::F32 => {
            move_in(&mut memory.as_mut_slice::<f32>()[place.range(number)], place.layout, head, from, to);
        }
        SlotNumber::F16 | SlotNumber::Bf16 => {
            move_in(&mut memory.as_mut_slice::<u16>()[place.range(number)], place.layout, head, from, to);
        }
        SlotNumber::I8 => {
            let layer = &mut memory.as_mut_slice::<u8>()[place.range(number)];
            move_in(layer, place.layout, head, from, to);
            for (from, to) in place.layout.scales(head, from, 1).zip(place.layout.scales(head, to, 1)) {
                layer.copy_within(from, to.start);
            }
        }
    }
}

fn move_in<T: Copy>(layer: &mut [T], layout: KvLayout, head: usize, from: usize, to: usize) {
    let (source, target) = (layout.key(head, from), layout.key(head, to));
    for d in 0..layout.head_dim {
        layer[target + d * LANES] = layer[source + d * LANES];
    }
    let source = layout.value(head, from);
    layer.copy_within(source..source + layout.value_width(), layout.value(head, to));
}

/// Copies the first `slots` slots of every head of `from` to `to`, whose number of slots may differ.
///
/// # Panics
/// If shapes differ otherwise, there are fewer slots, or a place does not exist.
pub fn copy_layer(number: SlotNumber, memory: &mut AlignedBuf, from: KvPlace, to: KvPlace, slots: usize) {
    let shape = |place: KvPlace| (place.layout.kv_heads, place.layout.head_dim);
    assert_eq!(shape(from), shape(to), "layers of one model");
    assert!(slots <= from.layout.slots.min(to.layout.slots), "slots exist");
    let end = from.range(number).end.max(to.range(number).end);
    assert!(end <= memory.num_bytes() / number.bytes(), "layers exist");
    match number {
        SlotNumber::F32 => copy_in(memory.as_mut_slice::<f32>(), from, to, slots),
        SlotNumber::F16 | SlotNumber::Bf16 => copy_in(memory.as_mut_slice::<u16>(), from, to, slots),
        SlotNumber::I8 => {
            let memory = memory.as_mut_slice::<u8>();
            copy_in(memory, from, to, slots);
            for head in 0..from.layout.kv_heads {
                let targets = to.layout.scales(head, 0, slots);
                for (source, target) in from.layout.scales(head, 0, slots).zip(targets) {
                    memory.copy_within(
                        from.base + source.start..from.base + source.end,
                        to.base + target.start,
                    );
                }
            }
        }
    }
}

fn copy_in<T: Plain>(memory: &mut [T], from: KvPlace, to: KvPlace, slots: usize) {
    let (a, b) = (from.layout, to.layout);
    let keys = slots.next_multiple_of(LANES) * a.head_dim;
    let values = slots * a.value_width();
    for head in 0..a.kv_heads {
        let source = from.base + a.key(head, 0);
        memory.copy_within(source..source + keys, to.base + b.key(head, 0));
        let source = from.base + a.value(head, 0);
        memory.copy_within(source..source + values, to.base + b.value(head, 0));
    }
}

/// Zeroes the first `slots` slots of every head.
///
/// # Panics
/// If slots or the place do not exist.
pub fn clear_slots(number: SlotNumber, memory: &mut AlignedBuf, place: KvPlace, slots: usize) {
    assert!(slots <= place.layout.slots, "slots exist");
    match number {
        SlotNumber::F32 => {
            clear_in(&mut memory.as_mut_slice::<f32>()[place.range(number)], place.layout, slots);
        }
        SlotNumber::F16 | SlotNumber::Bf16 => {
            clear_in(&mut memory.as_mut_slice::<u16>()[place.range(number)], place.layout, slots);
        }
        SlotNumber::I8 => {
            let layer = &mut memory.as_mut_slice::<u8>()[place.range(number)];
            clear_in(layer, place.layout, slots);
            for scales in (0..place.layout.kv_heads).flat_map(|head| place.layout.scales(head, 0, slots)) {
                layer[scales].fill(0);
            }
        }
    }
}

fn clear_in<T: Copy + Default>(layer: &mut [T], layout: KvLayout, slots: usize) {
    for head in 0..layout.kv_heads {
        let keys = layout.key(head, 0);
        layer[keys..keys + slots.next_multiple_of(LANES) * layout.head_dim].fill(T::default());
        let values = layout.value(head, 0);
        layer[values..values + slots * layout.value_width()].fill(T::default());
    }
}

//! Where keys and values of one layer of one block lie, and how they get there.
//!
//! Keys are interleaved by 16 slots, `[kv_heads, slots / 16, head_dim, 16]`: a register holds one
//! dimension of 16 keys, so that scores need no sums across lanes and no transposition, in decode
//! as in prefill. Values are `[kv_heads, slots, value_width]`, `value_width` being `head_dim`
//! rounded up to 16. Slots are rounded up to 16 too.

use half::bf16;

use super::{
    AlignedBuf, Isa,
    buffer::Plain,
    isa::SimdOp,
    simd::{LANES, Simd},
};

/// Number type of keys and values.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum SlotNumber {
    /// IEEE single.
    F32,
    /// IEEE half; larger magnitudes become ±65,504.
    F16,
    /// bfloat16.
    Bf16,
}

impl SlotNumber {
    /// Bytes of one number.
    pub fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
        }
    }
}

/// Shape of the keys and values of one layer of one block. Offsets and lengths count numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KvLayout {
    kv_heads: usize,
    head_dim: usize,
    /// A multiple of 16.
    slots: usize,
}

impl KvLayout {
    /// A layer with room for at least `slots` slots per head.
    ///
    /// # Panics
    /// If `head_dim` is no multiple of 8, or anything is 0.
    pub fn new(kv_heads: usize, head_dim: usize, slots: usize) -> Self {
        assert!(kv_heads > 0 && head_dim > 0 && slots > 0, "an empty cache layer");
        assert_eq!(head_dim % 8, 0, "head_dim must be a multiple of 8");
        Self { kv_heads, head_dim, slots: slots.next_multiple_of(LANES) }
    }

    /// Slots per head, padding included.
    pub fn slots(&self) -> usize {
        self.slots
    }

    /// Numbers of one layer: keys, then values.
    pub fn layer_len(&self) -> usize {
        self.kv_heads * self.slots * (self.head_dim + self.value_width())
    }

    /// Whether a layer of this layout has `kv_heads` heads of `head_dim` dimensions.
    pub(super) fn fits(&self, kv_heads: usize, head_dim: usize) -> bool {
        (self.kv_heads, self.head_dim) == (kv_heads, head_dim)
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
}

/// A layer's place in a cache's memory.
#[derive(Debug, Clone, Copy)]
pub struct KvPlace {
    /// Shape of the layer.
    pub layout: KvLayout,
    /// First number of the layer in the memory.
    pub base: usize,
}

impl KvPlace {
    fn range(&self) -> std::ops::Range<usize> {
        self.base..self.base + self.layout.layer_len()
    }
}

/// Rows of new keys and values in f32.
#[derive(Debug, Clone, Copy)]
pub struct KvRows<'a> {
    /// `[rows, stride]`.
    pub data: &'a [f32],
    /// Numbers from one row to the next.
    pub stride: usize,
    /// First column of the keys `[kv_heads, head_dim]`.
    pub keys: usize,
    /// First column of the values `[kv_heads, head_dim]`.
    pub values: usize,
}

/// Writes rows `rows` of `new` to the slots from `first_slot` of `place`.
///
/// # Panics
/// If rows, slots or the place do not exist.
pub fn append(
    isa: Isa,
    number: SlotNumber,
    memory: &mut AlignedBuf,
    place: KvPlace,
    first_slot: usize,
    rows: std::ops::Range<usize>,
    new: KvRows<'_>,
) {
    let layout = place.layout;
    let width = layout.kv_heads * layout.head_dim;
    assert!(first_slot + rows.len() <= layout.slots, "slots for all rows");
    assert!(new.keys.max(new.values) + width <= new.stride, "keys and values lie in a row");
    assert!(rows.end * new.stride <= new.data.len(), "all rows are there");
    match number {
        SlotNumber::F32 => {
            let layer = &mut memory.as_mut_slice()[place.range()];
            isa.run(Append { layer, layout, first_slot, rows, new, convert: Single });
        }
        SlotNumber::F16 => {
            let layer = &mut memory.as_mut_slice()[place.range()];
            isa.run(Append { layer, layout, first_slot, rows, new, convert: Half });
        }
        SlotNumber::Bf16 => {
            let layer = &mut memory.as_mut_slice()[place.range()];
            isa.run(Append { layer, layout, first_slot, rows, new, convert: Brain });
        }
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
            move_in(&mut memory.as_mut_slice::<f32>()[place.range()], place.layout, head, from, to);
        }
        SlotNumber::F16 | SlotNumber::Bf16 => {
            move_in(&mut memory.as_mut_slice::<u16>()[place.range()], place.layout, head, from, to);
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
    match number {
        SlotNumber::F32 => copy_in(memory.as_mut_slice::<f32>(), from, to, slots),
        SlotNumber::F16 | SlotNumber::Bf16 => copy_in(memory.as_mut_slice::<u16>(), from, to, slots),
    }
}

fn copy_in<T: Plain>(memory: &mut [T], from: KvPlace, to: KvPlace, slots: usize) {
    assert!(from.range().end.max(to.range().end) <= memory.len(), "layers exist");
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
        SlotNumber::F32 => clear_in(&mut memory.as_mut_slice::<f32>()[place.range()], place.layout, slots),
        SlotNumber::F16 | SlotNumber::Bf16 => {
            clear_in(&mut memory.as_mut_slice::<u16>()[place.range()], place.layout, slots);
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

/// Narrows 16 numbers.
trait Convert: Copy {
    type Stored: Copy;
    fn lanes<S: Simd>(self, s: S, x: S::F) -> [Self::Stored; LANES];
}

#[derive(Clone, Copy)]
struct Single;
#[derive(Clone, Copy)]
struct Half;
#[derive(Clone, Copy)]
struct Brain;

impl Convert for Single {
    type Stored = f32;
    #[inline(always)]
    fn lanes<S: Simd>(self, s: S, x: S::F) -> [f32; LANES] {
        s.to_array(x)
    }
}

impl Convert for Half {
    type Stored = u16;
    #[inline(always)]
    fn lanes<S: Simd>(self, s: S, x: S::F) -> [u16; LANES] {
        // An infinity would turn the masked slots of older rows into NaN (0 * inf). With the
        // number as second operand a NaN stays one.
        let x = s.max(s.splat(-65504.0), s.min(s.splat(65504.0), x));
        s.to_f16(x)
    }
}

impl Convert for Brain {
    type Stored = u16;
    #[inline(always)]
    fn lanes<S: Simd>(self, s: S, x: S::F) -> [u16; LANES] {
        s.to_array(x).map(|x| bf16::from_f32(x).to_bits())
    }
}

struct Append<'a, C: Convert> {
    layer: &'a mut [C::Stored],
    layout: KvLayout,
    first_slot: usize,
    rows: std::ops::Range<usize>,
    new: KvRows<'a>,
    convert: C,
}

impl<C: Convert> SimdOp for Append<'_, C> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { layer, layout, first_slot, rows, new, convert } = self;
        let dim = layout.head_dim;
        for (i, row) in rows.enumerate() {
            let row = &new.data[row * new.stride..(row + 1) * new.stride];
            let slot = first_slot + i;
            for head in 0..layout.kv_heads {
                let key = &row[new.keys + head * dim..][..dim];
                let at = layout.key(head, slot);
                let column = &mut layer[at..at + (dim - 1) * LANES + 1];
                for (d, part) in key.chunks(LANES).enumerate() {
                    let stored = convert.lanes(s, load_part(s, part));
                    for (j, &stored) in stored[..part.len()].iter().enumerate() {
                        column[(d * LANES + j) * LANES] = stored;
                    }
                }
                let value = &row[new.values + head * dim..][..dim];
                let at = layout.value(head, slot);
                let target = &mut layer[at..at + layout.value_width()];
                for (part, target) in value.chunks(LANES).zip(target.chunks_exact_mut(LANES)) {
                    target.copy_from_slice(&convert.lanes(s, load_part(s, part)));
                }
            }
        }
    }
}

/// Up to 16 numbers, the rest zero.
#[inline(always)]
pub(super) fn load_part<S: Simd>(s: S, part: &[f32]) -> S::F {
    if part.len() >= LANES {
        // SAFETY: sixteen numbers are there.
        return unsafe { s.load(part.as_ptr()) };
    }
    let mut lanes = [0.0; LANES];
    lanes[..part.len()].copy_from_slice(part);
    // SAFETY: sixteen numbers are there.
    unsafe { s.load(lanes.as_ptr()) }
}

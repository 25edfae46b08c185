//! Writing keys and values: new rows into free slots, in each number type.

use std::ops::Range;

use half::bf16;

use super::{KvLayout, KvPlace, SlotNumber};
use crate::cpu::{
    AlignedBuf, Isa,
    isa::SimdOp,
    simd::{LANES, Simd},
};

/// Largest magnitude of halves, and of what becomes bytes.
const LARGEST: f32 = 65_504.0;

/// Largest magnitude of bytes.
const LARGEST_BYTE: f32 = 127.0;

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
/// If rows, slots or the place do not exist, or the place is not one of `number`s.
pub fn append(
    isa: Isa,
    number: SlotNumber,
    memory: &mut AlignedBuf,
    place: KvPlace,
    first_slot: usize,
    rows: Range<usize>,
    new: KvRows<'_>,
) {
    let layout = place.layout;
    let width = layout.kv_heads * layout.head_dim;
    assert!(first_slot + rows.len() <= layout.slots, "slots for all rows");
    assert!(new.keys.max(new.values) + width <= new.stride, "keys and values lie in a row");
    assert!(rows.end * new.stride <= new.data.len(), "all rows are there");
    store(isa, number, memory, place, Append { layout, first_slot, rows, new });
}

struct Append<'a> {
    layout: KvLayout,
    first_slot: usize,
    rows: Range<usize>,
    new: KvRows<'a>,
}

impl Source for Append<'_> {
    #[inline(always)]
    fn feed<S: Simd>(self, s: S, store: &mut impl Store) {
        let (new, dim) = (self.new, self.layout.head_dim);
        for (i, row) in self.rows.enumerate() {
            let row = &new.data[row * new.stride..(row + 1) * new.stride];
            for head in 0..self.layout.kv_heads {
                store.key(s, head, self.first_slot + i, &row[new.keys + head * dim..][..dim]);
                store.value(s, head, self.first_slot + i, &row[new.values + head * dim..][..dim]);
            }
        }
    }
}

/// Where keys and values come from.
pub(super) trait Source {
    /// Hands all to `store`.
    fn feed<S: Simd>(self, s: S, store: &mut impl Store);
}

/// A layer's slots, to write to.
pub(super) trait Store {
    /// Writes a key `[head_dim]`.
    fn key<S: Simd>(&mut self, s: S, head: usize, slot: usize, key: &[f32]);

    /// Writes a value `[head_dim]`.
    fn value<S: Simd>(&mut self, s: S, head: usize, slot: usize, value: &[f32]);
}

/// Writes all of `source` to `place`.
pub(super) fn store(
    isa: Isa,
    number: SlotNumber,
    memory: &mut AlignedBuf,
    place: KvPlace,
    source: impl Source,
) {
    let (layout, range) = (place.layout, place.range(number));
    match number {
        SlotNumber::F32 => {
            let layer = &mut memory.as_mut_slice()[range];
            isa.run(Fill { source, store: Numbers { layer, layout, convert: Single } });
        }
        SlotNumber::F16 => {
            let layer = &mut memory.as_mut_slice()[range];
            isa.run(Fill { source, store: Numbers { layer, layout, convert: Half } });
        }
        SlotNumber::Bf16 => {
            let layer = &mut memory.as_mut_slice()[range];
            isa.run(Fill { source, store: Numbers { layer, layout, convert: Brain } });
        }
        SlotNumber::I8 => {
            let layer = &mut memory.as_mut_slice()[range];
            isa.run(Fill { source, store: Bytes { layer, layout } });
        }
    }
}

struct Fill<A, B> {
    source: A,
    store: B,
}

impl<A: Source, B: Store> SimdOp for Fill<A, B> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(mut self, s: S) {
        self.source.feed(s, &mut self.store);
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
        s.to_f16(within(s, LARGEST, x))
    }
}

impl Convert for Brain {
    type Stored = u16;
    #[inline(always)]
    fn lanes<S: Simd>(self, s: S, x: S::F) -> [u16; LANES] {
        s.to_array(x).map(|x| bf16::from_f32(x).to_bits())
    }
}

/// Clamps to `±largest`. An infinity would turn the masked slots of older rows into NaN (0 * inf).
#[inline(always)]
fn within<S: Simd>(s: S, largest: f32, x: S::F) -> S::F {
    // With the number as second operand a NaN stays one.
    s.max(s.splat(-largest), s.min(s.splat(largest), x))
}

/// Numbers without scales.
struct Numbers<'a, C: Convert> {
    layer: &'a mut [C::Stored],
    layout: KvLayout,
    convert: C,
}

impl<C: Convert> Store for Numbers<'_, C> {
    #[inline(always)]
    fn key<S: Simd>(&mut self, s: S, head: usize, slot: usize, key: &[f32]) {
        let column = &mut self.layer[self.layout.key(head, slot)..];
        store_key(column, key, |part| self.convert.lanes(s, load_part(s, part)));
    }

    #[inline(always)]
    fn value<S: Simd>(&mut self, s: S, head: usize, slot: usize, value: &[f32]) {
        let target = &mut self.layer[self.layout.value(head, slot)..];
        store_value(target, value, |part| self.convert.lanes(s, load_part(s, part)));
    }
}

/// Bytes with scales.
struct Bytes<'a> {
    layer: &'a mut [u8],
    layout: KvLayout,
}

impl Store for Bytes<'_> {
    #[inline(always)]
    fn key<S: Simd>(&mut self, s: S, head: usize, slot: usize, key: &[f32]) {
        let scale = scale(s, key);
        self.layer[self.layout.key_scale(head, slot)..][..4].copy_from_slice(&scale.to_ne_bytes());
        let column = &mut self.layer[self.layout.key(head, slot)..];
        store_key(column, key, |part| to_bytes(s, part, scale));
    }

    #[inline(always)]
    fn value<S: Simd>(&mut self, s: S, head: usize, slot: usize, value: &[f32]) {
        let scale = scale(s, value);
        self.layer[self.layout.value_scale(head, slot)..][..4].copy_from_slice(&scale.to_ne_bytes());
        let target = &mut self.layer[self.layout.value(head, slot)..];
        store_value(target, value, |part| to_bytes(s, part, scale));
    }
}

/// The scale of a key or value: what 1 stands for; NaN if a number is.
#[inline(always)]
fn scale<S: Simd>(s: S, numbers: &[f32]) -> f32 {
    let mut largest = 0;
    for part in numbers.chunks(LANES) {
        let x = within(s, LARGEST, load_part(s, part));
        largest = largest.max(s.max_abs_bits(x, x));
    }
    f32::from_bits(largest) / LARGEST_BYTE
}

#[inline(always)]
fn to_bytes<S: Simd>(s: S, part: &[f32], scale: f32) -> [u8; LANES] {
    // All zero, or NaN, which the scale alone makes every number.
    if scale == 0.0 || scale.is_nan() {
        return [0; LANES];
    }
    let x = within(s, LARGEST, load_part(s, part));
    // The scale of numbers near the smallest has few bits, so that quotients may be larger.
    let x = s.round(within(s, LARGEST_BYTE, s.div(x, s.splat(scale))));
    s.to_array(x).map(|x| (x as i8).cast_unsigned())
}

#[inline(always)]
fn store_key<T: Copy>(column: &mut [T], key: &[f32], convert: impl Fn(&[f32]) -> [T; LANES]) {
    let column = &mut column[..(key.len() - 1) * LANES + 1];
    for (d, part) in key.chunks(LANES).enumerate() {
        let stored = convert(part);
        for (j, &stored) in stored[..part.len()].iter().enumerate() {
            column[(d * LANES + j) * LANES] = stored;
        }
    }
}

#[inline(always)]
fn store_value<T: Copy>(target: &mut [T], value: &[f32], convert: impl Fn(&[f32]) -> [T; LANES]) {
    for (part, target) in value.chunks(LANES).zip(target.chunks_exact_mut(LANES)) {
        target.copy_from_slice(&convert(part));
    }
}

/// Up to 16 numbers, the rest zero.
#[inline(always)]
pub(in crate::cpu) fn load_part<S: Simd>(s: S, part: &[f32]) -> S::F {
    if part.len() >= LANES {
        // SAFETY: sixteen numbers are there.
        return unsafe { s.load(part.as_ptr()) };
    }
    let mut lanes = [0.0; LANES];
    lanes[..part.len()].copy_from_slice(part);
    // SAFETY: sixteen numbers are there.
    unsafe { s.load(lanes.as_ptr()) }
}

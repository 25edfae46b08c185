//! Slots can be moved, copied, cleared, read, written, exported and imported.

use locket_kernels::cpu::{
    AlignedBuf, Isa, Team,
    attention::{Attention, AttentionJob, AttentionRows, AttentionShape},
    kv::{self, KvLayout, KvPlace, KvRows, SlotNumber},
};
use proptest::prelude::*;

use crate::sequence::{Case, NUMBERS, bits};

/// 70 rows of 2 heads of 24 dimensions, appended to the smaller of two layers.
struct Layers {
    case: Case,
    number: SlotNumber,
    memory: AlignedBuf,
    /// 70 slots.
    small: KvPlace,
    /// 200 slots.
    large: KvPlace,
}

impl Layers {
    fn new(number: SlotNumber) -> Self {
        let shape = AttentionShape { heads: 2, kv_heads: 2, head_dim: 24, scale: 0.2, number };
        let case = Case::new(9, shape, 70, None);
        let layout = |slots: usize| KvLayout::of(number, 2, 24, slots);
        let small = KvPlace { layout: layout(70), base: 0 };
        let large = KvPlace { layout: layout(200), base: small.layout.layer_len() };
        let len = small.layout.layer_len() + large.layout.layer_len();
        let mut memory = AlignedBuf::zeroed(len * number.bytes());
        kv::append(Isa::best(), number, &mut memory, small, 0, 0..70, case.new_rows());
        Self { case, number, memory, small, large }
    }

    fn attend(&self, place: KvPlace, slots: usize) -> Vec<f32> {
        let mut out = vec![0.0; 70 * 48];
        let job = AttentionJob { place, first_row: 0, rows: 1, slots_before: slots - 1, id: 0 };
        let rows = AttentionRows { queries: &self.case.rows, query_stride: self.case.stride, out: &mut out };
        let team = &mut Team::new(1).expect("no thread is started");
        Attention::new(self.case.shape, 1).run(team, Isa::best(), &self.memory, &[job], rows, None);
        out[..48].to_vec()
    }

    /// Keys and values of both heads.
    fn read(&self, place: KvPlace, slots: std::ops::Range<usize>) -> Vec<f32> {
        let mut all = Vec::new();
        for head in 0..2 {
            let (mut keys, mut values) = (vec![0.0; slots.len() * 24], vec![0.0; slots.len() * 24]);
            kv::read_slots(self.number, &self.memory, place, head, slots.clone(), &mut keys, &mut values);
            all.extend(keys.into_iter().chain(values));
        }
        all
    }
}

#[test]
fn slots_can_be_moved_copied_and_cleared() {
    for number in NUMBERS {
        let mut layers = Layers::new(number);
        let (a, b) = (layers.small, layers.large);
        kv::copy_layer(number, &mut layers.memory, a, b, 70);
        assert_eq!(layers.attend(a, 70), layers.attend(b, 70));

        // Slots 0..69 without 17, the last one in its place, are rows 0..69 in that order.
        for head in 0..2 {
            kv::move_slot(number, &mut layers.memory, a, head, 69, 17);
        }
        for (slot, row) in (0..69).map(|slot| (slot, if slot == 17 { 69 } else { slot })) {
            let new = layers.case.new_rows();
            kv::append(Isa::best(), number, &mut layers.memory, b, slot, row..row + 1, new);
        }
        assert_eq!(layers.attend(a, 69), layers.attend(b, 69));
        assert_eq!(layers.read(a, 0..69), layers.read(b, 0..69));

        kv::clear_slots(number, &mut layers.memory, a, 70);
        kv::clear_slots(number, &mut layers.memory, b, 70);
        assert!(layers.memory.as_slice::<u8>().iter().all(|&byte| byte == 0));
    }
}

#[test]
fn slots_can_be_read() {
    for number in NUMBERS {
        let layers = Layers::new(number);
        let got = layers.read(layers.small, 5..41);
        let columns = [48, 96, 72, 120];
        let want = columns.into_iter().flat_map(|column| (5..41).map(move |row| (row, column)));
        let want = want.flat_map(|(row, column)| layers.case.stored(row, column));
        for (got, want) in got.iter().zip(want) {
            // Products with a scale are rounded to f32.
            assert!((f64::from(*got) - want).abs() <= 1e-7 * want.abs(), "{number:?} {got} {want}");
        }
        let mut keys = vec![0.0; 36 * 24];
        kv::read_slots(number, &layers.memory, layers.small, 0, 5..41, &mut keys, &mut []);
        assert_eq!(keys, got[..36 * 24], "keys alone");
    }
}

#[test]
fn slots_can_be_written() {
    for number in NUMBERS {
        let mut layers = Layers::new(number);
        let (small, large) = (layers.small, layers.large);
        // Rows 30..50 to slots 120..140, either way.
        let new = layers.case.new_rows();
        kv::append(Isa::best(), number, &mut layers.memory, large, 120, 30..50, new);
        let appended = layers.memory.as_slice::<u8>().to_vec();
        kv::clear_slots(number, &mut layers.memory, large, 140);
        let column = |at: usize| -> Vec<f32> {
            let rows = layers.case.rows.chunks(layers.case.stride).skip(30).take(20);
            rows.flat_map(|row| row[at..at + 24].to_vec()).collect()
        };
        for head in 0..2 {
            let (keys, values) = (column(48 + 24 * head), column(96 + 24 * head));
            kv::write_slots(number, &mut layers.memory, large, head, 120..140, &keys, &[]);
            kv::write_slots(number, &mut layers.memory, large, head, 120..140, &[], &values);
        }
        assert!(layers.memory.as_slice::<u8>() == appended, "{number:?}: written as appended");

        // What was read can be written back: bytes stay, their scale may change by its last bit.
        let before = layers.read(small, 0..70);
        for (head, both) in before.chunks(2 * 70 * 24).enumerate() {
            let (keys, values) = both.split_at(70 * 24);
            kv::write_slots(number, &mut layers.memory, small, head, 0..70, keys, values);
        }
        for (got, want) in layers.read(small, 0..70).iter().zip(&before) {
            assert!((got - want).abs() <= 2e-7 * want.abs(), "{number:?} {got} {want}");
        }
    }
}

#[test]
fn exported_layers_fit_any_capacity() {
    for number in NUMBERS {
        for slots in [0, 1, 16, 37, 64, 70] {
            let mut layers = Layers::new(number);
            let (small, large) = (layers.small, layers.large);
            let mut bytes = vec![7];
            kv::export_layer(number, &layers.memory, small, slots, &mut bytes);
            assert_eq!(bytes.len() - 1, small.layout.exported_bytes(number, slots));
            assert_eq!(bytes.remove(0), 7, "appended");
            assert!(kv::import_layer(number, &mut layers.memory, large, slots, &bytes));
            assert_eq!(bits(&layers.read(small, 0..slots)), bits(&layers.read(large, 0..slots)));
            assert!(layers.read(large, slots..200).iter().all(|&x| x == 0.0), "other slots are left alone");
            let mut again = Vec::new();
            kv::export_layer(number, &layers.memory, large, slots, &mut again);
            assert!(bytes == again);

            let before = layers.memory.as_slice::<u8>().to_vec();
            bytes.push(0);
            assert!(!kv::import_layer(number, &mut layers.memory, large, slots, &bytes), "a byte too many");
            assert!(layers.memory.as_slice::<u8>() == before);
        }
        let mut layers = Layers::new(number);
        let bytes = vec![0; layers.small.layout.exported_bytes(number, 200)];
        assert!(!kv::import_layer(number, &mut layers.memory, layers.small, 200, &bytes), "too few slots");
    }
}

/// What 8 numbers become as a key in bytes.
fn as_bytes(numbers: [f32; 8], isa: Isa) -> Vec<f32> {
    let place = KvPlace { layout: KvLayout::of(SlotNumber::I8, 1, 8, 1), base: 64 };
    let mut memory = AlignedBuf::zeroed(64 + place.layout.layer_len());
    let new = KvRows { data: &numbers, stride: 8, keys: 0, values: 0 };
    kv::append(isa, SlotNumber::I8, &mut memory, place, 0, 0..1, new);
    let (mut key, mut value) = (vec![0.0; 8], vec![0.0; 8]);
    kv::read_slots(SlotNumber::I8, &memory, place, 0, 0..1, &mut key, &mut value);
    assert_eq!(bits(&key), bits(&value));
    key
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Within half a step, whatever the magnitude; the largest stays the largest.
    #[test]
    fn bytes_are_the_nearest(numbers: [i16; 8], exponent in -120i32..4) {
        let numbers = numbers.map(|x| f32::from(x) * (exponent as f32).exp2() / 32768.0);
        let step = numbers.iter().fold(0.0, |top: f32, x| top.max(x.abs())) / 127.0;
        for isa in Isa::available() {
            for (got, want) in as_bytes(numbers, isa).iter().zip(numbers) {
                prop_assert!((got - want).abs() <= 0.5001 * step, "{got} {want}");
                prop_assert!(want.abs() < 127.0 * step || (got - want).abs() <= 1e-6 * want.abs());
            }
        }
    }
}

#[test]
fn special_numbers_as_bytes() {
    for isa in Isa::available() {
        assert_eq!(as_bytes([0.0; 8], isa), [0.0; 8]);
        let tiny = as_bytes([f32::from_bits(190), 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0], isa);
        assert_eq!(tiny[0], f32::from_bits(127), "a scale of the smallest number");
        assert_eq!(as_bytes([f32::from_bits(20); 8], isa), [0.0; 8], "a scale that vanishes");
        let infinite = as_bytes([f32::NEG_INFINITY, 65_504.0, 1e30, 0.0, 0.0, 0.0, 0.0, 0.0], isa);
        assert!((infinite[0] + 65_504.0).abs() < 0.1 && infinite[1] == infinite[2]);
        let nan = as_bytes([1.0, 2.0, f32::NAN, 0.0, 0.0, 0.0, 0.0, 0.0], isa);
        assert!(nan.iter().all(|x| x.is_nan()));
    }
}

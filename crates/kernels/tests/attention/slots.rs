//! Slots can be moved, copied and cleared.

use locket_kernels::cpu::{
    AlignedBuf, Isa, Team,
    attention::{Attention, AttentionJob, AttentionRows, AttentionShape},
    kv::{self, KvLayout, KvPlace, KvRows, SlotNumber},
};

use crate::sequence::Case;

#[test]
fn slots_can_be_moved_copied_and_cleared() {
    let number = SlotNumber::F16;
    let shape = AttentionShape { heads: 2, kv_heads: 2, head_dim: 24, scale: 0.2, number };
    let case = Case::new(9, shape, 70, None);
    let small = KvLayout::new(2, 24, 70);
    let large = KvLayout::new(2, 24, 200);
    let (a, b) = (KvPlace { layout: small, base: 0 }, KvPlace { layout: large, base: small.layer_len() });
    let mut memory = AlignedBuf::zeroed((small.layer_len() + large.layer_len()) * number.bytes());
    let new = KvRows { data: &case.rows, stride: case.stride, keys: 48, values: 96 };
    kv::append(Isa::best(), number, &mut memory, a, 0, 0..70, new);
    kv::copy_layer(number, &mut memory, a, b, 70);
    let attend = |memory: &AlignedBuf, place: KvPlace, slots: usize| {
        let mut out = vec![0.0; 70 * 48];
        let job = AttentionJob { place, first_row: 0, rows: 1, slots_before: slots - 1, id: 0 };
        let rows = AttentionRows { queries: &case.rows, query_stride: case.stride, out: &mut out };
        Attention::new(shape, 1).run(&mut Team::new(1).unwrap(), Isa::best(), memory, &[job], rows, None);
        out[..48].to_vec()
    };
    assert_eq!(attend(&memory, a, 70), attend(&memory, b, 70));

    // Slots 0..69 without 17, the last one in its place, are rows 0..69 in that order.
    for head in 0..2 {
        kv::move_slot(number, &mut memory, a, head, 69, 17);
    }
    for (slot, row) in (0..69).map(|slot| (slot, if slot == 17 { 69 } else { slot })) {
        kv::append(Isa::best(), number, &mut memory, b, slot, row..row + 1, new);
    }
    assert_eq!(attend(&memory, a, 69), attend(&memory, b, 69));

    kv::clear_slots(number, &mut memory, a, 70);
    kv::clear_slots(number, &mut memory, b, 70);
    assert!(memory.as_slice::<u8>().iter().all(|&byte| byte == 0));
}

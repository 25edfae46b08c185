//! Layer budgets: how many of a block's slots each layer gets once the sequence has outgrown it.
//!
//! Layers differ in how much they lose when tokens go. A side-car may say what share of the slots each
//! layer should get (mean 1). Until a sequence's first fold every layer has `M + B` slots, so that
//! attention is exact for as long as without budgets; then the block is *spread*: all layers fold at once,
//! and layer `l` keeps `M_l` slots and `B` to fill, with `sum(M_l + B) <= L * (M + B)`. No memory is added.

use super::{CacheMethod, CacheSettings};

/// Slots come in groups of this many, as the CPU backend lays them out.
const GROUP: u32 = 16;

/// Scored slots that every layer has at least, beside its sinks.
const LEAST_SLOTS: u32 = 4;

/// Where each layer's slots lie in a block.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Regions {
    /// First slot of each layer, counted per head.
    pub(super) starts: Vec<usize>,
    /// Slots per head of each layer.
    pub(super) strides: Vec<usize>,
}

impl Regions {
    /// As many slots for each of `num_layers` layers.
    pub(super) fn uniform(num_layers: usize, stride: usize) -> Self {
        Self {
            starts: (0..num_layers).map(|layer| layer * stride).collect(),
            strides: vec![stride; num_layers],
        }
    }

    /// Takes other strides.
    pub(super) fn set(&mut self, strides: impl Iterator<Item = usize>) {
        let mut start = 0;
        for ((at, own), stride) in self.starts.iter_mut().zip(&mut self.strides).zip(strides) {
            (*at, *own) = (start, stride);
            start += stride;
        }
    }
}

/// Fills `slots` with `M_l` of each layer; empties it if the settings leave nothing to share out.
///
/// `shares` has one entry per layer. No layer gets less than its sinks and some scored slots need, nor
/// more than half of the `max_position` trained positions (or `M + B`, if that is more).
pub(super) fn layer_slots(
    shares: &[f32],
    settings: CacheSettings,
    max_position: usize,
    slots: &mut Vec<u32>,
) {
    slots.clear();
    let ring = settings.ring.div_ceil(GROUP);
    let Some(free) = (settings.capacity() / GROUP).checked_sub(ring) else { return };
    let least = (settings.sinks + LEAST_SLOTS).div_ceil(GROUP);
    if least > free || shares.is_empty() {
        return;
    }
    let half = u32::try_from(max_position / 2).unwrap_or(u32::MAX);
    let most = (half.max(settings.capacity()) / GROUP).saturating_sub(ring).max(free);
    let mean = shares.iter().sum::<f32>() / shares.len() as f32;
    let wanted: Vec<f32> = shares.iter().map(|share| share / mean * free as f32).collect();
    slots.extend(wanted.iter().map(|&wanted| (wanted as u32).clamp(least, most)));
    let total = u64::from(free) * shares.len() as u64;
    loop {
        let given: u64 = slots.iter().map(|&slots| u64::from(slots)).sum();
        if given == total {
            break;
        }
        // Who is furthest from what it should have gives, or gets, one group; ties: the lower layer.
        let is_short = given < total;
        let can_change = |&layer: &usize| if is_short { slots[layer] < most } else { slots[layer] > least };
        let distance = |layer: usize| {
            let more = wanted[layer] - slots[layer] as f32;
            if is_short { more } else { -more }
        };
        let changed = (0..slots.len())
            .filter(can_change)
            .max_by(|&a, &b| distance(a).total_cmp(&distance(b)).then(b.cmp(&a)));
        match changed {
            Some(layer) if is_short => slots[layer] += 1,
            Some(layer) => slots[layer] -= 1,
            // `least <= free <= most`, so somebody can always change.
            None => break,
        }
    }
    slots.iter_mut().for_each(|slots| *slots = (*slots + ring) * GROUP - settings.ring);
}

/// At least as many slots as each layer may get in a block of `capacity` slots, whatever its settings.
pub(crate) fn most_slots(shares: &[f32], capacity: usize, max_position: usize) -> Vec<usize> {
    let capacity = u32::try_from(capacity).unwrap_or(u32::MAX);
    // The smallest ring and no sinks leave the most to share out; rounding moves two groups at most.
    let widest = CacheSettings::of(CacheMethod::Observed, capacity.saturating_sub(1), 1);
    let mut slots = Vec::new();
    layer_slots(shares, CacheSettings { sinks: 0, ..widest }, max_position, &mut slots);
    slots.resize(shares.len(), 0);
    slots.into_iter().map(|slots| capacity.max(slots + 1 + 2 * GROUP) as usize).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn slots(shares: &[f32], settings: CacheSettings) -> Vec<u32> {
        let mut slots = Vec::new();
        layer_slots(shares, settings, 8192, &mut slots);
        slots
    }

    #[test]
    fn equal_shares_are_the_plain_block() {
        let settings = CacheSettings::of(CacheMethod::Observed, 512, 128);
        assert_eq!(slots(&[1.0; 5], settings), [512; 5]);
    }

    #[test]
    fn shares_are_followed_to_a_group() {
        let settings = CacheSettings::of(CacheMethod::Observed, 512, 128);
        assert_eq!(slots(&[0.375, 2.5, 0.375, 0.75], settings), [192, 1280, 192, 384]);
        // A long pinned prompt needs room in every layer.
        let pinned = CacheSettings { sinks: 128, ..CacheSettings::of(CacheMethod::Observed, 128, 128) };
        assert!(slots(&[0.1, 1.9], pinned).is_empty(), "132 slots are the least, but 128 the mean");
        let pinned = CacheSettings { sinks: 100, ..CacheSettings::of(CacheMethod::Observed, 128, 128) };
        assert_eq!(slots(&[0.1, 1.9], pinned), [112, 144]);
        // No layer gets more positions than half of what the model was trained on.
        let wide = CacheSettings::of(CacheMethod::Observed, 2048, 128);
        assert_eq!(slots(&[0.5, 3.0, 0.5, 0.5, 0.5], wide).iter().max(), Some(&3968));
    }

    proptest! {
        /// All slots are given away, none is made up, and every layer can work.
        #[test]
        fn the_sum_stays(
            shares in proptest::collection::vec(0.01f32..10.0, 1..40),
            slots_of in 1u32..3000,
            ring in 1u32..300,
            sinks in 0u32..200,
        ) {
            let mut settings = CacheSettings::of(CacheMethod::Observed, slots_of, ring);
            settings.sinks = sinks.min(slots_of);
            let given = slots(&shares, settings);
            if given.is_empty() {
                let ring_groups = ring.div_ceil(GROUP);
                let free = (settings.capacity() / GROUP).saturating_sub(ring_groups);
                prop_assert!(free * GROUP < settings.sinks + LEAST_SLOTS + GROUP);
                return Ok(());
            }
            let capacity: u32 = given.iter().map(|slots| slots + ring).sum();
            prop_assert_eq!(capacity, settings.capacity() / GROUP * GROUP * shares.len() as u32);
            let most = most_slots(&shares, settings.capacity() as usize, 8192);
            for (slots, most) in given.into_iter().zip(most) {
                prop_assert!((slots + ring) as usize <= most, "{slots} + {ring} of {most}");
                prop_assert!((slots + ring).is_multiple_of(GROUP) && slots >= settings.sinks + LEAST_SLOTS);
                prop_assert!(slots + ring <= 4096.max(settings.capacity()));
            }
        }
    }
}

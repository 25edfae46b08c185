//! What is evaluated: every method at every number of slots in every slot type.

use locket_model::{
    kv_cache::{CacheGeometry, CacheMethod, CachePlan, CacheSettings, SideArrays, SideCar, SlotType},
    load::Backend,
};

use crate::{Error, Task};

/// Most samples of one kind, and most sequences in lockstep.
const MOST_SAMPLES: usize = 100_000;

/// What is asked of an evaluation.
#[derive(Debug, Clone)]
pub struct EvalOptions {
    /// Methods; `full` runs once per slot type, with as many slots as the context has tokens.
    pub methods: Vec<CacheMethod>,
    /// Numbers of slots, `M`.
    pub slots: Vec<u32>,
    /// Slots filled between folds, `B`. Perplexities of different `B` are not comparable: the ring is
    /// local context that costs no choice.
    pub ring: u32,
    /// Number types of the slots.
    pub slot_types: Vec<SlotType>,
    /// Tokens of the texts whose perplexity is measured.
    pub context: usize,
    /// Tokens of the probes.
    pub probe_context: usize,
    /// Most documents whose perplexity is measured, one window of each.
    pub documents: usize,
    /// What is measured.
    pub tasks: Vec<Task>,
    /// Probes per task.
    pub probes: usize,
    /// Methods that all others are compared with, at the same slots and slot type.
    pub against: Vec<CacheMethod>,
    /// Seed of windows and probes.
    pub seed: u64,
    /// First tokens that always survive; `None`: the method's own.
    pub sinks: Option<u32>,
    /// Latest tokens that always survive, in thousandths of the slots; `None`: the side-car's, else
    /// the method's own.
    pub recent_permille: Option<u32>,
    /// Share of `learned`'s free slots that its recall score fills, in thousandths; `None`: the
    /// side-car's, else the method's own.
    pub recall_permille: Option<u16>,
    /// Whether layers get the shares of the slots that the side-car names, where the method allows it.
    pub layer_budgets: bool,
    /// Who computes. Slot type int4 is an experiment that only the reference backend has: it runs
    /// there if this is the CPU backend.
    pub backend: Backend,
    /// CPU threads, 0 for all physical cores.
    pub threads: usize,
    /// Sequences that advance together.
    pub lockstep: u32,
    /// Rows per sequence and step, a multiple of 16. No result depends on it.
    pub chunk: usize,
}

impl EvalOptions {
    /// Checks what can be checked without text.
    ///
    /// # Errors
    /// [`Error::Options`] naming the option.
    pub fn check(&self, geometry: CacheGeometry) -> Result<(), Error> {
        let wrong = |field, reason: &str| Err(Error::options(field, reason));
        let trained = geometry.max_position;
        let longest = self.longest();
        match () {
            () if self.methods.is_empty() => wrong("methods", "none is given"),
            () if self.slot_types.is_empty() => wrong("slot-type", "none is given"),
            () if self.tasks.is_empty() => wrong("tasks", "none is given"),
            () if self.slots.is_empty() && self.methods.iter().any(|&method| method != CacheMethod::Full) => {
                wrong("slots", "none is given, but a method other than full needs some")
            }
            () if self.slots.contains(&0) => wrong("slots", "0 slots remember nothing"),
            () if self.ring == 0 => wrong("ring", "0: a method that folds needs a ring"),
            () if self.chunk == 0 || !self.chunk.is_multiple_of(16) => {
                wrong("chunk", "must be a multiple of 16, so that results do not depend on it")
            }
            () if self.lockstep == 0 || self.lockstep as usize > MOST_SAMPLES => {
                wrong("batch", "must be at least 1")
            }
            () if self.has_perplexity() && self.context < 16 => {
                wrong("context", "must be at least 16 tokens")
            }
            () if longest > u32::MAX as usize / 2 => wrong("context", "is absurdly long"),
            () if self.documents > MOST_SAMPLES => wrong("documents", "must be at most 100000"),
            () if self.probes > MOST_SAMPLES => wrong("probes", "must be at most 100000"),
            () if self.has_perplexity() && self.documents == 0 => {
                wrong("documents", "is 0, but perplexity needs some")
            }
            () if self.has_probes() && self.probes == 0 => wrong("probes", "is 0, but the tasks need some"),
            () if self.recent_permille.is_some_and(|share| share > 1000) => {
                wrong("recent-permille", "a share ends at 1000")
            }
            () if self.recall_permille.is_some_and(|share| share > 1000) => {
                wrong("recall-permille", "a share ends at 1000")
            }
            () if self.methods.contains(&CacheMethod::Full) && longest > trained => {
                let reason = format!(
                    "{longest} tokens are more than the {trained} that the model was trained on; method full \
                     ends there: leave it out"
                );
                Err(Error::options("context", reason))
            }
            () => Ok(()),
        }
    }

    /// Whether texts are measured.
    pub fn has_perplexity(&self) -> bool {
        self.tasks.contains(&Task::Perplexity)
    }

    /// Whether probes are measured.
    pub fn has_probes(&self) -> bool {
        self.tasks.iter().any(|&task| task != Task::Perplexity)
    }

    /// Tokens of the longest sequence.
    pub fn longest(&self) -> usize {
        let texts = if self.has_perplexity() { self.context } else { 0 };
        let probes = if self.has_probes() { self.probe_context } else { 0 };
        texts.max(probes)
    }

    /// Every configuration, in the order of the report: by slot type, method, slots. Those that cannot
    /// run carry the reason.
    pub fn configurations(&self, side_car: Option<&SideCar>) -> Vec<Configuration> {
        let mut all = Vec::new();
        for &slot_type in &self.slot_types {
            for &method in &self.methods {
                let full = [self.longest() as u32];
                let slots = if method == CacheMethod::Full { &full[..] } else { &self.slots };
                all.extend(slots.iter().map(|&slots| self.configuration(method, slots, slot_type, side_car)));
            }
        }
        all
    }

    fn configuration(
        &self,
        method: CacheMethod,
        slots: u32,
        slot_type: SlotType,
        side_car: Option<&SideCar>,
    ) -> Configuration {
        let mut settings = CacheSettings::of(method, slots, self.ring);
        if method != CacheMethod::Full {
            settings.sinks = self.sinks.unwrap_or(settings.sinks);
            let has_shares = side_car.is_some_and(|side_car| side_car.layer_shares.is_some());
            settings.layer_budgets = self.layer_budgets && has_shares && method.shares_layers();
            let side_car = side_car.filter(|_| method == CacheMethod::Learned);
            let recent = self.recent_permille.or(side_car.and_then(|weights| weights.recent_permille));
            if let Some(share) = recent.filter(|_| settings.recent > 0) {
                settings.recent = (u64::from(slots) * u64::from(share) / 1000) as u32;
            }
            if method == CacheMethod::Learned {
                let recall = self.recall_permille.or(side_car.and_then(|weights| weights.recall_permille));
                settings.recall_permille = recall.unwrap_or(settings.recall_permille);
            }
        }
        let is_simulated = slot_type == SlotType::I4 && self.backend == Backend::Cpu;
        let backend = if is_simulated { Backend::Reference } else { self.backend };
        Configuration { settings, slot_type, backend, skipped: reason_to_skip(settings, slot_type, side_car) }
    }
}

fn reason_to_skip(
    settings: CacheSettings,
    slot_type: SlotType,
    side_car: Option<&SideCar>,
) -> Option<String> {
    let method = settings.method;
    if method.needs_side_car() && !side_car.is_some_and(|weights| weights.serves(method)) {
        return Some(format!("method {} needs trained weights: give --side-car", method.name()));
    }
    if method.mixes() && !slot_type.is_float() {
        return Some(format!("method {} rewrites slots, which {} cannot", method.name(), slot_type.name()));
    }
    let trained = side_car.and_then(|weights| weights.lococo.as_ref()).map(|weights| weights.slots);
    match trained {
        Some(trained) if method == CacheMethod::Lococo && trained != settings.slots => {
            Some(format!("the side-car's convolution was trained for {trained} slots"))
        }
        _ => None,
    }
}

/// One method with one number of slots in one slot type.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Configuration {
    /// How sequences use their blocks.
    pub settings: CacheSettings,
    /// Number type of the slots.
    pub slot_type: SlotType,
    /// Who computes.
    pub backend: Backend,
    /// Why it is not run, if it is not.
    pub skipped: Option<String>,
}

impl Configuration {
    /// Bytes that one sequence's block takes: `M + B` slots, keys, values and all side arrays.
    pub fn bytes_per_sequence(&self, geometry: CacheGeometry, side_car: Option<&SideCar>) -> u64 {
        let side = SideArrays::of(&[self.settings.method], geometry, side_car);
        CachePlan::block_bytes(geometry, self.slot_type, side, self.settings.capacity())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_model::options;

    const SMOL: CacheGeometry =
        CacheGeometry { num_layers: 30, num_heads: 9, num_kv_heads: 3, head_dim: 64, max_position: 8192 };

    #[test]
    fn configurations_are_the_product_and_full_runs_once() {
        let options = EvalOptions {
            methods: vec![CacheMethod::Full, CacheMethod::Observed, CacheMethod::Learned],
            slots: vec![128, 256],
            slot_types: vec![SlotType::F16, SlotType::I4],
            context: 8192,
            ..options()
        };
        let all = options.configurations(None);
        let shown: Vec<_> = all
            .iter()
            .map(|one| {
                (one.settings.method.name(), one.settings.slots, one.slot_type.name(), one.skipped.is_some())
            })
            .collect();
        assert_eq!(shown.len(), 10);
        assert_eq!(shown[0], ("full", 8192, "f16", false));
        assert_eq!(shown[2], ("observed", 256, "f16", false));
        assert_eq!(shown[4], ("learned", 256, "f16", true));
        assert_eq!(all[5].backend, Backend::Reference);
        assert_eq!(all[0].backend, Backend::Cpu);
    }

    /// By hand: 30 layers and 3 heads of 256 slots with 2 * 64 * 2 bytes, a position and one column.
    #[test]
    fn bytes_count_the_ring_and_side_arrays() {
        let options = EvalOptions { methods: vec![CacheMethod::Observed], slots: vec![128], ..options() };
        let options = EvalOptions { ring: 128, ..options };
        let one = &options.configurations(None)[0];
        assert_eq!(one.bytes_per_sequence(SMOL, None), 30 * 3 * 256 * (256 + 4 + 4));
    }

    #[test]
    fn shares_replace_the_methods_own_settings() {
        let options = EvalOptions {
            methods: vec![CacheMethod::Observed],
            slots: vec![100],
            recent_permille: Some(500),
            sinks: Some(2),
            ..options()
        };
        let settings = options.configurations(None)[0].settings;
        assert_eq!((settings.sinks, settings.recent), (2, 50));
    }

    #[test]
    fn mistakes_are_named() {
        let wrong = |change: fn(&mut EvalOptions)| {
            let mut options = options();
            change(&mut options);
            options.check(SMOL).unwrap_err().to_string()
        };
        options().check(SMOL).unwrap();
        assert!(wrong(|o| o.methods.clear()).starts_with("methods: "));
        assert!(wrong(|o| o.slots = vec![64, 0]).starts_with("slots: "));
        assert!(wrong(|o| o.chunk = 100).starts_with("chunk: "));
        assert!(wrong(|o| o.ring = 0).starts_with("ring: "));
        assert!(wrong(|o| o.documents = 0).starts_with("documents: "));
        let text = wrong(|o| o.context = 9000);
        assert!(text.contains("9000 tokens are more than the 8192"), "{text}");
    }
}

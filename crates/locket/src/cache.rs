//! How sequences use the cache: the settings' defaults filled in from the model and its side-car.

use locket_model::kv_cache::{
    CacheGeometry, CacheMethod, CachePlan, CacheSettings, SideArrays, SideCar, compaction::Frame,
};
use locket_server::CacheBounds;

use crate::config::{Config, value::about_bytes};

/// Longest prompt plus answer by default where the cache folds, in tokens.
const FOLDING_CONTEXT: u32 = 131_072;
/// Bounds of the default slots, in tokens.
const DEFAULT_SLOTS: std::ops::RangeInclusive<u32> = 512..=4096;
/// Smallest block that is planned on its own.
const SMALLEST: u32 = 256;
/// Blocks are multiples of this many slots, so that attention's tiles start at whole tiles.
const GRAIN: u32 = 64;

/// What was decided.
#[derive(Debug, Clone)]
pub struct CacheChoice {
    /// Defaults and limits of requests.
    pub bounds: CacheBounds,
    /// How a sequence that fills its block uses it unless its request says otherwise.
    pub settings: CacheSettings,
    /// Longest prompt plus answer in tokens.
    pub context: u32,
    /// Tokens that the model was trained on.
    pub trained: u32,
    /// Sizes of the blocks, ascending.
    pub capacities: Vec<u32>,
    /// What the methods that may be used keep beside keys and values.
    pub side: SideArrays,
}

/// Settings that contradict the model or its side-car.
#[derive(Debug, thiserror::Error)]
pub enum ChoiceError {
    /// More context than positions.
    #[error(
        "max-model-len = {asked} ({origin}) is more than the {trained} tokens that the model was trained for; {reason}"
    )]
    Context {
        /// Tokens asked for.
        asked: u32,
        /// Who asked.
        origin: String,
        /// Tokens trained for.
        trained: u32,
        /// Why the cache cannot go beyond, and what would.
        reason: String,
    },
    /// The operator asks for a block that no sequence could fill.
    #[error(
        "cache.capacities has {asked} ({origin}), which is more than the {limit} tokens of the context; \
         lower it or raise max-model-len"
    )]
    Capacity {
        /// Tokens asked for.
        asked: u32,
        /// Who asked.
        origin: String,
        /// The context, or what the model was trained for if that is less.
        limit: u32,
    },
    /// A method without its weights.
    #[error(
        "{key} ({origin}) has {method}, which needs trained weights, and there are none for this model: \
         give them with cache.side-car, or make them with `locket tune`"
    )]
    Weights {
        /// `cache.method` or `cache.methods`.
        key: &'static str,
        /// Who asked.
        origin: String,
        /// The method.
        method: &'static str,
    },
    /// A number of slots, or of what is in them, that does not go with the rest.
    #[error("{key} ({origin}): {reason}")]
    Slots {
        /// The setting.
        key: &'static str,
        /// Who asked.
        origin: String,
        /// What is wrong and what would be right.
        reason: String,
    },
}

impl CacheChoice {
    /// Decides for a model of this geometry.
    ///
    /// # Errors
    /// See [`ChoiceError`].
    pub fn make(
        config: &Config,
        geometry: CacheGeometry,
        side_car: Option<&SideCar>,
    ) -> Result<Self, ChoiceError> {
        Chooser {
            config,
            side_car,
            trained: u32::try_from(geometry.max_position).unwrap_or(u32::MAX),
            max_position: geometry.max_position,
        }
        .choose(geometry)
    }

    /// The choice in words, a line each. Bytes are of `plan`'s blocks.
    pub fn describe(&self, plan: &CachePlan) -> Vec<String> {
        let CacheSettings { method, slots, ring, sinks, recent, recall_permille, layer_budgets } =
            self.settings;
        let trained = self.trained;
        let beyond = match self.context > trained {
            true => format!(", beyond the {trained} that the model was trained for"),
            false => String::new(),
        };
        let mut lines = vec![format!("context    {} tokens{beyond}", self.context)];
        let each = |side, capacity| {
            about_bytes(CachePlan::block_bytes(plan.geometry, plan.slot_type, side, capacity))
        };
        if method == CacheMethod::Full {
            lines.push("method     full: every token is kept".into());
            lines.push(format!("sequence   {} at {} tokens", each(self.side, slots), self.context));
        } else {
            let recall = match method {
                CacheMethod::Learned => format!(", {recall_permille}/1000 of the others for recall"),
                _ => String::new(),
            };
            let mean = if layer_budgets { " in the mean of the layers" } else { "" };
            lines.push(format!(
                "method     {}: {slots} slots{mean} and a ring of {ring}, {sinks} sinks, {recent} recent{recall}",
                method.name()
            ));
            lines.push(format!(
                "sequence   {} at any length; the full cache would take {} at {} tokens",
                each(self.side, self.settings.capacity()),
                each(SideArrays::default(), self.context),
                self.context
            ));
        }
        let others: Vec<&str> = self.bounds.allowed.iter().map(|method| method.name()).collect();
        lines.push(format!(
            "requests   may ask for {}; up to {} slots, or {} tokens of method full",
            others.join(", "),
            self.bounds.max_slots,
            self.bounds.max_full_len
        ));
        lines
    }
}

/// The inputs of the decision.
struct Chooser<'a> {
    config: &'a Config,
    side_car: Option<&'a SideCar>,
    trained: u32,
    max_position: usize,
}

impl Chooser<'_> {
    fn choose(&self, geometry: CacheGeometry) -> Result<CacheChoice, ChoiceError> {
        let cache = &self.config.cache;
        let method = self.method()?;
        let allowed = self.allowed(method)?;
        let mut bounds = CacheBounds {
            lococo_slots: self.lococo_slots().filter(|_| allowed.contains(&CacheMethod::Lococo)),
            allowed,
            method,
            slots: self.slots(method)?,
            ring: cache.ring,
            max_slots: 0,
            max_full_len: 0,
            sinks: cache.sinks,
            learned_recent_permille: cache.recent_permille.or(self.recommended_recent()),
            learned_recall_permille: cache
                .recall_permille
                .or(self.side_car.and_then(|side_car| side_car.recall_permille)),
            layer_budgets: cache.layer_budgets
                && self.side_car.is_some_and(|side_car| side_car.layer_shares.is_some()),
            require_exact: cache.require_exact,
            scoring_full: self.config.api.scoring_full,
            // Set once their memory is planned.
            snapshots: false,
        };
        let default = match method {
            CacheMethod::Full => None,
            _ => Some(bounds.settings(method, bounds.default_slots(method))),
        };
        let context = self.context(default)?;
        let settings = default.unwrap_or(CacheSettings::full(context));
        let capacities = self.capacities(&bounds, settings, context)?;
        let largest = capacities.last().copied().unwrap_or(0);
        bounds.max_full_len = largest.min(self.trained).min(context);
        // A block nearly as long as the trained context could not be compacted beyond it.
        let reach = if context > self.trained { largest.min(self.trained - 16) } else { largest };
        bounds.max_slots = CacheBounds::largest_slots(reach, cache.ring);
        self.check_folding(&mut bounds)?;
        let side = SideArrays::of(&bounds.allowed, geometry, self.side_car);
        Ok(CacheChoice { bounds, settings, context, trained: self.trained, capacities, side })
    }

    fn serves(&self, method: CacheMethod) -> bool {
        !method.needs_side_car() || self.side_car.is_some_and(|side_car| side_car.serves(method))
    }

    fn check_weights(&self, key: &'static str, method: CacheMethod) -> Result<(), ChoiceError> {
        if self.serves(method) {
            return Ok(());
        }
        Err(ChoiceError::Weights { key, origin: self.config.origin(key), method: method.name() })
    }

    fn method(&self) -> Result<CacheMethod, ChoiceError> {
        match self.config.cache.method {
            Some(method) => self.check_weights("cache.method", method).map(|()| method),
            None if self.serves(CacheMethod::Learned) => Ok(CacheMethod::Learned),
            None => Ok(CacheMethod::Observed),
        }
    }

    /// The default method and those that requests may name, in the documentation's order.
    fn allowed(&self, default: CacheMethod) -> Result<Vec<CacheMethod>, ChoiceError> {
        let is_allowed = |method: CacheMethod| match &self.config.cache.methods {
            Some(named) => named.contains(&method),
            // Those cost memory in every block, and these need weights for one number of slots.
            None => !matches!(method, CacheMethod::Expected | CacheMethod::Lococo) && self.serves(method),
        };
        let mut allowed = CacheMethod::ALL.to_vec();
        allowed.retain(|&method| method == default || is_allowed(method));
        allowed.iter().try_for_each(|&method| self.check_weights("cache.methods", method))?;
        Ok(allowed)
    }

    fn lococo_slots(&self) -> Option<u32> {
        self.side_car.and_then(|side_car| side_car.lococo.as_ref()).map(|weights| weights.slots)
    }

    fn recommended_recent(&self) -> Option<u16> {
        let recent = self.side_car.and_then(|side_car| side_car.recent_permille)?;
        Some(recent.min(1000) as u16)
    }

    /// `M` of requests that name none.
    fn slots(&self, method: CacheMethod) -> Result<u32, ChoiceError> {
        let refuse = |key, reason| Err(ChoiceError::Slots { key, origin: self.config.origin(key), reason });
        let cache = &self.config.cache;
        let context = self.config.max_model_len.map_or(u32::MAX, |tokens| tokens as u32).min(self.trained);
        let room = CacheBounds::largest_slots(context, cache.ring).max(CacheBounds::MIN_SLOTS);
        let slots = match (cache.slots, self.lococo_slots()) {
            (Some(asked), Some(trained)) if method == CacheMethod::Lococo && asked != trained => {
                let reason =
                    format!("{asked} slots, but the weights of method lococo were trained for {trained}");
                return refuse("cache.slots", reason);
            }
            (None, Some(trained)) if method == CacheMethod::Lococo => trained,
            (Some(asked), _) => asked,
            (None, _) => (self.trained / 4).clamp(*DEFAULT_SLOTS.start(), *DEFAULT_SLOTS.end()).min(room),
        };
        let capacity = slots.saturating_add(CacheBounds::ring_of(slots, cache.ring));
        if method != CacheMethod::Full && cache.slots.is_some() && capacity > self.trained {
            let reason = format!(
                "{slots} slots and their ring are {capacity} tokens, more than the {} that the model was trained \
                 for",
                self.trained
            );
            return refuse("cache.slots", reason);
        }
        match cache.sinks {
            Some(sinks) if sinks > slots / 4 => {
                refuse("cache.sinks", format!("{sinks} is more than a quarter of the {slots} slots"))
            }
            _ => Ok(slots),
        }
    }

    /// The longest sequence; `default` are the settings of one that folds.
    fn context(&self, default: Option<CacheSettings>) -> Result<u32, ChoiceError> {
        let trained = self.trained;
        let reach =
            default.map_or(trained, |settings| Frame::new(self.max_position, settings.capacity()).limit());
        let Some(asked) = self.config.max_model_len.map(|tokens| u32::try_from(tokens).unwrap_or(u32::MAX))
        else {
            return Ok(reach.min(trained.max(FOLDING_CONTEXT)));
        };
        if asked <= reach {
            return Ok(asked);
        }
        let reason = match default {
            None => "method full ends there: take another cache.method".into(),
            Some(settings) => format!(
                "blocks of {} slots leave no positions to go on: lower cache.slots",
                settings.capacity()
            ),
        };
        Err(ChoiceError::Context { asked, origin: self.config.origin("max-model-len"), trained, reason })
    }

    /// The sizes of the blocks: the operator's, else those derived from what a sequence needs by
    /// default. That block, and the one of `lococo`, is always there; the operator's larger ones are
    /// for requests with more `slots`.
    fn capacities(
        &self,
        bounds: &CacheBounds,
        settings: CacheSettings,
        context: u32,
    ) -> Result<Vec<u32>, ChoiceError> {
        let default = settings.capacity();
        let limit = context.min(self.trained);
        let asked = &self.config.cache.capacities;
        if let Some(&asked) = asked.iter().find(|&&size| size > limit.max(default)) {
            let origin = self.config.origin("cache.capacities");
            return Err(ChoiceError::Capacity { asked, origin, limit });
        }
        let parts = match settings.method {
            CacheMethod::Full => [context / 16, context / 4],
            _ => [settings.slots / 8, settings.slots / 2],
        };
        let mut sizes: Vec<u32> = if asked.is_empty() {
            let derived = parts.map(|size| size.next_multiple_of(GRAIN).max(SMALLEST));
            derived.into_iter().filter(|&size| size < default).collect()
        } else {
            asked.clone()
        };
        sizes.push(default);
        sizes.extend(bounds.lococo_slots.map(|slots| slots.saturating_add(bounds.ring(slots))));
        sizes.sort_unstable();
        sizes.dedup();
        Ok(sizes)
    }

    /// Leaves out methods that fold where no block has room for slots and a ring, as in a context of a
    /// few tokens.
    fn check_folding(&self, bounds: &mut CacheBounds) -> Result<(), ChoiceError> {
        let folds = |method: &CacheMethod| *method != CacheMethod::Full;
        if bounds.method != CacheMethod::Full || !bounds.allowed.iter().any(folds) {
            return Ok(());
        }
        let (key, reason) = if bounds.max_slots < CacheBounds::MIN_SLOTS {
            let reason = "no block has room for a ring and 16 slots; only full works here";
            ("cache.methods", reason.to_owned())
        } else if bounds.slots > bounds.max_slots {
            let reason = format!(
                "{} is more than the {} that the largest block holds",
                bounds.slots, bounds.max_slots
            );
            ("cache.slots", reason)
        } else {
            return Ok(());
        };
        let is_asked = self.config.cache.methods.is_some() || key == "cache.slots";
        if is_asked {
            return Err(ChoiceError::Slots { key, origin: self.config.origin(key), reason });
        }
        bounds.allowed = vec![CacheMethod::Full];
        Ok(())
    }
}

#[cfg(test)]
#[path = "cache_tests.rs"]
mod tests;

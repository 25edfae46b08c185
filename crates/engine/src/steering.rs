//! What restricts the tokens of a continuation: grammars, forced tokens, thinking budgets.
//!
//! The engine knows only these traits; `locket-processor` implements them. One [`Steering`] lives with
//! each continuation. What it takes long to compute is computed by a worker thread while the model runs
//! the next step, so a difficult grammar delays its own sequence and nobody else's.

use std::{fmt, sync::Arc};

mod steered;
mod workers;

pub(crate) use steered::{Steer, Steered};
pub(crate) use workers::Workers;

/// A set of token ids, one bit each.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokenSet {
    /// Bit `id % 32` of word `id / 32`.
    words: Vec<u32>,
    vocab_size: u32,
}

impl TokenSet {
    /// The empty set of ids below `vocab_size`.
    pub fn new(vocab_size: u32) -> Self {
        Self { words: vec![0; vocab_size.div_ceil(32) as usize], vocab_size }
    }

    /// Empties the set.
    pub fn clear(&mut self) {
        self.words.fill(0);
    }

    /// Puts every id in.
    pub fn fill(&mut self) {
        self.words.fill(u32::MAX);
        self.trim();
    }

    /// Puts an id in; ids out of range are ignored.
    pub fn insert(&mut self, id: u32) {
        if id < self.vocab_size {
            self.words[id as usize / 32] |= 1 << (id % 32);
        }
    }

    /// Takes an id out.
    pub fn remove(&mut self, id: u32) {
        if id < self.vocab_size {
            self.words[id as usize / 32] &= !(1 << (id % 32));
        }
    }

    /// Whether an id is in the set.
    pub fn contains(&self, id: u32) -> bool {
        id < self.vocab_size && self.words[id as usize / 32] & (1 << (id % 32)) != 0
    }

    /// Replaces the set by bits of `words`, bit `id % 32` of word `id / 32`; missing words are empty.
    pub fn copy_from_words(&mut self, words: &[u32]) {
        let count = words.len().min(self.words.len());
        self.words[..count].copy_from_slice(&words[..count]);
        self.words[count..].fill(0);
        self.trim();
    }

    /// The bits, bit `id % 32` of word `id / 32`.
    pub fn words(&self) -> &[u32] {
        &self.words
    }

    /// Ids are below this.
    pub fn vocab_size(&self) -> u32 {
        self.vocab_size
    }

    /// Bits beyond the vocabulary are never set.
    fn trim(&mut self) {
        let used = self.vocab_size % 32;
        if used != 0
            && let Some(last) = self.words.last_mut()
        {
            *last &= (1 << used) - 1;
        }
    }
}

/// How the next token of a continuation is chosen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Guide {
    /// As the sampler likes.
    Free,
    /// Among the ids of the set that [`Steering::compute`] filled.
    Allowed,
    /// This one, whatever the model thinks; its log-probability is still the model's.
    Forced(u32),
    /// There is none: the continuation is complete and ends as by a stop token, whatever `min_tokens`
    /// and `ignore_eos` say.
    Complete,
    /// The steering cannot go on (a grammar beyond its limits); the continuation fails. The text is for
    /// the log.
    Failed(String),
}

/// What is known right after a token was taken in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Advance {
    /// The next token's guide, never [`Guide::Allowed`].
    Known(Guide),
    /// It takes a computation.
    Compute,
}

/// Steers one continuation.
pub trait Steering: Send + fmt::Debug {
    /// Takes in the token that was just chosen; one that ends the continuation (one of the request's
    /// stop tokens) is not reported. Runs on the engine thread: a few microseconds at most.
    fn advance(&mut self, id: u32) -> Advance;

    /// The guide of the next token; for [`Guide::Allowed`] it fills `allowed`, whose contents before
    /// the call are arbitrary. Runs on a worker thread, beside the model. Called before the first token,
    /// and after every [`Advance::Compute`]. It must end by itself: shutting down waits for it. A set without
    /// any id of the vocabulary fails this continuation, as [`Guide::Failed`] does; so does a panic, as an
    /// internal error.
    fn compute(&mut self, allowed: &mut TokenSet) -> Guide;
}

/// Makes the steering of each continuation of a request.
pub trait SteeringPlan: Send + Sync + fmt::Debug {
    /// The state before the first token of continuation `choice`. Runs on a worker thread.
    fn start(&self, choice: u32) -> Box<dyn Steering>;
}

/// A plan shared by the continuations of a request. Two are equal if they are the same plan.
#[derive(Debug, Clone)]
pub struct SharedPlan(Arc<dyn SteeringPlan>);

impl SharedPlan {
    /// Shares a plan.
    pub fn new(plan: impl SteeringPlan + 'static) -> Self {
        Self(Arc::new(plan))
    }

    /// The state before the first token of continuation `choice`.
    pub fn start(&self, choice: u32) -> Box<dyn Steering> {
        self.0.start(choice)
    }
}

impl PartialEq for SharedPlan {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn nothing_beyond_the_vocabulary_is_ever_in() {
        let mut set = TokenSet::new(33);
        set.fill();
        assert_eq!(set.words(), [u32::MAX, 1]);
        set.copy_from_words(&[0, u32::MAX, 7]);
        assert_eq!(set.words(), [0, 1]);
        set.insert(40);
        assert!(set.contains(32) && !set.contains(40));
        set.copy_from_words(&[]);
        assert_eq!(set, TokenSet::new(33));
    }

    proptest! {
        #[test]
        fn a_set_is_a_set(vocab_size in 1u32..200, steps in proptest::collection::vec((any::<bool>(), 0u32..220), 0..100)) {
            let mut set = TokenSet::new(vocab_size);
            let mut model = std::collections::BTreeSet::new();
            for (put, id) in steps {
                if put {
                    set.insert(id);
                    if id < vocab_size { model.insert(id); }
                } else {
                    set.remove(id);
                    model.remove(&id);
                }
            }
            for id in 0..220 {
                prop_assert_eq!(set.contains(id), model.contains(&id));
            }
        }
    }
}

//! A model without weights: it chooses at random among the tokens that its steering allows.
#![allow(dead_code, reason = "each test file uses a part")]

use locket_engine::steering::{Advance, Guide, SharedPlan, TokenSet};
use locket_processor::Processor;
use rand::{Rng as _, rngs::StdRng, seq::IndexedRandom as _};

/// One continuation of a plan.
pub struct Sampler<'p> {
    processor: &'p Processor,
    steering: Box<dyn locket_engine::steering::Steering>,
    allowed: TokenSet,
    guide: Guide,
    /// Tokens so far, without an end token.
    pub ids: Vec<u32>,
}

impl<'p> Sampler<'p> {
    pub fn new(processor: &'p Processor, plan: &SharedPlan) -> Self {
        let mut steering = plan.start(0);
        let mut allowed = TokenSet::new(processor.vocab_size() as u32);
        let guide = steering.compute(&mut allowed);
        Self { processor, steering, allowed, guide, ids: Vec::new() }
    }

    /// How the next token is chosen.
    pub fn guide(&self) -> &Guide {
        &self.guide
    }

    /// Whether a token may be next.
    pub fn allows(&self, id: u32) -> bool {
        match self.guide {
            Guide::Free => true,
            Guide::Allowed => self.allowed.contains(id),
            Guide::Forced(forced) => forced == id,
            Guide::Complete | Guide::Failed(_) => false,
        }
    }

    /// All tokens that may be next.
    pub fn choices(&self) -> Vec<u32> {
        (0..self.allowed.vocab_size()).filter(|id| self.allows(*id)).collect()
    }

    /// Takes a token as chosen.
    pub fn take(&mut self, id: u32) {
        assert!(self.allows(id), "{id} {:?} after {:?}", self.processor.token_text(id), self.text());
        self.ids.push(id);
        self.guide = match self.steering.advance(id) {
            Advance::Known(guide) => guide,
            Advance::Compute => self.steering.compute(&mut self.allowed),
        };
    }

    /// Takes the tokens of a text, as the tokenizer cuts it.
    pub fn write(&mut self, text: &str) {
        for id in self.processor.encode(text, false).unwrap() {
            self.take(id);
        }
    }

    pub fn text(&self) -> String {
        let bytes: Vec<u8> =
            self.ids.iter().flat_map(|id| self.processor.token_bytes(*id)).copied().collect();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// Chooses at random, closers and ends more often than others; the text if it ends in time.
    pub fn run(mut self, rng: &mut StdRng, max_tokens: usize) -> Option<String> {
        while self.ids.len() < max_tokens {
            assert!(!matches!(self.guide, Guide::Failed(_)), "{:?} after {:?}", self.guide, self.text());
            if self.guide == Guide::Complete {
                return Some(self.text());
            }
            let choices = self.choices();
            let is_closer = |id: &u32| {
                matches!(self.processor.token_bytes(*id), b"\"" | b"}" | b"]" | b"," | b":")
                    || self.processor.eos_token_ids().contains(id)
            };
            let closers: Vec<u32> = choices.iter().copied().filter(is_closer).collect();
            let from = if closers.is_empty() || rng.random_bool(0.6) { &choices } else { &closers };
            let id = *from.choose(rng).expect("a token is allowed");
            if self.processor.eos_token_ids().contains(&id) {
                return Some(self.text());
            }
            assert!(!self.processor.is_special(id), "{id} is a control token");
            self.take(id);
        }
        None
    }
}

//! Training sequences: ordinary text, text that is repeated, and text with facts that are asked for.

use std::path::PathBuf;

use locket_processor::Processor;
use rand::{Rng as _, rngs::StdRng, seq::IndexedRandom as _};
use serde::{Deserialize, Serialize};

use crate::{
    error::{Error, Result},
    facts::{Fact, facts},
    parameters::random,
    windows::{WindowState, Windows},
};

/// Number of the planted facts' random draws among a run's purposes.
const FACTS: u64 = 2;

const SEPARATOR: &str = "\n\nRepeat the text above word for word:\n\n";

/// What a sequence teaches.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Kind {
    /// A window of one document.
    Natural,
    /// A text, a separator, the same text again.
    Repeat,
    /// A text with planted facts, then questions about all of them with their answers.
    Questions,
}

impl Kind {
    /// In the order of a cycle.
    pub(crate) const CYCLE: [Self; 6] =
        [Self::Natural, Self::Repeat, Self::Questions, Self::Natural, Self::Questions, Self::Repeat];

    /// The kind of a step.
    pub(crate) fn of_step(step: u64) -> Self {
        Self::CYCLE[(step % Self::CYCLE.len() as u64) as usize]
    }

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Natural => "natural",
            Self::Repeat => "repeat",
            Self::Questions => "questions",
        }
    }
}

/// Sequences of one kind and equal length.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct TrainingBatch {
    pub kind: Kind,
    /// One `[length]` per sequence.
    pub sequences: Vec<Vec<u32>>,
    /// Per sequence the first token of the part that asks; 0 for [`Kind::Natural`].
    pub asks_from: Vec<usize>,
    /// Per sequence how many tokens from the start can be asked for.
    pub askable: Vec<usize>,
}

impl TrainingBatch {
    pub(crate) fn length(&self) -> usize {
        self.sequences.first().map_or(0, Vec::len)
    }
}

/// Makes the batches of a run, in order.
pub(crate) struct Recipe<'a> {
    windows: Windows<'a>,
    processor: &'a Processor,
    separator: Vec<u32>,
    batch: usize,
    length: usize,
    seed: u64,
}

impl<'a> Recipe<'a> {
    pub(crate) fn new(
        files: &[PathBuf],
        processor: &'a Processor,
        batch: usize,
        length: usize,
        seed: u64,
    ) -> Result<Self> {
        let separator = processor.encode(SEPARATOR, false)?;
        if length < 4 * separator.len() {
            let least = 4 * separator.len();
            return Err(Error::setting(
                "sequence",
                format!("is {length}; it must be at least {least} tokens"),
            ));
        }
        let windows = Windows::new(files, processor, length, seed)?;
        Ok(Self { windows, processor, separator, batch, length, seed })
    }

    pub(crate) fn state(&self) -> WindowState {
        self.windows.state()
    }

    pub(crate) fn resume(&mut self, state: WindowState) {
        self.windows.resume(state);
    }

    /// The batch of a step; steps must be asked for in order.
    pub(crate) fn batch(&mut self, step: u64, kind: Kind) -> Result<TrainingBatch> {
        let mut batch =
            TrainingBatch { kind, sequences: Vec::new(), asks_from: Vec::new(), askable: Vec::new() };
        for at in 0..self.batch {
            let window = self.windows.next()?;
            let (sequence, asks_from, askable) = match kind {
                Kind::Natural => (window, 0, 0),
                Kind::Repeat => self.repeat(&window),
                Kind::Questions => {
                    let mut random = random(self.seed, FACTS, step * self.batch as u64 + at as u64);
                    self.questions(&window, &mut random)?
                }
            };
            batch.sequences.push(sequence);
            batch.asks_from.push(asks_from);
            batch.askable.push(askable);
        }
        Ok(batch)
    }

    fn repeat(&self, window: &[u32]) -> (Vec<u32>, usize, usize) {
        let askable = (self.length - self.separator.len()) / 2;
        let text = &window[..askable];
        let sequence = [text, &self.separator, text].concat();
        (sequence, askable + self.separator.len(), askable)
    }

    fn questions(&self, window: &[u32], random: &mut StdRng) -> Result<(Vec<u32>, usize, usize)> {
        let least = (8 * self.length / 4096).max(1);
        let most = (20 * self.length / 4096).max(least + 1);
        let mut planted = Vec::new();
        let mut asked = Vec::new();
        let count = random.random_range(least..most);
        // Of a short sequence only a short fact may be a part.
        let spare = facts(16, random);
        for (at, fact) in facts(count, random).into_iter().chain(spare).enumerate() {
            if at >= count && !planted.is_empty() {
                break;
            }
            let (statement, question) = self.encode(&fact, random)?;
            let len = |all: &[Vec<u32>]| all.iter().map(Vec::len).sum::<usize>();
            let used = len(&planted) + len(&asked) + statement.len() + question.len();
            // Facts must stay rare in the text, as they are where they will be looked for.
            if used <= self.length / 2 {
                planted.push(statement);
                asked.insert(random.random_range(0..=asked.len()), question);
            }
        }
        if planted.is_empty() {
            let reason = format!("is {}; a fact and its question do not fit in half of it", self.length);
            return Err(Error::setting("sequence", reason));
        }
        let asked = asked.concat();
        let text_len = self.length - asked.len() - planted.iter().map(Vec::len).sum::<usize>();
        let places = planted.iter().map(|_| {
            let share = random.random_range(0.02..0.93);
            ((share * text_len as f64) as usize).max(1)
        });
        let mut places: Vec<usize> = places.collect();
        places.sort_unstable();
        let (mut sequence, mut copied) = (Vec::with_capacity(self.length), 0);
        for (place, statement) in places.into_iter().zip(&planted) {
            sequence.extend_from_slice(&window[copied..place]);
            sequence.extend_from_slice(statement);
            copied = place;
        }
        sequence.extend_from_slice(&window[copied..text_len]);
        let asks_from = sequence.len();
        sequence.extend_from_slice(&asked);
        Ok((sequence, asks_from, asks_from))
    }

    /// Tokens to plant and tokens to ask with.
    fn encode(&self, fact: &Fact, random: &mut StdRng) -> Result<(Vec<u32>, Vec<u32>)> {
        let mut pick = |of: &[&'static str]| of.choose(random).copied().unwrap_or_default();
        let statement =
            format!("{}{}{}", pick(&["\n\n", " ", "\n"]), fact.statement, pick(&["\n\n", " ", "\n"]));
        let opening = pick(&["", "Question: ", "Recall: ", "Now, ", "- "]);
        let question = format!("\n\n{opening}{}{}", fact.question, fact.answer);
        Ok((self.processor.encode(&statement, false)?, self.processor.encode(&question, false)?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing;

    #[test]
    fn sequences_are_what_their_kind_says() {
        let (folder, processor) = (tempfile::tempdir().unwrap(), testing::processor());
        let path = testing::text(folder.path());
        let mut recipe = Recipe::new(&[path], &processor, 3, 1000, 5).unwrap();
        for step in 0..6 {
            let batch = recipe.batch(step, Kind::of_step(step)).unwrap();
            assert_eq!(batch.sequences.len(), 3);
            for (at, ids) in batch.sequences.iter().enumerate() {
                assert_eq!(ids.len(), batch.length());
                let text = processor.decode(ids, false);
                let (from, askable) = (batch.asks_from[at], batch.askable[at]);
                match batch.kind {
                    Kind::Natural => assert_eq!((ids.len(), from, askable), (1000, 0, 0)),
                    Kind::Repeat => {
                        assert_eq!(ids[..askable], ids[from..]);
                        assert!(text.contains(SEPARATOR) && ids.len() >= 999);
                    }
                    Kind::Questions => {
                        assert_eq!((ids.len(), from), (1000, askable));
                        assert!((500..990).contains(&from), "{from}");
                        assert!(processor.decode(&ids[from..], false).starts_with("\n\n"));
                    }
                }
            }
        }
        assert!(Recipe::new(&[testing::text(folder.path())], &processor, 1, 40, 0).is_err());
    }
}

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
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Kind {
    /// A window of one document.
    #[default]
    Natural,
    /// A text, a separator, the same text again.
    Repeat,
    /// A text with planted facts, then questions about all of them with their answers.
    Questions,
}

impl Kind {
    /// In the order of a cycle: what is asked for teaches most, repetition least; the first two calibrate
    /// both outputs.
    pub(crate) const CYCLE: [Self; 16] = {
        use Kind::{Natural as N, Questions as Q, Repeat as R};
        [N, Q, Q, Q, N, Q, Q, Q, N, Q, Q, Q, N, Q, Q, R]
    };

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
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct TrainingBatch {
    pub kind: Kind,
    /// The step that it is for.
    pub step: u64,
    /// One `[length]` per sequence.
    pub sequences: Vec<Vec<u32>>,
    /// Per sequence the first token of the part that asks; 0 for [`Kind::Natural`].
    pub asks_from: Vec<usize>,
    /// Per sequence how many tokens from the start can be asked for.
    pub askable: Vec<usize>,
    /// Per sequence the rows that predict a token of an answer; none for [`Kind::Natural`].
    pub answering: Vec<Vec<u32>>,
}

impl TrainingBatch {
    pub(crate) fn length(&self) -> usize {
        self.sequences.first().map_or(0, Vec::len)
    }
}

/// A question with its answer.
struct Asked {
    ids: Vec<u32>,
    /// Index of the answer's first token.
    answer: usize,
}

impl Asked {
    fn len(&self) -> usize {
        self.ids.len()
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
        let mut batch = TrainingBatch { kind, step, ..TrainingBatch::default() };
        for at in 0..self.batch {
            let window = self.windows.next()?;
            let (sequence, asks_from, askable, answering) = match kind {
                Kind::Natural => (window, 0, 0, Vec::new()),
                Kind::Repeat => self.repeat(&window),
                Kind::Questions => {
                    let mut random = random(self.seed, FACTS, step * self.batch as u64 + at as u64);
                    self.questions(&window, &mut random)?
                }
            };
            batch.sequences.push(sequence);
            batch.asks_from.push(asks_from);
            batch.askable.push(askable);
            batch.answering.push(answering);
        }
        Ok(batch)
    }

    fn repeat(&self, window: &[u32]) -> (Vec<u32>, usize, usize, Vec<u32>) {
        let askable = (self.length - self.separator.len()) / 2;
        let text = &window[..askable];
        let sequence = [text, &self.separator, text].concat();
        let asks_from = askable + self.separator.len();
        let answering = (asks_from as u32 - 1..sequence.len() as u32 - 1).collect();
        (sequence, asks_from, askable, answering)
    }

    fn questions(&self, window: &[u32], random: &mut StdRng) -> Result<(Vec<u32>, usize, usize, Vec<u32>)> {
        let least = (8 * self.length / 4096).max(1);
        let most = (20 * self.length / 4096).max(least + 1);
        let mut planted = Vec::new();
        let mut asked: Vec<Asked> = Vec::new();
        let count = random.random_range(least..most);
        // Of a short sequence only a short fact may be a part.
        let spare = facts(16, random);
        for (at, fact) in facts(count, random).into_iter().chain(spare).enumerate() {
            if at >= count && !planted.is_empty() {
                break;
            }
            let (statement, question) = self.encode(&fact, random)?;
            let used =
                planted.iter().map(Vec::len).sum::<usize>() + asked.iter().map(Asked::len).sum::<usize>();
            let used = used + statement.len() + question.len();
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
        let asked_len: usize = asked.iter().map(Asked::len).sum();
        let text_len = self.length - asked_len - planted.iter().map(Vec::len).sum::<usize>();
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
        let mut answering = Vec::new();
        for Asked { ids, answer } in asked {
            let first = sequence.len() + answer;
            sequence.extend_from_slice(&ids);
            answering.extend(first as u32 - 1..sequence.len() as u32 - 1);
        }
        Ok((sequence, asks_from, asks_from, answering))
    }

    /// Tokens to plant and tokens to ask with.
    fn encode(&self, fact: &Fact, random: &mut StdRng) -> Result<(Vec<u32>, Asked)> {
        let mut pick = |of: &[&'static str]| of.choose(random).copied().unwrap_or_default();
        let statement =
            format!("{}{}{}", pick(&["\n\n", " ", "\n"]), fact.statement, pick(&["\n\n", " ", "\n"]));
        let opening = pick(&["", "Question: ", "Recall: ", "Now, ", "- "]);
        let question = format!("\n\n{opening}{}", fact.question);
        let asked = self.processor.encode(&question, false)?;
        let ids = self.processor.encode(&format!("{question}{}", fact.answer), false)?;
        // Where both tokenisations part, the answer begins.
        let answer = asked.iter().zip(&ids).take_while(|(a, b)| a == b).count();
        let answer = answer.clamp(1, ids.len().saturating_sub(1).max(1));
        Ok((self.processor.encode(&statement, false)?, Asked { ids, answer }))
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
        for step in 0..16 {
            let batch = recipe.batch(step, Kind::of_step(step)).unwrap();
            assert_eq!(batch.sequences.len(), 3);
            for (at, ids) in batch.sequences.iter().enumerate() {
                assert_eq!(ids.len(), batch.length());
                let text = processor.decode(ids, false);
                let (from, askable) = (batch.asks_from[at], batch.askable[at]);
                match batch.kind {
                    Kind::Natural => {
                        assert_eq!((ids.len(), from, askable), (1000, 0, 0));
                        assert!(batch.answering[at].is_empty());
                    }
                    Kind::Repeat => {
                        assert_eq!(ids[..askable], ids[from..]);
                        assert!(text.contains(SEPARATOR) && ids.len() >= 999);
                    }
                    Kind::Questions => {
                        assert_eq!((ids.len(), from), (1000, askable));
                        assert!((500..990).contains(&from), "{from}");
                        assert!(processor.decode(&ids[from..], false).starts_with("\n\n"));
                        // What is answered was said before, word for word.
                        let answers = batch.answering[at].chunk_by(|a, b| a + 1 == *b);
                        for rows in answers {
                            let answer = &ids[rows[0] as usize + 1..=rows[rows.len() - 1] as usize + 1];
                            let answer = processor.decode(answer, false);
                            let told = processor.decode(&ids[..from], false);
                            let words = answer.trim_matches(|c: char| !c.is_alphanumeric());
                            assert!(told.contains(words), "{answer:?} was not told");
                        }
                    }
                }
            }
        }
        assert!(Recipe::new(&[testing::text(folder.path())], &processor, 1, 40, 0).is_err());
    }
}

//! Probes of recall: something is hidden in a long text and asked for at its end.
//!
//! Every probe is exactly as long as asked, made from a seed, and answered under teacher forcing: the
//! model sees the right answer so far and must find each next token of it. Texts here are not those
//! that [side-car weights](locket_model::kv_cache::SideCar) are trained on: no template is shared.

mod copy;
mod many_shot;
mod multi_key;
mod passkey;

use std::ops::Range;

use locket_model::TokenScore;
use locket_processor::Processor;
use rand::{Rng, SeedableRng, rngs::StdRng};
use serde::Serialize;

use crate::{
    Error, Task,
    documents::{Document, window},
    runner::Sequence,
};

/// Needles are hidden from this share of the haystack on …
const SHALLOWEST: f64 = 0.05;
/// … up to this share.
const DEEPEST: f64 = 0.9;

/// One probe.
#[derive(Debug, Clone, PartialEq)]
pub struct Probe {
    /// The whole text `[length]`, answers included.
    pub ids: Vec<u32>,
    /// Where what is asked for can be found.
    pub needle: Range<usize>,
    /// Answers, in order; their tokens are what is predicted.
    pub answers: Vec<Range<usize>>,
    /// For each token of the answers whether it counts for accuracy: not a space alone in front of an
    /// answer, which is a matter of the tokenizer.
    pub counted: Vec<bool>,
}

/// How one probe went.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct ProbeScore {
    /// Share of counted tokens that were the model's likeliest.
    pub accuracy: f32,
    /// Whether all were.
    pub exact: bool,
    /// Mean negative log likelihood of all answer tokens, in nats.
    pub nll: f32,
}

impl Probe {
    /// The probe as a sequence that predicts the answers.
    pub fn sequence(&self) -> Sequence<'_> {
        let predicted = self.answers.iter().cloned().flatten().map(|idx| idx as u32).collect();
        Sequence { ids: &self.ids, predicted }
    }

    /// Where the needle starts, as a share of the text.
    pub fn depth(&self) -> f32 {
        self.needle.start as f32 / self.ids.len().max(1) as f32
    }

    /// Judges the model's `scores`, one per token of the answers.
    pub fn judge(&self, scores: &[TokenScore]) -> ProbeScore {
        let targets = self.answers.iter().cloned().flatten().map(|idx| self.ids[idx]);
        let counted = targets.zip(scores).zip(&self.counted).filter(|(_, is_counted)| **is_counted);
        let (mut count, mut right) = (0u32, 0u32);
        for ((target, score), _) in counted {
            count += 1;
            right += u32::from(score.best == target);
        }
        let nll = scores.iter().map(|score| f64::from(score.nll)).sum::<f64>() / scores.len() as f64;
        ProbeScore { accuracy: right as f32 / count as f32, exact: right == count, nll: nll as f32 }
    }
}

/// Makes probes of one length.
pub struct Generator<'a> {
    processor: &'a Processor,
    documents: &'a [Document],
    /// Tokens of a probe.
    length: usize,
    /// The token that starts every text, if the model wants one.
    start: Vec<u32>,
    seed: u64,
}

impl<'a> Generator<'a> {
    /// A generator of probes of `length` tokens in haystacks from `documents`.
    ///
    /// # Errors
    /// [`Error::Options`] if there is no document of that length.
    pub fn new(
        processor: &'a Processor,
        documents: &'a [Document],
        length: usize,
        seed: u64,
    ) -> Result<Self, Error> {
        if documents.is_empty() || documents.iter().any(|document| document.ids.len() < length) {
            return Err(Error::options("text", format!("probes of {length} tokens need longer documents")));
        }
        let start = start_tokens(processor)?;
        Ok(Self { processor, documents, length, start, seed })
    }

    /// The first `count` probes of `task`. Which other tasks or how many more are made changes none.
    ///
    /// # Errors
    /// [`Error::Options`] if a probe does not fit into the length, or for a task without probes;
    /// [`Error::Processor`] for a vocabulary that cannot spell it.
    pub fn probes(&self, task: Task, count: usize) -> Result<Vec<Probe>, Error> {
        (0..count as u64)
            .map(|idx| {
                let seed = self.seed ^ ((task as u64 + 1) << 48) ^ (idx << 16);
                let mut draft = Draft { generator: self, rng: StdRng::seed_from_u64(seed) };
                match task {
                    Task::Passkey => passkey::probe(&mut draft),
                    Task::MultiKey => multi_key::probe(&mut draft),
                    Task::Copy => copy::probe(&mut draft),
                    Task::ManyShot => many_shot::probe(&mut draft),
                    Task::Perplexity => Err(Error::options("tasks", "perplexity has no probes")),
                }
            })
            .collect()
    }
}

/// The tokens that the model's tokenizer puts in front of every text.
pub(crate) fn start_tokens(processor: &Processor) -> Result<Vec<u32>, Error> {
    let bos = processor.bos_token_id();
    let ids = processor.encode("a", true)?;
    Ok(ids.first().filter(|&&first| Some(first) == bos).copied().into_iter().collect())
}

/// A probe in the making: its own random numbers.
struct Draft<'a> {
    generator: &'a Generator<'a>,
    rng: StdRng,
}

/// A question with its answer.
struct Asked {
    ids: Vec<u32>,
    /// The answer inside `ids`.
    answer: Range<usize>,
}

impl Draft<'_> {
    fn encode(&self, text: &str) -> Result<Vec<u32>, Error> {
        Ok(self.generator.processor.encode(text, false)?)
    }

    /// A number of five digits as text.
    fn number(&mut self) -> String {
        self.rng.random_range(10_000..100_000u32).to_string()
    }

    /// Encodes question and answer together, as a reader would meet them, and finds the border.
    fn ask(&self, question: &str, answer: &str) -> Result<Asked, Error> {
        let ids = self.encode(&format!("{question}{answer}"))?;
        let bytes = |id: &u32| self.generator.processor.token_bytes(*id).len();
        // SentencePiece puts a space in front of every text.
        let total: usize = ids.iter().map(bytes).sum();
        let mut left = question.len() + total.saturating_sub(question.len() + answer.len());
        let first = ids.iter().position(|id| {
            let is_answer = bytes(id) > left;
            left = left.saturating_sub(bytes(id));
            is_answer
        });
        let answer = first.unwrap_or(ids.len())..ids.len();
        Ok(Asked { ids, answer })
    }

    /// A stretch of a random document.
    fn haystack(&mut self, tokens: usize) -> Vec<u32> {
        let documents = self.generator.documents;
        let document = &documents[self.rng.random_range(0..documents.len())];
        window(document, tokens, &mut self.rng).to_vec()
    }

    /// Hides `needles` in a haystack at random depths between [`SHALLOWEST`] and `deepest`, in random
    /// order, and puts `asked` at the end. What is asked for is in needle `wanted`.
    fn assemble(
        &mut self,
        needles: &[Vec<u32>],
        wanted: usize,
        deepest: f64,
        asked: &[Asked],
    ) -> Result<Probe, Error> {
        let Generator { length, start, .. } = self.generator;
        let start = start.clone();
        let beside = start.len()
            + needles.iter().map(Vec::len).sum::<usize>()
            + asked.iter().map(|asked| asked.ids.len()).sum::<usize>();
        let hay = length.checked_sub(beside).filter(|&hay| hay >= needles.len().max(2)).ok_or_else(|| {
            let reason =
                format!("probes of {length} tokens are too short: needles and questions have {beside}");
            Error::options("probe-context", reason)
        })?;
        let haystack = self.haystack(hay);
        let (low, high) = ((SHALLOWEST * hay as f64) as usize, (deepest * hay as f64) as usize);
        let mut places: Vec<(usize, usize)> =
            (0..needles.len()).map(|idx| (self.rng.random_range(low..high.max(low + 1)), idx)).collect();
        places.sort_unstable();
        let mut ids = start;
        let (mut taken, mut needle) = (0, 0..0);
        for (place, idx) in places {
            ids.extend_from_slice(&haystack[taken..place]);
            taken = place;
            if idx == wanted {
                needle = ids.len()..ids.len() + needles[idx].len();
            }
            ids.extend_from_slice(&needles[idx]);
        }
        ids.extend_from_slice(&haystack[taken..]);
        let mut answers = Vec::with_capacity(asked.len());
        for Asked { ids: question, answer } in asked {
            answers.push(ids.len() + answer.start..ids.len() + answer.end);
            ids.extend_from_slice(question);
        }
        Ok(self.finish(ids, needle, answers))
    }

    fn finish(&self, ids: Vec<u32>, needle: Range<usize>, answers: Vec<Range<usize>>) -> Probe {
        let is_space = |idx: usize| self.generator.processor.token_bytes(ids[idx]) == b" ";
        let counted = answers
            .iter()
            .flat_map(|answer| answer.clone().map(|idx| idx != answer.start || !is_space(idx)))
            .collect();
        Probe { counted, ids, needle, answers }
    }
}

#[cfg(test)]
mod tests;

//! Prompts of a wanted number of tokens, all different, made of everyday words.

use std::{collections::HashSet, path::Path, str::FromStr};

use anyhow::{Context, bail, ensure};
use locket_model::load::Checkpoint;
use locket_processor::Processor;
use rand::{Rng, SeedableRng, rngs::StdRng, seq::IndexedRandom};
use serde_json::{Value, json};

use super::client::Target;

/// Short, frequent words: nearly every vocabulary has each of them as one token.
const WORDS: &str = "the of and to in a is that for it was on are as with his they at be this from have or by \
    one had not but what all were when we there can an your which their said if do will each about how up out \
    them then she many some so these would other into has more her two like him see time could no make than \
    first been its who now people my made over did down only way find use may water long little very after \
    words called just where most know get through back much before go good new write our used me man too any \
    day same right look think also around another came come work three word must because does part even place \
    well such here take why things help put years different away again off went old number great tell men say \
    small every found still between name should home big give air line set own under read last never us left \
    end along while might next sound below saw something thought both few those always looked show large often \
    together asked house world going want school important until form food keep children feet land side without \
    boy once animals life enough took sometimes four head above kind began almost live page got earth need far \
    hand high year mother light parts country father let night following picture being study second eyes soon \
    times story boys since white days ever paper hard near sentence better best across during today others \
    however sure means knew try told young miles sun ways thing whole hear example heard several change answer \
    room sea against top turned learn point city play toward five using himself usually";

/// A fixed length (`128`) or one drawn uniformly (`64:256`, both ends included).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Lengths {
    min: usize,
    max: usize,
}

impl Lengths {
    /// Draws a length.
    pub(super) fn sample(self, rng: &mut StdRng) -> usize {
        rng.random_range(self.min..=self.max)
    }
}

impl FromStr for Lengths {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let number = |text: &str| {
            text.parse::<usize>().map_err(|error| format!("{text:?}: {error}; give a number or MIN:MAX"))
        };
        let (min, max) = match text.split_once(':') {
            Some((min, max)) => (number(min)?, number(max)?),
            None => (number(text)?, number(text)?),
        };
        if min == 0 || min > max {
            return Err(format!("{text}: lengths start at 1 and MIN is at most MAX"));
        }
        Ok(Self { min, max })
    }
}

impl std::fmt::Display for Lengths {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.min == self.max {
            write!(formatter, "{}", self.min)
        } else {
            write!(formatter, "{}:{}", self.min, self.max)
        }
    }
}

/// Who counts the tokens of a text, without start and end tokens.
enum Counter<'a> {
    /// A tokenizer in this process.
    Local(Box<Processor>),
    /// The server's `/tokenize`, which takes the text in this field: `prompt` in vLLM's form, which
    /// locket has, `content` in llama.cpp's.
    Server { target: &'a Target, field: &'static str },
}

impl Counter<'_> {
    async fn count(&self, text: &str) -> anyhow::Result<usize> {
        match self {
            Self::Local(processor) => Ok(processor.encode(text, false)?.len()),
            Self::Server { target, field } => server_count(target, field, text)
                .await
                .context("the server's /tokenize stopped answering; --tokenizer-model PATH counts locally"),
        }
    }
}

/// One call of `/tokenize`; `None` if the answer has no token ids.
async fn server_count(target: &Target, field: &str, text: &str) -> Option<usize> {
    let body = json!({field: text, "add_special_tokens": false});
    let request = target.request(reqwest::Method::POST, "/tokenize").json(&body).send();
    let response = tokio::time::timeout(target.timeout, request).await.ok()?.ok()?;
    let answer: Value = response.error_for_status().ok()?.json().await.ok()?;
    answer["tokens"].as_array().map(Vec::len).filter(|&count| count > 0)
}

/// Makes prompts for one server.
pub(super) struct PromptMaker<'a> {
    counter: Option<Counter<'a>>,
    /// Words that are one token each where a counter could tell.
    words: Vec<&'static str>,
    /// Tokens of the rendered prompt that do not come from the text: template, start token.
    overhead: f64,
    /// 1 with a counter, else measured through usage.
    tokens_per_word: f64,
    used: HashSet<String>,
}

impl<'a> PromptMaker<'a> {
    /// Learns how the server counts: through a local tokenizer, its `/tokenize`, or its usage.
    ///
    /// # Errors
    /// The tokenizer cannot be loaded, or the server refuses the probes.
    pub(super) async fn calibrate(target: &'a Target, tokenizer: Option<&Path>) -> anyhow::Result<Self> {
        let all: Vec<&str> = WORDS.split_whitespace().collect();
        let counter = match tokenizer {
            Some(path) => {
                let processor = Processor::load(&Checkpoint::open(path)?)?;
                Some(Counter::Local(Box::new(processor)))
            }
            None => find_server_counter(target).await,
        };
        let mut maker =
            Self { counter, words: all, overhead: 0.0, tokens_per_word: 1.0, used: HashSet::new() };
        match maker.counter {
            Some(_) => maker.calibrate_by_counter(target).await?,
            None => maker.calibrate_by_usage(target).await?,
        }
        Ok(maker)
    }

    /// How tokens are counted, for the report.
    pub(super) fn counted_by(&self) -> &'static str {
        match self.counter {
            Some(Counter::Local(_)) => "tokenizer in this process",
            Some(Counter::Server { .. }) => "the server's /tokenize",
            None => "words, calibrated by the server's usage",
        }
    }

    async fn calibrate_by_counter(&mut self, target: &Target) -> anyhow::Result<()> {
        let Some(counter) = &self.counter else { return Ok(()) };
        let mut single = Vec::with_capacity(self.words.len());
        // A start of its own, because some tokenizers treat the first word of a text differently.
        let start = counter.count("start").await?;
        for &word in &self.words {
            if counter.count(&format!("start {}", [word; 8].join(" "))).await? == start + 8 {
                single.push(word);
            }
        }
        // A tokenizer without whole words still works: lengths are then reached by trial.
        if single.len() >= 16 {
            self.words = single;
        }
        let probe = self.words[..16].join(" ");
        let usage = probe_usage(target, &probe).await?;
        self.overhead = usage as f64 - counter.count(&probe).await? as f64;
        Ok(())
    }

    async fn calibrate_by_usage(&mut self, target: &Target) -> anyhow::Result<()> {
        let mut rng = StdRng::seed_from_u64(0);
        let (few, many) = (20, 80);
        let mut measured = [0.0; 2];
        for (usage, num_words) in measured.iter_mut().zip([few, many]) {
            *usage = probe_usage(target, &self.sentence(&mut rng, num_words).join(" ")).await? as f64;
        }
        self.tokens_per_word = (measured[1] - measured[0]) / (many - few) as f64;
        ensure!(
            self.tokens_per_word > 0.1,
            "the server's usage does not grow with the prompt ({} and {} tokens); give --tokenizer-model PATH",
            measured[0],
            measured[1]
        );
        self.overhead = measured[0] - few as f64 * self.tokens_per_word;
        Ok(())
    }

    fn sentence(&self, rng: &mut StdRng, num_words: usize) -> Vec<&'static str> {
        (0..num_words).map(|_| *self.words.choose(rng).unwrap_or(&"the")).collect()
    }

    /// A prompt never made before whose rendered form has `num_tokens` tokens: exactly where tokens
    /// can be counted, about as many where only the server's usage tells.
    ///
    /// # Errors
    /// `num_tokens` is not above what the template adds, or too small for ever new prompts.
    pub(super) async fn make(&mut self, rng: &mut StdRng, num_tokens: usize) -> anyhow::Result<String> {
        let text_tokens = num_tokens as f64 - self.overhead;
        ensure!(
            text_tokens >= 1.0,
            "--prompt-tokens {num_tokens} leaves no room for text: the server adds {:.0} tokens to every prompt",
            self.overhead
        );
        for _ in 0..64 {
            let prompt = self.fit(rng, text_tokens).await?;
            if self.used.insert(prompt.clone()) {
                return Ok(prompt);
            }
        }
        bail!("--prompt-tokens {num_tokens} is too small to make every prompt different")
    }

    async fn fit(&self, rng: &mut StdRng, text_tokens: f64) -> anyhow::Result<String> {
        let mut words = self.sentence(rng, ((text_tokens / self.tokens_per_word).round() as usize).max(1));
        let Some(counter) = &self.counter else { return Ok(words.join(" ")) };
        let wanted = text_tokens.round() as usize;
        for _ in 0..32 {
            let count = counter.count(&words.join(" ")).await?;
            if count == wanted {
                break;
            }
            if count > wanted {
                words.truncate(words.len().saturating_sub((count - wanted).div_ceil(2)).max(1));
            } else {
                words.extend(self.sentence(rng, (wanted - count).div_ceil(2)));
            }
        }
        Ok(words.join(" "))
    }
}

/// Finds the form of `/tokenize` that the server has, if any.
async fn find_server_counter(target: &Target) -> Option<Counter<'_>> {
    for field in ["prompt", "content"] {
        if server_count(target, field, "the first word").await.is_some() {
            return Some(Counter::Server { target, field });
        }
    }
    None
}

async fn probe_usage(target: &Target, text: &str) -> anyhow::Result<usize> {
    match target.probe_usage(text).await {
        Ok(usage) => Ok(usage.prompt_tokens),
        Err(failure) => bail!(
            "a first small request to {}{} failed ({}): {}{}",
            target.base_url,
            target.endpoint.path(),
            failure.kind,
            failure.message,
            if failure.kind == "http_400" { "; --no-ignore-eos leaves out the extension field" } else { "" }
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lengths_are_a_number_or_a_range() {
        assert_eq!("128".parse(), Ok(Lengths { min: 128, max: 128 }));
        assert_eq!("64:256".parse(), Ok(Lengths { min: 64, max: 256 }));
        for wrong in ["", "0", "5:4", "x", "1:", "0:3", "-1"] {
            assert!(wrong.parse::<Lengths>().is_err(), "{wrong}");
        }
        let mut rng = StdRng::seed_from_u64(3);
        let lengths = Lengths { min: 3, max: 5 };
        let drawn: HashSet<usize> = (0..200).map(|_| lengths.sample(&mut rng)).collect();
        assert_eq!(drawn, HashSet::from([3, 4, 5]));
    }

    #[test]
    fn words_are_plain_and_different() {
        let words: Vec<&str> = WORDS.split_whitespace().collect();
        let different: HashSet<&str> = words.iter().copied().collect();
        assert_eq!(words.len(), different.len());
        assert!(words.len() > 256 && words.iter().all(|word| word.chars().all(|c| c.is_ascii_lowercase())));
    }
}

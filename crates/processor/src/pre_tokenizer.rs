//! How text is cut into words before byte-pair merging, by the name that a GGUF file gives.
//!
//! The wrong cut gives plausible but worse ids, silently. So the table holds only splits that were
//! checked against the models' own `tokenizer.json`, and any other name is refused.

use tokenizers::{
    PreTokenizerWrapper, SplitDelimiterBehavior,
    pre_tokenizers::{
        byte_level::ByteLevel,
        digits::Digits,
        sequence::Sequence,
        split::{Split, SplitPattern},
    },
};

use crate::Error;

/// One step of cutting.
#[derive(Debug, Clone, Copy)]
enum Cut {
    /// Each digit stands alone.
    Digits,
    /// GPT-2's expression: contractions, words, numbers, symbols, blanks.
    Gpt2,
    /// Matches of an expression stand alone.
    Matches(&'static str),
}

/// A pre-tokenizer of the table.
#[derive(Debug)]
pub(crate) struct PreTokenizer {
    /// Values of `tokenizer.ggml.pre`.
    names: &'static [&'static str],
    cuts: &'static [Cut],
    /// Text is brought into Unicode's composed form first.
    pub composes: bool,
    /// A word that is a token as a whole is not merged from parts.
    pub ignore_merges: bool,
    /// The start token is added where the file does not say.
    pub add_bos: bool,
}

/// Meta's Llama 3: numbers in groups of up to three digits.
const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// Qwen2: as Llama 3, digits alone.
const QWEN2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// Mistral NeMo: words are cut where lower case turns to upper case.
const TEKKEN: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";

const TABLE: &[PreTokenizer] = &[
    PreTokenizer {
        names: &["smollm", "starcoder", "refact", "codeshell"],
        cuts: &[Cut::Digits, Cut::Gpt2],
        composes: false,
        ignore_merges: false,
        add_bos: false,
    },
    PreTokenizer {
        names: &["command-r"],
        cuts: &[Cut::Digits, Cut::Gpt2],
        composes: true,
        ignore_merges: false,
        add_bos: false,
    },
    PreTokenizer {
        names: &["gpt-2", "gpt2"],
        cuts: &[Cut::Gpt2],
        composes: false,
        ignore_merges: false,
        add_bos: false,
    },
    PreTokenizer {
        names: &["llama-bpe", "llama3", "llama-v3"],
        cuts: &[Cut::Matches(LLAMA3)],
        composes: false,
        ignore_merges: true,
        // These files leave `add_bos_token` out, and Llama 3's post-processor adds it.
        add_bos: true,
    },
    PreTokenizer {
        names: &["smaug-bpe"],
        cuts: &[Cut::Matches(LLAMA3)],
        composes: false,
        ignore_merges: false,
        add_bos: false,
    },
    PreTokenizer {
        names: &["qwen2"],
        cuts: &[Cut::Matches(QWEN2)],
        composes: true,
        ignore_merges: false,
        add_bos: false,
    },
    PreTokenizer {
        names: &["deepseek-r1-qwen"],
        cuts: &[Cut::Matches(QWEN2)],
        composes: false,
        ignore_merges: false,
        add_bos: false,
    },
    PreTokenizer {
        names: &["tekken", "mistral-nemo"],
        cuts: &[Cut::Matches(TEKKEN)],
        composes: false,
        ignore_merges: true,
        add_bos: true,
    },
    PreTokenizer {
        names: &["deepseek-coder"],
        cuts: &[
            Cut::Matches(r"[\r\n]"),
            Cut::Matches(r"\s?\p{L}+"),
            Cut::Matches(r"\s?\p{P}+"),
            Cut::Matches("[\u{4E00}-\u{9FA5}\u{0800}-\u{4E00}\u{AC00}-\u{D7FF}]+"),
            Cut::Digits,
        ],
        composes: false,
        ignore_merges: false,
        add_bos: false,
    },
];

impl PreTokenizer {
    /// Looks a name up.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] for an absent name, for `default` (converters write it when they do
    /// not know) and for a name that is not in the table.
    pub fn named(name: Option<&str>) -> Result<&'static Self, Error> {
        let refusal = match name {
            None => {
                "tokenizer.ggml.pre is absent, so it is not known how this file's text is cut".to_string()
            }
            Some(name) => match TABLE.iter().find(|entry| entry.names.contains(&name)) {
                Some(entry) => return Ok(entry),
                None => format!("tokenizer.ggml.pre is '{name}', a pre-tokenizer that is not known here"),
            },
        };
        let known: Vec<&str> = TABLE.iter().flat_map(|entry| entry.names.iter().copied()).collect();
        Err(Error::Tokenizer(format!(
            "{refusal}; known are: {}. Convert the model again with a current converter, or use its \
             safetensors files with their tokenizer.json",
            known.join(", ")
        )))
    }

    /// The steps for the tokenizer: the cuts, then bytes to letters.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] if an expression of the table does not compile.
    pub fn build(&self) -> Result<PreTokenizerWrapper, Error> {
        let mut steps: Vec<PreTokenizerWrapper> = Vec::with_capacity(self.cuts.len() + 1);
        let mut bytes = ByteLevel::new(false, true, false);
        for cut in self.cuts {
            match cut {
                Cut::Digits => steps.push(Digits::new(true).into()),
                // The byte step has this expression built in.
                Cut::Gpt2 => bytes = bytes.use_regex(true),
                Cut::Matches(expression) => {
                    let pattern = SplitPattern::Regex((*expression).to_string());
                    let split = Split::new(pattern, SplitDelimiterBehavior::Isolated, false)
                        .map_err(|error| Error::Tokenizer(format!("pre-tokenizer: {error}")))?;
                    steps.push(split.into());
                }
            }
        }
        steps.push(bytes.into());
        Ok(Sequence::new(steps).into())
    }
}

#[cfg(test)]
mod tests {
    use tokenizers::{OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer as _};

    use super::*;

    fn cut(name: &str, text: &str) -> Vec<String> {
        let mut pieces = PreTokenizedString::from(text);
        PreTokenizer::named(Some(name)).unwrap().build().unwrap().pre_tokenize(&mut pieces).unwrap();
        let splits = pieces.get_splits(OffsetReferential::Original, OffsetType::Byte);
        splits.iter().map(|(_, (start, end), _)| text[*start..*end].to_string()).collect()
    }

    #[test]
    fn every_entry_compiles_and_loses_nothing() {
        let text = "I'VE 12345 Fälle\r\n\n  x = 'y'; 日本語ひらがな 😀\t\n";
        for name in TABLE.iter().flat_map(|entry| entry.names) {
            assert_eq!(cut(name, text).concat(), text, "{name}");
        }
    }

    #[test]
    fn the_entries_cut_as_their_models_do() {
        assert_eq!(cut("smollm", "it's 1234  x"), ["it", "'s", " ", "1", "2", "3", "4", " ", " x"]);
        assert_eq!(cut("gpt-2", "it's 1234  x"), ["it", "'s", " 1234", " ", " x"]);
        assert_eq!(cut("llama-bpe", "it'S 1234  x"), ["it", "'S", " ", "123", "4", " ", " x"]);
        assert_eq!(cut("qwen2", "it's 12\n\nx"), ["it", "'s", " ", "1", "2", "\n\n", "x"]);
        assert_eq!(cut("tekken", "fooBar 12"), ["foo", "Bar", " ", "1", "2"]);
        assert_eq!(cut("deepseek-coder", "a b,\n12"), ["a", " b", ",", "\n", "1", "2"]);
    }

    #[test]
    fn unknown_absent_and_default_are_refused_with_the_list() {
        for name in [Some("bloom"), Some("default"), None] {
            let message = PreTokenizer::named(name).unwrap_err().to_string();
            assert!(message.contains("smollm") && message.contains("llama-bpe"), "{message}");
        }
    }
}

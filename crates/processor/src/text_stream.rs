//! Token bytes to text deltas: no half characters, stop strings across token borders.

/// What a [`TextStream`] should look for.
#[derive(Debug, Clone, Default)]
pub struct TextOptions {
    /// Strings that end the text; not empty.
    pub stop: Vec<String>,
    /// Leave the stop string in the text.
    pub include_stop: bool,
}

/// What became certain with one token.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TextDelta {
    /// New text; empty while bytes are held back.
    pub text: String,
    /// How many of the tokens pushed so far, and not yet reported, have all their bytes in the
    /// text given out so far; their log-probabilities belong to this delta. Tokens cut off by a
    /// stop string are never released.
    pub released_tokens: usize,
    /// The stop string that was found, as an index into [`TextOptions::stop`]; nothing follows.
    pub stopped: Option<usize>,
}

/// One continuation's text.
#[derive(Debug)]
pub struct TextStream {
    _options: TextOptions,
}

impl TextStream {
    /// Starts an empty text.
    pub fn new(options: TextOptions) -> Self {
        Self { _options: options }
    }

    /// Adds a token's bytes (empty for a hidden special token).
    pub fn push(&mut self, bytes: &[u8]) -> TextDelta {
        let _ = bytes;
        TextDelta::default()
    }

    /// Gives out what was held back, incomplete characters as U+FFFD.
    pub fn finish(&mut self) -> TextDelta {
        TextDelta::default()
    }
}

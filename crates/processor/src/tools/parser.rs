//! Text in, content and calls out, whatever the chunks.

use std::fmt;

use super::{
    ToolFormat,
    cursor::{Cursor, Look, Miss},
    hermes::Hermes,
    json_text::JsonText,
    llama_json::LlamaJson,
    python_text::PythonArguments,
    pythonic::Pythonic,
};

/// Longest beginning of a call that is held back: tag, name and blanks, or arguments that stand in
/// front of the name, in bytes. A longer one is content.
const MAX_HELD_BYTES: usize = 16 << 10;

/// A format: what stands before, between and behind the arguments of calls.
pub(super) trait Syntax: fmt::Debug + Send + Sync {
    /// What a call may begin with.
    fn first_bytes(&self) -> &'static [u8];
    /// What may stand between calls beside blanks.
    fn separator(&self) -> Option<&'static str>;
    /// Looks at the beginning of a call, up to its arguments.
    fn open<'n>(&self, cursor: &mut Cursor<'_>, names: &'n [String]) -> Look<Opened<'n>>;
    /// Looks behind the arguments. A cursor that has not moved leaves all the text for the content.
    fn rest(&self, cursor: &mut Cursor<'_>, names: &[String]) -> Look<Rest>;
}

/// A call that has begun.
pub(super) struct Opened<'n> {
    pub(super) name: &'n str,
    pub(super) opening: Opening,
}

/// Where the arguments are.
pub(super) enum Opening {
    /// They follow as a JSON object.
    Json,
    /// They follow as in Python, up to the closing bracket.
    Python,
    /// These, and none follow.
    Whole(String),
}

/// What is behind the arguments.
pub(super) enum Rest {
    /// The end.
    Ended,
    /// Another call with this name, whose arguments follow in the same way.
    Next(String),
}

/// A piece of an answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ToolDelta {
    /// Text beside calls.
    Content(String),
    /// A call of this name begins.
    Call(String),
    /// More JSON text of the arguments of the last call.
    Arguments(String),
    /// Nothing that is shown.
    Markup,
}

/// A piece, and how many bytes of the text it stands for. The pieces in a row are the whole text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ToolPiece {
    /// What it is.
    pub delta: ToolDelta,
    /// Bytes of the text, 0 where something was put in.
    pub bytes: usize,
}

/// Reads one answer.
#[derive(Debug)]
pub struct ToolParser {
    syntax: Box<dyn Syntax>,
    names: Vec<String>,
    state: State,
    /// Text that was not given out.
    held: String,
    /// Calls whose arguments are complete.
    complete_calls: u32,
    max_calls: u32,
}

#[derive(Debug)]
enum State {
    /// At the beginning, or right behind a call: blanks do not count yet. Whether a call came before.
    Edge {
        is_behind: bool,
    },
    Content,
    Json(JsonText),
    Python(PythonArguments),
    /// Behind the arguments; whether another call's in the same list would be Python's.
    Rest,
}

impl ToolParser {
    /// The beginning of an answer that may call the functions of these names, at most `max_calls`
    /// times; what looks like a call after that is content.
    pub fn new(format: ToolFormat, names: Vec<String>, max_calls: Option<u32>) -> Self {
        let syntax: Box<dyn Syntax> = match format {
            ToolFormat::Hermes => Box::new(Hermes),
            ToolFormat::LlamaJson => Box::new(LlamaJson),
            ToolFormat::Pythonic => Box::new(Pythonic),
        };
        let max_calls = max_calls.unwrap_or(u32::MAX);
        let state = State::Edge { is_behind: false };
        Self { syntax, names, state, held: String::new(), complete_calls: 0, max_calls }
    }

    /// Calls whose arguments are complete.
    pub fn complete_calls(&self) -> u32 {
        self.complete_calls
    }

    /// Takes more text and gives what has become certain, in order.
    pub fn push(&mut self, text: &str) -> Vec<ToolPiece> {
        self.held.push_str(text);
        let mut out = Vec::new();
        while self.step(false, &mut out) {}
        out
    }

    /// The text has ended: gives the rest. A call that is not complete is made a valid one, unless
    /// the text `was_cut` off at a limit.
    pub fn finish(&mut self, was_cut: bool) -> Vec<ToolPiece> {
        let mut out = Vec::new();
        while self.step(true, &mut out) {}
        let completion = match &self.state {
            State::Json(json) => json.completion(),
            State::Python(arguments) => arguments.completion(),
            _ => String::new(),
        };
        if !was_cut && !completion.is_empty() {
            out.push(ToolPiece { delta: ToolDelta::Arguments(completion), bytes: 0 });
        }
        self.give(self.held.len(), ToolDelta::Markup, &mut out);
        out
    }

    /// Goes on by one decision, if one can be made.
    fn step(&mut self, is_end: bool, out: &mut Vec<ToolPiece>) -> bool {
        match &mut self.state {
            State::Edge { is_behind } => {
                let is_behind = *is_behind;
                self.step_edge(is_behind, is_end, out)
            }
            State::Content => self.step_content(is_end, out),
            State::Json(_) | State::Python(_) => self.step_arguments(out),
            State::Rest => self.step_rest(is_end, out),
        }
    }

    /// Removes `bytes` of the held text and gives `delta` for them; nothing for nothing.
    fn give(&mut self, bytes: usize, delta: ToolDelta, out: &mut Vec<ToolPiece>) {
        self.held.drain(..bytes);
        if bytes > 0 || delta != ToolDelta::Markup {
            out.push(ToolPiece { delta, bytes });
        }
    }

    fn give_content(&mut self, bytes: usize, out: &mut Vec<ToolPiece>) {
        if bytes > 0 {
            let text = self.held[..bytes].to_owned();
            self.give(bytes, ToolDelta::Content(text), out);
        }
    }

    /// Blanks in front of a call are dropped, those in front of content are content.
    fn step_edge(&mut self, is_behind: bool, is_end: bool, out: &mut Vec<ToolPiece>) -> bool {
        let mut cursor = Cursor::new(&self.held);
        cursor.blanks();
        let separator = self.syntax.separator().filter(|_| is_behind);
        if let Some(separator) = separator
            && cursor.optional(separator) == Ok(true)
        {
            cursor.blanks();
        }
        if cursor.rest().is_empty() {
            // Blanks only are content if there is nothing else.
            if is_end && !is_behind {
                self.give_content(self.held.len(), out);
            }
            return false;
        }
        let at = cursor.at();
        match self.look(at) {
            Err(Miss::Incomplete) if !is_end => false,
            Err(_) => {
                self.state = State::Content;
                true
            }
            Ok(found) => {
                self.begin(found, out);
                true
            }
        }
    }

    fn step_content(&mut self, is_end: bool, out: &mut Vec<ToolPiece>) -> bool {
        let first_bytes = self.syntax.first_bytes();
        let mut from = 0;
        while let Some(at) = self.held.as_bytes()[from..].iter().position(|byte| first_bytes.contains(byte)) {
            let at = from + at;
            match self.look(at) {
                Err(Miss::Incomplete) if !is_end => {
                    self.give_content(at, out);
                    return false;
                }
                Err(_) => from = at + 1,
                Ok(mut found) => {
                    self.give_content(at, out);
                    found.length -= at;
                    self.begin(found, out);
                    return true;
                }
            }
        }
        self.give_content(self.held.len(), out);
        false
    }

    /// Looks for a call at this place of the held text.
    fn look(&self, at: usize) -> Look<Found> {
        if self.complete_calls >= self.max_calls {
            return Err(Miss::Wrong);
        }
        let text = &self.held[at..];
        let mut cursor = Cursor::new(text);
        match self.syntax.open(&mut cursor, &self.names) {
            Ok(Opened { name, opening }) => {
                Ok(Found { name: name.to_owned(), opening, length: at + cursor.at() })
            }
            Err(Miss::Incomplete) if text.len() <= MAX_HELD_BYTES => Err(Miss::Incomplete),
            Err(_) => Err(Miss::Wrong),
        }
    }

    /// A call begins.
    fn begin(&mut self, found: Found, out: &mut Vec<ToolPiece>) {
        self.give(found.length, ToolDelta::Call(found.name), out);
        self.state = match found.opening {
            Opening::Json => State::Json(JsonText::new()),
            Opening::Python => State::Python(PythonArguments::new()),
            Opening::Whole(arguments) => {
                self.give(0, ToolDelta::Arguments(arguments), out);
                self.complete_calls += 1;
                State::Rest
            }
        };
    }

    fn step_arguments(&mut self, out: &mut Vec<ToolPiece>) -> bool {
        let mut text = String::new();
        let (mut bytes, mut is_over, mut is_malformed) = (0, false, false);
        for next in self.held.chars() {
            let result = match &mut self.state {
                State::Json(json) => json.push(next, &mut text).map(|()| json.is_done()),
                State::Python(arguments) => arguments.push(next, &mut text).map(|()| arguments.is_done()),
                _ => return false,
            };
            match result {
                Ok(is_done) => is_over = is_done,
                Err(_) => (is_over, is_malformed) = (true, true),
            }
            bytes += if is_malformed { 0 } else { next.len_utf8() };
            if is_over {
                break;
            }
        }
        if is_malformed {
            // What was handed on is completed, what follows is content.
            match &self.state {
                State::Json(json) => text.push_str(&json.completion()),
                State::Python(arguments) => text.push_str(&arguments.completion()),
                _ => {}
            }
        }
        let delta = if text.is_empty() { ToolDelta::Markup } else { ToolDelta::Arguments(text) };
        self.give(bytes, delta, out);
        if is_over {
            self.complete_calls += 1;
            self.state = State::Rest;
        }
        is_over
    }

    fn step_rest(&mut self, is_end: bool, out: &mut Vec<ToolPiece>) -> bool {
        let mut cursor = Cursor::new(&self.held);
        let found = self.syntax.rest(&mut cursor, &self.names);
        let length = cursor.at();
        match found {
            // What is there of the end is no content.
            Err(Miss::Incomplete) if is_end => {
                self.give(self.held.len(), ToolDelta::Markup, out);
                false
            }
            Err(Miss::Incomplete) if self.held.len() <= MAX_HELD_BYTES => false,
            Ok(Rest::Next(name)) if self.complete_calls < self.max_calls => {
                self.begin(Found { name, opening: Opening::Python, length }, out);
                true
            }
            Ok(Rest::Ended) => {
                self.give(length, ToolDelta::Markup, out);
                self.state = State::Edge { is_behind: true };
                true
            }
            _ => {
                self.state = State::Edge { is_behind: true };
                true
            }
        }
    }
}

/// A call in the held text.
struct Found {
    name: String,
    opening: Opening,
    /// Bytes up to the arguments.
    length: usize,
}

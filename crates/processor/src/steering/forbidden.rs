//! Texts that must not be written: the calls of a model that may not call.
//!
//! A text can be spelled by many sequences of tokens, so what is followed is the bytes. A token that would
//! complete a forbidden text is masked; one that only begins it is not, since most such beginnings (`<`,
//! `[`) are harmless.

use std::sync::OnceLock;

use locket_engine::steering::{Guide, TokenSet};

use crate::Processor;

/// Some forbidden texts, in the form of a tree of bytes.
#[derive(Debug)]
pub struct ForbiddenTexts {
    /// The first is the root.
    nodes: Vec<Node>,
    /// Tokens that have a whole forbidden text in themselves; found when first needed.
    whole: OnceLock<Vec<u32>>,
}

#[derive(Debug, Default)]
struct Node {
    /// The nodes behind each next byte.
    next: Vec<(u8, usize)>,
    /// Blanks may stand here.
    has_blanks: bool,
    /// A forbidden text ends here.
    is_end: bool,
}

impl ForbiddenTexts {
    /// Each text is a list of parts, between which any number of blanks may stand. Those without bytes
    /// forbid nothing.
    pub fn new(texts: &[Vec<String>]) -> Self {
        let mut all = Self { nodes: vec![Node::default()], whole: OnceLock::new() };
        for text in texts {
            all.add(text);
        }
        all
    }

    fn add(&mut self, parts: &[String]) {
        let mut at = 0;
        for part in parts.iter().filter(|part| !part.is_empty()) {
            self.nodes[at].has_blanks |= at > 0;
            for byte in part.bytes() {
                at = self.child(at, byte).unwrap_or_else(|| {
                    let new = self.nodes.len();
                    self.nodes.push(Node::default());
                    self.nodes[at].next.push((byte, new));
                    new
                });
            }
        }
        self.nodes[at].is_end |= at > 0;
    }

    fn child(&self, at: usize, byte: u8) -> Option<usize> {
        self.nodes[at].next.iter().find(|(next, _)| *next == byte).map(|(_, child)| *child)
    }

    /// Takes a byte at each place of `places`; `true` if a forbidden text is complete with it.
    fn step(&self, places: &mut Vec<usize>, byte: u8) -> bool {
        let mut is_complete = false;
        let count = places.len();
        for index in 0..count {
            let at = places[index];
            if let Some(child) = self.child(at, byte) {
                is_complete |= self.nodes[child].is_end;
                places.push(child);
            }
            if self.nodes[at].has_blanks && byte.is_ascii_whitespace() {
                places.push(at);
            }
        }
        places.drain(..count);
        is_complete
    }

    /// Takes bytes of a text, in which a forbidden one may begin anywhere.
    fn follow(&self, places: &mut Vec<usize>, bytes: &[u8]) -> bool {
        let mut is_complete = false;
        for &byte in bytes {
            places.push(0);
            is_complete |= self.step(places, byte);
        }
        is_complete
    }

    /// Whether these bytes complete what has begun.
    fn completes(&self, places: &[usize], bytes: &[u8], scratch: &mut Vec<usize>) -> bool {
        scratch.clear();
        scratch.extend_from_slice(places);
        for &byte in bytes {
            if self.step(scratch, byte) {
                return true;
            }
            // Most tokens end here, at their first byte.
            if scratch.is_empty() {
                return false;
            }
        }
        false
    }

    /// Looks through the tokens, which takes some milliseconds for the largest vocabularies.
    pub(super) fn prepare(&self, processor: &Processor) {
        self.whole(processor);
    }

    fn whole(&self, processor: &Processor) -> &[u32] {
        self.whole.get_or_init(|| {
            let mut places = Vec::new();
            let has_whole = |id: &u32| {
                places.clear();
                self.follow(&mut places, processor.token_bytes(*id))
            };
            ids(processor).filter(has_whole).collect()
        })
    }
}

fn ids(processor: &Processor) -> impl Iterator<Item = u32> {
    0..u32::try_from(processor.vocab_size()).unwrap_or(u32::MAX)
}

/// One continuation.
#[derive(Debug, Default)]
pub(super) struct ForbiddenState {
    /// Where the texts that have begun are.
    places: Vec<usize>,
}

impl ForbiddenState {
    /// Takes in a token. Control tokens are no part of the text, since they are hidden.
    pub(super) fn take(&mut self, forbidden: &ForbiddenTexts, id: u32, processor: &Processor) {
        if !processor.is_special(id) {
            forbidden.follow(&mut self.places, processor.token_bytes(id));
        }
    }

    /// Whether [`Self::compute`] might take tokens away.
    pub(super) fn is_restricted(&self, forbidden: &ForbiddenTexts, processor: &Processor) -> bool {
        !self.places.is_empty() || !forbidden.whole(processor).is_empty()
    }

    /// All tokens but those that complete a forbidden text.
    pub(super) fn compute(
        &self,
        forbidden: &ForbiddenTexts,
        processor: &Processor,
        allowed: &mut TokenSet,
    ) -> Guide {
        allowed.fill();
        let whole = forbidden.whole(processor);
        whole.iter().for_each(|id| allowed.remove(*id));
        let mut is_free = whole.is_empty();
        if !self.places.is_empty() {
            let mut scratch = Vec::new();
            for id in ids(processor).filter(|id| !processor.is_special(*id)) {
                if forbidden.completes(&self.places, processor.token_bytes(id), &mut scratch) {
                    allowed.remove(id);
                    is_free = false;
                }
            }
        }
        if is_free { Guide::Free } else { Guide::Allowed }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// How many bytes can be taken until a forbidden text is complete.
    fn complete_at(forbidden: &ForbiddenTexts, text: &str) -> Option<usize> {
        let mut places = Vec::new();
        (0..text.len()).find(|at| forbidden.follow(&mut places, &text.as_bytes()[*at..=*at])).map(|at| at + 1)
    }

    #[test]
    fn texts_are_found_wherever_they_begin() {
        let texts = [vec!["<call>".to_owned()], vec!["[".to_owned(), "f(".to_owned()], vec![String::new()]];
        let forbidden = ForbiddenTexts::new(&texts);
        assert_eq!(complete_at(&forbidden, "a <<call>b"), Some(9));
        assert_eq!(complete_at(&forbidden, "[[ \n\tf(x)]"), Some(7));
        assert_eq!(complete_at(&forbidden, "[g(x)] <cal l> < call> f("), None);
        assert_eq!(complete_at(&ForbiddenTexts::new(&[vec![]]), "any"), None);
    }
}

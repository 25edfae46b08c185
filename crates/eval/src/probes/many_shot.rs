//! A list of words with labels early in the text, as of examples for a task, some of which are asked
//! for at the end: recall of many facts at once, none of which stands out.

use rand::{Rng as _, seq::IndexedRandom as _};

use super::{Draft, Probe};
use crate::Error;

/// Tokens of a probe per shot.
const TOKENS_PER_SHOT: usize = 64;
/// Shots that are asked for.
const ASKED: usize = 4;
/// The list begins before this share of the text.
const DEEPEST: f64 = 0.5;

const LABELS: [&str; 16] = [
    "red", "blue", "green", "gold", "black", "white", "north", "south", "east", "west", "one", "two",
    "three", "four", "five", "six",
];

const WORDS: [&str; 64] = [
    "anchor", "apple", "basket", "bottle", "bridge", "button", "candle", "carpet", "castle", "circle",
    "copper", "cotton", "dinner", "doctor", "dragon", "engine", "farmer", "feather", "finger", "flower",
    "forest", "garden", "hammer", "harbor", "island", "jacket", "kitchen", "ladder", "leather", "letter",
    "lizard", "magnet", "market", "mirror", "monkey", "mountain", "needle", "ocean", "orange", "paper",
    "pepper", "pencil", "pigeon", "pillow", "planet", "pocket", "rabbit", "ribbon", "river", "rocket",
    "saddle", "school", "shadow", "silver", "spider", "summer", "table", "ticket", "tunnel", "turtle",
    "valley", "violin", "window", "winter",
];

pub(super) fn probe(draft: &mut Draft<'_>) -> Result<Probe, Error> {
    let shots = (draft.generator.length / TOKENS_PER_SHOT).clamp(ASKED, WORDS.len());
    let words: Vec<&str> = WORDS.choose_multiple(&mut draft.rng, shots).copied().collect();
    let pairs: Vec<(&str, &str)> =
        words.into_iter().map(|word| (word, LABELS[draft.rng.random_range(0..LABELS.len())])).collect();
    let lines: String = pairs.iter().map(|(word, label)| format!("{word} -> {label}\n")).collect();
    let needle = draft.encode(&format!("\n\nEach word goes with a label.\n\n{lines}\n"))?;
    let asked = pairs
        .choose_multiple(&mut draft.rng, ASKED)
        .enumerate()
        .map(|(idx, (word, label))| {
            let before = if idx == 0 { "\n\nWhich label goes with each word?\n\n" } else { "\n" };
            draft.ask(&format!("{before}{word} ->"), &format!(" {label}"))
        })
        .collect::<Result<Vec<_>, _>>()?;
    draft.assemble(&[needle], 0, DEEPEST, &asked)
}

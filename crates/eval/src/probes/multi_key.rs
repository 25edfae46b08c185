//! Eight numbers of eight cities, spread over the text, of which one is asked for.

use rand::seq::IndexedRandom as _;

use super::{DEEPEST, Draft, Probe};
use crate::Error;

const KEYS: usize = 8;

const CITIES: [&str; 24] = [
    "Chicago", "Lisbon", "Nairobi", "Oslo", "Lima", "Kyoto", "Cairo", "Prague", "Quito", "Dublin", "Hanoi",
    "Sofia", "Warsaw", "Bogota", "Manila", "Athens", "Berlin", "Madrid", "Ottawa", "Havana", "Vienna",
    "Delhi", "Sydney", "Boston",
];

pub(super) fn probe(draft: &mut Draft<'_>) -> Result<Probe, Error> {
    let cities: Vec<&str> = CITIES.choose_multiple(&mut draft.rng, KEYS).copied().collect();
    let mut numbers: Vec<String> = Vec::with_capacity(KEYS);
    while numbers.len() < KEYS {
        let number = draft.number();
        if !numbers.contains(&number) {
            numbers.push(number);
        }
    }
    let needles = cities
        .iter()
        .zip(&numbers)
        .map(|(city, number)| {
            draft.encode(&format!("\n\nThe special magic number for {city} is: {number}.\n\n"))
        })
        .collect::<Result<Vec<_>, _>>()?;
    // The choice was in random order, and depths are random.
    let (city, number) = (cities[0], &numbers[0]);
    let question =
        format!("\n\nWhat is the special magic number for {city}? The special magic number for {city} is:");
    let asked = draft.ask(&question, &format!(" {number}"))?;
    draft.assemble(&needles, 0, DEEPEST, &[asked])
}

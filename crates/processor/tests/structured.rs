//! A thousand random JSON schemas, answered at random among the allowed tokens: every answer that ends
//! is one that an independent validator takes.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "support/sampler.rs"]
mod sampler;
#[path = "support/schemas.rs"]
mod schemas;
mod support;

use std::sync::Arc;

use locket_model::{load::Checkpoint, testing::default_model};
use locket_processor::{
    Processor,
    steering::{AnswerSpec, GrammarSource, SteeringSpec},
};
use rand::{SeedableRng as _, rngs::StdRng};
use sampler::Sampler;

/// Answers `count` schemas; returns how many answers ended.
fn answer_schemas(processor: &Arc<Processor>, count: u64, max_tokens: usize) -> usize {
    let grammars = processor.grammars().unwrap();
    let (mut finished, mut beyond_range) = (0, 0);
    for seed in 0..count {
        let mut rng = StdRng::seed_from_u64(seed);
        let schema = schemas::random_schema(&mut rng);
        let compiled = grammars.compile(&GrammarSource::JsonSchema(schema.clone()));
        assert!(compiled.is_ok(), "seed {seed}: {compiled:?} of {schema}");
        let spec = SteeringSpec { answer: AnswerSpec::Grammar(compiled.unwrap()), ..SteeringSpec::default() };
        let plan = spec.plan(processor).unwrap();
        let Some(text) = Sampler::new(processor, &plan).run(&mut rng, max_tokens) else { continue };
        finished += 1;
        match schemas::is_valid(&schema, &text) {
            Some(is_valid) => assert!(is_valid, "seed {seed}: {text} is not of {schema}"),
            None => beyond_range += 1,
        }
    }
    assert!(beyond_range * 50 < count, "{beyond_range} answers have huge numbers");
    finished
}

#[test]
fn every_answer_validates() {
    let mut vocabulary = support::byte_level_vocabulary("llama-bpe");
    // Tokens that cross the borders of the grammar's parts, and parts of characters.
    for token in ["{\"", "\":", "\",Ġ\"", "Ġtrue", "null}", "12", ".5", "ðŁĺ", "Ċ", "ĠĠĠĠ", "]}", "\"\""]
    {
        if !vocabulary.tokens.iter().any(|known| known == token) {
            vocabulary.tokens.push(token.into());
            vocabulary.token_types.push(1);
        }
    }
    let processor = Arc::new(support::processor(vocabulary, None));
    let finished = answer_schemas(&processor, 1000, 400);
    assert!(finished > 900, "{finished} of 1000 ended");
}

#[test]
fn every_answer_in_the_default_models_tokens_validates() {
    let processor = Arc::new(Processor::load(&Checkpoint::open(&default_model()).unwrap()).unwrap());
    let finished = answer_schemas(&processor, 40, 200);
    assert!(finished > 20, "{finished} of 40 ended");
}

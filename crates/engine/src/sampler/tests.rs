//! The sampler against a slow one in f64 that sorts everything.

use proptest::prelude::*;
use rand::Rng as _;

use super::*;
use crate::TokenLogprob;
use locket_model::kv_cache::CacheSettings;

fn request(sampling: SamplingParams) -> GenerationRequest {
    GenerationRequest { sampling, ..GenerationRequest::new("test", vec![0, 1], 8, CacheSettings::full(64)) }
}

/// Logits that look like a model's: a few good tokens above much noise, and some ties.
fn row(len: usize, seed: u64) -> Vec<f32> {
    let mut rng = StdRng::seed_from_u64(seed);
    let sharpness = rng.random_range(0.2..6.0f32);
    (0..len)
        .map(|_| {
            let noise: f32 = (0..4).map(|_| rng.random_range(-1.0..1.0f32)).sum();
            let logit = noise * sharpness;
            if rng.random_bool(0.05) { logit.round() } else { logit }
        })
        .collect()
}

/// Probabilities after all filters, by sorting, in f64: `(id, probability)` best first.
fn slow_distribution(row: &[f32], params: &SamplingParams) -> Vec<(u32, f64)> {
    let mut tokens: Vec<(u32, f64)> =
        (0..).zip(row).filter(|(_, x)| x.is_finite()).map(|(id, &x)| (id, f64::from(x))).collect();
    tokens.sort_by(|a, b| b.1.partial_cmp(&a.1).unwrap().then(a.0.cmp(&b.0)));
    let max = tokens[0].1;
    for token in &mut tokens {
        token.1 = ((token.1 - max) / f64::from(params.temperature)).exp();
    }
    if params.top_k > 0 {
        tokens.truncate(params.top_k as usize);
    }
    tokens.retain(|token| token.1 >= f64::from(params.min_p));
    let total: f64 = tokens.iter().map(|token| token.1).sum();
    if params.top_p < 1.0 {
        let mut sum = 0.0;
        let wanted = f64::from(params.top_p) * total;
        let count = tokens.iter().take_while(|token| {
            let is_needed = sum < wanted;
            sum += token.1;
            is_needed
        });
        let count = count.count();
        tokens.truncate(count);
    }
    let total: f64 = tokens.iter().map(|token| token.1).sum();
    tokens.iter().map(|&(id, weight)| (id, weight / total)).collect()
}

/// The same by the real filters.
fn distribution(row: &[f32], params: &SamplingParams) -> Vec<(u32, f64)> {
    let mut scratch = SamplerScratch::default();
    let (cut, weights) = keep(row, params, &mut scratch.select, &mut scratch.weights);
    let mut tokens: Vec<(u32, f64)> = (0..)
        .zip(row)
        .filter(|&(id, &x)| x.is_finite() && cut.keeps(x, id))
        .map(|(id, _)| (id, f64::from(weights.as_slice()[id as usize])))
        .collect();
    tokens.sort_by(|a, b| row[b.0 as usize].partial_cmp(&row[a.0 as usize]).unwrap().then(a.0.cmp(&b.0)));
    let total: f64 = tokens.iter().map(|token| token.1).sum();
    tokens.iter().map(|&(id, weight)| (id, weight / total)).collect()
}

/// Equal sets and probabilities; f32 sums may move a border by tokens worth 1e-5 together.
fn assert_close(ours: &[(u32, f64)], slow: &[(u32, f64)]) {
    let shared = ours.len().min(slow.len());
    for (a, b) in ours.iter().zip(slow) {
        assert_eq!(a.0, b.0);
        assert!((a.1 - b.1).abs() < 2e-5, "{a:?} {b:?}");
    }
    let rest: f64 = ours[shared..].iter().chain(&slow[shared..]).map(|token| token.1).sum();
    assert!(rest < 1e-5, "{} kept, {} expected, {rest} between", ours.len(), slow.len());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]
    #[test]
    fn filters_keep_what_the_slow_sampler_keeps(
        seed in any::<u64>(),
        len in prop_oneof![1usize..40, 200usize..3000],
        temperature in 0.1f32..3.0,
        top_k in prop_oneof![Just(0u32), 2u32..60, 100u32..4000],
        top_p in prop_oneof![Just(1.0f32), 0.01f32..0.999],
        min_p in prop_oneof![Just(0.0f32), 0.001f32..0.5],
    ) {
        let row = row(len, seed);
        let params = SamplingParams { temperature, top_k, top_p, min_p, ..SamplingParams::default() };
        assert_close(&distribution(&row, &params), &slow_distribution(&row, &params));
    }

    /// A draw at `at` gives the token whose share of the cumulated probabilities (by id) holds it.
    #[test]
    fn draws_follow_the_distribution(
        seed in any::<u64>(), len in 1usize..2000, at in 0.0f64..1.0, top_p in 0.1f32..=1.0,
    ) {
        let row = row(len, seed);
        let params = SamplingParams { top_p, ..SamplingParams::default() };
        let mut scratch = SamplerScratch::default();
        let (_, weights) = keep(&row, &params, &mut scratch.select, &mut scratch.weights);
        let drawn = weights.draw(at).unwrap();
        let mut expected = distribution(&row, &params);
        expected.sort_by_key(|token| token.0);
        let before: f64 = expected.iter().take_while(|token| token.0 < drawn).map(|token| token.1).sum();
        let own = expected.iter().find(|token| token.0 == drawn).expect("only kept tokens are drawn").1;
        prop_assert!(before - 1e-5 <= at && at <= before + own + 1e-5, "{before} {at} {own}");
    }

    #[test]
    fn logprobs_equal_f64(seed in any::<u64>(), len in 1usize..3000, count in 0usize..30) {
        let row = row(len, seed);
        let mut scratch = SamplerScratch::default();
        let id = (seed % len as u64) as u32;
        let (own, top) =
            logprobs::logprobs(&row, id, count, &mut scratch.select, &mut scratch.weights);
        let exact = |x: f32| {
            let max = row.iter().copied().fold(f32::MIN, f32::max);
            let sum: f64 = row.iter().map(|&y| (f64::from(y) - f64::from(max)).exp()).sum();
            f64::from(x) - f64::from(max) - sum.ln()
        };
        prop_assert!((f64::from(own.unwrap()) - exact(row[id as usize])).abs() < 1e-5);
        let mut sorted: Vec<u32> = (0..len as u32).collect();
        sorted.sort_by(|&a, &b| row[b as usize].partial_cmp(&row[a as usize]).unwrap().then(a.cmp(&b)));
        sorted.truncate(count);
        prop_assert_eq!(top.iter().map(|token| token.id).collect::<Vec<_>>(), sorted);
        for TokenLogprob { id, logprob } in top {
            prop_assert!((f64::from(logprob) - exact(row[id as usize])).abs() < 1e-5);
        }
    }
}

fn sample_one(raw: &[f32], params: SamplingParams, output: &[u32]) -> u32 {
    let request = request(params);
    let mut sampler = SequenceSampler::new(&request, 0, 3);
    output.iter().for_each(|&id| sampler.seen.iter_mut().for_each(|seen| seen.add(id)));
    sampler.sample(raw, &request, output, Choice::Free, &mut SamplerScratch::default()).unwrap().id
}

fn greedy() -> SamplingParams {
    SamplingParams { temperature: 0.0, ..SamplingParams::default() }
}

#[test]
fn zero_and_minus_zero_are_a_tie() {
    let params = SamplingParams { top_k: 2, ..SamplingParams::default() };
    let kept = distribution(&[-0.0, 0.0, -0.0, 0.0, -1.0], &params);
    assert_eq!(kept.iter().map(|token| token.0).collect::<Vec<_>>(), [0, 1]);
}

/// The greedy choice among a set, if there is one.
fn among(raw: &[f32], params: SamplingParams, ids: &[u32]) -> Result<u32, SampleFailure> {
    let request = request(params);
    let mut set = TokenSet::new(raw.len() as u32);
    ids.iter().for_each(|&id| set.insert(id));
    let mut sampler = SequenceSampler::new(&request, 0, 3);
    let chosen = sampler.sample(raw, &request, &[], Choice::Among(&set), &mut SamplerScratch::default());
    chosen.map(|token| token.id)
}

#[test]
fn the_steering_is_the_last_mask_to_stay() {
    let raw = [1.0, 2.0, 3.0, 4.0, 5.0];
    assert_eq!(among(&raw, greedy(), &[0, 1]), Ok(1));
    assert_eq!(among(&raw, greedy(), &[]), Err(SampleFailure::NothingAllowed));
    let allowed = SamplingParams { allowed_token_ids: Some(vec![0, 4, 99]), ..greedy() };
    assert_eq!(among(&raw, allowed.clone(), &[0, 1]), Ok(0), "both masks");
    assert_eq!(among(&raw, allowed, &[1, 2]), Ok(2), "nothing is in both");
    let banned = SamplingParams { bad_words: vec![vec![1]], ..greedy() };
    assert_eq!(among(&raw, banned.clone(), &[0, 1]), Ok(0));
    assert_eq!(among(&raw, banned, &[1]), Ok(1));
    let early = SamplingParams { min_tokens: 3, stop_token_ids: vec![4], ..greedy() };
    assert_eq!(among(&raw, early.clone(), &[3, 4]), Ok(3));
    assert_eq!(among(&raw, early, &[4]), Ok(4), "the grammar is complete");
    let biased = SamplingParams { logit_bias: vec![(4, 1e9), (0, 10.0)], ..greedy() };
    assert_eq!(among(&raw, biased, &[0, 1]), Ok(0), "a bias cannot bring back what is banned");
}

#[test]
fn a_forced_token_draws_no_number() {
    let request = request(SamplingParams { frequency_penalty: 0.5, ..SamplingParams::default() });
    let raw = row(100, 5);
    let scratch = &mut SamplerScratch::default();
    let mut pure = SequenceSampler::new(&request, 0, 3);
    let mut mixed = SequenceSampler::new(&request, 0, 3);
    let forced = mixed.sample(&raw, &request, &[], Choice::Forced(7), scratch).unwrap();
    assert!(forced.id == 7 && forced.is_forced);
    assert_eq!(mixed.seen.as_ref().map(SeenTokens::num_output), Some(1), "penalties see it");
    assert_eq!(pure.rng.random::<u64>(), mixed.rng.random::<u64>());
    let beyond = mixed.sample(&raw, &request, &[], Choice::Forced(100), scratch);
    assert_eq!(beyond, Err(SampleFailure::NothingAllowed));
}

proptest! {
    /// A draw from a set is the draw with everything else banned by hand.
    #[test]
    fn a_set_is_a_list_of_allowed_ids(seed in any::<u64>(), len in 1usize..400, share in 0.01f64..1.0) {
        let raw = row(len, seed);
        let mut rng = StdRng::seed_from_u64(seed);
        let mut ids: Vec<u32> = (0..len as u32).filter(|_| rng.random_bool(share)).collect();
        ids.push(rng.random_range(0..len as u32));
        let mut set = TokenSet::new(len as u32);
        ids.iter().for_each(|&id| set.insert(id));
        let params = SamplingParams { top_p: 0.9, top_k: 20, ..SamplingParams::default() };
        let scratch = &mut SamplerScratch::default();
        let free = request(params.clone());
        let listed = request(SamplingParams { allowed_token_ids: Some(ids), ..params });
        let by_set = SequenceSampler::new(&free, 0, seed).sample(&raw, &free, &[], Choice::Among(&set), scratch);
        let by_list = SequenceSampler::new(&listed, 0, seed).sample(&raw, &listed, &[], Choice::Free, scratch);
        prop_assert!(by_set.is_ok());
        prop_assert_eq!(by_set, by_list);
    }
}

#[test]
fn greedy_takes_the_first_maximum() {
    assert_eq!(sample_one(&[1.0, 3.0, 3.0, 2.0], greedy(), &[]), 1);
    assert_eq!(
        sample_one(&[1.0, 3.0, 9.0], SamplingParams { top_k: 1, ..SamplingParams::default() }, &[]),
        2
    );
    assert_eq!(
        sample_one(&[1.0, 3.0, 9.0], SamplingParams { top_p: 0.0, ..SamplingParams::default() }, &[]),
        2
    );
}

#[test]
fn masks_and_bias() {
    let raw = [1.0, 2.0, 3.0, 4.0, 5.0];
    let with = |change: fn(&mut SamplingParams), output: &[u32]| {
        let mut params = greedy();
        change(&mut params);
        sample_one(&raw, params, output)
    };
    assert_eq!(with(|p| p.allowed_token_ids = Some(vec![0, 2, 99]), &[]), 2);
    assert_eq!(with(|p| p.bad_words = vec![vec![4], vec![1, 3]], &[]), 3);
    assert_eq!(with(|p| p.bad_words = vec![vec![4], vec![1, 3]], &[7, 1]), 2);
    assert_eq!(with(|p| (p.stop_token_ids, p.min_tokens) = (vec![4, 3], 2), &[0]), 2);
    assert_eq!(with(|p| (p.stop_token_ids, p.min_tokens) = (vec![4, 3], 2), &[0, 0]), 4);
    assert_eq!(with(|p| p.logit_bias = vec![(0, 100.0), (99, 5.0)], &[]), 0);
    assert_eq!(with(|p| p.logit_bias = vec![(4, -100.0), (3, f32::NEG_INFINITY)], &[]), 2);
    // Only a stop token is allowed, but not yet: the minimum length gives way.
    let only_stop = |p: &mut SamplingParams| {
        (p.allowed_token_ids, p.stop_token_ids, p.min_tokens) = (Some(vec![1]), vec![1], 5);
    };
    assert_eq!(with(only_stop, &[]), 1);
}

#[test]
fn penalties_match_their_formulas() {
    let params = SamplingParams {
        repetition_penalty: 2.0,
        frequency_penalty: 0.5,
        presence_penalty: 0.25,
        ..SamplingParams::default()
    };
    let mut seen = SeenTokens::if_needed(&params, &[0, 1, 1]).unwrap();
    [2, 2, 1].iter().for_each(|&id| seen.add(id));
    let mut logits = Vec::new();
    masks::apply(&[4.0, -4.0, 6.0, 1.0], &params, &[2, 2, 1], None, Some(&seen), &mut logits).unwrap();
    assert_eq!(logits, [4.0 / 2.0, -4.0 * 2.0 - 0.75, 6.0 / 2.0 - 1.25, 1.0]);
}

#[test]
fn seeds_decide_and_neighbours_do_not() {
    let raw = row(500, 1);
    let request = request(SamplingParams::default());
    let draw = |seed, choice, scratch: &mut SamplerScratch| -> Vec<u32> {
        let mut sampler = SequenceSampler::new(&request, choice, seed);
        (0..20).map(|_| sampler.sample(&raw, &request, &[], Choice::Free, scratch).unwrap().id).collect()
    };
    let mut scratch = SamplerScratch::default();
    let first = draw(1, 0, &mut scratch);
    assert_ne!(first, draw(2, 0, &mut scratch));
    assert_ne!(first, draw(1, 1, &mut scratch));
    assert_eq!(first, draw(1, 0, &mut SamplerScratch::default()), "scratch carries nothing over");
}

#[test]
fn non_finite_logits_are_refused() {
    let request = request(greedy());
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let mut sampler = SequenceSampler::new(&request, 0, 0);
        let outcome =
            sampler.sample(&[0.0, bad, 1.0], &request, &[], Choice::Free, &mut SamplerScratch::default());
        assert_eq!(outcome, Err(SampleFailure::NonFiniteLogits));
    }
}

#[test]
fn extreme_temperatures_and_logits_stay_in_the_vocabulary() {
    for temperature in [1e-30, 1e-6, 1.0, 100.0] {
        let params = SamplingParams { temperature, top_p: 0.9, min_p: 0.01, ..SamplingParams::default() };
        assert!(sample_one(&[1e30, -1e30, 5e29, 0.0], params.clone(), &[]) < 4);
        assert!(sample_one(&[-3.0], params, &[]) == 0);
    }
}

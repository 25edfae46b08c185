use locket_model::{kv_cache::CacheMethod, load::Backend};
use proptest::prelude::*;

use super::*;
use crate::test_model::{random_ids, tiny_model};

const VOCAB: usize = 320;

fn pace(settings: CacheSettings, lockstep: u32, chunk: usize) -> Pace {
    Pace { settings, lockstep, chunk }
}

fn nlls(scores: &[Vec<TokenScore>]) -> Vec<Vec<u32>> {
    scores.iter().map(|row| row.iter().map(|score| score.nll.to_bits()).collect()).collect()
}

/// A direct softmax in f64 over the logits of `Model::forward`, one whole sequence at once.
fn by_softmax(model: &mut dyn Model, ids: &[u32]) -> Vec<(f64, u32)> {
    let settings = CacheSettings::full(ids.len() as u32);
    model.open_block(BlockId(0), settings).unwrap();
    let mut batch = Batch::default();
    batch.push(BlockId(0), 0, &ids[..ids.len() - 1], false);
    batch.sample_rows = (0..ids.len() as u32 - 1).collect();
    let mut logits = Vec::new();
    model.forward(&batch, &mut logits).unwrap();
    model.close_block(BlockId(0));
    let rows = logits.chunks_exact(VOCAB).zip(&ids[1..]);
    rows.map(|(row, &target)| {
        let sum: f64 = row.iter().map(|&logit| f64::from(logit).exp()).sum();
        let best = (0..VOCAB).max_by(|&a, &b| row[a].total_cmp(&row[b])).unwrap();
        (sum.ln() - f64::from(row[target as usize]), best as u32)
    })
    .collect()
}

#[test]
fn scores_equal_a_softmax_of_the_logits() {
    let mut model = tiny_model(&[CacheMethod::Full], 96, 3, 96);
    let ids: Vec<Vec<u32>> = (0..5).map(|seed| random_ids(seed, 40 + 10 * seed as usize, VOCAB)).collect();
    let sequences: Vec<_> = ids.iter().map(|ids| Sequence::all(ids)).collect();
    let mut rows = 0;
    let scores =
        run(&mut *model, pace(CacheSettings::full(96), 3, 16), &sequences, &mut |done| rows += done).unwrap();
    assert_eq!(rows, ids.iter().map(|ids| ids.len() - 1).sum::<usize>());
    for (scores, ids) in scores.iter().zip(&ids) {
        let expected = by_softmax(&mut *model, ids);
        assert_eq!(scores.len(), expected.len());
        for (score, (nll, best)) in scores.iter().zip(expected) {
            assert!((f64::from(score.nll) - nll).abs() < 1e-4, "{} is not {nll}", score.nll);
            assert_eq!(score.best, best);
        }
    }
}

#[test]
fn enough_slots_give_the_full_caches_bits() {
    let methods: Vec<_> = crate::test_model::methods_without_side_car();
    let mut model = tiny_model(&methods, 160, 2, 64);
    let ids: Vec<Vec<u32>> = (0..3).map(|seed| random_ids(seed, 128, VOCAB)).collect();
    let sequences: Vec<_> = ids.iter().map(|ids| Sequence::all(ids)).collect();
    let full = run(&mut *model, pace(CacheSettings::full(128), 2, 32), &sequences, &mut |_| ()).unwrap();
    for method in methods {
        let settings = CacheSettings::of(method, 128, if method == CacheMethod::Full { 0 } else { 32 });
        let scores = run(&mut *model, pace(settings, 2, 32), &sequences, &mut |_| ()).unwrap();
        assert!(nlls(&scores) == nlls(&full), "{}", method.name());
    }
}

#[test]
fn folding_changes_scores_and_neither_chunk_nor_lockstep_does() {
    let methods = crate::test_model::methods_without_side_car();
    let mut model = tiny_model(&methods, 200, 4, 256);
    let ids: Vec<Vec<u32>> = (0..4).map(|seed| random_ids(seed, 200, VOCAB)).collect();
    let sequences: Vec<_> = ids.iter().map(|ids| Sequence::all(ids)).collect();
    let full = run(&mut *model, pace(CacheSettings::full(200), 4, 64), &sequences, &mut |_| ()).unwrap();
    for method in methods.into_iter().filter(|&method| method != CacheMethod::Full) {
        let settings = CacheSettings::of(method, 32, 16);
        let together = run(&mut *model, pace(settings, 4, 64), &sequences, &mut |_| ()).unwrap();
        let alone = run(&mut *model, pace(settings, 1, 16), &sequences, &mut |_| ()).unwrap();
        assert!(nlls(&together) == nlls(&alone), "{}", method.name());
        assert!(nlls(&together) != nlls(&full), "{}", method.name());
    }
}

#[test]
fn wrong_predictions_are_refused() {
    let ids = [1, 2, 3];
    let sequence = |predicted: &[u32]| Sequence { ids: &ids, predicted: predicted.to_vec() };
    assert!(check(&[Sequence::all(&ids), sequence(&[2])]).is_ok());
    for wrong in [&[0, 1][..], &[3], &[2, 1], &[1, 1], &[]] {
        assert!(check(&[sequence(wrong)]).is_err(), "{wrong:?}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]
    /// Any choice of predicted tokens gives the scores that predicting all of them gives there.
    #[test]
    fn a_choice_of_rows_is_a_choice_of_scores(keep in prop::collection::btree_set(1..60u32, 1..10), chunk in 1..4usize) {
        let mut model = tiny_model(&[CacheMethod::Full], 64, 1, 64);
        let ids = random_ids(9, 60, VOCAB);
        let all = Sequence::all(&ids);
        let some = Sequence { ids: &ids, predicted: keep.iter().copied().collect() };
        let pace = pace(CacheSettings::full(64), 1, 16 * chunk);
        let scores = run(&mut *model, pace, &[all, some], &mut |_| ()).unwrap();
        let expected: Vec<_> = keep.iter().map(|&target| scores[0][target as usize - 1]).collect();
        prop_assert_eq!(&scores[1], &expected);
    }
}

#[test]
fn backends_agree_to_a_thousandth_of_a_nat() {
    let ids = random_ids(3, 200, VOCAB);
    let methods = crate::test_model::methods_without_side_car();
    for method in methods.iter().copied() {
        let settings = match method {
            CacheMethod::Full => CacheSettings::full(200),
            method => CacheSettings::of(method, 32, 16),
        };
        let [cpu, reference] = [Backend::Cpu, Backend::Reference].map(|backend| {
            let mut model = crate::test_model::tiny_model_on(backend, &methods, 208, 1, 64);
            let scores =
                run(&mut *model, pace(settings, 1, 64), &[Sequence::all(&ids)], &mut |_| ()).unwrap();
            scores[0].iter().map(|score| f64::from(score.nll)).sum::<f64>() / scores[0].len() as f64
        });
        assert!((cpu - reference).abs() < 1e-3, "{}: {cpu} and {reference}", method.name());
    }
}

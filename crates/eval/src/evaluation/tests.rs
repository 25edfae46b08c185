use locket_model::kv_cache::{CacheMethod, SlotType};

use super::*;
use crate::test_model::{byte_processor, folder_with, options};

fn texts(words: &[&str]) -> String {
    let line = |word: &&str| {
        let text = format!("The {word} went down the road and met another {word}. ").repeat(30);
        serde_json::json!({ "name": word, "text": text }).to_string() + "\n"
    };
    words.iter().map(line).collect::<String>() + "{\"text\": \"short\"}\n"
}

fn evaluate(options: EvalOptions) -> Report {
    let (folder, processor) = byte_processor();
    let files = folder_with(&folder, &[("text.jsonl", &texts(&["fox", "hare", "mole", "crow"]))]);
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    let evaluation = Evaluation::prepare(&checkpoint, &processor, &files, options, None).unwrap();
    assert!(evaluation.peak_bytes() > 0);
    evaluation.run().unwrap()
}

#[test]
fn a_small_evaluation_has_everything() {
    let mut wanted = options();
    wanted.methods.push(CacheMethod::Learned);
    let report = evaluate(wanted);
    assert_eq!((report.corpus.read, report.corpus.too_short, report.corpus.names.len()), (5, 1, 3));
    // full once, three methods at two sizes, learned skipped twice.
    assert_eq!(report.results.len(), 9);
    for entry in &report.results {
        assert_eq!(entry.failed, None);
        if entry.method == "learned" {
            assert!(entry.skipped.as_ref().unwrap().contains("--side-car") && entry.perplexity.is_none());
            continue;
        }
        let perplexity = entry.perplexity.as_ref().unwrap();
        assert_eq!((perplexity.documents.len(), perplexity.late_from), (3, 25));
        assert!(perplexity.perplexity > 1.0 && perplexity.perplexity.is_finite());
        assert_eq!(entry.recall[0].probes.len(), 2);
    }
    // Against tova: full is no partner's opposite; window and observed at two sizes. Against full: all.
    let of = |other: &str| report.paired.iter().filter(|one| one.against == other).count();
    assert_eq!((of("tova"), of("full")), (4 * 3, 6 * 3));
    let text = report.to_string();
    assert!(
        text.contains("5 documents read, 1 too short") && text.contains("not run: method learned"),
        "{text}"
    );
    let json = serde_json::to_value(&report).unwrap();
    assert_eq!(json["results"][0]["method"], "full");
    assert_eq!(json["probes"]["passkey"].as_array().unwrap().len(), 2);
    assert!(json["paired"][0]["mean_difference"].is_number());
}

#[test]
fn results_depend_on_neither_lockstep_nor_chunk() {
    let nlls = |report: Report| -> Vec<Vec<f64>> {
        let of =
            |entry: &Entry| entry.perplexity.iter().flat_map(|of| &of.documents).map(|of| of.nll).collect();
        report.results.iter().map(of).collect()
    };
    let one =
        nlls(evaluate(EvalOptions { lockstep: 1, chunk: 16, tasks: vec![Task::Perplexity], ..options() }));
    let four =
        nlls(evaluate(EvalOptions { lockstep: 4, chunk: 64, tasks: vec![Task::Perplexity], ..options() }));
    assert_eq!(one, four);
}

#[test]
fn slots_for_the_whole_text_equal_the_full_cache() {
    let wanted = EvalOptions {
        methods: vec![CacheMethod::Full, CacheMethod::Observed],
        slots: vec![300],
        slot_types: vec![SlotType::F16, SlotType::F32],
        ..options()
    };
    let report = evaluate(wanted);
    for comparison in report.paired.iter().filter(|one| one.against == "full") {
        assert_eq!((comparison.paired.wins, comparison.paired.losses), (0, 0), "{comparison:?}");
    }
    assert_eq!(report.paired.iter().filter(|one| one.against == "full").count(), 2 * 3);
    assert!(report.to_string().contains("by bytes per sequence"));
}

#[test]
fn text_that_is_too_short_is_refused() {
    let (folder, processor) = byte_processor();
    let files = folder_with(&folder, &[("text.jsonl", &texts(&[]))]);
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    let error = Evaluation::prepare(&checkpoint, &processor, &files, options(), None).err().unwrap();
    assert!(error.to_string().contains("of 1 documents none has 300 tokens"), "{error}");
}

#[test]
fn configurations_share_a_model_where_blocks_are_equal() {
    let mut wanted = options();
    wanted.slot_types = vec![SlotType::F16, SlotType::F32];
    let configurations = wanted.configurations(None);
    // Per slot type: full, 32 slots, 64 slots.
    let groups = groups(&configurations);
    assert_eq!(groups.iter().map(Vec::len).collect::<Vec<_>>(), [1, 3, 3, 1, 3, 3]);
}

#[test]
fn shares_are_measured_layer_by_layer() {
    let (folder, processor) = byte_processor();
    let files = folder_with(&folder, &[("text.jsonl", &texts(&["fox", "hare", "mole", "crow"]))]);
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    let options = EvalOptions { methods: vec![CacheMethod::Observed], slots: vec![48], ..options() };
    let prepare =
        |options: EvalOptions| Evaluation::prepare(&checkpoint, &processor, &files, options, None).unwrap();
    let mut lines = Vec::new();
    let measured = prepare(options.clone()).layer_shares(2, &mut |line| lines.push(line.to_owned())).unwrap();
    let layers = checkpoint.config.num_layers;
    // A line for equal shares, two per layer, one for the measured shares.
    let counts = (measured.shares.len(), measured.layers.len(), lines.len());
    assert_eq!(counts, (layers, layers, 2 * layers + 2));
    let one_by_one = prepare(options.clone()).layer_shares(1, &mut |_| {}).unwrap();
    assert_eq!(measured, one_by_one, "results do not depend on how many run at once");
    assert!((measured.shares.iter().sum::<f32>() - layers as f32).abs() < 1e-4);
    assert!(measured.layers.iter().any(|effect| effect.least != effect.most), "layers matter");
    for wrong in [
        EvalOptions { methods: vec![CacheMethod::Tova], ..options.clone() },
        EvalOptions { slots: vec![32, 48], ..options.clone() },
        EvalOptions { tasks: vec![Task::Perplexity], ..options },
    ] {
        assert!(prepare(wrong).layer_shares(2, &mut |_| {}).is_err());
    }
}

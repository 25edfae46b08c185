use locket_processor::Processor;

use super::*;
use crate::test_model::byte_processor;

const TASKS: [Task; 4] = [Task::Passkey, Task::MultiKey, Task::Copy, Task::ManyShot];
const LENGTH: usize = 2048;

fn documents(processor: &Processor) -> Vec<Document> {
    let text = |word: &str| format!("It was a {word} day, and nobody said much about it. ").repeat(80);
    let document =
        |word: &str| Document { name: word.into(), ids: processor.encode(&text(word), false).unwrap() };
    ["sunny", "rainy", "windy"].map(document).into()
}

fn probes(task: Task, count: usize, seed: u64) -> (Processor, Vec<Probe>) {
    let (_folder, processor) = byte_processor();
    let documents = documents(&processor);
    let probes = Generator::new(&processor, &documents, LENGTH, seed).unwrap().probes(task, count).unwrap();
    (processor, probes)
}

fn text(processor: &Processor, ids: &[u32]) -> String {
    processor.decode(ids, false)
}

#[test]
fn lengths_are_exact_and_answers_end_the_text() {
    for task in TASKS {
        let (_, probes) = probes(task, 20, 0);
        for probe in &probes {
            assert_eq!(probe.ids.len(), LENGTH, "{}", task.name());
            assert_eq!(probe.answers.last().unwrap().end, LENGTH);
            let tokens: usize = probe.answers.iter().map(ExactSizeIterator::len).sum();
            assert_eq!(probe.counted.len(), tokens);
            crate::runner::check(&[probe.sequence()]).unwrap();
        }
    }
}

#[test]
fn probes_depend_on_seed_and_number_alone() {
    for task in TASKS {
        let (_, five) = probes(task, 5, 7);
        let (_, nine) = probes(task, 9, 7);
        assert_eq!(five, nine[..5]);
        assert_ne!(five, probes(task, 5, 8).1);
        assert!(five.windows(2).all(|pair| pair[0].ids != pair[1].ids), "{}", task.name());
    }
}

#[test]
fn a_pass_key_is_hidden_at_its_depth_and_asked_for() {
    let (processor, probes) = probes(Task::Passkey, 30, 0);
    for probe in &probes {
        let answer = text(&processor, &probe.ids[probe.answers[0].clone()]);
        let key = answer.strip_prefix(' ').unwrap();
        assert!(key.len() == 5 && key.parse::<u32>().is_ok(), "{answer:?}");
        let needle = text(&processor, &probe.ids[probe.needle.clone()]);
        assert_eq!(needle, format!("\n\nThe pass key is {key}. Remember it. {key} is the pass key.\n\n"));
        assert!((0.04..0.95).contains(&probe.depth()), "{}", probe.depth());
        // The byte tokenizer has a token for the space alone: it is predicted and not counted.
        assert_eq!(probe.counted, [false, true, true, true, true, true]);
        let whole = text(&processor, &probe.ids);
        assert!(whole.ends_with(&format!("What is the pass key? The pass key is {key}")));
        assert_eq!(whole.matches(key).count(), 3);
    }
    let depths: Vec<f32> = probes.iter().map(Probe::depth).collect();
    assert!(depths.iter().any(|&depth| depth < 0.3) && depths.iter().any(|&depth| depth > 0.6), "{depths:?}");
}

#[test]
fn eight_cities_have_a_number_each_and_one_is_asked_for() {
    let (processor, probes) = probes(Task::MultiKey, 30, 0);
    for probe in &probes {
        let whole = text(&processor, &probe.ids);
        let numbers: Vec<&str> = whole.split(" is: ").skip(1).filter_map(|rest| rest.get(..5)).collect();
        assert_eq!(numbers.len(), 9, "{whole}");
        let asked = numbers[8];
        assert_eq!(numbers.iter().filter(|number| **number == asked).count(), 2);
        let needle = text(&processor, &probe.ids[probe.needle.clone()]);
        assert!(needle.contains(&format!(" is: {asked}.")), "{needle}");
        let city = needle.split(" for ").nth(1).unwrap().split(" is").next().unwrap();
        assert!(whole.contains(&format!("What is the special magic number for {city}?")), "{whole}");
    }
}

#[test]
fn a_copied_passage_is_in_the_text() {
    let (_, probes) = probes(Task::Copy, 30, 0);
    for probe in &probes {
        let answer = probe.answers[0].clone();
        assert_eq!((answer.len(), probe.needle.len()), (20, 32));
        assert_eq!(probe.ids[answer.start - 12..answer.end], probe.ids[probe.needle.clone()]);
        assert!(probe.needle.end <= answer.start - 12 - 2);
        assert!((0.04..0.86).contains(&probe.depth()));
    }
}

#[test]
fn many_shots_are_listed_once_and_four_are_asked_for() {
    let (processor, probes) = probes(Task::ManyShot, 30, 0);
    for probe in &probes {
        let list = text(&processor, &probe.ids[probe.needle.clone()]);
        assert_eq!(list.matches(" -> ").count(), LENGTH / 64);
        assert_eq!(probe.answers.len(), 4);
        let mut words = Vec::new();
        for answer in &probe.answers {
            let label = text(&processor, &probe.ids[answer.clone()]);
            let before = text(&processor, &probe.ids[..answer.start]);
            let word = before.rsplit('\n').next().unwrap().strip_suffix(" ->").unwrap().to_owned();
            assert!(list.contains(&format!("\n{word} ->{label}\n")), "{word} {label}: {list}");
            words.push(word);
        }
        words.sort_unstable();
        words.dedup();
        assert_eq!(words.len(), 4);
        assert!(probe.depth() < 0.55);
    }
}

#[test]
fn scores_are_judged_token_by_token() {
    let probe = Probe {
        ids: vec![5, 6, 7, 8, 9],
        needle: 0..1,
        answers: vec![1..2, 3..5],
        counted: vec![false, true, true],
    };
    let score = |nll: f32, best: u32| TokenScore { nll, best };
    let half = probe.judge(&[score(3.0, 0), score(1.0, 8), score(2.0, 7)]);
    assert_eq!(half, ProbeScore { accuracy: 0.5, exact: false, nll: 2.0 });
    let all = probe.judge(&[score(3.0, 0), score(1.0, 8), score(2.0, 9)]);
    assert_eq!(all, ProbeScore { accuracy: 1.0, exact: true, nll: 2.0 });
    assert_eq!(probe.sequence().predicted, [1, 3, 4]);
}

#[test]
fn what_does_not_fit_is_refused() {
    let (_folder, processor) = byte_processor();
    let documents = documents(&processor);
    let generator = Generator::new(&processor, &documents, 100, 0).unwrap();
    for task in TASKS {
        let text = generator.probes(task, 1).unwrap_err().to_string();
        assert!(text.contains("probe-context"), "{text}");
    }
    assert!(generator.probes(Task::Perplexity, 1).is_err());
    assert!(Generator::new(&processor, &documents, 100_000, 0).is_err());
    assert!(Generator::new(&processor, &[], 100, 0).is_err());
}

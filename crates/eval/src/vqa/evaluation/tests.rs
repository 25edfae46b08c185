//! The evaluation with eyes and a decoder of paste: what is handed over, how it is judged and counted.

use std::path::Path;

use locket_model::load::Checkpoint;
use locket_vision::geometry::testing::demo;

use super::*;
use crate::{test_model::byte_processor, vqa::draw};

/// Sees tiles of 4x4 patches.
struct Eyes4;

impl Eyes for Eyes4 {
    fn layout(&self, height: u32, width: u32) -> ImageLayout {
        let mut geometry = demo();
        geometry.pinpoints.iter_mut().for_each(|(height, width)| {
            (*height, *width) = (*height / geometry.tile * 64, *width / geometry.tile * 64);
        });
        geometry.tile = 64;
        ImageLayout::of(&geometry, height, width)
    }

    fn encode(&self, image: &RgbImage, wants: Wants<'_>) -> Result<EncodedImage, locket_vision::Error> {
        let full = self.layout(image.height(), image.width());
        let layout = if wants.base_only { ImageLayout { map: None, ..full } } else { full };
        let (tokens, patches) = (layout.tokens(), layout.tiles() * 16);
        let numbers =
            |count: usize| (0..count).map(|at| (at * 37 % 101) as f32 / 101.0).collect::<Vec<f32>>();
        Ok(EncodedImage {
            hidden_size: 4,
            features: numbers(tokens * 4).into(),
            present: None,
            cls_initial: if wants.cls_attention { numbers(patches) } else { Vec::new() },
            cls_final: if wants.cls_attention { numbers(patches) } else { Vec::new() },
            patch_features: if wants.patch_features { numbers(patches * 6) } else { Vec::new() },
            layout,
        })
    }
}

/// Knows every answer as soon as it sees at least `least` rows, and refuses drops inside.
struct Oracle {
    least: usize,
    /// Text behind the image, and the answer.
    known: Vec<(Vec<u32>, Vec<u32>)>,
    largest: usize,
}

impl Decoder for Oracle {
    fn answer(&mut self, prompts: &[Prompt]) -> Result<Vec<Answer>, Error> {
        self.largest = self.largest.max(prompts.len());
        let answer = |prompt: &Prompt| {
            let rows = prompt.image.as_ref().map_or(0, |image| image.offsets.len());
            if let Some(image) = &prompt.image {
                assert_eq!(image.embeddings.len(), rows * 4);
                assert!(image.offsets.iter().all(|&offset| offset < image.span));
                if image.drops.is_some() {
                    return Err(Error::Decoder("no drops here".into()));
                }
            }
            let right = self.known.iter().find(|(behind, _)| prompt.ids.ends_with(behind));
            let mut ids = right.map(|(_, answer)| answer.clone()).unwrap_or_default();
            ids.resize(prompt.tokens as usize, 0);
            if rows < self.least {
                ids[1] = u32::MAX;
            }
            let times = (0..ids.len()).map(|at| Duration::from_millis(10 + 5 * at as u64)).collect();
            Ok(Answer { ids, times })
        };
        prompts.iter().map(answer).collect()
    }
}

fn bitmap(path: &Path, side: u32) {
    // One colour, uncompressed: the evaluation only passes pixels on.
    let mut bytes = b"BM".to_vec();
    let row = (side * 3).next_multiple_of(4);
    let size = 54 + row * side;
    bytes.extend(size.to_le_bytes());
    bytes.extend([0; 4]);
    for word in [54, 40, side, side] {
        bytes.extend(word.to_le_bytes());
    }
    bytes.extend([1, 0, 24, 0]);
    for word in [0, row * side, 2835, 2835, 0, 0] {
        bytes.extend(word.to_le_bytes());
    }
    bytes.resize(size as usize, 200);
    std::fs::write(path, bytes).unwrap();
}

fn evaluation(folder: &Path, rows: &str) -> (VqaEvaluation, Oracle) {
    let (model, mut processor) = byte_processor();
    let geometry = CacheGeometry::of(&Checkpoint::open(model.path()).unwrap().config);
    processor.see_images(None);
    let line = |at: usize| {
        let questions: Vec<_> = (0..2)
            .map(|q| json!({"question": format!("Q{at}{q}?"), "answer": format!("a{at}{q}")}))
            .collect();
        bitmap(&folder.join(format!("{at}.bmp")), 128);
        json!({"image": format!("{at}.bmp"), "kind": (["form", "sign"][at % 2]), "questions": questions})
            .to_string()
    };
    let pages = folder.join("pages.jsonl");
    std::fs::write(&pages, (0..3).map(|at| line(at) + "\n").collect::<String>()).unwrap();
    let options = VqaOptions {
        rows: rows.split(',').map(|row| row.parse().unwrap()).collect(),
        pages,
        most_pages: 10,
        against: vec!["none".into(), "random".into()],
        timed_pages: 2,
        decode_batch: 3,
        decode_tokens: 8,
        slot_type: SlotType::F16,
    };
    let evaluation = VqaEvaluation::prepare(options, geometry, &processor).unwrap();
    let known = evaluation.pages.iter().flat_map(|(_, asked)| asked);
    let known = known.map(|asked| (asked.behind.clone(), asked.answer.clone())).collect();
    (evaluation, Oracle { least: 20, known, largest: 0 })
}

fn inputs() -> VqaInputs {
    VqaInputs {
        checkpoint: String::new(),
        quantization: String::new(),
        vision: String::new(),
        adapter: None,
        pages: String::new(),
        num_pages: 3,
        layers: 2,
        slot_type: "f16",
        backend: String::new(),
        threads: 1,
        timed_pages: 2,
        decode_batch: 3,
    }
}

#[test]
fn every_row_is_asked_judged_and_timed() {
    let folder = tempfile::tempdir().unwrap();
    let rows = "none,blind,thumbnail,hired@0.5,dpp@0.1,random@0.5,pyramid";
    let (evaluation, mut oracle) = evaluation(folder.path(), rows);
    let report = evaluation.run(inputs(), &Eyes4, &mut oracle).unwrap();
    let of = |name: &str| report.results.iter().find(|entry| entry.name == name).unwrap();
    // 16 + 8 * 8 + 8 tokens; the oracle knows from 20 on.
    let expected = [
        ("none", 88.0, 1.0),
        ("blind", 0.0, 0.0),
        ("thumbnail", 16.0, 0.0),
        ("hired@0.5", 44.0, 1.0),
        ("dpp@0.1", 8.0, 0.0),
    ];
    for (name, tokens, accuracy) in expected {
        let entry = of(name);
        assert_eq!(
            (entry.failed.as_deref(), entry.tokens_in, entry.accuracy.mean),
            (None, tokens, accuracy),
            "{name}"
        );
        assert_eq!(entry.questions.len(), 6);
        let times = entry.times.unwrap();
        // The first page warms up; three sequences have seven tokens each, 5 ms apart, behind their first.
        assert!((times.prefill_ms.mean - 10.0).abs() < 1e-6);
        assert!((times.decode_tokens_per_s.unwrap() - 21.0 / 0.035).abs() < 1e-6);
    }
    // Of "a00" and its end the first token was right.
    assert!((of("blind").right_tokens.mean - 0.25).abs() < 1e-6);
    assert!((of("none").reserved_bytes / of("hired@0.5").reserved_bytes - 2.0).abs() < 1e-9);
    assert!(of("pyramid").failed.as_ref().unwrap().contains("no drops here"));
    assert_eq!(report.kinds["form"], 4);
    assert_eq!(oracle.largest, 3);
    assert_eq!(evaluation.most_together(), 3);
    let pair = report
        .paired
        .iter()
        .find(|one| (one.name.as_str(), one.against.as_str()) == ("dpp@0.1", "none"))
        .unwrap();
    assert_eq!((pair.paired.mean_difference, pair.paired.losses), (-1.0, 6));
    assert!(report.to_string().contains("failed: cannot answer: no drops here"), "{report}");
    assert!(draw(&report).unwrap().contains("ms to the first token"));
}

#[test]
fn nothing_is_asked_of_a_model_without_eyes() {
    let folder = tempfile::tempdir().unwrap();
    let (evaluation, _) = evaluation(folder.path(), "none");
    let (_model, processor) = byte_processor();
    let error = VqaEvaluation::prepare(evaluation.options, evaluation.geometry, &processor).err().unwrap();
    assert!(error.to_string().contains("takes no images"), "{error}");
}

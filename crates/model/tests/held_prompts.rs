//! Prompts whose images lose tokens inside the decoder, against a slow decoder in f64 that is written down
//! here once more; the same bits for any chunks and company; nothing changes where nothing leaves.

#![expect(clippy::unwrap_used, reason = "a failed step fails the test")]

use std::{collections::BTreeMap, ops::Range, path::Path, sync::Arc};

use locket_model::{
    Batch, BlockId, Boundary, Extras, HeldProgress, HeldPrompt, Keep, LayerDrops, Model, Rank,
    kv_cache::{BlockClass, CacheGeometry, CacheMethod, CachePlan, CacheSettings, SideArrays, SlotType},
    load::{Backend, BuildOptions, Checkpoint},
    testing::{self, TinyLlama},
};

const LAYERS: usize = 5;
const VOCAB: usize = 1024;
const HIDDEN: usize = 64;
const HEADS: usize = 4;
const KV_HEADS: usize = 2;
const DIM: usize = 16;
const SLOTS: u32 = 48;

fn tiny() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    TinyLlama::default()
        .with("num_hidden_layers", LAYERS)
        .with("vocab_size", VOCAB)
        .write(folder.path())
        .unwrap();
    folder
}

fn build(folder: &Path, backend: Backend, slot_type: SlotType) -> Box<dyn Model> {
    let checkpoint = Checkpoint::open(folder).unwrap();
    let geometry = CacheGeometry::of(&checkpoint.config);
    let side_car = testing::side_car(geometry, SLOTS, 3);
    let side = SideArrays::of(&CacheMethod::ALL, geometry, Some(&side_car)).with_gaps();
    let classes = vec![BlockClass { capacity: 80, blocks: 4 }, BlockClass { capacity: 300, blocks: 4 }];
    let cache = CachePlan { geometry, slot_type, side, classes };
    let side_car = Some(Arc::new(side_car));
    let options = BuildOptions { backend, cache, max_batch_rows: 48, threads: 2, side_car };
    let mut model = checkpoint.build(&options).unwrap();
    model.reserve(&Extras { held_rows: 200, ..Extras::default() }).unwrap();
    model
}

fn settings(method: CacheMethod) -> CacheSettings {
    match method {
        CacheMethod::Full => CacheSettings::full(300),
        _ => CacheSettings { sinks: 4, recent: 12, ..CacheSettings::of(method, SLOTS, 20) },
    }
}

/// A full block in the class of 300 slots.
const LARGE: BlockId = BlockId(4);

fn boundary(layer: u32, keep: u32, key_set: Option<&[u32]>) -> Boundary {
    let rank = key_set.map_or(Rank::LastToken, |key_set| Rank::TextRows { key_set: key_set.into() });
    Boundary { layer, keep: Keep::Exactly(keep), rank }
}

fn pyramid(keeps: [u32; 2], compact: bool) -> LayerDrops {
    let boundaries = vec![boundary(1, keeps[0], None), boundary(3, keeps[1], None)];
    LayerDrops { boundaries, compact, cut: false }
}

fn must(keeps: [u32; 2], key_set: &[u32], cut: bool) -> LayerDrops {
    let boundaries = vec![boundary(2, keeps[0], Some(key_set)), boundary(4, keeps[1], Some(key_set))];
    LayerDrops { boundaries, compact: false, cut }
}

/// `len` rows of which `images` are visual, with gaps of 2 between positions in every image.
fn prompt(len: usize, images: &[(Range<u32>, Option<LayerDrops>)], block: BlockId, seed: u32) -> HeldPrompt {
    let embeddings: Arc<[f32]> = (0..len * HIDDEN)
        .map(|i| ((i as f32 + 7.0 * seed as f32) * 0.37).sin() * 1.2)
        .collect::<Vec<_>>()
        .into();
    let ids: Vec<u32> = (0..len as u32).map(|i| (i * 331 + seed * 77) % VOCAB as u32).collect();
    let mut next = 0;
    let positions: Vec<u32> = (0..len as u32)
        .map(|row| {
            let gap = if images.iter().any(|(rows, _)| rows.contains(&row)) { 2 } else { 1 };
            next += gap;
            next - gap
        })
        .collect();
    let mut batch = Batch::default();
    batch.push_at(block, positions, &ids, true);
    for (rows, _) in images {
        batch.embed(rows.clone(), &embeddings, rows.start);
    }
    let losing = images.iter().filter_map(|(rows, drops)| Some((rows.clone(), Arc::new(drops.clone()?))));
    HeldPrompt {
        batch,
        images: losing.collect(),
        visual: images.iter().map(|(rows, _)| rows.clone()).collect(),
    }
}

/// Runs a held prompt, `chunks` (repeated) rows at a time, and calls `between` after every unit.
fn hold(
    model: &mut dyn Model,
    prompt: &HeldPrompt,
    chunks: &[usize],
    mut between: impl FnMut(&mut dyn Model),
) -> Vec<f32> {
    model.hold(prompt).unwrap();
    let mut logits = Vec::new();
    for &rows in chunks.iter().cycle() {
        let progress = model.advance_held(rows, &mut logits).unwrap();
        between(model);
        if matches!(progress, HeldProgress::Done { .. }) {
            break;
        }
    }
    logits
}

/// The logits of a prompt's last row, then of `answer`, token by token.
fn run(
    model: &mut dyn Model,
    settings: CacheSettings,
    prompt: &HeldPrompt,
    chunks: &[usize],
    answer: &[u32],
) -> Vec<f32> {
    let block = prompt.batch.sequences[0].block;
    model.open_block(block, settings).unwrap();
    let mut all = hold(model, prompt, chunks, |_| {});
    all.extend(decode(model, prompt, answer));
    model.close_block(block);
    all
}

fn decode(model: &mut dyn Model, prompt: &HeldPrompt, answer: &[u32]) -> Vec<f32> {
    let (block, mut all, mut logits) = (prompt.batch.sequences[0].block, Vec::new(), Vec::new());
    for (position, &id) in (prompt.batch.positions.last().unwrap() + 1..).zip(answer) {
        let mut batch = Batch::default();
        batch.push(block, position, &[id], true);
        model.forward(&batch, &mut logits).unwrap();
        all.extend_from_slice(&logits);
    }
    all
}

fn most_apart(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

/// The decoder in f64, one sequence, nothing shared with the crate but the file.
struct Oracle {
    tensors: BTreeMap<String, (Vec<usize>, Vec<f64>)>,
    /// Keys and values of each layer, by token.
    cache: Vec<Vec<(Vec<f64>, Vec<f64>)>>,
    /// How far each layer's positions lie before the sequence's.
    shift: Vec<u32>,
}

impl Oracle {
    fn new(folder: &Path) -> Self {
        let bytes = std::fs::read(folder.join("model.safetensors")).unwrap();
        let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        let tensors = file.iter().map(|(name, view)| {
            let numbers = view.data().as_chunks().0.iter().map(|&bytes| f64::from(f32::from_le_bytes(bytes)));
            (name.to_owned(), (view.shape().to_vec(), numbers.collect()))
        });
        Self { tensors: tensors.collect(), cache: vec![Vec::new(); LAYERS], shift: vec![0; LAYERS] }
    }

    fn times(&self, name: &str, x: &[f64]) -> Vec<f64> {
        let (_, weight) = &self.tensors[name];
        weight.chunks_exact(x.len()).map(|row| row.iter().zip(x).map(|(w, x)| w * x).sum()).collect()
    }

    fn norm(&self, name: &str, x: &[f64]) -> Vec<f64> {
        let mean = x.iter().map(|x| x * x).sum::<f64>() / x.len() as f64;
        let root = (mean + 1e-5).sqrt();
        x.iter().zip(&self.tensors[name].1).map(|(x, w)| x / root * w).collect()
    }

    fn rotate(heads: &mut [f64], position: u32) {
        for head in heads.chunks_exact_mut(DIM) {
            for i in 0..DIM / 2 {
                let angle = f64::from(position) * 10_000f64.powf(-2.0 * i as f64 / DIM as f64);
                let (x, y) = (head[i], head[i + DIM / 2]);
                head[i] = x * angle.cos() - y * angle.sin();
                head[i + DIM / 2] = y * angle.cos() + x * angle.sin();
            }
        }
    }

    /// Rotated queries and keys, and values, of a hidden row in a layer.
    fn project(&self, layer: usize, x: &[f64], position: u32) -> [Vec<f64>; 3] {
        let x = self.norm(&format!("model.layers.{layer}.input_layernorm.weight"), x);
        let [mut q, mut k, v] = ["q", "k", "v"]
            .map(|part| self.times(&format!("model.layers.{layer}.self_attn.{part}_proj.weight"), &x));
        Self::rotate(&mut q, position);
        Self::rotate(&mut k, position);
        [q, k, v]
    }

    /// Per query head, softmax of `q` over `keys`.
    fn weights(q: &[f64], keys: &[&[f64]]) -> Vec<Vec<f64>> {
        let of_head = |head: usize| {
            let kv = head / (HEADS / KV_HEADS) * DIM;
            let scores: Vec<f64> = keys
                .iter()
                .map(|key| {
                    let products = q[head * DIM..][..DIM].iter().zip(&key[kv..kv + DIM]);
                    (products.map(|(q, k)| q * k).sum::<f64>() / (DIM as f64).sqrt()).exp()
                })
                .collect();
            let sum: f64 = scores.iter().sum();
            scores.into_iter().map(|score| score / sum).collect()
        };
        (0..HEADS).map(of_head).collect()
    }

    /// One row through one layer; its key and value join the cache.
    fn layer(&mut self, layer: usize, x: &mut [f64], position: u32) {
        let [q, k, v] = self.project(layer, x, position);
        self.cache[layer].push((k, v));
        let keys: Vec<&[f64]> = self.cache[layer].iter().map(|(key, _)| key.as_slice()).collect();
        let mut attended = vec![0.0; HEADS * DIM];
        for (head, weights) in Self::weights(&q, &keys).into_iter().enumerate() {
            let kv = head / (HEADS / KV_HEADS) * DIM;
            for (weight, (_, value)) in weights.iter().zip(&self.cache[layer]) {
                for i in 0..DIM {
                    attended[head * DIM + i] += weight * value[kv + i];
                }
            }
        }
        let name = |part: &str| format!("model.layers.{layer}.{part}.weight");
        x.iter_mut().zip(self.times(&name("self_attn.o_proj"), &attended)).for_each(|(x, more)| *x += more);
        let normed = self.norm(&name("post_attention_layernorm"), x);
        let (gate, up) =
            (self.times(&name("mlp.gate_proj"), &normed), self.times(&name("mlp.up_proj"), &normed));
        let act: Vec<f64> = gate.iter().zip(&up).map(|(g, u)| g / (1.0 + (-g).exp()) * u).collect();
        x.iter_mut().zip(self.times(&name("mlp.down_proj"), &act)).for_each(|(x, more)| *x += more);
    }

    fn logits(&self, x: &[f64]) -> Vec<f32> {
        let x = self.norm("model.norm.weight", x);
        self.times("lm_head.weight", &x).into_iter().map(|logit| logit as f32).collect()
    }

    fn embed(&self, id: u32) -> Vec<f64> {
        self.tensors["model.embed_tokens.weight"].1[id as usize * HIDDEN..][..HIDDEN].to_vec()
    }

    /// Which of an image's rows stay, by the attention of `rankers` in `layer`.
    fn rank(
        &self,
        rows: &[(u32, u32, Vec<f64>)],
        image: &Range<u32>,
        boundary: &Boundary,
        [layer, first]: [usize; 2],
    ) -> Vec<u32> {
        let projected: Vec<[Vec<f64>; 3]> =
            rows.iter().map(|(_, position, x)| self.project(layer, x, *position)).collect();
        let mut received: BTreeMap<u32, (f64, f64)> =
            rows.iter().filter(|row| image.contains(&row.0)).map(|row| (row.0, (0.0, 0.0))).collect();
        for at in first..rows.len() {
            let keys: Vec<&[f64]> = projected[..=at].iter().map(|parts| parts[1].as_slice()).collect();
            let weights = Self::weights(&projected[at][0], &keys);
            for (i, row) in rows[..=at].iter().enumerate() {
                if let Some((sum, most)) = received.get_mut(&row.0) {
                    let mean = weights.iter().map(|head| head[i]).sum::<f64>() / HEADS as f64;
                    *sum += mean;
                    *most = most.max(mean);
                }
            }
        }
        let key_set = match &boundary.rank {
            Rank::TextRows { key_set } => key_set.to_vec(),
            Rank::LastToken => Vec::new(),
        };
        let is_key = |row: u32| key_set.contains(&(row - image.start));
        let mut order: Vec<u32> = received.keys().copied().collect();
        match boundary.keep {
            Keep::Exactly(keep) => {
                let score = |row: &u32| (is_key(*row), received[row].0);
                order.sort_by(|a, b| score(b).partial_cmp(&score(a)).unwrap());
                order.truncate(keep as usize);
            }
            Keep::Above { global, individual } => {
                let cut = f64::from(global) * received.values().map(|received| received.0).sum::<f64>();
                order.retain(|row| {
                    is_key(*row) || received[row].0 >= cut || received[row].1 >= f64::from(individual)
                });
            }
        }
        order
    }

    /// The prompt with one image that loses tokens, then `answer`; all logits, and tokens by layer.
    fn run(&mut self, prompt: &HeldPrompt, answer: &[u32]) -> (Vec<f32>, Vec<usize>) {
        let (image, drops) = &prompt.images[0];
        let batch = &prompt.batch;
        let mut rows: Vec<(u32, u32, Vec<f64>)> = (0..batch.num_rows() as u32)
            .map(|row| {
                let given = batch.embedded.iter().find(|part| part.rows.contains(&row));
                let x = given.map_or_else(
                    || self.embed(batch.ids[row as usize]),
                    |part| {
                        let at = (part.first + row - part.rows.start) as usize;
                        part.embeddings[at * HIDDEN..][..HIDDEN].iter().map(|&x| f64::from(x)).collect()
                    },
                );
                (row, batch.positions[row as usize], x)
            })
            .collect();
        let mut before: Vec<Vec<u32>> = Vec::new();
        let mut last_input = rows.clone();
        for layer in 0..LAYERS {
            for boundary in drops.boundaries.iter().filter(|boundary| boundary.layer as usize == layer) {
                let stays = match boundary.rank {
                    Rank::LastToken => self.rank(&rows, image, boundary, [layer, rows.len() - 1]),
                    Rank::TextRows { .. } => {
                        let first = last_input.iter().position(|row| row.0 == image.end).unwrap();
                        self.rank(&last_input, image, boundary, [layer - 1, first])
                    }
                };
                let mut moved_up = 0;
                rows.retain_mut(|(row, position, _)| {
                    let goes = image.contains(row) && !stays.contains(row);
                    moved_up += u32::from(goes && drops.compact);
                    *position -= moved_up;
                    !goes
                });
            }
            last_input.clone_from(&rows);
            before.push(rows.iter().map(|row| row.0).collect());
            for (_, position, x) in &mut rows {
                let mut moved = std::mem::take(x);
                self.layer(layer, &mut moved, *position);
                *x = moved;
            }
            self.shift[layer] = batch.positions.last().unwrap() - rows.last().unwrap().1;
        }
        let mut logits = self.logits(&rows.last().unwrap().2);
        if drops.cut {
            let left: Vec<u32> = rows.iter().map(|row| row.0).collect();
            let layers =
                drops.boundaries[0].layer as usize - 1..drops.boundaries.last().unwrap().layer as usize;
            for (cache, before) in self.cache[layers.clone()].iter_mut().zip(&before[layers]) {
                let mut at = before.iter();
                cache.retain(|_| left.contains(at.next().unwrap()));
            }
        }
        let counts = self.cache.iter().map(Vec::len).collect();
        for (position, &id) in (batch.positions.last().unwrap() + 1..).zip(answer) {
            let mut x = self.embed(id);
            (0..LAYERS).for_each(|layer| self.layer(layer, &mut x, position - self.shift[layer]));
            logits.extend(self.logits(&x));
        }
        (logits, counts)
    }
}

/// Tolerance 1e-4 of logits of about 4: f32 against f64 in five layers (4e-6 was measured).
#[test]
fn what_a_slow_decoder_says() {
    let folder = tiny();
    let thresholds = LayerDrops {
        boundaries: vec![Boundary {
            layer: 2,
            keep: Keep::Above { global: 0.025, individual: 0.03 },
            rank: Rank::TextRows { key_set: [1, 5].into() },
        }],
        ..LayerDrops::default()
    };
    let answer = [5, 900, 17, 300];
    let cases = [
        ("pyramid", pyramid([20, 7], false)),
        ("pyramid, compact", pyramid([20, 7], true)),
        ("fastv", LayerDrops { boundaries: vec![boundary(2, 11, None)], ..LayerDrops::default() }),
        ("must", must([25, 9], &[0, 3, 30], false)),
        ("must, cut", must([25, 9], &[0, 3, 30], true)),
        ("must, cut, compact", LayerDrops { compact: true, ..must([25, 9], &[0, 3, 30], true) }),
        ("must, thresholds", thresholds),
        ("everything leaves", pyramid([5, 0], false)),
    ];
    for (name, drops) in cases {
        let held = prompt(75, &[(12..52, Some(drops))], LARGE, 1);
        let (expected, counts) = Oracle::new(folder.path()).run(&held, &answer);
        for backend in [Backend::Cpu, Backend::Reference] {
            let mut model = build(folder.path(), backend, SlotType::F32);
            let got = run(model.as_mut(), settings(CacheMethod::Full), &held, &[32], &answer);
            let apart = most_apart(&expected, &got);
            println!("{name} {backend:?}: {apart}, tokens by layer {counts:?}");
            assert!(apart < 1e-4, "{name} {backend:?}: {apart}");
        }
    }
}

/// Nothing leaves: the bits of a plain prompt.
#[test]
fn a_budget_of_everything_changes_nothing() {
    let folder = tiny();
    for slot_type in [SlotType::F16, SlotType::I8] {
        for method in CacheMethod::ALL.into_iter().filter(|method| slot_type.is_float() || !method.mixes()) {
            let mut model = build(folder.path(), Backend::Cpu, slot_type);
            for drops in [pyramid([40, 40], true), must([40, 40], &[], true)] {
                let held = prompt(75, &[(12..52, Some(drops))], LARGE, 2);
                let got = run(model.as_mut(), settings(method), &held, &[16], &[3, 4]);
                model.open_block(LARGE, settings(method)).unwrap();
                let mut plain = Vec::new();
                for rows in [0..48, 48..75usize] {
                    let mut batch = Batch::default();
                    let positions = held.batch.positions[rows.clone()].iter().copied();
                    batch.push_at(LARGE, positions, &held.batch.ids[rows.clone()], rows.end == 75);
                    let image = 12.max(rows.start as u32)..52.min(rows.end as u32);
                    let first = rows.start as u32;
                    let embeddings = &held.batch.embedded[0].embeddings;
                    batch.embed(image.start - first..image.end - first, embeddings, image.start);
                    model.forward(&batch, &mut plain).unwrap();
                }
                plain.extend(decode(model.as_mut(), &held, &[3, 4]));
                model.close_block(LARGE);
                assert!(got == plain, "{method:?} {slot_type:?}");
            }
        }
    }
}

/// Chunks of any size, and other sequences decoding between the chunks and beside the answer: the same bits,
/// for every cache method, folding or not.
#[test]
fn chunks_and_company_do_not_matter() {
    let folder = tiny();
    let two =
        [(5..30, Some(pyramid([15, 6], false))), (33..40, None), (44..70, Some(must([20, 9], &[2], false)))];
    for method in CacheMethod::ALL {
        let mut model = build(folder.path(), Backend::Cpu, SlotType::F16);
        let held = prompt(90, &two, LARGE, 3);
        let answer: Vec<u32> = (0..30).map(|i| i * 13 % 700).collect();
        let alone = run(model.as_mut(), settings(method), &held, &[48], &answer);
        for chunks in [&[16][..], &[1, 30], &[7]] {
            let chunked = run(model.as_mut(), settings(method), &held, chunks, &answer);
            assert!(chunked == alone, "{method:?} in chunks {chunks:?}");
        }
        let other = BlockId(5);
        model.open_block(other, settings(CacheMethod::Observed)).unwrap();
        model.open_block(LARGE, settings(method)).unwrap();
        let mut position = 0;
        let mut got = hold(model.as_mut(), &held, &[20], |model| {
            let mut batch = Batch::default();
            batch.push(other, position, &[position % 900, 5], true);
            model.forward(&batch, &mut Vec::new()).unwrap();
            position += 2;
        });
        let mut logits = Vec::new();
        for (next, &id) in (held.batch.positions.last().unwrap() + 1..).zip(&answer) {
            let mut batch = Batch::default();
            batch.push(other, position, &[7], false);
            batch.push(LARGE, next, &[id], true);
            model.forward(&batch, &mut logits).unwrap();
            got.extend_from_slice(&logits);
            position += 1;
        }
        assert!(got == alone, "{method:?} in company");
        // Copies and images have the layers' own lengths.
        let copy = BlockId(6);
        model.copy_block(LARGE, copy).unwrap();
        let image = model.export_block(LARGE).unwrap();
        model.import_block(BlockId(7), &image).unwrap();
        let next = held.batch.positions.last().unwrap() + 1 + answer.len() as u32;
        let mut all = Vec::new();
        for block in [LARGE, copy, BlockId(7)] {
            let mut batch = Batch::default();
            batch.push(block, next, &[1, 2, 3], true);
            model.forward(&batch, &mut logits).unwrap();
            all.push(logits.clone());
        }
        assert!(all[0] == all[1] && all[0] == all[2], "{method:?}");
    }
}

/// Backends agree where layers fold before, in and behind the image, in all positions and stages.
#[test]
fn backends_agree() {
    let folder = tiny();
    for (method, drops) in [
        (CacheMethod::Observed, pyramid([20, 7], true)),
        (CacheMethod::Learned, pyramid([30, 12], false)),
        (CacheMethod::Tova, must([25, 9], &[0, 3], true)),
        (CacheMethod::Expected, must([25, 9], &[], false)),
    ] {
        let held = prompt(95, &[(12..52, Some(drops))], LARGE, 4);
        let run = |backend| {
            let mut model = build(folder.path(), backend, SlotType::F32);
            run(model.as_mut(), settings(method), &held, &[40], &[1, 2, 3, 4, 5, 6])
        };
        let apart = most_apart(&run(Backend::Cpu), &run(Backend::Reference));
        assert!(apart < 5e-4, "{method:?}: {apart}");
    }
}

#[test]
fn what_cannot_be_is_refused_by_name() {
    let folder = tiny();
    let mut model = build(folder.path(), Backend::Cpu, SlotType::F16);
    model.open_block(LARGE, settings(CacheMethod::Full)).unwrap();
    let mut refused = |held: HeldPrompt| model.hold(&held).unwrap_err().to_string();
    let of = |drops| prompt(60, &[(10..40, Some(drops))], LARGE, 5);
    assert!(
        refused(of(LayerDrops { boundaries: vec![boundary(5, 3, None)], ..LayerDrops::default() }))
            .contains("layer 5")
    );
    assert!(
        refused(of(LayerDrops { boundaries: vec![boundary(0, 3, None)], ..LayerDrops::default() }))
            .contains("layer 0")
    );
    assert!(refused(of(must([20, 1], &[1, 2], false))).contains("key set"));
    assert!(refused(of(must([20, 9], &[1, 30], false))).contains("key set"));
    assert!(
        refused(prompt(201, &[(10..40, Some(pyramid([9, 3], false)))], LARGE, 6)).contains("room for 200")
    );
    assert!(
        refused(prompt(40, &[(10..40, Some(pyramid([9, 3], false)))], LARGE, 6))
            .contains("end with an image")
    );
    assert!(
        refused(prompt(60, &[(10..40, Some(pyramid([9, 3], false)))], BlockId(0), 6)).contains("not opened")
    );
    let good = of(pyramid([9, 3], false));
    assert!(model.advance_held(10, &mut Vec::new()).is_err(), "nothing is held");
    hold(model.as_mut(), &good, &[30], |_| {});
    assert!(model.advance_held(10, &mut Vec::new()).is_err(), "and nothing any more");
    assert!(model.hold(&good).unwrap_err().to_string().contains("60 tokens already"));
    model.close_block(LARGE);
    model.open_block(LARGE, settings(CacheMethod::Full)).unwrap();
    model.hold(&good).unwrap();
    model.release_held();
    assert!(model.advance_held(10, &mut Vec::new()).is_err(), "released");
}

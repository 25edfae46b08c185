//! Run on a machine with a CUDA device: compares the backends on it and captures the decoder as a
//! graph (ADR 0003). `cuda_check [MODEL.gguf]`; without a model it makes random ones.
//!
//! 1. `reference` on the device against `reference` on the CPU: logits of 256 teacher-forced
//!    positions, largest difference, argmax wherever the gap is above it.
//! 2. One decoder layer, then the whole decoder, through `Ops`: captured once, replayed while the
//!    sequences grow, compared bit for bit with direct runs and with tolerance against `reference`;
//!    times of both.

use std::{path::Path, process::ExitCode, time::Instant};

use locket_model::{
    Batch, BlockId, Error, Model,
    kv_cache::{BlockClass, CacheGeometry, CachePlan, CacheSettings, SideArrays, SlotType},
    llama::{Llama, decode_layer},
    load::{Backend, BuildOptions, Checkpoint},
    ops::{Ops, OpsConfig, Reg, cuda::CudaOps},
    testing::TinyLlama,
};

const POSITIONS: u32 = 256;
const SEQUENCES: u32 = 4;
const STEPS: u32 = 32;

fn plan(checkpoint: &Checkpoint, slot_type: SlotType) -> CachePlan {
    let classes = vec![BlockClass { capacity: 512, blocks: SEQUENCES }];
    CachePlan {
        geometry: CacheGeometry::of(&checkpoint.config),
        slot_type,
        side: SideArrays::default(),
        classes,
    }
}

/// Token ids that a seeded generator picks.
fn ids(checkpoint: &Checkpoint, seed: u64, count: u32) -> Vec<u32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..count)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state % checkpoint.config.vocab_size as u64) as u32
        })
        .collect()
}

fn largest_difference(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

/// Rows in which the best logit differs although it leads by more than `tolerance`.
fn argmax_faults(a: &[f32], b: &[f32], vocab: usize, tolerance: f32) -> usize {
    let best = |row: &[f32]| (0..vocab).max_by(|&i, &j| row[i].total_cmp(&row[j])).unwrap_or(0);
    a.chunks(vocab)
        .zip(b.chunks(vocab))
        .filter(|(a, b)| {
            let top = best(a);
            let second = (0..vocab).filter(|&i| i != top).map(|i| a[i]).fold(f32::MIN, f32::max);
            a[top] - second > tolerance && best(b) != top
        })
        .count()
}

/// Logits of all positions of one sequence, in one chunk.
fn teacher_forced(model: &mut dyn Model, tokens: &[u32]) -> Result<Vec<f32>, Error> {
    model.open_block(BlockId(0), CacheSettings::full(POSITIONS))?;
    let mut batch = Batch::default();
    batch.push(BlockId(0), 0, tokens, true);
    batch.sample_rows = (0..tokens.len() as u32).collect();
    let mut logits = Vec::new();
    model.forward(&batch, &mut logits)?;
    model.close_block(BlockId(0));
    Ok(logits)
}

fn parity(checkpoint: &Checkpoint) -> Result<bool, Error> {
    let tokens = ids(checkpoint, 7, POSITIONS);
    let build = |backend| {
        checkpoint.build(&BuildOptions {
            backend,
            cache: plan(checkpoint, SlotType::F32),
            max_batch_rows: POSITIONS as usize,
            threads: 0,
            side_car: None,
        })
    };
    let host = teacher_forced(&mut *build(Backend::Reference)?, &tokens)?;
    let device = teacher_forced(&mut *build(Backend::Cuda)?, &tokens)?;
    let difference = largest_difference(&host, &device);
    let faults = argmax_faults(&host, &device, checkpoint.config.vocab_size, difference);
    let scale = host.iter().fold(0f32, |top, value| top.max(value.abs()));
    println!(
        "parity: reference on CUDA against CPU, {POSITIONS} positions: max abs difference {difference:.2e} \
         (largest logit {scale:.2}), argmax faults {faults}"
    );
    Ok(difference <= 2e-3 * scale.max(1.0) && faults == 0)
}

/// A decode batch: one row per sequence at `position`.
fn decode_batch(checkpoint: &Checkpoint, position: u32) -> Batch {
    let mut batch = Batch::default();
    for sequence in 0..SEQUENCES {
        let token = ids(checkpoint, u64::from(1 + sequence * 1000 + position), 1);
        batch.push(BlockId(sequence), position, &token, true);
    }
    batch
}

fn cuda_model(checkpoint: &Checkpoint) -> Result<Llama<CudaOps>, Error> {
    let config = OpsConfig {
        model: checkpoint.config.clone(),
        cache: plan(checkpoint, SlotType::F32),
        max_batch_rows: SEQUENCES as usize,
        threads: 1,
        side_car: None,
    };
    let mut ops = CudaOps::new(config, 0)?;
    let weights = checkpoint.prepare(&mut ops)?;
    let mut model = Llama::new(ops, weights);
    for sequence in 0..SEQUENCES {
        model.open_block(BlockId(sequence), CacheSettings::full(512))?;
    }
    Ok(model)
}

/// Captures the operations of `layers` decoder layers at the first step, replays them at later ones,
/// and compares the residual and delta registers with direct runs of a twin.
fn graph(checkpoint: &Checkpoint, layers: usize) -> Result<bool, Error> {
    let (mut captured, mut direct) = (cuda_model(checkpoint)?, cuda_model(checkpoint)?);
    let width = checkpoint.config.hidden_size;
    let rows = SEQUENCES as usize;
    let mut graph = None;
    let (mut equal, mut replay_s, mut direct_s) = (true, 0.0, 0.0);
    for position in 0..STEPS {
        let batch = decode_batch(checkpoint, position);
        let run = |model: &mut Llama<CudaOps>, step: &_| -> Result<(), Error> {
            let (ops, weights) = model.parts_mut();
            ops.embed(step, &weights.embedding, Reg::H)?;
            for layer in 0..layers {
                decode_layer(ops, step, &weights.layers[layer], layer, &[])?;
            }
            Ok(())
        };
        let step = direct.parts_mut().0.upload(&batch)?;
        direct.parts_mut().0.synchronize()?;
        let start = Instant::now();
        run(&mut direct, &step)?;
        direct.parts_mut().0.synchronize()?;
        direct_s += start.elapsed().as_secs_f64();

        let step = captured.parts_mut().0.upload(&batch)?;
        if position == 0 {
            // The first step runs directly: cuBLAS sets itself up, which a capture cannot contain.
            run(&mut captured, &step)?;
            captured.parts_mut().0.begin_capture()?;
            let result = run(&mut captured, &step);
            graph = Some(captured.parts_mut().0.end_capture()?);
            result?;
        }
        captured.parts_mut().0.synchronize()?;
        let start = Instant::now();
        if let Some(graph) = &graph {
            graph.launch()?;
        }
        captured.parts_mut().0.synchronize()?;
        replay_s += start.elapsed().as_secs_f64();
        for reg in [Reg::H, Reg::X] {
            let a = captured.parts_mut().0.read(reg, rows, width)?;
            let b = direct.parts_mut().0.read(reg, rows, width)?;
            equal &= a == b && a.iter().all(|value| value.is_finite());
        }
    }
    println!(
        "graph: {layers} layers captured at the first step, {STEPS} replays while {SEQUENCES} sequences grow: {}; \
         replay {:.3} ms, direct {:.3} ms a step",
        if equal { "bit-equal to direct runs" } else { "DIFFERENT from direct runs" },
        replay_s / f64::from(STEPS) * 1e3,
        direct_s / f64::from(STEPS) * 1e3,
    );
    Ok(equal)
}

/// The device operations against the reference on the CPU, token by token.
fn decode_parity(checkpoint: &Checkpoint) -> Result<bool, Error> {
    let mut device = cuda_model(checkpoint)?;
    let mut host = checkpoint.build(&BuildOptions {
        backend: Backend::Reference,
        cache: plan(checkpoint, SlotType::F32),
        max_batch_rows: SEQUENCES as usize,
        threads: 0,
        side_car: None,
    })?;
    for sequence in 0..SEQUENCES {
        host.open_block(BlockId(sequence), CacheSettings::full(512))?;
    }
    let (mut a, mut b) = (Vec::new(), Vec::new());
    let (mut difference, mut scale) = (0f32, 0f32);
    for position in 0..STEPS {
        let batch = decode_batch(checkpoint, position);
        device.forward(&batch, &mut a)?;
        host.forward(&batch, &mut b)?;
        difference = difference.max(largest_difference(&a, &b));
        scale = b.iter().fold(scale, |top, value| top.max(value.abs()));
    }
    println!(
        "decode: ops/cuda.rs against reference on CPU: max abs difference {difference:.2e} (largest logit {scale:.2})"
    );
    Ok(difference <= 2e-3 * scale.max(1.0))
}

fn check(path: &Path) -> Result<bool, Error> {
    let checkpoint = Checkpoint::open(path)?;
    let layers = checkpoint.config.num_layers;
    let checks = [
        parity(&checkpoint)?,
        decode_parity(&checkpoint)?,
        graph(&checkpoint, 1)?,
        graph(&checkpoint, layers)?,
    ];
    Ok(checks.iter().all(|&passed| passed))
}

fn run() -> Result<bool, Box<dyn std::error::Error>> {
    if let Some(path) = std::env::args_os().nth(1) {
        return Ok(check(Path::new(&path))?);
    }
    let mut passed = true;
    let folder = std::env::temp_dir().join(format!("locket-cuda-check-{}", std::process::id()));
    for (name, hidden, inner, layers) in [("small", 256u32, 512u32, 4u32), ("one wide layer", 4096, 11008, 1)]
    {
        println!("random LLaMA, {name}: hidden {hidden}, {layers} layers");
        std::fs::create_dir_all(&folder)?;
        TinyLlama::default()
            .with("hidden_size", hidden)
            .with("intermediate_size", inner)
            .with("num_hidden_layers", layers)
            .with("num_attention_heads", hidden / 64)
            .with("num_key_value_heads", hidden / 128)
            .write(&folder)?;
        passed &= check(&folder)?;
        std::fs::remove_dir_all(&folder)?;
    }
    Ok(passed)
}

fn main() -> ExitCode {
    match run() {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => {
            eprintln!("a check failed");
            ExitCode::FAILURE
        }
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}

//! Speed of every CPU kernel on the shapes of SmolLM2-135M, wall time.
//!
//! Usage: `kernel_bench [threads [attention]]`, 0 or nothing for all cores; `attention` leaves out
//! the rest.
//!
//! Floors. With VNNI a 512-bit dot does 64 multiply-adds; Zen 4 starts one per cycle and core,
//! and a block of 32 columns by 16 rows (512 multiply-adds) takes 16 dots, 8 for each digit of the
//! activations, 3 (Q4_1) or 2 (Q8_0) multiplications, and a shift, a subtraction and an addition to
//! join the digits. If all share the dots' pipes, that is 22 or 21 cycles: at 3.7 GHz 86 (Q4_1) or 90
//! (Q8_0) GMAC/s a core; at most 100 or 105 where the last three find other pipes. With AVX2 a dot
//! of 32 takes two instructions on two pipes: half of that or less. One row must stream the weights:
//! 20 bytes (Q4_1) or 34 bytes (Q8_0) per 32 multiply-adds, so that 40 GB/s of memory bandwidth
//! allow 64 or 38 GMAC/s. A decode step of SmolLM2 reads 66 MB of Q4_1 and 30 MB of Q8_0: 2.4 ms.

#![expect(clippy::print_stdout, reason = "it prints its results")]

use std::{hint::black_box, time::Instant};

use locket_kernels::cpu::{
    Activations, AlignedBuf, Destination, Isa, PackedMatrix, QuantRows, Team, WeightFormat,
    attention::{
        Attention, AttentionJob, AttentionRows, AttentionShape, Received, ReceivedMode, ReceivedRows,
    },
    kv::{KvLayout, KvPlace, SlotNumber},
    matmul,
    rows::{self, RmsNorm},
};

const LAYERS: usize = 30;
const ROWS: [usize; 5] = [1, 4, 16, 64, 256];

/// Seconds of one call of `run(layer)`: the fastest fifth's slowest, so that neither a lucky cache
/// nor other work on the machine decides. Layers are taken in turn, as a step does.
fn fastest(layers: usize, mut run: impl FnMut(usize)) -> f64 {
    let start = Instant::now();
    let mut times = Vec::new();
    while times.len() < 2 * layers.max(5) || start.elapsed().as_secs_f64() < 0.3 {
        let start = Instant::now();
        run(times.len() % layers);
        times.push(start.elapsed().as_secs_f64());
    }
    times.sort_by(f64::total_cmp);
    times[times.len() / 5]
}

fn weights(format: WeightFormat, features: usize, cols: usize) -> PackedMatrix {
    // Any bytes are numbers; 0x2a in both bytes of a scale is 0.048.
    let bytes = vec![0x2a; features * format.row_bytes(cols)];
    PackedMatrix::pack(format, &bytes, features, cols).expect("whole blocks")
}

fn products(team: &mut Team, isa: Isa, name: &str, format: WeightFormat, features: usize, cols: usize) {
    // As many matrices as a model has, so that one row reads them from memory.
    let copies = if features > 10_000 { 1 } else { LAYERS };
    let layers: Vec<PackedMatrix> = (0..copies).map(|_| weights(format, features, cols)).collect();
    print!("{name:<16} {format:?} {features:>5} x {cols:<4}");
    for rows in ROWS {
        let x: Vec<f32> = (0..rows * cols).map(|i| (i % 17) as f32 - 8.0).collect();
        let quant = format.is_quantized().then(|| {
            let mut quant = QuantRows::new(rows, cols);
            rows::quantize(team, isa, rows, &x, &mut quant);
            quant
        });
        let mut out = vec![0.0; rows * features];
        let seconds = fastest(copies, |layer| {
            let x = quant.as_ref().map_or(Activations::F32(&x), Activations::Quant);
            let destination = Destination { data: &mut out, stride: features, offset: 0 };
            matmul(team, isa, &layers[layer], x, rows, None, destination);
            black_box(&out);
        });
        let bytes = layers[0].num_bytes();
        let macs = rows * features * cols;
        print!(
            " | {rows:>3}: {:6.1} GMAC/s {:5.1} GB/s",
            macs as f64 / seconds / 1e9,
            bytes as f64 / seconds / 1e9
        );
    }
    println!();
}

/// Sequences that take part in one step, all alike.
#[derive(Clone, Copy)]
struct Sequences {
    number: SlotNumber,
    count: usize,
    rows: usize,
    /// Slots before the rows.
    depth: usize,
}

/// Attention of all layers; with `received`, once more with either kind of what slots receive.
/// Each key and value costs two multiply-adds per query head; a row reads `depth * 64 * 3 * 2`
/// numbers per layer.
fn attention(team: &mut Team, isa: Isa, sequences: Sequences, received: bool) {
    let Sequences { number, count, rows, depth } = sequences;
    let shape = AttentionShape { heads: 9, kv_heads: 3, head_dim: 64, scale: 0.125, number };
    let layout = KvLayout::of(number, 3, 64, depth + rows);
    let mut memory = AlignedBuf::zeroed(LAYERS * count * layout.layer_len() * number.bytes());
    // Halves from 0.125 on, pairs of which are small singles, as are scales.
    memory.as_mut_slice::<u16>().iter_mut().enumerate().for_each(|(i, x)| *x = 0x3000 + (i % 2048) as u16);
    let queries: Vec<f32> = (0..count * rows * 960).map(|i| (i % 7) as f32 * 0.1 - 0.3).collect();
    let mut out = vec![0.0; count * rows * 576];
    let mut sums = vec![0.0; count * 3 * layout.slots()];
    let mut attention = Attention::new(shape, team.num_threads());
    let mut seconds = |mode: Option<ReceivedMode>| {
        let stride = layout.slots();
        let requests: Vec<Option<Received>> =
            (0..count).map(|i| mode.map(|mode| Received { mode, at: i * 3 * stride, stride })).collect();
        let run = |layer: usize| {
            let jobs: Vec<AttentionJob> = (0..count)
                .map(|i| AttentionJob {
                    place: KvPlace { layout, base: (layer * count + i) * layout.layer_len() },
                    first_row: i * rows,
                    rows,
                    slots_before: depth,
                    id: i,
                })
                .collect();
            let rows = AttentionRows { queries: &queries, query_stride: 960, out: &mut out };
            let rows = ReceivedRows { rows, jobs: &requests, sums: &mut sums };
            attention.run_received(team, isa, &memory, &jobs, rows, None);
            black_box(&out);
        };
        LAYERS as f64 * fastest(LAYERS, run)
    };
    let plain = seconds(None);
    let slots: usize = (0..rows).map(|row| depth + row + 1).sum();
    let macs = (LAYERS * count * 2 * slots * 576) as f64;
    print!(
        "attention {number:?} {count:>2} x {rows:>3} rows at depth {depth:>4}: {:8.3} ms, {:6.1} GMAC/s",
        plain * 1e3,
        macs / plain / 1e9
    );
    for mode in [ReceivedMode::Sum, ReceivedMode::Last].into_iter().filter(|_| received) {
        let seconds = seconds(Some(mode));
        print!(", {mode:?} +{:.3} ms ({:+.0} %)", (seconds - plain) * 1e3, (seconds / plain - 1.0) * 100.0);
    }
    println!();
}

fn all_attention(team: &mut Team, isa: Isa) {
    for (depth, rows) in [(512, 1), (2048, 1), (8000, 1), (0, 256), (2048, 256)] {
        attention(team, isa, Sequences { number: SlotNumber::F16, count: 1, rows, depth }, false);
    }
    for depth in [256, 512, 2048] {
        for (count, rows) in [(16, 1), (1, 128)] {
            for number in [SlotNumber::F32, SlotNumber::F16, SlotNumber::I8] {
                attention(team, isa, Sequences { number, count, rows, depth }, true);
            }
        }
    }
}

fn row_operations(team: &mut Team, isa: Isa) {
    let weight = vec![1.0; 576];
    for rows in ROWS {
        let norm = RmsNorm { weight: &weight, eps: 1e-5 };
        let (mut residual, mut x) = (vec![0.1; rows * 576], vec![0.5; rows * 576]);
        let mut quant = QuantRows::new(rows, 576);
        let norm_seconds = fastest(1, |_| {
            x.fill(0.5);
            rows::add_rms_norm(team, isa, norm, rows, &mut residual, &mut x, Some(&mut quant));
        });
        let (gate_up, mut out) = (vec![0.5; rows * 3072], vec![0.0; rows * 1536]);
        let mut quant = QuantRows::new(rows, 1536);
        let silu_seconds =
            fastest(1, |_| rows::silu_mul(team, isa, rows, 1536, &gate_up, &mut out, Some(&mut quant)));
        println!(
            "rows             {rows:>3}: add_rms_norm + rounding {:7.2} us, silu_mul + rounding {:7.2} us",
            norm_seconds * 1e6,
            silu_seconds * 1e6
        );
    }
}

fn main() {
    let threads = std::env::args().nth(1).and_then(|threads| threads.parse().ok()).unwrap_or(0);
    let only_attention = std::env::args().nth(2).is_some_and(|what| what == "attention");
    let mut team = Team::new(threads).expect("threads");
    let mut levels: Vec<Isa> = Isa::available().collect();
    levels.reverse();
    for isa in levels {
        println!("{} with {} threads", isa.name(), team.num_threads());
        let fork = fastest(1, |_| (0..1000).for_each(|_| team.run(8, |_, task| _ = black_box(task))));
        println!("fork and join    {:.2} us", fork * 1e3);
        if only_attention {
            all_attention(&mut team, isa);
            continue;
        }
        products(&mut team, isa, "qkv", WeightFormat::Q4_1, 960, 576);
        products(&mut team, isa, "output", WeightFormat::Q4_1, 576, 576);
        products(&mut team, isa, "gate, up", WeightFormat::Q4_1, 3072, 576);
        products(&mut team, isa, "down", WeightFormat::Q4_1, 576, 1536);
        if isa.name() == "scalar" {
            continue;
        }
        products(&mut team, isa, "head", WeightFormat::Q8_0, 49_152, 576);
        products(&mut team, isa, "gate, up", WeightFormat::F16, 3072, 576);
        products(&mut team, isa, "gate, up", WeightFormat::Bf16, 3072, 576);
        products(&mut team, isa, "gate, up", WeightFormat::F32, 3072, 576);
        all_attention(&mut team, isa);
        row_operations(&mut team, isa);
    }
}

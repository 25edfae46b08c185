//! Milliseconds of whole steps of a model on the CPU backend: decode rows and prefill chunks.
//!
//! Usage: `step_bench MODEL [threads]`. Floors for SmolLM2-135M in Q4_1 (106 M multiply-adds of
//! Q4_1 and, per sample row, 28 M of Q8_0): one row reads 96 MB, 2.4 ms at 40 GB/s; a prefill row
//! takes 0.35 ms at 300 GMAC/s, and its attention 34,560 multiply-adds in f32 per slot more (1.3 ms
//! at depth 4,000 and 110 GMAC/s).

#![expect(clippy::print_stdout, reason = "it prints its results")]

use std::{path::Path, time::Instant};

use locket_model::{
    Batch, BlockId, Error, Model,
    kv_cache::{BlockClass, CacheGeometry, CachePlan, CacheSettings, SideArrays, SlotType},
    load::{Backend, BuildOptions, Checkpoint},
};

const CONTEXT: u32 = 4608;
const BLOCKS: u32 = 16;

fn main() -> Result<(), Error> {
    let mut args = std::env::args().skip(1);
    let Some(path) = args.next() else {
        eprintln!("usage: step_bench MODEL [threads]");
        return Ok(());
    };
    let threads = args.next().and_then(|threads| threads.parse().ok()).unwrap_or(0);
    let checkpoint = Checkpoint::open(Path::new(&path))?;
    let cache = CachePlan {
        geometry: CacheGeometry::of(&checkpoint.config),
        slot_type: SlotType::F16,
        side: SideArrays::default(),
        classes: vec![
            BlockClass { capacity: 640, blocks: BLOCKS },
            BlockClass { capacity: CONTEXT, blocks: 1 },
        ],
    };
    let start = Instant::now();
    let options = BuildOptions { backend: Backend::Cpu, cache, max_batch_rows: 512, threads, side_car: None };
    let mut model = checkpoint.build(&options)?;
    println!("loaded in {:.2} s", start.elapsed().as_secs_f64());
    for (rows, chunks) in [(16, 8), (64, 8), (256, 4), (512, 9)] {
        prefill(&mut *model, rows, chunks)?;
    }
    for sequences in [1, 4, 16] {
        decode(&mut *model, sequences)?;
    }
    Ok(())
}

fn prefill(model: &mut dyn Model, rows: u32, chunks: u32) -> Result<(), Error> {
    let (block, mut logits, mut batch) = (BlockId(BLOCKS), Vec::new(), Batch::default());
    model.open_block(block, CacheSettings::full(CONTEXT))?;
    print!("prefill of {rows} rows, ms per chunk:");
    for chunk in 0..chunks {
        let ids: Vec<u32> = (0..rows).map(|i| (i * 37 + chunk) % 1000 + 100).collect();
        batch.clear();
        batch.push(block, chunk * rows, &ids, false);
        let start = Instant::now();
        model.forward(&batch, &mut logits)?;
        print!(" {:.1}", start.elapsed().as_secs_f64() * 1e3);
    }
    println!();
    model.close_block(block);
    Ok(())
}

fn decode(model: &mut dyn Model, sequences: u32) -> Result<(), Error> {
    let (mut logits, mut batch) = (Vec::new(), Batch::default());
    for block in 0..sequences {
        model.open_block(BlockId(block), CacheSettings::full(640))?;
    }
    let mut times = Vec::new();
    for position in 0..300 {
        batch.clear();
        for block in 0..sequences {
            batch.push(BlockId(block), position, &[100 + position + block], true);
        }
        let start = Instant::now();
        model.forward(&batch, &mut logits)?;
        times.push(start.elapsed().as_secs_f64() * 1e3);
    }
    times.sort_by(f64::total_cmp);
    println!(
        "decode of {sequences} sequences, ms per step: fastest {:.2}, median {:.2}",
        times[0],
        times[times.len() / 2]
    );
    for block in 0..sequences {
        model.close_block(BlockId(block));
    }
    Ok(())
}

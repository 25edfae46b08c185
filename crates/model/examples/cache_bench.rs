//! What cache methods cost in time on the CPU backend: a prompt of 4,096 tokens in chunks of 512 rows, and
//! 256 decode steps of 16 sequences behind it, with M = 512 and B = 128; `full` beside them.
//!
//! Usage: `cache_bench MODEL [SIDE_CAR] [rounds]`. Every round takes the methods in turn, so that a slow
//! minute of the machine hits all of them; medians are printed.

#![expect(clippy::print_stdout, reason = "it prints its results")]

use std::{path::Path, sync::Arc, time::Instant};

use locket_model::{
    Batch, BlockId, Error, Model,
    kv_cache::{
        BlockClass, CacheGeometry, CacheMethod, CachePlan, CacheSettings, SideArrays, SideCar, SlotType,
    },
    load::{Backend, BuildOptions, Checkpoint},
};

const PROMPT: u32 = 4096;
const CHUNK: u32 = 512;
const SEQUENCES: u32 = 16;
const STEPS: u32 = 256;
const SLOTS: u32 = 512;
const RING: u32 = 128;

fn main() -> Result<(), Error> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let Some(path) = args.first() else {
        eprintln!("usage: cache_bench MODEL [SIDE_CAR] [rounds]");
        return Ok(());
    };
    let checkpoint = Checkpoint::open(Path::new(path))?;
    let geometry = CacheGeometry::of(&checkpoint.config);
    let side_car =
        args.get(1).map(|path| SideCar::open(Path::new(path), geometry)).transpose()?.map(Arc::new);
    let rounds = args.get(2).and_then(|rounds| rounds.parse().ok()).unwrap_or(3);
    let mut methods = CacheMethod::ALL.to_vec();
    methods.retain(|&method| {
        !method.needs_side_car() || side_car.as_ref().is_some_and(|side_car| side_car.serves(method))
    });
    for slot_type in [SlotType::F16, SlotType::I8] {
        let cache = CachePlan {
            geometry,
            slot_type,
            side: SideArrays::of(&methods, geometry, side_car.as_deref()),
            classes: vec![BlockClass { capacity: PROMPT + STEPS, blocks: SEQUENCES }],
        };
        let side_car = side_car.clone();
        let options = BuildOptions {
            backend: Backend::Cpu,
            cache,
            max_batch_rows: CHUNK as usize,
            threads: 0,
            side_car,
        };
        let mut model = checkpoint.build(&options)?;
        let mut times = vec![[Vec::new(), Vec::new()]; methods.len()];
        for _ in 0..rounds {
            for (method, times) in methods.iter().zip(&mut times) {
                let settings = match method {
                    CacheMethod::Full => CacheSettings::full(PROMPT + STEPS),
                    method => CacheSettings::of(*method, SLOTS, RING),
                };
                let [prefill, decode] = run(&mut *model, settings)?;
                times[0].push(prefill);
                times[1].push(decode);
            }
        }
        println!("{} slots: prefill tokens/s, decode ms/step", slot_type.name());
        for (method, times) in methods.iter().zip(times) {
            let [prefill, decode] = times.map(median);
            println!("{:10} {:7.0} {:7.2}", method.name(), f64::from(PROMPT) / prefill, decode * 1e3);
        }
    }
    Ok(())
}

/// Seconds of the prompt, and of one decode step.
fn run(model: &mut dyn Model, settings: CacheSettings) -> Result<[f64; 2], Error> {
    let (mut logits, mut batch) = (Vec::new(), Batch::default());
    model.open_block(BlockId(0), settings)?;
    let start = Instant::now();
    for first in (0..PROMPT).step_by(CHUNK as usize) {
        let ids: Vec<u32> = (first..first + CHUNK).map(|i| (i * i * 37 + i * 11) % 20_000 + 100).collect();
        batch.clear();
        batch.push(BlockId(0), first, &ids, false);
        model.forward(&batch, &mut logits)?;
    }
    let prefill = start.elapsed().as_secs_f64();
    for block in 1..SEQUENCES {
        model.copy_block(BlockId(0), BlockId(block))?;
    }
    let start = Instant::now();
    for position in PROMPT..PROMPT + STEPS {
        batch.clear();
        for block in 0..SEQUENCES {
            batch.push(BlockId(block), position, &[100 + position + block], true);
        }
        model.forward(&batch, &mut logits)?;
    }
    let decode = start.elapsed().as_secs_f64() / f64::from(STEPS);
    (0..SEQUENCES).for_each(|block| model.close_block(BlockId(block)));
    Ok([prefill, decode])
}

fn median(mut times: Vec<f64>) -> f64 {
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

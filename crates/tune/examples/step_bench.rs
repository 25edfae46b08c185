//! Times training steps: `step_bench MODEL learned|lococo STEPS BATCH MICRO_BATCH SEQUENCE [bf16] [cuda]`.
//!
//! The text is made up. Seconds include making the batches, but not loading the model.

#![expect(clippy::print_stdout, reason = "a measurement prints its result")]

use std::{io::Write as _, path::Path, time::Instant};

use locket_model::load::Checkpoint;
use locket_processor::Processor;
use locket_tune::{Budget, DeviceKind, LearnedSettings, LococoSettings, Method, Precision, Settings};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [model, method, steps, batch, micro_batch, sequence, options @ ..] = args.as_slice() else {
        return Err("MODEL learned|lococo STEPS BATCH MICRO_BATCH SEQUENCE [bf16] [cuda]".into());
    };
    let has = |option: &str| options.iter().any(|given| given == option);
    let folder = std::env::temp_dir().join(format!("locket-step-bench-{}", std::process::id()));
    std::fs::create_dir_all(&folder)?;
    let text = folder.join("text.txt");
    let mut file = std::fs::File::create(&text)?;
    for i in 0..100_000u64 {
        writeln!(file, "Entry {i}: the keeper of house {} wrote {} lines.", i * 7919 % 1000, i * 31 % 97)?;
    }
    drop(file);
    let settings = Settings {
        method: match method.as_str() {
            "lococo" => Method::Lococo(LococoSettings::default()),
            _ => Method::Learned(LearnedSettings::default()),
        },
        data: vec![text],
        out: folder.join("side-car.safetensors"),
        model_name: "step-bench".into(),
        budget: Budget::Steps(steps.parse()?),
        batch: batch.parse()?,
        micro_batch: micro_batch.parse()?,
        sequence: sequence.parse()?,
        rate: if method == "lococo" { 5e-2 } else { 2e-3 },
        seed: 0,
        device: device(has("cuda")),
        precision: if has("bf16") { Precision::Bf16 } else { Precision::F32 },
        checkpoints: None,
        resume: false,
    };
    let started = Instant::now();
    let checkpoint = Checkpoint::open(Path::new(model))?;
    let processor = Processor::load(&checkpoint)?;
    let summary = locket_tune::run(&settings, &checkpoint, &processor);
    std::fs::remove_dir_all(&folder)?;
    let summary = summary?;
    let per_step = summary.seconds / summary.steps as f64;
    let rate = summary.tokens as f64 / summary.seconds;
    println!("{per_step:.3} s per step, {rate:.0} tokens/s, {:.1} s in all", started.elapsed().as_secs_f64());
    println!("{:?}", summary.losses);
    Ok(())
}

#[cfg(feature = "cuda")]
fn device(cuda: bool) -> DeviceKind {
    if cuda { DeviceKind::Cuda } else { DeviceKind::Cpu }
}

#[cfg(not(feature = "cuda"))]
fn device(_cuda: bool) -> DeviceKind {
    DeviceKind::Cpu
}

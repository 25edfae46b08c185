//! How long decoding, tiles and the tower take: random weights at the demo model's geometry, or with the
//! argument `7b` at LLaVA-NeXT-7B's; a second argument is the number of threads.

#![expect(clippy::print_stdout, reason = "its purpose")]

use std::time::Instant;

use locket_vision::{OpenOptions, RgbImage, VisionModel, Wants, testing};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1);
    let is_large = arguments.next().as_deref() == Some("7b");
    let threads = arguments.next().map_or(Ok(2), |threads| threads.parse())?;
    let geometry = if is_large { testing::llava_next_7b() } else { testing::demo() };
    let file = std::env::temp_dir().join(format!("tower-time-{}.safetensors", std::process::id()));
    testing::write_random(&file, &geometry, 1)?;
    let model = VisionModel::open(&file, &OpenOptions { threads, ..OpenOptions::default() });
    std::fs::remove_file(&file)?;
    let model = model?;
    let side = 2 * geometry.tile;
    let pixels = (0..side * side * 3).map(|at| (at.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    let image = RgbImage::new(side, side, pixels).ok_or("no pixels")?;
    let wants = Wants { cls_attention: true, ..Wants::default() };
    for _ in 0..if is_large { 2 } else { 6 } {
        let start = Instant::now();
        let encoded = model.encode(&image, wants)?;
        println!(
            "{side} x {side}: {} tiles, {} tokens, {threads} threads: {:.1} ms (weights {} MB, workspace {} MB)",
            encoded.layout.tiles(),
            encoded.layout.tokens(),
            start.elapsed().as_secs_f64() * 1e3,
            model.weight_bytes() >> 20,
            model.workspace_bytes() >> 20,
        );
    }
    Ok(())
}

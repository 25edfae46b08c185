//! Writes a vision model with random weights, for tests of speed and memory:
//!
//! ```text
//! cargo run --release -p locket-vision --example random_tower -- FILE HIDDEN_SIZE [tiny|demo]
//! ```
//!
//! `HIDDEN_SIZE` is the decoder's: 576 for the default model.

use std::path::Path;

use locket_vision::{
    VisionGeometry,
    testing::{demo, tiny, write_random},
};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let (file, hidden_size, kind) = match arguments.as_slice() {
        [file, hidden_size] => (file, hidden_size.parse()?, "tiny"),
        [file, hidden_size, kind] => (file, hidden_size.parse()?, kind.as_str()),
        _ => return Err("give FILE HIDDEN_SIZE [tiny|demo]".into()),
    };
    let geometry = match kind {
        "tiny" => tiny(hidden_size),
        "demo" => VisionGeometry { hidden_size, ..demo() },
        other => return Err(format!("{other:?} is neither tiny nor demo").into()),
    };
    write_random(Path::new(file), &geometry, 1)?;
    Ok(())
}

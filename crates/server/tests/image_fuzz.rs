//! The image path under bytes of strangers: reference, header, pixels, tiles, tower, plan.
//!
//! The corpus in `fuzz/images` (made by `fuzz/make_corpus.py`; what once failed is added to it) is replayed,
//! then its files are mutated and spliced for some seconds. For half an hour:
//!
//! ```text
//! LOCKET_FUZZ_SECONDS=1800 cargo test --release -p locket-server --test image_fuzz -- --nocapture
//! ```
//!
//! An input that fails is written to the folder `LOCKET_FUZZ_FAILURES` (default: the system's temporary
//! folder), and its path is in the message. `LOCKET_FUZZ_SEED` repeats a run.

#![expect(clippy::panic, reason = "a test fails by panicking")]

use std::{
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use locket_server::media::{EncodedImage, ImageSettings, ImageSource};
use locket_vision::{
    DecodeLimits, ImageLayout, VisionModel, Wants,
    decode::{decode, upright_size},
    drop::{Budget, Method, VisualSettings, method},
    model::OpenOptions,
    testing::{tiny, write_random},
};

/// Small enough that a mutated header costs no gigabytes.
const MAX_PIXELS: u64 = 4_000_000;
/// Nothing takes longer for one image.
const MAX_TIME: Duration = Duration::from_secs(10);
/// What the process may have in memory at its most: limits hold for one image at a time.
const MAX_RESIDENT_KIB: u64 = 1 << 20;

/// What the server does with a file, and what must hold whatever its bytes are.
struct Target {
    settings: ImageSettings,
    limits: DecodeLimits,
    vision: VisionModel,
}

/// How far a file came.
#[derive(Debug, Default)]
struct Counts {
    files: u64,
    with_header: u64,
    decoded: u64,
}

impl Target {
    fn new() -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("vision.safetensors");
        write_random(&path, &tiny(16), 3).expect("a file");
        Self {
            settings: ImageSettings { max_pixels: MAX_PIXELS, ..ImageSettings::default() },
            limits: DecodeLimits { max_pixels: MAX_PIXELS, max_bytes: 64 << 20, ..DecodeLimits::default() },
            vision: VisionModel::open(&path, &OpenOptions::default()).expect("a vision model"),
        }
    }

    fn run(&self, bytes: &[u8], counts: &mut Counts) {
        counts.files += 1;
        let uri = format!("data:image/png;base64,{}", STANDARD.encode(bytes));
        let image = match ImageSource::parse(&uri, &self.settings) {
            Ok(ImageSource::Inline(image)) => image,
            Ok(ImageSource::Remote(_)) => panic!("a data URI is no URL"),
            // What has no header for us has none for anybody.
            Err(_) => return,
        };
        assert_eq!(image.bytes, bytes);
        assert!(image.size.pixels() <= MAX_PIXELS);
        assert!(EncodedImage::inspect(image.bytes, &self.settings).is_ok());
        counts.with_header += 1;
        let header = upright_size(bytes, &self.limits);
        let pixels = match decode(bytes, &self.limits) {
            Ok(pixels) => pixels,
            Err(error) => {
                assert!(!error.to_string().is_empty() && error.to_string().len() < 1000, "{error}");
                return;
            }
        };
        counts.decoded += 1;
        let size = (pixels.height(), pixels.width());
        assert_eq!(header, Ok(size), "what was planned is what is there");
        assert_eq!(pixels.pixels().len() as u64, u64::from(size.0) * u64::from(size.1) * 3);
        let layout = ImageLayout::of(self.vision.geometry(), size.0, size.1);
        assert!(layout.tokens() <= self.vision.geometry().max_tokens() && layout.tokens() > 0);
        // The tower sees the same shapes again and again: not every picture is needed.
        if counts.decoded % 8 != 1 {
            return;
        }
        let settings = VisualSettings::of(Method::Hired).with_budget(Budget::Fraction(0.3));
        let hired = method(&settings).expect("good settings");
        let encoded = self.vision.encode(&pixels, Wants { ..hired.wants() }).expect("any picture is seen");
        assert_eq!(encoded.layout, layout);
        let plan = hired.plan(4, &encoded).expect("any picture has a plan");
        assert_eq!(plan.kept.len(), hired.planned_tokens(&layout));
        let rows = plan.gather(&encoded.features, encoded.hidden_size).expect("its rows");
        assert!(rows.iter().all(|number| number.is_finite()));
    }
}

/// A small generator, so that a seed repeats a run on any machine (xorshift64*).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// Below `end`, which is not 0.
    fn below(&mut self, end: usize) -> usize {
        (self.next() % end as u64) as usize
    }
}

/// Values that lengths and sizes are often broken by.
const EDGES: [u32; 10] = [0, 1, 0x7f, 0x80, 0xff, 0x7fff, 0xffff, 0x7fff_ffff, 0x8000_0000, 0xffff_ffff];

/// One to eight changes of a file of the corpus.
fn mutated(corpus: &[Vec<u8>], random: &mut Random) -> Vec<u8> {
    let mut bytes = corpus[random.below(corpus.len())].clone();
    for _ in 0..=random.below(8) {
        let at = if bytes.is_empty() { 0 } else { random.below(bytes.len()) };
        // Most formats have what matters in front.
        let at = if random.below(2) == 0 { at.min(random.below(64)) } else { at };
        match random.below(8) {
            _ if bytes.is_empty() => bytes.extend(random.next().to_le_bytes()),
            0 => bytes[at] ^= 1 << random.below(8),
            1 => bytes[at] = random.next() as u8,
            2 => bytes.truncate(at),
            3 => {
                let end = (at + 1 + random.below(16)).min(bytes.len());
                bytes.drain(at..end);
            }
            4 => {
                let end = (at + 1 + random.below(64)).min(bytes.len());
                let copy = bytes[at..end].to_vec();
                let to = random.below(bytes.len() + 1);
                bytes.splice(to..to, copy);
            }
            5 => {
                let edge = EDGES[random.below(EDGES.len())];
                let number = if random.below(2) == 0 { edge.to_be_bytes() } else { edge.to_le_bytes() };
                let width = 1 << random.below(3);
                let end = (at + width).min(bytes.len());
                bytes[at..end].copy_from_slice(&number[4 - (end - at)..]);
            }
            6 => {
                // The head of one file and the tail of another.
                let other = &corpus[random.below(corpus.len())];
                let from = random.below(other.len() + 1);
                bytes.truncate(at);
                bytes.extend_from_slice(&other[from..]);
            }
            _ => bytes.insert(at, random.next() as u8),
        }
    }
    bytes.truncate(1 << 16);
    if random.below(2) == 0 {
        mend_png(&mut bytes);
    }
    bytes
}

/// Makes the checksums of a PNG file right again, since decoders look no further at wrong ones.
fn mend_png(bytes: &mut [u8]) {
    let mut at = 8;
    while let Some(&[a, b, c, d]) = bytes.get(at..at + 4).and_then(|length| length.first_chunk::<4>()) {
        let length = u32::from_be_bytes([a, b, c, d]) as usize;
        let Some(end) = at.checked_add(8).and_then(|start| start.checked_add(length)) else { return };
        let Some(content) = bytes.get(at + 4..end) else { return };
        let sum = crc32(content).to_be_bytes();
        let Some(place) = bytes.get_mut(end..end + 4) else { return };
        place.copy_from_slice(&sum);
        at = end + 4;
    }
}

/// The checksum of PNG chunks (ISO 3309).
fn crc32(bytes: &[u8]) -> u32 {
    let step = |sum: u32, byte: &u8| {
        (0..8).fold(sum ^ u32::from(*byte), |sum, _| sum >> 1 ^ if sum & 1 == 1 { 0xedb8_8320 } else { 0 })
    };
    !bytes.iter().fold(u32::MAX, step)
}

fn corpus() -> Vec<(PathBuf, Vec<u8>)> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fuzz/images");
    let entries = std::fs::read_dir(folder).expect("the corpus");
    let mut files: Vec<_> = entries.map(|entry| entry.expect("a file").path()).collect();
    files.sort();
    files.into_iter().map(|path| (path.clone(), std::fs::read(path).expect("a file"))).collect()
}

/// The most that this process had in memory so far; `None` where the system does not say.
fn peak_kib() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    status.lines().find_map(|line| line.strip_prefix("VmHWM:")?.split_whitespace().next()?.parse().ok())
}

fn setting<T: std::str::FromStr>(name: &str, default: T) -> T {
    std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

/// Runs one input; one that fails is kept.
fn check(target: &Target, name: &str, bytes: &[u8], counts: &mut Counts) {
    let start = Instant::now();
    let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| target.run(bytes, counts)));
    let took = start.elapsed();
    if result.is_ok() && took <= MAX_TIME {
        return;
    }
    let folder = std::env::var_os("LOCKET_FUZZ_FAILURES").map_or_else(std::env::temp_dir, PathBuf::from);
    let path = folder.join(format!("locket-image-{:08x}.bin", crc32(bytes)));
    std::fs::write(&path, bytes).expect("a writable folder");
    panic!("{name} failed after {took:?}; its bytes are in {}", path.display());
}

#[test]
fn the_corpus_and_what_is_made_of_it() {
    let (target, files, mut counts) = (Target::new(), corpus(), Counts::default());
    assert!(files.len() >= 40, "the corpus is complete");
    for (path, bytes) in &files {
        check(&target, &path.display().to_string(), bytes, &mut counts);
    }
    // Files that are good, whatever their kind, are seen; those that are hostile only in their EXIF too.
    assert!(counts.decoded >= 25, "{counts:?}");
    let corpus: Vec<Vec<u8>> = files.into_iter().map(|(_, bytes)| bytes).collect();
    let (seconds, seed) = (setting("LOCKET_FUZZ_SECONDS", 2u64), setting("LOCKET_FUZZ_SEED", 0x1ce_b00c_u64));
    let (mut random, end) = (Random(seed | 1), Instant::now() + Duration::from_secs(seconds));
    let mut told = Instant::now();
    while Instant::now() < end {
        let bytes = mutated(&corpus, &mut random);
        check(&target, "an input made of the corpus", &bytes, &mut counts);
        if told.elapsed() > Duration::from_secs(60) {
            told = Instant::now();
            eprintln!("{counts:?}, at most {:?} KiB in memory", peak_kib());
        }
    }
    eprintln!("seed {seed}: {counts:?}, at most {:?} KiB in memory", peak_kib());
    assert!(counts.decoded > 25 && counts.with_header > counts.decoded, "{counts:?}");
    assert!(peak_kib().is_none_or(|peak| peak < MAX_RESIDENT_KIB), "{:?} KiB in memory", peak_kib());
}

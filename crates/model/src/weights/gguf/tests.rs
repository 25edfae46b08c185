//! Hostile headers: every field that can lie does, and random damage never panics.

use candle_core::quantized::GgmlDType;
use proptest::prelude::*;

use super::{
    cursor::MAX_ENTRIES,
    metadata::{MAX_ARRAY_DEPTH, MAX_KEY_BYTES},
    *,
};
use crate::testing::gguf::{GgufFile, Item};

#[track_caller]
fn refused(file: &GgufFile, part: &str) {
    let reason = parse(&file.bytes()).expect_err("it must be refused");
    assert!(reason.contains(part), "{reason:?} should mention {part:?}");
}

fn tiny() -> GgufFile {
    GgufFile::tiny(GgmlDType::Q8_0)
}

/// A value's payload: little-endian numbers in a row.
fn raw(code: u32, parts: &[&[u8]]) -> Item {
    Item::Raw(code, parts.concat())
}

#[test]
fn values_of_every_type_are_read() {
    let pairs: [(u32, &[u8], Value<'_>); 11] = [
        (0, &[200], Value::Unsigned(200)),
        (1, &[200], Value::Signed(-56)),
        (2, &[1, 2], Value::Unsigned(0x201)),
        (3, &[0xfe, 0xff], Value::Signed(-2)),
        (4, &[1, 0, 0, 0x80], Value::Unsigned(0x8000_0001)),
        (5, &[0xff; 4], Value::Signed(-1)),
        (6, &1.5f32.to_le_bytes(), Value::Float(1.5)),
        (7, &[1], Value::Bool(true)),
        (10, &[0xff; 8], Value::Unsigned(u64::MAX)),
        (11, &[0xff; 8], Value::Signed(-1)),
        (12, &2.5f64.to_le_bytes(), Value::Float(2.5)),
    ];
    for (code, bytes, expected) in pairs {
        let file = GgufFile::empty().set("k", raw(code, &[bytes])).bytes();
        assert_eq!(parse(&file).unwrap().metadata.get("k"), Some(&expected));
    }
}

#[test]
fn counts_and_lengths_beyond_the_file_are_refused() {
    for count in [MAX_ENTRIES + 1, u64::MAX] {
        refused(&GgufFile { num_tensors: Some(count), ..tiny() }, "believed");
        refused(&GgufFile { num_keys: Some(count), ..tiny() }, "believed");
    }
    refused(&GgufFile { num_tensors: Some(MAX_ENTRIES), ..tiny() }, "tensor 21");
    refused(&GgufFile { num_keys: Some(MAX_ENTRIES), ..tiny() }, "metadata key");
    let u64_max = u64::MAX.to_le_bytes();
    refused(&tiny().set("x", raw(8, &[&u64_max])), "passes the end");
    refused(&tiny().set("x", raw(8, &[&(1u64 << 40).to_le_bytes()])), "passes the end");
    for element in 0..=12u32 {
        refused(&tiny().set("x", raw(9, &[&element.to_le_bytes(), &u64_max])), "more than the");
    }
}

#[test]
fn nested_arrays_are_walked_to_a_bounded_depth() {
    let array = |depth: usize| {
        let mut bytes = Vec::new();
        for _ in 1..depth {
            bytes.extend(9u32.to_le_bytes());
            bytes.extend(1u64.to_le_bytes());
        }
        bytes.extend(0u32.to_le_bytes());
        bytes.extend(2u64.to_le_bytes());
        bytes.extend([1, 2]);
        tiny().set("x", Item::Raw(9, bytes))
    };
    parse(&array(MAX_ARRAY_DEPTH).bytes()).unwrap();
    refused(&array(MAX_ARRAY_DEPTH + 1), "nested");
    refused(&array(1000), "nested");
}

#[test]
fn wrong_magic_version_and_types_are_refused() {
    refused(&GgufFile { version: 0, ..tiny() }, "version 0");
    refused(&GgufFile { version: 4, ..tiny() }, "version 4");
    refused(&GgufFile { version: 3u32.swap_bytes(), ..tiny() }, "big-endian");
    assert!(parse(b"GGML").is_err() && parse(b"").is_err() && parse(b"GGUF").is_err());
    refused(&tiny().set("x", raw(13, &[])), "value type 13");
    refused(&tiny().set("x", raw(7, &[&[2]])), "truth value");
    let mut file = tiny();
    for kind in [9, 15, 16] {
        file.tensor("output.weight").kind = kind;
        refused(&file, &format!("type {kind}"));
    }
    file.tensor("output.weight").kind = u32::MAX;
    refused(&file, "cannot be read here");
}

#[test]
fn alignments_that_would_panic_or_misplace_are_refused() {
    for alignment in [0u32, 1, 4, 24, 33, 1 << 21, u32::MAX] {
        refused(&tiny().set("general.alignment", alignment), "power of two");
    }
    refused(&tiny().set("general.alignment", "32"), "not an unsigned number");
    for alignment in [8usize, 64, 4096] {
        let file = GgufFile { alignment, ..tiny() }.set("general.alignment", alignment as u32);
        parse(&file.bytes()).unwrap();
    }
}

#[test]
fn dimensions_are_checked_for_number_product_and_blocks() {
    let with_dims = |dims: &[u64]| {
        let mut file = tiny();
        file.tensor("output.weight").dims = dims.to_vec();
        file
    };
    refused(&with_dims(&[]), "0 dimensions");
    refused(&with_dims(&[1; 5]), "5 dimensions");
    refused(&with_dims(&[64, 0]), "empty dimension");
    refused(&with_dims(&[1 << 32, 1 << 32]), "overflow");
    refused(&with_dims(&[u64::MAX, 2]), "overflow");
    refused(&with_dims(&[1 << 31, 1 << 31]), "truncated download");
    refused(&with_dims(&[63, 40]), "whole Q8_0 blocks of 32");
    let mut file = tiny();
    // 2^61 numbers of 32-number blocks are fine as a count, of f32 too long in bytes.
    let entry = file.tensor("output.weight");
    (entry.kind, entry.dims) = (0, vec![1 << 62, 1]);
    refused(&file, "overflows");
}

#[test]
fn tensors_outside_of_the_file_or_over_each_other_are_refused() {
    let with_offset = |offset| {
        let mut file = tiny();
        file.tensor("output.weight").offset = Some(offset);
        file
    };
    refused(&with_offset(1), "not a multiple");
    refused(&with_offset(u64::MAX - 31), "truncated download");
    refused(&with_offset(1 << 40), "truncated download");
    refused(&with_offset(0), "overlap");
    let mut bytes = tiny().bytes();
    bytes.truncate(bytes.len() - 32);
    assert!(parse(&bytes).unwrap_err().contains("truncated download"));
}

#[test]
fn names_are_unique_bounded_and_utf8() {
    let mut file = tiny();
    let copy = file.tensor("output.weight").clone();
    file.tensors.push(copy);
    refused(&file, "listed twice");
    let mut file = tiny();
    file.metadata.push(("general.architecture".into(), "llama".into()));
    refused(&file, "given twice");
    let mut file = tiny();
    file.tensor("output.weight").name = "x".repeat(MAX_TENSOR_NAME_BYTES + 1);
    refused(&file, "257 bytes");
    file.tensors.last_mut().unwrap().name = String::new();
    assert!(parse(&file.bytes()).is_err());
    refused(&tiny().set(&"k".repeat(MAX_KEY_BYTES + 1), 1), "65536 bytes");
    refused(&tiny().set("x", raw(8, &[&2u64.to_le_bytes(), &[0xc3, 0x28]])), "UTF-8");
    let mut bytes = tiny().bytes();
    let at = bytes.windows(7).position(|window| window == b"general").unwrap();
    bytes[at] = 0xff;
    assert!(parse(&bytes).unwrap_err().contains("UTF-8"));
}

#[test]
fn every_block_format_has_its_size_from_the_table() {
    for (code, numbers, bytes) in [
        (0, 1, 4),
        (1, 1, 2),
        (2, 32, 18),
        (3, 32, 20),
        (6, 32, 22),
        (7, 32, 24),
        (8, 32, 34),
        (10, 256, 84),
        (11, 256, 110),
        (12, 256, 144),
        (13, 256, 176),
        (14, 256, 210),
        (30, 1, 2),
    ] {
        assert_eq!(stored_type(code).unwrap().block(), Some((numbers, bytes)), "type {code}");
    }
}

/// Everything that a parsed header promises: what later code slices and allocates by.
fn assert_sound(bytes: &[u8]) {
    let Ok(header) = parse(bytes) else { return };
    assert!(header.header_bytes <= bytes.len());
    for info in header.tensors.values() {
        assert!(info.start.checked_add(info.len).is_some_and(|end| end <= bytes.len()));
        assert!(info.start % 8 == 0 && info.len > 0);
        let (numbers, size) = info.stored.block().unwrap();
        assert_eq!(info.len, info.shape.iter().product::<usize>() / numbers * size);
    }
    for (key, value) in &header.metadata.entries {
        let Value::Array(array) = value else { continue };
        // No element is smaller than a byte, so nothing decoded is longer than the file.
        assert!(array.len() <= bytes.len());
        let _ = (array.strings(key), array.whole_numbers(key), array.floats(key));
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4000))]

    #[test]
    fn damaged_headers_never_panic(
        flips in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..8),
        cut in prop::option::of(any::<prop::sample::Index>()),
        version in 1u32..=3,
    ) {
        let mut bytes = GgufFile { version, ..TINY.clone() }.bytes();
        for (at, value) in flips {
            // Most damage goes to the header, where the structure is.
            let at = at.index(bytes.len().min(4096));
            bytes[at] = value;
        }
        if let Some(cut) = cut {
            bytes.truncate(cut.index(bytes.len()));
        }
        assert_sound(&bytes);
    }

    #[test]
    fn lengths_replaced_by_extreme_numbers_never_panic(
        at in any::<prop::sample::Index>(),
        value in prop_oneof![Just(0u64), Just(u64::MAX), Just(1 << 63), Just(1 << 32), any::<u64>(), 0u64..100],
        wide in any::<bool>(),
    ) {
        let mut bytes = TINY.bytes();
        let at = at.index(3000);
        let len = if wide { 8 } else { 4 };
        bytes[at..at + len].copy_from_slice(&value.to_le_bytes()[..len]);
        assert_sound(&bytes);
    }

    #[test]
    fn arbitrary_bytes_never_panic(mut bytes in prop::collection::vec(any::<u8>(), 24..400), keys in 0u8..3) {
        bytes[..4].copy_from_slice(b"GGUF");
        bytes[4..24].copy_from_slice(&[3, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, keys, 0, 0, 0, 0, 0, 0, 0]);
        assert_sound(&bytes);
    }
}

/// Quantised once, for the properties.
static TINY: std::sync::LazyLock<GgufFile> = std::sync::LazyLock::new(tiny);

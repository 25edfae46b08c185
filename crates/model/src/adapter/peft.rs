//! PEFT's files: `adapter_config.json` and `adapter_model.safetensors`.
//!
//! What PEFT would compute with such files is computed, or they are refused, naming what is not supported.
//! A pair's scale is `alpha / r`, or `alpha / sqrt(r)` with `use_rslora`; `alpha_pattern` and `rank_pattern`
//! name modules that have others.

use std::{collections::BTreeMap, io::Read as _, path::Path};

use safetensors::{Dtype, SafeTensors, tensor::TensorView};
use serde_json::{Map, Value};

use super::{Adapter, Linear, LoraPair, LoraType};
use crate::{Error, ModelConfig, config::RopeStyle, load::read_json};

const CONFIG: &str = "adapter_config.json";
const WEIGHTS: &str = "adapter_model.safetensors";
/// Files above this are not believed: rank 512 on all linears of a model of 7B has 5 GiB in f32.
const MAX_BYTES: u64 = 8 << 30;
/// More than any linear's smaller side needs.
const MAX_RANK: usize = 4096;

/// Keys that, if set to anything, change what is computed.
const UNSUPPORTED: [&str; 11] = [
    "use_dora",
    "lora_bias",
    "use_qalora",
    "fan_in_fan_out",
    "modules_to_save",
    "layer_replication",
    "trainable_token_indices",
    "target_parameters",
    "alora_invocation_tokens",
    "arrow_config",
    "use_bdlora",
];
/// Ways to start that change the base weights, so that the pair fits to others than ours.
const CHANGED_BASE: [&str; 4] = ["pissa", "olora", "corda", "loftq"];

impl Adapter {
    /// Reads an adapter's folder for a model of `config`.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::BrokenFile`], [`Error::Config`] naming a key that is not supported, and
    /// [`Error::Tensor`] naming a tensor that has no place or another shape.
    pub fn open(folder: &Path, config: &ModelConfig) -> Result<Self, Error> {
        let settings = read_json(&folder.join(CONFIG), CONFIG)?;
        let path = folder.join(WEIGHTS);
        let failed = |source| Error::Io { path: path.clone(), source };
        let mut bytes = Vec::new();
        let file = std::fs::File::open(&path).map_err(failed)?;
        file.take(MAX_BYTES + 1).read_to_end(&mut bytes).map_err(failed)?;
        if bytes.len() as u64 > MAX_BYTES {
            let reason = format!("it is larger than {MAX_BYTES} bytes");
            return Err(Error::BrokenFile { path, format: WEIGHTS, reason });
        }
        Self::from_bytes(&settings, &bytes, config).map_err(|error| match error {
            Error::BrokenFile { format, reason, .. } => Error::BrokenFile { path, format, reason },
            error => error,
        })
    }

    /// As [`Self::open`], with the files' contents.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn from_bytes(settings: &Value, weights: &[u8], config: &ModelConfig) -> Result<Self, Error> {
        let scales = Scales::read(settings)?;
        let tensors = SafeTensors::deserialize(weights).map_err(|error| Error::BrokenFile {
            path: WEIGHTS.into(),
            format: "safetensors",
            reason: error.to_string(),
        })?;
        let mut halves: BTreeMap<(usize, Linear), [Option<Half>; 2]> = BTreeMap::new();
        for (name, view) in tensors.iter() {
            let (layer, linear, side) = place(name)?;
            if layer >= config.num_layers {
                return Err(wrong(name, format!("the model has {} layers", config.num_layers)));
            }
            let half = Half::read(name, &view)?;
            if halves.entry((layer, linear)).or_default()[side].replace(half).is_some() {
                return Err(wrong(name, "another name of the same matrix is there too".into()));
            }
        }
        if halves.is_empty() {
            return Err(wrong(WEIGHTS, "it has no tensors".into()));
        }
        let pairs = halves.into_iter().map(|((layer, linear), halves)| {
            let module = format!("model.layers.{layer}.{}", linear.module());
            let [Some(a), Some(b)] = halves else {
                return Err(wrong(&module, "one of lora_A and lora_B is missing".into()));
            };
            Ok((layer, linear, pair(&module, linear, a, b, &scales, config)?))
        });
        Self::new(config, pairs.collect::<Result<Vec<_>, _>>()?)
    }
}

/// `A` or `B` as stored.
struct Half {
    rows: usize,
    columns: usize,
    numbers: Vec<f32>,
    stored: LoraType,
}

impl Half {
    fn read(name: &str, view: &TensorView<'_>) -> Result<Self, Error> {
        let &[rows, columns] = view.shape() else {
            return Err(wrong(name, format!("it has shape {:?}, not two dimensions", view.shape())));
        };
        let bytes = view.data();
        let halves = |of: fn([u8; 2]) -> f32| bytes.as_chunks().0.iter().map(|&half| of(half)).collect();
        let (numbers, stored) = match view.dtype() {
            Dtype::F32 => (
                bytes.as_chunks().0.iter().map(|&single| f32::from_le_bytes(single)).collect(),
                LoraType::F32,
            ),
            Dtype::F16 => (halves(|half| half::f16::from_le_bytes(half).to_f32()), LoraType::F16),
            Dtype::BF16 => (halves(|half| half::bf16::from_le_bytes(half).to_f32()), LoraType::Bf16),
            other => return Err(wrong(name, format!("it is {other:?}; f32, f16 and bf16 are supported"))),
        };
        Ok(Self { rows, columns, numbers, stored })
    }
}

fn pair(
    module: &str,
    linear: Linear,
    a: Half,
    mut b: Half,
    scales: &Scales,
    config: &ModelConfig,
) -> Result<LoraPair, Error> {
    let (outputs, inputs) = linear.shape(config);
    let (rank, planned) = (a.rows, scales.rank(module));
    if rank != planned || rank == 0 || rank > MAX_RANK {
        return Err(wrong(
            module,
            format!("A has {rank} rows; {CONFIG} says {planned}, and {MAX_RANK} is the most"),
        ));
    }
    if (a.columns, b.rows, b.columns) != (inputs, outputs, rank) {
        return Err(wrong(
            module,
            format!(
                "A is [{rank}, {}] and B [{}, {}]; the model's linear takes [{rank}, {inputs}] and [{outputs}, \
                 {rank}]",
                a.columns, b.rows, b.columns
            ),
        ));
    }
    // The converter of GGUF files reorders rows of these weights; see `RopeStyle`.
    if config.rope.style == RopeStyle::Interleaved && matches!(linear, Linear::Q | Linear::K) {
        b.numbers = interleave(&b.numbers, config.head_dim, rank);
    }
    let stored = if a.stored == b.stored { a.stored } else { LoraType::F32 };
    Ok(LoraPair { a: a.numbers, b: b.numbers, rank, scale: scales.scale(module, rank), stored })
}

/// Rows `[heads, 2, head_dim / 2]` of `width` numbers in the order `[heads, head_dim / 2, 2]`.
fn interleave(rows: &[f32], head_dim: usize, width: usize) -> Vec<f32> {
    let half = head_dim / 2;
    let mut out = Vec::with_capacity(rows.len());
    for head in rows.chunks_exact(head_dim * width) {
        for i in 0..half {
            for row in [i, i + half] {
                out.extend_from_slice(&head[row * width..(row + 1) * width]);
            }
        }
    }
    out
}

/// Layer, linear and side (0: `A`, 1: `B`) of a tensor.
fn place(name: &str) -> Result<(usize, Linear, usize), Error> {
    const PREFIXES: [&str; 3] = ["model.language_model.", "language_model.model.", "model."];
    let unknown = || {
        let known: Vec<&str> = Linear::ALL.iter().map(|linear| linear.module()).collect();
        wrong(name, format!("only lora_A and lora_B of decoder layers' {} are supported", known.join(", ")))
    };
    let module = name.strip_prefix("base_model.model.").unwrap_or(name);
    let module = PREFIXES.iter().find_map(|prefix| module.strip_prefix(prefix)).ok_or_else(unknown)?;
    let (layer, module) =
        module.strip_prefix("layers.").and_then(|rest| rest.split_once('.')).ok_or_else(unknown)?;
    let layer = layer.parse().map_err(|_| unknown())?;
    let (module, side) = [".lora_A.weight", ".lora_B.weight"]
        .iter()
        .zip(0..)
        .find_map(|(end, side)| Some((module.strip_suffix(end)?, side)))
        .ok_or_else(unknown)?;
    let linear = Linear::ALL.into_iter().find(|linear| linear.module() == module).ok_or_else(unknown)?;
    Ok((layer, linear, side))
}

fn wrong(name: &str, reason: String) -> Error {
    Error::Tensor { name: name.to_owned(), reason }
}

/// Ranks and factors by module.
struct Scales {
    rank: usize,
    alpha: f64,
    ranks: BTreeMap<String, f64>,
    alphas: BTreeMap<String, f64>,
    by_root: bool,
}

impl Scales {
    fn read(settings: &Value) -> Result<Self, Error> {
        let refuse =
            |key: &str, reason: String| Err(Error::Config { field: format!("{CONFIG}: {key}"), reason });
        let Some(fields) = settings.as_object() else {
            return refuse("(all)", "is not an object".into());
        };
        let peft_type = fields.get("peft_type").and_then(Value::as_str).unwrap_or_default();
        if !peft_type.eq_ignore_ascii_case("LORA") {
            return refuse("peft_type", format!("is {peft_type:?}; only LORA is supported"));
        }
        for key in UNSUPPORTED {
            if fields.get(key).is_some_and(is_set) {
                return refuse(key, "is set, which is not supported".into());
            }
        }
        match fields.get("bias") {
            None | Some(Value::Null) => {}
            Some(Value::String(bias)) if bias == "none" => {}
            Some(other) => return refuse("bias", format!("is {other}; only \"none\" is supported")),
        }
        if let Some(start) = fields.get("init_lora_weights").and_then(Value::as_str)
            && CHANGED_BASE.iter().any(|changed| start.to_ascii_lowercase().starts_with(changed))
        {
            return refuse(
                "init_lora_weights",
                format!(
                    "is {start:?}, which fits to changed base weights; save the adapter converted to plain LoRA"
                ),
            );
        }
        let rank = fields.get("r").and_then(Value::as_u64).unwrap_or(0) as usize;
        if rank == 0 || rank > MAX_RANK {
            return refuse("r", format!("must be 1 to {MAX_RANK}"));
        }
        let alpha = fields.get("lora_alpha").and_then(Value::as_f64).unwrap_or(f64::NAN);
        if !alpha.is_finite() {
            return refuse("lora_alpha", "must be a number".into());
        }
        Ok(Self {
            rank,
            alpha,
            ranks: pattern(fields, "rank_pattern")?,
            alphas: pattern(fields, "alpha_pattern")?,
            by_root: fields.get("use_rslora").is_some_and(is_set),
        })
    }

    fn rank(&self, module: &str) -> usize {
        lookup(&self.ranks, module).map_or(self.rank, |rank| rank as usize)
    }

    fn scale(&self, module: &str, rank: usize) -> f32 {
        let alpha = lookup(&self.alphas, module).unwrap_or(self.alpha);
        let divisor = if self.by_root { (rank as f64).sqrt() } else { rank as f64 };
        (alpha / divisor) as f32
    }
}

/// Whether a key says anything but no.
fn is_set(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => false,
        Value::Array(list) => !list.is_empty(),
        Value::Object(fields) => !fields.is_empty(),
        _ => true,
    }
}

/// A table of modules and numbers. PEFT takes its keys for regular expressions; plain names are supported.
fn pattern(fields: &Map<String, Value>, key: &str) -> Result<BTreeMap<String, f64>, Error> {
    let refuse = |reason: String| Err(Error::Config { field: format!("{CONFIG}: {key}"), reason });
    let table = match fields.get(key) {
        None | Some(Value::Null) => return Ok(BTreeMap::new()),
        Some(Value::Object(table)) => table,
        Some(_) => return refuse("is not an object".into()),
    };
    let mut numbers = BTreeMap::new();
    for (name, number) in table {
        if name.chars().any(|c| !c.is_ascii_alphanumeric() && !matches!(c, '.' | '_' | '-')) {
            return refuse(format!("has the pattern {name:?}; only plain names of modules are supported"));
        }
        let Some(number) = number.as_f64().filter(|number| number.is_finite() && *number >= 0.0) else {
            return refuse(format!("{name} is not a number from 0 up"));
        };
        numbers.insert(name.clone(), number);
    }
    Ok(numbers)
}

/// The entry that names the module or ends its name.
fn lookup(table: &BTreeMap<String, f64>, module: &str) -> Option<f64> {
    let is_named = |name: &str| {
        module.strip_suffix(name).is_some_and(|before| before.is_empty() || before.ends_with('.'))
    };
    table.iter().find(|(name, _)| is_named(name)).map(|(_, &number)| number)
}

#[cfg(test)]
mod tests;

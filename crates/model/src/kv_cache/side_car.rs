//! Side-car weights: what the trained methods need beside a model, in one small safetensors file.
//!
//! Kind `learned` (f16 or f32; `L` layers, `C = 2 * kv_heads * head_dim` features, `ks` taps, `hid`
//! hidden units): `scale [L, C]`, `dw [L, C, ks]`, `p1 [L, hid, 2C]`, `b1 [L, hid]`,
//! `p2 [L, kv_heads * 2, hid]`, `b2 [L, kv_heads * 2]`, `a [L, kv_heads, 2]`. Kind `lococo`:
//! `w [L, M/2, 2 * head_dim, ks]`, `b [L, M/2]`, `g [L]`. Kind `learned` may have `budget [L]` too: each
//! layer's share of the slots, for [`CacheSettings::layer_budgets`]. Metadata are strings; `kind` is required, the
//! geometry and the model's hash are checked if they are there.

use std::{collections::HashMap, path::Path};

use safetensors::{Dtype, SafeTensors};

use super::{CacheGeometry, CacheMethod, CacheSettings};
use crate::Error;

/// Largest file that is read.
const MAX_BYTES: u64 = 1 << 30;

/// Trained weights and what their makers say of them.
#[derive(Debug, Clone, Default)]
pub struct SideCar {
    /// Weights of [`CacheMethod::Learned`].
    pub learned: Option<LearnedWeights>,
    /// Weights of [`CacheMethod::Lococo`].
    pub lococo: Option<LococoWeights>,
    /// Share of the slots that each layer should get, mean 1, if the file recommends it.
    pub layer_shares: Option<Vec<f32>>,
    /// The files' metadata.
    pub metadata: HashMap<String, String>,
    /// Recent tokens to keep, in thousandths of the slots, if the file recommends it.
    pub recent_permille: Option<u32>,
    /// Share of the other slots for recall, in thousandths, if the file recommends it.
    pub recall_permille: Option<u16>,
}

/// The scorer of [`CacheMethod::Learned`].
#[derive(Debug, Clone, PartialEq)]
pub struct LearnedWeights {
    /// Features of a token: keys and values of all heads, `2 * kv_heads * head_dim`.
    pub features: usize,
    /// Taps of the causal convolution, the token's own included.
    pub taps: usize,
    /// Hidden units.
    pub hidden: usize,
    /// One set of weights per layer.
    pub layers: Vec<LearnedLayer>,
}

impl LearnedWeights {
    /// Numbers of the features that the convolution looks back on.
    pub fn tail_len(&self) -> usize {
        (self.taps - 1) * self.features
    }

    /// Bytes held in f32.
    pub fn num_bytes(&self) -> usize {
        let numbers = |layer: &LearnedLayer| {
            let LearnedLayer { scale, dw, p1, b1, p2, b2, a } = layer;
            [scale, dw, p1, b1, p2, b2, a].into_iter().map(Vec::len).sum::<usize>()
        };
        self.layers.iter().map(numbers).sum::<usize>() * size_of::<f32>()
    }

    /// Bytes of buffers in which `rows` tokens are scored: features with those before
    /// them, the network's input, hidden units and scores.
    fn workspace_bytes(&self, rows: usize) -> usize {
        let outputs = self.layers.first().map_or(0, |layer| layer.b2.len());
        let context = (rows + self.taps - 1) * self.features;
        (context + rows * (2 * self.features + self.hidden + outputs)) * size_of::<f32>()
    }
}

/// One layer's scorer.
#[derive(Debug, Clone, PartialEq)]
pub struct LearnedLayer {
    /// Factor on the features `[features]`.
    pub scale: Vec<f32>,
    /// Depthwise convolution `[features, taps]`; the last tap is the token itself.
    pub dw: Vec<f32>,
    /// `[hidden, 2 * features]`: scaled features, then convolved ones.
    pub p1: Vec<f32>,
    /// `[hidden]`.
    pub b1: Vec<f32>,
    /// `[kv_heads * 2, hidden]`: of each head the text score, then the recall score.
    pub p2: Vec<f32>,
    /// `[kv_heads * 2]`.
    pub b2: Vec<f32>,
    /// Coefficient of the log of the observed attention `[kv_heads, 2]`, the file's `beta` included.
    pub a: Vec<f32>,
}

/// The mixing convolutions of [`CacheMethod::Lococo`].
#[derive(Debug, Clone, PartialEq)]
pub struct LococoWeights {
    /// Slots that the weights were trained for, `M`: half of them are mixed.
    pub slots: u32,
    /// Taps of the centred convolution, odd.
    pub kernel: usize,
    /// One set of weights per layer.
    pub layers: Vec<LococoLayer>,
}

impl LococoWeights {
    /// Bytes held in f32.
    pub fn num_bytes(&self) -> usize {
        let numbers = |layer: &LococoLayer| layer.weight.len() + layer.bias.len() + 1;
        self.layers.iter().map(numbers).sum::<usize>() * size_of::<f32>()
    }
}

/// One layer's convolution.
#[derive(Debug, Clone, PartialEq)]
pub struct LococoLayer {
    /// `[mixed slots, 2 * head_dim, kernel]`; channels are a key's dimensions, then a value's.
    pub weight: Vec<f32>,
    /// `[mixed slots]`.
    pub bias: Vec<f32>,
    /// Share of the mixture against the one-hot row.
    pub gate: f32,
}

impl SideCar {
    /// Reads a file and checks it against the model's geometry.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::BrokenFile`], or [`Error::Tensor`] if the weights are another model's.
    pub fn open(path: &Path, geometry: CacheGeometry) -> Result<Self, Error> {
        let io = |source| Error::Io { path: path.into(), source };
        let size = std::fs::metadata(path).map_err(io)?.len();
        if size > MAX_BYTES {
            return Err(File { path }.broken(format!("{size} bytes; a side-car has at most {MAX_BYTES}")));
        }
        Self::read(path, &std::fs::read(path).map_err(io)?, geometry)
    }

    /// As [`Self::open`], from memory; `name` is for messages.
    ///
    /// # Errors
    /// As [`Self::open`], but for [`Error::Io`].
    pub fn read(name: &Path, bytes: &[u8], geometry: CacheGeometry) -> Result<Self, Error> {
        let file = File { path: name };
        let (_, header) =
            SafeTensors::read_metadata(bytes).map_err(|error| file.broken(error.to_string()))?;
        let metadata = header.metadata().clone().unwrap_or_default();
        let tensors = SafeTensors::deserialize(bytes).map_err(|error| file.broken(error.to_string()))?;
        let number = |key: &str| metadata.get(key).and_then(|value| value.parse::<f32>().ok());
        for (key, value) in [
            ("layers", geometry.num_layers),
            ("kv_heads", geometry.num_kv_heads),
            ("head_dim", geometry.head_dim),
        ] {
            if let Some(theirs) = metadata.get(key)
                && theirs.parse() != Ok(value)
            {
                return Err(file.broken(format!("weights for {theirs} {key}, but the model has {value}")));
            }
        }
        let share = |key: &str| number(key).map(|value| value.clamp(0.0, 1000.0));
        let mut side_car = Self {
            recent_permille: share("recent_permille").map(|value| value as u32),
            recall_permille: share("recall_permille").map(|value| value as u16),
            ..Self::default()
        };
        let reader = Reader { file, tensors, geometry };
        match metadata.get("kind").map(String::as_str) {
            Some("learned") => {
                side_car.learned = Some(reader.learned(number("beta").unwrap_or(1.0))?);
                side_car.layer_shares = reader.layer_shares()?;
            }
            Some("lococo") => side_car.lococo = Some(reader.lococo()?),
            Some(other) => return Err(file.broken(format!("kind {other:?}; known are learned, lococo"))),
            None => return Err(file.broken("no `kind` in its metadata".into())),
        }
        side_car.metadata = metadata;
        Ok(side_car)
    }

    /// These weights and those of `other` that are not here.
    #[must_use]
    pub fn join(mut self, other: Self) -> Self {
        self.learned = self.learned.or(other.learned);
        self.lococo = self.lococo.or(other.lococo);
        self.layer_shares = self.layer_shares.or(other.layer_shares);
        self.recent_permille = self.recent_permille.or(other.recent_permille);
        self.recall_permille = self.recall_permille.or(other.recall_permille);
        for (key, value) in other.metadata {
            self.metadata.entry(key).or_insert(value);
        }
        self
    }

    /// Most bytes that a model with these weights holds beside what it holds without them, blocks
    /// apart: the weights as read, the backend's copy in its own form, and the workspace of batches of
    /// `max_batch_rows` rows. For the memory plan.
    pub fn planned_bytes(&self, max_batch_rows: usize) -> u64 {
        let learned = self
            .learned
            .as_ref()
            .map_or(0, |weights| 2 * weights.num_bytes() + weights.workspace_bytes(max_batch_rows));
        let lococo = self.lococo.as_ref().map_or(0, LococoWeights::num_bytes);
        learned as u64 + lococo as u64
    }

    /// Whether the weights that `method` needs are here.
    pub fn serves(&self, method: CacheMethod) -> bool {
        match method {
            CacheMethod::Learned => self.learned.is_some(),
            CacheMethod::Lococo => self.lococo.is_some(),
            _ => true,
        }
    }
}

/// Checks that the weights a method needs are there and were trained for its slots.
pub(super) fn check(settings: CacheSettings, side_car: Option<&SideCar>) -> Result<(), Error> {
    let method = settings.method;
    if !method.needs_side_car() {
        return Ok(());
    }
    let missing = || Error::InvalidBatch(format!("method {} has no side-car weights", method.name()));
    let side_car = side_car.filter(|side_car| side_car.serves(method)).ok_or_else(missing)?;
    if let (CacheMethod::Lococo, Some(weights)) = (method, &side_car.lococo)
        && weights.slots != settings.slots
    {
        return Err(Error::InvalidBatch(format!(
            "slots is {}, but the lococo weights were trained for {}",
            settings.slots, weights.slots
        )));
    }
    Ok(())
}

#[derive(Clone, Copy)]
struct File<'a> {
    path: &'a Path,
}

impl File<'_> {
    fn broken(&self, reason: String) -> Error {
        Error::BrokenFile { path: self.path.into(), format: "side-car", reason }
    }
}

struct Reader<'a> {
    file: File<'a>,
    tensors: SafeTensors<'a>,
    geometry: CacheGeometry,
}

impl Reader<'_> {
    /// A tensor's shape and numbers.
    fn tensor(&self, name: &str) -> Result<(Vec<usize>, Vec<f32>), Error> {
        let view = self.tensors.tensor(name).map_err(|error| self.file.broken(format!("{name}: {error}")))?;
        let data = view.data();
        let numbers: Vec<f32> = match view.dtype() {
            Dtype::F32 => data.as_chunks().0.iter().map(|&bytes| f32::from_le_bytes(bytes)).collect(),
            Dtype::F16 => {
                let halves = data.as_chunks().0.iter();
                halves.map(|&bytes| half::f16::from_le_bytes(bytes).to_f32()).collect()
            }
            other => return Err(self.file.broken(format!("{name} is {other:?}; F16 or F32 are read"))),
        };
        if numbers.iter().any(|number| !number.is_finite()) {
            return Err(self.file.broken(format!("{name} has numbers that are not finite")));
        }
        Ok((view.shape().to_vec(), numbers))
    }

    /// A tensor of one shape, cut into layers.
    fn layers(&self, name: &str, shape: &[usize]) -> Result<Vec<Vec<f32>>, Error> {
        let (theirs, numbers) = self.tensor(name)?;
        let wanted: Vec<usize> =
            std::iter::once(self.geometry.num_layers).chain(shape.iter().copied()).collect();
        if theirs != wanted {
            let reason = format!("shape {theirs:?}, but this model needs {wanted:?}");
            return Err(Error::Tensor { name: name.into(), reason });
        }
        let size = shape.iter().product::<usize>().max(1);
        Ok(numbers.chunks_exact(size).map(<[f32]>::to_vec).collect())
    }

    /// `budget`, if it is there: positive shares, made to have the mean 1.
    fn layer_shares(&self) -> Result<Option<Vec<f32>>, Error> {
        if self.tensors.tensor("budget").is_err() {
            return Ok(None);
        }
        let mut shares = self.layers("budget", &[])?.concat();
        let mean = shares.iter().sum::<f32>() / shares.len().max(1) as f32;
        if shares.iter().any(|&share| share <= 0.0) {
            return Err(self.file.broken("budget has a layer without a share".into()));
        }
        shares.iter_mut().for_each(|share| *share /= mean);
        Ok(Some(shares))
    }

    fn dimension(&self, name: &str, axis: usize) -> Result<usize, Error> {
        let (shape, _) = self.tensor(name)?;
        match shape.get(axis) {
            Some(&size) if size > 0 => Ok(size),
            _ => Err(Error::Tensor { name: name.into(), reason: format!("shape {shape:?} is not usable") }),
        }
    }

    fn learned(&self, beta: f32) -> Result<LearnedWeights, Error> {
        let heads = self.geometry.num_kv_heads;
        let features = 2 * heads * self.geometry.head_dim;
        let (taps, hidden) = (self.dimension("dw", 2)?, self.dimension("p1", 1)?);
        let mut scale = self.layers("scale", &[features])?.into_iter();
        let mut dw = self.layers("dw", &[features, taps])?.into_iter();
        let mut p1 = self.layers("p1", &[hidden, 2 * features])?.into_iter();
        let mut b1 = self.layers("b1", &[hidden])?.into_iter();
        let mut p2 = self.layers("p2", &[2 * heads, hidden])?.into_iter();
        let mut b2 = self.layers("b2", &[2 * heads])?.into_iter();
        let mut a = self.layers("a", &[heads, 2])?.into_iter();
        let mut layer = || {
            let mut a = a.next()?;
            a.iter_mut().for_each(|a| *a *= beta);
            Some(LearnedLayer {
                scale: scale.next()?,
                dw: dw.next()?,
                p1: p1.next()?,
                b1: b1.next()?,
                p2: p2.next()?,
                b2: b2.next()?,
                a,
            })
        };
        let layers = std::iter::from_fn(&mut layer).collect();
        Ok(LearnedWeights { features, taps, hidden, layers })
    }

    fn lococo(&self) -> Result<LococoWeights, Error> {
        let channels = 2 * self.geometry.head_dim;
        let (mixed, kernel) = (self.dimension("w", 1)?, self.dimension("w", 3)?);
        if kernel.is_multiple_of(2) {
            return Err(self.file.broken(format!("w has {kernel} taps, but a centred kernel is odd")));
        }
        let weights = self.layers("w", &[mixed, channels, kernel])?;
        let biases = self.layers("b", &[mixed])?;
        let gates = self.layers("g", &[])?;
        let layers = weights.into_iter().zip(biases).zip(gates);
        let layers = layers.map(|((weight, bias), gate)| LococoLayer {
            weight,
            bias,
            gate: gate.first().copied().unwrap_or(0.0),
        });
        Ok(LococoWeights { slots: 2 * mixed as u32, kernel, layers: layers.collect() })
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::{
        kv_cache::{BlockClass, CachePlan, SideArrays, SlotType},
        load::{Backend, BuildOptions, Checkpoint},
        testing::{self, TinyLlama},
    };

    #[test]
    fn what_a_model_holds_for_the_weights_was_planned() {
        let folder = tempfile::tempdir().unwrap();
        TinyLlama::default().write(folder.path()).unwrap();
        let checkpoint = Checkpoint::open(folder.path()).unwrap();
        let geometry = CacheGeometry::of(&checkpoint.config);
        let side_car = Arc::new(testing::side_car(geometry, 8, 1));
        let held = |backend, max_batch_rows, side_car| {
            let classes = vec![BlockClass { capacity: 32, blocks: 1 }];
            let cache =
                CachePlan { geometry, slot_type: SlotType::F32, side: SideArrays::default(), classes };
            let options = BuildOptions { backend, cache, max_batch_rows, threads: 1, side_car };
            let memory = checkpoint.build(&options).unwrap().memory();
            memory.weights + memory.workspace
        };
        let as_read = side_car.learned.as_ref().unwrap().num_bytes() as u64
            + side_car.lococo.as_ref().unwrap().num_bytes() as u64;
        for rows in [1, 8, 200] {
            let planned = side_car.planned_bytes(rows);
            for backend in [Backend::Cpu, Backend::Reference] {
                let more = held(backend, rows, Some(Arc::clone(&side_car))) - held(backend, rows, None);
                assert!(
                    as_read + more <= planned,
                    "{backend:?}, {rows} rows: {as_read} + {more} > {planned}"
                );
                let is_close = backend == Backend::Reference || planned < 2 * (as_read + more);
                assert!(is_close, "{rows} rows: {planned}, held {as_read} + {more}");
            }
        }
    }
}

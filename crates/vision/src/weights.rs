//! The tensors of tower, projector and newline, found by the ends of their names.
//!
//! Each checkpoint layout puts other words in front of the same names; which ones is found out, not listed.
//! A matrix may be stored at 8 bits: `NAME` as i8 `[outputs, …]` and `NAME.scale` with one f16 or f32 number per
//! output, `[outputs]`, or per output and block of inputs, `[outputs, blocks]`.

use candle_core::{Device, Tensor};
use half::{bf16, f16};
use locket_model::weights::{TensorFiles, TensorView};

use crate::{Error, VisionGeometry, config::TowerShapes, geometry::invalid};

/// Where the parts of a vision model are in the files.
#[derive(Debug)]
pub(crate) struct Parts<'a> {
    files: &'a TensorFiles,
    /// In front of `embeddings.class_embedding`.
    tower: String,
    /// Names of the projector's two matrices without `.weight`.
    projector: [String; 2],
    /// The newline's name.
    newline: Option<String>,
}

/// A product with bias.
#[derive(Debug, Clone)]
pub(crate) struct Linear {
    /// `[outputs, inputs]`
    weight: Tensor,
    /// `[outputs]`
    bias: Option<Tensor>,
}

impl Linear {
    /// `x [rows, inputs]` as `[rows, outputs]`.
    pub(crate) fn forward(&self, x: &Tensor) -> Result<Tensor, Error> {
        let y = x.matmul(&self.weight.t()?)?;
        Ok(match &self.bias {
            Some(bias) => y.broadcast_add(bias)?,
            None => y,
        })
    }

    fn bytes(&self) -> u64 {
        (4 * (self.weight.elem_count() + self.bias.as_ref().map_or(0, Tensor::elem_count))) as u64
    }
}

/// Weight and bias `[width]` of a layer norm.
#[derive(Debug, Clone)]
pub(crate) struct Norm(pub Tensor, pub Tensor);

/// One layer of the tower.
#[derive(Debug, Clone)]
pub(crate) struct Layer {
    pub norm_1: Norm,
    /// Queries, keys and values, one below the other.
    pub qkv: Linear,
    pub output: Linear,
    pub norm_2: Norm,
    pub fc_1: Linear,
    pub fc_2: Linear,
}

/// All weights on the device, in f32.
#[derive(Debug)]
pub(crate) struct Weights {
    /// `[1, 1, width]`: the class token with its position.
    pub class: Tensor,
    pub patches: Linear,
    /// `[patches, width]`
    pub positions: Tensor,
    pub pre_norm: Norm,
    /// Those that run.
    pub layers: Vec<Layer>,
    pub projector: [Linear; 2],
    /// `[hidden_size]`; empty if the model has none.
    pub newline: Vec<f32>,
}

impl Weights {
    /// Bytes on the device.
    pub(crate) fn bytes(&self) -> u64 {
        let layer = |layer: &Layer| {
            let norms = 16 * layer.norm_1.0.elem_count() as u64;
            let matrices = [&layer.qkv, &layer.output, &layer.fc_1, &layer.fc_2];
            norms + matrices.into_iter().map(Linear::bytes).sum::<u64>()
        };
        let outside = 4 * (self.positions.elem_count() + self.newline.len()) as u64 + self.patches.bytes();
        outside
            + self.layers.iter().map(layer).sum::<u64>()
            + self.projector.iter().map(Linear::bytes).sum::<u64>()
    }
}

const CLASS: &str = "embeddings.class_embedding";
const PATCH: &str = "embeddings.patch_embedding.weight";
const POSITION: &str = "embeddings.position_embedding.weight";
/// The names of the projector's matrices: Hugging Face's, the original repository's.
const PROJECTORS: [[&str; 2]; 2] = [
    ["multi_modal_projector.linear_1", "multi_modal_projector.linear_2"],
    ["mm_projector.0", "mm_projector.2"],
];

impl<'a> Parts<'a> {
    /// Looks for tower, projector and newline; says what is not there.
    pub(crate) fn find(files: &'a TensorFiles) -> Result<Self, String> {
        let ending = |end: &str| {
            files.names().find(|name| {
                name.strip_suffix(end).is_some_and(|front| front.is_empty() || front.ends_with('.'))
            })
        };
        let tower = ending(CLASS).ok_or_else(|| format!("no tensor is called {CLASS}"))?;
        let projector = PROJECTORS.into_iter().find_map(|names| {
            let first = format!("{}.weight", names[0]);
            let front = ending(&first)?.strip_suffix(&first)?;
            Some(names.map(|name| format!("{front}{name}")))
        });
        Ok(Self {
            files,
            tower: tower.trim_end_matches(CLASS).to_owned(),
            projector: projector.ok_or(
                "no tensor is called multi_modal_projector.linear_1.weight or mm_projector.0.weight",
            )?,
            newline: ending("image_newline").map(str::to_owned),
        })
    }

    /// Shapes that a configuration may leave out.
    pub(crate) fn shapes(&self) -> Result<TowerShapes, Error> {
        let first = |name: &str| {
            let shape = self.files.get(name).map(|view| view.shape);
            shape.and_then(|shape| shape.first().copied()).ok_or_else(|| missing(name))
        };
        let tower = |name: &str| format!("{}{name}", self.tower);
        let patch_name = tower(PATCH);
        let patch = self.files.get(&patch_name).and_then(|view| view.shape.last().copied());
        let num_layers = (0..256)
            .find(|layer| {
                self.files.get(&tower(&format!("encoder.layers.{layer}.layer_norm1.weight"))).is_none()
            })
            .unwrap_or(256);
        Ok(TowerShapes {
            width: first(&tower(CLASS))?,
            patch: patch.and_then(|patch| u32::try_from(patch).ok()).ok_or_else(|| missing(&patch_name))?,
            positions: first(&tower(POSITION))?,
            mlp_width: first(&tower("encoder.layers.0.mlp.fc1.weight"))?,
            num_layers,
            hidden_size: first(&format!("{}.weight", self.projector[1]))?,
        })
    }

    /// Reads everything that the geometry needs.
    ///
    /// # Errors
    /// [`locket_model::Error::Tensor`] naming what is missing or has another shape or type.
    pub(crate) fn load(&self, geometry: &VisionGeometry, device: &Device) -> Result<Weights, Error> {
        let load = Loader { parts: self, device };
        let (width, patch) = (geometry.width, geometry.patch as usize);
        let tower = |name: &str| format!("{}{name}", self.tower);
        let class = load.tensor(&tower(CLASS), &[width])?;
        let positions = load.tensor(&tower(POSITION), &[geometry.patches() + 1, width])?;
        let kernel = load.tensor(&tower(PATCH), &[width, 3, patch, patch])?;
        let class = (class + positions.get(0)?)?.reshape((1, 1, width))?;
        let inputs = width * geometry.feature_layers.len();
        let [first, second] = &self.projector;
        let newline = match &self.newline {
            Some(name) if geometry.has_newline => load.numbers(name, &[geometry.hidden_size])?,
            None if geometry.has_newline => return Err(missing("image_newline")),
            _ => Vec::new(),
        };
        Ok(Weights {
            class,
            patches: Linear { weight: kernel.reshape((width, 3 * patch * patch))?, bias: None },
            positions: positions.narrow(0, 1, geometry.patches())?.contiguous()?,
            pre_norm: load.norm(&tower("pre_layrnorm"), width)?,
            layers: (0..geometry.layers_run())
                .map(|layer| load.layer(&tower(&format!("encoder.layers.{layer}.")), geometry))
                .collect::<Result<_, _>>()?,
            projector: [
                load.linear_with_bias_if_any(first, geometry.hidden_size, inputs)?,
                load.linear_with_bias_if_any(second, geometry.hidden_size, geometry.hidden_size)?,
            ],
            newline,
        })
    }
}

struct Loader<'a> {
    parts: &'a Parts<'a>,
    device: &'a Device,
}

impl Loader<'_> {
    fn layer(&self, prefix: &str, geometry: &VisionGeometry) -> Result<Layer, Error> {
        let (width, mlp) = (geometry.width, geometry.mlp_width);
        let name = |end: &str| format!("{prefix}{end}");
        let attention = |end: &str| self.linear(&name(&format!("self_attn.{end}_proj")), width, width);
        let qkv = [attention("q")?, attention("k")?, attention("v")?];
        let biases = qkv.each_ref().map(|part| part.bias.as_ref());
        let bias = biases.into_iter().collect::<Option<Vec<_>>>();
        Ok(Layer {
            norm_1: self.norm(&name("layer_norm1"), width)?,
            qkv: Linear {
                weight: Tensor::cat(&qkv.each_ref().map(|part| &part.weight), 0)?,
                bias: bias.map(|biases| Tensor::cat(&biases, 0)).transpose()?,
            },
            output: attention("out")?,
            norm_2: self.norm(&name("layer_norm2"), width)?,
            fc_1: self.linear(&name("mlp.fc1"), mlp, width)?,
            fc_2: self.linear(&name("mlp.fc2"), width, mlp)?,
        })
    }

    fn norm(&self, name: &str, width: usize) -> Result<Norm, Error> {
        let part = |end: &str| self.tensor(&format!("{name}.{end}"), &[width]);
        Ok(Norm(part("weight")?, part("bias")?))
    }

    fn linear(&self, name: &str, outputs: usize, inputs: usize) -> Result<Linear, Error> {
        let weight = self.tensor(&format!("{name}.weight"), &[outputs, inputs])?;
        Ok(Linear { weight, bias: Some(self.tensor(&format!("{name}.bias"), &[outputs])?) })
    }

    /// `multimodal_projector_bias` says what the tensors say anyway.
    fn linear_with_bias_if_any(&self, name: &str, outputs: usize, inputs: usize) -> Result<Linear, Error> {
        if self.parts.files.get(&format!("{name}.bias")).is_some() {
            return self.linear(name, outputs, inputs);
        }
        let weight = self.tensor(&format!("{name}.weight"), &[outputs, inputs])?;
        Ok(Linear { weight, bias: None })
    }

    fn tensor(&self, name: &str, shape: &[usize]) -> Result<Tensor, Error> {
        Ok(Tensor::from_vec(self.numbers(name, shape)?, shape, self.device)?)
    }

    fn numbers(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>, Error> {
        let view = self.parts.files.get(name).ok_or_else(|| missing(name))?;
        if view.shape != shape {
            return Err(wrong(
                name,
                format!("has shape {:?}; the configuration asks for {shape:?}", view.shape),
            ));
        }
        if view.stored == "i8" {
            return self.eight_bits(name, view);
        }
        plain(view).ok_or_else(|| {
            wrong(name, format!("is stored as {}; supported are f32, f16, bf16 and i8", view.stored))
        })
    }

    fn eight_bits(&self, name: &str, view: TensorView<'_>) -> Result<Vec<f32>, Error> {
        let scale_name = format!("{name}.scale");
        let scale = self.parts.files.get(&scale_name).ok_or_else(|| missing(&scale_name))?;
        let rows = view.shape.first().copied().unwrap_or(1);
        let scales = plain(scale).filter(|scales| scale.shape.first() == Some(&rows) && !scales.is_empty());
        let scales =
            scales.ok_or_else(|| wrong(&scale_name, format!("must have {rows} rows of f16 or f32")))?;
        if !view.bytes.len().is_multiple_of(scales.len()) {
            return Err(wrong(&scale_name, format!("its {} numbers do not divide the matrix", scales.len())));
        }
        let block = view.bytes.len() / scales.len();
        let blocks = view.bytes.chunks_exact(block.max(1)).zip(scales);
        Ok(blocks
            .flat_map(|(block, scale)| block.iter().map(move |&q| f32::from(q.cast_signed()) * scale))
            .collect())
    }
}

fn plain(view: TensorView<'_>) -> Option<Vec<f32>> {
    let halves = || view.bytes.chunks_exact(2).map(|pair| u16::from_le_bytes([pair[0], pair[1]]));
    match view.stored {
        "f32" => {
            let words = view.bytes.chunks_exact(4);
            Some(words.map(|word| f32::from_le_bytes([word[0], word[1], word[2], word[3]])).collect())
        }
        "f16" => Some(halves().map(|bits| f16::from_bits(bits).to_f32()).collect()),
        "bf16" => Some(halves().map(|bits| bf16::from_bits(bits).to_f32()).collect()),
        _ => None,
    }
}

fn missing(name: &str) -> Error {
    wrong(name, "is missing".into())
}

fn wrong(name: &str, reason: String) -> Error {
    locket_model::Error::Tensor { name: name.to_owned(), reason }.into()
}

/// A model whose decoder is not this wide cannot read its visual tokens.
pub(crate) fn check_width(geometry: &VisionGeometry, decoder: usize) -> Result<(), Error> {
    if geometry.hidden_size == decoder {
        return Ok(());
    }
    let reason =
        format!("the projector gives {} numbers, but the decoder takes {decoder}", geometry.hidden_size);
    Err(invalid("multi_modal_projector", reason))
}

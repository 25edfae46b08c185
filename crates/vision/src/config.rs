//! Geometry from configuration files: Hugging Face's `config.json` and `preprocessor_config.json`, or the
//! original repository's `config.json` with the shapes of its tensors.
//!
//! Defaults of absent keys are those of transformers' configuration classes.

use serde_json::{Map, Value};

use crate::{
    Error, VisionGeometry, VisionKind,
    geometry::{BaseFit, invalid},
};

const CLIP_MEAN: [f32; 3] = [0.481_454_66, 0.457_827_5, 0.408_210_73];
const CLIP_STD: [f32; 3] = [0.268_629_54, 0.261_302_6, 0.275_777_1];
const DEFAULT_PINPOINTS: [(u32, u32); 5] = [(336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008)];
const DEFAULT_IMAGE_TOKEN: u32 = 32_000;

/// Shapes of a tower's tensors, which say what the original repository's configuration does not.
#[derive(Debug, Clone, Copy)]
pub(crate) struct TowerShapes {
    /// Numbers of the class embedding.
    pub width: usize,
    /// Side of the patch convolution.
    pub patch: u32,
    /// Learned positions, the class token's included.
    pub positions: usize,
    /// Outputs of the first layer's `fc1`.
    pub mlp_width: usize,
    /// Layers in the file.
    pub num_layers: usize,
    /// Outputs of the projector.
    pub hidden_size: usize,
}

/// Whether the configuration is a LLaVA model's, in either form.
pub(crate) fn is_llava(config: &Value) -> bool {
    let model_type = config.get("model_type").and_then(Value::as_str);
    model_type.is_some_and(|name| matches!(name, "llava" | "llava_next" | "llava_llama" | "llava_mistral"))
}

/// # Errors
/// [`Error::Config`] naming the key that is wrong or asks for what is not computed here.
pub(crate) fn read(
    config: &Value,
    preprocessor: Option<&Value>,
    shapes: TowerShapes,
) -> Result<VisionGeometry, Error> {
    let fields = Fields::of("config.json", config)?;
    let mut geometry = if config.get("vision_config").is_some() || config.get("text_config").is_some() {
        hugging_face(fields, shapes)?
    } else {
        original(fields, shapes)?
    };
    if let Some(preprocessor) = preprocessor {
        let own = preprocessor.get("image_processor").unwrap_or(preprocessor);
        preprocess(&mut geometry, Fields::of("preprocessor_config.json", own)?)?;
    }
    geometry.validate()?;
    Ok(geometry)
}

fn hugging_face(fields: Fields<'_>, shapes: TowerShapes) -> Result<VisionGeometry, Error> {
    let kind = match fields.text("model_type")? {
        Some("llava") => VisionKind::Llava15,
        Some("llava_next") => VisionKind::LlavaNext,
        other => {
            return Err(invalid("model_type", format!("{other:?} must be \"llava\" or \"llava_next\"")));
        }
    };
    let empty = Map::new();
    let vision = fields.object("vision_config")?;
    // Without the object the large tower is meant, without a key of it the small one's.
    let default = |small: usize, large: usize| if vision.is_some() { small } else { large };
    let vision = vision.unwrap_or(Fields(&empty));
    expect(vision, "model_type", "clip_vision_model")?;
    expect(vision, "hidden_act", "quick_gelu")?;
    expect(fields, "projector_hidden_act", "gelu")?;
    expect(fields, "vision_feature_select_strategy", "default")?;
    let number =
        |key: &str, small, large| Ok::<_, Error>(vision.number(key)?.unwrap_or(default(small, large)));
    let num_layers = number("num_hidden_layers", 12, 24)?;
    let is_next = kind == VisionKind::LlavaNext;
    let pinpoints = match fields.pairs("image_grid_pinpoints")? {
        _ if !is_next => Vec::new(),
        Some(pairs) => pairs,
        None => DEFAULT_PINPOINTS.to_vec(),
    };
    let image_token = match fields.number("image_token_index")? {
        None => fields.number("image_token_id")?,
        id => id,
    };
    Ok(VisionGeometry {
        kind,
        tile: number("image_size", 224, 336)? as u32,
        patch: number("patch_size", 32, 14)? as u32,
        pinpoints,
        base_fit: BaseFit::Crop,
        mean: CLIP_MEAN,
        std: CLIP_STD,
        width: number("hidden_size", 768, 1024)?,
        num_heads: number("num_attention_heads", 12, 16)?,
        mlp_width: number("intermediate_size", 3072, 4096)?,
        num_layers,
        layer_norm_eps: vision.float("layer_norm_eps")?.unwrap_or(1e-5),
        feature_layers: feature_layers(fields.0.get("vision_feature_layer"), num_layers)?,
        has_newline: is_next,
        hidden_size: shapes.hidden_size,
        image_token_id: Some(image_token.map_or(DEFAULT_IMAGE_TOKEN, |id| id as u32)),
    })
}

/// The original repository: `mm_*` keys beside the decoder's, and a tower that is known by name only.
fn original(fields: Fields<'_>, shapes: TowerShapes) -> Result<VisionGeometry, Error> {
    /// All of CLIP's towers have heads of this width.
    const HEAD_DIM: usize = 64;
    expect(fields, "mm_projector_type", "mlp2x_gelu")?;
    expect(fields, "mm_vision_select_feature", "patch")?;
    let aspect = fields.text("image_aspect_ratio")?.unwrap_or("square");
    let is_next = aspect == "anyres";
    if is_next {
        expect(fields, "mm_patch_merge_type", "spatial_unpad")?;
    }
    // These are (width, height) there.
    let pinpoints = fields.pairs("image_grid_pinpoints")?.unwrap_or_default();
    let pinpoints = pinpoints.into_iter().map(|(width, height)| (height, width));
    let side = (1..1 << 10).find(|side: &u32| (side * side) as usize + 1 == shapes.positions);
    let side =
        side.ok_or_else(|| invalid("position_embedding", "must have a square of patches and one more"))?;
    Ok(VisionGeometry {
        kind: if is_next { VisionKind::LlavaNext } else { VisionKind::Llava15 },
        tile: side * shapes.patch,
        patch: shapes.patch,
        pinpoints: if is_next { pinpoints.collect() } else { Vec::new() },
        base_fit: if aspect == "pad" { BaseFit::Pad } else { BaseFit::Crop },
        mean: CLIP_MEAN,
        std: CLIP_STD,
        width: shapes.width,
        num_heads: (shapes.width / HEAD_DIM).max(1),
        mlp_width: shapes.mlp_width,
        num_layers: shapes.num_layers,
        layer_norm_eps: 1e-5,
        feature_layers: feature_layers(fields.0.get("mm_vision_select_layer"), shapes.num_layers)?,
        has_newline: is_next,
        hidden_size: shapes.hidden_size,
        image_token_id: None,
    })
}

/// One index or a list of them into [input, output of layer 0, …]; negative ones count from the end.
fn feature_layers(value: Option<&Value>, num_layers: usize) -> Result<Vec<usize>, Error> {
    let wrong = || {
        let reason = format!("must be one layer of {num_layers}, or a list of such (negative: from the end)");
        invalid("vision_feature_layer", reason)
    };
    let index = |value: &Value| {
        let index = value.as_i64().ok_or_else(wrong)?;
        let states = num_layers as i64 + 1;
        let index = if index < 0 { index + states } else { index };
        if (0..states).contains(&index) { Ok(index as usize) } else { Err(wrong()) }
    };
    match value {
        None | Some(Value::Null) => index(&(-2).into()).map(|layer| vec![layer]),
        Some(Value::Array(values)) if (1..=32).contains(&values.len()) => values.iter().map(index).collect(),
        Some(value) => index(value).map(|layer| vec![layer]),
    }
}

/// Means and deviations; all else must be what is computed here.
fn preprocess(geometry: &mut VisionGeometry, fields: Fields<'_>) -> Result<(), Error> {
    for key in ["do_resize", "do_rescale", "do_normalize"] {
        if fields.0.get(key) == Some(&Value::Bool(false)) {
            return Err(invalid(key, "is false; images are always resized, rescaled and normalised"));
        }
    }
    if fields.number("resample")?.is_some_and(|filter| filter != 3) {
        return Err(invalid("resample", "must be 3 (bicubic)"));
    }
    if fields.float("rescale_factor")?.is_some_and(|factor| (factor * 255.0 - 1.0).abs() > 1e-6) {
        return Err(invalid("rescale_factor", "must be 1/255"));
    }
    for (key, sides) in
        [("size", ["shortest_edge", "height", "width"]), ("crop_size", ["height", "width", "height"])]
    {
        // Old files have the bare number.
        let bare = fields.0.get(key).and_then(Value::as_u64).map(|side| side as usize);
        let object = if bare.is_some() { None } else { fields.object(key)? };
        for side in sides {
            let side = match object {
                Some(object) => object.number(side)?,
                None => bare,
            };
            if side.is_some_and(|side| side != geometry.tile as usize) {
                return Err(invalid(key, format!("must be the tower's {} pixels", geometry.tile)));
            }
        }
    }
    if let Some(mean) = fields.triple("image_mean")? {
        geometry.mean = mean;
    }
    if let Some(std) = fields.triple("image_std")? {
        geometry.std = std;
    }
    if geometry.kind == VisionKind::Llava15 && fields.0.get("do_pad") == Some(&Value::Bool(true)) {
        geometry.base_fit = BaseFit::Pad;
    }
    Ok(())
}

fn expect(fields: Fields<'_>, key: &str, only: &str) -> Result<(), Error> {
    match fields.text(key)? {
        Some(value) if value != only => {
            Err(invalid(key, format!("{value:?} is not supported; supported is {only:?}")))
        }
        _ => Ok(()),
    }
}

/// Typed access to an object; `null` counts as absent.
#[derive(Clone, Copy)]
struct Fields<'a>(&'a Map<String, Value>);

impl<'a> Fields<'a> {
    fn of(file: &str, value: &'a Value) -> Result<Self, Error> {
        value.as_object().map(Self).ok_or_else(|| invalid(file, "must be a JSON object"))
    }

    fn get<T>(
        self,
        key: &str,
        kind: &str,
        read: impl FnOnce(&'a Value) -> Option<T>,
    ) -> Result<Option<T>, Error> {
        match self.0.get(key).filter(|value| !value.is_null()) {
            Some(value) => read(value).map(Some).ok_or_else(|| invalid(key, format!("must be {kind}"))),
            None => Ok(None),
        }
    }

    fn number(self, key: &str) -> Result<Option<usize>, Error> {
        let number = |value: &Value| value.as_u64().and_then(|number| u32::try_from(number).ok());
        Ok(self.get(key, "a whole number", number)?.map(|number| number as usize))
    }

    fn float(self, key: &str) -> Result<Option<f64>, Error> {
        self.get(key, "a number", Value::as_f64)
    }

    fn text(self, key: &str) -> Result<Option<&'a str>, Error> {
        self.get(key, "a text", Value::as_str)
    }

    fn object(self, key: &str) -> Result<Option<Self>, Error> {
        self.get(key, "an object", |value| value.as_object().map(Self))
    }

    fn triple(self, key: &str) -> Result<Option<[f32; 3]>, Error> {
        self.get(key, "a list of three numbers", |value| {
            let values = value.as_array()?.iter().map(|value| value.as_f64().map(|number| number as f32));
            values.collect::<Option<Vec<_>>>()?.try_into().ok()
        })
    }

    fn pairs(self, key: &str) -> Result<Option<Vec<(u32, u32)>>, Error> {
        let pair = |value: &Value| {
            let [first, second] = value.as_array()?.as_slice() else { return None };
            let side = |value: &Value| u32::try_from(value.as_u64()?).ok();
            Some((side(first)?, side(second)?))
        };
        self.get(key, "a list of pairs of pixels", |value| value.as_array()?.iter().map(pair).collect())
    }
}

#[cfg(test)]
#[path = "config_tests.rs"]
mod tests;

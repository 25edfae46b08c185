//! Writing the side-car: trained weights in f16 and where they come from.

use std::{
    collections::{BTreeMap, HashMap},
    path::Path,
};

use candle_core::DType;
use safetensors::{Dtype, SafeTensors, tensor::TensorView};

use crate::{
    error::{Error, Result},
    parameters::Parameters,
    saved_run::write_whole,
};

/// Version of tensors and metadata.
pub(crate) const FORMAT_VERSION: &str = "1";

/// Writes `parameters`, stacked over layers, with `metadata`.
pub(crate) fn write(
    path: &Path,
    parameters: &Parameters,
    metadata: BTreeMap<String, String>,
    step: u64,
) -> Result<()> {
    let mut tensors = Vec::new();
    for parameter in &parameters.0 {
        let halves = parameter.value.to_dtype(DType::F16)?.flatten_all()?.to_vec1::<half::f16>()?;
        if halves.iter().any(|value| !value.is_finite()) {
            return Err(Error::Diverged { step, what: "a weight" });
        }
        let bytes: Vec<u8> = halves.iter().flat_map(|value| value.to_le_bytes()).collect();
        tensors.push((parameter.name, parameter.value.dims().to_vec(), bytes));
    }
    let views = tensors
        .iter()
        .map(|(name, shape, bytes)| Ok((*name, TensorView::new(Dtype::F16, shape.clone(), bytes)?)))
        .collect::<Result<Vec<_>, safetensors::SafeTensorError>>()
        .map_err(|error| Error::io("cannot write", path)(std::io::Error::other(error)))?;
    let metadata: HashMap<String, String> = metadata.into_iter().collect();
    write_whole(path, |path| safetensors::serialize_to_file(views, Some(metadata), path))
}

/// Adds shares of layers to the side-car `bytes` and writes it to `path`; `note` says how they were found.
/// Shares that were there are replaced.
///
/// # Errors
/// [`Error::Io`] for bytes that are no side-car, or a file that cannot be written.
pub fn write_layer_shares(bytes: &[u8], shares: &[f32], note: String, path: &Path) -> Result<()> {
    let broken = |error: safetensors::SafeTensorError| {
        Error::io("cannot add layer shares for", path)(std::io::Error::other(error))
    };
    let (_, header) = SafeTensors::read_metadata(bytes).map_err(broken)?;
    let mut metadata = header.metadata().clone().unwrap_or_default();
    metadata.insert("budget".into(), note);
    let file = SafeTensors::deserialize(bytes).map_err(broken)?;
    let numbers: Vec<u8> = shares.iter().flat_map(|share| share.to_le_bytes()).collect();
    let mut views: Vec<(String, TensorView<'_>)> =
        file.tensors().into_iter().filter(|(name, _)| name != "budget").collect();
    let budget = TensorView::new(Dtype::F32, vec![shares.len()], &numbers).map_err(broken)?;
    views.push(("budget".into(), budget));
    write_whole(path, |path| safetensors::serialize_to_file(views, Some(metadata), path))
}

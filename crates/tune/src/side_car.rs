//! Writing the side-car: trained weights in f16 and where they come from.

use std::{
    collections::{BTreeMap, HashMap},
    path::Path,
};

use candle_core::DType;
use safetensors::{Dtype, tensor::TensorView};

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

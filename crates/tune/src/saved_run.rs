//! Checkpoints of a run: weights, optimiser moments, place in the text. A resumed run computes what an
//! uninterrupted one would have.

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    fs,
    path::{Path, PathBuf},
};

use candle_core::{DType, Device, Tensor};
use safetensors::{Dtype, SafeTensors, tensor::TensorView};
use serde::{Deserialize, Serialize};

use crate::{
    error::{Error, Result},
    training::{History, Run},
    windows::WindowState,
};

/// Name of the file in the checkpoint folder.
const FILE: &str = "checkpoint.safetensors";

/// Key of [`State`] in the file's metadata.
const STATE: &str = "state";

/// What must be the same for a run to be continued, by the name of the flag.
pub(crate) type Identity = BTreeMap<String, String>;

/// A run as it was saved.
pub(crate) struct SavedRun {
    path: PathBuf,
    state: State,
    tensors: HashMap<String, Tensor>,
}

#[derive(Serialize, Deserialize)]
struct State {
    identity: Identity,
    step: u64,
    seconds: f64,
    history: History,
    /// Without its tokens, which are tensors.
    windows: WindowState,
}

impl SavedRun {
    /// Writes `run` into `folder`, replacing an older one only when the new one is complete.
    pub(crate) fn write(run: &Run, folder: &Path, identity: &Identity) -> Result<()> {
        fs::create_dir_all(folder).map_err(Error::io("cannot write", folder))?;
        let path = folder.join(FILE);
        let windows = WindowState { pending: VecDeque::new(), buffer: Vec::new(), ..run.windows };
        let state = State {
            identity: identity.clone(),
            step: run.step,
            seconds: run.seconds,
            history: run.history.clone(),
            windows,
        };
        let broken = |reason: String| Error::Checkpoint { path: path.clone(), reason };
        let state = serde_json::to_string(&state).map_err(|error| broken(error.to_string()))?;
        let mut tensors: Vec<(String, Dtype, Vec<usize>, Vec<u8>)> = Vec::new();
        let mut push = |name: String, tensor: &Tensor| -> Result<()> {
            let bytes = f32_bytes(tensor)?;
            tensors.push((name, Dtype::F32, tensor.dims().to_vec(), bytes));
            Ok(())
        };
        for (parameter, [first, second]) in run.parameters.0.iter().zip(&run.adam.moments) {
            let name = parameter.name;
            push(format!("value.{name}"), &parameter.value)?;
            push(format!("first.{name}"), first)?;
            push(format!("second.{name}"), second)?;
        }
        let pending: Vec<u32> = run.windows.pending.iter().copied().collect();
        let length = run.windows.buffer.first().map_or(0, Vec::len);
        tensors.push(("pending".into(), Dtype::U32, vec![pending.len()], u32_bytes(&pending)));
        let buffer = run.windows.buffer.concat();
        tensors.push((
            "buffer".into(),
            Dtype::U32,
            vec![run.windows.buffer.len(), length],
            u32_bytes(&buffer),
        ));
        let views = tensors.iter().map(|(name, dtype, shape, bytes)| {
            Ok((name.as_str(), TensorView::new(*dtype, shape.clone(), bytes)?))
        });
        let views = views.collect::<Result<Vec<_>, safetensors::SafeTensorError>>();
        let views = views.map_err(|error| broken(error.to_string()))?;
        let metadata = HashMap::from([(STATE.to_owned(), state)]);
        write_whole(&path, |path| safetensors::serialize_to_file(views, Some(metadata), path))
    }

    /// The run in `folder`, if there is one.
    pub(crate) fn read(folder: &Path, identity: &Identity, device: &Device) -> Result<Option<Self>> {
        let path = folder.join(FILE);
        let bytes = match fs::read(&path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(Error::io("cannot read", &path)(error)),
        };
        let broken = |reason: String| Error::Checkpoint { path: path.clone(), reason };
        let unusable = |error: &dyn std::fmt::Display| {
            broken(format!("is broken ({error}); remove it or start without --resume"))
        };
        let (_, header) = SafeTensors::read_metadata(&bytes).map_err(|error| unusable(&error))?;
        let state = header.metadata().as_ref().and_then(|metadata| metadata.get(STATE));
        let state = state.ok_or_else(|| unusable(&"no state"))?;
        let state: State = serde_json::from_str(state).map_err(|error| unusable(&error))?;
        for (key, value) in identity {
            let saved = state.identity.get(key).map_or("nothing", String::as_str);
            if saved != value {
                return Err(broken(format!(
                    "was made with {key} {saved}, not {value}; use the same or start without --resume"
                )));
            }
        }
        let file = SafeTensors::deserialize(&bytes).map_err(|error| unusable(&error))?;
        let mut tensors = HashMap::new();
        for (name, view) in file.iter() {
            let (dtype, device) = match view.dtype() {
                Dtype::F32 => (DType::F32, device),
                Dtype::U32 => (DType::U32, &Device::Cpu),
                other => return Err(unusable(&format!("tensor {name} is {other:?}"))),
            };
            let tensor = Tensor::from_raw_buffer(view.data(), dtype, view.shape(), device)?;
            tensors.insert(name.to_owned(), tensor);
        }
        Ok(Some(Self { path, state, tensors }))
    }

    /// Puts the saved values into a new run of the same identity.
    pub(crate) fn restore(mut self, run: &mut Run) -> Result<()> {
        for (parameter, [first, second]) in run.parameters.0.iter_mut().zip(&mut run.adam.moments) {
            let name = parameter.name;
            let targets = [("value", &mut parameter.value), ("first", first), ("second", second)];
            for (what, target) in targets {
                *target = self.take(&format!("{what}.{name}"), Some(target.dims()))?;
            }
        }
        let pending = self.take("pending", None)?.to_vec1::<u32>()?;
        let buffer = self.take("buffer", None)?.to_vec2::<u32>()?;
        run.windows = WindowState { pending: pending.into(), buffer, ..self.state.windows };
        (run.step, run.adam.steps) = (self.state.step, self.state.step);
        (run.seconds, run.history) = (self.state.seconds, self.state.history);
        Ok(())
    }

    fn take(&mut self, name: &str, shape: Option<&[usize]>) -> Result<Tensor> {
        let broken = |reason: String| Error::Checkpoint { path: self.path.clone(), reason };
        let tensor = self.tensors.remove(name).ok_or_else(|| broken(format!("has no tensor {name}")))?;
        match shape {
            Some(shape) if tensor.dims() != shape => {
                Err(broken(format!("tensor {name} has shape {:?}, expected {shape:?}", tensor.dims())))
            }
            _ => Ok(tensor),
        }
    }
}

/// Writes a file beside `path` and gives it its name when it is complete.
pub(crate) fn write_whole(
    path: &Path,
    write: impl FnOnce(&Path) -> Result<(), safetensors::SafeTensorError>,
) -> Result<()> {
    let mut partial = path.as_os_str().to_owned();
    partial.push(".partial");
    let partial = PathBuf::from(partial);
    write(&partial).map_err(|error| Error::io("cannot write", &partial)(std::io::Error::other(error)))?;
    let file = fs::File::open(&partial).map_err(Error::io("cannot write", &partial))?;
    file.sync_all().map_err(Error::io("cannot write", &partial))?;
    fs::rename(&partial, path).map_err(Error::io("cannot write", path))
}

fn f32_bytes(tensor: &Tensor) -> Result<Vec<u8>> {
    let values = tensor.flatten_all()?.to_vec1::<f32>()?;
    Ok(values.iter().flat_map(|value| value.to_le_bytes()).collect())
}

fn u32_bytes(values: &[u32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

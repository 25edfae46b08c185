//! CUDA kernels of one decoder step behind safe functions, all on one stream.
//!
//! Buffers are allocated once and keep their addresses; what changes from step to step is read
//! from [`StepArrays`] in device memory. A run of these functions between
//! [`Device::begin_capture`] and [`Device::end_capture`] is therefore a CUDA graph that can be replayed for every later step of the same number
//! of rows. Numbers are f32; faster types are a matter of more kernels, not of another interface.

use std::{
    any::Any,
    sync::{Arc, Mutex},
};

use cudarc::{
    cublas::{CudaBlas, Gemm, GemmConfig, sys as blas_sys},
    driver::{
        CudaContext, CudaFunction, CudaModule, CudaSlice, CudaStream, DeviceRepr, LaunchConfig,
        PushKernelArg, ValidAsZeroBits, sys,
    },
    nvrtc::Ptx,
};

/// An error of the driver or of cuBLAS.
#[derive(Debug, thiserror::Error)]
#[error("CUDA: {0}")]
pub struct Error(String);

fn error(source: impl std::fmt::Debug) -> Error {
    Error(format!("{source:?}"))
}

/// Bytes of cuBLAS's workspace, given to it before any capture so that it never allocates in one.
const BLAS_WORKSPACE_BYTES: usize = 64 << 20;

/// What a buffer can hold.
pub trait Element: DeviceRepr + Send + 'static {}

impl<T: DeviceRepr + Send + 'static> Element for T {}

/// Memory of dropped buffers. A captured graph names addresses and not buffers, so nothing is
/// freed before the device, its buffers and its graphs are all gone.
#[derive(Debug, Default)]
struct Retired(Mutex<Vec<Box<dyn Any + Send>>>);

/// A device buffer whose address never changes.
#[derive(Debug)]
pub struct Buffer<T: Element> {
    /// `None` only while it is dropped.
    slice: Option<CudaSlice<T>>,
    retired: Arc<Retired>,
}

impl<T: Element> Buffer<T> {
    /// Number of elements.
    pub fn len(&self) -> usize {
        self.slice().len()
    }

    /// Whether the buffer has no elements.
    pub fn is_empty(&self) -> bool {
        self.slice().is_empty()
    }

    fn slice(&self) -> &CudaSlice<T> {
        self.slice.as_ref().expect("a buffer has its memory until it is dropped")
    }

    fn slice_mut(&mut self) -> &mut CudaSlice<T> {
        self.slice.as_mut().expect("a buffer has its memory until it is dropped")
    }
}

impl<T: Element> Drop for Buffer<T> {
    fn drop(&mut self) {
        if let (Some(slice), Ok(mut retired)) = (self.slice.take(), self.retired.0.lock()) {
            retired.push(Box::new(slice));
        }
    }
}

/// The rows of a step as the kernels read them; host side.
#[derive(Debug, Clone, Default)]
pub struct StepRows {
    /// Token ids `[rows]`.
    pub ids: Vec<u32>,
    /// Positions `[rows]`.
    pub positions: Vec<u32>,
    /// First element of each row's block `[rows]`.
    pub base: Vec<u64>,
    /// Slots per layer and head of each row's block `[rows]`.
    pub capacity: Vec<u32>,
    /// Slot that each row's key and value go to `[layers, rows]`.
    pub slot: Vec<u32>,
    /// Slots that each row sees, its own included `[layers, rows]`.
    pub visible: Vec<u32>,
    /// Rows whose logits are wanted `[samples]`.
    pub sample_rows: Vec<u32>,
}

/// The same in device memory, with room for `max_rows`.
#[derive(Debug)]
pub struct StepArrays {
    ids: Buffer<u32>,
    positions: Buffer<u32>,
    base: Buffer<u64>,
    capacity: Buffer<u32>,
    slot: Buffer<u32>,
    visible: Buffer<u32>,
    sample_rows: Buffer<u32>,
    limits: StepLimits,
    rows: usize,
    samples: usize,
}

/// Bounds that uploaded rows are checked against, so that no kernel reads outside a buffer.
#[derive(Debug, Clone, Copy)]
pub struct StepLimits {
    /// Rows of the largest step.
    pub max_rows: usize,
    /// Decoder layers.
    pub layers: usize,
    /// Key/value heads.
    pub kv_heads: usize,
    /// Dimensions of a head: a multiple of 32, at most 256.
    pub head_dim: usize,
    /// Rows of the embedding.
    pub vocab: usize,
    /// Elements of the key buffer, and of the value buffer.
    pub cache_len: usize,
}

impl StepArrays {
    /// Rows of the last upload.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Sample rows of the last upload.
    pub fn samples(&self) -> usize {
        self.samples
    }
}

/// How a matrix of heads is laid out in the fused projection.
#[derive(Debug, Clone, Copy)]
pub struct HeadLayout {
    /// Query heads.
    pub heads: usize,
    /// Key/value heads.
    pub kv_heads: usize,
    /// Dimensions of a head.
    pub head_dim: usize,
}

impl HeadLayout {
    fn width(&self) -> usize {
        (self.heads + 2 * self.kv_heads) * self.head_dim
    }
}

/// Rotary embedding in device memory.
#[derive(Debug)]
pub struct Rotation {
    inv_freq: Buffer<f32>,
    factor: f32,
    interleaved: bool,
}

struct Functions {
    embed: CudaFunction,
    add_rms_norm: CudaFunction,
    add_bias: CudaFunction,
    head_norm: CudaFunction,
    rope: CudaFunction,
    append: CudaFunction,
    attend: CudaFunction,
    silu_mul: CudaFunction,
    gather_sum: CudaFunction,
}

impl Functions {
    fn load(module: &Arc<CudaModule>) -> Result<Self, Error> {
        let get = |name: &str| module.load_function(name).map_err(error);
        Ok(Self {
            embed: get("embed")?,
            add_rms_norm: get("add_rms_norm")?,
            add_bias: get("add_bias")?,
            head_norm: get("head_norm")?,
            rope: get("rope")?,
            append: get("append")?,
            attend: get("attend")?,
            silu_mul: get("silu_mul")?,
            gather_sum: get("gather_sum")?,
        })
    }
}

/// A captured sequence of launches.
pub struct Graph {
    graph: cudarc::driver::CudaGraph,
    _retired: Arc<Retired>,
}

impl Graph {
    /// Replays the launches on the stream that they were captured on.
    pub fn launch(&self) -> Result<(), Error> {
        self.graph.launch().map_err(error)
    }
}

/// One CUDA device, one stream, cuBLAS and the compiled kernels.
pub struct Device {
    stream: Arc<CudaStream>,
    blas: CudaBlas,
    _workspace: Buffer<u8>,
    functions: Functions,
    retired: Arc<Retired>,
}

/// Checks an invariant of the caller.
macro_rules! require {
    ($condition:expr) => {
        assert!($condition, "kernel arguments: {}", stringify!($condition))
    };
}

/// One kernel argument; its address is handed to the driver, so it must outlive the launch.
#[derive(Debug, Clone, Copy)]
enum Arg {
    Pointer(u64),
    Int(i32),
    Float(f32),
}

impl From<usize> for Arg {
    fn from(value: usize) -> Self {
        Self::Int(value as i32)
    }
}

impl From<f32> for Arg {
    fn from(value: f32) -> Self {
        Self::Float(value)
    }
}

impl<T: Element> From<&Buffer<T>> for Arg {
    fn from(buffer: &Buffer<T>) -> Self {
        Self::Pointer(buffer.address())
    }
}

impl<T: Element> Buffer<T> {
    fn address(&self) -> u64 {
        use cudarc::driver::DevicePtr;
        // One stream and no event tracking: the guard has nothing to record.
        let (address, _guard) = self.slice().device_ptr(self.slice().stream());
        address
    }

    fn at(&self, element: usize) -> Arg {
        require!(element <= self.len());
        Arg::Pointer(self.address() + (element * size_of::<T>()) as u64)
    }
}

impl Device {
    /// Opens a device with a stream of its own.
    ///
    /// # Errors
    /// No such device, or its driver refuses the kernels.
    pub fn new(ordinal: usize) -> Result<Self, Error> {
        let context = CudaContext::new(ordinal).map_err(error)?;
        // SAFETY: everything in this module runs on the one stream made below, which orders it; a
        // capture must not contain waits for events that were recorded outside of it.
        unsafe { context.disable_event_tracking() };
        let stream = context.new_stream().map_err(error)?;
        let blas = CudaBlas::new(stream.clone()).map_err(error)?;
        let retired = Arc::new(Retired::default());
        let slice = Some(stream.alloc_zeros::<u8>(BLAS_WORKSPACE_BYTES).map_err(error)?);
        let workspace = Buffer { slice, retired: Arc::clone(&retired) };
        // SAFETY: the workspace lives as long as the handle: both are fields of the device.
        let status = unsafe {
            blas_sys::cublasSetWorkspace_v2(
                *blas.handle(),
                workspace.address() as *mut _,
                BLAS_WORKSPACE_BYTES,
            )
        };
        if status != blas_sys::cublasStatus_t::CUBLAS_STATUS_SUCCESS {
            return Err(error(status));
        }
        let ptx = Ptx::from_src(include_str!(concat!(env!("OUT_DIR"), "/decode.ptx")));
        let module = context.load_module(ptx).map_err(error)?;
        let functions = Functions::load(&module)?;
        Ok(Self { stream, blas, _workspace: workspace, functions, retired })
    }

    /// A zeroed buffer of `len` elements.
    pub fn zeros<T: Element + ValidAsZeroBits>(&self, len: usize) -> Result<Buffer<T>, Error> {
        let slice = Some(self.stream.alloc_zeros(len.max(1)).map_err(error)?);
        Ok(Buffer { slice, retired: Arc::clone(&self.retired) })
    }

    /// A buffer with these elements.
    pub fn buffer<T: Element>(&self, host: &[T]) -> Result<Buffer<T>, Error> {
        let slice = Some(self.stream.clone_htod(host).map_err(error)?);
        Ok(Buffer { slice, retired: Arc::clone(&self.retired) })
    }

    /// The buffer's elements, after everything before has run.
    pub fn read<T: Element + Clone + Default>(&self, buffer: &Buffer<T>) -> Result<Vec<T>, Error> {
        let host = self.stream.clone_dtoh(buffer.slice()).map_err(error)?;
        self.synchronize()?;
        Ok(host)
    }

    /// Waits until everything launched so far has run.
    pub fn synchronize(&self) -> Result<(), Error> {
        self.stream.synchronize().map_err(error)
    }

    /// Arrays for steps of at most `limits.max_rows` rows.
    pub fn step_arrays(&self, limits: StepLimits) -> Result<StepArrays, Error> {
        require!(limits.head_dim.is_multiple_of(32) && limits.head_dim <= 256);
        let rows = limits.max_rows;
        Ok(StepArrays {
            ids: self.zeros(rows)?,
            positions: self.zeros(rows)?,
            base: self.zeros(rows)?,
            capacity: self.zeros(rows)?,
            slot: self.zeros(limits.layers * rows)?,
            visible: self.zeros(limits.layers * rows)?,
            sample_rows: self.zeros(rows)?,
            limits,
            rows: 0,
            samples: 0,
        })
    }

    /// Copies a step's rows into `arrays`, at the same addresses as every step before.
    ///
    /// # Panics
    /// If a row points outside the embedding or the cache: a bug of the caller.
    pub fn upload(&self, arrays: &mut StepArrays, host: &StepRows) -> Result<(), Error> {
        let limits = arrays.limits;
        let rows = host.ids.len();
        require!(rows <= limits.max_rows && host.sample_rows.len() <= limits.max_rows);
        require!(host.positions.len() == rows && host.base.len() == rows && host.capacity.len() == rows);
        require!(host.slot.len() == limits.layers * rows && host.visible.len() == limits.layers * rows);
        require!(host.ids.iter().all(|&id| (id as usize) < limits.vocab));
        require!(host.sample_rows.iter().all(|&row| (row as usize) < rows));
        let block = limits.layers * limits.kv_heads * limits.head_dim;
        for row in 0..rows {
            let end = host.base[row] as usize + block * host.capacity[row] as usize;
            require!(end <= limits.cache_len);
        }
        for (at, (&slot, &visible)) in host.slot.iter().zip(&host.visible).enumerate() {
            let capacity = host.capacity[at % rows.max(1)];
            require!(slot < capacity && visible >= 1 && visible <= capacity);
        }
        fn copy<T: Element>(device: &Device, from: &[T], to: &mut Buffer<T>) -> Result<(), Error> {
            if from.is_empty() {
                return Ok(());
            }
            device.stream.memcpy_htod(from, &mut to.slice_mut().slice_mut(..from.len())).map_err(error)
        }
        copy(self, &host.ids, &mut arrays.ids)?;
        copy(self, &host.positions, &mut arrays.positions)?;
        copy(self, &host.base, &mut arrays.base)?;
        copy(self, &host.capacity, &mut arrays.capacity)?;
        copy(self, &host.slot, &mut arrays.slot)?;
        copy(self, &host.visible, &mut arrays.visible)?;
        copy(self, &host.sample_rows, &mut arrays.sample_rows)?;
        (arrays.rows, arrays.samples) = (rows, host.sample_rows.len());
        Ok(())
    }

    /// A rotary table: `inv_freq [rotary_dim / 2]`, factor on cos and sin, and the pairs' layout.
    pub fn rotation(&self, inv_freq: &[f32], factor: f32, interleaved: bool) -> Result<Rotation, Error> {
        Ok(Rotation { inv_freq: self.buffer(inv_freq)?, factor, interleaved })
    }

    /// From here on launches are recorded instead of executed, until [`Self::end_capture`].
    ///
    /// # Errors
    /// The driver's, for example if a capture is already under way.
    pub fn begin_capture(&self) -> Result<(), Error> {
        self.synchronize()?;
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        self.stream.begin_capture(mode).map_err(error)
    }

    /// Ends a capture and makes its launches replayable. Must be called even when the work between
    /// has failed, or the stream stays unusable.
    ///
    /// # Errors
    /// The driver's if something cannot be captured: an allocation, a copy from or to the host.
    pub fn end_capture(&self) -> Result<Graph, Error> {
        let graph = self.stream.end_capture(sys::CUgraphInstantiate_flags(0)).map_err(error)?;
        let graph = graph.ok_or_else(|| Error("the capture was empty".into()))?;
        Ok(Graph { graph, _retired: Arc::clone(&self.retired) })
    }

    fn launch(
        &self,
        function: &CudaFunction,
        grid: (usize, usize),
        block: usize,
        args: &[Arg],
    ) -> Result<(), Error> {
        if grid.0 == 0 || grid.1 == 0 {
            return Ok(());
        }
        let config = LaunchConfig {
            grid_dim: (grid.0 as u32, grid.1 as u32, 1),
            block_dim: (block as u32, 1, 1),
            shared_mem_bytes: 0,
        };
        let mut builder = self.stream.launch_builder(function);
        for arg in args {
            match arg {
                Arg::Pointer(value) => builder.arg(value),
                Arg::Int(value) => builder.arg(value),
                Arg::Float(value) => builder.arg(value),
            };
        }
        // SAFETY: only the functions below call this, each with the argument list of its kernel in
        // decode.cu, lengths checked against the grid, and indices checked when uploaded.
        unsafe { builder.launch(config) }.map(|_| ()).map_err(error)
    }

    /// `out[r] = table[ids[r]]`: `table [vocab, width]`, `out [rows, width]`.
    pub fn embed(
        &self,
        step: &StepArrays,
        table: &Buffer<f32>,
        out: &Buffer<f32>,
        width: usize,
    ) -> Result<(), Error> {
        require!(table.len() >= step.limits.vocab * width && out.len() >= step.rows * width);
        let args = [(&step.ids).into(), table.into(), out.into(), width.into()];
        self.launch(&self.functions.embed, (step.rows, 1), 256, &args)
    }

    /// `residual += delta` (if given), `out = rms_norm(residual) * weight`; `[rows, width]`. `out`
    /// may be `delta`.
    pub fn add_rms_norm(
        &self,
        rows: usize,
        residual: &Buffer<f32>,
        delta: Option<&Buffer<f32>>,
        weight: &Buffer<f32>,
        out: &Buffer<f32>,
        eps: f32,
    ) -> Result<(), Error> {
        let width = weight.len();
        require!(residual.len() >= rows * width && out.len() >= rows * width);
        require!(delta.is_none_or(|delta| delta.len() >= rows * width));
        let args = [
            residual.into(),
            delta.unwrap_or(residual).into(),
            weight.into(),
            out.into(),
            width.into(),
            eps.into(),
            usize::from(delta.is_some()).into(),
        ];
        self.launch(&self.functions.add_rms_norm, (rows, 1), 256, &args)
    }

    /// `y = x * weightᵀ (+ bias)`: `x [rows, inputs]`, `weight [outputs, inputs]`, `y [rows, outputs]`.
    pub fn linear(
        &self,
        rows: usize,
        weight: &Buffer<f32>,
        bias: Option<&Buffer<f32>>,
        x: &Buffer<f32>,
        y: &mut Buffer<f32>,
        (outputs, inputs): (usize, usize),
    ) -> Result<(), Error> {
        require!(weight.len() >= outputs * inputs && x.len() >= rows * inputs && y.len() >= rows * outputs);
        if rows == 0 {
            return Ok(());
        }
        let config = GemmConfig {
            transa: blas_sys::cublasOperation_t::CUBLAS_OP_T,
            transb: blas_sys::cublasOperation_t::CUBLAS_OP_N,
            m: outputs as i32,
            n: rows as i32,
            k: inputs as i32,
            alpha: 1.0,
            lda: inputs as i32,
            ldb: inputs as i32,
            beta: 0.0,
            ldc: outputs as i32,
        };
        // SAFETY: the three lengths were checked above against the column-major shapes
        // [inputs, outputs], [inputs, rows] and [outputs, rows] that the configuration names.
        unsafe { self.blas.gemm(config, weight.slice(), x.slice(), y.slice_mut()) }.map_err(error)?;
        if let Some(bias) = bias {
            require!(bias.len() == outputs);
            let args = [(&*y).into(), bias.into(), outputs.into()];
            self.launch(&self.functions.add_bias, (rows, 1), 256, &args)?;
        }
        Ok(())
    }

    /// RMS norm over each query and key head of `qkv [rows, (heads + 2 kv_heads) head_dim]`.
    pub fn head_norm(
        &self,
        rows: usize,
        layout: HeadLayout,
        qkv: &Buffer<f32>,
        q: &Buffer<f32>,
        k: &Buffer<f32>,
        eps: f32,
    ) -> Result<(), Error> {
        require!(
            qkv.len() >= rows * layout.width() && q.len() >= layout.head_dim && k.len() >= layout.head_dim
        );
        let args = [
            qkv.into(),
            q.into(),
            k.into(),
            layout.heads.into(),
            layout.head_dim.into(),
            layout.width().into(),
            eps.into(),
        ];
        self.launch(&self.functions.head_norm, (layout.heads + layout.kv_heads, rows), 128, &args)
    }

    /// Rotates queries and keys of `qkv` by the step's positions.
    pub fn rope(
        &self,
        step: &StepArrays,
        layout: HeadLayout,
        qkv: &Buffer<f32>,
        rotation: &Rotation,
    ) -> Result<(), Error> {
        let pairs = rotation.inv_freq.len();
        require!(qkv.len() >= step.rows * layout.width() && 2 * pairs <= layout.head_dim && pairs <= 1024);
        let args = [
            qkv.into(),
            (&step.positions).into(),
            (&rotation.inv_freq).into(),
            layout.head_dim.into(),
            layout.width().into(),
            pairs.into(),
            rotation.factor.into(),
            usize::from(rotation.interleaved).into(),
        ];
        self.launch(&self.functions.rope, (layout.heads + layout.kv_heads, step.rows), pairs, &args)
    }

    /// Appends keys and values of `qkv` at the step's slots of `layer`, then attends; writes
    /// `out [rows, heads * head_dim]`. Rows of one sequence see the slots that their `visible` count names.
    pub fn attend(
        &self,
        step: &StepArrays,
        layout: HeadLayout,
        layer: usize,
        qkv: &Buffer<f32>,
        (keys, values): (&Buffer<f32>, &Buffer<f32>),
        out: &Buffer<f32>,
    ) -> Result<(), Error> {
        let limits = step.limits;
        require!(
            layer < limits.layers && layout.head_dim == limits.head_dim && layout.kv_heads == limits.kv_heads
        );
        require!(keys.len() >= limits.cache_len && values.len() >= limits.cache_len);
        require!(qkv.len() >= step.rows * layout.width());
        require!(out.len() >= step.rows * layout.heads * layout.head_dim);
        let first = layer * step.rows;
        let common = [qkv.into(), keys.into(), values.into(), (&step.base).into(), (&step.capacity).into()];
        let [q, k, v, base, capacity] = common;
        let (layer, head_dim, width) =
            (Arg::from(layer), Arg::from(layout.head_dim), Arg::from(layout.width()));
        let args =
            [q, k, v, base, capacity, step.slot.at(first), layer, layout.heads.into(), head_dim, width];
        self.launch(&self.functions.append, (layout.kv_heads, step.rows), 64, &args)?;
        let scale = 1.0 / (layout.head_dim as f32).sqrt();
        let visible = step.visible.at(first);
        let args = [
            q,
            k,
            v,
            base,
            capacity,
            visible,
            out.into(),
            layer,
            layout.kv_heads.into(),
            head_dim,
            width,
            scale.into(),
        ];
        self.launch(&self.functions.attend, (layout.heads, step.rows), 128, &args)
    }

    /// `act = silu(gate) * up`: `gate_up [rows, 2 inner]`, `act [rows, inner]`.
    pub fn silu_mul(
        &self,
        rows: usize,
        gate_up: &Buffer<f32>,
        act: &Buffer<f32>,
        inner: usize,
    ) -> Result<(), Error> {
        require!(gate_up.len() >= rows * 2 * inner && act.len() >= rows * inner);
        let args = [gate_up.into(), act.into(), inner.into()];
        self.launch(&self.functions.silu_mul, (inner.div_ceil(256), rows), 256, &args)
    }

    /// `out[i] = residual[row] + delta[row]` for the step's sample rows; `out [samples, width]`.
    pub fn gather_sum(
        &self,
        step: &StepArrays,
        residual: &Buffer<f32>,
        delta: &Buffer<f32>,
        out: &Buffer<f32>,
        width: usize,
    ) -> Result<(), Error> {
        require!(residual.len() >= step.rows * width && delta.len() >= step.rows * width);
        require!(out.len() >= step.samples * width);
        let args = [residual.into(), delta.into(), (&step.sample_rows).into(), out.into(), width.into()];
        self.launch(&self.functions.gather_sum, (step.samples, 1), 256, &args)
    }
}

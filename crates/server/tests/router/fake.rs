//! A server over the real engine and a fake model: the text is a fixed script, indexed by
//! position, so every answer is known beforehand.

use std::{
    collections::HashMap,
    path::Path,
    sync::{Arc, Condvar, Mutex},
};

use axum::{
    Router,
    body::{Body, to_bytes},
    http::{HeaderMap, Request, StatusCode},
};
use locket_engine::{EngineConfig, EngineThread};
use locket_model::{
    Adapter, AdapterId, Batch, BlockId, Error, Extras, MemoryUse, Model, ModelConfig, TokenScore,
    kv_cache::{BlockClass, CacheGeometry, CachePlan, CacheSettings, SideArrays, SlotType},
    load::Checkpoint,
};
use locket_processor::Processor;
use locket_server::{AppState, ServerConfig};
use locket_vision::VisionModel;
use serde_json::{Value, json};
use tower::ServiceExt as _;

/// Token `i` below 256 is the byte `i`.
pub const IM_START: u32 = 257;
/// The end token.
pub const IM_END: u32 = 258;
/// A prompt with this token, which no text has, breaks the device.
pub const DEVICE_ERROR: u32 = 0xFF;
/// A prompt with this token, which no text has, gives logits that are not finite.
pub const NOT_FINITE: u32 = 0xFE;
/// What the tokenizer makes of "42"; the model says it in two tokens.
pub const FORTY_TWO: u32 = 256;
/// A token of the tokenizer that the model has no row for.
pub const BEYOND: &str = "<|beyond|>";
const VOCAB_SIZE: usize = 259;
/// Width of the model.
pub const HIDDEN_SIZE: usize = 32;
const TEXT: &str = "Grüße! The answer is 42. ";

const TEMPLATE: &str = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n\
    {% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";

/// What follows position `p` is entry `(p + 1) % len`; the last entry is the end token.
pub fn script() -> Vec<u32> {
    TEXT.bytes().map(u32::from).chain([IM_END]).collect()
}

/// The text after a prompt of `prompt_tokens` tokens, up to the end token or `max_tokens`.
pub fn expected(prompt_tokens: usize, max_tokens: usize) -> (Vec<u32>, String) {
    let script = script();
    let ids: Vec<u32> = (prompt_tokens..)
        .map(|position| script[position % script.len()])
        .take_while(|id| *id != IM_END)
        .take(max_tokens)
        .collect();
    let bytes: Vec<u8> = ids.iter().map(|id| *id as u8).collect();
    let text = String::from_utf8_lossy(&bytes).into_owned();
    (ids, text)
}

/// Holds the model's steps back while closed.
#[derive(Default)]
pub struct Gate {
    is_closed: Mutex<bool>,
    changed: Condvar,
}

impl Gate {
    pub fn set_closed(&self, is_closed: bool) {
        *self.is_closed.lock().expect("no panics") = is_closed;
        self.changed.notify_all();
    }

    fn pass(&self) {
        let closed = self.is_closed.lock().expect("no panics");
        drop(self.changed.wait_while(closed, |closed| *closed).expect("no panics"));
    }
}

struct ScriptedModel {
    config: ModelConfig,
    plan: CachePlan,
    gate: Arc<Gate>,
    /// Settings and tokens of the open blocks.
    blocks: HashMap<BlockId, (CacheSettings, u32)>,
    /// Positions and ids of the latest step.
    latest: (Vec<u32>, Vec<u32>),
    /// Rows of the latest step that went through an adapter: what follows is one token further.
    adapted: Vec<bool>,
    /// Adapters so far.
    adapters: u32,
    /// Settings of the exported blocks.
    exported: Mutex<Vec<CacheSettings>>,
}

impl ScriptedModel {
    fn block(&self, block: BlockId) -> Result<(CacheSettings, u32), Error> {
        self.blocks.get(&block).copied().ok_or_else(|| Error::InvalidBatch("the block is closed".into()))
    }
}

impl Model for ScriptedModel {
    fn config(&self) -> &ModelConfig {
        &self.config
    }

    fn cache_plan(&self) -> &CachePlan {
        &self.plan
    }

    fn forward(&mut self, batch: &Batch, logits: &mut Vec<f32>) -> Result<(), Error> {
        self.gate.pass();
        if batch.ids.contains(&DEVICE_ERROR) {
            return Err(Error::Device("unplugged".into()));
        }
        for sequence in &batch.sequences {
            let (_, len) = self.blocks.get_mut(&sequence.block).expect("an open block");
            // Images leave gaps.
            let position = batch.positions[sequence.rows.start as usize];
            assert!(position >= *len, "rows go on where the block ends");
            *len += sequence.rows.len() as u32;
        }
        self.adapted = vec![false; batch.ids.len()];
        for sequence in batch.sequences.iter().filter(|sequence| sequence.adapter.is_some()) {
            self.adapted[sequence.rows.start as usize..sequence.rows.end as usize].fill(true);
        }
        self.latest = (batch.positions.clone(), batch.ids.clone());
        self.row_logits(&batch.sample_rows, logits)
    }

    fn row_logits(&mut self, rows: &[u32], logits: &mut Vec<f32>) -> Result<(), Error> {
        let script = script();
        let (positions, ids) = &self.latest;
        let is_finite = !ids.contains(&NOT_FINITE);
        logits.clear();
        for row in rows {
            let position = positions[*row as usize] as usize;
            let further = usize::from(self.adapted[*row as usize]);
            let next = script[(position + 1 + further) % script.len()] as usize;
            // The script is likely, its neighbour a little, everything else hardly.
            logits.extend((0..VOCAB_SIZE).map(|id| match id {
                _ if !is_finite => f32::NAN,
                id if id == next => 20.0,
                id if id == (next + 1) % VOCAB_SIZE => 5.0,
                _ => 0.0,
            }));
        }
        Ok(())
    }

    /// Made of the row's id alone.
    fn row_states(&mut self, rows: &[u32], states: &mut Vec<f32>) -> Result<(), Error> {
        let width = self.config.hidden_size as u32;
        states.clear();
        for row in rows {
            let id = self.latest.1[*row as usize];
            states.extend((1..=width).map(|i| ((id + 1) * i % 7) as f32 - 3.0));
        }
        Ok(())
    }

    fn open_block(&mut self, block: BlockId, settings: CacheSettings) -> Result<(), Error> {
        self.blocks.insert(block, (settings, 0));
        Ok(())
    }

    fn copy_block(&mut self, from: BlockId, to: BlockId) -> Result<(), Error> {
        let state = self.block(from)?;
        self.blocks.insert(to, state);
        Ok(())
    }

    fn close_block(&mut self, block: BlockId) {
        self.blocks.remove(&block);
    }

    /// Where the settings are kept, and the number of tokens.
    fn export_block(&self, block: BlockId) -> Result<Vec<u8>, Error> {
        let (settings, len) = self.block(block)?;
        let mut exported = self.exported.lock().expect("no panics");
        let index = exported.len() as u32;
        exported.push(settings);
        Ok([index.to_le_bytes(), len.to_le_bytes()].concat())
    }

    fn import_block(&mut self, block: BlockId, image: &[u8]) -> Result<(), Error> {
        let (words, _) = image.as_chunks::<4>();
        let [index, len] = words else { return Err(Error::InvalidBatch("a broken image".into())) };
        let settings = self.exported.lock().expect("no panics")[u32::from_le_bytes(*index) as usize];
        self.blocks.insert(block, (settings, u32::from_le_bytes(*len)));
        Ok(())
    }

    fn folded_tokens(&self, block: BlockId) -> u32 {
        let Some((settings, len)) = self.blocks.get(&block) else { return 0 };
        if settings.folds() && *len > settings.capacity() { len - settings.slots } else { 0 }
    }

    fn score_tokens(&mut self, _: &Batch, _: &[u32], _: &mut Vec<TokenScore>) -> Result<(), Error> {
        Err(Error::InvalidBatch("nothing here scores".into()))
    }

    fn reserve(&mut self, _: &Extras) -> Result<(), Error> {
        Ok(())
    }

    fn load_adapter(&mut self, _: &Adapter) -> Result<AdapterId, Error> {
        self.adapters += 1;
        Ok(AdapterId(self.adapters))
    }

    fn unload_adapter(&mut self, _: AdapterId) -> Result<(), Error> {
        Ok(())
    }

    fn max_batch_rows(&self) -> usize {
        512
    }

    fn memory(&self) -> MemoryUse {
        MemoryUse::default()
    }
}

/// A server for one test.
pub struct TestServer {
    pub state: AppState,
    pub router: Router,
    pub gate: Arc<Gate>,
    _engine: EngineThread,
}

impl TestServer {
    pub fn start() -> Self {
        Self::with(ServerConfig::default(), 8)
    }

    /// A server with these settings and a cache of `blocks` blocks.
    pub fn with(config: ServerConfig, blocks: u32) -> Self {
        Self::with_template(config, blocks, TEMPLATE)
    }

    /// The same with another chat template.
    pub fn with_template(config: ServerConfig, blocks: u32, template: &str) -> Self {
        Self::build(config, blocks, template, None)
    }

    /// The same with a vision model.
    pub fn seeing(config: ServerConfig, blocks: u32, vision: Arc<VisionModel>) -> Self {
        Self::build(config, blocks, TEMPLATE, Some(vision))
    }

    fn build(config: ServerConfig, blocks: u32, template: &str, vision: Option<Arc<VisionModel>>) -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        write_checkpoint(folder.path(), template);
        let checkpoint = Checkpoint::open(folder.path()).expect("a small checkpoint");
        let mut processor = Processor::load(&checkpoint).expect("its tokenizer");
        if vision.is_some() {
            processor.see_images(None);
        }
        let model_config = checkpoint.config.clone();
        let plan = CachePlan {
            geometry: CacheGeometry::of(&model_config),
            slot_type: SlotType::F16,
            side: SideArrays::default(),
            classes: vec![BlockClass { capacity: 512, blocks }],
        };
        let gate = Arc::new(Gate::default());
        let model = ScriptedModel {
            config: model_config,
            plan,
            gate: Arc::clone(&gate),
            blocks: HashMap::new(),
            latest: Default::default(),
            adapted: Vec::new(),
            adapters: 0,
            exported: Mutex::default(),
        };
        let registry = prometheus::Registry::new();
        let engine_config = EngineConfig {
            max_waiting: 32,
            snapshot_memory_bytes: if config.cache.snapshots { 1 << 20 } else { 0 },
            snapshot_interval: 64,
            ..EngineConfig::default()
        };
        let (engine, thread) =
            locket_engine::start(Box::new(model), engine_config, &registry).expect("the engine starts");
        let config = ServerConfig {
            served_model_names: vec!["tiny".into(), "org/tiny".into()],
            max_model_len: 512,
            fingerprint: checkpoint.fingerprint,
            ..config
        };
        let state = AppState::seeing(config, engine, Arc::new(processor), registry, vision);
        let state = state.expect("good settings");
        Self { router: locket_server::router(state.clone()), state, gate, _engine: thread }
    }

    /// The answer to any request.
    pub async fn send(&self, request: Request<Body>) -> Answer {
        let response = self.router.clone().oneshot(request).await.expect("never fails");
        let (head, body) = response.into_parts();
        let bytes = to_bytes(body, 1 << 24).await.expect("a whole body");
        Answer {
            status: head.status,
            headers: head.headers,
            text: String::from_utf8(bytes.to_vec()).expect("UTF-8"),
        }
    }

    pub async fn get(&self, path: &str) -> Answer {
        self.send(Request::get(path).body(Body::empty()).expect("a request")).await
    }

    pub async fn post(&self, path: &str, body: &Value) -> Answer {
        self.send(post(path, body.to_string())).await
    }

    /// A chat with one user message and these other fields.
    pub async fn chat(&self, content: &str, fields: Value) -> Answer {
        self.post("/v1/chat/completions", &chat_body(content, fields)).await
    }
}

pub fn chat_body(content: &str, fields: Value) -> Value {
    merged(json!({"messages": [{"role": "user", "content": content}], "temperature": 0}), fields)
}

/// `base` with the entries of `fields`.
pub fn merged(mut base: Value, fields: Value) -> Value {
    let (Value::Object(all), Value::Object(more)) = (&mut base, fields) else { panic!("objects") };
    all.extend(more);
    base
}

pub fn post(path: &str, body: impl Into<Body>) -> Request<Body> {
    Request::post(path).header("content-type", "application/json").body(body.into()).expect("a request")
}

/// A response that has been read to its end.
pub struct Answer {
    pub status: StatusCode,
    pub headers: HeaderMap,
    pub text: String,
}

impl Answer {
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.text).unwrap_or_else(|error| panic!("{error}: {}", self.text))
    }

    #[track_caller]
    pub fn ok(&self) -> Value {
        assert_eq!(self.status, 200, "{}", self.text);
        self.json()
    }

    #[track_caller]
    pub fn ok_status(&self) {
        assert_eq!(self.status, 200, "{}", self.text);
    }

    pub fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", |value| value.to_str().expect("ASCII"))
    }

    /// Checks status, code and the four keys of an error.
    #[track_caller]
    pub fn is_error(&self, status: u16, code: impl Into<Value>) -> Value {
        assert_eq!(self.status.as_u16(), status, "{}", self.text);
        let error = self.json()["error"].clone();
        assert_eq!(error["code"], code.into(), "{}", self.text);
        let keys: Vec<_> = error.as_object().expect("an object").keys().cloned().collect();
        assert_eq!(keys, ["message", "type", "param", "code"]);
        assert!(!self.header("x-request-id").is_empty());
        error
    }

    /// The events of a stream, `[DONE]` included.
    pub fn events(&self) -> Vec<String> {
        assert_eq!(self.status, 200, "{}", self.text);
        assert_eq!(self.header("content-type"), "text/event-stream; charset=utf-8");
        let lines = self.text.split("\n\n").filter(|event| !event.is_empty() && !event.starts_with(':'));
        lines.map(|event| event.strip_prefix("data: ").expect("one data line").to_owned()).collect()
    }

    /// The chunks of a stream that ended well.
    pub fn chunks(&self) -> Vec<Value> {
        let mut events = self.events();
        assert_eq!(events.pop().as_deref(), Some("[DONE]"));
        events.iter().map(|event| serde_json::from_str(event).expect("JSON")).collect()
    }
}

/// A byte-level tokenizer, a chat template and weights of zeros: enough to be opened.
fn write_checkpoint(folder: &Path, template: &str) {
    let write = |name: &str, value: Value| {
        std::fs::write(folder.join(name), value.to_string()).expect("a writable folder");
    };
    write(
        "config.json",
        json!({
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": VOCAB_SIZE,
            "hidden_size": HIDDEN_SIZE, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 1,
            "num_key_value_heads": 1, "head_dim": 32, "max_position_embeddings": 512, "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0, "tie_word_embeddings": true, "hidden_act": "silu",
            "eos_token_id": IM_END, "bos_token_id": IM_START
        }),
    );
    write("tokenizer.json", tokenizer());
    write(
        "tokenizer_config.json",
        json!({
            "bos_token": "<|im_start|>", "eos_token": "<|im_end|>",
            "chat_template": template
        }),
    );
    std::fs::write(folder.join("model.safetensors"), zeros()).expect("a writable folder");
}

fn tokenizer() -> Value {
    let mut vocab: serde_json::Map<String, Value> =
        (0..=255u8).map(|byte| (byte_level(byte).to_string(), json!(byte))).collect();
    vocab.insert("42".into(), FORTY_TWO.into());
    let special = |id: u32, content: &str| {
        json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
               "normalized": false, "special": true})
    };
    let byte_level =
        json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false});
    json!({
        "version": "1.0", "truncation": null, "padding": null, "normalizer": null, "post_processor": null,
        "added_tokens": [special(IM_START, "<|im_start|>"), special(IM_END, "<|im_end|>"),
                         special(IM_END + 1, BEYOND)],
        "pre_tokenizer": byte_level, "decoder": byte_level,
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                  "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "vocab": vocab, "merges": ["4 2"]}
    })
}

/// The printable character that stands for a byte in byte-level vocabularies (GPT-2).
fn byte_level(byte: u8) -> char {
    let is_printable = |byte: u8| matches!(byte, 0x21..=0x7E | 0xA1..=0xAC | 0xAE..=0xFF);
    if is_printable(byte) {
        return char::from(byte);
    }
    let hidden_before = (0..byte).filter(|byte| !is_printable(*byte)).count() as u32;
    char::from_u32(256 + hidden_before).expect("below the surrogates")
}

fn zeros() -> Vec<u8> {
    let square = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"];
    let mlp = ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"];
    let norms = ["input_layernorm", "post_attention_layernorm"];
    let layer = |name: &&str| format!("model.layers.0.{name}.weight");
    let mut tensors = vec![("model.embed_tokens.weight".to_owned(), vec![VOCAB_SIZE, 32])];
    tensors.push(("model.norm.weight".into(), vec![32]));
    tensors.extend(square.iter().chain(&mlp).map(|name| (layer(name), vec![32, 32])));
    tensors.extend(norms.iter().map(|name| (layer(name), vec![32])));
    let (mut header, mut end) = (serde_json::Map::new(), 0);
    for (name, shape) in tensors {
        let start = end;
        end += 4 * shape.iter().product::<usize>();
        header.insert(name, json!({"dtype": "F32", "shape": shape, "data_offsets": [start, end]}));
    }
    let header = Value::from(header).to_string();
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend_from_slice(header.as_bytes());
    file.resize(file.len() + end, 0);
    file
}

//! The fields that chat and completions share: parsed and checked one by one.

use locket_engine::Pooling;

use super::{CacheChoice, LocketFields, Wanted, cache, structured::StructuredFields};
use crate::{
    adapters::Adapters,
    config::CacheBounds,
    error::{ApiError, ErrorKind, clip},
    fields::{Field, IgnoredFields},
    media::ImageSettings,
    visual::VisualConfig,
};

/// The limits that requests are checked against.
#[derive(Debug, Clone)]
pub(crate) struct Bounds {
    /// Names under which the model is served, the primary one first.
    pub(crate) served_model_names: Vec<String>,
    /// Adapters, each a model of its own to clients.
    pub(crate) adapters: Adapters,
    /// Token ids are below this.
    pub(crate) vocab_size: u32,
    /// Longest prompt plus answer.
    pub(crate) max_model_len: u32,
    /// Largest `n`.
    pub(crate) max_n: u32,
    /// What images may be.
    pub(crate) images: ImageSettings,
    /// Cache settings and their limits.
    pub(crate) cache: CacheBounds,
    /// What becomes of images; `None`: the model takes text only.
    pub(crate) visual: Option<VisualConfig>,
}

impl Bounds {
    /// The served name that the request asked for.
    ///
    /// # Errors
    /// 404 `model_not_found`.
    pub(crate) fn model(&self, field: &Field<'_, '_>) -> Result<String, ApiError> {
        let name = field.string()?;
        if self.serves(name) {
            return Ok(name.to_owned());
        }
        let message =
            format!("The model {:?} does not exist; served is {}.", clip(name), self.primary_model());
        Err(ApiError::field(ErrorKind::ModelNotFound, field.path(), message))
    }

    /// Whether the model is served under this name, with an adapter or without.
    pub(crate) fn serves(&self, name: &str) -> bool {
        self.served_model_names.iter().any(|served| served == name) || self.adapters.find(name).is_some()
    }

    /// The name used when a request gives none.
    pub(crate) fn primary_model(&self) -> String {
        self.served_model_names.first().cloned().unwrap_or_default()
    }
}

/// What a generating request asks for, apart from its prompt. `None` and empty mean "not given".
#[derive(Debug, Clone, Default)]
pub(crate) struct GenerationFields {
    pub(crate) model: Option<String>,
    pub(crate) max_tokens: Option<u32>,
    pub(crate) temperature: Option<f32>,
    pub(crate) top_p: Option<f32>,
    pub(crate) n: Option<u32>,
    pub(crate) seed: Option<i64>,
    pub(crate) stop: Vec<String>,
    pub(crate) frequency_penalty: f32,
    pub(crate) presence_penalty: f32,
    pub(crate) logit_bias: Vec<(u32, f32)>,
    pub(crate) stream: bool,
    pub(crate) stream_options: Option<StreamOptions>,
    pub(crate) top_k: Option<u32>,
    pub(crate) min_p: f32,
    pub(crate) repetition_penalty: Option<f32>,
    pub(crate) min_tokens: u32,
    pub(crate) ignore_eos: bool,
    pub(crate) stop_token_ids: Vec<u32>,
    pub(crate) include_stop: bool,
    pub(crate) keep_special_tokens: bool,
    pub(crate) bad_words: Vec<String>,
    pub(crate) allowed_token_ids: Option<Vec<u32>>,
    pub(crate) return_token_ids: bool,
    pub(crate) tokens_as_token_ids: bool,
    pub(crate) add_special_tokens: Option<bool>,
    pub(crate) truncate_prompt_tokens: Option<i64>,
    pub(crate) priority: i32,
    pub(crate) request_id: Option<String>,
    pub(crate) best_of: Option<u32>,
    pub(crate) cache_salt: Option<String>,
    pub(crate) locket: LocketFields,
    pub(crate) structured: StructuredFields,
    /// What the route wants of the answers beside the fields here.
    pub(crate) wanted: Wanted,
    /// Control tokens that the text shows, since calls or thoughts are told by them; set by the route.
    pub(crate) shown_token_ids: Vec<u32>,
    /// Alternatives per token; set by the route, whose fields for it differ.
    pub(crate) logprobs: Option<u32>,
    pub(crate) prompt_logprobs: Option<u32>,
    /// Answers begin with the prompt; set by the route of completions.
    pub(crate) echo: bool,
    /// The prompt is to be embedded; set by the route of embeddings.
    pub(crate) pooling: Option<Pooling>,
}

/// `stream_options`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct StreamOptions {
    /// A last chunk with the usage.
    pub(crate) include_usage: bool,
    /// Running totals in every chunk.
    pub(crate) continuous_usage_stats: bool,
}

impl GenerationFields {
    /// Reads one field. `false` means that it is not one of the shared ones.
    pub(crate) fn read(
        &mut self,
        name: &str,
        field: &Field<'_, '_>,
        bounds: &Bounds,
        ignored: &mut IgnoredFields,
    ) -> Result<bool, ApiError> {
        let vocab_size = bounds.vocab_size;
        match name {
            "model" => self.model = Some(bounds.model(field)?),
            "max_tokens" => self.max_tokens = Some(field.count(1, u32::MAX)?),
            "temperature" => self.temperature = Some(field.float(0.0, 2.0)?),
            "top_p" => self.top_p = Some(field.float(0.0, 1.0)?),
            "n" => self.n = Some(field.count(1, bounds.max_n)?),
            "seed" => self.seed = Some(field.integer(i64::MIN, i64::MAX)?),
            "stop" => self.stop = read_stop(field)?,
            "frequency_penalty" => self.frequency_penalty = field.float(-2.0, 2.0)?,
            "presence_penalty" => self.presence_penalty = field.float(-2.0, 2.0)?,
            "logit_bias" => self.logit_bias = read_logit_bias(field, vocab_size)?,
            "stream" => self.stream = field.boolean()?,
            "stream_options" => self.stream_options = Some(read_stream_options(field, ignored)?),
            "top_k" => self.top_k = Some(field.integer(-1, i64::from(u32::MAX))?.max(0) as u32),
            "min_p" => self.min_p = field.float(0.0, 1.0)?,
            "repetition_penalty" => self.repetition_penalty = Some(read_repetition_penalty(field)?),
            "min_tokens" => self.min_tokens = field.count(0, u32::MAX)?,
            "ignore_eos" => self.ignore_eos = field.boolean()?,
            "stop_token_ids" => self.stop_token_ids = field.token_ids(64, vocab_size)?,
            "include_stop_str_in_output" => self.include_stop = field.boolean()?,
            "skip_special_tokens" => self.keep_special_tokens = !field.boolean()?,
            "bad_words" => {
                self.bad_words = field.each(field.array(128)?, |word| read_bad_word(&word))?;
            }
            "allowed_token_ids" => {
                field.filled_array(usize::MAX)?;
                self.allowed_token_ids = Some(field.token_ids(vocab_size as usize, vocab_size)?);
            }
            "prompt_logprobs" => self.prompt_logprobs = Some(field.count(0, 20)?),
            "return_token_ids" => self.return_token_ids = field.boolean()?,
            "return_tokens_as_token_ids" => self.tokens_as_token_ids = field.boolean()?,
            "add_special_tokens" => self.add_special_tokens = Some(field.boolean()?),
            "truncate_prompt_tokens" => self.truncate_prompt_tokens = Some(read_truncation(field, bounds)?),
            "priority" => {
                self.priority = field.integer(i64::from(i32::MIN), i64::from(i32::MAX))? as i32;
            }
            "request_id" => self.request_id = Some(read_request_id(field)?),
            "best_of" => self.best_of = Some(field.count(1, 128)?),
            "use_beam_search" => {
                if field.boolean()? {
                    return Err(field.unsupported("there is no beam search"));
                }
            }
            "length_penalty" => {
                if field.float(f64::MIN, f64::MAX)? != 1.0 {
                    return Err(field.unsupported("there is no beam search"));
                }
            }
            "cache_salt" => self.cache_salt = Some(cache::read_salt(field)?),
            "locket" => self.locket = LocketFields::read(field, bounds)?,
            _ => return self.structured.read(name, field, ignored),
        }
        Ok(true)
    }

    /// Checks what fields say together; called when all have been read. `best_of_kind` is the
    /// error for a `best_of` other than `n`.
    pub(crate) fn check_together(&self, best_of_kind: ErrorKind) -> Result<(), ApiError> {
        if self.stream_options.is_some() && !self.stream {
            let message = "`stream_options` is only allowed with `stream: true`.";
            return Err(ApiError::field(ErrorKind::InvalidValue, "stream_options", message));
        }
        self.structured.check_together()?;
        if self.prompt_logprobs.is_some() && self.stream {
            let message = "`prompt_logprobs` is not possible with `stream: true`.";
            return Err(ApiError::field(ErrorKind::InvalidValue, "prompt_logprobs", message));
        }
        if self.best_of.is_some_and(|best_of| best_of != self.choices()) {
            let message = "`best_of` must equal `n`: no other choices are generated.";
            return Err(ApiError::field(best_of_kind, "best_of", message));
        }
        if let Some((outer, inner)) = self.cache_salt.as_ref().zip(self.locket.cache_salt.as_ref())
            && outer != inner
        {
            let message = "`cache_salt` and `locket.cache_salt` are different; give one of them.";
            return Err(ApiError::field(ErrorKind::InvalidValue, "cache_salt", message));
        }
        Ok(())
    }

    /// How the sequence uses its block, apart from what follows from its prompt.
    pub(crate) fn cache(&self, bounds: &CacheBounds) -> CacheChoice {
        let scores_fully = bounds.scoring_full && self.prompt_scores().is_some();
        let default = || if scores_fully { CacheChoice::full() } else { CacheChoice::default_of(bounds) };
        self.locket.cache.unwrap_or_else(default)
    }

    /// Alternatives to compute per prompt token; `None`: prompts are not scored.
    pub(crate) fn prompt_scores(&self) -> Option<u32> {
        let echoed = self.logprobs.filter(|_| self.echo);
        // Where nothing is generated, the engine asks for something to be wanted of the prompt.
        let alone = (self.echo && self.max_tokens == Some(0)).then_some(0);
        [self.prompt_logprobs, echoed, alone].into_iter().flatten().max()
    }

    /// Who shares snapshots and remembered turns with this request: those with the same bytes.
    pub(crate) fn salt(&self) -> &[u8] {
        self.cache_salt.as_ref().or(self.locket.cache_salt.as_ref()).map_or(&[], String::as_bytes)
    }

    /// `n`.
    pub(crate) fn choices(&self) -> u32 {
        self.n.unwrap_or(1)
    }

    /// `stream_options`, absent counting as all off.
    pub(crate) fn stream_options(&self) -> StreamOptions {
        self.stream_options.unwrap_or_default()
    }
}

fn read_stop(field: &Field<'_, '_>) -> Result<Vec<String>, ApiError> {
    const MAX_STOPS: usize = 16;
    const MAX_BYTES: usize = 256;
    if field.value().is_string() {
        return Ok(vec![field.short_string(MAX_BYTES)?.to_owned()]);
    }
    field.each(field.array(MAX_STOPS)?, |item| item.short_string(MAX_BYTES).map(str::to_owned))
}

/// All errors name the field itself: its keys are data, not fields.
fn read_logit_bias(field: &Field<'_, '_>, vocab_size: u32) -> Result<Vec<(u32, f32)>, ApiError> {
    const MAX_ENTRIES: usize = 1024;
    let entries = field.object()?;
    if entries.len() > MAX_ENTRIES {
        let reason = format!("has {} entries, but may have at most {MAX_ENTRIES}", entries.len());
        return Err(field.error(ErrorKind::ArrayAboveMaxLength, reason));
    }
    let mut biases: Vec<(u32, f32)> = Vec::with_capacity(entries.len());
    field.entries(|key, value| {
        let is_decimal = !key.is_empty() && key.bytes().all(|byte| byte.is_ascii_digit());
        let id = key.parse::<u32>().ok().filter(|id| is_decimal && *id < vocab_size);
        let Some(id) = id else {
            let reason =
                format!("has the key {:?}, but keys must be token ids below {vocab_size}", clip(key));
            return Err(field.error(ErrorKind::InvalidValue, reason));
        };
        let bias =
            value.float(-100.0, 100.0).map_err(|error| ApiError { param: Some(field.path()), ..error })?;
        // `7` and `07` are one token; the later entry counts.
        biases.retain(|(known, _)| *known != id);
        biases.push((id, bias));
        Ok(())
    })?;
    Ok(biases)
}

fn read_stream_options(
    field: &Field<'_, '_>,
    ignored: &mut IgnoredFields,
) -> Result<StreamOptions, ApiError> {
    let mut options = StreamOptions::default();
    field.entries(|name, inner| {
        match name {
            "include_usage" => options.include_usage = inner.boolean()?,
            "continuous_usage_stats" => options.continuous_usage_stats = inner.boolean()?,
            // Accepted; no padding is sent.
            "include_obfuscation" => drop(inner.boolean()?),
            _ => ignored.push(&inner),
        }
        Ok(())
    })?;
    Ok(options)
}

fn read_repetition_penalty(field: &Field<'_, '_>) -> Result<f32, ApiError> {
    let penalty = field.float(0.0, 10.0)?;
    if penalty <= 0.0 {
        return Err(field.error(ErrorKind::DecimalBelowMinValue, "must be greater than 0"));
    }
    Ok(penalty)
}

fn read_bad_word(field: &Field<'_, '_>) -> Result<String, ApiError> {
    let word = field.short_string(256)?;
    if word.trim_start().is_empty() {
        return Err(field.error(ErrorKind::EmptyString, "must not consist of blanks only"));
    }
    Ok(word.to_owned())
}

/// -1 or the number of prompt tokens to keep.
fn read_truncation(field: &Field<'_, '_>, bounds: &Bounds) -> Result<i64, ApiError> {
    let tokens = field.integer(-1, i64::from(bounds.max_model_len))?;
    if tokens == 0 {
        return Err(field.error(ErrorKind::InvalidValue, "must be -1 or at least 1"));
    }
    Ok(tokens)
}

fn read_request_id(field: &Field<'_, '_>) -> Result<String, ApiError> {
    let id = field.short_string(128)?;
    if !is_request_id(id) {
        return Err(field.error(ErrorKind::InvalidValue, "must be visible ASCII characters"));
    }
    Ok(id.to_owned())
}

/// Whether a client's `x-request-id` may be echoed.
pub(crate) fn is_request_id(text: &str) -> bool {
    (1..=128).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_graphic())
}

/// Bounds for tests.
#[cfg(test)]
pub(crate) fn test_bounds() -> Bounds {
    Bounds {
        served_model_names: vec!["tiny".into(), "org/alias".into()],
        adapters: Adapters::default(),
        vocab_size: 300,
        max_model_len: 128,
        max_n: 16,
        images: ImageSettings::default(),
        cache: CacheBounds::default(),
        visual: None,
    }
}

/// The same of a model that sees.
#[cfg(test)]
pub(crate) fn seeing_bounds() -> Bounds {
    Bounds { visual: Some(VisualConfig::default()), ..test_bounds() }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::known_fields::Route;

    fn read(body: Value) -> Result<GenerationFields, ApiError> {
        let (bounds, mut ignored) = (test_bounds(), IgnoredFields::default());
        let mut fields = GenerationFields::default();
        Field::root(&body).entries(|name, field| {
            if Route::Completions.is_to_be_read(name, &field, &mut ignored)? {
                assert!(fields.read(name, &field, &bounds, &mut ignored)?, "{name}");
            }
            Ok(())
        })?;
        fields.check_together(ErrorKind::UnsupportedValue)?;
        Ok(fields)
    }

    #[test]
    fn good_values() {
        let fields = read(json!({
            "model": "org/alias", "max_tokens": 3.0, "temperature": 0, "top_p": 1, "n": 2, "best_of": 2,
            "seed": -5, "stop": "x", "logit_bias": {"7": 1, "8": -100}, "stream": true,
            "stream_options": {"include_usage": true, "include_obfuscation": false}, "top_k": -1,
            "min_p": 0.1, "repetition_penalty": 1.1, "min_tokens": 1, "ignore_eos": true,
            "stop_token_ids": [1, 299], "skip_special_tokens": false, "bad_words": ["a"],
            "allowed_token_ids": [1], "priority": -3, "request_id": "abc", "length_penalty": 1.0,
            "use_beam_search": false, "response_format": {"type": "text"}, "truncate_prompt_tokens": -1,
            "user": "u", "cache_salt": "s", "echo_is_unknown_here": 1, "presence_penalty": null
        }))
        .expect("all valid");
        assert_eq!(fields.model.as_deref(), Some("org/alias"));
        assert_eq!((fields.max_tokens, fields.n, fields.top_k), (Some(3), Some(2), Some(0)));
        assert_eq!(fields.logit_bias, [(7, 1.0), (8, -100.0)]);
        assert!(fields.keep_special_tokens && fields.stream_options().include_usage);
        assert_eq!(fields.stop, ["x"]);
        assert_eq!(fields.presence_penalty, 0.0);
    }

    #[test]
    fn bad_values() {
        use ErrorKind::*;
        let many_stops: Vec<_> = (0..17).map(|i| i.to_string()).collect();
        let many_biases: serde_json::Map<_, _> = (0..1025).map(|i| (format!("{i:04}"), json!(1))).collect();
        let rows = [
            (json!({"model": "other"}), ModelNotFound, "model"),
            (json!({"model": 3}), InvalidType, "model"),
            (json!({"max_tokens": 0}), IntegerBelowMinValue, "max_tokens"),
            (json!({"max_tokens": 1.5}), InvalidType, "max_tokens"),
            (json!({"temperature": 2.1}), DecimalAboveMaxValue, "temperature"),
            (json!({"temperature": -1}), DecimalBelowMinValue, "temperature"),
            (json!({"top_p": 1.1}), DecimalAboveMaxValue, "top_p"),
            (json!({"n": 0}), IntegerBelowMinValue, "n"),
            (json!({"n": 17}), IntegerAboveMaxValue, "n"),
            (json!({"seed": u64::MAX}), IntegerAboveMaxValue, "seed"),
            (json!({"stop": ""}), EmptyString, "stop"),
            (json!({"stop": ["a", ""]}), EmptyString, "stop[1]"),
            (json!({"stop": [3]}), InvalidType, "stop[0]"),
            (json!({"stop": 3}), InvalidType, "stop"),
            (json!({ "stop": many_stops }), ArrayAboveMaxLength, "stop"),
            (json!({"stop": "x".repeat(257)}), StringAboveMaxLength, "stop"),
            (json!({"frequency_penalty": 3}), DecimalAboveMaxValue, "frequency_penalty"),
            (json!({"presence_penalty": -3}), DecimalBelowMinValue, "presence_penalty"),
            (json!({"logit_bias": []}), InvalidType, "logit_bias"),
            (json!({"logit_bias": {"300": 1}}), InvalidValue, "logit_bias"),
            (json!({"logit_bias": {"+3": 1}}), InvalidValue, "logit_bias"),
            (json!({"logit_bias": {"3": 101}}), DecimalAboveMaxValue, "logit_bias"),
            (json!({"logit_bias": {"3": "x"}}), InvalidType, "logit_bias"),
            (json!({ "logit_bias": many_biases }), ArrayAboveMaxLength, "logit_bias"),
            (json!({"stream": 1}), InvalidType, "stream"),
            (json!({"stream_options": {}}), InvalidValue, "stream_options"),
            (json!({"stream_options": {"include_usage": 1}}), InvalidType, "stream_options.include_usage"),
            (json!({"response_format": {}}), MissingRequiredParameter, "response_format.type"),
            (json!({"response_format": {"type": "xml"}}), InvalidValue, "response_format.type"),
            (json!({"top_k": -2}), IntegerBelowMinValue, "top_k"),
            (json!({"min_p": 2}), DecimalAboveMaxValue, "min_p"),
            (json!({"repetition_penalty": 0}), DecimalBelowMinValue, "repetition_penalty"),
            (json!({"repetition_penalty": 11}), DecimalAboveMaxValue, "repetition_penalty"),
            (json!({"min_tokens": -1}), IntegerBelowMinValue, "min_tokens"),
            (json!({"stop_token_ids": [300]}), IntegerAboveMaxValue, "stop_token_ids[0]"),
            (json!({"stop_token_ids": vec![1; 65]}), ArrayAboveMaxLength, "stop_token_ids"),
            (json!({"bad_words": [""]}), EmptyString, "bad_words[0]"),
            (json!({"bad_words": ["a", " "]}), EmptyString, "bad_words[1]"),
            (json!({"allowed_token_ids": []}), EmptyArray, "allowed_token_ids"),
            (json!({"allowed_token_ids": [-1]}), IntegerBelowMinValue, "allowed_token_ids[0]"),
            (json!({"truncate_prompt_tokens": 0}), InvalidValue, "truncate_prompt_tokens"),
            (json!({"truncate_prompt_tokens": 129}), IntegerAboveMaxValue, "truncate_prompt_tokens"),
            (json!({"priority": 1e10}), IntegerAboveMaxValue, "priority"),
            (json!({"request_id": "a b"}), InvalidValue, "request_id"),
            (json!({"best_of": 2}), UnsupportedValue, "best_of"),
            (json!({"use_beam_search": true}), UnsupportedParameter, "use_beam_search"),
            (json!({"length_penalty": 2}), UnsupportedParameter, "length_penalty"),
            (json!({"cache_salt": ""}), EmptyString, "cache_salt"),
            (json!({"cache_salt": "a", "locket": {"cache_salt": "b"}}), InvalidValue, "cache_salt"),
            (json!({"user": "u".repeat(513)}), StringAboveMaxLength, "user"),
            (json!({"prompt_logprobs": -1}), IntegerBelowMinValue, "prompt_logprobs"),
            (json!({"kv_transfer_params": {}}), UnsupportedParameter, "kv_transfer_params"),
            // Document order decides.
            (json!({"top_p": 9, "n": 0}), DecimalAboveMaxValue, "top_p"),
            (json!({"n": 0, "top_p": 9}), IntegerBelowMinValue, "n"),
        ];
        for (body, kind, param) in rows {
            let error = read(body.clone()).expect_err("must fail");
            assert_eq!((error.kind, error.param.as_deref()), (kind, Some(param)), "{body}");
            assert!(error.message.len() < 300, "{}", error.message);
        }
    }
}

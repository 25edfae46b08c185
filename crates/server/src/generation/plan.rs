//! Prompt ids and fields to the engine's request: lengths, defaults, stop tokens, cache.

use locket_engine::{GenerationRequest, SamplingParams};
use locket_model::{
    kv_cache::{CacheMethod, CacheSettings},
    load::GenerationDefaults,
};

use super::{Bounds, CacheChoice, GenerationFields};
use crate::{
    chat_ids::PromptIds,
    error::{ApiError, ErrorKind},
};

/// Which field holds the prompt, for errors about its length.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum PromptSource {
    /// `messages`
    Messages,
    /// `prompt`
    Prompt,
    /// `input` of `/v1/responses`
    Input,
    /// `input` of `/v1/embeddings`
    Embedded,
}

impl PromptSource {
    /// The field's name.
    pub(crate) fn param(self) -> &'static str {
        match self {
            Self::Messages => "messages",
            Self::Prompt => "prompt",
            Self::Input | Self::Embedded => "input",
        }
    }

    /// Names the one of several prompts that an error about one prompt is about.
    pub(crate) fn of_item(self, error: ApiError, index: usize) -> ApiError {
        let name = self.param();
        let path = format!("{name}[{index}]");
        let message = error.message.replace(&format!("`{name}`"), &format!("`{path}`"));
        let param = error.param.map(|param| if param == name { path } else { param });
        ApiError { param, message, ..error }
    }

    /// Whether the prompt may come back, longer by an answer.
    fn is_chat(self) -> bool {
        matches!(self, Self::Messages | Self::Input)
    }

    /// Longest answer when no limit is named, before the context cuts it short.
    pub(crate) fn default_max_tokens(self, server_default: u32) -> u32 {
        match self {
            Self::Messages | Self::Input => server_default,
            // The API's own default of `/v1/completions`.
            Self::Prompt => server_default.min(16),
            Self::Embedded => 0,
        }
    }
}

/// How long a prompt is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct PromptLength {
    /// Rows that are computed: tokens, and visual tokens that were not dropped.
    pub(crate) rows: usize,
    /// Positions that it takes: what was dropped may have some too.
    pub(crate) positions: usize,
}

impl From<usize> for PromptLength {
    fn from(tokens: usize) -> Self {
        Self { rows: tokens, positions: tokens }
    }
}

impl PromptLength {
    fn of(prompt: &PromptIds) -> Self {
        let rows = prompt.ids.len();
        Self {
            rows,
            positions: rows.saturating_add(usize::try_from(prompt.images.gaps).unwrap_or(usize::MAX)),
        }
    }
}

/// What planning needs besides the request.
pub(crate) struct Plan<'a> {
    /// The fields.
    pub(crate) fields: &'a GenerationFields,
    /// Limits.
    pub(crate) bounds: &'a Bounds,
    /// Longest answer when no limit is named.
    pub(crate) default_max_tokens: u32,
    /// Where the prompt came from.
    pub(crate) source: PromptSource,
}

impl Plan<'_> {
    /// Keeps the last tokens of a prompt if the request says so. -1 keeps what fits beside the answer.
    pub(crate) fn truncate(&self, prompt: &mut PromptIds) {
        let Some(keep) = self.fields.truncate_prompt_tokens else { return };
        let keep = usize::try_from(keep).unwrap_or(self.room() as usize);
        prompt.truncate_front(keep);
    }

    /// Tokens of prompt that fit beside the answer. Where no length is named, that is the default,
    /// at most half the context.
    pub(crate) fn room(&self) -> u32 {
        let limit = self.limit();
        let answer = self.fields.max_tokens.unwrap_or_else(|| self.default_max_tokens.min(limit / 2));
        limit.saturating_sub(answer).max(1)
    }

    /// Whether the request asks what became of its images.
    pub(crate) fn wants_report(&self) -> bool {
        self.fields.locket.visual.as_ref().is_some_and(|visual| visual.report)
    }

    fn cache(&self) -> CacheChoice {
        self.fields.cache(&self.bounds.cache)
    }

    /// Longest prompt plus answer: a method that keeps every token ends where its block does.
    fn limit(&self) -> u32 {
        self.limit_beside(0)
    }

    /// The same in positions, where `gaps` of them have no rows and so no slots.
    fn limit_beside(&self, gaps: usize) -> u32 {
        let limit = self.bounds.max_model_len;
        let of_block = self.bounds.cache.max_full_len;
        let gaps = u32::try_from(gaps).unwrap_or(u32::MAX);
        if self.cache().folds() { limit } else { limit.min(of_block.saturating_add(gaps)) }
    }

    /// The longest answer of this prompt in tokens.
    ///
    /// # Errors
    /// 400 `context_length_exceeded` with all numbers.
    pub(crate) fn max_tokens(&self, prompt: impl Into<PromptLength>) -> Result<u32, ApiError> {
        let PromptLength { rows, positions: prompt_tokens } = prompt.into();
        let limit = self.limit_beside(prompt_tokens.saturating_sub(rows));
        let asked = self.fields.max_tokens;
        let total = (prompt_tokens as u64).saturating_add(u64::from(asked.unwrap_or(1)));
        if total <= u64::from(limit) {
            // The prompt is shorter than the limit, which is a `u32`.
            let left = limit - prompt_tokens as u32;
            let max_tokens = asked.unwrap_or_else(|| left.min(self.default_max_tokens));
            return self.check_min_tokens(max_tokens);
        }
        let request = match asked {
            Some(0) => format!("the prompt has {prompt_tokens} tokens"),
            Some(asked) => {
                format!("{prompt_tokens} tokens of prompt and {asked} of answer are {total}")
            }
            None => format!("the prompt has {prompt_tokens} tokens, which leaves none for the answer"),
        };
        let param = self.source.param();
        // Clients look for these first words.
        let mut message = format!("This model's maximum context length is {limit} tokens, but {request}");
        message.push_str(&format!(". Shorten `{param}`"));
        if asked != Some(0) {
            message.push_str(" or the answer");
        }
        if limit < self.bounds.max_model_len {
            message.push_str(", or name a method in `locket.kv_cache.method` that folds");
        }
        message.push('.');
        Err(ApiError::field(ErrorKind::ContextLengthExceeded, param, message))
    }

    /// Whether the answer must end, or the request fail, before anything is folded.
    fn requires_exact(&self) -> bool {
        self.fields.locket.require_exact.unwrap_or(self.bounds.cache.require_exact)
    }

    /// Refuses a prompt that would be folded where that is not allowed.
    fn check_exact(&self, prompt_tokens: usize, settings: &CacheSettings) -> Result<(), ApiError> {
        let slots = settings.slots;
        if !settings.folds() || !self.requires_exact() || prompt_tokens <= slots as usize {
            return Ok(());
        }
        let (param, cache) = (self.source.param(), &self.bounds.cache);
        let mut fixes = vec![format!("shorten `{param}`")];
        if prompt_tokens <= cache.max_slots as usize && settings.method != CacheMethod::Lococo {
            fixes.push(format!("raise `locket.kv_cache.slots` (at most {})", cache.max_slots));
        }
        if cache.allowed.contains(&CacheMethod::Full) && prompt_tokens < cache.max_full_len as usize {
            fixes.push("name the method `full`".into());
        }
        fixes.push("set `locket.require_exact` to false".into());
        let message = format!(
            "The prompt has {prompt_tokens} tokens, but attention is exact for {slots} only, and an exact \
             answer is required: {}.",
            fixes.join(", or ")
        );
        Err(ApiError::field(ErrorKind::ExactLengthExceeded, param, message))
    }

    /// How the sequence of a prompt uses its block. One that can never fold keeps everything in a
    /// block of its own size, whatever the method; but a chat that comes back, longer, needs its
    /// own method's snapshots.
    fn settings(&self, prompt: &PromptIds, tokens: u32) -> CacheSettings {
        let choice = self.cache();
        let comes_back = self.source.is_chat() && self.bounds.cache.snapshots;
        if tokens <= choice.slots && !comes_back {
            return CacheSettings::full(tokens);
        }
        choice.settings(&self.bounds.cache, tokens, prompt.pinned)
    }

    fn check_min_tokens(&self, max_tokens: u32) -> Result<u32, ApiError> {
        let min_tokens = self.fields.min_tokens;
        if min_tokens <= max_tokens {
            return Ok(max_tokens);
        }
        let message =
            format!("`min_tokens` is {min_tokens}, but the answer has at most {max_tokens} tokens.");
        Err(ApiError::field(ErrorKind::IntegerAboveMaxValue, "min_tokens", message))
    }

    /// The engine's request for one prompt.
    ///
    /// # Errors
    /// As [`Self::max_tokens`]; 400 `exact_length_exceeded`.
    pub(crate) fn request(
        &self,
        request_id: &str,
        prompt: &PromptIds,
        sampling: SamplingParams,
    ) -> Result<GenerationRequest, ApiError> {
        let prompt_ids = prompt.ids.clone();
        let max_tokens = self.max_tokens(PromptLength::of(prompt))?;
        let tokens = (prompt_ids.len() as u32).saturating_add(max_tokens).min(self.bounds.max_model_len);
        let cache = self.settings(prompt, tokens);
        self.check_exact(prompt_ids.len(), &cache)?;
        Ok(GenerationRequest {
            request_id: request_id.to_owned(),
            prompt_ids,
            n: self.fields.choices(),
            max_tokens,
            sampling,
            logprobs: self.fields.logprobs,
            prompt_logprobs: self.fields.prompt_scores(),
            pooling: self.fields.pooling,
            cache,
            priority: self.fields.priority,
            use_snapshots: self.bounds.cache.snapshots,
            snapshot_at: prompt.snapshot_at,
            salt: self.fields.salt().to_vec(),
            require_exact: self.requires_exact(),
            steering: None,
            visual: prompt.images.spans.clone(),
            adapter: None,
        })
    }
}

/// How to sample, the same for all prompts of a request: fields, else the checkpoint's `defaults`,
/// else the API's.
pub(crate) fn sampling(
    fields: &GenerationFields,
    defaults: GenerationDefaults,
    eos_token_ids: &[u32],
    bad_words: Vec<Vec<u32>>,
) -> SamplingParams {
    let mut stop_token_ids = fields.stop_token_ids.clone();
    if !fields.ignore_eos {
        stop_token_ids.extend_from_slice(eos_token_ids);
    }
    stop_token_ids.sort_unstable();
    stop_token_ids.dedup();
    SamplingParams {
        temperature: fields.temperature.or(defaults.temperature).unwrap_or(1.0),
        top_p: fields.top_p.or(defaults.top_p).unwrap_or(1.0),
        top_k: fields.top_k.or(defaults.top_k).unwrap_or(0),
        min_p: fields.min_p,
        repetition_penalty: fields.repetition_penalty.or(defaults.repetition_penalty).unwrap_or(1.0),
        frequency_penalty: fields.frequency_penalty,
        presence_penalty: fields.presence_penalty,
        logit_bias: fields.logit_bias.clone(),
        allowed_token_ids: fields.allowed_token_ids.clone(),
        bad_words,
        // The same 64 bits; negative seeds are as good as others.
        seed: fields.seed.map(|seed| seed as u64),
        stop_token_ids,
        min_tokens: fields.min_tokens,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::generation::test_bounds;

    /// `prompt_tokens >= max_model_len`, or prompt and asked answer above it, fail with all numbers.
    #[test]
    fn lengths() {
        let bounds = test_bounds();
        let check = |asked: Option<u32>, min_tokens: u32, prompt: usize| {
            let fields = GenerationFields { max_tokens: asked, min_tokens, ..GenerationFields::default() };
            let plan = Plan {
                fields: &fields,
                bounds: &bounds,
                default_max_tokens: 40,
                source: PromptSource::Messages,
            };
            plan.max_tokens(prompt)
        };
        assert_eq!(check(None, 0, 10), Ok(40));
        assert_eq!(check(None, 0, 100), Ok(28));
        assert_eq!(check(Some(28), 0, 100), Ok(28));
        let error = check(Some(29), 0, 100).expect_err("129 tokens");
        assert_eq!(
            (error.kind, error.param.as_deref()),
            (ErrorKind::ContextLengthExceeded, Some("messages"))
        );
        for number in ["128", "100", "29", "129"] {
            assert!(error.message.contains(number), "{}", error.message);
        }
        assert_eq!(check(None, 0, 128).expect_err("full").kind, ErrorKind::ContextLengthExceeded);
        assert_eq!(
            check(Some(u32::MAX), 0, usize::MAX).expect_err("huge").kind,
            ErrorKind::ContextLengthExceeded
        );
        assert_eq!(check(Some(5), 6, 10).expect_err("contradiction").param.as_deref(), Some("min_tokens"));
    }

    #[test]
    fn sampling_takes_fields_then_the_checkpoints_defaults() {
        let defaults = GenerationDefaults { temperature: Some(0.5), top_k: Some(7), ..Default::default() };
        let mut fields = GenerationFields {
            top_k: Some(3),
            stop_token_ids: vec![9, 2],
            seed: Some(-1),
            ..GenerationFields::default()
        };
        let params = sampling(&fields, defaults, &[2, 5], vec![vec![1]]);
        assert_eq!((params.temperature, params.top_k, params.top_p), (0.5, 3, 1.0));
        assert_eq!((params.stop_token_ids, params.seed), (vec![2, 5, 9], Some(u64::MAX)));
        assert_eq!(params.bad_words, [[1]]);
        fields.ignore_eos = true;
        assert_eq!(sampling(&fields, defaults, &[2, 5], Vec::new()).stop_token_ids, [2, 9]);
    }

    /// What can never fold keeps everything in a block of its own size, but for chats that will be
    /// longer when they come back; what keeps everything ends with its block.
    #[test]
    fn settings_follow_the_request_and_the_length() {
        let mut bounds = test_bounds();
        bounds.max_model_len = 10_000;
        bounds.cache.max_full_len = 500;
        bounds.cache.slots = 64;
        bounds.cache.method = CacheMethod::Observed;
        let request = |snapshots, source, method: Option<CacheMethod>, prompt: usize| {
            let mut bounds = bounds.clone();
            bounds.cache.snapshots = snapshots;
            bounds.cache.method = method.unwrap_or(bounds.cache.method);
            let fields = GenerationFields { max_tokens: Some(14), ..GenerationFields::default() };
            let plan = Plan { fields: &fields, bounds: &bounds, default_max_tokens: 40, source };
            let prompt = PromptIds { pinned: 9, snapshot_at: Some(3), ..PromptIds::from(vec![0; prompt]) };
            plan.request("r", &prompt, SamplingParams::default())
        };
        let (chat, text) = (PromptSource::Messages, PromptSource::Prompt);
        let cache =
            |snapshots, source, prompt| request(snapshots, source, None, prompt).expect("it fits").cache;
        assert_eq!(cache(false, chat, 50), CacheSettings::full(64));
        assert_eq!(cache(true, text, 50), CacheSettings::full(64));
        let folding = cache(true, chat, 50);
        assert_eq!((folding.method, folding.slots, folding.sinks), (CacheMethod::Observed, 64, 9));
        assert_eq!(cache(false, text, 51), folding);
        assert_eq!(cache(true, chat, 5000), folding, "the same at any length");
        let full = |prompt| request(true, chat, Some(CacheMethod::Full), prompt);
        assert_eq!(full(486).expect("500 tokens").cache, CacheSettings::full(500));
        let error = full(487).expect_err("501 tokens");
        assert_eq!(error.kind, ErrorKind::ContextLengthExceeded);
        assert!(error.message.contains("500") && error.message.contains("kv_cache.method"), "{error:?}");
        let request = request(true, chat, None, 50).expect("it fits");
        assert_eq!((request.use_snapshots, request.snapshot_at), (true, Some(3)));
    }

    #[test]
    fn truncation_keeps_the_end() {
        let bounds = test_bounds();
        let truncated = |keep, asked| {
            let fields = GenerationFields {
                truncate_prompt_tokens: keep,
                max_tokens: asked,
                ..GenerationFields::default()
            };
            let plan = Plan {
                fields: &fields,
                bounds: &bounds,
                default_max_tokens: 40,
                source: PromptSource::Prompt,
            };
            let mut prompt = PromptIds {
                pinned: 20,
                snapshot_at: Some(150),
                ..PromptIds::from((0..200).collect::<Vec<u32>>())
            };
            plan.truncate(&mut prompt);
            let cut = 200 - prompt.ids.len() as u32;
            assert_eq!(prompt.pinned, 20u32.saturating_sub(cut));
            assert_eq!(prompt.snapshot_at, (cut < 150).then(|| 150 - cut));
            (prompt.ids.len(), prompt.ids.last().copied())
        };
        assert_eq!(truncated(None, None), (200, Some(199)));
        assert_eq!(truncated(Some(5), None), (5, Some(199)));
        assert_eq!(truncated(Some(-1), Some(28)), (100, Some(199)));
        assert_eq!(truncated(Some(-1), None), (88, Some(199)));
    }
}

//! Whether an answer is thought about first, and how long: request fields to a mode and a budget.
//!
//! What is said first here wins: `thinking` and `thinking_token_budget`, `chat_template_kwargs`,
//! `reasoning_effort`, the operator's defaults. A template that has a switch is told; for others the
//! prompt's end is the switch ([`ReasoningProfile::prepare`]).

use std::sync::Arc;

use locket_processor::{
    Processor,
    reasoning::{ReasoningMode, ReasoningProfile, TemplateSwitches, ThoughtMarkers, ThoughtStart},
    steering::{PreludePlan, ThinkingPlan},
};
use serde_json::{Map, Value};

use crate::{
    config::{ConfigError, ReasoningConfig},
    error::{ApiError, ErrorKind},
    fields::{Field, IgnoredFields},
};

/// Values of `reasoning_effort`.
pub(crate) const EFFORTS: &[&str] = &["none", "minimal", "low", "medium", "high", "xhigh", "max"];

/// Answers leave this many of their tokens to what follows the thought.
const ANSWER_TOKENS: u32 = 64;

/// What a request says about thinking.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct ReasoningFields {
    effort: Option<&'static str>,
    /// `thinking.type`
    thinking: Option<ReasoningMode>,
    /// `thinking.budget_tokens`
    thinking_budget: Option<u32>,
    /// `thinking_token_budget`
    token_budget: Option<u32>,
}

impl ReasoningFields {
    /// Reads one field. `false` means that it is not one of these.
    pub(crate) fn read(
        &mut self,
        name: &str,
        field: &Field<'_, '_>,
        ignored: &mut IgnoredFields,
    ) -> Result<bool, ApiError> {
        match name {
            "reasoning_effort" => self.effort = Some(field.one_of(EFFORTS)?),
            "thinking" => self.read_thinking(field, ignored)?,
            "thinking_token_budget" => self.token_budget = Some(field.count(0, u32::MAX)?),
            _ => return Ok(false),
        }
        Ok(true)
    }

    fn read_thinking(&mut self, field: &Field<'_, '_>, ignored: &mut IgnoredFields) -> Result<(), ApiError> {
        field.entries(|name, inner| {
            match name {
                "type" => {
                    self.thinking = Some(match inner.one_of(&["enabled", "disabled", "auto"])? {
                        "enabled" => ReasoningMode::Slow,
                        "disabled" => ReasoningMode::Fast,
                        _ => ReasoningMode::Auto,
                    });
                }
                "budget_tokens" => self.thinking_budget = Some(inner.count(0, u32::MAX)?),
                _ => ignored.push(&inner),
            }
            Ok(())
        })?;
        if self.thinking.is_none() {
            return Err(field.missing("type"));
        }
        Ok(())
    }

    /// The budget and the field that gives it.
    fn budget(&self) -> Option<(u32, &'static str)> {
        let own = self.thinking_budget.map(|budget| (budget, "thinking.budget_tokens"));
        own.or(self.token_budget.map(|budget| (budget, "thinking_token_budget")))
    }

    /// Checks what the fields say together.
    pub(crate) fn check_together(&self) -> Result<(), ApiError> {
        if let Some((inner, outer)) = self.thinking_budget.zip(self.token_budget)
            && inner != outer
        {
            let message =
                "`thinking_token_budget` and `thinking.budget_tokens` are different; give one of them.";
            return Err(ApiError::field(ErrorKind::InvalidValue, "thinking_token_budget", message));
        }
        Ok(())
    }
}

/// Mode and largest budget of an effort.
fn effort_row(effort: &str) -> (ReasoningMode, Option<u32>) {
    match effort {
        "none" => (ReasoningMode::Fast, Some(0)),
        "minimal" => (ReasoningMode::Slow, Some(256)),
        "low" => (ReasoningMode::Slow, Some(1_024)),
        "medium" => (ReasoningMode::Auto, Some(4_096)),
        "high" => (ReasoningMode::Slow, Some(16_384)),
        // `xhigh` and `max`.
        _ => (ReasoningMode::Slow, None),
    }
}

/// How the served model thinks, and what the operator wants of it.
#[derive(Debug)]
pub(crate) struct Reasoning {
    /// None: the model has no thoughts.
    profile: Option<Arc<ReasoningProfile>>,
    switches: TemplateSwitches,
    mode: Option<ReasoningMode>,
    budget: Option<u32>,
    /// Control tokens in the markers, which are not hidden from the text.
    marker_ids: Arc<[u32]>,
}

impl Reasoning {
    /// Joins what the operator says with what the chat template shows.
    ///
    /// # Errors
    /// Markers that cannot work.
    pub(crate) fn new(config: &ReasoningConfig, processor: &Processor) -> Result<Self, ConfigError> {
        let fail = |reason: String| ConfigError { key: "reasoning", reason };
        let profile = processor.reasoning_profile(&config.profile).map_err(fail)?;
        let switches = processor.template_switches();
        if profile.is_none() && config.mode.is_some() {
            tracing::warn!("reasoning: the model has no profile, so its mode has no effect; set `open`");
        }
        let mut marker_ids = Vec::new();
        if let Some(profile) = &profile {
            for marker in profile.markers(&[]).all() {
                let ids = processor.encode(marker, false).map_err(|error| fail(error.to_string()))?;
                marker_ids.extend(ids.into_iter().filter(|id| processor.is_special(*id)));
            }
        }
        Ok(Self {
            profile: profile.map(Arc::new),
            switches,
            mode: config.mode,
            budget: config.budget,
            marker_ids: marker_ids.into(),
        })
    }

    /// What a request gets. Variables that tell the template are put into `kwargs`.
    ///
    /// # Errors
    /// 400: a budget for a thought that is not to be, or thinking asked of a model without thoughts.
    pub(crate) fn decide(
        &self,
        fields: &ReasoningFields,
        kwargs: &mut Map<String, Value>,
    ) -> Result<ReasoningChoice, ApiError> {
        let asked = asked_mode(fields, kwargs);
        self.check(fields, asked)?;
        let mode = asked.or(self.mode);
        let budget = match (fields.budget(), fields.effort) {
            (Some((tokens, _)), _) => Budget { tokens: Some(tokens), is_fixed: true },
            _ if mode == Some(ReasoningMode::Fast) => Budget { tokens: Some(0), is_fixed: true },
            (None, Some(effort)) => Budget { tokens: effort_row(effort).1, is_fixed: false },
            (None, None) => Budget { tokens: self.budget, is_fixed: false },
        };
        let key = self.switches.thinking_key();
        if let Some((key, mode)) = key.zip(mode) {
            match mode {
                ReasoningMode::Auto => drop(kwargs.shift_remove(key)),
                mode => drop(kwargs.insert(key.into(), (mode == ReasoningMode::Slow).into())),
            }
        }
        if let Some(effort) = fields.effort.filter(|_| self.switches.reasoning_effort) {
            kwargs.entry("reasoning_effort").or_insert_with(|| effort.into());
        }
        let is_told = key.is_some() || self.is_effort_told(fields, kwargs);
        Ok(ReasoningChoice { profile: self.profile.clone(), mode, is_told, budget })
    }

    /// Whether a template that knows efforts gets one, and nothing that wins over it says otherwise.
    fn is_effort_told(&self, fields: &ReasoningFields, kwargs: &Map<String, Value>) -> bool {
        let Some(effort) = kwargs.get("reasoning_effort").filter(|_| self.switches.reasoning_effort) else {
            return false;
        };
        let of_effort =
            effort.as_str().filter(|effort| EFFORTS.contains(effort)).map(|name| effort_row(name).0);
        said_mode(fields, kwargs).is_none_or(|mode| of_effort == Some(mode))
    }

    /// `asked` is the mode that the request itself names.
    fn check(&self, fields: &ReasoningFields, asked: Option<ReasoningMode>) -> Result<(), ApiError> {
        let budget = fields.budget().filter(|(tokens, _)| *tokens > 0);
        if self.profile.is_none() {
            let is_asked =
                fields.thinking == Some(ReasoningMode::Slow) && self.switches.thinking_key().is_none();
            let field = budget.map(|(_, field)| field).or(is_asked.then_some("thinking"));
            return field.map_or(Ok(()), |field| Err(no_thoughts(field)));
        }
        if let Some((tokens, field)) = budget
            && asked == Some(ReasoningMode::Fast)
        {
            let message =
                format!("`{field}` is {tokens}, but the request turns thinking off. Give one of both.");
            return Err(ApiError::field(ErrorKind::InvalidValue, field, message));
        }
        Ok(())
    }
}

/// The mode that a request names, whatever the operator prefers.
fn asked_mode(fields: &ReasoningFields, kwargs: &Map<String, Value>) -> Option<ReasoningMode> {
    said_mode(fields, kwargs).or_else(|| fields.effort.map(|effort| effort_row(effort).0))
}

/// The mode that it names by anything but an effort.
fn said_mode(fields: &ReasoningFields, kwargs: &Map<String, Value>) -> Option<ReasoningMode> {
    let told = ["enable_thinking", "thinking"].iter().find_map(|key| kwargs.get(*key)?.as_bool());
    let of_kwargs = told.map(|is_on| if is_on { ReasoningMode::Slow } else { ReasoningMode::Fast });
    let of_budget = || (fields.token_budget == Some(0)).then_some(ReasoningMode::Fast);
    fields.thinking.or_else(of_budget).or(of_kwargs)
}

fn no_thoughts(field: &'static str) -> ApiError {
    let message = format!(
        "`{field}` is not supported: this model has no thoughts that the server knows of. Its operator can \
         name their markers with the setting `reasoning.open`."
    );
    ApiError::field(ErrorKind::UnsupportedParameter, field, message)
}

/// Most thought tokens.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Budget {
    /// `None`: no limit.
    tokens: Option<u32>,
    /// The request named it; otherwise a short answer shortens it.
    is_fixed: bool,
}

impl Budget {
    /// The budget of an answer with so many tokens at most. What nobody asked for leaves room for the
    /// answer: 64 tokens, or half of a short one.
    fn within(self, max_tokens: u32) -> Option<u32> {
        let room = max_tokens.saturating_sub(ANSWER_TOKENS).max(max_tokens / 2);
        self.tokens.map(|tokens| if self.is_fixed { tokens } else { tokens.min(room) })
    }
}

/// What was decided for a request.
#[derive(Debug, Clone, Default)]
pub(crate) struct ReasoningChoice {
    profile: Option<Arc<ReasoningProfile>>,
    mode: Option<ReasoningMode>,
    /// The template has a switch for it.
    is_told: bool,
    budget: Budget,
}

impl ReasoningChoice {
    /// What the prompt's end is to say, for a model with thoughts.
    pub(crate) fn for_prompt(&self) -> Option<(Arc<ReasoningProfile>, Option<ReasoningMode>)> {
        let profile = self.profile.clone()?;
        Some((profile, self.mode.filter(|_| !self.is_told)))
    }

    /// The thought of an answer whose prompt ends as `start` says.
    ///
    /// # Errors
    /// Internal: markers without tokens, which were tried at start.
    pub(crate) fn thought(
        &self,
        reasoning: &Reasoning,
        processor: &Processor,
        parts: ThoughtParts<'_>,
    ) -> Result<Option<Thought>, ApiError> {
        let Some((profile, start)) = self.profile.as_deref().zip(parts.start) else { return Ok(None) };
        let budget = self.budget.within(parts.max_tokens);
        let mut plan: Option<Arc<dyn PreludePlan>> = None;
        if start != ThoughtStart::Content && (budget.is_some() || parts.is_constrained) {
            let thinking = ThinkingPlan::new(processor, profile, parts.call_openers, start, budget)
                .map_err(|error| ApiError::internal(&error.to_string()))?;
            plan = Some(Arc::new(thinking));
        }
        Ok(Some(Thought {
            markers: profile.markers(parts.call_openers),
            start,
            marker_ids: Arc::clone(&reasoning.marker_ids),
            requested: self.mode.map_or("default", ReasoningMode::name),
            plan,
        }))
    }
}

/// What is known of an answer that may have a thought.
#[derive(Debug, Clone, Copy)]
pub(crate) struct ThoughtParts<'a> {
    /// As the prompt ends; `None` for a prompt that is no conversation.
    pub(crate) start: Option<ThoughtStart>,
    /// Longest answer, thought included.
    pub(crate) max_tokens: u32,
    /// A grammar or calls follow.
    pub(crate) is_constrained: bool,
    /// Markers of tool calls, which end a thought.
    pub(crate) call_openers: &'a [String],
}

/// The thought in the texts of a request's choices.
#[derive(Debug, Clone)]
pub(crate) struct Thought {
    /// What separates it from the content.
    pub(crate) markers: Arc<ThoughtMarkers>,
    /// What the texts begin with.
    pub(crate) start: ThoughtStart,
    /// Control tokens that are shown to the text, since they are markers.
    pub(crate) marker_ids: Arc<[u32]>,
    /// Mode for the metrics: `fast`, `slow`, `auto`, or `default` if nobody named one.
    pub(crate) requested: &'static str,
    /// Its budget, or the grammar behind it.
    pub(crate) plan: Option<Arc<dyn PreludePlan>>,
}

#[cfg(test)]
mod tests;

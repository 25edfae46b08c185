//! Settings of reasoning as the server takes them.

use locket_processor::reasoning::{ReasoningMode, ReasoningSettings};
use locket_server::config::{ReasoningConfig, ReasoningField};

use super::reader::Reader;

/// Said where the budget of a thought is used up, unless the operator says something else.
const BUDGET_MESSAGE: &str = "I have thought long enough and answer now.";

pub(super) fn read(read: &Reader<'_>) -> ReasoningConfig {
    let budget_message = match read.text_if_set("reasoning.budget-message").as_deref() {
        Some("none") => String::new(),
        // A value has no blanks at its ends, and a word is not to run into the model's last one.
        text => format!("\n{}\n", text.unwrap_or(BUDGET_MESSAGE)),
    };
    ReasoningConfig {
        profile: ReasoningSettings {
            open: read.text_if_set("reasoning.open"),
            close: read.text_if_set("reasoning.close"),
            answer_open: read.text_if_set("reasoning.answer-open"),
            open_in_prompt: match read.text("reasoning.open-in-prompt").as_str() {
                "yes" => Some(true),
                "no" => Some(false),
                _ => None,
            },
            budget_message,
        },
        mode: match read.text("reasoning.mode").as_str() {
            "fast" => Some(ReasoningMode::Fast),
            "slow" => Some(ReasoningMode::Slow),
            "auto" => Some(ReasoningMode::Auto),
            _ => None,
        },
        budget: Some(read.integer("reasoning.budget") as u32),
        field: match read.text("reasoning.field").as_str() {
            "reasoning" => ReasoningField::Reasoning,
            "reasoning_content" => ReasoningField::ReasoningContent,
            _ => ReasoningField::Both,
        },
    }
}

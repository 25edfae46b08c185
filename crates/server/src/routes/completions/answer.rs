//! The unstreamed answer.

use axum::{
    Json,
    response::{IntoResponse, Response},
};

use super::CompletionRequest;
use crate::{
    echo::CharCounter,
    logprobs,
    openai::{Completion, CompletionChoice, Stamp},
    run::{Done, FinishedChoice, token_ids, token_style},
    state::AppState,
};

pub(super) fn respond(state: &AppState, request: &CompletionRequest, stamp: &Stamp, done: Done) -> Response {
    let fields = &request.generation;
    let per_prompt = fields.choices() as usize;
    // With one prompt its ids stand at the top, with several each choice has its own.
    let shown = |prompt: usize| fields.return_token_ids.then(|| done.prompts.get(prompt)).flatten();
    let is_single = done.prompts.len() == 1;
    let choices = (0..).zip(done.choices).map(|(index, choice): (u32, _)| CompletionChoice {
        prompt_token_ids: if is_single { None } else { shown(index as usize / per_prompt).cloned() },
        ..one_choice(state, request, index, choice)
    });
    Json(Completion {
        id: &stamp.id,
        object: "text_completion",
        created: stamp.created,
        model: &stamp.model,
        choices: choices.collect(),
        usage: Some(Some(done.usage)),
        system_fingerprint: &stamp.system_fingerprint,
        prompt_token_ids: if is_single { shown(0).map(Vec::as_slice) } else { None },
    })
    .into_response()
}

fn one_choice(
    state: &AppState,
    request: &CompletionRequest,
    index: u32,
    choice: FinishedChoice,
) -> CompletionChoice {
    let fields = &request.generation;
    let tokens = state.processor().as_ref();
    let echo = request.echoed.get((index / fields.choices()) as usize);
    let scores = choice.prompt_scores.as_deref();
    let logprobs = fields.logprobs.map(|count| {
        let echoed = echo.zip(scores);
        let echoed =
            echoed.map(|(echo, scores)| logprobs::echoed(echo, scores, count, tokens, token_style(fields)));
        let mut arrays = echoed.unwrap_or_default();
        let mut counter = CharCounter::behind(echo.map_or(0, |echo| echo.chars));
        logprobs::completions(&choice.tokens, tokens, token_style(fields), &mut counter, &mut arrays);
        arrays
    });
    let wanted = fields.prompt_logprobs.zip(scores);
    CompletionChoice {
        index,
        logprobs,
        finish_reason: Some(choice.finish.reason),
        stop_reason: Some(choice.finish.stop_reason),
        token_ids: fields.return_token_ids.then(|| token_ids(&choice.tokens)),
        prompt_token_ids: None,
        prompt_logprobs: wanted.map(|(count, scores)| logprobs::prompt(scores, count, tokens)),
        text: echo.map_or_else(String::new, |echo| echo.text.clone()) + &choice.text,
    }
}

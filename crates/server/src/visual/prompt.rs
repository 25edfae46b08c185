//! Visual tokens in a prompt: each placeholder becomes the rows of its image.

use std::sync::Arc;

use futures_util::future::try_join_all;
use locket_engine::VisualSpan;
use locket_vision::drop::Positions;

use super::{ImagePart, Picture, Seen, VisualFields, VisualReports, reports};
use crate::{
    chat_ids::PromptIds,
    error::{ApiError, ErrorKind},
    generation::{GenerationFields, Plan, PromptLength},
    state::AppState,
};

/// What images put into a prompt.
#[derive(Debug, Clone, Default)]
pub(crate) struct PromptImages {
    /// Visual tokens before any was dropped.
    pub(crate) tokens: u64,
    /// Those that went into the decoder.
    pub(crate) kept: u64,
    /// Positions that prompt and answer have no rows for.
    pub(crate) gaps: u64,
    /// The rows.
    pub(crate) spans: Vec<VisualSpan>,
    /// What became of each image.
    pub(crate) reports: Option<VisualReports>,
}

/// Sees the images of a prompt and puts their rows in place of its placeholders.
///
/// # Errors
/// 400 if prompt and answer are too long, before anything is seen; an image that cannot be decoded.
pub(crate) async fn see(state: &AppState, plan: &Plan<'_>, prompt: &mut PromptIds) -> Result<(), ApiError> {
    let Some(sight) = state.sight().filter(|_| !prompt.pictures.is_empty()) else { return Ok(()) };
    check_fields(plan)?;
    plan.max_tokens(prompt.planned_length())?;
    let pictures = prompt.pictures.clone();
    let seen = try_join_all(pictures.iter().map(|picture| sight.see(picture))).await?;
    for (picture, (seen, _)) in pictures.iter().zip(&seen) {
        let method = picture.settings.method.name();
        sight.metrics.count_tokens(method, seen.plan.run as usize, seen.plan.kept.len());
    }
    let rows: Vec<&Arc<Seen>> = seen.iter().map(|(seen, _)| seen).collect();
    prompt.expand(&rows);
    if plan.wants_report() {
        prompt.images.reports = Some(reports_of(&pictures, &seen));
    }
    Ok(())
}

/// What cannot be done with rows that are no tokens.
fn check_fields(plan: &Plan<'_>) -> Result<(), ApiError> {
    let fields = plan.fields;
    let refused = [
        ("truncate_prompt_tokens", fields.truncate_prompt_tokens.is_some()),
        ("prompt_logprobs", fields.prompt_logprobs.is_some()),
    ];
    let refused = refused.into_iter().find(|(_, is_given)| *is_given);
    refused.map_or(Ok(()), |(name, _)| {
        let message = format!("`{name}` is not possible with images.");
        Err(ApiError::field(ErrorKind::InvalidValue, name, message))
    })
}

/// Fetches the images of a request and plans their tokens, in their order.
///
/// # Errors
/// An image that cannot be fetched, or that is none.
pub(crate) async fn collect(
    state: &AppState,
    parts: Vec<ImagePart>,
    fields: &GenerationFields,
) -> Result<Vec<Arc<Picture>>, ApiError> {
    // A model that takes text only has refused them.
    let Some(sight) = state.sight() else { return Ok(Vec::new()) };
    let none = VisualFields::default();
    sight.collect(parts, fields.locket.visual.as_ref().unwrap_or(&none)).await
}

/// What would become of images in a prompt: they are seen, and nothing else is done.
///
/// # Errors
/// As [`collect`], and images that cannot be decoded.
pub(crate) async fn report(
    state: &AppState,
    parts: Vec<ImagePart>,
    fields: Option<&VisualFields>,
) -> Result<VisualReports, ApiError> {
    let Some(sight) = state.sight() else { return Ok(VisualReports::default()) };
    let pictures = sight.collect(parts, fields.unwrap_or(&VisualFields::default())).await?;
    let seen = try_join_all(pictures.iter().map(|picture| sight.see(picture))).await?;
    Ok(reports_of(&pictures, &seen))
}

/// What became of each of `pictures`, of which `seen` says whether they were kept from before.
fn reports_of(pictures: &[Arc<Picture>], seen: &[(Arc<Seen>, bool)]) -> VisualReports {
    let images = pictures.iter().zip(seen);
    let images = images.map(|(picture, (seen, kept))| (picture.as_ref(), seen.as_ref(), *kept));
    VisualReports(Arc::new(reports(images)))
}

impl PromptIds {
    /// The prompt's length when its images will be in it, from their sizes alone.
    pub(crate) fn planned_length(&self) -> PromptLength {
        let text = self.ids.len().saturating_sub(self.placeholders.len());
        let rows: usize = self.pictures.iter().map(|picture| picture.planned).sum();
        let positions = self.pictures.iter().map(|picture| match picture.settings.positions {
            Positions::Original => picture.layout.tokens(),
            Positions::Compact => picture.planned,
        });
        PromptLength { rows: text + rows, positions: text + positions.sum::<usize>() }
    }

    /// The prompt's tokens as clients are told: visual tokens that are dropped count too.
    pub(crate) fn counted_tokens(&self) -> usize {
        let dropped = self.images.tokens.saturating_sub(self.images.kept);
        let planned = self.placeholders.iter().zip(&self.pictures);
        let planned: usize = planned.map(|(_, picture)| picture.layout.tokens()).sum();
        (self.ids.len() - self.placeholders.len()) + planned + dropped as usize
    }

    /// The ids as clients are told, where images have not been seen: each is its placeholder's id, as
    /// often as it has tokens.
    pub(crate) fn counted_ids(&self, shown_id: u32) -> Vec<u32> {
        let mut ids = Vec::with_capacity(self.counted_tokens());
        let mut copied = 0;
        for (place, picture) in self.placeholders.iter().zip(&self.pictures) {
            let place = *place as usize;
            ids.extend_from_slice(self.ids.get(copied..place).unwrap_or_default());
            ids.resize(ids.len() + picture.layout.tokens(), shown_id);
            copied = place + 1;
        }
        ids.extend_from_slice(self.ids.get(copied..).unwrap_or_default());
        ids
    }

    /// Puts the rows of images in place of their placeholders, in order.
    fn expand(&mut self, images: &[&Arc<Seen>]) {
        let mut ids = Vec::with_capacity(self.ids.len());
        let mut copied = 0;
        for (place, seen) in self.placeholders.iter().zip(images) {
            let place = *place as usize;
            let Some(between) = self.ids.get(copied..place) else { return };
            ids.extend_from_slice(between);
            copied = place + 1;
            let (start, kept) = (ids.len() as u32, seen.plan.kept.len());
            let id = self.ids.get(place).copied().unwrap_or(0);
            ids.resize(ids.len() + kept, id);
            self.images.add(seen, start..ids.len() as u32);
        }
        ids.extend_from_slice(self.ids.get(copied..).unwrap_or_default());
        // Places behind an image move.
        let moved = |at: u32| {
            let images = self.placeholders.iter().zip(images).filter(|(place, _)| **place < at);
            let grown = images.map(|(_, seen)| seen.plan.kept.len() as u32).sum::<u32>();
            let replaced = self.placeholders.iter().filter(|place| **place < at).count() as u32;
            at + grown - replaced
        };
        (self.pinned, self.snapshot_at) = (moved(self.pinned), self.snapshot_at.map(moved));
        self.ids = ids;
        self.placeholders.clear();
        self.pictures.clear();
    }
}

impl PromptImages {
    fn add(&mut self, seen: &Seen, rows: std::ops::Range<u32>) {
        let plan = &seen.plan;
        let span = plan.span(seen.positions);
        self.tokens += u64::from(plan.run);
        self.kept += plan.kept.len() as u64;
        self.gaps += u64::from(span).saturating_sub(plan.kept.len() as u64);
        self.spans.push(VisualSpan {
            rows,
            embeddings: Arc::clone(&seen.embeddings),
            offsets: plan.offsets(seen.positions).into(),
            run: span,
            key: seen.key,
            drops: seen.drops.clone(),
        });
    }
}

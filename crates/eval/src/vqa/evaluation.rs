//! From pages and rows to a report.

use std::{
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};

use locket_model::{
    kv_cache::{CacheGeometry, CachePlan, SideArrays, SlotType},
    stable_hash::Fnv1a,
};
use locket_processor::{ChatPrompt, Processor};
use locket_vision::{
    DecodeLimits, EncodedImage, ImageLayout, RgbImage, Wants,
    drop::{self, VisualPlan, VisualSettings},
};
use serde_json::json;

use super::{
    Answer, Decoder, Eyes, Prompt, PromptImage, Row,
    pages::{self, Page, Question},
    report::{Answered, Entry, Times, VqaInputs, VqaReport, compare},
};
use crate::{Error, progress::Progress, statistics::Mean};

/// What is asked of a visual evaluation.
#[derive(Debug, Clone)]
pub struct VqaOptions {
    /// What is compared, in the order of the report.
    pub rows: Vec<Row>,
    /// JSONL of pages.
    pub pages: PathBuf,
    /// Most pages.
    pub most_pages: usize,
    /// Methods that all rows are compared with.
    pub against: Vec<String>,
    /// The first pages on which times are measured: there every row encodes for itself, and one request
    /// runs alone. The first is a warm-up and not counted.
    pub timed_pages: usize,
    /// Sequences that decode together when throughput is measured; 0 measures none.
    pub decode_batch: usize,
    /// Tokens that each of them decodes.
    pub decode_tokens: u32,
    /// Number type of the cache's slots, for the bytes of the report.
    pub slot_type: SlotType,
}

/// A question as ids.
struct Asked {
    /// Before the image's place.
    before: Vec<u32>,
    /// Behind it.
    behind: Vec<u32>,
    /// The same question without an image.
    blind: Vec<u32>,
    /// The right answer and its end.
    answer: Vec<u32>,
}

/// A prepared evaluation: prompts are made, nothing has run.
pub struct VqaEvaluation {
    options: VqaOptions,
    geometry: CacheGeometry,
    pages: Vec<(Page, Vec<Asked>)>,
}

/// What was measured of a row beside its entry.
#[derive(Default)]
struct Measured {
    encode: Vec<Duration>,
    prefill: Vec<Duration>,
    tokens_in: Vec<f64>,
    tokens_per_layer: Vec<f64>,
    /// Prompts for the measurement of throughput.
    prompts: Vec<Prompt>,
}

/// One page for all rows.
struct View {
    idx: usize,
    image: RgbImage,
    layout: ImageLayout,
    /// Encoded once for all rows that may share it.
    shared: Option<EncodedImage>,
}

impl VqaEvaluation {
    /// Reads the pages and makes the prompts.
    ///
    /// # Errors
    /// [`Error::Text`] as [`pages::read`], [`Error::Processor`] if the template cannot print a question with
    /// an image, and [`Error::Options`].
    pub fn prepare(
        options: VqaOptions,
        geometry: CacheGeometry,
        processor: &Processor,
    ) -> Result<Self, Error> {
        if options.rows.is_empty() {
            return Err(Error::options("rows", "none is given"));
        }
        let end = *processor
            .eos_token_ids()
            .first()
            .ok_or_else(|| Error::options("model", "has no token that ends an answer"))?;
        let with_prompts = |page: Page| {
            let asked = page.questions.iter().map(|question| ask(processor, question, end));
            let asked = asked.collect::<Result<Vec<Asked>, Error>>()?;
            Ok((page, asked))
        };
        let pages = pages::read(&options.pages, options.most_pages)?;
        let pages = pages.into_iter().map(with_prompts).collect::<Result<Vec<_>, Error>>()?;
        Ok(Self { options, geometry, pages })
    }

    /// Slots that the longest sequence takes if an image has at most `image_tokens`.
    pub fn most_slots(&self, image_tokens: usize) -> usize {
        let of = |asked: &Asked| {
            let prompt = (asked.before.len() + image_tokens + asked.behind.len()).max(asked.blind.len());
            prompt + asked.answer.len().max(self.options.decode_tokens as usize)
        };
        self.pages.iter().flat_map(|(_, asked)| asked).map(of).max().unwrap_or(0)
    }

    /// The most prompts that are handed over at once.
    pub fn most_together(&self) -> usize {
        let questions = self.pages.iter().map(|(_, asked)| asked.len()).max().unwrap_or(1);
        questions.max(self.options.decode_batch)
    }

    /// Asks everything in every row. A row that fails is reported with its reason, and the others go on.
    ///
    /// # Errors
    /// [`Error::Text`] for a page's image that is none.
    pub fn run(
        &self,
        inputs: VqaInputs,
        eyes: &dyn Eyes,
        decoder: &mut dyn Decoder,
    ) -> Result<VqaReport, Error> {
        let mut entries: Vec<Entry> = self.options.rows.iter().map(Entry::new).collect();
        let mut measured: Vec<Measured> = entries.iter().map(|_| Measured::default()).collect();
        let questions: usize = self.pages.iter().map(|(_, asked)| asked.len()).sum();
        let mut progress = Progress::new((questions * entries.len()) as u64);
        for (idx, (page, asked)) in self.pages.iter().enumerate() {
            let mut view = self.view(idx, page, eyes)?;
            for (entry, measured) in entries.iter_mut().zip(&mut measured) {
                progress.start(entry.name.clone());
                if entry.failed.is_none()
                    && let Err(error) = self.page(&mut view, asked, entry, measured, (eyes, decoder))
                {
                    tracing::error!("{}: {error}", entry.name);
                    entry.failed = Some(error.to_string());
                }
                progress.advance(asked.len());
            }
        }
        let kind = |(page, asked): &(Page, Vec<Asked>)| vec![page.kind.clone(); asked.len()];
        let kinds: Vec<String> = self.pages.iter().flat_map(kind).collect();
        for (entry, measured) in entries.iter_mut().zip(&measured) {
            if entry.failed.is_none() {
                self.summarise(entry, measured, &kinds);
                progress.start(format!("{} decode", entry.name));
                let decoded = self.throughput(measured, decoder).map(|rate| times(measured, rate));
                match decoded {
                    Ok(times) => entry.times = times,
                    Err(error) => entry.failed = Some(error.to_string()),
                }
            }
        }
        let mut by_kind = std::collections::BTreeMap::new();
        for kind in kinds {
            *by_kind.entry(kind).or_insert(0) += 1;
        }
        let paired = compare(&entries, &self.options.against);
        Ok(VqaReport { inputs, kinds: by_kind, results: entries, paired })
    }

    /// Pages that were read.
    pub fn num_pages(&self) -> usize {
        self.pages.len()
    }

    fn view(&self, idx: usize, page: &Page, eyes: &dyn Eyes) -> Result<View, Error> {
        let bytes = pages::image_bytes(page)?;
        let image = locket_vision::decode(&bytes, &DecodeLimits::default())
            .map_err(|error| Error::Text { path: page.image.clone(), reason: error.to_string() })?;
        let layout = eyes.layout(image.height(), image.width());
        Ok(View { idx, image, layout, shared: None })
    }

    /// Asks one page's questions in one row.
    fn page(
        &self,
        view: &mut View,
        asked: &[Asked],
        entry: &mut Entry,
        measured: &mut Measured,
        (eyes, decoder): (&dyn Eyes, &mut dyn Decoder),
    ) -> Result<(), Error> {
        let layers = self.geometry.num_layers;
        let is_timed = view.idx < self.options.timed_pages;
        let settings =
            entry.row.settings(layers, &view.layout).map_err(|reason| Error::options("rows", reason))?;
        let start = Instant::now();
        let image = match settings {
            None => None,
            Some(settings) => Some(self.see(view, settings, is_timed, eyes)?),
        };
        let encode = start.elapsed();
        let (tokens, per_layer) = image.as_ref().map_or((0, 0.0), |(_, plan)| {
            (plan.kept.len(), drop::mean_tokens(layers, plan.kept.len(), &plan.stages()))
        });
        let prompt = |asked: &Asked| prompt(asked, image.as_ref().map(|(image, _)| image));
        let prompts: Vec<Prompt> = asked.iter().map(prompt).collect();
        // Where times are measured the first question is alone.
        let alone = if is_timed { 1.min(prompts.len()) } else { 0 };
        let mut answers = Vec::with_capacity(prompts.len());
        for part in [&prompts[..alone], &prompts[alone..]] {
            if !part.is_empty() {
                answers.extend(decoder.answer(part)?);
            }
        }
        if is_timed
            && view.idx > 0
            && let Some(first) = answers.first().and_then(|answer| answer.times.first())
        {
            measured.encode.push(if image.is_some() { encode } else { Duration::ZERO });
            measured.prefill.push(*first);
        }
        for (asked, answer) in asked.iter().zip(&answers) {
            entry.questions.push(judge(&asked.answer, answer));
            measured.tokens_in.push(tokens as f64);
            measured.tokens_per_layer.push(per_layer);
        }
        if measured.prompts.len() < self.options.decode_batch {
            let first = prompts.into_iter().take(1);
            measured
                .prompts
                .extend(first.map(|prompt| Prompt { tokens: self.options.decode_tokens, ..prompt }));
        }
        Ok(())
    }

    /// The image as these settings show it.
    fn see(
        &self,
        view: &mut View,
        settings: VisualSettings,
        is_timed: bool,
        eyes: &dyn Eyes,
    ) -> Result<(PromptImage, VisualPlan), Error> {
        let method = drop::method(&settings).map_err(|error| Error::options("rows", error.to_string()))?;
        let merge = method.merge(&view.layout);
        let own = is_timed || merge.is_some() || method.wants().base_only;
        let encoded = match view.shared.take().filter(|_| !own) {
            Some(encoded) => encoded,
            None if own => eyes.encode(&view.image, Wants { merge: merge.as_deref(), ..method.wants() })?,
            None => {
                let wants = Wants { cls_attention: true, patch_features: true, ..Wants::default() };
                eyes.encode(&view.image, wants)?
            }
        };
        let plan = method.plan(self.geometry.num_layers, &encoded)?;
        let image = PromptImage {
            first: 0,
            embeddings: plan.gather(&encoded.features, encoded.hidden_size)?.into(),
            offsets: plan.offsets(settings.positions).into(),
            span: plan.span(settings.positions),
            key: key(view.idx, &settings),
            drops: (!plan.drops.boundaries.is_empty()).then(|| Arc::new(plan.drops.clone())),
        };
        if !own {
            view.shared = Some(encoded);
        }
        Ok((image, plan))
    }

    fn summarise(&self, entry: &mut Entry, measured: &Measured, kinds: &[String]) {
        entry.summarise(kinds);
        let mean = |values: &[f64]| Mean::of(values.iter().copied()).mean;
        entry.tokens_in = mean(&measured.tokens_in);
        entry.tokens_per_layer = mean(&measured.tokens_per_layer);
        let slot = CachePlan::slot_bytes(self.geometry, self.options.slot_type, SideArrays::default());
        entry.reserved_bytes = entry.tokens_in * slot as f64;
        entry.filled_bytes = entry.tokens_per_layer * slot as f64;
    }

    /// Tokens per second of several sequences that decode together, once all have a first token.
    fn throughput(&self, measured: &Measured, decoder: &mut dyn Decoder) -> Result<Option<f64>, Error> {
        if measured.prompts.is_empty() || self.options.decode_tokens < 2 {
            return Ok(None);
        }
        let answers = decoder.answer(&measured.prompts)?;
        let times = answers.iter().flat_map(|answer| &answer.times);
        let Some(start) = answers.iter().filter_map(|answer| answer.times.first()).max() else {
            return Ok(None);
        };
        let behind: Vec<&Duration> = times.filter(|time| *time > start).collect();
        let seconds = behind.iter().max().map_or(0.0, |end| (**end - *start).as_secs_f64());
        Ok((seconds > 0.0).then(|| behind.len() as f64 / seconds))
    }
}

/// A question as ids, with and without an image before it.
fn ask(processor: &Processor, question: &Question, end: u32) -> Result<Asked, Error> {
    let token = processor
        .image_token()
        .ok_or_else(|| Error::options("model", "takes no images: it has no vision model"))?;
    let text = json!({"type": "text", "text": question.question});
    let render = |content: serde_json::Value| -> Result<Vec<u32>, Error> {
        let messages = vec![json!({"role": "user", "content": content})];
        let chat = ChatPrompt { messages, add_generation_prompt: true, ..ChatPrompt::default() };
        Ok(processor.encode_prompt(&processor.render_chat(&chat)?, false)?)
    };
    let seen = render(json!([{"type": "image"}, text]))?;
    let places: Vec<usize> =
        seen.iter().enumerate().filter(|(_, id)| **id == token.id).map(|(at, _)| at).collect();
    let &[place] = &places[..] else {
        let reason = format!("its template prints {} images where one was given", places.len());
        return Err(Error::options("model", reason));
    };
    let mut answer = processor.encode(&question.answer, false)?;
    answer.push(end);
    Ok(Asked {
        before: seen[..place].to_vec(),
        behind: seen[place + 1..].to_vec(),
        blind: render(json!([text]))?,
        answer,
    })
}

fn prompt(asked: &Asked, image: Option<&PromptImage>) -> Prompt {
    let tokens = asked.answer.len() as u32;
    let Some(image) = image else {
        return Prompt { ids: asked.blind.clone(), image: None, tokens };
    };
    let mut ids = asked.before.clone();
    ids.resize(ids.len() + image.offsets.len(), 0);
    ids.extend(&asked.behind);
    Prompt { ids, image: Some(PromptImage { first: asked.before.len() as u32, ..image.clone() }), tokens }
}

fn judge(right: &[u32], answer: &Answer) -> Answered {
    let agreed = right.iter().zip(&answer.ids).take_while(|(right, id)| right == id).count();
    Answered { exact: agreed == right.len(), right: agreed as f32 / right.len().max(1) as f32 }
}

/// Names a page's image with its plan within one evaluation.
fn key(page: usize, settings: &VisualSettings) -> u128 {
    (page as u128) << 64 | u128::from(Fnv1a::of(settings.fingerprint().as_bytes()))
}

fn times(measured: &Measured, decode_tokens_per_s: Option<f64>) -> Option<Times> {
    let ms =
        |durations: &[Duration]| durations.iter().map(|time| time.as_secs_f64() * 1e3).collect::<Vec<_>>();
    let (encode, prefill) = (ms(&measured.encode), ms(&measured.prefill));
    if encode.is_empty() {
        return None;
    }
    Some(Times {
        first_token_ms: Mean::of(encode.iter().zip(&prefill).map(|(encode, prefill)| encode + prefill)),
        encode_ms: Mean::of(encode),
        prefill_ms: Mean::of(prefill),
        decode_tokens_per_s,
    })
}

#[cfg(test)]
mod tests;

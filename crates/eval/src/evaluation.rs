//! From options and text to a report: the same samples through every configuration.

use std::{path::PathBuf, sync::Arc, time::Instant};

use locket_model::{
    Model, TokenScore,
    kv_cache::{BlockClass, CacheGeometry, CachePlan, SideArrays, SideCar},
    load::{BuildOptions, Checkpoint},
};
use locket_processor::Processor;
use rand::{SeedableRng, rngs::StdRng};

use crate::{
    Configuration, Error, EvalOptions, Task,
    documents::{self, Wanted, window},
    perplexity::Perplexity,
    probes::{Generator, Probe, start_tokens},
    progress::Progress,
    report::{CorpusSummary, Entry, Inputs, Recall, Report, compare},
    runner::{self, Pace, Sequence},
};

/// Documents that haystacks are cut from.
const HAYSTACKS: usize = 64;

/// A prepared evaluation: samples are made, nothing has run.
pub struct Evaluation<'a> {
    checkpoint: &'a Checkpoint,
    side_car: Option<Arc<SideCar>>,
    options: EvalOptions,
    inputs: Inputs,
    corpus: CorpusSummary,
    /// Texts whose perplexity is measured, each `context` tokens.
    texts: Vec<Vec<u32>>,
    probes: Vec<(Task, Vec<Probe>)>,
}

impl<'a> Evaluation<'a> {
    /// Reads the text files and makes the samples.
    ///
    /// # Errors
    /// [`Error::Options`] for options that contradict each other, the model or the text;
    /// [`Error::Text`] and [`Error::Processor`] as [`documents::read`].
    pub fn prepare(
        checkpoint: &'a Checkpoint,
        processor: &Processor,
        files: &[PathBuf],
        options: EvalOptions,
        side_car: Option<Arc<SideCar>>,
    ) -> Result<Self, Error> {
        options.check(CacheGeometry::of(&checkpoint.config))?;
        let haystacks = if options.has_probes() { HAYSTACKS } else { 0 };
        let measured = if options.has_perplexity() { options.documents } else { 0 };
        let (tokens, seed) = (options.longest(), options.seed);
        let wanted = Wanted { tokens, documents: haystacks.max(measured), seed };
        let corpus = documents::read(files, processor, wanted)?;
        if corpus.documents.is_empty() {
            let reason = format!("of {} documents none has {tokens} tokens; lower --context", corpus.read);
            return Err(Error::options("text", reason));
        }
        let measured = &corpus.documents[..measured.min(corpus.documents.len())];
        let start = start_tokens(processor)?;
        let mut rng = StdRng::seed_from_u64(seed);
        let texts = measured
            .iter()
            .map(|document| [&start, window(document, options.context - start.len(), &mut rng)].concat())
            .collect();
        let mut probes = Vec::new();
        if options.has_probes() {
            let generator = Generator::new(processor, &corpus.documents, options.probe_context, seed)?;
            for &task in options.tasks.iter().filter(|&&task| task != Task::Perplexity) {
                probes.push((task, generator.probes(task, options.probes)?));
            }
        }
        let summary = CorpusSummary {
            read: corpus.read,
            too_short: corpus.too_short,
            haystacks: if options.has_probes() { corpus.documents.len() } else { 0 },
            names: measured.iter().map(|document| document.name.clone()).collect(),
        };
        let inputs = inputs(checkpoint, files, &options, side_car.as_deref());
        Ok(Self { checkpoint, side_car, options, inputs, corpus: summary, texts, probes })
    }

    /// Bytes that the largest model of the evaluation will hold: an estimate, as
    /// [`Checkpoint::planned_bytes`] is.
    pub fn peak_bytes(&self) -> u64 {
        let of = |one: &Configuration| {
            self.plan(&[one])
                .total_bytes()
                .saturating_add(self.checkpoint.planned_bytes(one.backend, self.max_batch_rows()))
        };
        let configurations = self.options.configurations(self.side_car.as_deref());
        configurations.iter().filter(|one| one.skipped.is_none()).map(of).max().unwrap_or(0)
    }

    /// Runs everything. A configuration that fails is reported with its reason, and the others go on.
    ///
    /// # Errors
    /// [`Error::Model`] if a model cannot be built at all.
    pub fn run(&self) -> Result<Report, Error> {
        let side_car = self.side_car.as_deref();
        let geometry = CacheGeometry::of(&self.checkpoint.config);
        let configurations = self.options.configurations(side_car);
        let mut entries: Vec<Entry> = configurations
            .iter()
            .map(|one| Entry::new(one, one.bytes_per_sequence(geometry, side_car)))
            .collect();
        let running = configurations.iter().filter(|one| one.skipped.is_none()).count() as u64;
        let mut progress = Progress::new(running * self.rows());
        for group in groups(&configurations) {
            let members: Vec<&Configuration> = group.iter().map(|&idx| &configurations[idx]).collect();
            let mut model = None;
            for idx in group {
                let ready = match model.take() {
                    Some(ready) => ready,
                    None => self.build(&members, self.side_car.clone())?,
                };
                model = self.measure(ready, &configurations[idx], &mut entries[idx], &mut progress);
            }
        }
        let paired = compare(&entries, &self.options.against);
        let depths =
            |(task, probes): &(Task, Vec<Probe>)| (task.name(), probes.iter().map(Probe::depth).collect());
        Ok(Report {
            inputs: self.inputs.clone(),
            corpus: self.corpus.clone(),
            probes: self.probes.iter().map(depths).collect(),
            results: entries,
            paired,
        })
    }

    /// Every configuration of the options.
    pub(crate) fn configurations(&self) -> Vec<Configuration> {
        self.options.configurations(self.side_car.as_deref())
    }

    pub(crate) fn side_car(&self) -> Option<&SideCar> {
        self.side_car.as_deref()
    }

    pub(crate) fn num_layers(&self) -> usize {
        self.checkpoint.config.num_layers
    }

    pub(crate) fn has_text_and_probes(&self) -> bool {
        !self.texts.is_empty() && !self.probes.is_empty()
    }

    /// Runs all samples through one configuration with these weights in place of the evaluation's own.
    pub(crate) fn measure_with(
        &self,
        configuration: &Configuration,
        side_car: Arc<SideCar>,
    ) -> Result<Entry, Error> {
        let mut model = self.build(&[configuration], Some(side_car))?;
        let mut entry = Entry::new(configuration, 0);
        let name = configuration.settings.method.name();
        let mut progress = Progress::new(self.rows());
        self.samples(&mut *model, configuration, &mut entry, name, &mut progress)?;
        Ok(entry)
    }

    /// Fills `entry`; the model comes back unless it failed and must not be used again.
    fn measure(
        &self,
        mut model: Box<dyn Model>,
        configuration: &Configuration,
        entry: &mut Entry,
        progress: &mut Progress,
    ) -> Option<Box<dyn Model>> {
        let name = format!("{} {} {}", entry.method, entry.slots, entry.slot_type);
        let start = Instant::now();
        let outcome = self.samples(&mut *model, configuration, entry, &name, progress);
        entry.seconds = start.elapsed().as_secs_f64();
        match outcome {
            Ok(()) => {
                tracing::info!("{name}: {:.1} s{}", entry.seconds, headline(entry));
                Some(model)
            }
            Err(error) => {
                tracing::error!("{name}: {error}");
                entry.failed = Some(error.to_string());
                None
            }
        }
    }

    fn samples(
        &self,
        model: &mut dyn Model,
        configuration: &Configuration,
        entry: &mut Entry,
        name: &str,
        progress: &mut Progress,
    ) -> Result<(), Error> {
        let EvalOptions { lockstep, chunk, .. } = self.options;
        let pace = Pace { settings: configuration.settings, lockstep, chunk };
        let mut scores = |task: Task, sequences: &[Sequence<'_>]| -> Result<Vec<Vec<TokenScore>>, Error> {
            progress.start(format!("{name} {task}"));
            runner::check(sequences)?;
            runner::run(model, pace, sequences, &mut |rows| progress.advance(rows))
        };
        if !self.texts.is_empty() {
            let sequences: Vec<_> = self.texts.iter().map(|ids| Sequence::all(ids)).collect();
            entry.perplexity = Some(Perplexity::of(&scores(Task::Perplexity, &sequences)?));
        }
        for (task, probes) in &self.probes {
            let sequences: Vec<_> = probes.iter().map(Probe::sequence).collect();
            let scores = scores(*task, &sequences)?;
            let judged = probes.iter().zip(&scores).map(|(probe, scores)| probe.judge(scores)).collect();
            entry.recall.push(Recall::of(*task, judged));
        }
        Ok(())
    }

    /// Rows that one configuration computes.
    fn rows(&self) -> u64 {
        let texts = self.texts.iter().map(Vec::len);
        let probes = self.probes.iter().flat_map(|(_, probes)| probes.iter().map(|probe| probe.ids.len()));
        texts.chain(probes).map(|len| len as u64 - 1).sum()
    }

    fn max_batch_rows(&self) -> usize {
        self.options.lockstep as usize * self.options.chunk
    }

    /// A block per sequence in lockstep; `members` have capacity and slot type in common.
    fn plan(&self, members: &[&Configuration]) -> CachePlan {
        let geometry = CacheGeometry::of(&self.checkpoint.config);
        let methods: Vec<_> = members.iter().map(|one| one.settings.method).collect();
        let capacity = members.iter().map(|one| one.settings.capacity()).max().unwrap_or(0);
        CachePlan {
            geometry,
            slot_type: members.first().map(|one| one.slot_type).unwrap_or_default(),
            side: SideArrays::of(&methods, geometry, self.side_car.as_deref()),
            classes: vec![BlockClass { capacity, blocks: self.options.lockstep }],
        }
    }

    fn build(
        &self,
        members: &[&Configuration],
        side_car: Option<Arc<SideCar>>,
    ) -> Result<Box<dyn Model>, Error> {
        Ok(self.checkpoint.build(&BuildOptions {
            backend: members.first().map_or(self.options.backend, |one| one.backend),
            cache: self.plan(members),
            max_batch_rows: self.max_batch_rows(),
            threads: self.options.threads,
            side_car,
        })?)
    }
}

/// Configurations that one model can serve: those of one slot type whose blocks are equally large, so
/// that no more memory is held than the largest needs.
fn groups(configurations: &[Configuration]) -> Vec<Vec<usize>> {
    let mut groups: Vec<Vec<usize>> = Vec::new();
    let key = |one: &Configuration| (one.slot_type, one.settings.capacity());
    for (idx, one) in configurations.iter().enumerate().filter(|(_, one)| one.skipped.is_none()) {
        match groups.iter_mut().find(|group| key(&configurations[group[0]]) == key(one)) {
            Some(group) => group.push(idx),
            None => groups.push(vec![idx]),
        }
    }
    groups
}

fn inputs(
    checkpoint: &Checkpoint,
    files: &[PathBuf],
    options: &EvalOptions,
    side_car: Option<&SideCar>,
) -> Inputs {
    Inputs {
        checkpoint: checkpoint.fingerprint.clone(),
        quantization: checkpoint.quantization.clone(),
        side_car: side_car.map(|weights| weights.metadata.clone().into_iter().collect()),
        text: files.iter().map(|file| file.display().to_string()).collect(),
        context: options.context,
        probe_context: options.probe_context,
        ring: options.ring,
        tasks: options.tasks.clone(),
        probes: options.probes,
        seed: options.seed,
    }
}

/// An entry's main figures, for the log.
fn headline(entry: &Entry) -> String {
    let perplexity = entry.perplexity.iter().map(|of| format!(", perplexity {:.3}", of.perplexity));
    let recall = entry.recall.iter().map(|of| format!(", {} {:.3}", of.task, of.accuracy.mean));
    perplexity.chain(recall).collect()
}

#[cfg(test)]
mod tests;

//! The loop that both methods share: batches made on a thread of their own, optimiser, history,
//! checkpoints, progress.

use std::{
    collections::{BTreeMap, VecDeque},
    ops::Range,
    sync::mpsc::{Receiver, sync_channel},
    time::{Duration, Instant},
};

use candle_core::{Device, Tensor};
use indicatif::{ProgressBar, ProgressStyle};
use serde::{Deserialize, Serialize};

use crate::{
    error::{Error, Result},
    parameters::{AdamW, Gradients, Parameters},
    recipe::{Kind, Recipe, TrainingBatch},
    saved_run::{Identity, SavedRun},
    settings::Settings,
    windows::WindowState,
};

/// Losses stay on the device for this many steps, because reading one waits for everything before it.
const READ_EVERY: u64 = 20;

/// Losses of each kind that a figure is the mean of.
const RECENT: usize = 20;

/// A log line at most this often where there is no terminal for a progress bar.
const LOG_INTERVAL: Duration = Duration::from_secs(10);

/// Batches that are made ahead.
const AHEAD: usize = 2;

/// What differs between the methods.
pub(crate) trait Trainer {
    /// Weights before the first step.
    fn initial(&self, seed: u64) -> Result<Parameters>;

    /// AdamW's betas and the bound on the gradients' norm.
    fn optimizer(&self) -> ((f64, f64), Option<f64>);

    /// Learning rate of a step.
    fn rate(&self, peak: f64, step: u64, steps: u64) -> f64;

    /// What a step's sequences are.
    fn kind(&self, step: u64) -> Kind;

    /// Lets the first batches adjust initial weights.
    fn prepare(&self, parameters: &mut Parameters, step: u64, batch: &TrainingBatch) -> Result<()> {
        let _ = (parameters, step, batch);
        Ok(())
    }

    /// Gradients of a batch, and its loss as a scalar on the device.
    fn gradients(&self, parameters: &Parameters, batch: &TrainingBatch) -> Result<(Gradients, Tensor)>;
}

/// Index ranges of at most `size` sequences that make up `count`.
pub(crate) fn micro_batches(count: usize, size: usize) -> impl Iterator<Item = Range<usize>> {
    (0..count).step_by(size.max(1)).map(move |start| start..(start + size).min(count))
}

/// `[sequences, length]`.
pub(crate) fn ids_tensor(sequences: &[Vec<u32>], device: &Device) -> Result<Tensor> {
    let length = sequences.first().map_or(0, Vec::len);
    Ok(Tensor::from_vec(sequences.concat(), (sequences.len(), length), device)?)
}

/// Recent losses per kind.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct History {
    recent: BTreeMap<Kind, VecDeque<f32>>,
    #[serde(skip)]
    unread: Unread,
}

/// Losses that are still on the device.
#[derive(Debug, Clone, Default)]
struct Unread(Vec<(Kind, Tensor)>);

impl PartialEq for Unread {
    fn eq(&self, other: &Self) -> bool {
        self.0.len() == other.0.len()
    }
}

impl History {
    fn push(&mut self, kind: Kind, loss: Tensor) {
        self.unread.0.push((kind, loss));
    }

    /// Reads what is unread; `step` is the last one's.
    fn read(&mut self, step: u64) -> Result<()> {
        let unread = std::mem::take(&mut self.unread.0);
        if unread.is_empty() {
            return Ok(());
        }
        let (kinds, losses): (Vec<Kind>, Vec<Tensor>) = unread.into_iter().unzip();
        for (kind, loss) in kinds.into_iter().zip(Tensor::stack(&losses, 0)?.to_vec1::<f32>()?) {
            if !loss.is_finite() {
                return Err(Error::Diverged { step, what: "the loss" });
            }
            let recent = self.recent.entry(kind).or_default();
            recent.push_back(loss);
            if recent.len() > RECENT {
                recent.pop_front();
            }
        }
        Ok(())
    }

    /// Mean of the recent losses per kind.
    pub(crate) fn means(&self) -> BTreeMap<&'static str, f32> {
        let mean = |losses: &VecDeque<f32>| losses.iter().sum::<f32>() / losses.len().max(1) as f32;
        self.recent.iter().map(|(kind, losses)| (kind.name(), mean(losses))).collect()
    }
}

/// A run between two steps.
pub(crate) struct Run {
    /// Steps done.
    pub step: u64,
    pub parameters: Parameters,
    pub adam: AdamW,
    pub history: History,
    /// Seconds of training, earlier parts of a resumed run included.
    pub seconds: f64,
    /// Where the text stands.
    pub windows: WindowState,
}

impl Run {
    /// A new run, or the one in the checkpoint folder if it is to be resumed and there is one.
    pub(crate) fn start(
        trainer: &dyn Trainer,
        settings: &Settings,
        identity: &Identity,
        device: &Device,
    ) -> Result<Self> {
        let parameters = trainer.initial(settings.seed)?;
        let (betas, clip) = trainer.optimizer();
        let adam = AdamW::new(&parameters, betas, clip)?;
        let history = History::default();
        let mut run =
            Self { step: 0, parameters, adam, history, seconds: 0.0, windows: WindowState::default() };
        if let (true, Some((folder, _))) = (settings.resume, &settings.checkpoints)
            && let Some(saved) = SavedRun::read(folder, identity, device)?
        {
            saved.restore(&mut run)?;
            tracing::info!(step = run.step, "resumed");
        }
        Ok(run)
    }

    /// Trains to the end of the budget.
    pub(crate) fn train(
        &mut self,
        trainer: &dyn Trainer,
        settings: &Settings,
        identity: &Identity,
        recipe: Recipe<'_>,
    ) -> Result<()> {
        let steps = settings.steps();
        let first = self.step;
        let kinds: Vec<Kind> = (first..steps).map(|step| trainer.kind(step)).collect();
        let every = settings.checkpoints.as_ref().map(|(_, every)| *every);
        let (sender, receiver) = sync_channel(AHEAD);
        std::thread::scope(|scope| {
            scope.spawn(move || {
                let mut recipe = recipe;
                for (step, kind) in (first..).zip(kinds) {
                    let made = recipe.batch(step, kind).map(|batch| {
                        let is_saved = every.is_some_and(|every| (step + 1).is_multiple_of(every));
                        Made { batch, windows: is_saved.then(|| recipe.state()) }
                    });
                    let is_last = made.is_err();
                    // The other side hangs up when it has failed.
                    if sender.send(made).is_err() || is_last {
                        break;
                    }
                }
            });
            self.steps(trainer, settings, identity, receiver)
        })
    }

    fn steps(
        &mut self,
        trainer: &dyn Trainer,
        settings: &Settings,
        identity: &Identity,
        batches: Receiver<Result<Made>>,
    ) -> Result<()> {
        let steps = settings.steps();
        let (before, started) = (self.seconds, Instant::now());
        let progress = Progress::new(self.step, steps);
        while self.step < steps {
            let made = batches.recv().map_err(|_| Error::Corpus("the reading thread stopped".into()))?;
            let Made { batch, windows } = made?;
            let step = self.step;
            trainer.prepare(&mut self.parameters, step, &batch)?;
            let (gradients, loss) = trainer.gradients(&self.parameters, &batch)?;
            let gradients = gradients.stacked(&self.parameters)?;
            let rate = trainer.rate(settings.rate, step, steps);
            self.adam.step(&mut self.parameters, &gradients, rate)?;
            self.history.push(batch.kind, loss);
            self.step += 1;
            self.seconds = before + started.elapsed().as_secs_f64();
            let is_read = self.step.is_multiple_of(READ_EVERY) || self.step == steps || windows.is_some();
            if is_read {
                self.history.read(step)?;
                progress.show(self.step, &self.history);
            }
            progress.advance(self.step);
            if let (Some(windows), Some((folder, _))) = (windows, &settings.checkpoints) {
                self.windows = windows;
                SavedRun::write(self, folder, identity)?;
            }
        }
        // Everything that was launched has run before the time is taken.
        self.history.read(self.step)?;
        self.seconds = before + started.elapsed().as_secs_f64();
        progress.end();
        Ok(())
    }
}

/// A batch and, where a checkpoint follows it, the state of the text after it.
struct Made {
    batch: TrainingBatch,
    windows: Option<WindowState>,
}

/// A bar on a terminal, else a log line now and then.
struct Progress {
    bar: ProgressBar,
    logged: std::cell::Cell<Instant>,
}

impl Progress {
    fn new(done: u64, steps: u64) -> Self {
        // Draws on standard error, and nothing if that is not a terminal.
        let bar = ProgressBar::new(steps);
        if let Ok(style) = ProgressStyle::with_template("[{wide_bar}] {pos}/{len} {msg} ({eta})") {
            bar.set_style(style);
        }
        bar.set_position(done);
        bar.reset_eta();
        Self { bar, logged: std::cell::Cell::new(Instant::now()) }
    }

    fn advance(&self, step: u64) {
        self.bar.set_position(step);
    }

    fn show(&self, step: u64, history: &History) {
        let losses: Vec<String> =
            history.means().iter().map(|(kind, loss)| format!("{kind} {loss:.4}")).collect();
        let losses = losses.join(", ");
        if self.bar.is_hidden() && self.logged.get().elapsed() > LOG_INTERVAL {
            self.logged.set(Instant::now());
            tracing::info!(step, "loss: {losses}");
        }
        self.bar.set_message(losses);
    }

    fn end(&self) {
        self.bar.finish_and_clear();
    }
}

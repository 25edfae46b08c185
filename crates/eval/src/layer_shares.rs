//! Which layers need their slots: every layer in turn gets fewer, then more, and what that costs or
//! brings decides about its share.
//!
//! Slots are given away in two pieces per layer: from the least to an equal share, and from there to the
//! most. A piece's worth per slot is how much the loss of text and of probes falls, both divided by their
//! mean over all pieces so that neither drowns the other. Pieces are bought in order of worth until the
//! slots are spent. Only differences between runs on the same samples count, and the others share the
//! slots that one layer gains or loses, as they would in service.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
    mpsc,
};

use locket_model::kv_cache::SideCar;
use serde::Serialize;

use crate::{Configuration, Error, Evaluation, report::Entry};

/// Least and most share of a layer, in equal shares.
pub const BOUNDS: [f64; 2] = [0.375, 2.5];

/// Mean losses of one run, in nats per token.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Losses {
    /// Of text.
    pub text: f64,
    /// Of the answers of all probes.
    pub probes: f64,
}

/// What a layer's share does.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct LayerEffect {
    /// With the least share.
    pub least: Losses,
    /// With the most.
    pub most: Losses,
}

/// The measured shares.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct LayerShares {
    /// Share of each layer, mean 1.
    pub shares: Vec<f32>,
    /// With equal shares.
    pub equal: Losses,
    /// With [`Self::shares`].
    pub shared: Losses,
    /// Each layer.
    pub layers: Vec<LayerEffect>,
}

impl Evaluation<'_> {
    /// Measures shares for the one configuration of the options, `jobs` runs at a time, each with a model
    /// of its own; `say` is told what was measured. Results do not depend on `jobs`.
    ///
    /// # Errors
    /// [`Error::Options`] unless there is one configuration, of a method that shares layers, and both text
    /// and probes; the model's.
    pub fn layer_shares(&self, jobs: usize, say: &mut dyn FnMut(&str)) -> Result<LayerShares, Error> {
        let (configuration, side_car) = self.configuration_to_share()?;
        let num_layers = self.num_layers();
        let losses = |shares: &[f32]| -> Result<Losses, Error> {
            let side_car = SideCar { layer_shares: Some(shares.to_vec()), ..side_car.clone() };
            losses_of(&self.measure_with(&configuration, Arc::new(side_car))?)
        };
        let mut trials = vec![vec![1.0; num_layers]];
        for layer in 0..num_layers {
            trials.extend(BOUNDS.map(|share| one_share(layer, num_layers, share)));
        }
        let mut measured = 0;
        let results = in_parallel(jobs, &trials, &losses, &mut |of, losses| {
            measured += 1;
            let (what, runs) = (trial_name(of), trials.len());
            say(&format!("{measured}/{runs} {what}: text {:.4}, probes {:.4}", losses.text, losses.probes));
        })?;
        let equal = results[0];
        let layers: Vec<LayerEffect> =
            results[1..].chunks_exact(2).map(|of| LayerEffect { least: of[0], most: of[1] }).collect();
        let shares = share_out(equal, &layers);
        let shared = losses(&shares)?;
        say(&format!("measured shares: text {:.4}, probes {:.4}", shared.text, shared.probes));
        Ok(LayerShares { shares, equal, shared, layers })
    }

    fn configuration_to_share(&self) -> Result<(Configuration, SideCar), Error> {
        let side_car = self.side_car().cloned().unwrap_or_default();
        let Ok([mut one]) = <[Configuration; 1]>::try_from(self.configurations()) else {
            return Err(Error::options("methods", "shares are measured for one method and number of slots"));
        };
        if let Some(reason) = one.skipped {
            return Err(Error::options("methods", reason));
        }
        if !one.settings.method.shares_layers() {
            let name = one.settings.method.name();
            return Err(Error::options("methods", format!("{name} gives all layers the same slots")));
        }
        if !self.has_text_and_probes() {
            return Err(Error::options(
                "tasks",
                "shares weigh perplexity against at least one kind of probe",
            ));
        }
        one.settings.layer_budgets = true;
        Ok((one, side_car))
    }
}

/// What the trial of this index changes.
fn trial_name(trial: usize) -> String {
    match trial.checked_sub(1) {
        None => "equal shares".to_owned(),
        Some(at) => format!("layer {} with a share of {}", at / 2, BOUNDS[at % 2]),
    }
}

/// The losses of all `trials` in order, `jobs` at a time; `done` hears of each as it comes. After a failure
/// no more are begun.
fn in_parallel(
    jobs: usize,
    trials: &[Vec<f32>],
    losses: &(dyn Fn(&[f32]) -> Result<Losses, Error> + Sync),
    done: &mut dyn FnMut(usize, Losses),
) -> Result<Vec<Losses>, Error> {
    let next = AtomicUsize::new(0);
    let mut results = vec![None; trials.len()];
    std::thread::scope(|scope| {
        let (sender, receiver) = mpsc::channel();
        for _ in 0..jobs.clamp(1, trials.len().max(1)) {
            let (sender, next) = (sender.clone(), &next);
            scope.spawn(move || {
                loop {
                    let trial = next.fetch_add(1, Ordering::Relaxed);
                    let Some(shares) = trials.get(trial) else { return };
                    let outcome = losses(shares);
                    if outcome.is_err() {
                        next.store(trials.len(), Ordering::Relaxed);
                    }
                    if sender.send((trial, outcome)).is_err() {
                        return;
                    }
                }
            });
        }
        drop(sender);
        for (trial, outcome) in receiver {
            let outcome = outcome?;
            done(trial, outcome);
            results[trial] = Some(outcome);
        }
        Ok::<(), Error>(())
    })?;
    let missing = || Error::options("jobs", "a run ended without a result");
    results.into_iter().map(|losses| losses.ok_or_else(missing)).collect()
}

/// One layer with `share`, the others with equal parts of the rest.
fn one_share(layer: usize, num_layers: usize, share: f64) -> Vec<f32> {
    let others = (num_layers as f64 - share) / (num_layers as f64 - 1.0).max(1.0);
    (0..num_layers).map(|other| if other == layer { share } else { others } as f32).collect()
}

fn losses_of(entry: &Entry) -> Result<Losses, Error> {
    let missing = || Error::options("tasks", "text and probes are both needed");
    let text = entry.perplexity.as_ref().map(|of| of.nll).ok_or_else(missing)?;
    let tasks = entry.recall.len();
    if tasks == 0 {
        return Err(missing());
    }
    let probes = entry.recall.iter().map(|of| of.nll.mean).sum::<f64>() / tasks as f64;
    Ok(Losses { text, probes })
}

/// A piece of a layer's slots and what it is worth.
struct Piece {
    layer: usize,
    size: f64,
    /// Per equal share.
    worth: f64,
}

/// From effects to shares, mean 1.
fn share_out(equal: Losses, layers: &[LayerEffect]) -> Vec<f32> {
    let [least, most] = BOUNDS;
    let sizes = [1.0 - least, most - 1.0];
    // What each piece lowers a loss by; more slots are never taken to hurt.
    let gains = |loss: fn(&Losses) -> f64| -> Vec<[f64; 2]> {
        let gain = |effect: &LayerEffect| {
            [(loss(&effect.least) - loss(&equal)).max(0.0), (loss(&equal) - loss(&effect.most)).max(0.0)]
        };
        let gains: Vec<[f64; 2]> = layers.iter().map(gain).collect();
        let mean = gains.iter().flatten().sum::<f64>() / (2 * gains.len()) as f64;
        gains.iter().map(|gain| gain.map(|gain| if mean > 0.0 { gain / mean } else { 0.0 })).collect()
    };
    let (text, probes) = (gains(|losses| losses.text), gains(|losses| losses.probes));
    let mut pieces = Vec::with_capacity(2 * layers.len());
    for (layer, (text, probes)) in text.iter().zip(&probes).enumerate() {
        let gain = [text[0] + probes[0], text[1] + probes[1]];
        let mut worths = [gain[0] / sizes[0], gain[1] / sizes[1]];
        if worths[1] > worths[0] {
            // The second piece cannot be had without the first: they are worth their mean.
            worths = [(gain[0] + gain[1]) / (sizes[0] + sizes[1]); 2];
        }
        pieces.extend(sizes.iter().zip(worths).map(|(&size, worth)| Piece { layer, size, worth }));
    }
    // Stable: of equal worth, the lower layer and its first piece.
    pieces.sort_by(|a, b| b.worth.total_cmp(&a.worth));
    let mut shares = vec![least; layers.len()];
    let mut left = layers.len() as f64 * (1.0 - least);
    for piece in pieces {
        let bought = piece.size.min(left);
        shares[piece.layer] += bought;
        left -= bought;
    }
    shares.into_iter().map(|share| share as f32).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn effect(costs: [f64; 2], gains: [f64; 2]) -> LayerEffect {
        LayerEffect {
            least: Losses { text: 3.0 + costs[0], probes: 2.0 + costs[1] },
            most: Losses { text: 3.0 - gains[0], probes: 2.0 - gains[1] },
        }
    }

    const EQUAL: Losses = Losses { text: 3.0, probes: 2.0 };

    #[test]
    fn slots_go_where_they_are_worth_most() {
        let idle = effect([0.0, 0.0], [0.0, 0.0]);
        let shares = share_out(EQUAL, &[idle, effect([0.1, 0.5], [0.1, 0.5]), idle, idle]);
        // 4 shares in all: the second takes 2.5, and the rest beyond the least goes to the first.
        let wanted = [0.75f32, 2.5, 0.375, 0.375];
        assert!(shares.iter().zip(wanted).all(|(a, b)| (a - b).abs() < 1e-6), "{shares:?}");
    }

    #[test]
    fn text_and_probes_weigh_the_same() {
        // One layer matters for text, the other for probes, whose differences are a hundred times larger.
        let shares = share_out(
            EQUAL,
            &[effect([0.001, 0.0], [0.001, 0.0]), effect([0.0, 0.1], [0.0, 0.1]), effect([0.0; 2], [0.0; 2])],
        );
        assert!(shares[0] >= 1.0 && shares[1] >= 1.0 && shares[2] < 0.4, "{shares:?}");
    }

    #[test]
    fn noise_does_not_take_slots_away() {
        // Fewer slots seem to help: that is not believed.
        let shares = share_out(EQUAL, &[effect([-0.1, -0.1], [-0.2, 0.0]), effect([0.1, 0.1], [0.0, 0.0])]);
        assert!((shares.iter().sum::<f32>() - 2.0).abs() < 1e-6);
        assert!(shares[1] >= 1.0 && shares[0] >= 0.375, "{shares:?}");
    }

    #[test]
    fn others_share_what_one_gains() {
        let shares = one_share(1, 5, 2.5);
        assert_eq!(shares, [0.625, 2.5, 0.625, 0.625, 0.625]);
    }

    #[test]
    fn trials_come_back_in_order_however_many_run_at_once() {
        let trials: Vec<Vec<f32>> = (0..17).map(|trial| vec![trial as f32]).collect();
        let losses = |shares: &[f32]| Ok(Losses { text: f64::from(shares[0]), probes: 0.0 });
        for jobs in [0, 1, 4, 40] {
            let mut heard = Vec::new();
            let results = in_parallel(jobs, &trials, &losses, &mut |trial, _| heard.push(trial)).unwrap();
            assert!(results.iter().enumerate().all(|(trial, of)| of.text == trial as f64));
            heard.sort_unstable();
            assert!(heard.into_iter().eq(0..17));
        }
        let failing = |shares: &[f32]| match shares[0] {
            3.0 => Err(Error::options("tasks", "no")),
            of => Ok(Losses { text: f64::from(of), probes: 0.0 }),
        };
        assert!(in_parallel(2, &trials, &failing, &mut |_, _| ()).is_err());
    }
}

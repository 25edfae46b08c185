//! The loss reaches every parameter and falls.

use locket_model::testing::TinyLlama;

use super::*;
use crate::{parameters::AdamW, recipe::Recipe, testing};

fn setup(test: impl FnOnce(&LearnedTrainer<'_>, Recipe<'_>)) {
    let (_folder, checkpoint) = testing::checkpoint(&TinyLlama::default());
    let decoder = Decoder::load(&checkpoint, &Device::Cpu, DType::F32).unwrap();
    let settings = LearnedSettings { hidden: 8, kernel: 3, windows: vec![20], ..LearnedSettings::default() };
    let trainer = LearnedTrainer::new(&decoder, settings, 2);
    let (folder, processor) = (tempfile::tempdir().unwrap(), testing::processor());
    let path = testing::text(folder.path());
    test(&trainer, Recipe::new(&[path], &processor, 2, 300, 1).unwrap());
}

fn scalar(x: &Tensor) -> f32 {
    x.to_scalar::<f32>().unwrap()
}

#[test]
fn the_loss_of_every_kind_falls() {
    setup(|trainer, mut recipe| {
        let mut parameters = trainer.initial(3).unwrap();
        let batches: Vec<_> = [Kind::Natural, Kind::Questions, Kind::Repeat]
            .into_iter()
            .zip(0..)
            .map(|(kind, step)| recipe.batch(step, kind).unwrap())
            .collect();
        for step in 0..2 {
            trainer.prepare(&mut parameters, step, &batches[step as usize]).unwrap();
        }
        let losses = |parameters: &Parameters| -> Vec<f32> {
            batches.iter().map(|batch| scalar(&trainer.gradients(parameters, batch).unwrap().1)).collect()
        };
        let before = losses(&parameters);
        let mut adam = AdamW::new(&parameters, (0.9, 0.98), Some(1.0)).unwrap();
        for step in 0..30 {
            let (gradients, _) = trainer.gradients(&parameters, &batches[step % 3]).unwrap();
            let gradients = gradients.stacked(&parameters).unwrap();
            adam.step(&mut parameters, &gradients, 3e-3).unwrap();
        }
        let after = losses(&parameters);
        // The recall loss of a model without order in its attention is little above its least value.
        for ((before, after), share) in before.iter().zip(&after).zip([0.9, 0.995, 0.995]) {
            assert!(before.is_finite() && *after < share * before, "{before} {after}");
        }
    });
}

#[test]
fn gradients_reach_every_parameter_and_sum_over_micro_batches() {
    setup(|trainer, mut recipe| {
        let parameters = trainer.initial(3).unwrap();
        let batch = recipe.batch(0, Kind::Questions).unwrap();
        let of = |size| {
            let trainer = LearnedTrainer {
                decoder: trainer.decoder,
                settings: trainer.settings.clone(),
                micro_batch: size,
            };
            let (gradients, loss) = trainer.gradients(&parameters, &batch).unwrap();
            (gradients.stacked(&parameters).unwrap(), scalar(&loss))
        };
        let (whole, parts) = (of(2), of(1));
        assert!((whole.1 - parts.1).abs() < 1e-5 * whole.1);
        for ((whole, parts), parameter) in whole.0.iter().zip(&parts.0).zip(&parameters.0) {
            let most = |x: &Tensor| scalar(&x.abs().unwrap().max_all().unwrap());
            for layer in 0..2 {
                assert!(most(&whole.get(layer).unwrap()) > 0.0, "{} of layer {layer}", parameter.name);
            }
            let error = most(&(whole - parts).unwrap());
            assert!(error < 1e-4 * most(whole), "{}: {error}", parameter.name);
        }
    });
}

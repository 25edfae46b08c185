//! What a sequence must say, found out the slow way.

use super::*;

/// What continuation `choice` must say: one token after the other, no batch, no scheduler, no threads.
pub(super) fn alone(
    request: &GenerationRequest,
    choice: u32,
) -> (Vec<u32>, Result<FinishReason, EngineFailure>) {
    let prompt = request.prompt_ids.len();
    let mut output = Vec::new();
    if request.max_tokens == 0 {
        return (output, Ok(FinishReason::Length));
    }
    let mut sampler = SequenceSampler::new(request, choice, request.sampling.seed.unwrap());
    let mut scratch = SamplerScratch::default();
    let mut steering = request.steering.as_ref().map(|plan| plan.start(choice));
    let mut set = TokenSet::new(VOCAB_SIZE as u32);
    let mut guide = steering.as_mut().map_or(Guide::Free, |steering| steering.compute(&mut set));
    loop {
        let way = match &guide {
            Guide::Free => Choice::Free,
            Guide::Allowed => Choice::Among(&set),
            Guide::Forced(id) => Choice::Forced(*id),
            Guide::Complete => return (output, Ok(FinishReason::Complete)),
            Guide::Failed(_) => return (output, Err(EngineFailure::Unsteerable)),
        };
        let row: Vec<f32> = logits_of(state_after(request, &output, prompt + output.len())).collect();
        let Ok(SampledToken { id, .. }) = sampler.sample(&row, request, &output, way, &mut scratch) else {
            return (output, Err(EngineFailure::Unsteerable));
        };
        if request.sampling.stop_token_ids.contains(&id) {
            return (output, Ok(FinishReason::Stop { token_id: id }));
        }
        output.push(id);
        let advanced = steering.as_mut().map(|steering| steering.advance(id));
        if advanced == Some(Advance::Known(Guide::Complete)) {
            return (output, Ok(FinishReason::Complete));
        }
        if output.len() == request.max_tokens as usize {
            return (output, Ok(FinishReason::Length));
        }
        match (advanced, &mut steering) {
            (Some(Advance::Known(known)), _) => guide = known,
            (Some(Advance::Compute), Some(steering)) => guide = steering.compute(&mut set),
            _ => {}
        }
    }
}

//! Inputs through the engine's queue, some at a time.

use futures_util::{StreamExt as _, stream::FuturesUnordered};
use locket_engine::{GenerationRequest, SequenceEvent, SequenceStream, SubmitError};

use crate::{error::ApiError, keys::TokenReservation, state::AppState};

/// Inputs of one request that are queued or running at once: enough to fill steps, and the rest of
/// the queue is for others.
const IN_FLIGHT: usize = 16;

/// The vectors of all requests, in their order, each charged when it is there. Dropping the future
/// ends what runs.
///
/// # Errors
/// The engine's refusals and failures; a queue that others have filled is no failure while inputs of
/// this request are in it.
pub(super) async fn embed(
    state: &AppState,
    requests: Vec<GenerationRequest>,
    mut reservation: Option<&mut TokenReservation>,
) -> Result<Vec<Vec<f32>>, ApiError> {
    let mut vectors = vec![Vec::new(); requests.len()];
    let lengths: Vec<u64> = requests.iter().map(|request| request.prompt_ids.len() as u64).collect();
    let mut used = 0;
    let mut waiting = requests.into_iter().enumerate();
    let mut next = waiting.next();
    let mut running = FuturesUnordered::new();
    loop {
        while running.len() < IN_FLIGHT
            && let Some((index, request)) = next.take()
        {
            match state.engine().submit(request.clone()) {
                Ok(streams) => {
                    running.extend(streams.into_iter().map(|stream| read(index, stream)));
                    next = waiting.next();
                }
                Err(SubmitError::QueueFull { .. }) if !running.is_empty() => {
                    next = Some((index, request));
                    break;
                }
                Err(error) => return Err(ApiError::from_submit(&error, "input")),
            }
        }
        let Some(outcome) = running.next().await else { return Ok(vectors) };
        let (index, vector) = outcome?;
        vectors[index] = vector;
        used += lengths[index];
        if let Some(reservation) = &mut reservation {
            reservation.use_up(used);
        }
    }
}

/// Reads one sequence to its end.
async fn read(index: usize, mut sequence: SequenceStream) -> Result<(usize, Vec<f32>), ApiError> {
    let mut vector = None;
    while let Some(event) = sequence.next().await {
        match event {
            SequenceEvent::Embedding(embedding) => vector = Some(embedding),
            SequenceEvent::Failed(failure) => return Err(ApiError::from_failure(&failure)),
            _ => {}
        }
    }
    vector.map(|vector| (index, vector)).ok_or_else(|| ApiError::internal("a sequence without its embedding"))
}

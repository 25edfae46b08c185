//! Adapters that requests may name: loaded and forgotten while the engine runs.
//!
//! What an adapter is to snapshots is a digest of its numbers, the same in every process. A request names it
//! by its number in this one.

use std::{
    collections::BTreeMap,
    sync::{Mutex, MutexGuard, PoisonError, mpsc},
};

use locket_model::{Adapter, AdapterId, Error};
use sha2::{Digest as _, Sha256};

use crate::{EngineFailure, SubmitError, engine::Engine, sequence::WaitingRequest, snapshots::Digest};

/// What the engine thread is asked to load, and whom it tells.
#[derive(Debug)]
pub(crate) struct LoadAdapter {
    adapter: Adapter,
    reply: mpsc::SyncSender<Result<AdapterId, Error>>,
}

/// Those that are there.
#[derive(Debug, Default)]
pub(crate) struct Adapters {
    loaded: Mutex<BTreeMap<AdapterId, Digest>>,
    /// One is loaded at a time, for which the channel has a place.
    loading: Mutex<()>,
}

impl Adapters {
    fn loaded(&self) -> MutexGuard<'_, BTreeMap<AdapterId, Digest>> {
        // One operation on a map at a time cannot leave it half-changed.
        self.loaded.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What the adapter is to snapshots; `None`: it is not loaded.
    pub(crate) fn digest(&self, id: AdapterId) -> Option<Digest> {
        self.loaded().get(&id).copied()
    }

    /// Lets no further request name it; whether one could.
    pub(crate) fn remove(&self, id: AdapterId) -> bool {
        self.loaded().remove(&id).is_some()
    }

    /// Has `send` bring an adapter to the engine thread and waits for what becomes of it.
    pub(crate) fn load(
        &self,
        adapter: Adapter,
        send: impl FnOnce(Box<LoadAdapter>) -> Result<(), SubmitError>,
    ) -> Result<AdapterId, SubmitError> {
        let digest = digest(&adapter);
        let _one_at_a_time = self.loading.lock().unwrap_or_else(PoisonError::into_inner);
        let (reply, answer) = mpsc::sync_channel(1);
        send(Box::new(LoadAdapter { adapter, reply }))?;
        let loaded = answer.recv().map_err(|_| SubmitError::ShuttingDown)?;
        let id = loaded.map_err(|error| SubmitError::DoesNotFit(error.to_string()))?;
        self.loaded().insert(id, digest);
        Ok(id)
    }
}

fn digest(adapter: &Adapter) -> Digest {
    let mut hash = Sha256::new();
    for (layer, linear, pair) in adapter.pairs() {
        let facts = [layer as u64, linear as u64, pair.rank as u64, pair.scale.to_bits().into()];
        facts.iter().for_each(|fact| hash.update(fact.to_le_bytes()));
        pair.a.iter().chain(&pair.b).for_each(|number| hash.update(number.to_le_bytes()));
    }
    hash.finalize().into()
}

impl Engine {
    pub(crate) fn load_adapter(&mut self, load: LoadAdapter) {
        let LoadAdapter { adapter, reply } = load;
        let loaded = self.runner.load_adapter(&adapter);
        if let Err(error) = &loaded {
            tracing::warn!(%error, "an adapter is refused");
        }
        // Who does not wait any more does not use it either.
        if let Err(mpsc::SendError(Ok(id))) = reply.send(loaded) {
            self.unloading.push(id);
        }
    }

    /// Fails a request whose adapter was forgotten while it was on its way; whether it may go on.
    pub(crate) fn has_adapter(&self, waiting: &WaitingRequest) -> bool {
        let is_there = waiting
            .request
            .adapter
            .is_none_or(|id| self.runner.has_adapter(id) && !self.unloading.contains(&id));
        if !is_there {
            self.shared.release_waiting(waiting.sequences.len());
            super::engine::fail(waiting, EngineFailure::Internal, &self.shared);
        }
        is_there
    }

    /// Forgets adapters that were given up and that no sequence goes through any more.
    pub(crate) fn unload_adapters(&mut self) {
        let Self { unloading, scheduler, runner, .. } = self;
        unloading.retain(|id| {
            let waiting = scheduler.waiting.iter().map(|waiting| &waiting.request);
            let mut requests = waiting.chain(scheduler.running.iter().map(|sequence| &sequence.request));
            let is_used = requests.any(|request| request.adapter == Some(*id));
            if !is_used {
                runner.unload_adapter(*id);
            }
            is_used
        });
    }
}

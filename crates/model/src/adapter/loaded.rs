//! Adapters in the form of a backend.

use std::collections::BTreeMap;

use super::{Adapter, Extras, Linear};
use crate::{AdapterId, Batch, Error, ops::Ops};

/// Of one layer, the pairs of [`Linear::ALL`] in the backend's form.
pub type LayerLora<L> = [Option<L>; 7];

/// All adapters that are loaded.
pub struct Loaded<L> {
    limits: Extras,
    next: u32,
    adapters: BTreeMap<AdapterId, Vec<LayerLora<L>>>,
    bytes: BTreeMap<AdapterId, u64>,
}

/// Rows of a step that go through one adapter.
pub struct AdaptedRows<'a, L> {
    /// The rows, ascending.
    pub rows: Vec<u32>,
    /// The adapter.
    pub layers: &'a [LayerLora<L>],
}

impl<L> Default for Loaded<L> {
    fn default() -> Self {
        Self { limits: Extras::default(), next: 0, adapters: BTreeMap::new(), bytes: BTreeMap::new() }
    }
}

impl<L> Loaded<L> {
    /// Takes as many adapters as `limits` says from now on.
    pub(crate) fn limit(&mut self, limits: Extras) {
        self.limits = limits;
    }

    /// Brings an adapter into the backend's form.
    ///
    /// # Errors
    /// [`Error::Plan`] if there is no room for it, or the backend's.
    pub(crate) fn load<O: Ops<Lora = L>>(
        &mut self,
        adapter: &Adapter,
        ops: &mut O,
    ) -> Result<AdapterId, Error> {
        let Extras { adapters, max_rank, .. } = self.limits;
        if self.adapters.len() >= adapters {
            return Err(Error::Plan(format!(
                "{} adapters are loaded, as many as there is room for; unload one, or plan for more",
                self.adapters.len()
            )));
        }
        if adapter.max_rank() > max_rank {
            let rank = adapter.max_rank();
            return Err(Error::Plan(format!("an adapter has rank {rank}; there is room for {max_rank}")));
        }
        if adapter.layers.len() != ops.config().model.num_layers {
            return Err(Error::Plan("an adapter was read for another model".into()));
        }
        let mut bytes = 0;
        let mut prepare = |(linear, pair): (Linear, &Option<super::LoraPair>)| -> Result<Option<L>, Error> {
            let Some(pair) = pair else { return Ok(None) };
            let prepared = ops.prepare_lora(pair, linear)?;
            bytes += O::lora_bytes(&prepared);
            Ok(Some(prepared))
        };
        let mut layers = Vec::with_capacity(adapter.layers.len());
        for layer in &adapter.layers {
            let mut prepared: LayerLora<L> = Default::default();
            for (place, pair) in prepared.iter_mut().zip(Linear::ALL.into_iter().zip(layer)) {
                *place = prepare(pair)?;
            }
            layers.push(prepared);
        }
        let id = AdapterId(self.next);
        self.next += 1;
        self.adapters.insert(id, layers);
        self.bytes.insert(id, bytes);
        Ok(id)
    }

    /// Forgets an adapter.
    ///
    /// # Errors
    /// [`Error::InvalidBatch`] if it is not loaded.
    pub(crate) fn unload(&mut self, id: AdapterId) -> Result<(), Error> {
        self.bytes.remove(&id);
        self.adapters.remove(&id).map(drop).ok_or_else(|| not_loaded(id))
    }

    /// Bytes of all adapters.
    pub(crate) fn num_bytes(&self) -> u64 {
        self.bytes.values().sum()
    }

    /// Which rows of a batch go through which adapter, in the order of ids.
    ///
    /// # Errors
    /// [`Error::InvalidBatch`] if an adapter is not loaded.
    pub(crate) fn rows(&self, batch: &Batch) -> Result<Vec<AdaptedRows<'_, L>>, Error> {
        let mut rows: BTreeMap<AdapterId, Vec<u32>> = BTreeMap::new();
        for sequence in &batch.sequences {
            if let Some(id) = sequence.adapter {
                rows.entry(id).or_default().extend(sequence.rows.clone());
            }
        }
        let adapted = rows.into_iter().map(|(id, rows)| {
            let layers = self.adapters.get(&id).ok_or_else(|| not_loaded(id))?;
            Ok(AdaptedRows { rows, layers })
        });
        adapted.collect()
    }

    /// The layers of an adapter, as [`Self::rows`] has them, for other rows.
    ///
    /// # Errors
    /// As [`Self::rows`].
    pub(crate) fn layers(&self, id: AdapterId) -> Result<&[LayerLora<L>], Error> {
        self.adapters.get(&id).map(Vec::as_slice).ok_or_else(|| not_loaded(id))
    }
}

fn not_loaded(id: AdapterId) -> Error {
    Error::InvalidBatch(format!("adapter {} is not loaded", id.0))
}

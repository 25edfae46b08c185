//! A block's bookkeeping as bytes, for snapshots. Keys and values are the backend's part.
//!
//! Little-endian. Only filled slots and what the method uses are written, so the image depends on the
//! sequence alone and fits into any block that is large enough.

use super::{BlockState, CacheMethod, CacheSettings, FoldContext, progress::Progress};
use crate::Error;

/// Changes whenever the layout or the meaning of a number does.
const VERSION: u32 = 3;

impl BlockState {
    /// Appends the block's bookkeeping to `out`.
    ///
    /// # Errors
    /// [`Error::InvalidBatch`] if the block is not open.
    pub fn export(&self, context: &FoldContext, out: &mut Vec<u8>) -> Result<(), Error> {
        let Some(settings) = self.settings() else {
            return Err(Error::InvalidBatch("a block is to be exported but not open".into()));
        };
        let geometry = self.geometry();
        let side = settings.method.side_arrays(geometry, context.side_car.as_deref());
        let mut put = |number: u32| out.extend_from_slice(&number.to_le_bytes());
        put(VERSION);
        for number in [
            geometry.num_layers,
            geometry.num_heads,
            geometry.num_kv_heads,
            geometry.head_dim,
            geometry.max_position,
            side.columns,
            side.per_layer,
        ] {
            put(u32::try_from(number).unwrap_or(u32::MAX));
        }
        let method = CacheMethod::ALL.iter().position(|&method| method == settings.method).unwrap_or(0);
        put(method as u32);
        let CacheSettings { ring, sinks, recent, recall_permille, layer_budgets, .. } = settings;
        // A sequence that never folds goes on as far as the block has room that it comes back to.
        let slots = if settings.folds() { settings.slots } else { 0 };
        [slots, ring, sinks, recent, recall_permille.into(), layer_budgets.into(), self.is_spread.into()]
            .into_iter()
            .for_each(&mut put);
        let with_gaps = self.keeps_gaps();
        put(with_gaps.into());
        for layer in 0..geometry.num_layers {
            let len = self.len(layer);
            let Progress { seen, next, shift, sink_end } = self.progress[layer];
            let words = [seen, len as u32, self.folded[layer].into(), next, shift, sink_end];
            words.into_iter().for_each(&mut put);
            for head in 0..geometry.num_kv_heads {
                self.positions_of(layer, head)[..len].iter().copied().for_each(&mut put);
                let gaps = self.gaps_of(layer, head).iter().copied().filter(|_| with_gaps);
                gaps.take(len).for_each(&mut put);
                for column in 0..side.columns {
                    let column = &self.column_of(layer, column, head)[..len];
                    column.iter().map(|number| number.to_bits()).for_each(&mut put);
                }
            }
            self.kept(layer)[..side.per_layer].iter().map(|number| number.to_bits()).for_each(&mut put);
        }
        Ok(())
    }

    /// Whether the image has gaps per slot: without any, or without folds, they say nothing.
    fn keeps_gaps(&self) -> bool {
        self.settings().is_some_and(|settings| settings.folds()) && self.has_gaps()
    }

    /// Bytes that [`Self::export`] appends.
    pub fn image_bytes(&self, context: &FoldContext) -> usize {
        let Some(settings) = self.settings() else { return 0 };
        let geometry = self.geometry();
        let side = settings.method.side_arrays(geometry, context.side_car.as_deref());
        let slots: usize = (0..geometry.num_layers).map(|layer| self.len(layer)).sum();
        let of_layers = geometry.num_layers * (6 + side.per_layer);
        let of_slots = 1 + usize::from(self.keeps_gaps()) + side.columns;
        size_of::<u32>() * (17 + of_layers + slots * geometry.num_kv_heads * of_slots)
    }

    /// Opens the block with what [`Self::export`] wrote at the start of `bytes`; returns the rest. On an
    /// error the block is closed.
    ///
    /// # Errors
    /// [`Error::InvalidBatch`] if the bytes are broken, of another model or version, or do not fit.
    pub fn import<'b>(&mut self, bytes: &'b [u8], context: &FoldContext) -> Result<&'b [u8], Error> {
        self.close();
        let read = self.read_image(Words(bytes), context);
        if read.is_err() {
            self.close();
        }
        read
    }

    fn read_image<'b>(&mut self, mut words: Words<'b>, context: &FoldContext) -> Result<&'b [u8], Error> {
        let geometry = self.geometry();
        words.expect("version", VERSION)?;
        words.expect("layers", geometry.num_layers as u32)?;
        words.expect("query heads", geometry.num_heads as u32)?;
        words.expect("key/value heads", geometry.num_kv_heads as u32)?;
        words.expect("head dimensions", geometry.head_dim as u32)?;
        words.expect("trained positions", u32::try_from(geometry.max_position).unwrap_or(u32::MAX))?;
        let (columns, per_layer) = (words.next()?, words.next()?);
        let method = words.next()? as usize;
        let method = *CacheMethod::ALL.get(method).ok_or_else(|| broken("an unknown method".into()))?;
        let [slots, ring, sinks, recent] = [words.next()?, words.next()?, words.next()?, words.next()?];
        let recall_permille =
            u16::try_from(words.next()?).map_err(|_| broken("an impossible recall share".into()))?;
        let layer_budgets = words.flag("layer budgets")?;
        let is_spread = words.flag("layout")?;
        let mut settings =
            CacheSettings { method, slots, ring, sinks, recent, recall_permille, layer_budgets };
        if !settings.folds() {
            settings.slots = u32::try_from(self.stride()).unwrap_or(u32::MAX);
        }
        self.open(settings, context)?;
        if is_spread {
            self.check_spread()?;
            self.lay_out_by_budgets();
        }
        let side = method.side_arrays(geometry, context.side_car.as_deref());
        if (side.columns, side.per_layer) != (columns as usize, per_layer as usize) {
            return Err(broken("side arrays of other weights".into()));
        }
        let with_gaps = words.flag("gaps")?;
        if with_gaps && !self.side_arrays().gaps {
            return Err(broken("gaps, which the blocks were not planned for".into()));
        }
        let mut before = None;
        for layer in 0..geometry.num_layers {
            let (seen, len, folded) = (words.next()?, words.next()?, words.next()?);
            let [next, shift, sink_end] = [words.next()?, words.next()?, words.next()?];
            let progress = Progress { seen, next, shift, sink_end };
            let room = settings.capacity().min(u32::try_from(self.stride()).unwrap_or(u32::MAX));
            let room = if is_spread { self.stride_of(layer) } else { room as usize };
            if len as usize > room || len > seen || folded > 1 || !progress.may_follow(before) {
                return Err(broken(format!("layer {layer} with {len} of {seen} tokens before {next}")));
            }
            before = Some(progress);
            self.progress[layer] = progress;
            self.len[layer] = len;
            self.folded[layer] = folded == 1;
            for head in 0..geometry.num_kv_heads {
                for slot in &mut self.positions_of_mut(layer, head)[..len as usize] {
                    *slot = words.next()?;
                }
                if with_gaps {
                    for gaps in &mut self.gaps_of_mut(layer, head)[..len as usize] {
                        *gaps = words.next()?;
                    }
                }
                for column in 0..side.columns {
                    for number in &mut self.column_mut(layer, column, head)[..len as usize] {
                        *number = f32::from_bits(words.next()?);
                    }
                }
            }
            for number in &mut self.kept_mut(layer)[..side.per_layer] {
                *number = f32::from_bits(words.next()?);
            }
        }
        Ok(words.0)
    }
}

fn broken(reason: String) -> Error {
    Error::InvalidBatch(format!("a block's image has {reason}"))
}

/// Reads words from the front of bytes.
struct Words<'b>(&'b [u8]);

impl Words<'_> {
    fn peek(&self) -> Result<u32, Error> {
        let (word, _) = self.0.split_first_chunk().ok_or_else(|| broken("too few bytes".into()))?;
        Ok(u32::from_le_bytes(*word))
    }

    fn next(&mut self) -> Result<u32, Error> {
        let word = self.peek()?;
        self.0 = &self.0[4..];
        Ok(word)
    }

    fn flag(&mut self, name: &str) -> Result<bool, Error> {
        match self.next()? {
            word @ 0..=1 => Ok(word == 1),
            word => Err(broken(format!("{word} as {name}"))),
        }
    }

    fn expect(&mut self, name: &str, wanted: u32) -> Result<(), Error> {
        match self.next()? {
            word if word == wanted => Ok(()),
            word => Err(broken(format!("{name} {word} instead of {wanted}"))),
        }
    }
}

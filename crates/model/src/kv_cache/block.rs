//! What is in which slot of one block: fill counts per layer, positions and side arrays per slot.

use super::{
    CacheGeometry, CacheSettings, FoldContext, FoldScratch, LayerView, Rotation, SideArrays, SlotMove,
    SlotReader,
    budgets::{self, Regions},
    compaction::Frame,
    methods::lococo::Mixture,
    progress::Progress,
};
use crate::Error;

/// What to do next with the rows of one sequence in one layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segment {
    /// Call [`BlockState::fold`] first.
    pub fold: bool,
    /// Then, unless this is 0, call [`BlockState::compact`] with it.
    pub compact: u32,
    /// Then append and attend this many rows.
    pub rows: usize,
}

/// Bookkeeping of one block. Keys and values lie with the backend.
#[derive(Debug, Clone)]
pub struct BlockState {
    geometry: CacheGeometry,
    /// Slots per layer and head that the block's memory has.
    stride: usize,
    /// Side arrays that the block's memory has.
    side: SideArrays,
    settings: Option<CacheSettings>,
    frame: Frame,
    /// `M_l` of each layer; empty if all have the settings' `M`.
    budgets: Vec<u32>,
    /// Whether the layers have the regions that their budgets ask for.
    pub(super) is_spread: bool,
    /// Where the layers' positions and side arrays lie.
    regions: Regions,
    /// Filled slots `[layers]`; the same for every head of a layer.
    pub(super) len: Vec<u32>,
    /// Whether a layer has folded before `[layers]`.
    pub(super) folded: Vec<bool>,
    /// How far each layer has come `[layers]`.
    pub(super) progress: Vec<Progress>,
    /// Position in the frame of the token in each slot: of each layer `[kv_heads, its stride]`.
    positions: Vec<u32>,
    /// Positions without a token before the token in each slot, as [`Self::positions`]; empty if the block
    /// is not made for folds of sequences with gaps.
    gaps: Vec<u32>,
    /// Side arrays: of each layer `[columns, kv_heads, its stride]`.
    columns: Vec<f32>,
    /// Other numbers of the method `[layers, per_layer]`.
    kept: Vec<f32>,
}

impl BlockState {
    /// An empty block whose memory has `stride` slots per layer and head, and `side` beside them.
    pub fn new(geometry: CacheGeometry, stride: usize, side: SideArrays) -> Self {
        let slots = geometry.num_layers * geometry.num_kv_heads * stride;
        Self {
            geometry,
            stride,
            side,
            settings: None,
            frame: Frame::fixed(geometry.max_position),
            budgets: Vec::new(),
            is_spread: false,
            regions: Regions::uniform(geometry.num_layers, stride),
            len: vec![0; geometry.num_layers],
            folded: vec![false; geometry.num_layers],
            progress: vec![Progress::default(); geometry.num_layers],
            positions: vec![0; slots],
            gaps: vec![0; if side.gaps { slots } else { 0 }],
            columns: vec![0.0; slots * side.columns],
            kept: vec![0.0; geometry.num_layers * side.per_layer],
        }
    }

    /// The model's geometry.
    pub fn geometry(&self) -> CacheGeometry {
        self.geometry
    }

    /// Side arrays that the block's memory has.
    pub(super) fn side_arrays(&self) -> SideArrays {
        self.side
    }

    /// Slots per layer and head that the block's memory has on average.
    pub fn stride(&self) -> usize {
        self.stride
    }

    /// Whether the layers have regions of their own sizes.
    pub fn is_spread(&self) -> bool {
        self.is_spread
    }

    /// Slots per head that `layer` has.
    pub fn stride_of(&self, layer: usize) -> usize {
        self.regions.strides[layer]
    }

    /// Slots per head of all layers before `layer`.
    pub fn start_of(&self, layer: usize) -> usize {
        self.regions.starts[layer]
    }

    /// The settings of the sequence that owns the block, if one does.
    pub fn settings(&self) -> Option<CacheSettings> {
        self.settings
    }

    /// Empties the block for a new sequence.
    ///
    /// # Errors
    /// [`Error::InvalidBatch`] if the settings contradict the block's memory, its slots' type or the
    /// side-car.
    pub fn open(&mut self, settings: CacheSettings, context: &FoldContext) -> Result<(), Error> {
        let side_car = context.side_car.as_deref();
        let needed = settings.method.side_arrays(self.geometry, side_car);
        settings.check(self.stride, self.side, needed)?;
        super::side_car::check(settings, side_car)?;
        if settings.method.mixes() && !context.slot_type.is_float() {
            let (method, slots) = (settings.method.name(), context.slot_type.name());
            return Err(Error::InvalidBatch(format!(
                "method {method} mixes slots, which {slots} slots do not allow"
            )));
        }
        let shares = side_car.and_then(|side_car| side_car.layer_shares.as_deref());
        if settings.layer_budgets && shares.is_none() {
            return Err(Error::InvalidBatch("layer_budgets is on, but no side-car names shares".into()));
        }
        self.close();
        self.begin(settings, shares);
        Ok(())
    }

    /// Takes settings that were checked; `shares` are those of the layers, for settings that ask.
    pub(super) fn begin(&mut self, settings: CacheSettings, shares: Option<&[f32]>) {
        self.settings = Some(settings);
        self.budgets.clear();
        if let Some(shares) = shares.filter(|_| settings.layer_budgets) {
            budgets::layer_slots(shares, settings, self.geometry.max_position, &mut self.budgets);
        }
        let most = self.budgets.iter().max().map_or(settings.slots, |&slots| slots.max(settings.slots));
        self.frame = if settings.folds() {
            Frame::new(self.geometry.max_position, most.saturating_add(settings.ring))
        } else {
            Frame::fixed(self.geometry.max_position)
        };
    }

    /// Empties the block.
    pub fn close(&mut self) {
        self.settings = None;
        self.budgets.clear();
        self.lay_out_uniformly();
        self.len.fill(0);
        self.folded.fill(false);
        self.progress.fill(Progress::default());
        self.positions.fill(0);
        self.gaps.fill(0);
        self.columns.fill(0.0);
        self.kept.fill(0.0);
    }

    fn lay_out_uniformly(&mut self) {
        self.is_spread = false;
        self.regions.set(std::iter::repeat(self.stride));
    }

    /// Gives every layer the region that its budget asks for; positions and side arrays are lost.
    pub(super) fn lay_out_by_budgets(&mut self) {
        let ring = self.settings.map_or(0, |settings| settings.ring);
        self.is_spread = true;
        self.regions.set(self.budgets.iter().map(|slots| (slots + ring) as usize));
    }

    /// Whether the block is to be spread before its next row: its layers have budgets, and are full for
    /// the first time. The backend then folds every layer with [`Self::fold`] and calls [`Self::spread`].
    pub fn is_to_be_spread(&self) -> bool {
        let Some(settings) = self.settings else { return false };
        !self.is_spread && !self.budgets.is_empty() && self.seen(0) == settings.capacity()
    }

    /// Whether the layers' own regions exist in this block.
    ///
    /// # Errors
    /// [`Error::InvalidBatch`] if they do not.
    pub(super) fn check_spread(&self) -> Result<(), Error> {
        let ring = self.settings.map_or(0, |settings| settings.ring);
        let needed: usize = self.budgets.iter().map(|slots| (slots + ring) as usize).sum();
        let have = self.geometry.num_layers * self.stride;
        if self.budgets.is_empty() || needed > have {
            return Err(Error::InvalidBatch(format!(
                "the layers' budgets need {needed} slots of the block's {have}"
            )));
        }
        Ok(())
    }

    /// Moves positions and side arrays to the layers' own regions, in which the filled slots keep their
    /// numbers. The backend does the same with keys and values.
    pub fn spread(&mut self) {
        let old = self.clone();
        self.lay_out_by_budgets();
        self.take_slots(&old);
    }

    /// How `layer` uses its slots: the settings, with the layer's own budget. No more than half of what
    /// its sinks leave is kept for being recent.
    pub(super) fn layer_settings(&self, layer: usize, settings: CacheSettings) -> CacheSettings {
        let Some(&slots) = self.budgets.get(layer) else { return settings };
        let recent = settings.recent.min(slots.saturating_sub(settings.sinks) / 2);
        CacheSettings { slots, recent, ..settings }
    }

    /// What positions mean in this block.
    pub fn frame(&self) -> Frame {
        self.frame
    }

    /// Least position that the sequence's next token may have.
    pub fn next_position(&self) -> u32 {
        self.progress.first().map_or(0, |progress| progress.next + progress.shift)
    }

    /// Rows that `layer` has seen.
    pub fn seen(&self, layer: usize) -> u32 {
        self.progress[layer].seen
    }

    /// The position that `layer` rotates the sequence's token at `position` to.
    pub fn frame_position(&self, layer: usize, position: u32) -> u32 {
        self.frame.position(self.progress[layer].position(position))
    }

    /// How far `layer`'s positions lie before those of the sequence.
    pub fn shift(&self, layer: usize) -> u32 {
        self.progress[layer].shift
    }

    /// Checks that the block is open and empty and that a whole prompt at `positions` may go into it.
    ///
    /// # Errors
    /// As [`Self::check_append`].
    pub fn check_held(&self, positions: &[u32]) -> Result<(), Error> {
        if self.seen(0) > 0 {
            let seen = self.seen(0);
            return Err(Error::InvalidBatch(format!("a held prompt's block has {seen} tokens already")));
        }
        let settings = self.settings.unwrap_or(CacheSettings::full(1));
        if settings.folds() && !self.side.gaps {
            let reason =
                "a prompt loses tokens, but the block was not planned for gaps in sequences that fold";
            return Err(Error::InvalidBatch(reason.into()));
        }
        self.check_append(0, positions)
    }

    /// Lets all layers go on with the sequence's position `next`, each right behind its own last one.
    pub fn settle(&mut self, next: u32) {
        for progress in &mut self.progress {
            progress.shift = next - progress.next;
        }
    }

    /// Takes the tokens in these slots, which ascend, out of `layer`, unless it has folded or was compacted;
    /// returns what the backend must move, in this order.
    pub fn remove<'s>(&mut self, layer: usize, gone: &[u32], scratch: &'s mut FoldScratch) -> &'s [SlotMove] {
        let moves = scratch.moves_mut();
        moves.clear();
        let (progress, frame) = (self.progress[layer], self.frame);
        if self.folded[layer] || frame.turns(progress.next.saturating_sub(1)) > 0 || progress.shift > 0 {
            return moves;
        }
        let len = self.len(layer);
        let stays: Vec<u32> = (0..len as u32).filter(|slot| gone.binary_search(slot).is_err()).collect();
        for head in 0..self.geometry.num_kv_heads as u32 {
            let places = (0..).zip(&stays).filter(|(to, from)| to != *from);
            moves.extend(places.map(|(to, &from)| SlotMove { head, from, to }));
        }
        self.apply(layer, moves, stays.len());
        self.folded[layer] = false;
        for head in 0..self.geometry.num_kv_heads {
            for slot in 0..stays.len() {
                let position = self.positions_of(layer, head)[slot];
                if let Some(gaps) = self.gaps_of_mut(layer, head).get_mut(slot) {
                    *gaps = position - slot as u32;
                }
            }
        }
        let sinks = self.settings.map_or(0, |settings| settings.sinks as usize).min(stays.len());
        let last_sink = sinks.checked_sub(1).map(|slot| self.positions_of(layer, 0)[slot]);
        let progress = &mut self.progress[layer];
        progress.seen = stays.len() as u32;
        progress.sink_end = last_sink.map_or(0, |position| position + 1);
        moves
    }

    /// Whether positions were left out before the latest token, in some layer.
    pub(super) fn has_gaps(&self) -> bool {
        self.progress.iter().any(|progress| progress.gaps() > 0)
    }

    /// Tokens of the sequence that some layer no longer holds in a slot of their own; 0 while
    /// attention is exact.
    pub fn folded_tokens(&self) -> u32 {
        let layers = self.progress.iter().zip(&self.len);
        layers.map(|(progress, &len)| progress.seen - len).max().unwrap_or(0)
    }

    /// Checks that tokens at `positions`, which ascend, may be appended next, from layer `first_layer` on.
    ///
    /// # Errors
    /// [`Error::InvalidBatch`] if the block is not open, the tokens do not continue its sequence, they
    /// would overflow a block that never folds, lie beyond the model's context, or have gaps that the block
    /// was not made for.
    pub fn check_append(&self, first_layer: usize, positions: &[u32]) -> Result<(), Error> {
        let Some(settings) = self.settings else {
            return Err(Error::InvalidBatch("a sequence's block was not opened".into()));
        };
        let (Some(&position), Some(&last)) = (positions.first(), positions.last()) else { return Ok(()) };
        let rows = positions.len();
        let Some(progress) = self.progress.get(first_layer) else {
            return Err(Error::InvalidBatch(format!("there is no layer {first_layer}")));
        };
        let next = progress.next + progress.shift;
        if position < next {
            return Err(Error::InvalidBatch(format!(
                "a sequence's rows start at position {position}, but its block goes on at {next}"
            )));
        }
        let limit = self.frame.limit();
        if last >= limit {
            return Err(Error::InvalidBatch(format!(
                "{rows} rows from position {position} to {last}; the model was trained on {limit}"
            )));
        }
        let has_gap = u64::from(last - next) + 1 != rows as u64;
        if has_gap && settings.folds() && !self.side.gaps {
            return Err(Error::InvalidBatch(format!(
                "positions {position} to {last} of {rows} rows have gaps, but the block was not planned for \
                 gaps in sequences that fold"
            )));
        }
        // The first layer folds last, so it is the fullest before any fold.
        let room = (settings.capacity() as usize).min(self.stride);
        let never_folds = settings.ring == 0 || room < settings.capacity() as usize;
        let filled = self.len(first_layer);
        if never_folds && filled + rows > room {
            return Err(Error::InvalidBatch(format!(
                "{rows} rows do not fit: {filled} of {room} slots are filled and the block never folds"
            )));
        }
        let to_border = settings.rows_to_border(self.seen(first_layer)) as usize;
        if rows > to_border && !self.budgets.is_empty() {
            return Err(Error::InvalidBatch(format!(
                "{rows} rows from position {position} cross the border at which the block is laid out \
                 anew; a step may append {to_border}"
            )));
        }
        Ok(())
    }

    /// Filled slots of `layer`.
    pub fn len(&self, layer: usize) -> usize {
        self.len[layer] as usize
    }

    /// Whether `layer` holds nothing.
    pub fn is_empty(&self, layer: usize) -> bool {
        self.len[layer] == 0
    }

    /// Filled slots in all layers and heads.
    pub fn used_slots(&self) -> usize {
        self.len.iter().map(|&len| len as usize).sum::<usize>() * self.geometry.num_kv_heads
    }

    /// Positions `[kv_heads, stride]` of `layer`, in the frame that its latest row was appended in; of
    /// each head the first [`Self::len`] count.
    pub fn positions(&self, layer: usize) -> &[u32] {
        let at = self.start_of(layer) * self.geometry.num_kv_heads;
        &self.positions[at..at + self.geometry.num_kv_heads * self.stride_of(layer)]
    }

    pub(super) fn positions_of(&self, layer: usize, head: usize) -> &[u32] {
        let stride = self.stride_of(layer);
        &self.positions(layer)[head * stride..][..stride]
    }

    pub(super) fn positions_of_mut(&mut self, layer: usize, head: usize) -> &mut [u32] {
        let range = self.slots_of(layer, head);
        &mut self.positions[range]
    }

    /// Where the slots of a head lie in [`Self::positions`].
    fn slots_of(&self, layer: usize, head: usize) -> std::ops::Range<usize> {
        let stride = self.stride_of(layer);
        let at = self.start_of(layer) * self.geometry.num_kv_heads + head * stride;
        at..at + stride
    }

    /// Positions without a token before those in the slots of a head `[stride]`; empty if that is not
    /// kept.
    pub(super) fn gaps_of(&self, layer: usize, head: usize) -> &[u32] {
        self.gaps.get(self.slots_of(layer, head)).unwrap_or_default()
    }

    pub(super) fn gaps_of_mut(&mut self, layer: usize, head: usize) -> &mut [u32] {
        let range = self.slots_of(layer, head);
        self.gaps.get_mut(range).unwrap_or_default()
    }

    /// As [`Self::gaps_of`], of all heads `[kv_heads, stride]`.
    fn layer_gaps(&self, layer: usize) -> &[u32] {
        let heads = self.geometry.num_kv_heads;
        let at = self.start_of(layer) * heads;
        self.gaps.get(at..at + heads * self.stride_of(layer)).unwrap_or_default()
    }

    /// Where a side array of a layer lies.
    fn column_range(&self, layer: usize, column: usize) -> std::ops::Range<usize> {
        let heads = self.geometry.num_kv_heads;
        let size = heads * self.stride_of(layer);
        let at = self.start_of(layer) * heads * self.side.columns + column * size;
        at..at + size
    }

    /// A side array of a head `[stride]`.
    pub(super) fn column_mut(&mut self, layer: usize, column: usize, head: usize) -> &mut [f32] {
        let stride = self.stride_of(layer);
        let at = self.column_range(layer, column).start + head * stride;
        &mut self.columns[at..at + stride]
    }

    pub(super) fn column_of(&self, layer: usize, column: usize, head: usize) -> &[f32] {
        let stride = self.stride_of(layer);
        let at = self.column_range(layer, column).start + head * stride;
        &self.columns[at..at + stride]
    }

    /// The first side array of `layer` `[kv_heads, stride]`, where attention reports the weights that
    /// slots received, if the method asks for them.
    pub fn received_mut(&mut self, layer: usize) -> Option<&mut [f32]> {
        self.settings?.method.received()?;
        let range = self.column_range(layer, 0);
        Some(&mut self.columns[range])
    }

    /// The method's other numbers of `layer`.
    pub fn kept_mut(&mut self, layer: usize) -> &mut [f32] {
        let size = self.side.per_layer;
        &mut self.kept[layer * size..(layer + 1) * size]
    }

    pub(super) fn kept(&self, layer: usize) -> &[f32] {
        let size = self.side.per_layer;
        &self.kept[layer * size..(layer + 1) * size]
    }

    /// Stores what the method keeps of the queries of the rows at `positions` that were just appended to
    /// `layer`: `[rows, stride]` whose first `heads * head_dim` numbers count, rotated.
    pub fn keep_queries(
        &mut self,
        layer: usize,
        positions: &[u32],
        queries: &[f32],
        stride: usize,
        rotation: &Rotation,
    ) {
        let Some(settings) = self.settings.filter(|settings| settings.method.keeps_queries()) else { return };
        let geometry = self.geometry;
        let (method, width) = (settings.method.fold_method(), geometry.num_heads * geometry.head_dim);
        let first = self.seen(layer) - positions.len() as u32;
        for (row, (token, &position)) in (first..).zip(positions).enumerate() {
            if let Some(kept) = method.query_place(geometry, token) {
                let rotated_to = self.frame_position(layer, position);
                let kept = &mut self.kept_mut(layer)[kept];
                kept.copy_from_slice(&queries[row * stride..][..width]);
                for head in kept.chunks_exact_mut(geometry.head_dim) {
                    rotation.undo(head, rotated_to);
                }
            }
        }
    }

    /// Stores the scores of rows that were just appended to `layer` from slot `first` on:
    /// `[rows, kv_heads, 2]`.
    pub fn set_scores(&mut self, layer: usize, first: usize, scores: &[f32]) {
        let heads = self.geometry.num_kv_heads;
        for (row, scores) in scores.chunks_exact(2 * heads).enumerate() {
            for head in 0..heads {
                for output in 0..2 {
                    self.column_mut(layer, 1 + output, head)[first + row] = scores[2 * head + output];
                }
            }
        }
    }

    /// Fill count at which `layer` folds. So that one sequence's folds do not all fall into one
    /// step, layer `l` folds first at `M + B - floor(l * B / L)` and then at `M + B`. Layers with
    /// budgets fold together when the block is spread, and then at `M_l + B`.
    fn fold_at(&self, layer: usize, settings: CacheSettings) -> usize {
        let capacity = settings.capacity() as usize;
        if self.is_spread {
            self.stride_of(layer)
        } else if self.folded[layer] || !self.budgets.is_empty() {
            capacity
        } else {
            capacity - layer * settings.ring as usize / self.geometry.num_layers
        }
    }

    /// The next part of rows at `positions` of the sequence that wait for `layer`: fold or not, and how
    /// many rows fit before the next fold or compaction. Loop until all rows are done.
    ///
    /// # Panics
    /// If the block was not opened, there are no rows, or a block that never folds is full (all are
    /// caller's bugs that `upload` refuses).
    pub fn next_segment(&self, layer: usize, positions: &[u32]) -> Segment {
        let settings = self.settings.expect("the block is open");
        let progress = self.progress[layer];
        let turns = |position: u32| self.frame.turns(progress.position(position));
        let new = turns(positions[0]);
        let compact = new - self.frame.turns(progress.next.saturating_sub(1));
        let rows = positions.partition_point(|&position| turns(position) == new);
        let room = self.fold_at(layer, settings).saturating_sub(self.len(layer));
        if room > 0 {
            return Segment { fold: false, compact, rows: rows.min(room) };
        }
        assert!(settings.ring > 0, "a block without ring is full");
        Segment { fold: true, compact, rows: rows.min(settings.ring as usize) }
    }

    /// Records that rows at `positions` of the sequence were appended to `layer`; their keys and values
    /// go to slots `len..len + rows` of every head. Returns the first slot.
    pub fn append(&mut self, layer: usize, positions: &[u32]) -> usize {
        let (start, rows) = (self.len(layer), positions.len());
        let (progress, frame) = (self.progress[layer], self.frame);
        for head in 0..self.geometry.num_kv_heads {
            let slots = &mut self.positions_of_mut(layer, head)[start..start + rows];
            for (slot, &position) in slots.iter_mut().zip(positions) {
                *slot = frame.position(progress.position(position));
            }
            for (token, (gaps, &position)) in
                (progress.seen..).zip(self.gaps_of_mut(layer, head).iter_mut().skip(start).zip(positions))
            {
                *gaps = progress.position(position) - token;
            }
            for column in 0..self.side.columns {
                self.column_mut(layer, column, head)[start..start + rows].fill(0.0);
            }
        }
        let sinks = self.settings.map_or(0, |settings| settings.sinks);
        self.len[layer] += rows as u32;
        self.progress[layer].append(positions, sinks);
        start
    }

    pub(super) fn view<'a>(
        &'a self,
        layer: usize,
        settings: CacheSettings,
        slots: &'a dyn SlotReader,
        context: &'a FoldContext,
    ) -> LayerView<'a> {
        let progress = self.progress[layer];
        let start = self.column_range(layer, 0).start;
        let size = self.geometry.num_kv_heads * self.stride_of(layer);
        LayerView {
            layer,
            len: self.len(layer),
            num_heads: self.geometry.num_heads,
            num_kv_heads: self.geometry.num_kv_heads,
            head_dim: self.geometry.head_dim,
            seen: progress.seen,
            // In the frame of the slots, which a border has not moved yet.
            next_position: self.frame.position(progress.next.saturating_sub(1)) + 1,
            settings,
            positions: self.positions(layer),
            num_gaps: progress.gaps(),
            gaps: self.layer_gaps(layer),
            columns: &self.columns[start..start + self.side.columns * size],
            kept: self.kept(layer),
            stride: self.stride_of(layer),
            slots,
            context,
        }
    }

    /// Moves positions and side arrays of survivors and shortens `layer` to `target` slots.
    pub(super) fn apply(&mut self, layer: usize, moves: &[SlotMove], target: usize) {
        for &SlotMove { head, from, to } in moves {
            let (head, from, to) = (head as usize, from as usize, to as usize);
            let positions = self.positions_of_mut(layer, head);
            positions[to] = positions[from];
            if let Some(&moved) = self.gaps_of(layer, head).get(from) {
                self.gaps_of_mut(layer, head)[to] = moved;
            }
            for column in 0..self.side.columns {
                let column = self.column_mut(layer, column, head);
                column[to] = column[from];
            }
        }
        self.len[layer] = target as u32;
        self.folded[layer] = true;
    }

    /// Takes over the positions of mixed slots; what they receive is counted anew.
    pub(super) fn take_mixture(&mut self, layer: usize, mixture: &Mixture) {
        let heads = self.geometry.num_kv_heads;
        let slots = mixture.sources.len() / heads;
        for head in 0..heads {
            let sources = &mixture.sources[head * slots..(head + 1) * slots];
            // Sources may lie on either side of their new places.
            let positions: Vec<u32> =
                sources.iter().map(|&slot| self.positions_of(layer, head)[slot as usize]).collect();
            self.positions_of_mut(layer, head)[..slots].copy_from_slice(&positions);
            if !self.gaps.is_empty() {
                let gaps: Vec<u32> =
                    sources.iter().map(|&slot| self.gaps_of(layer, head)[slot as usize]).collect();
                self.gaps_of_mut(layer, head)[..slots].copy_from_slice(&gaps);
            }
            self.column_mut(layer, 0, head).fill(0.0);
        }
        self.len[layer] = slots as u32;
        self.folded[layer] = true;
    }

    /// Takes over the whole state of `other`, whose memory may have another stride. The caller
    /// copies keys and values.
    pub fn copy_from(&mut self, other: &Self) {
        self.close();
        self.settings = other.settings;
        self.frame = other.frame;
        self.budgets.clone_from(&other.budgets);
        if other.is_spread {
            self.lay_out_by_budgets();
        }
        self.len.copy_from_slice(&other.len);
        self.folded.copy_from_slice(&other.folded);
        self.progress.copy_from_slice(&other.progress);
        let kept = self.side.per_layer.min(other.side.per_layer);
        for layer in 0..self.geometry.num_layers {
            self.kept_mut(layer)[..kept].copy_from_slice(&other.kept(layer)[..kept]);
        }
        self.take_slots(other);
    }

    /// Copies positions and side arrays of filled slots, whose regions may lie elsewhere in `other`.
    fn take_slots(&mut self, other: &Self) {
        let columns = self.side.columns.min(other.side.columns);
        for layer in 0..self.geometry.num_layers {
            let len = self.len(layer);
            for head in 0..self.geometry.num_kv_heads {
                self.positions_of_mut(layer, head)[..len]
                    .copy_from_slice(&other.positions_of(layer, head)[..len]);
                let gaps = self.gaps_of_mut(layer, head).iter_mut().zip(other.gaps_of(layer, head));
                gaps.take(len).for_each(|(to, from)| *to = *from);
                for column in 0..columns {
                    self.column_mut(layer, column, head)[..len]
                        .copy_from_slice(&other.column_of(layer, column, head)[..len]);
                }
            }
        }
    }

    /// Bytes of positions, side arrays and counts.
    pub fn num_bytes(&self) -> usize {
        size_of_val(self.positions.as_slice())
            + size_of_val(self.gaps.as_slice())
            + size_of_val(self.columns.as_slice())
            + size_of_val(self.kept.as_slice())
    }
}

#[cfg(test)]
mod tests;

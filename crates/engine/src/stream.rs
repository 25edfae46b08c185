//! The bounded channel from the engine to one continuation's reader.
//!
//! The engine never waits for a reader: it looks for room before it runs a sequence. A reader
//! that makes room, or leaves, rings the engine's door so that an idle engine notices.

use std::sync::{
    Arc,
    atomic::{AtomicBool, AtomicU32, Ordering, fence},
};

use tokio::sync::mpsc;

use crate::{EngineFailure, EngineStatus, SequenceEvent, handle::Door};

/// One continuation's events. Dropping it ends the sequence at the next step.
#[derive(Debug)]
pub struct SequenceStream {
    events: mpsc::Receiver<SequenceEvent>,
    /// Set by the engine while the sequence stands still for want of room.
    paused: Arc<AtomicBool>,
    /// Set by the reader when it leaves because it has all it wanted.
    satisfied: Arc<AtomicBool>,
    /// Set by the engine before it sends a token.
    folded_tokens: Arc<AtomicU32>,
    door: Arc<Door>,
    has_ended: bool,
}

impl SequenceStream {
    /// Ends the sequence because its text is complete (a stop string was found). Unlike dropping
    /// the stream, this counts as finished by `stop` and not as aborted.
    pub fn finish(self) {
        self.satisfied.store(true, Ordering::SeqCst);
    }

    /// Tokens that some layer no longer holds in slots of their own; 0 while attention is exact. For
    /// a reader that leaves early: the engine may be some tokens ahead of what was read. A sequence
    /// that ends by itself says the number in [`SequenceEvent::Finished`].
    pub fn folded_tokens(&self) -> u32 {
        self.folded_tokens.load(Ordering::SeqCst)
    }

    /// The next event, or `None` after the last one. Cancel-safe.
    ///
    /// The last event is always [`SequenceEvent::Finished`] or [`SequenceEvent::Failed`], even if
    /// the engine thread is gone.
    pub async fn next(&mut self) -> Option<SequenceEvent> {
        let event = self.events.recv().await;
        self.received(event)
    }

    /// As [`Self::next`], for callers outside of an async runtime; blocks the thread.
    ///
    /// # Panics
    /// If called from within an async runtime.
    pub fn blocking_next(&mut self) -> Option<SequenceEvent> {
        let event = self.events.blocking_recv();
        self.received(event)
    }

    /// The next event if there is one already.
    #[cfg(test)]
    pub(crate) fn try_next(&mut self) -> Option<SequenceEvent> {
        match self.events.try_recv() {
            Ok(event) => self.received(Some(event)),
            Err(mpsc::error::TryRecvError::Empty) => None,
            Err(mpsc::error::TryRecvError::Disconnected) => self.received(None),
        }
    }

    fn received(&mut self, event: Option<SequenceEvent>) -> Option<SequenceEvent> {
        // Pairs with the fence in `EventSender::has_room`: either the engine sees the room that
        // was just made, or we see that it paused.
        fence(Ordering::SeqCst);
        if self.paused.swap(false, Ordering::SeqCst) {
            self.door.wake();
        }
        match event {
            Some(event) => {
                self.has_ended |= event.is_last();
                Some(event)
            }
            None if self.has_ended => None,
            None => {
                self.has_ended = true;
                let failure = match self.door.status() {
                    EngineStatus::Stopped | EngineStatus::Draining => EngineFailure::ShuttingDown,
                    EngineStatus::Ready | EngineStatus::Dead => EngineFailure::Internal,
                };
                Some(SequenceEvent::Failed(failure))
            }
        }
    }
}

impl Drop for SequenceStream {
    fn drop(&mut self) {
        self.events.close();
        if !self.has_ended {
            self.door.wake();
        }
    }
}

/// The engine's end.
#[derive(Debug)]
pub(crate) struct EventSender {
    events: mpsc::Sender<SequenceEvent>,
    paused: Arc<AtomicBool>,
    satisfied: Arc<AtomicBool>,
    folded_tokens: Arc<AtomicU32>,
}

impl EventSender {
    /// What [`SequenceStream::folded_tokens`] says from now on.
    pub(crate) fn set_folded_tokens(&self, tokens: u32) {
        self.folded_tokens.store(tokens, Ordering::SeqCst);
    }

    /// Whether the reader has left.
    pub(crate) fn is_closed(&self) -> bool {
        self.events.is_closed()
    }

    /// Whether the reader, having left, had all it wanted.
    pub(crate) fn is_satisfied(&self) -> bool {
        self.satisfied.load(Ordering::SeqCst)
    }

    /// Whether `count` events fit; if not, the reader rings once it has made room.
    pub(crate) fn has_room(&self, count: usize) -> bool {
        if self.events.capacity() >= count {
            return true;
        }
        self.paused.store(true, Ordering::SeqCst);
        fence(Ordering::SeqCst);
        let has_room = self.events.capacity() >= count;
        if has_room {
            self.paused.store(false, Ordering::SeqCst);
        }
        has_room
    }

    /// Sends an event for which room was seen before. Only the engine sends, so room never shrinks
    /// in between; a reader that has left is noticed at the next step.
    pub(crate) fn send(&self, event: SequenceEvent) {
        if let Err(mpsc::error::TrySendError::Full(event)) = self.events.try_send(event) {
            tracing::error!(?event, "an event was lost: no room was kept for it");
            debug_assert!(false, "no room was kept for an event");
        }
    }
}

/// Both ends of a channel for `buffer` events.
pub(crate) fn channel(buffer: usize, door: &Arc<Door>) -> (EventSender, SequenceStream) {
    let (sender, receiver) = mpsc::channel(buffer);
    let (paused, satisfied) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
    let folded_tokens = Arc::new(AtomicU32::new(0));
    let stream = SequenceStream {
        events: receiver,
        paused: Arc::clone(&paused),
        satisfied: Arc::clone(&satisfied),
        folded_tokens: Arc::clone(&folded_tokens),
        door: Arc::clone(door),
        has_ended: false,
    };
    (EventSender { events: sender, paused, satisfied, folded_tokens }, stream)
}

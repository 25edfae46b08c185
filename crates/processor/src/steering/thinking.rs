//! The thought in front of an answer, and its budget.
//!
//! `Prompt → Thinking(n) → Closing(i) → Answer`: sampled tokens are counted while the thought is open;
//! when they are as many as the budget, a message and the closing marker are forced, one token per step.
//! The forward pass still runs, so the cache is that of the text as it stands. The thought's end is found
//! in the tokens' bytes: the marker may be one control token, or several plain ones and end inside one.

use std::sync::Arc;

use locket_engine::steering::Guide;

use super::{Ending, Prelude, PreludePlan};
use crate::{
    Error, Processor,
    reasoning::{ReasoningProfile, Scanner, ThoughtMarkers, ThoughtStart},
};

/// How the continuations of a request think.
#[derive(Debug, Clone)]
pub struct ThinkingPlan {
    markers: Arc<ThoughtMarkers>,
    start: ThoughtStart,
    /// Most thought tokens that are sampled; `None`: no limit.
    budget: Option<u32>,
    /// Opens the thought where the grammar of the answer leaves the choice to the first token.
    opening: Arc<[u32]>,
    /// Forced when the budget is used up.
    closing: Arc<[u32]>,
}

impl ThinkingPlan {
    /// A plan for prompts that end as `start` says. The message goes in front of the closing marker,
    /// but for a budget of 0, where there is nothing to interrupt.
    ///
    /// # Errors
    /// Markers that the model has no tokens for.
    pub fn new(
        processor: &Processor,
        profile: &ReasoningProfile,
        call_openers: &[String],
        start: ThoughtStart,
        budget: Option<u32>,
    ) -> Result<Self, Error> {
        let markers = profile.markers(call_openers);
        let message = if budget == Some(0) { "" } else { profile.budget_message() };
        let opening = processor.encode(&markers.open, false)?.into();
        let closing = processor.encode(&format!("{message}{}", markers.close), false)?.into();
        Ok(Self { markers, start, budget, opening, closing })
    }
}

impl PreludePlan for ThinkingPlan {
    fn start(&self, _choice: u32) -> Option<Box<dyn Prelude>> {
        if self.start == ThoughtStart::Content {
            return None;
        }
        let scanner = Scanner::new(Arc::clone(&self.markers), self.start);
        let mut state =
            Thinking { plan: self.clone(), scanner, phase: Phase::Prompt, unsettled: Vec::new(), settled: 0 };
        state.enter_thought();
        Some(Box::new(state))
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// Nothing yet, or blanks, or the beginning of the opening marker.
    Prompt,
    /// The opening marker is forced; so many of its tokens are there.
    Opening(usize),
    /// So many tokens were sampled.
    Thinking(u32),
    /// So many of the closing tokens are there.
    Closing(usize),
}

/// The thought of one continuation.
#[derive(Debug)]
struct Thinking {
    plan: ThinkingPlan,
    scanner: Scanner,
    phase: Phase,
    /// Bytes from `settled` on: those that may yet turn out to be the answer's.
    unsettled: Vec<u8>,
    settled: usize,
}

impl Thinking {
    /// Starts to count when the thought is open, and to close it when the budget is used up.
    fn enter_thought(&mut self) {
        if !self.scanner.is_in_thought() {
            return;
        }
        if matches!(self.phase, Phase::Prompt | Phase::Opening(_)) {
            self.phase = Phase::Thinking(0);
        }
        if let Phase::Thinking(count) = self.phase
            && self.plan.budget.is_some_and(|budget| count >= budget)
        {
            self.phase = Phase::Closing(0);
        }
    }

    /// The rest of a marker for each part of it that the text ends with.
    fn rests<'m>(&self, marker: &'m str) -> impl Iterator<Item = &'m [u8]> {
        let marker = marker.as_bytes();
        let begun = (1..marker.len()).filter(|length| self.unsettled.ends_with(&marker[..*length]));
        begun.map(|length| &marker[length..])
    }

    /// What of the text so far is the answer's.
    fn answer(&mut self) -> Vec<u8> {
        let start = self.scanner.content_start().unwrap_or(usize::MAX);
        self.unsettled.split_off(start.saturating_sub(self.settled).min(self.unsettled.len()))
    }
}

impl Prelude for Thinking {
    fn guide(&self) -> Guide {
        let (ids, index) = match self.phase {
            Phase::Closing(index) => (&self.plan.closing, index),
            Phase::Opening(index) => (&self.plan.opening, index),
            Phase::Prompt | Phase::Thinking(_) => return Guide::Free,
        };
        ids.get(index).map_or(Guide::Free, |id| Guide::Forced(*id))
    }

    fn opener(&self) -> Option<u32> {
        (self.phase == Phase::Prompt).then(|| self.plan.opening.first().copied()).flatten()
    }

    fn open(&mut self) {
        self.phase = Phase::Opening(0);
    }

    /// Nothing may follow a call's opener, which the answer begins with.
    fn endings(&self) -> Vec<Ending> {
        // In most texts no marker has begun.
        if self.unsettled.is_empty() || !matches!(self.phase, Phase::Thinking(_)) {
            return Vec::new();
        }
        let ThoughtMarkers { close, call_openers, .. } = &*self.plan.markers;
        let ending = |rest: &[u8], may_have_blanks| Ending { rest: rest.to_vec(), may_have_blanks };
        let closes = self.rests(close).map(|rest| ending(rest, true));
        let openers = call_openers.iter().flat_map(|opener| self.rests(opener));
        closes.chain(openers.map(|rest| ending(rest, false))).collect()
    }

    fn advance(&mut self, _id: u32, bytes: &[u8]) -> Option<Vec<u8>> {
        bytes.iter().for_each(|byte| self.scanner.push(*byte));
        self.unsettled.extend_from_slice(bytes);
        match &mut self.phase {
            Phase::Prompt => {}
            Phase::Thinking(count) => *count = count.saturating_add(1),
            Phase::Opening(index) => *index += 1,
            Phase::Closing(index) => {
                *index += 1;
                let is_closed = *index >= self.plan.closing.len();
                // A message may hold what looks like the end; it is forced to its own.
                return is_closed.then(|| self.answer());
            }
        }
        if self.scanner.is_past_thought() {
            return Some(self.answer());
        }
        self.enter_thought();
        let settled = self.scanner.certain_until();
        self.unsettled.drain(..(settled - self.settled).min(self.unsettled.len()));
        self.settled = settled;
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every token is a text; ids are places in the list.
    const TOKENS: [&str; 12] =
        ["t", "</think>", "m1", "m2", "<think>", "</", "think", ">", ">y", "\n", "<call>", "y"];
    const CLOSE: u32 = 1;

    fn plan(start: ThoughtStart, budget: Option<u32>, closing: &[u32]) -> ThinkingPlan {
        let markers = ThoughtMarkers {
            open: "<think>".into(),
            close: "</think>".into(),
            answer_open: None,
            call_openers: vec!["<call>".into()],
        };
        ThinkingPlan {
            markers: Arc::new(markers),
            start,
            budget,
            opening: vec![4].into(),
            closing: closing.to_vec().into(),
        }
    }

    /// Feeds what the model wants, or what is forced in its place, until the answer begins. Returns the
    /// tokens, which of them were forced, and the answer's first bytes.
    fn run(plan: &ThinkingPlan, wanted: &[u32]) -> (Vec<u32>, Vec<bool>, Option<Vec<u8>>) {
        let (mut ids, mut forced) = (Vec::new(), Vec::new());
        let Some(mut thinking) = plan.start(0) else { return (ids, forced, Some(Vec::new())) };
        for wanted in wanted {
            let (id, is_forced) = match thinking.guide() {
                Guide::Free => (*wanted, false),
                Guide::Forced(id) => (id, true),
                other => panic!("{other:?}"),
            };
            ids.push(id);
            forced.push(is_forced);
            if let Some(rest) = thinking.advance(id, TOKENS[id as usize].as_bytes()) {
                return (ids, forced, Some(rest));
            }
        }
        (ids, forced, None)
    }

    /// Worked example 5 of the specification.
    #[test]
    fn at_the_budget_the_thought_is_closed() {
        let plan = plan(ThoughtStart::Thought, Some(3), &[2, 3, CLOSE]);
        let (ids, forced, rest) = run(&plan, &[0; 9]);
        assert_eq!(ids, [0, 0, 0, 2, 3, CLOSE]);
        assert_eq!(forced, [false, false, false, true, true, true]);
        assert_eq!(rest, Some(Vec::new()));
        // With max_tokens 5 the stop comes after m2.
        assert_eq!(run(&plan, &[0; 5]), (vec![0, 0, 0, 2, 3], vec![false, false, false, true, true], None));
    }

    #[test]
    fn budgets_are_met_exactly() {
        for budget in [0, 1, 16, 64] {
            let plan = plan(ThoughtStart::Thought, Some(budget), &[2, CLOSE]);
            let (ids, forced, rest) = run(&plan, &[0; 100]);
            assert_eq!(forced.iter().filter(|forced| !**forced).count(), budget as usize);
            assert_eq!(ids.len(), budget as usize + 2);
            assert_eq!(rest, Some(Vec::new()));
        }
        let (ids, _, rest) = run(&plan(ThoughtStart::Thought, None, &[CLOSE]), &[0; 100]);
        assert_eq!((ids.len(), rest), (100, None));
    }

    /// The model closes by itself, in one token or in several, one of which goes on.
    #[test]
    fn the_end_is_found_in_the_bytes() {
        let plan = plan(ThoughtStart::Thought, Some(50), &[CLOSE]);
        assert_eq!(run(&plan, &[0, CLOSE, 0]).2, Some(Vec::new()));
        assert_eq!(run(&plan, &[0, 5, 6, 7, 0]), (vec![0, 5, 6, 7], vec![false; 4], Some(Vec::new())));
        assert_eq!(run(&plan, &[0, 5, 6, 8, 0]).2, Some(b"y".to_vec()));
        assert_eq!(run(&plan, &[0, 5, 6, 0, 10, 0]).2, Some(b"<call>".to_vec()));
    }

    /// A token that ends the thought and goes on is known before it comes.
    #[test]
    fn what_would_go_on_behind_the_end_is_known() {
        let mut thinking = plan(ThoughtStart::Thought, None, &[CLOSE]).start(0).expect("a thought");
        let overruns = |thinking: &dyn Prelude| -> Vec<&str> {
            let endings = thinking.endings();
            let tokens =
                [">", ">y", ">\n", ">\ny", "think>", "think>.", "call>", "call>\n", "</think>y", "y"];
            let is_overrun = |token: &&str| endings.iter().any(|end| end.is_overrun_by(token.as_bytes()));
            tokens.into_iter().filter(is_overrun).collect()
        };
        assert_eq!(overruns(&*thinking), Vec::<&str>::new());
        for (token, wanted) in
            [(0, vec![]), (5, vec!["think>."]), (6, vec![">y", ">\ny"]), (0, vec![]), (11, vec![])]
        {
            assert_eq!(thinking.advance(token, TOKENS[token as usize].as_bytes()), None);
            assert_eq!(overruns(&*thinking), wanted, "{token}");
        }
        assert_eq!(thinking.advance(5, b"<"), None);
        assert_eq!(overruns(&*thinking), ["call>\n"]);
    }

    #[test]
    fn a_text_that_begins_otherwise_is_an_answer() {
        let plan = plan(ThoughtStart::Undecided, Some(1), &[CLOSE]);
        assert_eq!(run(&plan, &[9, 11]), (vec![9, 11], vec![false; 2], Some(b"\ny".to_vec())));
        assert_eq!(run(&plan, &[9, 4, 0, 0, 0]).0, [9, 4, 0, CLOSE]);
        assert_eq!(run(&self::plan(ThoughtStart::Content, Some(0), &[CLOSE]), &[0]).0, Vec::<u32>::new());
        // Not thinking is asked for: a thought that the model opens is closed at once.
        assert_eq!(run(&self::plan(ThoughtStart::Undecided, Some(0), &[CLOSE]), &[4, 0]).0, [4, CLOSE]);
    }

    #[test]
    fn an_opening_is_forced_to_its_end() {
        let plan =
            ThinkingPlan { opening: vec![5, 6].into(), ..plan(ThoughtStart::Undecided, None, &[CLOSE]) };
        let mut thinking = plan.start(0).expect("a thought");
        assert_eq!((thinking.opener(), thinking.guide()), (Some(5), Guide::Free));
        thinking.open();
        assert_eq!(thinking.advance(5, b"<thi"), None);
        assert_eq!((thinking.opener(), thinking.guide()), (None, Guide::Forced(6)));
        assert_eq!(thinking.advance(6, b"nk>"), None);
        assert_eq!(thinking.guide(), Guide::Free);
        assert_eq!(thinking.advance(1, b"</think>"), Some(Vec::new()));
    }
}

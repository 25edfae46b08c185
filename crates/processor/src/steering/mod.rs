//! What constrains an answer, as a plan that the engine follows: first the thinking, then a grammar,
//! or free text in which a marker starts one.
//!
//! Everything here works on the bytes of tokens, since any text can be spelled by many sequences of
//! tokens. The engine calls [`Steering::compute`] on a worker thread; [`Steering::advance`] only notes
//! the token, or compares a few bytes.

use std::{fmt, sync::Arc};

use locket_engine::steering::{Advance, Guide, SharedPlan, Steering, SteeringPlan, TokenSet};

use crate::Processor;

mod forbidden;
mod gbnf;
mod grammar;
mod json_schema;
mod lark_text;
mod limits;
mod matching;
mod thinking;
mod token_env;
mod trigger;

pub use forbidden::ForbiddenTexts;
pub use grammar::{CompiledGrammar, GrammarError, GrammarSource, Grammars};
pub use json_schema::{check_schema, is_grammar};
pub use thinking::ThinkingPlan;
pub use trigger::Trigger;

use forbidden::ForbiddenState;
use matching::GrammarState;
use trigger::TriggerState;

/// A phase in front of the answer, such as a thought with a budget.
pub trait PreludePlan: Send + Sync + fmt::Debug {
    /// The state before the first token of continuation `choice`; `None` if its answer begins at once.
    fn start(&self, choice: u32) -> Option<Box<dyn Prelude>>;
}

/// The phase in front of the answer of one continuation.
pub trait Prelude: Send + fmt::Debug {
    /// The guide of the next token, cheap to tell; never [`Guide::Allowed`].
    fn guide(&self) -> Guide;

    /// The token that opens the phase, while it is undecided whether there is one: the answer may begin
    /// at once. `None` when it is decided.
    fn opener(&self) -> Option<u32>;

    /// [`Self::opener`] was chosen to open the phase, not to begin the answer; [`Self::advance`] takes
    /// it in.
    fn open(&mut self);

    /// What would complete the end of the phase, of which something is there. None is known by default.
    fn endings(&self) -> Vec<Ending> {
        Vec::new()
    }

    /// Takes in a token. `Some` means that the phase is over and the answer begins with the given
    /// bytes: often none, else the last of the text so far.
    fn advance(&mut self, id: u32, bytes: &[u8]) -> Option<Vec<u8>>;
}

/// Bytes that end a [`Prelude`]. Where a grammar follows, a token that goes on behind them is not allowed:
/// the grammar has had no say in it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ending {
    /// The bytes.
    pub rest: Vec<u8>,
    /// Blanks behind them say nothing.
    pub may_have_blanks: bool,
}

impl Ending {
    /// Whether a token of these bytes goes on behind the end.
    fn is_overrun_by(&self, bytes: &[u8]) -> bool {
        let behind = bytes.strip_prefix(self.rest.as_slice());
        behind.is_some_and(|behind| {
            !(behind.is_empty() || self.may_have_blanks && behind.trim_ascii().is_empty())
        })
    }
}

/// How the answer itself is constrained.
#[derive(Debug, Clone, Default)]
pub enum AnswerSpec {
    /// Not at all.
    #[default]
    Free,
    /// All of it is in the language of a grammar.
    Grammar(Arc<CompiledGrammar>),
    /// Free until a marker.
    Trigger(Arc<Trigger>),
    /// Free but for some texts, which nothing in front of the answer may have either.
    Without(Arc<ForbiddenTexts>),
}

/// Everything that steers the continuations of a request.
#[derive(Debug, Clone, Default)]
pub struct SteeringSpec {
    /// What comes before the answer.
    pub thinking: Option<Arc<dyn PreludePlan>>,
    /// The answer.
    pub answer: AnswerSpec,
}

impl SteeringSpec {
    /// The plan for the engine; `None` if nothing is to be steered. `processor` knows the tokens' bytes.
    pub fn plan(self, processor: &Arc<Processor>) -> Option<SharedPlan> {
        if self.thinking.is_none() && matches!(self.answer, AnswerSpec::Free) {
            return None;
        }
        let processor = Arc::clone(processor);
        Some(SharedPlan::new(AnswerPlan { spec: self, processor }))
    }
}

struct AnswerPlan {
    spec: SteeringSpec,
    processor: Arc<Processor>,
}

impl fmt::Debug for AnswerPlan {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.spec.fmt(out)
    }
}

impl SteeringPlan for AnswerPlan {
    fn start(&self, choice: u32) -> Box<dyn Steering> {
        let prelude = self.spec.thinking.as_ref().and_then(|thinking| thinking.start(choice));
        let answer = match &self.spec.answer {
            AnswerSpec::Free => AnswerState::Free,
            AnswerSpec::Grammar(grammar) => {
                AnswerState::Grammar(Box::new(GrammarState::new(Arc::clone(grammar))))
            }
            AnswerSpec::Trigger(trigger) => {
                AnswerState::Trigger(Box::new(TriggerState::new(Arc::clone(trigger))))
            }
            AnswerSpec::Without(texts) => {
                texts.prepare(&self.processor);
                AnswerState::Without(Arc::clone(texts), ForbiddenState::default())
            }
        };
        Box::new(SteeredAnswer { prelude, answer, opener: None, processor: Arc::clone(&self.processor) })
    }
}

/// One continuation.
struct SteeredAnswer {
    /// Present until the answer begins.
    prelude: Option<Box<dyn Prelude>>,
    answer: AnswerState,
    /// The next token chooses: this one opens the prelude, any other begins the answer.
    opener: Option<u32>,
    processor: Arc<Processor>,
}

enum AnswerState {
    Free,
    Grammar(Box<GrammarState>),
    Trigger(Box<TriggerState>),
    /// Its state is that of the whole continuation, whatever came before the answer included.
    Without(Arc<ForbiddenTexts>, ForbiddenState),
}

impl fmt::Debug for SteeredAnswer {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let answer = match self.answer {
            AnswerState::Free => "free",
            AnswerState::Grammar(_) => "grammar",
            AnswerState::Trigger(_) => "trigger",
            AnswerState::Without(..) => "without",
        };
        out.debug_struct("SteeredAnswer").field("prelude", &self.prelude).field("answer", &answer).finish()
    }
}

impl AnswerState {
    /// Takes in the answer's first bytes, which came with the last token of the prelude.
    fn begin(&mut self, bytes: &[u8]) -> Advance {
        match self {
            Self::Free => Advance::Known(Guide::Free),
            Self::Grammar(grammar) => {
                grammar.begin(bytes);
                Advance::Compute
            }
            Self::Trigger(trigger) => trigger.advance_bytes(bytes),
            // They were taken in with their tokens.
            Self::Without(..) => Advance::Known(Guide::Free),
        }
    }

    fn advance(&mut self, id: u32, bytes: &[u8]) -> Advance {
        match self {
            Self::Free => Advance::Known(Guide::Free),
            Self::Grammar(grammar) => {
                grammar.take(id);
                Advance::Compute
            }
            Self::Trigger(trigger) => trigger.advance(id, bytes),
            Self::Without(..) => Advance::Known(Guide::Free),
        }
    }

    fn compute(&mut self, allowed: &mut TokenSet) -> Guide {
        match self {
            Self::Free | Self::Without(..) => Guide::Free,
            Self::Grammar(grammar) => grammar.compute(allowed),
            Self::Trigger(trigger) => trigger.compute(allowed),
        }
    }
}

impl SteeredAnswer {
    /// The first token where a grammar holds for the answer and there may be a prelude or none: what
    /// begins the answer, or the prelude's opener. An opener that could begin the answer begins it.
    fn compute_first(&mut self, opener: u32, allowed: &mut TokenSet) -> Guide {
        match self.answer.compute(allowed) {
            Guide::Allowed if allowed.contains(opener) => Guide::Allowed,
            Guide::Forced(id) if id != opener => {
                allowed.clear();
                allowed.insert(id);
                allowed.insert(opener);
                self.opener = Some(opener);
                Guide::Allowed
            }
            Guide::Allowed => {
                allowed.insert(opener);
                self.opener = Some(opener);
                Guide::Allowed
            }
            guide => guide,
        }
    }

    /// A token of the prelude: none may end it and go on where a grammar follows.
    fn compute_prelude(&self, prelude: &dyn Prelude, allowed: &mut TokenSet) -> Guide {
        let guide = prelude.guide();
        if guide != Guide::Free || !matches!(self.answer, AnswerState::Grammar(_)) {
            return guide;
        }
        let endings = prelude.endings();
        if endings.is_empty() {
            return guide;
        }
        allowed.fill();
        for id in 0..allowed.vocab_size() {
            let bytes = self.processor.token_bytes(id);
            if endings.iter().any(|ending| ending.is_overrun_by(bytes)) {
                allowed.remove(id);
            }
        }
        Guide::Allowed
    }

    /// Whether the first token has to choose between prelude and answer.
    fn undecided(&self) -> Option<u32> {
        let is_grammar = matches!(self.answer, AnswerState::Grammar(_));
        self.prelude.as_ref().filter(|_| is_grammar)?.opener()
    }

    /// Notes a token; forbidden texts are not looked for.
    fn advance_parts(&mut self, id: u32) -> Advance {
        let bytes = self.processor.token_bytes(id);
        if self.undecided().is_some() {
            if self.opener.take() == Some(id) {
                self.prelude.iter_mut().for_each(|prelude| prelude.open());
            } else {
                self.prelude = None;
            }
        }
        let Some(prelude) = &mut self.prelude else { return self.answer.advance(id, bytes) };
        match prelude.advance(id, bytes) {
            None => {
                let guide = prelude.guide();
                let is_grammar = matches!(self.answer, AnswerState::Grammar(_));
                if is_grammar && guide == Guide::Free && !prelude.endings().is_empty() {
                    return Advance::Compute;
                }
                Advance::Known(guide)
            }
            Some(rest) => {
                self.prelude = None;
                self.answer.begin(&rest)
            }
        }
    }
}

impl Steering for SteeredAnswer {
    fn advance(&mut self, id: u32) -> Advance {
        let advance = self.advance_parts(id);
        let AnswerState::Without(texts, state) = &mut self.answer else { return advance };
        state.take(texts, id, &self.processor);
        match advance {
            Advance::Known(Guide::Free) if state.is_restricted(texts, &self.processor) => Advance::Compute,
            advance => advance,
        }
    }

    fn compute(&mut self, allowed: &mut TokenSet) -> Guide {
        if let Some(opener) = self.undecided() {
            return self.compute_first(opener, allowed);
        }
        let guide = match &self.prelude {
            Some(prelude) => self.compute_prelude(&**prelude, allowed),
            None => self.answer.compute(allowed),
        };
        match &self.answer {
            AnswerState::Without(texts, state) if guide == Guide::Free => {
                state.compute(texts, &self.processor, allowed)
            }
            _ => guide,
        }
    }
}

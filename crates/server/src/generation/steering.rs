//! What a request wants of its answers, as a plan for the engine: grammars are compiled on blocking
//! threads, few at a time, and remembered.

use std::{
    hash::{BuildHasher as _, RandomState},
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use locket_engine::SharedPlan;
use locket_processor::{
    Processor,
    steering::{
        AnswerSpec, CompiledGrammar, ForbiddenTexts, GrammarError, GrammarSource, PreludePlan, SteeringSpec,
        Trigger, check_schema, is_grammar,
    },
    tools::ToolSyntax,
};
use serde_json::Value;
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    time::timeout,
};

use super::{
    GenerationFields, ReasoningChoice,
    structured::Structured,
    verdicts::{SchemaKey, Verdicts},
};
use crate::{
    blocking,
    error::{ApiError, ErrorKind},
    state::AppState,
};

/// What a route wants beside the fields for [`Structured`] answers.
#[derive(Debug, Clone, Default)]
pub(crate) struct Wanted {
    /// Whether to think first, and how long.
    pub(crate) reasoning: ReasoningChoice,
    /// Calls of tools.
    pub(crate) calls: Option<WantedCalls>,
    /// What the answer must not have, if nothing else constrains it: calls where there are tools, but none
    /// may be called.
    pub(crate) forbidden: Option<Arc<ForbiddenTexts>>,
}

/// The calls that an answer must or may have.
#[derive(Debug, Clone)]
pub(crate) struct WantedCalls {
    /// An answer that is nothing but calls, markers included.
    pub(crate) calls: GrammarSource,
    /// How calls come about in free text; `None` if the answer must be calls.
    pub(crate) in_text: Option<CallsInText>,
    /// The functions' schemas with the paths of their fields, so that an error names one.
    pub(crate) schemas: Vec<(String, Value)>,
    /// How calls are told from content.
    pub(crate) syntax: Arc<ToolSyntax>,
}

/// A [`Trigger`] whose grammar is not compiled yet; its fields are explained there.
#[derive(Debug, Clone)]
pub(crate) struct CallsInText {
    pub(crate) markers: Vec<String>,
    pub(crate) grammar_has_marker: bool,
    pub(crate) grammar: GrammarSource,
    pub(crate) max_calls: Option<u32>,
}

/// The most that compiling a grammar may take, and that a request waits for its turn to compile.
const TIME_LIMIT: Duration = Duration::from_secs(10);

/// Compiled grammars by their sources, the latest used last.
#[derive(Debug)]
pub(crate) struct GrammarMemory {
    hasher: RandomState,
    entries: Mutex<Vec<Entry>>,
    verdicts: Arc<Verdicts>,
    /// Who holds one compiles. A difficult grammar keeps its permit until it is done, even if nobody
    /// waits for it any more, so no more threads than these are ever busy with grammars.
    turns: Arc<Semaphore>,
}

#[derive(Debug)]
struct Entry {
    hash: u64,
    source: GrammarSource,
    grammar: Arc<CompiledGrammar>,
    bytes: usize,
}

impl GrammarMemory {
    /// Grammars remembered at most.
    const MAX_ENTRIES: usize = 64;
    /// Their sources' sizes together; compiled they have a multiple.
    const MAX_BYTES: usize = 1 << 20;
    /// Grammars compiled at once.
    const MAX_TURNS: usize = 2;

    pub(crate) fn new() -> Self {
        Self {
            hasher: RandomState::new(),
            entries: Mutex::default(),
            verdicts: Arc::default(),
            turns: Arc::new(Semaphore::new(Self::MAX_TURNS)),
        }
    }

    fn get(&self, source: &GrammarSource) -> Option<Arc<CompiledGrammar>> {
        let hash = self.hasher.hash_one(source);
        let mut entries = self.entries.lock().unwrap_or_else(PoisonError::into_inner);
        let at = entries.iter().position(|entry| entry.hash == hash && entry.source == *source)?;
        let entry = entries.remove(at);
        let grammar = Arc::clone(&entry.grammar);
        entries.push(entry);
        Some(grammar)
    }

    fn put(&self, source: GrammarSource, grammar: &Arc<CompiledGrammar>) {
        let bytes = source.size();
        if bytes > Self::MAX_BYTES {
            return;
        }
        let hash = self.hasher.hash_one(&source);
        let mut entries = self.entries.lock().unwrap_or_else(PoisonError::into_inner);
        entries.retain(|entry| entry.hash != hash || entry.source != source);
        entries.push(Entry { hash, source, grammar: Arc::clone(grammar), bytes });
        let mut total: usize = entries.iter().map(|entry| entry.bytes).sum();
        let surplus = entries.iter().take_while(|entry| {
            let is_surplus = total > Self::MAX_BYTES;
            total -= if is_surplus { entry.bytes } else { 0 };
            is_surplus
        });
        let surplus = surplus.count().max(entries.len().saturating_sub(Self::MAX_ENTRIES));
        entries.drain(..surplus);
    }

    /// A compiled grammar. `schemas` are checked first, so that an error names the one at fault.
    async fn compiled(
        &self,
        processor: &Arc<Processor>,
        wanted: WantedGrammar<'_>,
    ) -> Result<Arc<CompiledGrammar>, ApiError> {
        if let Some(grammar) = self.get(&wanted.source) {
            return Ok(grammar);
        }
        let turn = self.turn().await?;
        let (processor, source) = (Arc::clone(processor), wanted.source.clone());
        let schemas = wanted.schemas.to_vec();
        let work = tokio::task::spawn_blocking(move || {
            let _turn = turn;
            for (param, schema) in schemas {
                check_schema(&schema).map_err(|error| (Some(param), error))?;
            }
            let grammars = processor.grammars().map_err(|error| (None, error))?;
            grammars.compile(&source).map_err(|error| (None, error))
        });
        let error_kind = match wanted.source {
            GrammarSource::JsonSchema(_) => ErrorKind::InvalidJsonSchema,
            _ => ErrorKind::InvalidGrammar,
        };
        match timeout(TIME_LIMIT, work).await {
            Ok(Ok(Ok(grammar))) => {
                self.put(wanted.source, &grammar);
                Ok(grammar)
            }
            Ok(Ok(Err((Some(param), error)))) => Err(refused(ErrorKind::InvalidJsonSchema, &param, &error)),
            Ok(Ok(Err((None, error)))) => Err(refused(error_kind, wanted.param, &error)),
            Ok(Err(panic)) => Err(ApiError::internal(&panic.to_string())),
            Err(_) => Err(too_long(error_kind, wanted.param)),
        }
    }

    /// Waits for a turn to compile.
    async fn turn(&self) -> Result<OwnedSemaphorePermit, ApiError> {
        match timeout(TIME_LIMIT, Arc::clone(&self.turns).acquire_owned()).await {
            Ok(Ok(turn)) => Ok(turn),
            _ => {
                let message = "Other grammars are being compiled. Try again later.";
                Err(ApiError::new(ErrorKind::ServerOverloaded, message))
            }
        }
    }

    /// Relaxes the tools whose schemas are no grammars. What was found out about a schema is remembered.
    ///
    /// # Errors
    /// 422 if it takes too long; 503 if too many grammars are being compiled.
    pub(crate) async fn relaxed(&self, syntax: ToolSyntax) -> Result<ToolSyntax, ApiError> {
        let verdicts = Arc::clone(&self.verdicts);
        // Hashing takes a millisecond for each megabyte.
        let keyed = move || {
            let schemas = syntax.lenient_schemas();
            let keys = schemas.iter().map(|schema| verdicts.key(schema)).collect::<Vec<_>>();
            (syntax, keys.into_iter().zip(schemas).collect::<Vec<_>>())
        };
        let (mut syntax, keyed) = blocking::run(true, keyed).await?;
        let known: Option<Vec<bool>> = keyed.iter().map(|(key, _)| self.verdicts.get(*key)).collect();
        let are_grammars = match known {
            Some(known) => known,
            None => self.find_out(keyed).await?,
        };
        syntax.relax(&are_grammars);
        Ok(syntax)
    }

    /// Checks the schemas that nothing is known of.
    async fn find_out(&self, schemas: Vec<(SchemaKey, Value)>) -> Result<Vec<bool>, ApiError> {
        let turn = self.turn().await?;
        let verdicts = Arc::clone(&self.verdicts);
        let work = tokio::task::spawn_blocking(move || {
            let _turn = turn;
            let end = Instant::now() + TIME_LIMIT;
            // Nobody waits for the rest once the time is over; what is known by then is kept.
            let verdict = |(key, schema): (SchemaKey, Value)| {
                if let Some(known) = verdicts.get(key) {
                    return Some(known);
                }
                let is_grammar = (Instant::now() < end).then(|| is_grammar(&schema))?;
                verdicts.put(key, is_grammar);
                Some(is_grammar)
            };
            schemas.into_iter().map(verdict).collect::<Option<Vec<bool>>>()
        });
        match timeout(TIME_LIMIT, work).await {
            Ok(Ok(Some(are_grammars))) => Ok(are_grammars),
            Ok(Err(panic)) => Err(ApiError::internal(&panic.to_string())),
            Ok(Ok(None)) | Err(_) => Err(too_long(ErrorKind::InvalidGrammar, TOOLS)),
        }
    }
}

/// The field whose schemas and grammars are those of calls.
const TOOLS: &str = "tools";

/// 422 for what cannot be compiled in time.
fn too_long(kind: ErrorKind, param: &str) -> ApiError {
    ApiError::field(kind, param, format!("`{param}` takes too long to compile."))
}

/// What is to be compiled, and which fields it came from.
struct WantedGrammar<'a> {
    source: GrammarSource,
    param: &'a str,
    schemas: &'a [(String, Value)],
}

/// 422 with the path of what is wrong.
pub(crate) fn refused(kind: ErrorKind, param: &str, error: &GrammarError) -> ApiError {
    let path = format!("{param}{}", error.path);
    let message = format!("`{path}` cannot constrain an answer: {}.", error.reason);
    ApiError::field(kind, path, message)
}

/// The plan of a request whose answers come after `thinking`; `None` if all of it is free.
///
/// # Errors
/// 422 for a schema or grammar that does not compile; 503 if too many are being compiled.
pub(crate) async fn plan(
    state: &AppState,
    fields: &GenerationFields,
    thinking: Option<Arc<dyn PreludePlan>>,
) -> Result<Option<SharedPlan>, ApiError> {
    let answer = match answer(state, fields.structured.constraint(), fields.wanted.calls.as_ref()).await? {
        AnswerSpec::Free => fields.wanted.forbidden.clone().map_or(AnswerSpec::Free, AnswerSpec::Without),
        answer => answer,
    };
    let spec = SteeringSpec { thinking, answer };
    Ok(spec.plan(state.processor()))
}

async fn answer(
    state: &AppState,
    structured: Option<&Structured>,
    calls: Option<&WantedCalls>,
) -> Result<AnswerSpec, ApiError> {
    let (memory, processor) = (state.grammars(), state.processor());
    let wanted = match (structured, calls) {
        (None, None) => return Ok(AnswerSpec::Free),
        (Some(structured), None) => {
            let (source, param) = (structured.source.clone(), structured.param.as_str());
            WantedGrammar { source, param, schemas: &[] }
        }
        (Some(structured), Some(calls)) if calls.in_text.is_none() && !structured.is_response_format => {
            let message = format!("`{}` cannot be combined with a call that must be made.", structured.param);
            return Err(ApiError::field(ErrorKind::InvalidValue, structured.param.clone(), message));
        }
        (Some(structured), Some(calls)) if calls.in_text.is_some() => {
            // Alone first, so that an error in it is told with its path.
            let alone =
                WantedGrammar { source: structured.source.clone(), param: &structured.param, schemas: &[] };
            memory.compiled(processor, alone).await?;
            let source = GrammarSource::AnyOf(vec![structured.source.clone(), calls.calls.clone()]);
            WantedGrammar { source, param: TOOLS, schemas: &calls.schemas }
        }
        (None, Some(WantedCalls { in_text: Some(in_text), schemas, .. })) => {
            let wanted = WantedGrammar { source: in_text.grammar.clone(), param: TOOLS, schemas };
            return Ok(AnswerSpec::Trigger(Arc::new(Trigger {
                markers: in_text.markers.clone(),
                grammar_has_marker: in_text.grammar_has_marker,
                grammar: memory.compiled(processor, wanted).await?,
                max_calls: in_text.max_calls,
            })));
        }
        // The answer is calls, so a format for messages has nothing to constrain.
        (_, Some(calls)) => {
            WantedGrammar { source: calls.calls.clone(), param: TOOLS, schemas: &calls.schemas }
        }
    };
    Ok(AnswerSpec::Grammar(memory.compiled(processor, wanted).await?))
}

#[cfg(test)]
mod tests {
    use std::sync::LazyLock;

    use locket_model::{load::Checkpoint, testing::default_model};
    use locket_processor::tools::{ToolFormat, ToolSpec};
    use serde_json::json;

    use super::*;

    static PROCESSOR: LazyLock<Arc<Processor>> = LazyLock::new(|| {
        let checkpoint = Checkpoint::open(&default_model()).expect("the default model");
        Arc::new(Processor::load(&checkpoint).expect("its tokenizer"))
    });

    fn text(text: &str) -> GrammarSource {
        GrammarSource::Text(text.into())
    }

    async fn compile(
        memory: &GrammarMemory,
        source: GrammarSource,
    ) -> Result<Arc<CompiledGrammar>, ApiError> {
        memory.compiled(&PROCESSOR, WantedGrammar { source, param: "guided_json", schemas: &[] }).await
    }

    #[tokio::test]
    async fn what_was_compiled_is_remembered_within_bounds() {
        let memory = GrammarMemory::new();
        let first = compile(&memory, text("a")).await.expect("a grammar");
        let again = compile(&memory, text("a")).await.expect("a grammar");
        assert!(Arc::ptr_eq(&first, &again));

        for number in 1..GrammarMemory::MAX_ENTRIES {
            memory.put(text(&number.to_string()), &first);
        }
        // Used again, so the second oldest leaves first.
        assert!(memory.get(&text("a")).is_some());
        memory.put(text("one more"), &first);
        assert!(memory.get(&text("a")).is_some() && memory.get(&text("1")).is_none());
        assert!(memory.get(&text("2")).is_some());

        // A large source drives out as many as it needs room for, one beyond all bounds none.
        memory.put(text(&"x".repeat(GrammarMemory::MAX_BYTES + 1)), &first);
        assert_eq!(memory.entries.lock().expect("no panic").len(), GrammarMemory::MAX_ENTRIES);
        memory.put(text(&"x".repeat(GrammarMemory::MAX_BYTES)), &first);
        assert_eq!(memory.entries.lock().expect("no panic").len(), 1);
    }

    #[tokio::test]
    async fn what_is_known_of_a_schema_takes_no_turn() {
        let memory = GrammarMemory::new();
        let tool = |name: &str, schema: Value| ToolSpec {
            name: name.into(),
            parameters: Some(schema),
            is_strict: false,
        };
        let wrong = json!({"type": "object", "not": {}});
        let right = json!({"type": "object", "properties": {"x": {"type": "null"}}});
        let syntax = ToolSyntax {
            format: ToolFormat::Hermes,
            tools: vec![tool("a", wrong), tool("b", right.clone())],
            is_parallel: true,
        };
        let relaxed = memory.relaxed(syntax.clone()).await.expect("a turn");
        let parameters = |syntax: &ToolSyntax| {
            syntax.tools.iter().filter_map(|tool| tool.parameters.clone()).collect::<Vec<_>>()
        };
        assert_eq!(parameters(&relaxed), [json!({"type": "object"}), right]);

        // With all turns taken, only what is known is answered.
        let turns = GrammarMemory::MAX_TURNS as u32;
        let all = Arc::clone(&memory.turns).acquire_many_owned(turns).await.expect("free turns");
        assert_eq!(memory.relaxed(syntax.clone()).await.expect("known"), relaxed);
        let mut other = syntax;
        other.tools.push(tool("c", json!({"type": "object", "maxProperties": 1})));
        let waiting = memory.relaxed(other);
        let mut waiting = std::pin::pin!(waiting);
        assert!(futures_util::poll!(waiting.as_mut()).is_pending());
        drop(all);
        assert_eq!(waiting.await.expect("a turn").tools.len(), 3);
    }

    #[tokio::test]
    async fn errors_name_the_field_at_fault() {
        let memory = GrammarMemory::new();
        let wrong = json!({"type": "object", "properties": {"x": {"not": {}}}});
        let error = compile(&memory, GrammarSource::JsonSchema(wrong.clone())).await.expect_err("`not`");
        let param = error.param.as_deref();
        assert_eq!((error.kind, param), (ErrorKind::InvalidJsonSchema, Some("guided_json.properties.x.not")));
        let error = compile(&memory, GrammarSource::Regex("(".into())).await.expect_err("no expression");
        assert_eq!((error.kind, error.param.as_deref()), (ErrorKind::InvalidGrammar, Some("guided_json")));

        let schemas = [("tools[0].function.parameters".to_owned(), wrong)];
        let wanted = WantedGrammar { source: text("call"), param: "tools", schemas: &schemas };
        let error = memory.compiled(&PROCESSOR, wanted).await.expect_err("`not`");
        let param = error.param.as_deref();
        assert_eq!(param, Some("tools[0].function.parameters.properties.x.not"));
        assert_eq!(error.kind, ErrorKind::InvalidJsonSchema);
    }
}

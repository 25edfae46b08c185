//! The table of settings: the one place from which flags, environment variables, the file, the
//! reference page and the validation come.

use locket_server::ToolCallFormat;

use super::setting::{Group, Kind, Preset, Setting};

#[cfg(not(feature = "cuda"))]
const BACKENDS: &[&str] = &["cpu", "reference"];
#[cfg(feature = "cuda")]
const BACKENDS: &[&str] = &["cpu", "reference", "cuda"];

/// What requests may name; `auto` beside them is for the operator.
const METHODS: &[&str] =
    &["full", "window", "h2o", "tova", "expected", "keydiff", "observed", "lococo", "learned"];
const METHOD_OR_AUTO: &[&str] =
    &["auto", "full", "window", "h2o", "tova", "expected", "keydiff", "observed", "lococo", "learned"];

/// What requests may name for images.
const VISUAL_METHODS: &[&str] =
    &["none", "hired", "pyramid", "must", "fastv", "dpp", "random", "uniform", "thumbnail"];

const fn setting(key: &'static str, group: Group, kind: Kind, preset: Preset, help: &'static str) -> Setting {
    Setting { key, group, kind, preset, help }
}

/// Every setting, in the order of the file.
pub static SETTINGS: &[Setting] = &[
    setting(
        "model",
        Group::Basics,
        Kind::Text { what: "path or repository" },
        Preset::Derived("SmolLM2-135M-Instruct (Q4_1, 98 MB), fetched once"),
        "What to serve: a .gguf file, a folder with config.json and safetensors, or a Hugging Face repository \
         org/name[:file-or-quantisation].",
    ),
    setting(
        "served-model-name",
        Group::Basics,
        Kind::TextList { what: "names" },
        Preset::Derived("the name of the model's file, folder or repository"),
        "Names under which clients may ask for the model; answers carry the first.",
    ),
    setting(
        "host",
        Group::Basics,
        Kind::Text { what: "address or host name" },
        Preset::Value("127.0.0.1"),
        "Where to listen: loopback unless said otherwise; 0.0.0.0 is every network, where callers should need a key \
         (api-key, api-key-file) and answers be encrypted (tls-cert, or a proxy in front).",
    ),
    setting(
        "port",
        Group::Basics,
        Kind::Integer { min: 0, max: 65_535, unit: "" },
        Preset::Value("8080"),
        "TCP port; 0 takes a free one, which the line on standard output names.",
    ),
    setting(
        "max-model-len",
        Group::Basics,
        Kind::Integer { min: 16, max: 1 << 24, unit: "tokens" },
        Preset::Derived(
            "131072, or the model's trained context if that is longer; cache.method full: the trained context",
        ),
        "Longest prompt plus answer. It may be more than the model was trained for where the cache folds, and costs \
         no memory there; with method full a smaller value makes room for more sequences.",
    ),
    setting(
        "backend",
        Group::Basics,
        Kind::Choice(BACKENDS),
        Preset::Value("cpu"),
        "Who computes: cpu has packed kernels, reference is the slow oracle for comparisons. Builds with the feature \
         cuda also have cuda: plain operations on the first device, for comparisons too; it needs memory-budget.",
    ),
    setting(
        "threads",
        Group::Basics,
        Kind::Integer { min: 0, max: 1_024, unit: "threads" },
        Preset::Value("0"),
        "CPU threads for the model; 0 takes all physical cores that the process may use.",
    ),
    setting(
        "memory-budget",
        Group::Basics,
        Kind::Bytes { min: 64 << 20 },
        Preset::Derived("half of the memory that the machine or its cgroup has free"),
        "Weights, workspace and cache together never take more; the start is refused if they do not fit. Must be \
         given with backend cuda, whose device has memory of its own.",
    ),
    setting(
        "prefault",
        Group::Basics,
        Kind::Switch,
        Preset::Value("false"),
        "Write to all memory of the cache at start: a machine without it fails then and not under load, and no \
         request waits for a page. Takes seconds where gigabytes are planned.",
    ),
    setting(
        "offline",
        Group::Basics,
        Kind::Switch,
        Preset::Value("false"),
        "Never use the network; a model that is not here is an error at once.",
    ),
    setting(
        "cache-dir",
        Group::Basics,
        Kind::Text { what: "folder" },
        Preset::Derived("$XDG_CACHE_HOME/locket, else ~/.cache/locket"),
        "Where the default model is kept. Repositories are kept in the Hugging Face cache (HF_HOME).",
    ),
    setting(
        "adapters",
        Group::Basics,
        Kind::TextList { what: "names and folders" },
        Preset::Value(""),
        "LoRA adapters (PEFT folders) beside the model, each as name=folder: a request that asks for the model of \
         that name gets it, in one batch with others.",
    ),
    setting(
        "adapter-dir",
        Group::Basics,
        Kind::Text { what: "folder" },
        Preset::Derived("none: adapters are those named at start"),
        "Folder from which callers may load adapters while the server runs (/v1/load_lora_adapter) and unload them \
         again; paths outside of it are refused. With keys, those with a list of models may not.",
    ),
    setting(
        "max-adapters",
        Group::Basics,
        Kind::Integer { min: 1, max: 1_024, unit: "adapters" },
        Preset::Value("8"),
        "Most adapters with names at once; with adapter-dir, memory for as many is planned at start.",
    ),
    setting(
        "max-adapter-rank",
        Group::Basics,
        Kind::Integer { min: 1, max: 1_024, unit: "" },
        Preset::Value("16"),
        "Largest rank of adapters that are loaded while the server runs.",
    ),
    setting(
        "api-key",
        Group::Api,
        Kind::SecretList,
        Preset::Value(""),
        "Keys that callers must send, any of them, as Authorization: Bearer KEY. None asks for none. Better in the \
         environment than in a flag, which others on the machine can read.",
    ),
    setting(
        "api-key-file",
        Group::Api,
        Kind::Text { what: "file" },
        Preset::Derived("none"),
        "File of further keys with names and limits of their own; locket keys makes entries for it, SIGHUP reads it \
         again. docs/api.md describes it.",
    ),
    setting(
        "metrics-require-key",
        Group::Api,
        Kind::Switch,
        Preset::Value("false"),
        "Ask for a key on /metrics too. Probes, the description of the API and its page never ask for one.",
    ),
    setting(
        "page",
        Group::Api,
        Kind::Switch,
        Preset::Value("true"),
        "Serve the page for people at /: chat, settings and the live state of the server. Its files need no key; what \
         it asks the API does.",
    ),
    setting(
        "tls-cert",
        Group::Api,
        Kind::Text { what: "file" },
        Preset::Derived("none: plain HTTP"),
        "Certificate of this server in PEM, followed by those that sign it; needs tls-key. Connections are then \
         encrypted, with HTTP/2 where the client has it; SIGHUP reads both files again.",
    ),
    setting(
        "tls-key",
        Group::Api,
        Kind::Text { what: "file" },
        Preset::Derived("none: plain HTTP"),
        "Private key of the certificate in PEM.",
    ),
    setting(
        "max-connections",
        Group::Api,
        Kind::Integer { min: 1, max: 1 << 20, unit: "connections" },
        Preset::Value("1024"),
        "Open connections; more wait to be accepted. Each takes a file handle (ulimit -n).",
    ),
    setting(
        "header-timeout-s",
        Group::Api,
        Kind::Number { min: 0.1, max: 3600.0, unit: "seconds" },
        Preset::Value("15"),
        "From a new connection to the head of its first request; slower ones are closed.",
    ),
    setting(
        "idle-timeout-s",
        Group::Api,
        Kind::Number { min: 0.1, max: 86_400.0, unit: "seconds" },
        Preset::Value("90"),
        "From an answer to the head of the next request. Should be longer than that of a proxy in front, which \
         otherwise sends requests into connections that close.",
    ),
    setting(
        "stall-timeout-s",
        Group::Api,
        Kind::Number { min: 0.1, max: 86_400.0, unit: "seconds" },
        Preset::Value("60"),
        "A client that takes nothing of its answer for so long is given up, and its block is free again.",
    ),
    setting(
        "max-images",
        Group::Api,
        Kind::Integer { min: 1, max: 1_024, unit: "images" },
        Preset::Value("16"),
        "Most images of a request, all its messages together.",
    ),
    setting(
        "max-image-pixels",
        Group::Api,
        Kind::Integer { min: 1, max: 1 << 32, unit: "pixels" },
        Preset::Value("40000000"),
        "Most pixels of an image, by its header; larger ones get 413 before they are decoded. Where the model sees, two \
         decoded images of this size are part of the memory plan.",
    ),
    setting(
        "max-image-bytes",
        Group::Api,
        Kind::Bytes { min: 1_024 },
        Preset::Value("20MiB"),
        "Most bytes of an image as it is sent or fetched.",
    ),
    setting(
        "image-url-hosts",
        Group::Api,
        Kind::TextList { what: "hosts" },
        Preset::Value(""),
        "Hosts that images may be fetched from: images.example.org, *.example.org, or with :port for other ports \
         than 80 and 443. None by default: images then come as data URIs. URLs are checked, but nothing is fetched \
         for a model that takes text only. Addresses that are not public are never connected to.",
    ),
    setting(
        "image-url-timeout-s",
        Group::Api,
        Kind::Number { min: 0.1, max: 600.0, unit: "seconds" },
        Preset::Value("10"),
        "Longest time for one image from a URL, redirects included.",
    ),
    setting(
        "max-body-bytes",
        Group::Api,
        Kind::Bytes { min: 1_024 },
        Preset::Value("32MiB"),
        "Largest request body; larger ones get 413 before they are read.",
    ),
    setting(
        "max-concurrent-requests",
        Group::Api,
        Kind::Integer { min: 1, max: 65_536, unit: "requests" },
        Preset::Value("512"),
        "Requests worked on at once, streams included; one more gets 503 with Retry-After.",
    ),
    setting(
        "default-max-tokens",
        Group::Api,
        Kind::Integer { min: 1, max: 1 << 24, unit: "tokens" },
        Preset::Value("4096"),
        "Longest answer where a chat request names no limit. With method full a sequence's block must hold prompt \
         and answer, so a smaller one lets more sequences run at once.",
    ),
    setting(
        "max-n",
        Group::Api,
        Kind::Integer { min: 1, max: 128, unit: "continuations" },
        Preset::Value("16"),
        "Largest n of a request; each continuation takes a block of its own.",
    ),
    setting(
        "cors-origins",
        Group::Api,
        Kind::TextList { what: "origins" },
        Preset::Value(""),
        "Web pages that browsers let call this server, for example http://localhost:3000; * is any; none by default.",
    ),
    setting(
        "embedding-pooling",
        Group::Api,
        Kind::Choice(&["last", "mean"]),
        Preset::Value("last"),
        "Which hidden states make an embedding: that of the last token, or the mean of all.",
    ),
    setting(
        "scoring-cache",
        Group::Api,
        Kind::Choice(&["method", "full"]),
        Preset::Value("method"),
        "With which cache log-probabilities of prompts are computed: that of the request, or method full unless the \
         request names another. full takes prompts up to the largest of cache.capacities.",
    ),
    setting(
        "tool-call-format",
        Group::Api,
        Kind::Choice(ToolCallFormat::NAMES),
        Preset::Value("auto"),
        "How the model writes calls of tools. auto is what its chat template teaches, and hermes if that says nothing; \
         none refuses tools. A template without tools gets them as text of the system message.",
    ),
    setting(
        "max-batch-rows",
        Group::Engine,
        Kind::Integer { min: 32, max: 65_536, unit: "rows" },
        Preset::Value("512"),
        "Most tokens computed in one step, prompt chunks and answers together. More is faster for prompts and makes \
         the gap between two streamed tokens longer.",
    ),
    setting(
        "prefill-chunk",
        Group::Engine,
        Kind::Integer { min: 16, max: 65_536, unit: "tokens" },
        Preset::Value("512"),
        "Most prompt tokens of one sequence in a step, a multiple of 16. Smaller is fairer between prompts.",
    ),
    setting(
        "max-waiting",
        Group::Engine,
        Kind::Integer { min: 1, max: 1 << 20, unit: "sequences" },
        Preset::Value("256"),
        "Length of the queue for a free block; beyond it requests get 503 with Retry-After.",
    ),
    setting(
        "max-running",
        Group::Engine,
        Kind::Integer { min: 1, max: 65_536, unit: "sequences" },
        Preset::Value("64"),
        "Most sequences generated at once; memory for them is planned at start.",
    ),
    setting(
        "queue-timeout-s",
        Group::Engine,
        Kind::Number { min: 0.0, max: 86_400.0, unit: "seconds" },
        Preset::Value("300"),
        "Longest wait for a block before a request is given up; 0 is no limit.",
    ),
    setting(
        "drain-timeout-s",
        Group::Engine,
        Kind::Number { min: 0.0, max: 86_400.0, unit: "seconds" },
        Preset::Value("30"),
        "After SIGTERM, how long running requests may still take.",
    ),
    setting(
        "target-step-ms",
        Group::Engine,
        Kind::Number { min: 1.0, max: 60_000.0, unit: "milliseconds" },
        Preset::Value("100"),
        "Step time that the scheduler aims at by giving prompts fewer rows; it bounds the gap between two tokens.",
    ),
    setting(
        "reasoning.open",
        Group::Reasoning,
        Kind::Text { what: "marker" },
        Preset::Derived(
            "what the chat template shows (<think>, ◁think▷, [THINK]); none: the model has no thoughts",
        ),
        "Text in front of a thought: a tag, or the first control token of models trained with randomised traces.",
    ),
    setting(
        "reasoning.close",
        Group::Reasoning,
        Kind::Text { what: "marker" },
        Preset::Derived("the counterpart of reasoning.open, else reasoning.answer-open"),
        "Text behind a thought. It ends the thought wherever it stands, in one token or in several.",
    ),
    setting(
        "reasoning.answer-open",
        Group::Reasoning,
        Kind::Text { what: "marker" },
        Preset::Derived("none"),
        "Text in front of an answer without a thought, for models that mark it; fast mode then puts it at the end of \
         the prompt instead of a closed thought.",
    ),
    setting(
        "reasoning.open-in-prompt",
        Group::Reasoning,
        Kind::Choice(&["auto", "yes", "no"]),
        Preset::Value("auto"),
        "Whether the prompt ends inside a thought. auto looks whether it ends in the marker; yes is for models that \
         always begin with a thought and never open it.",
    ),
    setting(
        "reasoning.budget-message",
        Group::Reasoning,
        Kind::Text { what: "text, or none" },
        Preset::Derived("I have thought long enough and answer now."),
        "What the model is made to say where the budget is used up, on a line of its own in front of the closing \
         marker; a sentence that leads to the answer keeps it better. none says nothing.",
    ),
    setting(
        "reasoning.mode",
        Group::Reasoning,
        Kind::Choice(&["template", "fast", "slow", "auto"]),
        Preset::Value("template"),
        "Where a request does not say whether to think: fast does not, slow does, auto lets the model choose, template \
         leaves the prompt as the chat template makes it.",
    ),
    setting(
        "reasoning.budget",
        Group::Reasoning,
        Kind::Integer { min: 0, max: 1 << 24, unit: "tokens" },
        Preset::Value("4096"),
        "Most tokens of a thought where a request names neither budget nor effort; shorter where the answer is, so \
         that the thought leaves room for it.",
    ),
    setting(
        "reasoning.field",
        Group::Reasoning,
        Kind::Choice(&["both", "reasoning", "reasoning_content"]),
        Preset::Value("both"),
        "Names under which chat messages and deltas have the thoughts; clients know one or the other.",
    ),
    setting(
        "cache.method",
        Group::Cache,
        Kind::Choice(METHOD_OR_AUTO),
        Preset::Value("auto"),
        "What a full block keeps, unless a request says otherwise. auto is learned if the model has a side-car with \
         its weights, else observed: both keep what was attended to, in fixed memory. full keeps every token in \
         memory that grows with max-model-len; docs/kv-cache.md compares all.",
    ),
    setting(
        "cache.methods",
        Group::Cache,
        Kind::ChoiceList(METHODS),
        Preset::Derived("full, window, h2o, tova, keydiff, observed, and learned if there is a side-car"),
        "Methods that requests may ask for beside cache.method. Memory is planned for the dearest of them: expected \
         keeps statistics of queries in every block, lococo needs weights of its own.",
    ),
    setting(
        "cache.slots",
        Group::Cache,
        Kind::Integer { min: 16, max: 1 << 24, unit: "tokens" },
        Preset::Derived(
            "a quarter of the trained context, at least 512 and at most 4096, not more than the context; lococo: \
             what its weights were trained for",
        ),
        "Tokens that survive when a block is full; answers are exact up to this length. Not used by method full.",
    ),
    setting(
        "cache.ring",
        Group::Cache,
        Kind::Integer { min: 1, max: 1 << 20, unit: "tokens" },
        Preset::Derived("a quarter of slots, at least 64 and at most 128"),
        "Tokens appended between two clean-ups of a full block: more is faster and takes more memory.",
    ),
    setting(
        "cache.sinks",
        Group::Cache,
        Kind::Integer { min: 0, max: 1 << 20, unit: "tokens" },
        Preset::Derived("what the method's authors or our measurements suggest, mostly 4"),
        "First tokens of a sequence that are never dropped, at most a quarter of the slots. The system prompt is \
         kept beside them.",
    ),
    setting(
        "cache.recent",
        Group::Cache,
        Kind::Number { min: 0.0, max: 1.0, unit: "" },
        Preset::Derived("what the side-car recommends, else 0.25"),
        "Share of the slots that method learned always gives to the latest tokens.",
    ),
    setting(
        "cache.recall",
        Group::Cache,
        Kind::Number { min: 0.0, max: 1.0, unit: "" },
        Preset::Derived("what the side-car recommends, else 0.5"),
        "Share of its other slots that method learned fills by its second score: more finds more facts again that \
         were mentioned once, less follows the flow of text more closely.",
    ),
    setting(
        "cache.side-car",
        Group::Cache,
        Kind::TextList { what: "paths, or none, or built-in" },
        Preset::Derived(
            "MODEL.locket.safetensors beside the model, if it exists; for the default model the built-in one",
        ),
        "Trained weights for the methods learned and lococo, made by locket tune. none does without; built-in takes \
         those of the default model, for other files of the same model.",
    ),
    setting(
        "cache.layer-budgets",
        Group::Cache,
        Kind::Switch,
        Preset::Value("true"),
        "Give each layer the share of the slots that the side-car names, with methods learned and observed, once a \
         sequence has outgrown its block. It takes no memory but one block's copy.",
    ),
    setting(
        "cache.require-exact",
        Group::Cache,
        Kind::Switch,
        Preset::Value("false"),
        "Refuse prompts and end answers that do not fit into the slots instead of folding, unless a request says \
         otherwise.",
    ),
    setting(
        "cache.dtype",
        Group::Cache,
        Kind::Choice(&["f16", "bf16", "f32", "int8", "int4"]),
        Preset::Value("f16"),
        "Number type of keys and values: f32 takes twice the memory of f16, int8 half of it. int4 is an experiment \
         that only the backend reference has.",
    ),
    setting(
        "cache.capacities",
        Group::Cache,
        Kind::IntegerList { min: 16, max: 1 << 24, unit: "tokens" },
        Preset::Derived(
            "full: 1/16, 1/4 and all of the context; others: slots + ring, and blocks of 1/8 and 1/2 of the slots \
             for short requests",
        ),
        "Sizes of the blocks that are allocated at start; a sequence takes the smallest that holds it.",
    ),
    setting(
        "snapshots.memory",
        Group::Snapshots,
        Kind::Bytes { min: 0 },
        Preset::Derived("a tenth of what the budget leaves beside the weights, at most 256MiB"),
        "Memory for states of blocks: a prompt that begins like an earlier one goes on from there instead of being \
         run again. A part of memory-budget; 0 turns snapshots off.",
    ),
    setting(
        "snapshots.interval",
        Group::Snapshots,
        Kind::Integer { min: 16, max: 1 << 24, unit: "tokens" },
        Preset::Value("1024"),
        "A snapshot is taken every so many tokens from the start, a multiple of 16, and at the end of prompts and \
         answers. Smaller finds longer common starts and takes more memory.",
    ),
    setting(
        "snapshots.dir",
        Group::Snapshots,
        Kind::Text { what: "folder" },
        Preset::Derived("none: snapshots end with the process"),
        "Folder that keeps snapshots over restarts, for one server at a time. They hold conversations in clear; \
         files are readable by the server's user alone.",
    ),
    setting(
        "snapshots.disk",
        Group::Snapshots,
        Kind::Bytes { min: 1 << 20 },
        Preset::Value("8GiB"),
        "Most bytes of files in snapshots.dir; what was not used for longest goes first.",
    ),
    setting(
        "visual.model",
        Group::Visual,
        Kind::Text { what: "file or folder, or none" },
        Preset::Derived(
            "the model folder's own vision tower, else MODEL.vision.safetensors beside the model, if there is one",
        ),
        "Vision tower and projector: with them the model takes images. none serves text only.",
    ),
    setting(
        "visual.adapter",
        Group::Visual,
        Kind::Text { what: "folder, or none" },
        Preset::Derived("MODEL.vision-adapter beside the model, if it exists"),
        "LoRA adapter (PEFT folder) that conversations with images go through, and no others: text is answered by \
         the model as it is.",
    ),
    setting(
        "visual.method",
        Group::Visual,
        Kind::Choice(VISUAL_METHODS),
        Preset::Value("hired"),
        "Which visual tokens stay, unless a request says otherwise. none keeps all; hired and dpp choose before the \
         decoder and save memory and time; pyramid, must and fastv choose inside it by the question and save time. \
         docs/visual-tokens.md compares all.",
    ),
    setting(
        "visual.methods",
        Group::Visual,
        Kind::ChoiceList(VISUAL_METHODS),
        Preset::Derived("all"),
        "Methods that requests may ask for.",
    ),
    setting(
        "visual.budget",
        Group::Visual,
        Kind::Text { what: "share, percentage or number of tokens" },
        Preset::Value("0.4"),
        "Visual tokens that stay of an image with detail auto: a share up to 1, a percentage, or a number of tokens \
         above 1.",
    ),
    setting(
        "visual.low-budget",
        Group::Visual,
        Kind::Text { what: "share, percentage or number of tokens" },
        Preset::Value("0.5"),
        "The same with detail low, which is one tile of the whole image: a share of that tile's tokens.",
    ),
    setting(
        "visual.high-budget",
        Group::Visual,
        Kind::Text { what: "share, percentage or number of tokens" },
        Preset::Value("1.0"),
        "The same with detail high and original.",
    ),
    setting(
        "visual.max-budget",
        Group::Visual,
        Kind::Number { min: 0.001, max: 1.0, unit: "" },
        Preset::Value("1"),
        "Largest share of an image's tokens that a request may ask for.",
    ),
    setting(
        "visual.positions",
        Group::Visual,
        Kind::Choice(&["original", "compact"]),
        Preset::Value("original"),
        "Positions of the tokens that stay: those they would have had, or consecutive ones, which take less of the \
         context.",
    ),
    setting(
        "visual.cache",
        Group::Visual,
        Kind::Bytes { min: 0 },
        Preset::Value("64MiB"),
        "Memory for visual tokens of images that come again, in place of seeing them anew. A part of memory-budget \
         where the model sees; 0 turns it off.",
    ),
    setting(
        "visual.threads",
        Group::Visual,
        Kind::Integer { min: 0, max: 1_024, unit: "threads" },
        Preset::Value("0"),
        "CPU threads for the vision tower, beside those of the model; 0 takes half of them, at least one.",
    ),
    setting(
        "visual.max-waiting",
        Group::Visual,
        Kind::Integer { min: 1, max: 65_536, unit: "images" },
        Preset::Value("64"),
        "Images that may wait for the tower; one more gets 503 with Retry-After.",
    ),
    setting(
        "log.format",
        Group::Log,
        Kind::Choice(&["text", "json"]),
        Preset::Value("text"),
        "Log lines on standard error for people or for machines.",
    ),
    setting(
        "log.filter",
        Group::Log,
        Kind::Text { what: "filter" },
        Preset::Value("info"),
        "What is logged: a level (error, warn, info, debug, trace), or per module: info,locket_engine=debug.",
    ),
    setting(
        "trace.endpoint",
        Group::Trace,
        Kind::Text { what: "URL" },
        Preset::Derived("none: no traces"),
        "OpenTelemetry collector that spans are sent to, by OTLP over HTTP: http://collector:4318. They hold times, \
         counts and names, never text of prompts or answers.",
    ),
    setting(
        "trace.share",
        Group::Trace,
        Kind::Number { min: 0.0, max: 1.0, unit: "" },
        Preset::Value("1"),
        "Share of the requests that are traced; where a caller's traceparent says whether, that counts.",
    ),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn defaults_are_valid_and_names_unique() {
        let mut flags = std::collections::HashSet::new();
        for setting in SETTINGS {
            assert_eq!(setting.default_value().is_some(), matches!(setting.preset, Preset::Value(_)));
            assert!(flags.insert(setting.flag()), "{} twice", setting.flag());
            assert!(setting.help.ends_with('.'), "{}", setting.key);
        }
    }

    #[test]
    fn every_method_can_be_named() {
        let known = locket_model::kv_cache::CacheMethod::ALL.map(|method| method.name());
        assert_eq!(METHODS, known);
        assert_eq!(METHOD_OR_AUTO[1..], known);
        assert_eq!(VISUAL_METHODS, locket_vision::drop::Method::ALL.map(|method| method.name()));
    }
}

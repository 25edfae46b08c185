//! Settings of images and adapters.

use std::path::PathBuf;

use locket_server::visual::VisualConfig;
use locket_vision::drop::{Budget, Method, Positions, VisualSettings};

use super::{Config, reader::Reader};

/// Section `[visual]`.
#[derive(Debug, Clone)]
pub struct VisualOptions {
    /// File or folder of the vision model, or `none`; absent: look for one.
    pub model: Option<String>,
    /// Folder of the adapter for images, or `none`; absent: look for one.
    pub adapter: Option<String>,
    /// What the server decides by.
    pub config: VisualConfig,
    /// CPU threads of the tower; 0: half of the model's.
    pub threads: usize,
}

/// Adapters beside the model.
#[derive(Debug, Clone, Default)]
pub struct AdapterOptions {
    /// Name and folder of each that is loaded at start.
    pub at_start: Vec<(String, PathBuf)>,
    /// Folder from which callers may load others.
    pub dir: Option<PathBuf>,
    /// Most of them at once.
    pub max: usize,
    /// Largest rank of those that callers load.
    pub max_rank: usize,
}

pub(super) fn read(read: &Reader<'_>) -> VisualOptions {
    // What is no budget is reported among the contradictions.
    let budget = |key| read.text(key).parse().unwrap_or(Budget::ALL);
    // The table admits only names that are known.
    let method: Method = read.text("visual.method").parse().unwrap_or_default();
    let methods = read.texts_if_set("visual.methods");
    let methods = methods.map(|names| names.iter().filter_map(|name| name.parse().ok()).collect());
    let positions: Positions = read.text("visual.positions").parse().unwrap_or_default();
    let budget_of_auto = (method != Method::None).then(|| budget("visual.budget"));
    VisualOptions {
        model: read.text_if_set("visual.model"),
        adapter: read.text_if_set("visual.adapter"),
        config: VisualConfig {
            auto: VisualSettings { method, budget: budget_of_auto, positions, ..VisualSettings::default() },
            low_budget: budget("visual.low-budget"),
            high_budget: budget("visual.high-budget"),
            methods: methods.unwrap_or_else(|| Method::ALL.to_vec()),
            max_budget: read.number("visual.max-budget"),
            cache_bytes: usize::try_from(read.integer("visual.cache")).unwrap_or(usize::MAX),
            max_waiting: read.integer("visual.max-waiting") as usize,
        },
        threads: read.integer("visual.threads") as usize,
    }
}

pub(super) fn read_adapters(read: &Reader<'_>) -> AdapterOptions {
    let named = |text: &String| text.split_once('=').map(|(name, path)| (name.to_owned(), path.into()));
    AdapterOptions {
        // What names no folder is reported among the contradictions.
        at_start: read.texts("adapters").iter().filter_map(named).collect(),
        dir: read.text_if_set("adapter-dir").map(PathBuf::from),
        max: read.integer("max-adapters") as usize,
        max_rank: read.integer("max-adapter-rank") as usize,
    }
}

impl Config {
    /// What is wrong with the settings of images and adapters, a text each.
    pub(super) fn of_images(&self) -> Vec<String> {
        let mut problems = Vec::new();
        for key in ["visual.budget", "visual.low-budget", "visual.high-budget"] {
            if let Some(text) = self.text_of(key)
                && let Err(reason) = text.parse::<Budget>()
            {
                problems.push(format!("{key} ({}): {reason}", self.origin(key)));
            }
        }
        for text in self.texts_of("adapters") {
            if !text.split_once('=').is_some_and(|(name, path)| !name.is_empty() && !path.is_empty()) {
                let origin = self.origin("adapters");
                problems
                    .push(format!("adapters ({origin}): {text:?} is not a name and a folder: name=folder"));
            }
        }
        let (given, most) = (self.adapters.at_start.len(), self.adapters.max);
        if given > most {
            let (adapters, max) = (self.origin("adapters"), self.origin("max-adapters"));
            problems
                .push(format!("adapters ({adapters}) has {given}, more than max-adapters = {most} ({max})"));
        }
        problems
    }
}

//! Adapters beside the model: read before memory is planned, loaded before the engine starts.

use std::path::{Path, PathBuf};

use anyhow::Context as _;
use locket_engine::EngineHandle;
use locket_model::{Adapter, AdapterId, Extras, Model, load::Checkpoint};
use locket_server::adapters::NamedAdapter;

use crate::{config::Config, vision::FoundVision};

/// Images of the largest size that a prompt may have beside this many other rows, where tokens leave inside the
/// decoder: its rows are held between layers.
const HELD_IMAGES: usize = 4;
const HELD_ROWS: usize = 2048;

/// Adapters that were read.
#[derive(Default)]
pub struct FoundAdapters {
    named: Vec<(String, PathBuf, Adapter)>,
    visual: Option<Adapter>,
    /// What the model makes room for.
    pub extras: Extras,
}

/// Adapters that are loaded.
#[derive(Debug, Default)]
pub struct LoadedAdapters {
    /// Those that clients may name.
    pub named: Vec<NamedAdapter>,
    /// The one for images.
    pub visual: Option<AdapterId>,
}

/// Reads the adapters that the operator names, and the one for images.
///
/// # Errors
/// One that cannot be read, or that does not fit the model; a name that is given twice.
pub fn find(
    config: &Config,
    checkpoint: &Checkpoint,
    vision: Option<&FoundVision>,
) -> anyhow::Result<FoundAdapters> {
    let open = |path: &Path, setting: &str| {
        let origin = config.origin(setting);
        let opened = Adapter::open(path, &checkpoint.config);
        opened.with_context(|| format!("{setting} ({origin}): {}", path.display()))
    };
    let mut found = FoundAdapters::default();
    for (name, path) in &config.adapters.at_start {
        let is_taken = found.named.iter().any(|(other, ..)| other == name);
        anyhow::ensure!(!is_taken, "adapters ({}): {name:?} is there twice", config.origin("adapters"));
        found.named.push((name.clone(), path.clone(), open(path, "adapters")?));
    }
    if let Some(path) = vision.and_then(|vision| vision.adapter.as_deref()) {
        found.visual = Some(open(path, "visual.adapter")?);
    }
    found.extras = found.room(config, vision);
    Ok(found)
}

impl FoundAdapters {
    fn room(&self, config: &Config, vision: Option<&FoundVision>) -> Extras {
        let all = self.named.iter().map(|(.., adapter)| adapter).chain(&self.visual);
        let held = |vision: &FoundVision| HELD_IMAGES * vision.model.geometry().max_tokens() + HELD_ROWS;
        let max_rank = all.map(Adapter::max_rank).max().unwrap_or(0);
        let (named, max_rank) = match &config.adapters.dir {
            Some(_) => (config.adapters.max, max_rank.max(config.adapters.max_rank)),
            None => (self.named.len(), max_rank),
        };
        Extras {
            adapters: named + usize::from(self.visual.is_some()),
            max_rank,
            held_rows: vision.map_or(0, held),
        }
    }

    /// Makes room in the model, before the engine starts.
    ///
    /// # Errors
    /// The model has no room.
    pub fn reserve(&self, model: &mut dyn Model) -> anyhow::Result<()> {
        model.reserve(&self.extras).context("no room for adapters and images")
    }

    /// Loads them, once the engine has started.
    ///
    /// # Errors
    /// The engine has ended, or has no room.
    pub fn load(self, engine: &EngineHandle) -> anyhow::Result<LoadedAdapters> {
        let mut loaded = LoadedAdapters::default();
        for (name, path, adapter) in self.named {
            let id = engine.load_adapter(adapter).with_context(|| format!("adapter {name}"))?;
            let root =
                path.file_name().map_or_else(|| name.clone(), |root| root.to_string_lossy().into_owned());
            tracing::info!("adapter    {name}: {}", path.display());
            loaded.named.push(NamedAdapter { name, root, id });
        }
        if let Some(adapter) = self.visual {
            loaded.visual = Some(engine.load_adapter(adapter).context("the adapter for images")?);
            tracing::info!("adapter    for conversations with images");
        }
        Ok(loaded)
    }
}

//! One module per route or pair of routes.

pub(crate) mod adapters;
pub(crate) mod chat;
pub(crate) mod completions;
pub(crate) mod embeddings;
pub(crate) mod fallback;
pub(crate) mod health;
pub(crate) mod models;
pub(crate) mod responses;
pub(crate) mod tokenize;
pub(crate) mod visual_tokens;

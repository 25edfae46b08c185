//! The router over the real engine and a model whose text is known beforehand.

#![expect(clippy::panic, reason = "a test fails by panicking")]

mod adapters;
mod answers;
mod cache;
mod connections;
mod embeddings;
mod fake;
mod http;
mod images;
mod keys;
mod page;
mod reasoning;
mod responses;
mod scoring;
mod tools;

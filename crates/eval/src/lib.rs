//! What a cache method costs: perplexity and recall on held-out text, at equal slots and at equal
//! bytes.
//!
//! [`Evaluation`] runs texts and probes through the product's own [`Model`](locket_model::Model), in
//! the same order for every method, number of slots and slot type, and compares sample by sample. The
//! result is a [`Report`] (JSON and tables) and a [picture]. [`mod@fingerprint`] is the small, quick
//! sibling that guards against silent drift. [`vqa`] asks what dropping visual tokens costs.
//!
//! The crate stands beside the engine: it uses the model and the processor's tokenizer, and only the
//! binary calls it. It must never know of training: nothing here is tuned to, or shared with, what
//! side-car weights are trained on.

pub mod documents;
pub mod error;
mod evaluation;
pub mod fingerprint;
pub mod layer_shares;
mod options;
pub mod perplexity;
pub mod picture;
pub mod probes;
mod progress;
pub mod report;
pub mod runner;
pub mod statistics;
mod table;
mod task;
#[cfg(test)]
mod test_model;
pub mod vqa;

pub use error::Error;
pub use evaluation::Evaluation;
pub use options::{Configuration, EvalOptions};
pub use report::Report;
pub use task::Task;

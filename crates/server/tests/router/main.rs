//! The router over the real engine and a model whose text is known beforehand.

mod answers;
mod fake;
mod http;

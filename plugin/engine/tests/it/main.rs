//! What needs no model. One binary: each would link the whole host engine.

#![allow(clippy::unwrap_used)]

mod api;
mod cli;
mod common;
mod config;
mod gguf;
mod metrics;
mod serve;

//! A mistral.rs server whose KV cache is compressed, measured and retuned while requests run.
//!
//! Two listeners: the OpenAI routes ([`serve`]) and the policy API with `/metrics` ([`api`]). Both answer
//! before the model is loaded. All contact with the plugin is in [`kv`], all contact with the model
//! loaders in [`model`].
#![forbid(unsafe_code)]

pub mod admission;
pub mod api;
pub mod architecture;
pub mod bench;
pub mod capture;
pub mod classes;
pub mod cli;
pub mod config;
pub mod eval;
pub mod fingerprint;
pub mod gguf_check;
pub mod http;
pub mod keeper;
pub mod kv;
pub mod memory;
pub mod metrics;
pub mod model;
pub mod probe;
pub mod rotary;
pub mod run;
pub mod serve;
pub mod state;
pub mod watermark;

pub use cinch_settings::fields;

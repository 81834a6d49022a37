//! Cinch's KV-cache plugin: stores that keep some tokens in few bits, and go on changing which and how
//! many while requests run.
//!
//! A [`Plugin`] is a [`cinch_hooks::CachePolicy`]. A request is [assigned](Plugin::assign) a policy before
//! the engine gets it, may be [retuned](Plugin::retune) while it runs, and is [finished](Plugin::finish)
//! when its response is complete. Everything reported is measured: bytes are those of live allocations,
//! errors are of attention outputs that were computed both ways.
//!
//! `seen` counts tokens processed (positions and masks follow it); `kept` counts rows stored.
#![forbid(unsafe_code)]

mod attend;
mod bound;
mod error;
mod evict;
mod gauges;
mod inspect;
mod layer;
mod matmul;
mod observe;
mod plan;
mod plugin;
mod project;
mod quantize;
mod registry;
mod reread;
mod rotary;
mod select;
mod sequence;
mod settings;
mod shared;
mod store;
mod totals;

pub use error::{CacheError, RetuneError};
pub use inspect::{BlockView, HeadRows, HeadView, LayerView};
pub use matmul::Matmul;
pub use observe::Observer;
pub use plugin::{Plugin, RetuneReceipt};
pub use registry::{Assignment, RequestSnapshot, RequestState, Served};
pub use rotary::{Pairing, Rotary, RotaryLayers};
pub use settings::{ErrorSample, PluginSettings};
pub use totals::{ClassTotals, Totals};

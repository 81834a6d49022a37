//! The types of the policy API, shared by plugin, engine and controller. Serde only: no I/O.
//!
//! A [`Policy`] says what is asked; [`Policy::validate`] says whether it means something. Every error
//! names the field, what was given and what is allowed.
#![forbid(unsafe_code)]

mod api;
pub mod bench;
mod given;
mod ladder;
mod layers;
mod methods;
mod policy;
pub mod probe;
mod project;
mod quantize;
mod select;

pub use api::{
    Capacity, ClassCapacity, ClassPolicies, ClassPolicy, Fence, Lease, Origin, Overload, PolicyChange,
    Problem, RequestState, RequestView, RequestViews, RetuneReport, Served, ServedCache, ServedWith,
};
pub use given::{Choice, Given};
pub use ladder::{Ladder, LadderLevel, LevelFigures};
pub use layers::{LayerBits, LayerOverrides, LayerRange};
pub use policy::{Policy, PolicyError, Store};
pub use project::{Project, ProjectMethod};
pub use quantize::{Bits, GROUP, Quantize, QuantizeMethod, Rope};
pub use select::{Heads, Layers, Merge, Select, SelectMethod};

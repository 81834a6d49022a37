//! The types of the policy API, shared by plugin, engine and controller. Serde only: no I/O.
//!
//! A [`Policy`] says what is asked; [`Policy::validate`] says whether it means something. Every error
//! names the field, what was given and what is allowed.
#![forbid(unsafe_code)]

mod policy;

pub use policy::{Bits, Policy, PolicyError, Quantize, QuantizeMethod, Select, SelectMethod, Store};

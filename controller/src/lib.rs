//! The adaptive controller: watches metrics and moves classes and running requests along the ladder.
//!
//! [`law`] decides and is pure; [`engine`] reads, writes and keeps the time; [`sources`] makes of what was read what
//! the law understands, and calls missing what makes no sense.
#![forbid(unsafe_code)]

pub mod config;
pub mod engine;
pub mod http;
pub mod law;
pub mod link;
pub mod metrics;
pub mod run;
pub mod shared;
pub mod sources;
mod write;

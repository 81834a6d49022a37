//! The adaptive controller: watches metrics and moves classes and running requests along the ladder.
//!
//! [`law`] decides and is pure; everything else reads, writes and keeps the time.
#![forbid(unsafe_code)]

pub mod law;

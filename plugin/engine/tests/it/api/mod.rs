//! The policy API without a model.

mod access;
mod bad_input;
mod openapi;
mod policies;
mod requests;

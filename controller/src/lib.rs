//! The adaptive controller.

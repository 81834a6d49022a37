//! Settings: every field has a range and a reason, documented in `configs/engine.toml`, and a value that
//! passed [`Settings::load`] is in its range. Later code relies on that and does not check again.

mod error;
mod load;
mod types;
mod validate;

pub use error::ConfigError;
pub use load::OVERRIDE_EXAMPLE;
pub use types::{
    Api, Class, DType, Engine, Kv, Level, Log, LogFormat, LogLevel, Metrics, Model, ModelKind, Server,
    Settings, Switch,
};
pub use validate::is_class_name;

//! Settings: every field has a range and a reason, documented in `configs/engine.toml`, and a value that
//! passed [`Settings::load`] is in its range. Later code relies on that and does not check again.

mod ladder;
mod load;
mod types;
mod validate;

pub use cinch_settings::ConfigError;
pub(crate) use ladder::parse as parse_ladder;
pub use types::{
    Admission, Api, Class, DType, Engine, Kv, Ladder, LadderFile, Level, Log, LogFormat, LogLevel, Metrics,
    Model, ModelKind, Server, Settings, Switch, Watermark,
};
pub use validate::is_class_name;

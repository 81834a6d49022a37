//! Which tokens stay: a method that ranks them, and how a budget is spread over layers and heads.
//!
//! Invariant: a field that the chosen method has no use for is refused, not ignored.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::methods::{self, methods};
use crate::policy::{PolicyError, range};

/// Which tokens stay.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Select {
    /// How rows are ranked.
    pub method: SelectMethod,
    /// Fraction of the tokens seen that stays, or with `quest` is attended to; sinks and recent included. 0.02 ..= 1.0.
    pub budget: f64,
    /// First tokens that are never evicted. 0 ..= 128.
    #[serde(default = "Select::default_sinks")]
    pub sinks: u32,
    /// Last tokens that are never evicted. 16 ..= 4096.
    #[serde(default = "Select::default_recent")]
    pub recent: u32,
    /// Decoded tokens between two evictions. 1 ..= 1024.
    #[serde(default = "Select::default_interval")]
    pub interval: u32,
    /// Last queries that rank the rows. 1 ..= 64, by default 64.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub window: Option<u32>,
    /// Neighbours that a score is averaged over, itself included. Odd, 1 ..= 15, by default 5.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kernel: Option<u32>,
    /// First layers that keep every token, or with `quest` attend to it, beside the budget of the others. 0 ..= 16, by
    /// default 0, with `quest` 2.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub skip_layers: Option<u32>,
    /// What noise and merges are drawn from. By default 0.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seed: Option<u32>,
    /// Temperature that scores are softened by after 512 decoded tokens; it begins at 1. 1.0 ..= 8.0, by default 2.0.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub temperature: Option<f64>,
    /// Share of its attention to the prompt that a head's rows must have got, at the least. 0.5 ..= 1.0, by default 0.95.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub recover: Option<f64>,
    /// How the budget is spread over layers.
    #[serde(default, skip_serializing_if = "is_default")]
    pub layers: Layers,
    /// How much less than the mean the last layer of a pyramid gets: 1/beta of it. 2 ..= 100, by default 20.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub beta: Option<u32>,
    /// How a layer's budget is spread over its KV heads.
    #[serde(default, skip_serializing_if = "is_default")]
    pub heads: Heads,
    /// Share of an even budget that each head keeps at least, with adaptive heads. 0.0 ..= 1.0, by default 0.2.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub floor: Option<f64>,
    /// What becomes of evicted rows.
    #[serde(default, skip_serializing_if = "is_default")]
    pub merge: Merge,
}

/// How a budget is spread over layers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Layers {
    /// The same to each.
    #[default]
    Even,
    /// More to the first, less to the last (`PyramidKV`, arXiv 2406.02069); the total is the same.
    Pyramid,
    /// To those whose rows score highest (`KVzip`, arXiv 2505.23416, section 4.1): heads of all layers compete. Only where
    /// all layers are ranked at one time, and with heads adaptive.
    Adaptive,
}

impl Layers {
    /// Its name in a policy.
    const fn name(self) -> &'static str {
        match self {
            Self::Even => "even",
            Self::Pyramid => "pyramid",
            Self::Adaptive => "adaptive",
        }
    }
}

/// How a layer's budget is spread over its KV heads.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Heads {
    /// The same to each.
    #[default]
    Even,
    /// To those whose rows score highest (Ada-KV, arXiv 2407.11550); the layer's total is the same. Only with methods
    /// whose scores are on one scale in all heads.
    Adaptive,
}

/// What becomes of evicted rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Merge {
    /// They are dropped.
    #[default]
    None,
    /// Each is merged into the kept row whose key is most like its own (D2O, arXiv 2406.13035).
    D2o,
    /// The value of each is added to those of the kept rows that follow it, by a draw (CaM, Zhang et al., ICML 2024).
    Cam,
}

impl Merge {
    /// Its name in a policy.
    const fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::D2o => "d2o",
            Self::Cam => "cam",
        }
    }
}

fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

methods! {
    /// Selective token strategies.
    pub enum SelectMethod {
        /// `StreamingLLM` (arXiv 2309.17453): sinks and the most recent tokens.
        Streaming = "streaming" [];
        /// H2O (arXiv 2306.14048): heavy hitters by accumulated attention, and the most recent tokens.
        H2o = "h2o" ["heads"];
        /// TOVA (arXiv 2401.06104): what the last query attends to most, the same tokens in all heads of a layer.
        Tova = "tova" [];
        /// `SnapKV` (arXiv 2404.14469): what the last queries attend to most, smoothed over neighbours.
        Snapkv = "snapkv" ["window", "kernel", "heads"];
        /// Scissorhands (arXiv 2305.17118): tokens that the last queries attend to more than to the average one.
        Scissorhands = "scissorhands" ["window", "heads"];
        /// Keyformer (arXiv 2403.09054): accumulated attention, with noise and a temperature that rises.
        Keyformer = "keyformer" ["seed", "temperature", "heads"];
        /// Expected Attention (arXiv 2510.00636): the weight that queries like those so far would give.
        ExpectedAttention = "expected_attention" ["heads"];
        /// Key norm (arXiv 2406.11430): keys of the smallest norm.
        KeyNorm = "key_norm" ["skip_layers"];
        /// `KeyDiff` (arXiv 2504.15364): keys least like the mean key.
        Keydiff = "keydiff" [];
        /// `LagKV` (arXiv 2504.04704): tokens that stand out against the partition that follows theirs.
        Lagkv = "lagkv" [];
        /// `FastGen` (arXiv 2310.01801): of each head, what recovers enough of its attention to the prompt; at most the budget.
        Fastgen = "fastgen" ["recover"];
        /// Quest (arXiv 2406.10774): everything stays; a decoded token attends to `budget` of it, the pages whose keys may give
        /// it the largest logits.
        Quest = "quest" ["skip_layers"];
        /// `KVzip` (arXiv 2505.23416): what the prompt can be repeated from, found by reading it once more.
        Kvzip = "kvzip" ["heads"];
    }
}

impl SelectMethod {
    /// Whether tokens go; else they all stay, and some are attended to.
    #[must_use]
    pub const fn evicts(self) -> bool {
        !matches!(self, Self::Quest)
    }

    /// Whether a prompt is read once more before any of it goes.
    #[must_use]
    pub const fn rereads(self) -> bool {
        matches!(self, Self::Kvzip)
    }
}

impl Select {
    fn default_sinks() -> u32 {
        4
    }
    fn default_recent() -> u32 {
        64
    }
    fn default_interval() -> u32 {
        64
    }

    /// Checks every field against its range, and that the method has a use for it.
    ///
    /// # Errors
    /// The first field that is wrong.
    pub fn validate(&self) -> Result<(), PolicyError> {
        range("select.budget", self.budget, 0.02, 1.0)?;
        range("select.sinks", self.sinks, 0, 128)?;
        range("select.recent", self.recent, 16, 4096)?;
        range("select.interval", self.interval, 1, 1024)?;
        if let Some(window) = self.own("window", self.window)? {
            range("select.window", window, 1, 64)?;
        }
        if let Some(kernel) = self.own("kernel", self.kernel)? {
            range("select.kernel", kernel, 1, 15)?;
            if kernel % 2 == 0 {
                return Err(PolicyError::new(
                    "select.kernel",
                    kernel,
                    "odd numbers from 1 to 15",
                ));
            }
        }
        if let Some(layers) = self.own("skip_layers", self.skip_layers)? {
            range("select.skip_layers", layers, 0, 16)?;
        }
        if self.merge != Merge::Cam {
            self.own("seed", self.seed)?;
        }
        if let Some(temperature) = self.own("temperature", self.temperature)? {
            range("select.temperature", temperature, 1.0, 8.0)?;
        }
        if let Some(recover) = self.own("recover", self.recover)? {
            range("select.recover", recover, 0.5, 1.0)?;
        }
        self.validate_spread()
    }

    fn validate_spread(&self) -> Result<(), PolicyError> {
        let only = |field: &str, given: &dyn fmt::Display, allowed: &str| {
            Err(PolicyError::new(&format!("select.{field}"), given, allowed))
        };
        if let Some(beta) = self.beta {
            if self.layers != Layers::Pyramid {
                return only("beta", &beta, "only with layers pyramid");
            }
            range("select.beta", beta, 2, 100)?;
        }
        if !self.method.evicts() {
            let allowed = |value| {
                format!(
                    "only \"{value}\" with method {}: nothing is evicted",
                    self.method.name()
                )
            };
            if self.layers != Layers::Even {
                return only("layers", &format!("\"{}\"", self.layers.name()), &allowed("even"));
            }
            if self.merge != Merge::None {
                return only("merge", &format!("\"{}\"", self.merge.name()), &allowed("none"));
            }
        }
        if let Some(layers) = self.skip_layers.filter(|_| self.layers != Layers::Even) {
            return only("skip_layers", &layers, "only with layers even");
        }
        if self.layers == Layers::Adaptive
            && (self.method, self.heads) != (SelectMethod::Kvzip, Heads::Adaptive)
        {
            let allowed = "\"even\" or \"pyramid\"; \"adaptive\" only with method kvzip and heads adaptive";
            return only("layers", &"\"adaptive\"", allowed);
        }
        if self.heads == Heads::Adaptive {
            self.own("heads", Some("adaptive"))?;
        }
        if let Some(floor) = self.floor {
            if self.heads != Heads::Adaptive {
                return only("floor", &floor, "only with heads adaptive");
            }
            range("select.floor", floor, 0.0, 1.0)?;
        }
        Ok(())
    }

    /// Refuses a value of a field that the method does not have.
    fn own<T: fmt::Display>(&self, field: &str, given: Option<T>) -> Result<Option<T>, PolicyError> {
        let or = if field == "seed" { " or with merge cam" } else { "" };
        methods::own(self.method, ("select", field), given, or)
    }
}

impl fmt::Display for Select {
    /// For logs: `h2o 0.5`, `snapkv 0.5 pyramid adaptive d2o`, `kvzip 0.5 all-adaptive`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.method.name(), self.budget)?;
        match (self.layers, self.heads) {
            (Layers::Even, Heads::Even) => {}
            (Layers::Even, Heads::Adaptive) => f.write_str(" adaptive")?,
            (Layers::Pyramid, Heads::Even) => f.write_str(" pyramid")?,
            (Layers::Pyramid, Heads::Adaptive) => f.write_str(" pyramid adaptive")?,
            (Layers::Adaptive, _) => f.write_str(" all-adaptive")?,
        }
        if self.merge != Merge::None {
            write!(f, " {}", self.merge.name())?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test that can't go on should say where")]

    use super::*;

    #[test]
    fn what_needs_an_eviction_is_refused_without() {
        for rest in [
            r#", "layers": "pyramid""#,
            r#", "merge": "d2o""#,
            r#", "merge": "cam""#,
        ] {
            let error = select(SelectMethod::Quest, rest).unwrap_err();
            assert!(
                error.allowed.ends_with("with method quest: nothing is evicted"),
                "{error}"
            );
        }
    }

    fn select(method: SelectMethod, rest: &str) -> Result<(), PolicyError> {
        let json = format!(r#"{{"method": "{}", "budget": 0.5{rest}}}"#, method.name());
        serde_json::from_str::<Select>(&json).unwrap().validate()
    }

    #[test]
    fn a_field_of_another_method_is_refused_by_name() {
        let fields = [
            ("window", "8"),
            ("kernel", "3"),
            ("skip_layers", "2"),
            ("seed", "7"),
            ("temperature", "3.0"),
            ("recover", "0.9"),
            ("heads", r#""adaptive""#),
        ];
        for method in SelectMethod::ALL {
            assert_eq!(select(*method, ""), Ok(()));
            for (field, value) in fields {
                let given = select(*method, &format!(r#", "{field}": {value}"#));
                if method.fields().contains(&field) {
                    assert_eq!(given, Ok(()), "{}", method.name());
                } else {
                    let error = given.unwrap_err();
                    assert_eq!(error.field, format!("select.{field}"));
                    assert!(error.allowed.starts_with("only with method "), "{error}");
                }
            }
        }
        assert_eq!(
            select(SelectMethod::H2o, r#", "seed": 7, "merge": "cam""#),
            Ok(())
        );
        let error = select(SelectMethod::H2o, r#", "seed": 7, "merge": "d2o""#).unwrap_err();
        assert_eq!(
            error.to_string(),
            "select.seed: given 7, allowed only with method keyformer or with merge cam"
        );
        let error = select(SelectMethod::H2o, r#", "window": 8"#).unwrap_err();
        assert_eq!(
            error.to_string(),
            "select.window: given 8, allowed only with method snapkv or scissorhands"
        );
    }

    #[test]
    fn fields_have_ranges() {
        use SelectMethod::{Fastgen, KeyNorm, Keyformer, Kvzip, Snapkv};
        for (method, rest) in [
            (Snapkv, r#", "window": 0"#),
            (Snapkv, r#", "window": 65"#),
            (Snapkv, r#", "kernel": 4"#),
            (Snapkv, r#", "kernel": 17"#),
            (KeyNorm, r#", "skip_layers": 17"#),
            (Keyformer, r#", "temperature": 0.5"#),
            (Keyformer, r#", "temperature": 9.0"#),
            (Fastgen, r#", "recover": 0.49"#),
            (Fastgen, r#", "recover": 1.01"#),
            (Snapkv, r#", "beta": 20"#),
            (Snapkv, r#", "layers": "pyramid", "beta": 1"#),
            (Snapkv, r#", "layers": "adaptive", "heads": "adaptive""#),
            (Kvzip, r#", "layers": "adaptive""#),
            (Snapkv, r#", "floor": 0.5"#),
            (Snapkv, r#", "heads": "adaptive", "floor": 1.5"#),
            (KeyNorm, r#", "layers": "pyramid", "skip_layers": 1"#),
        ] {
            assert!(select(method, rest).is_err(), "{rest}");
        }
    }

    #[test]
    fn wrappers_are_spoken_of_and_defaults_are_not() {
        let json = r#"{"method":"snapkv","budget":0.5,"sinks":4,"recent":64,"interval":64"#;
        let full =
            format!(r#"{json},"layers":"pyramid","beta":9,"heads":"adaptive","floor":0.1,"merge":"d2o"}}"#);
        let select: Select = serde_json::from_str(&full).unwrap();
        assert_eq!(select.validate(), Ok(()));
        assert_eq!(select.to_string(), "snapkv 0.5 pyramid adaptive d2o");
        assert_eq!(serde_json::to_string(&select).unwrap(), full);
        let plain: Select = serde_json::from_str(&format!("{json}}}")).unwrap();
        assert_eq!(serde_json::to_string(&plain).unwrap(), format!("{json}}}"));
    }
}

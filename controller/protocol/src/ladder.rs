//! The ladder: levels that compress harder one after another, with what each was measured to hold.

use serde::{Deserialize, Serialize};

use crate::{Choice, Given, Policy, PolicyError};

/// One level of the ladder.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LadderLevel {
    /// Its index; 0 is uncompressed, each next one compresses harder.
    pub level: u32,
    /// A name for people.
    pub name: String,
    /// What it does.
    pub policy: Policy,
    /// Bytes it holds of those level 0 holds, as measured on the model the ladder names. Falls from level
    /// to level.
    pub bytes_ratio: f64,
    /// What else was measured of it; absent: nothing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub figures: Option<LevelFigures>,
}

/// What a level was measured to do to answers and to speed. Quality is against level 0 on the same tokens, forced
/// one after another; speed is of one request alone. A figure that was not measured is absent.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LevelFigures {
    /// Mean Kullback-Leibler divergence of the next token's distribution from level 0's, nats.
    pub kl_mean: f64,
    /// Its 95th percentile over tokens.
    pub kl_p95: f64,
    /// Its 99th percentile over tokens.
    pub kl_p99: f64,
    /// Perplexity over level 0's.
    pub perplexity_ratio: f64,
    /// Share of tokens whose likeliest successor is level 0's.
    pub top1_agreement: f64,
    /// Root mean square of the change of the right token's probability.
    pub rms_delta_p: f64,
    /// Mean relative error of attention output, as the engine measures it at compressions.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub attention_error: Option<f64>,
    /// Prompt tokens a second.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prefill_tps: Option<f64>,
    /// New tokens a second after the first.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub decode_tps: Option<f64>,
    /// Milliseconds to the first token.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ttft_ms: Option<f64>,
    /// The most bytes of the process that were resident, the loaded model among them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub peak_rss_bytes: Option<u64>,
}

/// Answer of `GET /v1/ladder`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Ladder {
    /// The model its figures were measured on.
    pub model: String,
    /// The fingerprint of that model's file; absent where nobody took it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fingerprint: Option<String>,
    /// When they were, as YYYY-MM-DD.
    pub measured: String,
    /// The levels, in order.
    pub levels: Vec<LadderLevel>,
}

impl Ladder {
    /// The mildest level that was measured to hold at most one `ratio`th of the bytes of level 0.
    ///
    /// # Errors
    /// A ratio under 1, or one that no level reaches; no levels.
    pub fn level_of(&self, ratio: f64) -> Result<&LadderLevel, PolicyError> {
        let reached = |level: &&LadderLevel| 1.0 / level.bytes_ratio >= ratio;
        // Written so that NaN is out of range.
        let found = self.levels.iter().find(reached).filter(|_| ratio >= 1.0);
        found.ok_or_else(|| match self.levels.last() {
            // Rounded down: what the message allows is allowed.
            Some(last) => {
                let most = (100.0 / last.bytes_ratio).floor() / 100.0;
                PolicyError::new("ratio", ratio, &format!("1.0 to {most:?}"))
            }
            None => no_ladder("ratio", ratio),
        })
    }

    /// What was given, as a policy and, unless it was spelled out, the level it is.
    ///
    /// # Errors
    /// A field of the policy, the level or the ratio out of range.
    pub fn choice(&self, given: Given<'_>) -> Result<Choice, PolicyError> {
        let found = match given {
            Given::Policy(policy) => {
                policy.validate().map_err(|err| err.within(given.field()))?;
                return Ok(Choice {
                    level: None,
                    policy: policy.clone(),
                });
            }
            Given::Level(level) => {
                self.levels
                    .get(level as usize)
                    .ok_or_else(|| match self.levels.len().checked_sub(1) {
                        Some(last) => PolicyError::new("level", level, &format!("0 to {last}")),
                        None => no_ladder("level", level),
                    })?
            }
            Given::Ratio(ratio) => self.level_of(ratio)?,
        };
        Ok(Choice {
            level: Some(found.level),
            policy: found.policy.clone(),
        })
    }
}

fn no_ladder(field: &str, given: impl std::fmt::Display) -> PolicyError {
    PolicyError::new(field, given, "nothing: no ladder is configured")
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// Of levels that hold these shares of level 0's bytes; a level's policy is its number of recent tokens.
    fn ladder(ratios: &[f64]) -> Ladder {
        let level = |(level, &bytes_ratio)| LadderLevel {
            level,
            name: format!("l{level}"),
            policy: policy(level),
            bytes_ratio,
            figures: None,
        };
        Ladder {
            model: "m".into(),
            fingerprint: None,
            measured: "2026-01-01".into(),
            levels: (0..).zip(ratios).map(level).collect(),
        }
    }

    fn policy(level: u32) -> Policy {
        let recent = 16 + level;
        let policy = json!({"select": {"method": "streaming", "budget": 0.5, "recent": recent}});
        serde_json::from_value(policy).unwrap()
    }

    #[test]
    fn a_ratio_picks_the_mildest_level_that_reaches_it() {
        let ladder = ladder(&[1.0, 0.5, 0.25, 0.182]);
        for (ratio, level) in [
            (1.0, 0),
            (1.000_001, 1),
            (2.0, 1),
            (2.01, 2),
            (4.0, 2),
            (5.0, 3),
            (5.49, 3),
        ] {
            assert_eq!(ladder.level_of(ratio).unwrap().level, level, "{ratio}");
        }
        let choice = ladder.choice(Given::Ratio(3.0)).unwrap();
        assert_eq!((choice.level, choice.policy), (Some(2), policy(2)));
    }

    #[test]
    fn a_ratio_out_of_reach_says_what_is_in_reach() {
        let ladder = ladder(&[1.0, 0.5, 0.182]);
        for ratio in [5.5, 1e300, f64::INFINITY, 0.99, 0.0, -4.0, f64::NAN] {
            let err = ladder.level_of(ratio).unwrap_err();
            assert_eq!(err, PolicyError::new("ratio", ratio, "1.0 to 5.49"));
        }
        let only_full = self::ladder(&[1.0]);
        assert_eq!(only_full.level_of(1.5).unwrap_err().allowed, "1.0 to 1.0");
    }

    #[test]
    fn without_a_ladder_there_is_nothing_to_pick() {
        let none = ladder(&[]);
        for (given, field) in [(Given::Ratio(1.0), "ratio"), (Given::Level(0), "level")] {
            let err = none.choice(given).unwrap_err();
            let said = (err.field.as_str(), err.allowed.as_str());
            assert_eq!(said, (field, "nothing: no ladder is configured"));
        }
        let spelled = policy(3);
        assert!(none.choice(Given::Policy(&spelled)).is_ok());
    }

    #[test]
    fn levels_and_policies_are_checked() {
        let ladder = ladder(&[1.0, 0.5]);
        let choice = ladder.choice(Given::Level(1)).unwrap();
        assert_eq!((choice.level, choice.policy), (Some(1), policy(1)));
        let err = ladder.choice(Given::Level(2)).unwrap_err();
        assert_eq!(err, PolicyError::new("level", 2, "0 to 1"));
        let mut spelled = policy(0);
        let choice = ladder.choice(Given::Policy(&spelled)).unwrap();
        assert_eq!((choice.level, &choice.policy), (None, &spelled));
        spelled.select.as_mut().unwrap().budget = 1.5;
        let err = ladder.choice(Given::Policy(&spelled)).unwrap_err();
        assert_eq!(err, PolicyError::new("policy.select.budget", 1.5, "0.02 to 1"));
    }
}

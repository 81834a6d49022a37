//! The three ways in which a policy is given, wherever one is: requests, classes, the API, the configuration.

use crate::{Policy, PolicyError};

/// What was given: exactly one of the three.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Given<'a> {
    /// A policy spelled out.
    Policy(&'a Policy),
    /// A level of the ladder.
    Level(u32),
    /// How many times fewer bytes than level 0 holds.
    Ratio(f64),
}

/// A policy, and the ladder's level that it is.
#[derive(Debug, Clone, PartialEq)]
pub struct Choice {
    /// The ladder level, if it was given as one or as a ratio.
    pub level: Option<u32>,
    /// The policy.
    pub policy: Policy,
}

impl<'a> Given<'a> {
    /// The fields, by name.
    pub const FIELDS: [&'static str; 3] = ["policy", "level", "ratio"];

    /// The one of the three that is there.
    ///
    /// # Errors
    /// None of them or more than one. The error's field is empty: it is the object they lie in.
    pub fn one_of(
        policy: Option<&'a Policy>,
        level: Option<u32>,
        ratio: Option<f64>,
    ) -> Result<Self, PolicyError> {
        let all = [
            policy.map(Self::Policy),
            level.map(Self::Level),
            ratio.map(Self::Ratio),
        ];
        let given: Vec<Self> = all.into_iter().flatten().collect();
        match given[..] {
            [one] => Ok(one),
            [] => Err(not_one("none of them")),
            _ => {
                let names: Vec<String> = given.iter().map(|one| format!("`{}`", one.field())).collect();
                Err(not_one(&names.join(" and ")))
            }
        }
    }

    /// The field it was given in.
    #[must_use]
    pub fn field(self) -> &'static str {
        let [policy, level, ratio] = Self::FIELDS;
        match self {
            Self::Policy(_) => policy,
            Self::Level(_) => level,
            Self::Ratio(_) => ratio,
        }
    }
}

fn not_one(given: &str) -> PolicyError {
    let [policy, level, ratio] = Given::FIELDS;
    let allowed = format!("exactly one of `{policy}`, `{level}` and `{ratio}`");
    PolicyError::new("", given, &allowed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exactly_one_is_given() {
        let policy = Policy::default();
        let all = [
            (Some(&policy), None, None, "policy"),
            (None, Some(0), None, "level"),
            (None, None, Some(1.5), "ratio"),
        ];
        for (policy, level, ratio, field) in all {
            assert_eq!(Given::one_of(policy, level, ratio).unwrap().field(), field);
        }
        for (policy, level, ratio, given) in [
            (None, None, None, "none of them"),
            (Some(&policy), Some(1), None, "`policy` and `level`"),
            (Some(&policy), None, Some(2.0), "`policy` and `ratio`"),
            (None, Some(1), Some(2.0), "`level` and `ratio`"),
            (
                Some(&policy),
                Some(1),
                Some(2.0),
                "`policy` and `level` and `ratio`",
            ),
        ] {
            let err = Given::one_of(policy, level, ratio).unwrap_err();
            let allowed = "exactly one of `policy`, `level` and `ratio`";
            assert_eq!(err, PolicyError::new("", given, allowed));
        }
    }
}

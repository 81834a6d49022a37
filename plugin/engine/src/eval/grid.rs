//! The grid: how much is measured, and which policies. Blocks are policies in which a field may be a list; each
//! combination of listed values is a policy, checked as one, so that a method's new fields need no line here.

use cinch_protocol::Policy;
use cinch_settings::ConfigError;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tracing::warn;

use super::options::Mode;
use crate::fields::{FieldFault, decode};

/// The grid that is used where none is given.
pub(super) const DEFAULT: &str = include_str!("../../../../configs/eval.toml");
/// Most policies of a grid: a block with too many lists is a mistake.
const MOST: usize = 1000;

/// A grid file.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    quick: Sizes,
    full: Sizes,
    grid: Vec<Block>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Block {
    #[serde(default)]
    quick: bool,
    policy: Value,
}

/// How much is measured. `configs/eval.toml` says more of each.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Sizes {
    /// Stretches of the text.
    pub(super) windows: usize,
    /// Prompt tokens of each.
    pub(super) context: usize,
    /// Tokens that are then forced.
    pub(super) steps: usize,
    /// Lengths of the retrieval tasks' prompts, tokens.
    pub(super) task_lengths: Vec<usize>,
    /// Where in a prompt the needle is, 0 to 1.
    pub(super) task_depths: Vec<f64>,
    /// Different needles for each task, length and depth.
    pub(super) task_repeats: usize,
    /// Prompt tokens of the request whose speed is measured.
    pub(super) speed_context: usize,
    /// Tokens it generates.
    pub(super) speed_steps: usize,
    /// How often.
    pub(super) speed_rounds: usize,
}

/// What is measured.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Grid {
    /// How much.
    pub(super) sizes: Sizes,
    /// Names and policies, all different; the first is level 0.
    pub(super) policies: Vec<(String, Policy)>,
}

impl Grid {
    /// Leaves out, and says so, what the model cannot be served with: a grid is for any model, and some of it depends on
    /// layers and heads. `fits` says why not.
    ///
    /// # Errors
    /// Nothing is left to compare with level 0.
    pub(super) fn fit(&mut self, fits: impl Fn(&Policy) -> Result<(), String>) -> Result<(), FieldFault> {
        self.policies.retain(|(name, policy)| {
            let fits = fits(policy);
            if let Err(reason) = &fits {
                warn!("{name} is left out: {reason}");
            }
            fits.is_ok()
        });
        if self.policies.len() < 2 {
            let given = "no policy beside level 0 that this model can be served with";
            return Err(FieldFault::new("grid", given, "at least one"));
        }
        Ok(())
    }
}

/// Reads a grid; `origin` names it in messages.
///
/// # Errors
/// The first thing wrong, by its field.
pub(super) fn parse(text: &str, origin: &str, mode: Mode) -> Result<Grid, ConfigError> {
    let value: Value = toml::from_str(text).map_err(|err| ConfigError::Syntax {
        origin: origin.to_owned(),
        reason: err.to_string().split_whitespace().collect::<Vec<_>>().join(" "),
    })?;
    let grid = decode::<File>(&value, "").and_then(|file| check(file, mode));
    grid.map_err(|fault| ConfigError::Field {
        origin: origin.to_owned(),
        fault,
    })
}

fn check(file: File, mode: Mode) -> Result<Grid, FieldFault> {
    sizes("quick", &file.quick)?;
    sizes("full", &file.full)?;
    let mut policies = vec![Policy::default()];
    for (index, block) in file.grid.iter().enumerate() {
        let field = format!("grid[{index}].policy");
        for template in expand(&block.policy, &field)? {
            let policy: Policy = decode(&template, &field)?;
            policy
                .validate()
                .map_err(|err| FieldFault::from(err).within(&field))?;
            if (mode == Mode::Full || block.quick) && !policies.contains(&policy) {
                policies.push(policy);
            }
        }
    }
    if policies.len() < 2 {
        let given = format!("no policy beside level 0 for {}", mode.name());
        return Err(FieldFault::new("grid", given, "at least one block"));
    }
    if policies.len() > MOST {
        let given = format!("{} policies", policies.len());
        return Err(FieldFault::new("grid", given, format!("at most {MOST}")));
    }
    let mut names: Vec<String> = Vec::new();
    for policy in &policies {
        let name = name(policy);
        // The short form leaves some fields out.
        let again = names.iter().filter(|other| base(other) == name).count();
        names.push(if again == 0 {
            name
        } else {
            format!("{name}~{}", again + 1)
        });
    }
    Ok(Grid {
        sizes: match mode {
            Mode::Quick => file.quick,
            Mode::Full => file.full,
        },
        policies: names.into_iter().zip(policies).collect(),
    })
}

fn base(name: &str) -> &str {
    name.split('~').next().unwrap_or(name)
}

/// Most ranges of layers that a name lists.
const MOST_RANGES: usize = 3;

/// A name for people, of what logs call the policy: `snapkv-0.5-k8-v4`. Bits of many layers are not listed:
/// `k3-v3-by-layer`.
pub(super) fn name(policy: &Policy) -> String {
    let mut policy = policy.clone();
    let mut ending = "";
    if let Some(quantize) = policy
        .quantize
        .as_mut()
        .filter(|own| own.layers.len() > MOST_RANGES)
    {
        quantize.layers.clear();
        ending = " by layer";
    }
    let text = format!("{policy}{ending}");
    let word = |c: char| c.is_ascii_alphanumeric() || c == '.' || c == '_';
    let words: Vec<&str> = text.split(|c| !word(c)).filter(|part| !part.is_empty()).collect();
    words.join("-")
}

fn sizes(section: &str, sizes: &Sizes) -> Result<(), FieldFault> {
    let range = |name: &str, given: usize, low: usize, high: usize| {
        if (low..=high).contains(&given) {
            return Ok(());
        }
        let field = format!("{section}.{name}");
        Err(FieldFault::new(field, given, format!("{low} to {high}")))
    };
    const LONGEST: usize = 1 << 20;
    range("windows", sizes.windows, 1, 64)?;
    range("context", sizes.context, 64, LONGEST)?;
    range("steps", sizes.steps, 16, 1 << 16)?;
    for &length in &sizes.task_lengths {
        range("task_lengths", length, 256, LONGEST)?;
    }
    let bad_depth = sizes
        .task_depths
        .iter()
        .find(|depth| !(0.0..=1.0).contains(*depth));
    if let Some(depth) = bad_depth {
        let field = format!("{section}.task_depths");
        return Err(FieldFault::new(field, depth, "0.0 to 1.0"));
    }
    if !sizes.task_lengths.is_empty() && sizes.task_depths.len() < 2 {
        let field = format!("{section}.task_depths");
        let allowed = "two or more: the second question asks for another needle than the first";
        return Err(FieldFault::new(field, sizes.task_depths.len(), allowed));
    }
    range("task_repeats", sizes.task_repeats, 1, 64)?;
    range("speed_context", sizes.speed_context, 64, LONGEST)?;
    range("speed_steps", sizes.speed_steps, 2, 4096)?;
    range("speed_rounds", sizes.speed_rounds, 0, 100)
}

/// Every combination of one value of each list in `template`; earlier fields vary slowest.
fn expand(template: &Value, field: &str) -> Result<Vec<Value>, FieldFault> {
    match template {
        Value::Array(values) if values.is_empty() => {
            Err(FieldFault::new(field, "an empty list", "one value or more"))
        }
        Value::Array(values) => {
            let mut all = Vec::new();
            for value in values {
                all.extend(expand(value, field)?);
            }
            Ok(all)
        }
        Value::Object(fields) => {
            let mut all = vec![serde_json::Map::new()];
            for (name, value) in fields {
                let values = expand(value, &format!("{field}.{name}"))?;
                if all.len() * values.len() > MOST {
                    let given = "lists with more combinations";
                    return Err(FieldFault::new(field, given, format!("at most {MOST} policies")));
                }
                all = all
                    .into_iter()
                    .flat_map(|object| {
                        values.iter().map(move |value| {
                            let mut object = object.clone();
                            object.insert(name.clone(), value.clone());
                            object
                        })
                    })
                    .collect();
            }
            Ok(all.into_iter().map(Value::Object).collect())
        }
        other => Ok(vec![other.clone()]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with(blocks: &str, mode: Mode) -> Result<Grid, String> {
        let (sizes, _) = DEFAULT.split_once("[[grid]]").unwrap();
        parse(&format!("{blocks}\n{sizes}"), "g.toml", mode).map_err(|err| err.to_string())
    }

    fn names(grid: &Grid) -> Vec<&str> {
        grid.policies.iter().map(|(name, _)| name.as_str()).collect()
    }

    #[test]
    fn the_default_grid() {
        let full = parse(DEFAULT, "default", Mode::Full).unwrap();
        let quick = parse(DEFAULT, "default", Mode::Quick).unwrap();
        assert_eq!((full.sizes.context, quick.sizes.context), (2048, 1024));
        assert_eq!(full.policies[0], ("full".to_owned(), Policy::default()));
        assert!(quick.policies.iter().all(|policy| full.policies.contains(policy)));
        assert!(quick.policies.len() < full.policies.len());
        let mut unique = names(&full);
        unique.sort_unstable();
        unique.dedup();
        assert_eq!(unique.len(), full.policies.len());
    }

    /// What the policy schema names, the default grid measures.
    #[test]
    fn the_default_grid_has_every_method() {
        let schema: Value = serde_json::from_str(include_str!("../api/openapi.json")).unwrap();
        let full = parse(DEFAULT, "default", Mode::Full).unwrap();
        let policies = || full.policies.iter().map(|(_, policy)| policy);
        for (section, field) in [
            ("Select", "method"),
            ("Select", "layers"),
            ("Select", "heads"),
            ("Select", "merge"),
            ("Project", "method"),
            ("Quantize", "method"),
        ] {
            let schema = &schema["components"]["schemas"][section]["properties"][field];
            let values = schema["enum"].as_array().unwrap();
            assert!(values.len() > 1, "{section}.{field}");
            for value in values.iter().filter(|value| **value != schema["default"]) {
                let has = |policy: &Policy| {
                    let policy = serde_json::to_value(policy).unwrap();
                    policy[section.to_lowercase()][field] == *value
                };
                assert!(policies().any(has), "{section}.{field} {value}");
            }
        }
        let quantize = || policies().filter_map(|policy| policy.quantize.as_ref());
        assert!(quantize().any(|quantize| quantize.rotate_k));
        assert!(quantize().any(|quantize| !quantize.layers.is_empty()));
        let project = || policies().filter_map(|policy| policy.project.as_ref());
        assert!(project().any(|project| project.k_rank.is_some()));
        assert!(project().any(|project| project.v_rank.is_some()));
    }

    #[test]
    fn what_the_model_cannot_have_is_left_out() {
        let blocks = "[[grid]]\npolicy = { project = { method = \"lowrank\", k_rank = [48, 96] } }\n";
        let mut grid = with(blocks, Mode::Full).unwrap();
        let most = |most: u32| {
            move |policy: &Policy| {
                let rank = policy.project.as_ref().and_then(|project| project.k_rank);
                match rank.filter(|rank| *rank > most) {
                    Some(rank) => Err(format!("{rank} is over {most}")),
                    None => Ok(()),
                }
            }
        };
        grid.fit(most(64)).unwrap();
        assert_eq!(names(&grid), ["full", "lowrank-k48"]);
        let fault = grid.fit(most(32)).unwrap_err();
        assert_eq!(fault.field, "grid");
    }

    #[test]
    fn lists_are_combined_once() {
        let grid = with(
            "[[grid]]\npolicy = { quantize = { k_bits = [8, 4], v_bits = [4, 2] } }\n\
             [[grid]]\nquick = true\npolicy = { quantize = { k_bits = 4, v_bits = 4, residual = [32, 64] } }\n",
            Mode::Full,
        )
        .unwrap();
        assert_eq!(
            names(&grid),
            ["full", "k8-v4", "k8-v2", "k4-v4", "k4-v2", "k4-v4~2"]
        );
        let quick = with(
            "[[grid]]\nquick = true\npolicy = { select = { method = [\"h2o\", \"snapkv\"], budget = 0.25 } }\n\
             [[grid]]\npolicy = { quantize = { k_bits = 8, v_bits = 8 } }\n",
            Mode::Quick,
        )
        .unwrap();
        assert_eq!(names(&quick), ["full", "h2o-0.25", "snapkv-0.25"]);
    }

    #[test]
    fn names_do_not_list_the_bits_of_many_layers() {
        let named = |layers: &str| {
            let json = format!(r#"{{"quantize": {{"k_bits": 3, "v_bits": 3, "layers": {{{layers}}}}}}}"#);
            name(&serde_json::from_str(&json).unwrap())
        };
        let own = |layer: usize| format!(r#""{layer}": {{"k_bits": 4}}"#);
        let of = |count: usize| named(&(0..count).map(own).collect::<Vec<_>>().join(","));
        assert_eq!(of(0), "k3-v3");
        assert_eq!(of(2), "k3-v3-0-k4-1-k4");
        assert_eq!(of(MOST_RANGES), "k3-v3-0-k4-1-k4-2-k4");
        assert_eq!(of(MOST_RANGES + 1), "k3-v3-by-layer");
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (blocks, wanted) in [
            (
                "[[grid]]\npolicy = { quantize = { k_bits = [8, 5], v_bits = 4 } }",
                "g.toml: field `grid[0].policy.quantize.k_bits`: given 5, allowed 2, 3, 4, 8 or 16",
            ),
            (
                "[[grid]]\npolicy = { select = { method = \"h2o\", budget = [] } }",
                "field `grid[0].policy.select.budget`: given an empty list",
            ),
            (
                "[[grid]]\npolicy = { select = { method = \"streaming\", budget = 0.5, heads = [\"even\", \"adaptive\"] } }",
                "field `grid[0].policy.select.heads`: given adaptive",
            ),
            (
                "[[grid]]\npolicys = {}",
                "field `grid[0].policys`: given an unknown field",
            ),
            (
                "grid = []",
                "field `grid`: given no policy beside level 0 for full",
            ),
            ("[[grid]]\npolicy = {", "not valid TOML"),
        ] {
            let said = with(blocks, Mode::Full).unwrap_err();
            assert!(said.contains(wanted), "{said}\n  wanted {wanted}");
        }
        for (from, to, wanted) in [
            (
                "windows = 2",
                "windows = 0",
                "field `quick.windows`: given 0, allowed 1 to 64",
            ),
            (
                "task_depths = [0.1, 0.5, 0.9]",
                "task_depths = [0.1, 1.5]",
                "field `quick.task_depths`: given 1.5, allowed 0.0 to 1.0",
            ),
            (
                "task_depths = [0.1, 0.5, 0.9]",
                "task_depths = [0.1]",
                "field `quick.task_depths`: given 1, allowed two or more",
            ),
            ("steps = 128", "", "field `quick.steps`: given nothing"),
        ] {
            let said = parse(&DEFAULT.replacen(from, to, 1), "g.toml", Mode::Quick).unwrap_err();
            assert!(said.to_string().contains(wanted), "{said}\n  wanted {wanted}");
        }
    }
}

//! The command line of `cinch bench`, checked: what is wrong is said before anything is measured.

use std::path::PathBuf;

use cinch_protocol::Policy;
use cinch_protocol::bench::Other;
use clap::Args;
use serde_json::Value;

use super::cases::MIXED;
use crate::config::{LadderFile, Settings};
use crate::fields::{FieldFault, decode};

/// What `cinch bench` is told.
#[derive(Debug, Clone, Args)]
pub struct Options {
    /// Prompt lengths of single requests, in tokens.
    #[arg(long, default_value = "64,2048,8000", value_name = "N,N,…")]
    pub contexts: String,
    /// What to compress with: names of ladder levels, int8, int4, int3 or int2, policies spelled out as in a
    /// configuration file, or off: mistral.rs' own cache.
    #[arg(long, default_value = "off,full,int8,int4", value_name = "NAME,{…},…")]
    pub policies: String,
    /// Requests at once. 1 runs each of the contexts; more run prompts of mixed lengths.
    #[arg(long, default_value = "1,4,8", value_name = "N,N,…")]
    pub concurrency: String,
    /// Tokens that each request generates.
    #[arg(long, default_value_t = 64, value_name = "N")]
    pub new_tokens: usize,
    /// How often everything is measured, each system in turn.
    #[arg(long, default_value_t = 3, value_name = "N")]
    pub rounds: usize,
    /// A text to take prompts from. Default: counted sentences.
    #[arg(long, value_name = "FILE")]
    pub text: Option<PathBuf>,
    /// Measure another system in turn with this one: {"system": …, "command": […]}, and
    /// "kv" and "max_concurrency" where it has them. The command gets two more arguments, the files of a plan and of its
    /// report, as `cinch probe` does.
    #[arg(long, value_name = "JSON")]
    pub other: Vec<String>,
    /// Measure the decode kernel by itself too: packed bytes a second over one sequence of 8192 tokens, against
    /// what as many threads read as a plain stream.
    #[arg(long)]
    pub kernel: bool,
    /// Where to write all figures, JSON; again after each round.
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
    /// Where to plot them, SVG.
    #[arg(long, value_name = "FILE")]
    pub svg: Option<PathBuf>,
}

/// A system that is measured.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct System {
    /// Its name.
    pub(crate) name: String,
    /// What its KV cache is in; empty: what its report says.
    pub(crate) kv: String,
    /// How it is run.
    pub(crate) run: Runner,
    /// Most requests it takes at once.
    pub(crate) max_concurrency: Option<usize>,
}

/// How a system is run.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Runner {
    /// This program, with these settings.
    Cinch(Vec<String>),
    /// Another, with these arguments.
    Other(Vec<String>),
}

/// The checked options.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Checked {
    pub(super) contexts: Vec<usize>,
    pub(super) concurrency: Vec<usize>,
    pub(super) systems: Vec<System>,
}

/// Settings that a benchmark makes itself.
const OWN: [&str; 3] = ["class.default", "kv.plugin", "engine.prefix_cache"];

/// Checks `options` against a configuration that was made with `overrides`.
pub(super) fn check(
    options: &Options,
    settings: &Settings,
    overrides: &[String],
) -> Result<Checked, FieldFault> {
    for given in overrides {
        let key = given.split('=').next().unwrap_or(given).trim();
        if OWN
            .iter()
            .any(|own| key == *own || key.starts_with(&format!("{own}.")))
        {
            let allowed =
                "other fields: a benchmark sets class.default, kv.plugin and engine.prefix_cache itself";
            return Err(FieldFault::new("--set", given, allowed));
        }
    }
    range("--new-tokens", options.new_tokens, 2, 4096)?;
    range("--rounds", options.rounds, 1, 100)?;
    let contexts = numbers("--contexts", &options.contexts, 1 << 20)?;
    let concurrency = numbers("--concurrency", &options.concurrency, settings.engine.max_running)?;
    let mut systems = policies(&options.policies, &settings.ladder.content)?;
    for given in &options.other {
        systems.push(other(given)?);
    }
    Ok(Checked {
        contexts,
        concurrency,
        systems,
    })
}

/// Checks the lengths against a loaded model's context and the tokens a text has.
pub(super) fn check_lengths(
    options: &Options,
    checked: &Checked,
    context: Option<usize>,
    tokens: usize,
) -> Result<(), FieldFault> {
    let single = checked.concurrency.contains(&1);
    let singles = checked.contexts.iter().filter(|_| single);
    let lengths = singles.map(|&length| ("--contexts", length));
    let mixed = checked.concurrency.iter().filter(|&&n| n > 1);
    let mixed = mixed.flat_map(|&n| MIXED.iter().take(n).map(|&length| ("--concurrency", length)));
    for (field, length) in lengths.chain(mixed) {
        let whole = length + options.new_tokens;
        if let Some(context) = context.filter(|&context| whole > context) {
            let given = format!("a prompt of {length} tokens and {} new ones", options.new_tokens);
            let allowed = format!("together at most {context}, the model's context");
            return Err(FieldFault::new(field, given, allowed));
        }
        if length > tokens {
            let given = format!("a text of {tokens} tokens");
            return Err(FieldFault::new(
                "--text",
                given,
                format!("at least the {length} tokens of a prompt"),
            ));
        }
    }
    Ok(())
}

fn numbers(field: &str, given: &str, most: usize) -> Result<Vec<usize>, FieldFault> {
    let mut numbers = Vec::new();
    for part in given.split(',').map(str::trim) {
        let number = part.parse().ok().filter(|number| (1..=most).contains(number));
        match number {
            Some(number) if !numbers.contains(&number) => numbers.push(number),
            _ => {
                let allowed = format!("different numbers of 1 to {most}, with commas between them");
                return Err(FieldFault::new(
                    field,
                    if part.is_empty() { "nothing" } else { part },
                    allowed,
                ));
            }
        }
    }
    Ok(numbers)
}

/// Names of quantization with nothing else, whatever the ladder has.
const PLAIN: [(&str, u8); 4] = [("int8", 8), ("int4", 4), ("int3", 3), ("int2", 2)];

fn policies(given: &str, ladder: &LadderFile) -> Result<Vec<System>, FieldFault> {
    let names: Vec<&str> = ladder.level.iter().map(|level| level.name.as_str()).collect();
    let mut systems: Vec<System> = Vec::new();
    for part in split(given) {
        let (kv, set) = if part == "off" {
            (part.to_owned(), "kv.plugin=off".to_owned())
        } else if let Some(level) = names.iter().position(|name| *name == part) {
            (part.to_owned(), format!("class.default.level={level}"))
        } else if let Some((_, bits)) = PLAIN.iter().find(|(name, _)| *name == part) {
            let set = format!("class.default.policy={{ quantize = {{ k_bits = {bits}, v_bits = {bits} }} }}");
            (part.to_owned(), set)
        } else if part.starts_with('{') {
            (
                policy(part)?.to_string(),
                format!("class.default.policy={}", one_line(part)),
            )
        } else {
            let allowed = format!(
                "off, {}, a level of the ladder ({}) or a policy {{ … }}",
                PLAIN.map(|(name, _)| name).join(", "),
                names.join(", ")
            );
            let part = if part.is_empty() { "nothing" } else { part };
            return Err(FieldFault::new("--policies", part, allowed));
        };
        if systems.iter().any(|system| system.kv == kv) {
            return Err(FieldFault::new("--policies", part, "each policy once"));
        }
        systems.push(System {
            name: "cinch".to_owned(),
            kv,
            run: Runner::Cinch(vec![set]),
            max_concurrency: None,
        });
    }
    Ok(systems)
}

fn one_line(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

fn policy(given: &str) -> Result<Policy, FieldFault> {
    let table: Value = toml::from_str(&format!("policy = {}", one_line(given)))
        .map_err(|err| FieldFault::new("--policies", given, format!("a TOML table ({})", err.message())))?;
    let policy: Policy = decode(&table["policy"], "--policies")?;
    policy
        .validate()
        .map_err(|err| FieldFault::from(err).within("--policies"))?;
    Ok(policy)
}

/// At the commas that are in no brackets.
fn split(given: &str) -> Vec<&str> {
    let mut depth = 0_i32;
    let parts = given.split(|c| {
        depth += match c {
            '{' | '[' => 1,
            '}' | ']' => -1,
            _ => 0,
        };
        c == ',' && depth <= 0
    });
    parts.map(str::trim).collect()
}

fn other(given: &str) -> Result<System, FieldFault> {
    let value: Value = serde_json::from_str(given)
        .map_err(|err| FieldFault::new("--other", given, format!("a JSON object ({err})")))?;
    let other: Other = decode(&value, "--other")?;
    if other.command.is_empty() {
        return Err(FieldFault::new(
            "--other.command",
            "[]",
            "a program and its arguments",
        ));
    }
    Ok(System {
        name: other.system,
        kv: other.kv.unwrap_or_default(),
        run: Runner::Other(other.command),
        max_concurrency: other.max_concurrency,
    })
}

fn range(field: &str, given: usize, low: usize, high: usize) -> Result<(), FieldFault> {
    if (low..=high).contains(&given) {
        Ok(())
    } else {
        Err(FieldFault::new(field, given, format!("{low} to {high}")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CONFIG: &str = "[model]\nkind = \"gguf\"\nfile = \"m.gguf\"\n[ladder]\nfile = \"ladders/smollm2-135m-instruct.toml\"\n[class.default]\nlevel = 0\n";

    fn settings() -> Settings {
        let path = PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../../configs/engine.toml"));
        Settings::parse(CONFIG, &path, &[]).unwrap()
    }

    fn options() -> Options {
        Options {
            contexts: "64, 8000".into(),
            policies: "off,int4,{ quantize = { k_bits = 8, v_bits = 4 } }".into(),
            concurrency: "1,4".into(),
            new_tokens: 64,
            rounds: 1,
            text: None,
            other: vec![r#"{"system": "x", "kv": "f16", "command": ["true"], "max_concurrency": 1}"#.into()],
            kernel: false,
            json: None,
            svg: None,
        }
    }

    #[test]
    fn systems_in_order() {
        let checked = check(&options(), &settings(), &[]).unwrap();
        assert_eq!(checked.contexts, [64, 8000]);
        let named: Vec<_> = checked
            .systems
            .iter()
            .map(|system| (&*system.name, &*system.kv))
            .collect();
        assert_eq!(
            named,
            [
                ("cinch", "off"),
                ("cinch", "int4"),
                ("cinch", "k8 v4"),
                ("x", "f16")
            ]
        );
        assert_eq!(
            checked.systems[1].run,
            Runner::Cinch(vec![
                "class.default.policy={ quantize = { k_bits = 4, v_bits = 4 } }".into()
            ])
        );
        assert_eq!(
            checked.systems[2].run,
            Runner::Cinch(vec![
                "class.default.policy={ quantize = { k_bits = 8, v_bits = 4 } }".into()
            ])
        );
        assert_eq!(checked.systems[3].max_concurrency, Some(1));
        // What a child is told must be what its own configuration takes.
        for system in &checked.systems[..3] {
            let Runner::Cinch(set) = &system.run else {
                unreachable!()
            };
            let path = PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../../configs/engine.toml"));
            Settings::parse(CONFIG, &path, set).unwrap();
        }
    }

    #[test]
    fn refusals_name_the_field() {
        type Change = fn(&mut Options);
        let cases: [(Change, &str); 12] = [
            (
                |o| o.contexts = "64,many".into(),
                "field `--contexts`: given many, allowed different numbers of 1 to",
            ),
            (
                |o| o.contexts = String::new(),
                "field `--contexts`: given nothing, allowed",
            ),
            (
                |o| o.contexts = "64,64".into(),
                "field `--contexts`: given 64, allowed different",
            ),
            (
                |o| o.concurrency = "17".into(),
                "field `--concurrency`: given 17, allowed different numbers of 1 to 16",
            ),
            (
                |o| o.new_tokens = 1,
                "field `--new-tokens`: given 1, allowed 2 to 4096",
            ),
            (|o| o.rounds = 0, "field `--rounds`: given 0, allowed 1 to 100"),
            (
                |o| o.policies = "int5".into(),
                "field `--policies`: given int5, allowed off, int8, int4, int3, int2, a level of the ladder (full, k8-v8,",
            ),
            (
                |o| o.policies = "full,full".into(),
                "field `--policies`: given full, allowed each policy once",
            ),
            (
                |o| o.policies = "{ quantize = { k_bits = 5, v_bits = 8 } }".into(),
                "field `--policies.quantize.k_bits`: given 5",
            ),
            (
                |o| o.policies = "{ quantize = ".into(),
                "field `--policies`: given { quantize =, allowed a TOML table",
            ),
            (
                |o| o.other = vec!["{}".into()],
                "field `--other.system`: given nothing, allowed",
            ),
            (
                |o| o.other = vec![r#"{"system":"x","kv":"y","command":[]}"#.into()],
                "field `--other.command`: given []",
            ),
        ];
        for (change, wanted) in cases {
            let mut options = options();
            change(&mut options);
            let said = check(&options, &settings(), &[]).unwrap_err().to_string();
            assert!(said.starts_with(wanted), "{said}\n  wanted {wanted}");
        }
        let said = check(&options(), &settings(), &["kv.plugin=off".into()]).unwrap_err();
        assert!(
            said.to_string().starts_with("field `--set`: given kv.plugin=off"),
            "{said}"
        );
        assert!(check(&options(), &settings(), &["kv.capacity_bytes=9999999".into()]).is_ok());
    }

    #[test]
    fn lengths_must_fit_model_and_text() {
        let checked = check(&options(), &settings(), &[]).unwrap();
        check_lengths(&options(), &checked, Some(8192), 9000).unwrap();
        let said = |context, tokens| {
            let refused = check_lengths(&options(), &checked, context, tokens);
            refused.unwrap_err().to_string()
        };
        assert_eq!(
            said(Some(8063), 9000),
            "field `--contexts`: given a prompt of 8000 tokens and 64 new ones, allowed together at most 8063, the model's context"
        );
        assert_eq!(
            said(None, 7999),
            "field `--text`: given a text of 7999 tokens, allowed at least the 8000 tokens of a prompt"
        );
        let mut checked = checked.clone();
        checked.contexts = vec![64];
        let refused = check_lengths(&options(), &checked, Some(2048), 9000).unwrap_err();
        assert_eq!(refused.field, "--concurrency");
    }
}

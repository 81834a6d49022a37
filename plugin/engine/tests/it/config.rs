//! The documented configuration, and what is said of a wrong one.

use std::collections::BTreeSet;

use crate::common::{CONFIG, PATH};
use cinch_engine::config::{ConfigError, Settings};
use serde_json::Value;

fn refused(text: &str, overrides: &[&str]) -> String {
    let overrides: Vec<String> = overrides.iter().map(|text| (*text).to_owned()).collect();
    match Settings::parse(text, PATH.as_ref(), &overrides) {
        Ok(_) => panic!("accepted"),
        Err(err) => {
            let text = err.to_string();
            assert!(!text.contains('\n'), "more than one line: {text}");
            text
        }
    }
}

fn set(given: &str) -> String {
    refused(CONFIG, &[given])
}

/// Every leaf of a value, as `section.field`; list places left out.
fn leaves(value: &Value, path: &str, into: &mut BTreeSet<String>) {
    match value {
        Value::Object(fields) => {
            for (name, value) in fields {
                let path = if path.is_empty() {
                    name.clone()
                } else {
                    format!("{path}.{name}")
                };
                leaves(value, &path, into);
            }
        }
        Value::Array(items) => items.iter().for_each(|item| leaves(item, path, into)),
        _ => {
            into.insert(path.to_owned());
        }
    }
}

#[test]
fn the_file_is_right_and_documents_every_field() {
    let settings = crate::common::settings(&[]);
    let mut fields = BTreeSet::new();
    leaves(&serde_json::to_value(&settings).unwrap(), "", &mut fields);
    assert!(
        fields.contains("kv.capacity_bytes") && fields.contains("api.token"),
        "{fields:?}"
    );
    let mut section = String::new();
    let mut documented = BTreeSet::new();
    let mut comment = false;
    for line in CONFIG.lines().map(str::trim) {
        let bare = line.trim_start_matches("# ");
        if line.starts_with('[') {
            section = line.trim_matches(['[', ']']).to_owned();
        } else if let Some((name, _)) = bare
            .split_once(" = ")
            .filter(|(name, _)| !name.contains([' ', '{', '(', '[', '`']))
        {
            assert!(
                comment || documented.contains(&format!("{section}.{name}")),
                "{section}.{name} has no comment"
            );
            documented.insert(format!("{section}.{name}"));
        }
        comment = line.starts_with('#');
    }
    for field in fields {
        if let Some(class) = field.strip_prefix("class.") {
            let name = class.split_once('.').unwrap().1;
            let of_class = documented
                .iter()
                .any(|doc| doc.starts_with("class.") && doc.ends_with(&format!(".{name}")));
            assert!(of_class, "class.*.{name} is not in configs/engine.toml");
        } else {
            assert!(
                documented.contains(&field),
                "{field} is not in configs/engine.toml"
            );
        }
    }
}

#[test]
fn defaults_in_code_and_file_agree() {
    let only = "[model]\nkind = \"gguf\"\nfile = \"x.gguf\"\n[class.default]\nlevel = 0\n[ladder]\nfile = \"ladders/smollm2-135m-instruct.toml\"\n";
    let bare = Settings::parse(only, PATH.as_ref(), &[]).unwrap();
    let file = crate::common::settings(&[]);
    assert_eq!(
        (bare.server, bare.api, bare.log),
        (file.server, file.api, file.log)
    );
    assert_eq!(
        (bare.engine, bare.kv, bare.metrics),
        (file.engine, file.kv, file.metrics)
    );
    assert_eq!((bare.admission, bare.watermark), (file.admission, file.watermark));
    assert_eq!(bare.model.dtype, file.model.dtype);
}

#[test]
fn later_sources_win() {
    let settings = crate::common::settings(&[
        "kv.capacity_bytes=536870912",
        "server.listen=127.0.0.1:8000",
        "kv.capacity_bytes=1073741824",
        "class.batch.level=3",
        "class.night={ policy = { quantize = { k_bits = 8, v_bits = 4 } } }",
    ]);
    assert_eq!(settings.kv.capacity_bytes, 1 << 30);
    assert_eq!(settings.server.listen.port(), 8000);
    assert_eq!(settings.class["batch"].level, Some(3));
    assert!(settings.class["night"].policy.is_some());
    let settings = crate::common::settings(&["class.batch.policy={ store = \"exact\" }"]);
    let batch = &settings.class["batch"];
    assert!(
        batch.level.is_none() && batch.policy.is_some(),
        "the file's level gives way"
    );
    let settings = crate::common::settings(&["class.batch.ratio=4.0"]);
    let batch = &settings.class["batch"];
    assert_eq!((batch.level, batch.ratio), (None, Some(4.0)));
    let text = refused(CONFIG, &["class.batch.ratio=4.0", "class.batch.level=1"]);
    assert!(
        text.contains("field `class.batch`: given `level` and `ratio`"),
        "{text}"
    );
}

#[test]
fn unknown_fields_are_named_with_the_known_ones() {
    let text = set("kv.capacity=5");
    assert!(
        text.starts_with("--set kv.capacity: field `kv.capacity`: given an unknown field"),
        "{text}"
    );
    assert!(text.contains("`capacity_bytes`"), "{text}");
    let text = refused(&CONFIG.replace("max_running", "max_runing"), &[]);
    assert!(
        text.starts_with("../../configs/engine.toml: field `engine.max_runing`: given an unknown field"),
        "{text}"
    );
    let text = set("engin.max_running=5");
    assert!(text.contains("field `engin`"), "{text}");
}

#[test]
fn wrong_values_are_named_with_what_is_allowed() {
    let cases = [
        (
            "kv.capacity_bytes=x",
            "field `kv.capacity_bytes`: given \"x\", allowed a whole number, 0 or more",
        ),
        (
            "kv.capacity_bytes=5",
            "field `kv.capacity_bytes`: given 5, allowed 1048576 to 17592186044416",
        ),
        (
            "kv.capacity_bytes=-5",
            "field `kv.capacity_bytes`: given -5, allowed a whole number, 0 or more",
        ),
        (
            "engine.max_running=0",
            "field `engine.max_running`: given 0, allowed 1 to 256",
        ),
        (
            "engine.kernels=sse9",
            "field `engine.kernels`: given sse9, allowed auto or, on this CPU, one of scalar, portable",
        ),
        (
            "admission.max_queue=0",
            "field `admission.max_queue`: given 0, allowed 1 to 100000",
        ),
        (
            "admission.max_wait_seconds=0",
            "field `admission.max_wait_seconds`: given 0, allowed 1 to 86400",
        ),
        (
            "admission.default_max_tokens=0",
            "field `admission.default_max_tokens`: given 0, allowed 1 to 1048576",
        ),
        (
            "watermark.high=1.5",
            "field `watermark.high`: given 1.5, allowed 0.1 to 1",
        ),
        (
            "watermark.low=0.95",
            "field `watermark.low`: given 0.95, allowed under 0.95 (watermark.high)",
        ),
        (
            "watermark.low=0.01",
            "field `watermark.low`: given 0.01, allowed 0.05 to 1",
        ),
        (
            "watermark.enabled=perhaps",
            "field `watermark.enabled`: given \"perhaps\", allowed a boolean",
        ),
        (
            "engine.prefix_cache=1",
            "field `engine.prefix_cache`: given 1, allowed a boolean",
        ),
        (
            "kv.plugin=maybe",
            "field `kv.plugin`: given \"maybe\", allowed `on` or `off`",
        ),
        (
            "log.level=loud",
            "field `log.level`: given \"loud\", allowed `error`, `warn`, `info`, `debug`, `trace`",
        ),
        (
            "class.batch.level=99",
            "field `class.batch.level`: given 99, allowed 0 to ",
        ),
        (
            "class.night={level=1,policy={}}",
            "field `class.night`: given `policy` and `level`, allowed exactly one of `policy`, `level` and `ratio`",
        ),
        (
            "class.night={level=1,ratio=2.0}",
            "field `class.night`: given `level` and `ratio`, allowed exactly one of",
        ),
        (
            "class.night={}",
            "field `class.night`: given none of them, allowed exactly one of",
        ),
        (
            "class.batch.ratio=99",
            "--set class.batch.ratio: field `class.batch.ratio`: given 99, allowed 1.0 to ",
        ),
        (
            "class.batch.ratio=0.5",
            "field `class.batch.ratio`: given 0.5, allowed 1.0 to ",
        ),
        (
            "class.batch.ratio=half",
            "field `class.batch.ratio`: given \"half\", allowed a number",
        ),
        (
            "class.Batch={level=0}",
            "field `class.Batch`: given Batch, allowed a name of",
        ),
        (
            "model.kind=onnx",
            "field `model.kind`: given \"onnx\", allowed `gguf` or `hf`",
        ),
        (
            "model.chat_template=x.txt",
            "field `model.chat_template`: given x.txt, allowed a file that ends in",
        ),
        (
            "api.listen=127.0.0.1:8080",
            "field `api.listen`: given 127.0.0.1:8080, allowed another port",
        ),
        (
            "api.listen=0.0.0.0:9180",
            "field `api.token`: given nothing, allowed a token",
        ),
        (
            "api.token=short",
            "field `api.token`: given 5 characters, allowed 16 or more",
        ),
    ];
    for (given, wanted) in cases {
        let text = set(given);
        assert!(
            text.contains(wanted),
            "--set {given}\n  says   {text}\n  wanted {wanted}"
        );
    }
    let text = set("server.listen=nowhere");
    assert!(
        text.contains("field `server.listen`: given \"nowhere\""),
        "{text}"
    );
}

#[test]
fn a_ladder_that_is_not_there_is_named() {
    let text = set("ladder.file=ladders/none.toml");
    assert!(
        text.contains("field `ladder.file`: given ../../configs/ladders/none.toml (No such file"),
        "{text}"
    );
    let text = refused(&CONFIG.replace("[ladder]", "[model.ladder]"), &[]);
    assert!(
        text.contains("field `model.ladder`: given an unknown field"),
        "{text}"
    );
    let text = refused(&CONFIG.replace("file = \"ladders/", "# file = \"ladders/"), &[]);
    assert!(text.contains("field `ladder.file`: given nothing"), "{text}");
    let text = refused(
        "model = { kind = \"gguf\", file = \"x.gguf\" }",
        &["class.default.ratio=2.0"],
    );
    assert!(text.contains("field `ladder`: given nothing"), "{text}");
}

#[test]
fn default_class_is_required() {
    let text = refused(&CONFIG.replace("[class.default]", "[class.other]"), &[]);
    assert!(text.contains("field `class.default`: given nothing"), "{text}");
}

#[test]
fn syntax_errors_say_where() {
    let text = refused("[model]\nkind = \n", &[]);
    assert!(
        text.starts_with("../../configs/engine.toml: not valid TOML: line 2"),
        "{text}"
    );
    let text = set("kv.capacity_bytes");
    assert!(text.contains("given no `=`, allowed key=value"), "{text}");
}

#[test]
fn a_missing_file_is_named() {
    let err = Settings::load("no/such/file.toml".as_ref(), &[]).unwrap_err();
    assert!(matches!(err, ConfigError::Read { .. }));
    assert!(err.to_string().starts_with("no/such/file.toml: "), "{err}");
}

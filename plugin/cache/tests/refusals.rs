//! Bad input is refused with a typed error and leaves every row as it was.
#![allow(clippy::unwrap_used, reason = "a test that can't go on should say where")]

mod common;

use std::any::Any;
use std::sync::{Arc, Mutex};

use candle_core::{DType, Device, Tensor};
use cinch_cache::{CacheError, Observer, Plugin, PluginSettings, RequestState, RetuneError};
use cinch_hooks::{CachePolicy, ForkRole, HookError, Qkv, SequenceCache};
use cinch_protocol::Policy;
use common::*;

fn zeros(dims: (usize, usize, usize, usize)) -> Tensor {
    Tensor::zeros(dims, DType::F32, &Device::Cpu).unwrap()
}

fn attend(
    plugin: &Plugin,
    layer: usize,
    rows: &[Seq],
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
) -> Result<Tensor, HookError> {
    let handles: Vec<_> = rows.iter().map(|row| row.cache.clone()).collect();
    plugin.attend(
        layer,
        &handles,
        Qkv { q, k, v },
        &SMALL.params(),
        &dense(SMALL.params()),
    )
}

#[test]
fn layers_that_the_model_does_not_have() {
    let plugin = plugin(policy("{}"));
    drop(open(&plugin, &SMALL, 1, 1));
    let with = |layers: &str| {
        let text = format!(r#"{{"quantize": {{"k_bits": 4, "v_bits": 4, "layers": {layers}}}}}"#);
        plugin
            .assign(2, assignment(policy(&text)))
            .map_err(|error| error.to_string())
    };
    assert_eq!(
        with(r#"{"1-2": {"k_bits": 8}}"#),
        Err("quantize.layers: given 1-2, allowed layers of the model, 0 to 1".into())
    );
    assert_eq!(with(r#"{"0-1": {"k_bits": 8}}"#), Ok(()));
}

#[test]
fn layers_are_named_once_and_with_bits() {
    let refused = |layers: &str| {
        let text = format!(r#"{{"quantize": {{"k_bits": 4, "v_bits": 4, "layers": {layers}}}}}"#);
        let policy: Policy = serde_json::from_str(&text).unwrap();
        policy.validate().unwrap_err().to_string()
    };
    assert_eq!(
        refused(r#"{"0-3": {"k_bits": 8}, "3-5": {"v_bits": 8}}"#),
        "quantize.layers: given 0-3 and 3-5, allowed layers that no other range names"
    );
    assert_eq!(
        refused(r#"{"2": {}}"#),
        "quantize.layers.2: given nothing, allowed k_bits, v_bits or both"
    );
}

#[test]
fn shapes_that_do_not_fit() {
    let plugin = plugin(policy("{}"));
    let mut seq = [open(&plugin, &SMALL, 1, 1)];
    step(&plugin, &SMALL, &mut seq, 10);
    let view = plugin.inspect(&*seq[0].cache).unwrap();
    let (q, k, v) = (zeros((1, 6, 1, 32)), zeros((1, 2, 1, 32)), zeros((1, 2, 1, 64)));
    for (layer, rows, q, k, v, part) in [
        (2, &seq[..], &q, &k, &v, "layer 2"),
        (0, &[][..], &q, &k, &v, "at least one row"),
        (0, &seq[..], &zeros((1, 5, 1, 32)), &k, &v, "q: "),
        (0, &seq[..], &zeros((2, 6, 1, 32)), &k, &v, "q: "),
        (0, &seq[..], &zeros((1, 6, 0, 32)), &k, &v, "q: "),
        (0, &seq[..], &zeros((1, 0, 1, 32)), &k, &v, "q: "),
        (0, &seq[..], &zeros((1, 6, 1, 15)), &k, &v, "q: "),
        (
            0,
            &seq[..],
            &zeros((1, 6, 1, 32)).squeeze(0).unwrap(),
            &k,
            &v,
            "q: ",
        ),
        (0, &seq[..], &q, &zeros((1, 2, 2, 32)), &v, "k: "),
        (0, &seq[..], &q, &zeros((1, 3, 1, 32)), &v, "k: "),
        (0, &seq[..], &q, &k, &zeros((1, 2, 1, 32)), "v: "),
        (
            0,
            &seq[..],
            &q,
            &k,
            &zeros((1, 2, 1, 64)).to_dtype(DType::F64).unwrap(),
            "F64",
        ),
        (0, &seq[..], &q.to_dtype(DType::U8).unwrap(), &k, &v, "U8"),
        (
            0,
            &[seq[0].clone(), seq[0].clone()][..],
            &zeros((2, 6, 1, 32)),
            &zeros((2, 2, 1, 32)),
            &zeros((2, 2, 1, 64)),
            "once",
        ),
    ] {
        let error = attend(&plugin, layer, rows, q, k, v).unwrap_err().to_string();
        assert!(error.contains(part), "{error} should name {part}");
    }
    let nan = (&k * f64::NAN).unwrap();
    let infinite = (&v + f64::INFINITY).unwrap();
    assert!(attend(&plugin, 0, &seq, &q, &nan, &v).is_err());
    assert!(attend(&plugin, 0, &seq, &q, &k, &infinite).is_err());
    let (q, k, v) = (zeros((1, 6, 4, 32)), zeros((1, 2, 4, 32)), zeros((1, 2, 4, 64)));
    let infinite = (&v + f64::INFINITY).unwrap();
    let error = attend(&plugin, 0, &seq, &q, &k, &infinite)
        .unwrap_err()
        .to_string();
    assert!(error.contains("finite"), "{error}");
    assert_eq!(
        plugin.inspect(&*seq[0].cache).unwrap(),
        view,
        "no refusal changed anything"
    );
    step(&plugin, &SMALL, &mut seq, 1);
    check_invariants(&plugin, &seq[0]);
}

#[test]
fn one_bad_row_leaves_the_batch_as_it_was() {
    for json in [
        "{}",
        r#"{"select": {"method": "h2o", "budget": 0.5, "recent": 16, "interval": 1}}"#,
    ] {
        for force_device_path in [false, true] {
            let plugin = plugin_with(
                policy(json),
                PluginSettings {
                    force_device_path,
                    ..settings()
                },
            );
            let mut rows = [open(&plugin, &SMALL, 1, 1), open(&plugin, &SMALL, 2, 2)];
            step(&plugin, &SMALL, &mut rows, 70);
            step(&plugin, &SMALL, &mut rows, 1);
            let views = rows.clone().map(|row| plugin.inspect(&*row.cache).unwrap());
            for fresh in [1, 5] {
                let k = tensor(&rows, 0, What::K, 2, fresh, 32);
                let poison = Tensor::cat(
                    &[
                        zeros((1, 2, fresh, 32)),
                        (zeros((1, 2, fresh, 32)) * f64::NAN).unwrap(),
                    ],
                    0,
                );
                let k = (k + poison.unwrap()).unwrap();
                let q = tensor(&rows, 0, What::Q, 6, fresh, 32);
                let v = tensor(&rows, 0, What::V, 2, fresh, 64);
                assert!(attend(&plugin, 0, &rows, &q, &k, &v).is_err());
                for (row, view) in rows.iter().zip(&views) {
                    let now = plugin.inspect(&*row.cache).unwrap();
                    for (now, then) in now.iter().zip(view) {
                        assert_eq!(now.seen, then.seen);
                        for (now, then) in now.heads.iter().zip(&then.heads) {
                            assert_eq!((&now.positions, &now.scores), (&then.positions, &then.scores));
                        }
                    }
                }
            }
            step(&plugin, &SMALL, &mut rows, 1);
            rows.iter().for_each(|row| drop(check_invariants(&plugin, row)));
        }
    }
}

#[test]
fn models_that_can_not_be_stored() {
    let plugin = plugin(policy("{}"));
    let mut info = SMALL.info(1, 1, 1);
    info.dtype = DType::F64;
    assert!(matches!(plugin.open(&info), Err(HookError::DType { .. })));
    let mut info = SMALL.info(1, 1, 1);
    info.layers[1].kv_heads = 0;
    assert!(plugin.open(&info).err().unwrap().to_string().contains("layer 1"));
    info.layers.clear();
    assert!(
        plugin
            .open(&info)
            .err()
            .unwrap()
            .to_string()
            .contains("layers: given 0")
    );
    assert!(
        plugin.requests().is_empty(),
        "a refused sequence registers nothing"
    );
}

struct Foreign;

impl SequenceCache for Foreign {
    fn seen(&self, _: usize) -> usize {
        0
    }
    fn fork(&self, _: ForkRole) -> Result<Arc<dyn SequenceCache>, HookError> {
        Ok(Arc::new(Self))
    }
    fn truncate(&self, _: usize) -> Result<(), HookError> {
        Ok(())
    }
    fn bytes(&self) -> usize {
        0
    }
    fn as_any(&self) -> &dyn Any {
        self
    }
}

#[test]
fn caches_of_somebody_else() {
    let ours = plugin(policy("{}"));
    let theirs = plugin(policy("{}"));
    let own = open(&ours, &SMALL, 1, 1);
    for cache in [
        Arc::new(Foreign) as Arc<dyn SequenceCache>,
        open(&theirs, &SMALL, 1, 1).cache,
    ] {
        let foreign = Seq {
            cache,
            text: 1,
            seen: 0,
        };
        let rows = [own.clone(), foreign.clone()];
        let (q, k, v) = (zeros((2, 6, 1, 32)), zeros((2, 2, 1, 32)), zeros((2, 2, 1, 64)));
        assert!(matches!(
            attend(&ours, 0, &rows, &q, &k, &v),
            Err(HookError::ForeignCache { row: 1 })
        ));
        assert!(matches!(
            ours.adopt(foreign.cache, &SMALL.info(1, 1, 1)),
            Err(HookError::ForeignCache { .. })
        ));
    }
    let other = Model { k_dim: 8, ..SMALL };
    let error = ours
        .adopt(own.cache.fork(ForkRole::Sequence).unwrap(), &other.info(2, 2, 2))
        .err()
        .unwrap();
    assert!(error.to_string().contains("another model"));
}

#[test]
fn assignments_and_retunes() {
    let bad = || policy_unchecked(r#"{"select": {"method": "h2o", "budget": 7.0}}"#);
    assert!(matches!(
        Plugin::new(settings(), assignment(bad())),
        Err(CacheError::Policy(_))
    ));
    let plugin = plugin_with(policy("{}"), settings());
    assert!(matches!(
        plugin.assign(5, assignment(bad())),
        Err(CacheError::Policy(_))
    ));
    assert!(matches!(
        plugin.set_default(assignment(bad())),
        Err(CacheError::Policy(_))
    ));
    assert_eq!(
        plugin.retune(5, None, policy("{}")),
        Err(RetuneError::Unknown { request: 5 })
    );
    assert!(plugin.request(5).is_none());

    plugin.assign(5, assignment(policy("{}"))).unwrap();
    plugin.note_prompt_tokens(5, 40);
    assert_eq!(plugin.request(5).unwrap().state, RequestState::Queued);
    assert_eq!(plugin.totals().classes["default"].queued_prompt_tokens, 40);
    assert!(matches!(
        plugin.retune(5, None, bad()),
        Err(RetuneError::Policy(_))
    ));
    let int8 = policy(r#"{"quantize": {"k_bits": 8, "v_bits": 8}}"#);
    assert!(
        plugin.retune(5, Some(1), int8.clone()).unwrap().notes.is_empty(),
        "nothing is lost yet"
    );
    let mut seq = [open(&plugin, &SMALL, 5, 1)];
    assert!(matches!(
        plugin.assign(5, assignment(policy("{}"))),
        Err(CacheError::AssignedLate { request: 5 })
    ));
    step(&plugin, &SMALL, &mut seq, 100);
    let snapshot = plugin.request(5).unwrap();
    assert_eq!((snapshot.state, snapshot.level), (RequestState::Running, Some(1)));
    assert_eq!(
        snapshot.served.len(),
        1,
        "a policy replaced while queued served nothing"
    );
    let receipt = plugin.retune(5, Some(0), policy("{}")).unwrap();
    assert!(receipt.notes[0].contains("k8 v8"), "{:?}", receipt.notes);
    plugin.finish(5);
    assert_eq!(
        plugin.retune(5, None, policy("{}")),
        Err(RetuneError::Finished { request: 5 })
    );
    assert_eq!(plugin.request(5).unwrap().state, RequestState::Finished);
    assert!(plugin.requests().is_empty());
    // The engine may be a step late: what it still holds goes on, unlisted.
    step(&plugin, &SMALL, &mut seq, 1);
    drop(seq);
    assert_eq!(plugin.totals().live_bytes, 0);
    for request in 100..1200 {
        plugin.assign(request, assignment(policy("{}"))).unwrap();
        plugin.finish(request);
    }
    assert!(plugin.request(5).is_none(), "only the last 1024 are remembered");
    assert!(plugin.request(1199).is_some());
}

struct Heard(Arc<Mutex<Vec<(String, f64)>>>);

impl Observer for Heard {
    fn attention_error(&self, class: &str, value: f64) {
        self.0.lock().unwrap().push((class.into(), value));
    }
}

#[test]
fn the_observer_hears_every_measurement() {
    let plugin = plugin(policy(
        r#"{"quantize": {"k_bits": 4, "v_bits": 4, "residual": 16}}"#,
    ));
    let heard = Arc::new(Mutex::new(Vec::new()));
    plugin.set_observer(Box::new(Heard(heard.clone())));
    let measured = |times: usize| {
        let heard = heard.lock().unwrap();
        assert_eq!(heard.len(), times * SMALL.layers * SMALL.kv_heads);
        assert!(
            heard
                .iter()
                .all(|(class, error)| class == "default" && *error > 1e-4 && *error < 0.5),
            "{heard:?}"
        );
    };
    let mut seq = [open(&plugin, &SMALL, 1, 1)];
    step(&plugin, &SMALL, &mut seq, 100);
    measured(1);
    // Rows that are decoded and packed later are few of all: they do not make the mean seem low.
    for _ in 0..64 {
        step(&plugin, &SMALL, &mut seq, 1);
    }
    measured(1);
    let fewer = policy(r#"{"quantize": {"k_bits": 2, "v_bits": 2, "residual": 16}}"#);
    plugin.retune(1, None, fewer).unwrap();
    step(&plugin, &SMALL, &mut seq, 1);
    measured(2);
    // Of a prompt of which nothing is packed, they are all that there is.
    let mut short = [open(&plugin, &SMALL, 2, 1)];
    step(&plugin, &SMALL, &mut short, 8);
    measured(2);
    for _ in 0..64 {
        step(&plugin, &SMALL, &mut short, 1);
    }
    assert!(plugin.request(2).unwrap().attention_error.is_some());
}

fn policy_unchecked(json: &str) -> Policy {
    serde_json::from_str(json).unwrap()
}

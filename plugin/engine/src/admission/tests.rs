//! The gate with a plugin that knows a model, and no engine behind it.

use cinch_hooks::{CachePolicy, LayerShape, SequenceInfo};

use super::*;
use crate::state::App;

/// A model of one layer, and sequences that hold nothing: sizes are what they may come to.
fn app(overrides: &[&str]) -> Arc<App> {
    let app = crate::serve::tests_app(overrides);
    let shape = LayerShape {
        kv_heads: 1,
        k_dim: 64,
        v_dim: 64,
    };
    let info = SequenceInfo {
        request: 1_000_000,
        sequence: 0,
        choice: 0,
        prompt_tokens: 1,
        context: 8192,
        layers: vec![shape; 4],
        dtype: candle_core::DType::F32,
        device: candle_core::Device::Cpu,
    };
    let plugin = app.kv.plugin_for_tests();
    drop(plugin.open(&info).unwrap());
    app
}

fn demand(class: &str, tokens: usize) -> Demand {
    Demand {
        class: class.into(),
        own: None,
        prompt_tokens: tokens,
        new_tokens: 10,
        choices: 1,
    }
}

fn choice(app: &App, level: u32) -> Choice {
    Choice {
        level: Some(level),
        policy: app.classes.ladder().levels[level as usize].policy.clone(),
    }
}

/// Sends a request to the gate; it is in the queue, or through, when this returns.
async fn arrive(
    app: &Arc<App>,
    id: usize,
    demand: Demand,
) -> tokio::task::JoinHandle<Result<Place, Refusal>> {
    let gate = app.admission.clone();
    let task = tokio::spawn(async move { gate.enter(id, demand).await });
    while !task.is_finished() && app.kv.request(id).is_err() {
        tokio::task::yield_now().await;
    }
    tokio::time::sleep(Duration::from_millis(5)).await;
    task
}

/// Capacity for two requests of 1,000 tokens at level 0, of 1,024 bytes each and a little more.
const TWO: &[&str] = &["kv.capacity_bytes=2800000"];

#[tokio::test]
async fn who_does_not_fit_waits_in_order_with_the_class_policy_of_its_turn() {
    let app = app(TWO);
    let one = arrive(&app, 1, demand("default", 1000))
        .await
        .await
        .unwrap()
        .unwrap();
    let two = arrive(&app, 2, demand("default", 1000))
        .await
        .await
        .unwrap()
        .unwrap();
    let three = arrive(&app, 3, demand("default", 1000)).await;
    let four = arrive(&app, 4, demand("default", 10)).await;
    assert!(
        !three.is_finished() && !four.is_finished(),
        "the small one does not overtake"
    );
    let view = app.kv.request(3).unwrap();
    assert_eq!(view.state, cinch_protocol::RequestState::Queued);
    assert_eq!((view.prompt_tokens, view.level, view.own), (1000, Some(0), false));
    assert!(app.admission.reserved_bytes() <= 2_800_000);
    // A tightened class: the next ones fit, once somebody looks.
    let change = serde_json::from_value(serde_json::json!({"level": 3})).unwrap();
    let change = app.classes.change(&change).unwrap();
    app.classes.put("default", change, None, false).unwrap();
    drop(one);
    let three = three.await.unwrap().unwrap();
    let four = four.await.unwrap().unwrap();
    assert_eq!(app.kv.request(3).unwrap().level, Some(3));
    assert_eq!(
        app.kv.request(2).unwrap().level,
        Some(0),
        "an admitted one keeps its own"
    );
    drop((two, three, four));
    assert_eq!(app.admission.reserved_bytes(), 0);
}

#[tokio::test]
async fn a_retune_makes_room_and_one_that_takes_too_much_is_refused() {
    let app = app(TWO);
    let _one = arrive(&app, 1, demand("default", 1000))
        .await
        .await
        .unwrap()
        .unwrap();
    let _two = arrive(&app, 2, demand("default", 1000))
        .await
        .await
        .unwrap()
        .unwrap();
    let three = arrive(&app, 3, demand("default", 400)).await;
    let tight = choice(&app, 3);
    app.admission.retuned(1, &tight, "level").unwrap();
    app.kv.tighten(1, tight).unwrap();
    app.admission.pump();
    let _three = three.await.unwrap().unwrap();
    let refusal = app.admission.retuned(1, &choice(&app, 0), "ratio").unwrap_err();
    assert_eq!(refusal.0.kind, "urn:cinch:problem:no-room");
    assert_eq!(refusal.0.field.as_deref(), Some("ratio"), "as it was given");
    assert!(app.admission.reserved_bytes() <= 2_800_000);
}

#[tokio::test]
async fn a_request_retuned_in_the_queue_and_one_with_its_own_level_keep_theirs() {
    let app = app(TWO);
    let one = arrive(&app, 1, demand("default", 2000))
        .await
        .await
        .unwrap()
        .unwrap();
    let patched = arrive(&app, 2, demand("default", 1500)).await;
    let own = Demand {
        own: Some(choice(&app, 1)),
        ..demand("default", 500)
    };
    let own = arrive(&app, 3, own).await;
    app.admission.retuned(2, &choice(&app, 5), "level").unwrap();
    app.kv.tighten(2, choice(&app, 5)).unwrap();
    drop(one);
    let (_patched, _own) = (patched.await.unwrap().unwrap(), own.await.unwrap().unwrap());
    assert_eq!(app.kv.request(2).unwrap().level, Some(5));
    let view = app.kv.request(3).unwrap();
    assert_eq!((view.level, view.own), (Some(1), true));
}

#[tokio::test]
async fn a_full_queue_answers_with_the_numbers() {
    let app = app(&["kv.capacity_bytes=2800000", "admission.max_queue=1"]);
    let _one = arrive(&app, 1, demand("default", 2000))
        .await
        .await
        .unwrap()
        .unwrap();
    let waiting = arrive(&app, 2, demand("default", 1000)).await;
    let refusal = arrive(&app, 3, demand("default", 1000))
        .await
        .await
        .unwrap()
        .err()
        .unwrap();
    assert_eq!(
        (refusal.0.status, refusal.0.kind.as_str()),
        (503, "urn:cinch:problem:overloaded")
    );
    let numbers = refusal.0.overload.clone().unwrap();
    assert_eq!(
        (numbers.queue_length, numbers.max_queue, numbers.capacity_bytes),
        (1, 1, 2_800_000)
    );
    assert!(numbers.demanded_bytes > numbers.capacity_bytes && numbers.need_bytes > 1_000_000);
    assert!(numbers.retry_after_seconds >= 1);
    assert_eq!(
        crate::metrics::Outcome::of(&refusal),
        crate::metrics::Outcome::Overloaded
    );
    // A client that leaves the queue frees its place.
    waiting.abort();
    assert!(waiting.await.is_err());
    assert!(!app.admission.has_queue());
}

#[tokio::test]
async fn a_wait_has_an_end_and_so_has_the_server() {
    let app = app(&["kv.capacity_bytes=2800000", "admission.max_wait_seconds=1"]);
    let one = arrive(&app, 1, demand("default", 2000))
        .await
        .await
        .unwrap()
        .unwrap();
    let late = arrive(&app, 2, demand("default", 1000)).await;
    let refusal = late.await.unwrap().err().unwrap();
    assert!(refusal.0.overload.is_some() && refusal.0.detail.contains("no room came up in 1 s"));
    let waiting = arrive(&app, 3, demand("default", 1000)).await;
    app.admission.stop();
    let refusal = waiting.await.unwrap().err().unwrap();
    assert_eq!(refusal.0.kind, "urn:cinch:problem:not-ready");
    let refused = arrive(&app, 4, demand("default", 10)).await.await.unwrap();
    assert_eq!(refused.err().unwrap().0.kind, "urn:cinch:problem:not-ready");
    drop(one);
    assert_eq!(app.admission.reserved_bytes(), 0);
}

#[tokio::test]
async fn what_can_never_fit_is_said_and_what_fits_tighter_waits() {
    let app = app(TWO);
    let refusal = arrive(&app, 1, demand("default", 100_000))
        .await
        .await
        .unwrap()
        .err()
        .unwrap();
    assert_eq!(
        (refusal.0.status, refusal.0.field.as_deref()),
        (413, Some("max_tokens"))
    );
    assert!(
        refusal
            .0
            .allowed
            .as_deref()
            .unwrap()
            .contains("2800000 bytes (kv.capacity_bytes)")
    );
    let own = Demand {
        own: Some(choice(&app, 0)),
        ..demand("default", 5000)
    };
    let refusal = arrive(&app, 2, own).await.await.unwrap().err().unwrap();
    assert_eq!(
        refusal.0.status, 413,
        "its own level is not tightened behind its back"
    );
    let many = Demand {
        choices: 40,
        ..demand("default", 1000)
    };
    assert_eq!(
        arrive(&app, 3, many).await.await.unwrap().err().unwrap().0.status,
        413
    );
    let waits = arrive(&app, 4, demand("default", 5000)).await;
    assert!(app.admission.has_queue() && !waits.is_finished());
    let change = serde_json::from_value(serde_json::json!({"level": 5})).unwrap();
    let change = app.classes.change(&change).unwrap();
    app.classes.put("default", change, None, false).unwrap();
    app.admission.pump();
    assert!(waits.await.unwrap().is_ok());
}

/// Half of 1,000 tokens stays; until their prompt has been read twice, all of them and 2,048 of a part are held, of 1,024 bytes each.
#[tokio::test]
async fn a_prompt_that_is_read_twice_is_counted_with_its_second_reading() {
    let need = |capacity: u64, method: &str| {
        let app = app(&[&format!("kv.capacity_bytes={capacity}")]);
        let policy = format!(r#"{{"select": {{"method": "{method}", "budget": 0.5}}}}"#);
        let demand = Demand {
            own: Some(Choice {
                level: None,
                policy: serde_json::from_str(&policy).unwrap(),
            }),
            ..demand("default", 1000)
        };
        async move {
            let place = arrive(&app, 1, demand).await.await.unwrap()?;
            let reserved = app.admission.reserved_bytes();
            drop(place);
            Ok::<_, Refusal>(reserved)
        }
    };
    assert!(need(2_800_000, "snapkv").await.is_ok());
    let refusal = need(2_800_000, "kvzip").await.unwrap_err();
    assert_eq!(refusal.0.status, 413, "{}", refusal.0.detail);
    let reserved = need(8_000_000, "kvzip").await.unwrap();
    assert!((3_048 * 1024..5_000_000).contains(&reserved), "{reserved}");
}

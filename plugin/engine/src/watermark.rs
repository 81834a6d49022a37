//! The last line: when measured bytes come near the capacity, running requests are tightened, whether or not a
//! controller is there. It never loosens, and it only retunes.
//!
//! [`plan`] is a pure function of what runs. Admission keeps what is promised within the capacity; this keeps room
//! for what admission can't foresee.

use cinch_protocol::{Ladder, Policy, RequestState, RequestView};

use crate::config::Watermark;

/// One request, one or more levels tighter.
#[derive(Debug, Clone, PartialEq)]
pub struct Tightening {
    /// The request.
    pub id: usize,
    /// From where.
    pub from: u32,
    /// To where.
    pub to: u32,
    /// Its client had asked for the level it loses.
    pub own: bool,
}

/// What to do now.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Plan {
    /// Whether the watermark is in force: from over `high` until under `low`.
    pub active: bool,
    /// Who is tightened.
    pub tighten: Vec<Tightening>,
    /// Whether even that does not come under `low`.
    pub short: bool,
}

struct Candidate<'a> {
    view: &'a RequestView,
    from: u32,
    to: u32,
    bytes: u64,
}

/// Decides. `size` says what a request comes to under a policy once it is taken up.
#[must_use]
pub fn plan(
    settings: &Watermark,
    capacity: u64,
    requests: &[RequestView],
    ladder: &Ladder,
    was_active: bool,
    size: impl Fn(&RequestView, &Policy) -> u64,
) -> Plan {
    let live: u64 = requests.iter().map(|view| view.bytes).sum();
    let (high, low) = (settings.high * capacity as f64, settings.low * capacity as f64);
    let over = live as f64 > high;
    let active = over || was_active && live as f64 >= low;
    if !settings.enabled || !over {
        return Plan {
            active: settings.enabled && active,
            ..Plan::default()
        };
    }
    // What was told to tighten counts as what it comes to: it is taken up layer by layer.
    let settled = |view: &RequestView| match view.applied {
        true => view.bytes,
        false => size(view, &view.policy).min(view.bytes),
    };
    let mut total: u64 = requests.iter().map(settled).sum();
    let last = ladder.levels.len() as u32 - 1;
    let mut candidates: Vec<Candidate<'_>> = requests
        .iter()
        .filter(|view| view.state == RequestState::Running)
        .filter_map(|view| {
            let from = view.level?;
            Some(Candidate {
                view,
                from,
                to: from,
                bytes: settled(view),
            })
        })
        .collect();
    // Those who asked for their level come last.
    for own in [false, true] {
        while total as f64 >= low {
            let next = candidates
                .iter_mut()
                .filter(|one| one.view.own == own && one.to < last)
                .max_by_key(|one| (one.bytes, std::cmp::Reverse(one.view.id)));
            let Some(one) = next else {
                break;
            };
            one.to += 1;
            let policy = &ladder.levels[one.to as usize].policy;
            let bytes = size(one.view, policy).min(one.bytes);
            total -= one.bytes - bytes;
            one.bytes = bytes;
        }
    }
    Plan {
        active,
        tighten: candidates
            .iter()
            .filter(|one| one.to > one.from)
            .map(|one| Tightening {
                id: one.view.id as usize,
                from: one.from,
                to: one.to,
                own: one.view.own,
            })
            .collect(),
        short: total as f64 >= low,
    }
}

#[cfg(test)]
mod tests {
    use cinch_protocol::LadderLevel;

    use super::*;

    const SETTINGS: Watermark = Watermark {
        enabled: true,
        high: 0.95,
        low: 0.85,
    };

    /// Each level halves; the budget of its policy names it.
    fn ladder() -> Ladder {
        let level = |level: u32| LadderLevel {
            level,
            name: level.to_string(),
            policy: policy(level),
            bytes_ratio: 0.5_f64.powi(level as i32),
            figures: None,
        };
        Ladder {
            model: "m".into(),
            fingerprint: None,
            measured: "2026-01-01".into(),
            levels: (0..4).map(level).collect(),
        }
    }

    fn policy(level: u32) -> Policy {
        let select = serde_json::json!({"select": {"method": "h2o", "budget": 0.5_f64.powi(level as i32)}});
        serde_json::from_value(select).unwrap()
    }

    fn size(view: &RequestView, policy: &Policy) -> u64 {
        (view.uncompressed_bytes as f64 * policy.select.as_ref().unwrap().budget) as u64
    }

    fn view(id: u64, level: u32, uncompressed: u64) -> RequestView {
        RequestView {
            id,
            state: RequestState::Running,
            class: "default".into(),
            own: false,
            level: Some(level),
            policy: policy(level),
            sequences: 1,
            prompt_tokens: 1,
            seen: 1,
            kept: 1.0,
            bytes: uncompressed >> level,
            uncompressed_bytes: uncompressed,
            attention_error: None,
            applied: true,
            served: Vec::new(),
        }
    }

    fn decide(requests: &[RequestView], was_active: bool) -> Plan {
        plan(&SETTINGS, 1000, requests, &ladder(), was_active, size)
    }

    fn moves(plan: &Plan) -> Vec<(usize, u32, u32)> {
        plan.tighten.iter().map(|t| (t.id, t.from, t.to)).collect()
    }

    #[test]
    fn under_the_high_mark_nothing_is_done() {
        assert_eq!(decide(&[view(1, 0, 950)], false), Plan::default());
        let between = decide(&[view(1, 0, 900)], true);
        assert_eq!(
            (between.active, moves(&between)),
            (true, vec![]),
            "until under the low one"
        );
        assert!(!decide(&[view(1, 0, 849)], true).active);
    }

    #[test]
    fn the_largest_goes_first_one_level_at_a_time() {
        let plan = decide(&[view(1, 0, 300), view(2, 0, 600), view(3, 1, 180)], false);
        assert_eq!(moves(&plan), [(2, 0, 1)]);
        assert!(plan.active && !plan.short);
        let plan = decide(&[view(1, 0, 1000), view(2, 0, 900)], false);
        assert_eq!(
            moves(&plan),
            [(1, 0, 2), (2, 0, 1)],
            "500 and 450 are still too much"
        );
    }

    #[test]
    fn who_asked_for_a_level_comes_last_and_other_policies_never() {
        let own = RequestView {
            own: true,
            ..view(1, 0, 900)
        };
        let plan = decide(&[own.clone(), view(2, 0, 200)], false);
        assert_eq!(moves(&plan), [(1, 0, 1), (2, 0, 3)]);
        assert!(plan.tighten.iter().all(|t| t.own == (t.id == 1)));
        let plan = decide(&[RequestView { bytes: 700, ..own }, view(2, 0, 400)], false);
        assert_eq!(moves(&plan), [(2, 0, 2)], "enough without it");
        let spelled = RequestView {
            level: None,
            ..view(1, 0, 980)
        };
        let plan = decide(&[spelled, view(2, 3, 8)], false);
        assert_eq!((moves(&plan), plan.short), (vec![], true));
    }

    #[test]
    fn what_was_told_and_has_not_happened_yet_counts() {
        let told = RequestView {
            applied: false,
            bytes: 980,
            ..view(1, 2, 980)
        };
        let plan = decide(&[told], false);
        assert_eq!((plan.active, moves(&plan)), (true, vec![]));
    }

    #[test]
    fn queued_and_switched_off() {
        let queued = RequestView {
            state: RequestState::Queued,
            ..view(1, 0, 980)
        };
        assert_eq!(moves(&decide(&[queued], false)), []);
        let off = Watermark {
            enabled: false,
            ..SETTINGS
        };
        assert_eq!(
            plan(&off, 1000, &[view(1, 0, 980)], &ladder(), true, size),
            Plan::default()
        );
    }
}

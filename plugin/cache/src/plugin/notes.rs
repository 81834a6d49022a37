//! What a retune says of itself: what stays as it was, and what a method begins with in the middle of a request.

use cinch_protocol::{Bits, Policy, Quantize, SelectMethod, Store};

use crate::registry::RequestSnapshot;

/// What a retune can't undo and where its statistics come from.
pub(super) fn notes(before: &RequestSnapshot, policy: &Policy) -> Vec<String> {
    let mut notes = Vec::new();
    if before.seen == 0 {
        return notes;
    }
    let bits = |policy: &Policy| {
        let store = if policy.store == Store::Exact { 32 } else { 16 };
        let of = |bits: Bits| if bits == Bits::B16 { store } else { u32::from(bits) };
        policy
            .quantize
            .as_ref()
            .map_or((store, store), |q| (of(q.k_bits), of(q.v_bits)))
    };
    let (old, new) = (bits(&before.policy), bits(policy));
    if new.0 > old.0 || new.1 > old.1 {
        notes.push(format!(
            "bits: tokens already packed stay at k{} v{}; more bits apply to what comes next",
            old.0.min(new.0),
            old.1.min(new.1)
        ));
    }
    let grouped = |policy: &Policy| policy.quantize.as_ref().map(|q| q.method);
    if grouped(&before.policy) != grouped(policy) && new.0 >= old.0 && old.0 < 16 {
        notes.push("method: keys already packed stay in the groups they are in".to_owned());
    }
    if before.policy.project.is_some() && before.policy.project != policy.project {
        notes.push("project: rows already projected, and the bases that they are in, stay".to_owned());
    }
    let rotates = |policy: &Policy| policy.quantize.as_ref().is_some_and(|q| q.rotate_k);
    if rotates(&before.policy) != rotates(policy) && new.0 >= old.0 && old.0 < 16 {
        notes.push("rotate_k: keys already packed stay in the basis they are in".to_owned());
    }
    let before_rope = |policy: &Policy| policy.quantize.as_ref().is_some_and(Quantize::before_rope);
    if before_rope(&before.policy) != before_rope(policy) && new.0 >= old.0 && old.0 < 16 {
        notes.push(
            "rope: keys already packed stay on the side of their rotary embedding that they are on"
                .to_owned(),
        );
    }
    if (before.kept as usize) < before.seen {
        notes.push(format!(
            "budget: {} of {} tokens seen are evicted on average over layers and heads and do not come back",
            before.seen - before.kept.round() as usize,
            before.seen
        ));
    }
    let method = |policy: &Policy| policy.select.as_ref().map(|select| select.method);
    if let Some(to) = method(policy)
        && !before
            .served
            .iter()
            .any(|served| method(&served.policy) == Some(to))
    {
        let from = before.served.last().and_then(|served| method(&served.policy));
        notes.extend(beginning(to, from, in_prompt(before)).map(|how| format!("statistics: {how}")));
    }
    notes
}

/// Whether some of a request's prompts are not processed yet.
pub(super) fn in_prompt(request: &RequestSnapshot) -> bool {
    request.seen < request.prompt_tokens * request.sequences.max(1)
}

/// How a method that a request was not served with so far comes by its statistics, in the middle of its prompt or behind it;
/// `None`: it needs none of before.
fn beginning(method: SelectMethod, from: Option<SelectMethod>, in_prompt: bool) -> Option<&'static str> {
    let sums = matches!(method, SelectMethod::H2o | SelectMethod::Keyformer);
    match method {
        _ if sums && from == Some(SelectMethod::Kvzip) => Some(
            "every head starts from the largest weights that its rows received, which count as the sums of all queries so far",
        ),
        SelectMethod::Kvzip if in_prompt => Some(
            "the prompt is read once more if its last part has not begun; if it has, rows rank by attention received so far, \
             the most attended row of a head having all of a query's, and by the largest weight that decoded tokens give",
        ),
        SelectMethod::Kvzip => Some(
            "the prompt is not read once more, since tokens were decoded behind it: rows rank by attention received so far, \
             the most attended row of a head having all of a query's, and by the largest weight that decoded tokens give",
        ),
        SelectMethod::H2o | SelectMethod::Keyformer => Some(
            "every head starts from a sample, its own or its layer's mean: attention of the last 64 queries of each part \
             of the prompt and of some decoded tokens; what the method counts is accumulated from now on",
        ),
        SelectMethod::Snapkv | SelectMethod::Scissorhands => Some(
            "every head starts from attention received so far, its own or its layer's mean, which counts as one window \
             of queries and fades as others come",
        ),
        SelectMethod::Fastgen => Some(
            "every head is profiled by attention received so far, its own or its layer's mean, not by that of the prompt's \
             last queries",
        ),
        SelectMethod::ExpectedAttention => Some(
            "rows rank by attention received until the queries of 16 tokens, or every eighth of decoded ones, are known",
        ),
        SelectMethod::Streaming
        | SelectMethod::Tova
        | SelectMethod::KeyNorm
        | SelectMethod::Keydiff
        | SelectMethod::Quest
        | SelectMethod::Lagkv => None,
    }
}

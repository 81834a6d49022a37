//! Which bits each part of a cache gets: the choice a part whose damages add up to least within a budget of bytes.
//!
//! A multiple-choice knapsack. Part after part, the pairs of bytes and damage that no other beats in both are listed, as
//! Nemhauser and Ullmann do (Discrete dynamic programming and capital allocation, Management Science 15, 1969): exact as long
//! as no more than [`MOST`] of them are left, near it beyond.

/// Most pairs that are kept of a part.
const MOST: usize = 1 << 14;

/// What a part may get.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Choice {
    /// What it takes.
    pub(super) bytes: u64,
    /// What it costs in quality, in any unit, as long as it is one; finite.
    pub(super) damage: f64,
}

/// The parts so far.
#[derive(Debug, Clone, Copy)]
struct State {
    bytes: u64,
    damage: f64,
    /// Its place among the states of the part before.
    before: usize,
    choice: usize,
}

/// The index of a choice a part; `None` where even the smallest ones take more than `budget`.
pub(super) fn allocate(parts: &[Vec<Choice>], budget: u64) -> Option<Vec<usize>> {
    // What the parts after each take at least.
    let mut least = vec![0; parts.len()];
    let mut rest = 0_u64;
    for (part, least) in parts.iter().zip(&mut least).rev() {
        *least = rest;
        rest = rest.saturating_add(part.iter().map(|choice| choice.bytes).min()?);
    }
    let mut stages: Vec<Vec<State>> = Vec::new();
    let none = State {
        bytes: 0,
        damage: 0.0,
        before: 0,
        choice: 0,
    };
    let mut states = vec![none];
    for (part, least) in parts.iter().zip(least) {
        let mut next = Vec::with_capacity(states.len() * part.len());
        for (before, state) in states.iter().enumerate() {
            for (choice, of) in part.iter().enumerate() {
                let bytes = state.bytes.saturating_add(of.bytes);
                if bytes.saturating_add(least) <= budget {
                    next.push(State {
                        bytes,
                        damage: state.damage + of.damage,
                        before,
                        choice,
                    });
                }
            }
        }
        prune(&mut next);
        stages.push(std::mem::replace(&mut states, next));
    }
    // Most bytes come last, with the least damage.
    let mut at = *states.last()?;
    let mut chosen = Vec::with_capacity(parts.len());
    for stage in stages.iter().rev() {
        chosen.push(at.choice);
        at = *stage.get(at.before)?;
    }
    chosen.reverse();
    Some(chosen)
}

/// Leaves the states that no other beats, fewest bytes first.
fn prune(states: &mut Vec<State>) {
    states.sort_by(|a, b| a.bytes.cmp(&b.bytes).then(a.damage.total_cmp(&b.damage)));
    let mut least = f64::INFINITY;
    states.retain(|state| {
        let better = state.damage < least;
        least = least.min(state.damage);
        better
    });
    let (Some(first), Some(last)) = (states.first(), states.last()) else {
        return;
    };
    if states.len() <= MOST {
        return;
    }
    // Of each stretch of bytes the state of least damage; and the one of fewest bytes, which always leads to an end.
    let (from, width) = (first.bytes, (last.bytes - first.bytes) / MOST as u64 + 1);
    let stretch = |state: &State| (state.bytes - from) / width;
    let mut thinned: Vec<State> = Vec::with_capacity(MOST + 1);
    for (i, state) in states.iter().enumerate() {
        match thinned.last_mut() {
            Some(last) if i > 1 && stretch(last) == stretch(state) => *last = *state,
            _ => thinned.push(*state),
        }
    }
    *states = thinned;
}

#[cfg(test)]
mod tests {
    use super::super::super::random::Random;
    use super::*;

    fn sums(parts: &[Vec<Choice>], chosen: &[usize]) -> (u64, f64) {
        let of = || parts.iter().zip(chosen).map(|(part, choice)| part[*choice]);
        (
            of().map(|choice| choice.bytes).sum(),
            of().map(|choice| choice.damage).sum(),
        )
    }

    /// The least damage of all combinations.
    fn brute_force(parts: &[Vec<Choice>], budget: u64) -> Option<f64> {
        let mut all: Vec<Vec<usize>> = vec![Vec::new()];
        for part in parts {
            let longer = |chosen: Vec<usize>| {
                (0..part.len()).map(move |choice| [chosen.as_slice(), &[choice]].concat())
            };
            all = all.into_iter().flat_map(longer).collect();
        }
        all.iter()
            .map(|chosen| sums(parts, chosen))
            .filter(|(bytes, _)| *bytes <= budget)
            .map(|(_, damage)| damage)
            .min_by(f64::total_cmp)
    }

    #[test]
    fn as_good_as_all_combinations() {
        let mut random = Random::new(5);
        let mut impossible = 0;
        for _ in 0..300 {
            let parts: Vec<Vec<Choice>> = (0..1 + random.below(6))
                .map(|_| {
                    (0..1 + random.below(4))
                        .map(|_| Choice {
                            bytes: random.below(40) as u64,
                            damage: random.below(1000) as f64 / 8.0,
                        })
                        .collect()
                })
                .collect();
            let budget = random.below(160) as u64;
            match (allocate(&parts, budget), brute_force(&parts, budget)) {
                (Some(chosen), Some(least)) => {
                    let (bytes, damage) = sums(&parts, &chosen);
                    assert_eq!(chosen.len(), parts.len());
                    assert!(bytes <= budget, "{bytes} {budget}");
                    // Eighths add up exactly.
                    assert_eq!(damage, least, "{parts:?} {budget}");
                }
                (None, None) => impossible += 1,
                other => panic!("{other:?}: {parts:?} {budget}"),
            }
        }
        assert!((1..200).contains(&impossible), "{impossible}");
    }

    /// A model of 40 layers whose parts all have sizes of their own: too many states to keep, but as good as what can be
    /// shown to be out of reach of any choice (the bound by Lagrange's multiplier) to half a hundredth.
    #[test]
    fn many_parts_of_different_sizes() {
        let mut random = Random::new(6);
        let parts: Vec<Vec<Choice>> = (0..80)
            .map(|_| {
                let (size, weight) = (1000 + random.below(100_000), 1.0 + random.below(1000) as f64);
                [2_u32, 3, 4, 8]
                    .map(|bits| Choice {
                        bytes: size as u64 * u64::from(bits),
                        damage: weight / (f64::from(bits).exp2() - 1.0).powi(2),
                    })
                    .to_vec()
            })
            .collect();
        let all = |choice: usize| parts.iter().map(|part| part[choice].bytes).sum::<u64>();
        let budget = all(1);
        let chosen = allocate(&parts, budget).unwrap();
        let (bytes, damage) = sums(&parts, &chosen);
        assert!(bytes <= budget);
        assert!(damage < sums(&parts, &[1; 80]).1);
        let bound = |price: f64| {
            let best = |part: &Vec<Choice>| {
                part.iter()
                    .map(|choice| choice.damage + price * choice.bytes as f64)
                    .min_by(f64::total_cmp)
                    .unwrap()
            };
            parts.iter().map(best).sum::<f64>() - price * budget as f64
        };
        let bound = (0..4000)
            .map(|i| bound(1e-9 * 1.005_f64.powi(i)))
            .max_by(f64::total_cmp)
            .unwrap();
        assert!(damage <= bound * 1.005, "{damage} {bound}");

        assert_eq!(allocate(&parts, all(0)), Some(vec![0; 80]), "it just fits");
        assert_eq!(allocate(&parts, all(0) - 1), None);
        assert_eq!(allocate(&parts, all(3)), Some(vec![3; 80]), "bits for all");
        assert_eq!(allocate(&[], 0), Some(Vec::new()));
        assert_eq!(allocate(&[Vec::new()], 9), None);
    }
}

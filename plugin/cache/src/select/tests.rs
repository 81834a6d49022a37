//! The worked example of docs/adding-a-method.md is a method like any other.

use super::worked_example::Vatp;
use super::{Budget, Method, Rows, keep};

const GUIDE: &str = include_str!("../../../../docs/adding-a-method.md");
const FILE: &str = include_str!("worked_example.rs");

#[test]
fn the_guide_shows_the_file_that_is_compiled() {
    let shown = format!("```rust\n{FILE}```\n");
    assert!(
        GUIDE.contains(&shown),
        "docs/adding-a-method.md differs from select/worked_example.rs"
    );
}

#[test]
fn the_worked_example_ranks_by_weight_and_value() {
    let (kept, seen) = (6, 6);
    let budget = Budget {
        total: 4,
        sinks: 1,
        recent: 1,
    };
    let edges = budget.edges(kept, seen, |position| position.min(kept));
    // Products: 8, 2, 6, 0, 3, 1; the first and the last row stay anyway.
    let rows = Rows {
        kept,
        seen,
        positions: None,
        edges,
        scores: &[4.0, 2.0, 3.0, 9.0, 1.0, 1.0],
        k: &[],
        k_dim: 1,
        v: &[1.0, -1.0, 0.5, 0.5, -2.0, 0.0, 0.0, 0.0, 1.5, -1.5, 1.0, 0.0],
        v_dim: 2,
        moments: None,
        scale: 1.0,
    };
    let ranks = Vatp.rank(&rows);
    assert_eq!(*ranks, [8.0, 2.0, 6.0, 0.0, 3.0, 1.0]);
    assert_eq!(keep(&ranks, kept, edges, budget.total), [0, 2, 4, 5]);
}

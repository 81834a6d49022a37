//! What becomes of evicted rows other than being dropped: they are merged into kept ones. One way a file. Invariant: which
//! rows stay, and how they rank, is the method's; a merge changes only what kept rows hold.

pub(crate) mod cam;
pub(crate) mod d2o;

/// Rows that others were merged into: their place among the kept ones, and what they became.
#[derive(Debug, Default)]
pub(crate) struct Merged {
    pub(crate) rows: Vec<usize>,
    /// Their keys; `None`: as they were.
    pub(crate) k: Option<Vec<f32>>,
    pub(crate) v: Vec<f32>,
}

/// The rows of `0..rows` that are not in `keep` (strictly increasing).
fn evicted(rows: usize, keep: &[u32]) -> impl Iterator<Item = usize> {
    let mut next = keep.iter().copied().peekable();
    (0..rows).filter(move |row| next.next_if(|kept| *kept as usize == *row).is_none())
}

//! A step's attention cut into pieces of about equal cost, so that a single long request keeps every thread
//! busy. Invariant: the pieces of a head follow one another and cover its range exactly once.

use std::ops::Range;

/// Prefill pieces a thread gets: enough that one which ends early takes over from another, few enough that what a
/// piece costs by itself (a tile of packed rows unpacked again) does not show.
const EACH: usize = 4;
/// Runs of decode pieces a thread gets, all of equal length: nine pieces alike would keep two threads busy for as long
/// as ten.
const RUNS: usize = 4;
/// Rows of a run of decode pieces at least.
const ROWS: usize = 256;
/// Queries of a prefill piece at least: every tile of past rows is unpacked once a piece.
const QUERIES: usize = 64;

/// One head's share of the work: stored rows when decoding, fresh queries in a prefill.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Piece {
    /// Batch row.
    pub(super) row: usize,
    /// KV head.
    pub(super) kv: usize,
    pub(super) from: usize,
    pub(super) to: usize,
}

/// Cuts the stored rows of heads (batch row, KV head, rows), laid end to end, into runs of equal length, one for a
/// thread to take at a time. A run is a range of `pieces`, which it cuts where heads end.
pub(super) fn decode(
    heads: impl Iterator<Item = (usize, usize, usize)> + Clone,
    threads: usize,
    pieces: &mut Vec<Piece>,
    runs: &mut Vec<Range<usize>>,
) {
    pieces.clear();
    runs.clear();
    let total: usize = heads.clone().map(|(_, _, rows)| rows).sum();
    let count = match threads {
        1 => 1,
        _ => (total / ROWS).clamp(1, threads * RUNS),
    };
    let (mut start, mut first) = (0, 0);
    for (row, kv, rows) in heads {
        let mut from = 0;
        while from < rows {
            let end = total * (runs.len() + 1) / count;
            let to = rows.min(end - start);
            pieces.push(Piece { row, kv, from, to });
            if start + to == end {
                runs.push(first..pieces.len());
                first = pieces.len();
            }
            from = to;
        }
        start += rows;
    }
}

/// Cuts `fresh` queries of each head (batch row, KV head, rows before the fresh ones).
pub(super) fn prefill(
    heads: impl Iterator<Item = (usize, usize, usize)> + Clone,
    fresh: usize,
    threads: usize,
) -> Vec<Piece> {
    // Query i attends to the past and to fresh rows 0 ..= i.
    let cost = |past: usize, query: usize| (past + 1) * query + query * query.saturating_sub(1) / 2;
    let total: usize = heads.clone().map(|(_, _, past)| cost(past, fresh)).sum();
    let most = if threads == 1 {
        usize::MAX
    } else {
        total.div_ceil(threads * EACH)
    };
    let mut pieces = Vec::new();
    for (row, kv, past) in heads {
        let whole = cost(past, fresh);
        let parts = whole.div_ceil(most).clamp(1, fresh.div_ceil(QUERIES));
        let mut from = 0;
        for part in 1..=parts {
            let goal = whole / parts * part;
            let to = if part == parts {
                fresh
            } else {
                (from..fresh)
                    .find(|&query| cost(past, query) >= goal)
                    .unwrap_or(fresh)
            };
            if to > from {
                pieces.push(Piece { row, kv, from, to });
            }
            from = to;
        }
    }
    pieces
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whether pieces cover each head's range once, in order.
    fn cover(pieces: &[Piece], heads: &[(usize, usize, usize)], length: impl Fn(usize) -> usize) {
        let mut left = pieces.iter();
        for &(row, kv, rows) in heads {
            let mut at = 0;
            while at < length(rows) {
                let piece = left.next().unwrap();
                assert_eq!((piece.row, piece.kv, piece.from), (row, kv, at));
                assert!(piece.to > piece.from);
                at = piece.to;
            }
            assert_eq!(at, length(rows));
        }
        assert_eq!(left.next(), None);
    }

    #[test]
    fn every_row_is_in_one_piece_and_every_piece_in_one_run() {
        let (mut pieces, mut runs) = (Vec::new(), Vec::new());
        for heads in [
            vec![(0, 0, 1)],
            vec![(0, 0, 8000), (0, 1, 8000), (0, 2, 8000)],
            vec![(0, 0, 300), (0, 1, 300), (1, 0, 5000), (1, 1, 4999)],
            (0..40).map(|row| (row, 0, 1 + row * row)).collect(),
        ] {
            for threads in [1, 2, 3, 16] {
                decode(heads.iter().copied(), threads, &mut pieces, &mut runs);
                cover(&pieces, &heads, |rows| rows);
                assert_eq!(runs.first().map(|run| run.start), Some(0));
                assert!(runs.windows(2).all(|two| two[0].end == two[1].start));
                assert_eq!(runs.last().map(|run| run.end), Some(pieces.len()));
                for fresh in [2, 65, 512] {
                    cover(&prefill(heads.iter().copied(), fresh, threads), &heads, |_| fresh);
                }
            }
        }
    }

    #[test]
    fn runs_are_of_equal_length() {
        let (mut pieces, mut runs) = (Vec::new(), Vec::new());
        let mut lengths = |heads: &[(usize, usize, usize)]| -> Vec<usize> {
            decode(heads.iter().copied(), 2, &mut pieces, &mut runs);
            let rows = |run: &Range<usize>| pieces[run.clone()].iter().map(|p| p.to - p.from).sum();
            runs.iter().map(rows).collect()
        };
        assert_eq!(
            lengths(&[(0, 0, 8000)]),
            [1000; 8],
            "one long head is work for all"
        );
        assert_eq!(lengths(&[(0, 0, 8000), (0, 1, 8000), (0, 2, 8000)]), [3000; 8]);
        assert_eq!(lengths(&[(0, 0, 200)]), [200], "not worth cutting");
        assert_eq!(lengths(&[(0, 0, 300), (1, 0, 301)]), [300, 301]);
    }

    #[test]
    fn prefill_pieces_cost_alike() {
        for past in [0, 100, 10_000] {
            let pieces = prefill([(0, 0, past)].into_iter(), 4096, 2);
            let costs: Vec<usize> = pieces
                .iter()
                .map(|piece| (piece.from..piece.to).map(|query| past + query + 1).sum())
                .collect();
            let (least, most) = (costs.iter().min().unwrap(), costs.iter().max().unwrap());
            assert!(most - least <= most / 10, "{costs:?}");
        }
    }
}

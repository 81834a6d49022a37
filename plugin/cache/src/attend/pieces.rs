//! A step's attention cut into pieces of about equal cost, so that a single long request keeps every thread
//! busy. Invariant: the pieces of a head follow one another and cover its range exactly once.

/// Prefill pieces a thread gets: enough that one which ends early takes over from another, few enough that what a
/// piece costs by itself (a tile of packed rows unpacked again) does not show.
const EACH: usize = 4;
/// Parts a long head of a decode step is cut into, for each thread: a request that is alone keeps all of them busy.
const PARTS: usize = 2;
/// Rows of such a part at least.
const ROWS: usize = 512;
/// Queries of a prefill piece at least: every tile of past rows is unpacked once a piece.
const QUERIES: usize = 64;

/// One head's share of the work: rows attended to when decoding, fresh queries in a prefill.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Piece {
    /// Batch row.
    pub(super) row: usize,
    /// KV head.
    pub(super) kv: usize,
    pub(super) from: usize,
    pub(super) to: usize,
}

/// Cuts the attended rows of heads (batch row, KV head, rows), each at least one, into `pieces`.
///
/// A head's cuts depend on its own rows only: a request is answered alike, to the last bit, whatever runs beside it.
pub(super) fn decode(
    heads: impl Iterator<Item = (usize, usize, usize)>,
    threads: usize,
    pieces: &mut Vec<Piece>,
) {
    pieces.clear();
    for (row, kv, rows) in heads {
        let parts = match threads {
            1 => 1,
            _ => (rows / ROWS).clamp(1, threads * PARTS),
        };
        pieces.extend((0..parts).map(|part| Piece {
            row,
            kv,
            from: rows * part / parts,
            to: rows * (part + 1) / parts,
        }));
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
    let count = heads.clone().count();
    let mut pieces = Vec::new();
    for (row, kv, past) in heads {
        let whole = cost(past, fresh);
        let least = whole.div_ceil(most);
        // Heads of one request are as many pieces each, and all of them as many for every thread: of nine, one of two threads
        // would do the last alone.
        let even = (least..).find(|parts| (count * parts).is_multiple_of(threads));
        let parts = even.unwrap_or(least).clamp(1, fresh.div_ceil(QUERIES));
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
    fn every_row_is_in_one_piece() {
        let mut pieces = Vec::new();
        for heads in [
            vec![(0, 0, 1)],
            vec![(0, 0, 8000), (0, 1, 8000), (0, 2, 8000)],
            vec![(0, 0, 300), (0, 1, 300), (1, 0, 5000), (1, 1, 4999)],
        ] {
            for threads in [1, 2, 3, 16] {
                decode(heads.iter().copied(), threads, &mut pieces);
                cover(&pieces, &heads, |rows| rows);
                for fresh in [2, 65, 512] {
                    cover(&prefill(heads.iter().copied(), fresh, threads), &heads, |_| fresh);
                }
            }
        }
    }

    #[test]
    fn long_heads_are_work_for_all_and_cut_alike_in_any_company() {
        let cut = |heads: &[(usize, usize, usize)]| {
            let mut pieces = Vec::new();
            decode(heads.iter().copied(), 2, &mut pieces);
            let of = |kv| pieces.iter().filter(move |piece| piece.kv == kv);
            of(0).map(|piece| piece.to - piece.from).collect::<Vec<_>>()
        };
        assert_eq!(cut(&[(0, 0, 8000)]), [2000; 4]);
        assert_eq!(cut(&[(0, 0, 1023)]), [1023], "not worth cutting");
        assert_eq!(cut(&[(0, 0, 8000), (0, 1, 17), (1, 2, 3000)]), [2000; 4]);
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

    #[test]
    fn every_thread_gets_as_many_prefill_pieces() {
        for (heads, threads, parts) in [(3, 2, 4), (4, 2, 2), (1, 2, 8), (5, 4, 4), (3, 8, 8)] {
            let pieces = prefill((0..heads).map(|kv| (0, kv, 4096)), 512, threads);
            assert_eq!(pieces.len(), heads * parts, "{heads} heads, {threads} threads");
            assert_eq!(pieces.len() % threads, 0);
        }
        // Too few queries for more.
        assert_eq!(prefill((0..3).map(|kv| (0, kv, 4096)), 64, 2).len(), 3);
    }
}

//! Elementwise work on candle's own threads. Each element is made by the same operations as before, so its bits are the same.
//!
//! A second pool, rayon's, costs a decode step two context switches a layer, on a thread that has nothing else to do, and its
//! workers fight with candle's for the cores, which spin for a while after each product.

use std::sync::{Mutex, PoisonError};

use candle_core::utils::barrier_pool;

/// Elements that are one piece of work: fewer are made faster than another thread wakes up.
const EACH: usize = 8192;

/// Element `i` is `f(i)`.
pub(crate) fn make<T: Copy + Default + Send>(len: usize, f: impl Fn(usize) -> T + Sync) -> Vec<T> {
    if len <= EACH {
        return (0..len).map(f).collect();
    }
    let mut out = vec![T::default(); len];
    let pieces: Vec<_> = out.chunks_mut(EACH).map(Mutex::new).collect();
    barrier_pool().execute_chunked(pieces.len(), |range| {
        for piece in range {
            let mut to = pieces[piece].lock().unwrap_or_else(PoisonError::into_inner);
            for (i, to) in to.iter_mut().enumerate() {
                *to = f(piece * EACH + i);
            }
        }
    });
    drop(pieces);
    out
}

//! Whether keys turn as the engine says. Of a prompt that is one token again and again, every layer's keys before their
//! rotary embedding are the same at all positions: values are alike, so any weights give the same output. Turned back, they
//! must be.

use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use crate::registry::lock;
use crate::rotary::Turns;
use crate::rotary::turns::{Positions, Way};

/// Of a key's length, what turned back keys may differ by. Activations of eight bits of mantissa and weights that round
/// activations leave hundredths; a wrong pairing or base leaves keys that differ by as much as they are long.
const TOLERANCE: f64 = 0.1;

/// No request.
const NONE: usize = usize::MAX;

/// A request under watch, and what its keys differ by.
#[derive(Debug)]
pub(crate) struct Check {
    request: AtomicUsize,
    /// The worst of each layer, of its keys' length.
    worst: Mutex<Vec<f64>>,
}

impl Default for Check {
    fn default() -> Self {
        Self {
            request: AtomicUsize::new(NONE),
            worst: Mutex::default(),
        }
    }
}

impl Check {
    pub(crate) fn begin(&self, request: usize) {
        lock(&self.worst).clear();
        self.request.store(request, Relaxed);
    }

    /// Ends it: the worst of each layer that was seen, in order.
    pub(crate) fn end(&self) -> Vec<f64> {
        self.request.store(NONE, Relaxed);
        std::mem::take(&mut *lock(&self.worst))
    }

    /// The request under watch.
    pub(crate) fn request(&self) -> Option<usize> {
        Some(self.request.load(Relaxed)).filter(|request| *request != NONE)
    }

    /// Compares a head's keys from position `seen` on, row by row, with the first of them.
    pub(crate) fn compare<'a>(
        &self,
        layer: usize,
        turns: &Turns,
        seen: usize,
        mut rows: impl Iterator<Item = &'a [f32]>,
    ) {
        let back = |row: &[f32], position: usize| {
            let mut key = row.to_vec();
            let dim = key.len();
            turns.turn(Way::Back, Positions::From(position), dim, &mut key);
            key
        };
        let Some(first) = rows.next().map(|row| back(row, seen)) else {
            return;
        };
        let length = |x: &mut dyn Iterator<Item = f64>| x.map(|x| x * x).sum::<f64>().sqrt();
        let own = length(&mut first.iter().map(|x| f64::from(*x)));
        let mut worst = 0.0_f64;
        for (at, row) in rows.enumerate() {
            let key = back(row, seen + 1 + at);
            let off = length(&mut key.iter().zip(&first).map(|(a, b)| f64::from(a - b)));
            worst = worst.max(if own > 0.0 { off / own } else { off });
        }
        let mut all = lock(&self.worst);
        if all.len() <= layer {
            all.resize(layer + 1, 0.0);
        }
        all[layer] = all[layer].max(worst);
    }
}

/// What a check found, of `layers` managed layers: the worst, or what speaks against the description.
pub(crate) fn verdict(worst: &[f64], layers: usize) -> Result<f64, String> {
    if worst.len() != layers {
        let seen = worst.len();
        return Err(format!("keys of {seen} layers of {layers} could be compared"));
    }
    match worst.iter().position(|off| *off > TOLERANCE) {
        Some(layer) => Err(format!(
            "keys of layer {layer} do not turn as its description says: turned back, the same token's differ by {:.3} of \
             their length, at most {TOLERANCE} is allowed",
            worst[layer]
        )),
        None => Ok(worst.iter().copied().fold(0.0, f64::max)),
    }
}

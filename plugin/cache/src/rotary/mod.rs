//! How a model's keys turn with their positions (`RoPE`, arXiv 2104.09864, section 3.2.2), so that they can be turned back.
//!
//! What the engine says of that is a claim about its code; [`check`] holds it against keys before anything relies on it.

mod check;
mod turns;

use std::sync::{Arc, PoisonError, RwLock};

use cinch_hooks::LayerShape;

pub(crate) use check::{Check, verdict};
pub(crate) use turns::{Positions, Turns, Way};

/// Which dimensions turn together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pairing {
    /// Dimension i with i + n, of the first 2 n dimensions (GPT-NeoX).
    Halves,
    /// Dimension 2 i with 2 i + 1 (GPT-J).
    Neighbours,
}

/// How keys of a layer turn: pair i by position times `frequencies[i]` radians. Dimensions past the last pair do not turn.
#[derive(Debug, Clone, PartialEq)]
pub struct Rotary {
    /// Radians a position, one a pair; empty: keys do not turn. Scalings that do not depend on the position (linear, Llama
    /// 3's) are in them.
    pub frequencies: Vec<f32>,
    /// Which dimensions are a pair.
    pub pairing: Pairing,
}

impl Rotary {
    /// The first `dims` dimensions turn, pair i by base^(−2i/dims).
    #[must_use]
    pub fn new(base: f64, dims: usize, pairing: Pairing) -> Self {
        let frequency = |pair: usize| base.powf(-2.0 * pair as f64 / dims as f64) as f32;
        Self {
            frequencies: (0..dims / 2).map(frequency).collect(),
            pairing,
        }
    }

    /// Keys that do not turn.
    #[must_use]
    pub fn none() -> Self {
        Self {
            frequencies: Vec::new(),
            pairing: Pairing::Halves,
        }
    }
}

/// How keys of a model's managed layers turn.
#[derive(Debug, Clone, PartialEq)]
pub enum RotaryLayers {
    /// That is not known, for this reason.
    Unknown(String),
    /// All layers alike.
    Alike(Rotary),
    /// One a layer.
    Each(Vec<Rotary>),
}

/// The same, ready to be applied.
#[derive(Debug)]
enum Known {
    Unknown(String),
    Alike(Arc<Turns>),
    Each(Vec<Arc<Turns>>),
}

/// What the plugin knows of it.
#[derive(Debug)]
pub(crate) struct Rotaries(RwLock<Known>);

impl Default for Rotaries {
    fn default() -> Self {
        let reason = "the engine has not said how this model's keys turn with their positions";
        Self(RwLock::new(Known::Unknown(reason.to_owned())))
    }
}

impl Rotaries {
    pub(crate) fn set(&self, layers: RotaryLayers) {
        let known = match layers {
            RotaryLayers::Unknown(reason) => Known::Unknown(reason),
            RotaryLayers::Alike(rotary) => Known::Alike(Arc::new(Turns::new(rotary))),
            RotaryLayers::Each(layers) => {
                // Most layers are like another one: they share its tables.
                let mut turns: Vec<Arc<Turns>> = Vec::new();
                for rotary in layers {
                    let same = turns.iter().find(|turns| *turns.rotary() == rotary).cloned();
                    turns.push(same.unwrap_or_else(|| Arc::new(Turns::new(rotary))));
                }
                Known::Each(turns)
            }
        };
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = known;
    }

    /// How keys of a layer turn.
    ///
    /// # Errors
    /// Why that is not known.
    pub(crate) fn of(&self, layer: usize, layers: &[LayerShape]) -> Result<Arc<Turns>, String> {
        let turns = match &*self.0.read().unwrap_or_else(PoisonError::into_inner) {
            Known::Unknown(reason) => return Err(reason.clone()),
            Known::Alike(turns) => turns.clone(),
            Known::Each(turns) if turns.len() == layers.len() => turns[layer].clone(),
            Known::Each(turns) => {
                let (described, managed) = (turns.len(), layers.len());
                return Err(format!("{described} layers are described, {managed} are managed"));
            }
        };
        let (rotated, dim) = (2 * turns.rotary().frequencies.len(), layers[layer].k_dim);
        if rotated > dim {
            return Err(format!("{rotated} dimensions are said to turn, keys have {dim}"));
        }
        if turns.rotary().frequencies.iter().any(|x| !x.is_finite()) {
            return Err("a rotary frequency is not finite".to_owned());
        }
        Ok(turns)
    }
}

//! Draws that are functions of what they are for: nothing is stored, and a fork draws the same.

/// What all draws of one head begin with.
pub(super) fn of_head(seed: u32, layer: usize, kv: usize) -> u64 {
    mix(u64::from(seed) ^ mix(layer as u64) ^ mix(!(kv as u64)))
}

/// The finalizer of splitmix64 (Steele, Lea and Flood, OOPSLA 2014): a bijection that scatters neighbours.
pub(super) fn mix(x: u64) -> u64 {
    let x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// A uniform variate that is neither 0 nor 1.
pub(super) fn uniform(bits: u64) -> f32 {
    ((bits >> 41) as f32 + 0.5) / (1_u32 << 23) as f32
}

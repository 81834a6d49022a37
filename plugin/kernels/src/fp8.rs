//! Values of eight bits: FP8 E4M3 (Micikevicius et al., arXiv 2209.05433, section 3). A sign, four bits of exponent (bias
//! 7), three of mantissa; no infinities. As in the OCP format and in GPU engines that store their cache so, unscaled.

/// The largest magnitude.
pub(crate) const MAX: f32 = 448.0;

/// What a code's bits as an f16 are short of: the difference of the biases, 15 and 7.
pub(crate) const SCALE: f32 = 256.0;

/// The nearest code of a finite value, ties to even; magnitudes beyond [`MAX`] saturate.
#[inline(always)]
pub(crate) fn encode(x: f32) -> u8 {
    let sign = (x.to_bits() >> 24) as u8 & 0x80;
    let x = x.abs().min(MAX);
    // Below the smallest normal value, 2⁻⁶, steps are of 2⁻⁹.
    let small = (x * 512.0 + 8_388_608.0).to_bits() as u8;
    // Else the mantissa's 23 bits are rounded to 3, which may carry into the exponent; its bias was 127.
    let bits = x.to_bits();
    let rounded = bits + 0x7_ffff + ((bits >> 20) & 1);
    let normal = ((rounded >> 20).wrapping_sub(120 << 3)) as u8;
    sign | if x < 0.015_625 { small } else { normal }
}

/// A code's bits as an f16, which times [`SCALE`] is its value.
#[inline(always)]
pub(crate) fn half(code: u8) -> [u8; 2] {
    let code = u16::from(code);
    ((code & 0x80) << 8 | (code & 0x7f) << 7).to_le_bytes()
}

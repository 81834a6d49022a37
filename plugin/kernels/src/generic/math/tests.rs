use super::*;
use crate::Kernels;
use crate::portable::Portable;

/// Runs a check on every vector implementation that this CPU has.
fn each(check: impl Fn(&str, &dyn Fn(f32) -> f32, &dyn Fn(&Heads, f32) -> f32)) {
    fn pass(
        s: impl Simd,
        name: &str,
        check: &impl Fn(&str, &dyn Fn(f32) -> f32, &dyn Fn(&Heads, f32) -> f32),
    ) {
        let cap = |heads: &Heads, x: f32| {
            let mut out = [0.0; LANES];
            s.store(logits(s, heads, s.splat(x)), &mut out);
            out[LANES - 1]
        };
        check(name, &|x| exp(s, x), &cap);
    }
    pass(Portable, "portable", &check);
    #[cfg(target_arch = "x86_64")]
    {
        use crate::x86::{Avx2, Avx512};
        if let Ok(s) = Avx2::detect() {
            pass(s, "avx2", &check);
        }
        if let Ok(s) = Avx512::detect() {
            pass(s, "avx512", &check);
        }
    }
    println!("of {:?}", Kernels::available());
}

/// Every 500th f32 between the ends, against f64.
#[test]
fn exp_is_within_two_ulp_over_its_range() {
    each(|name, exp, _| {
        let mut worst = 0.0f64;
        for (from, to) in [(1e-30f32, 87.3f32), (1e-30, 88.0)] {
            for bits in (from.to_bits()..to.to_bits()).step_by(500) {
                let x = if to == 88.0 {
                    f32::from_bits(bits)
                } else {
                    -f32::from_bits(bits)
                };
                let right = f64::from(x).exp();
                worst = worst.max(((f64::from(exp(x)) - right) / right).abs());
            }
        }
        assert!(worst <= 2e-7, "{name}: relative error {worst:e}");
    });
}

#[test]
fn exp_at_the_edges() {
    each(|name, exp, _| {
        assert_eq!(exp(0.0), 1.0, "{name}");
        assert_eq!(exp(-0.0), 1.0, "{name}");
        assert!((0.0..1.2e-38).contains(&exp(-87.4)), "{name}: {}", exp(-87.4));
        assert_eq!(exp(-120.0), 0.0, "{name}");
        assert_eq!(exp(f32::NEG_INFINITY), 0.0, "{name}");
        assert!(exp(f32::INFINITY) > 1e38, "{name}");
        assert!(exp(f32::NAN).is_nan(), "{name}");
    });
}

#[test]
fn softcap_follows_tanh() {
    let heads = Heads {
        q_heads: 1,
        k_dim: 1,
        v_dim: 1,
        scale: 0.5,
        softcap: Some(30.0),
    };
    each(|name, _, cap| {
        for i in -4000..4000 {
            let raw = i as f32 * 0.1;
            let right = 30.0 * (f64::from(raw) * 0.5 / 30.0).tanh();
            let given = f64::from(cap(&heads, raw));
            assert!((given - right).abs() < 1e-5, "{name} {raw}: {given} for {right}");
        }
        assert!(cap(&heads, f32::NAN).is_nan(), "{name}");
    });
}

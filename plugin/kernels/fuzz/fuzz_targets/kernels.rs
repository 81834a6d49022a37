//! Packs what it is given, unpacks and attends to it with every implementation that this CPU has, and holds them
//! against the oracle. Then it attends to bytes that no `pack` wrote, which may mean anything but must do no harm.
#![no_main]

use arbitrary::Arbitrary;
use cinch_kernels::{Codec, Heads, KernelError, Kernels, Layout, Partial, Scratch, Segment, merge};
use libfuzzer_sys::fuzz_target;

#[derive(Arbitrary, Debug)]
struct Input {
    k: u8,
    v: u8,
    k_layout: u8,
    v_layout: u8,
    k_dim: u8,
    v_dim: u8,
    rows: u8,
    q_heads: u8,
    rotated: bool,
    softcap: Option<u8>,
    /// Cycled to fill rows and queries.
    values: Vec<f32>,
    bytes: Vec<u8>,
}

fuzz_target!(|input: Input| {
    let codec = |i: u8| Codec::ALL[usize::from(i) % Codec::ALL.len()];
    let (k, v) = (codec(input.k), codec(input.v));
    let heads = Heads {
        q_heads: 1 + usize::from(input.q_heads % 9),
        k_dim: 1 + usize::from(input.k_dim) % 160,
        v_dim: 1 + usize::from(input.v_dim) % 160,
        scale: 0.125,
        softcap: input.softcap.map(|c| 1.0 + f32::from(c)),
    };
    let rows = usize::from(input.rows) % 140;
    // Any layout that rows of this codec and dimension can lie in.
    let layout = |of: &[Layout], i: u8, codec, dim| {
        let fit: Vec<_> = of.iter().filter(|layout| layout.fits(codec, dim)).collect();
        *fit[usize::from(i) % fit.len()]
    };
    let k_layouts = [Layout::Rows, Layout::KeyTiles, Layout::KeyChannels];
    let k_layout = layout(&k_layouts, input.k_layout, k, heads.k_dim);
    let v_layout = layout(
        &[Layout::Rows, Layout::ValueTiles],
        input.v_layout,
        v,
        heads.v_dim,
    );
    let oracle = Kernels::forced("scalar").expect("every CPU can");
    let others: Vec<_> = Kernels::available()
        .into_iter()
        .filter(|k| *k != oracle)
        .collect();

    let fill = |offset: usize, n: usize| -> Vec<f32> {
        (0..n)
            .map(|i| {
                input
                    .values
                    .get((i + offset) % input.values.len().max(1))
                    .copied()
                    .unwrap_or(1.0)
            })
            .collect()
    };
    let pack = |layout: Layout, codec: Codec, dim: usize, offset: usize| -> Result<Vec<u8>, KernelError> {
        let values = fill(offset, rows * dim);
        let mut right = vec![0; layout.stored_rows(rows) * codec.row_bytes(dim)];
        let verdict = oracle.pack_run(layout, codec, dim, &values, &mut right);
        for kernels in &others {
            let mut bytes = vec![0xee; right.len()];
            let given = kernels.pack_run(layout, codec, dim, &values, &mut bytes);
            // A NaN in an error differs from itself.
            assert_eq!(format!("{given:?}"), format!("{verdict:?}"), "{}", kernels.name());
            if verdict.is_ok() {
                assert!(bytes == right, "{} packs {codec:?} otherwise", kernels.name());
            }
        }
        verdict?;
        let mut unpacked = vec![0.0; values.len()];
        oracle.unpack_run(layout, codec, dim, &right, &mut unpacked)?;
        for kernels in &others {
            let mut given = vec![0.0; values.len()];
            kernels.unpack_run(layout, codec, dim, &right, &mut given)?;
            let same = given
                .iter()
                .zip(&unpacked)
                .all(|(a, b)| a.to_bits() == b.to_bits());
            assert!(same, "{} unpacks {codec:?} otherwise", kernels.name());
        }
        Ok(right)
    };
    let attend = |kernels: Kernels, k_bytes: &[u8], v_bytes: &[u8], q: &[f32]| -> Option<Vec<f32>> {
        let segment = Segment {
            k_codec: k,
            v_codec: v,
            k_layout,
            v_layout,
            k_rotated: input.rotated,
            rows,
            k: k_bytes,
            v: v_bytes,
        };
        let (mut partial, mut scratch) = (Partial::default(), Scratch::default());
        let mut weights = vec![0.0; heads.q_heads * rows];
        kernels
            .attend_decode(
                &heads,
                &[segment],
                q,
                &mut partial,
                Some(&mut weights),
                &mut scratch,
            )
            .expect("shapes fit");
        let mut out = vec![0.0; heads.q_heads * heads.v_dim];
        merge(&heads, [&partial], &mut out).ok().map(|()| out)
    };

    // Small queries, so that what rounding does to a logit can be told.
    let q: Vec<f32> = fill(7, heads.q_heads * heads.k_dim)
        .into_iter()
        .map(|x| if x.is_finite() { x.clamp(-0.05, 0.05) } else { 0.0 })
        .collect();
    if let (Ok(k_bytes), Ok(v_bytes)) = (
        pack(k_layout, k, heads.k_dim, 0),
        pack(v_layout, v, heads.v_dim, 3),
    ) {
        let small = input.values.iter().all(|x| x.abs() <= 8.0);
        let right = attend(oracle, &k_bytes, &v_bytes, &q);
        for kernels in &others {
            let given = attend(*kernels, &k_bytes, &v_bytes, &q);
            assert_eq!(given.is_some(), right.is_some(), "{}", kernels.name());
            for (a, b) in given.iter().flatten().zip(right.iter().flatten()) {
                // Logits of up to 160 · 0.05 · 8 / 8, values of up to 8; queries and weights in 16 bits, or in 8 on
                // codes of fewer.
                let bound = if [k, v]
                    .iter()
                    .any(|c| ["int4", "int3", "int2"].contains(&c.name()))
                {
                    1.0
                } else {
                    0.02
                };
                assert!(
                    !small || (a - b).abs() <= bound,
                    "{}: {a} for {b}",
                    kernels.name()
                );
            }
        }
    }
    let raw = |n: usize| -> Vec<u8> {
        (0..n)
            .map(|i| {
                input
                    .bytes
                    .get(i % input.bytes.len().max(1))
                    .copied()
                    .unwrap_or(0)
            })
            .collect()
    };
    let (k_bytes, v_bytes) = (
        raw(k_layout.stored_rows(rows) * k.row_bytes(heads.k_dim)),
        raw(v_layout.stored_rows(rows) * v.row_bytes(heads.v_dim)),
    );
    for kernels in Kernels::available() {
        attend(kernels, &k_bytes, &v_bytes, &q);
    }
});

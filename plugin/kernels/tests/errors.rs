//! Bad arguments: a typed refusal that says what was given and what fits, from every implementation.

use cinch_kernels::{
    Codec, ColumnSums, Heads, KernelError, Kernels, Layout, Partial, Rows, RowsMut, Scratch, Segment,
    accumulate, merge,
};

const HEADS: Heads = Heads {
    q_heads: 2,
    k_dim: 4,
    v_dim: 3,
    scale: 0.5,
    softcap: None,
};

#[test]
fn pack_and_unpack() {
    for kernels in Kernels::available() {
        let pack = |codec, dim, src: &[f32], dst: &mut [u8]| kernels.pack(codec, dim, src, dst);
        let unpack = |codec, dim, src: &[u8], dst: &mut [f32]| kernels.unpack(codec, dim, src, dst);
        let zero = Err(KernelError::Zero { what: "dim" });
        assert_eq!(pack(Codec::F16, 0, &[], &mut []), zero);
        assert_eq!(unpack(Codec::F16, 0, &[], &mut []), zero);
        let ragged = Err(KernelError::Ragged {
            what: "values",
            given: 7,
            row: 4,
        });
        assert_eq!(pack(Codec::F16, 4, &[0.0; 7], &mut [0; 14]), ragged);
        assert_eq!(unpack(Codec::F16, 4, &[0; 14], &mut [0.0; 7]), ragged);
        let length = |given| {
            Err(KernelError::Length {
                what: "packed bytes",
                given,
                expected: 12,
            })
        };
        assert_eq!(pack(Codec::Int4, 4, &[0.0; 8], &mut [0; 11]), length(11));
        assert_eq!(unpack(Codec::Int4, 4, &[0; 13], &mut [0.0; 8]), length(13));
    }
}

fn segment<'a>(k: &'a [u8], v: &'a [u8]) -> Segment<'a> {
    Segment {
        k_codec: Codec::F16,
        v_codec: Codec::F16,
        k_layout: Layout::Rows,
        v_layout: Layout::Rows,
        k_rotated: false,
        rows: 2,
        k,
        v,
    }
}

#[test]
fn decode() {
    let (k, v) = ([0u8; 16], [0u8; 12]);
    let good = [segment(&k, &v)];
    for kernels in Kernels::available() {
        let run = |heads: &Heads, segments: &[Segment<'_>], q: usize, weights: usize| {
            let (mut partial, mut scratch) = (Partial::default(), Scratch::default());
            let weights = &mut vec![0.0; weights];
            let q = &vec![0.0; q];
            kernels.attend_decode(heads, segments, q, &mut partial, Some(weights), &mut scratch)
        };
        assert_eq!(run(&HEADS, &good, 8, 4), Ok(()));
        let zero = |what| Err(KernelError::Zero { what });
        assert_eq!(run(&Heads { q_heads: 0, ..HEADS }, &good, 0, 0), zero("q_heads"));
        assert_eq!(run(&Heads { k_dim: 0, ..HEADS }, &good, 0, 4), zero("k_dim"));
        assert_eq!(run(&Heads { v_dim: 0, ..HEADS }, &good, 8, 0), zero("v_dim"));
        let length = |what, given, expected| {
            Err(KernelError::Length {
                what,
                given,
                expected,
            })
        };
        assert_eq!(run(&HEADS, &good, 7, 4), length("query values", 7, 8));
        assert_eq!(run(&HEADS, &good, 8, 5), length("weights", 5, 4));
        assert_eq!(
            run(&HEADS, &[segment(&k[1..], &v)], 8, 6),
            length("key bytes of a segment", 15, 16)
        );
        assert_eq!(
            run(&HEADS, &[segment(&k, &v[1..])], 8, 6),
            length("value bytes of a segment", 11, 12)
        );
        let huge = Segment {
            rows: usize::MAX,
            ..good[0]
        };
        assert_eq!(
            run(&HEADS, &[huge], 8, 6),
            length("key bytes of a segment", 16, usize::MAX)
        );
        for given in [f32::INFINITY, f32::NEG_INFINITY] {
            let range = Err(KernelError::Range {
                what: "scale",
                given,
                allowed: "finite",
            });
            assert_eq!(
                run(
                    &Heads {
                        scale: given,
                        ..HEADS
                    },
                    &good,
                    8,
                    6
                ),
                range
            );
        }
        for given in [0.0, -1.0, f32::INFINITY] {
            let range = Err(KernelError::Range {
                what: "softcap",
                given,
                allowed: "finite and above 0",
            });
            assert_eq!(
                run(
                    &Heads {
                        softcap: Some(given),
                        ..HEADS
                    },
                    &good,
                    8,
                    6
                ),
                range
            );
        }
        assert!(
            run(
                &Heads {
                    softcap: Some(f32::NAN),
                    ..HEADS
                },
                &good,
                8,
                6
            )
            .is_err()
        );
    }
}

/// A prefill of two tokens in which one thing can be changed.
#[derive(Clone, Copy)]
struct Call {
    k: (usize, usize, usize),
    v_rows: usize,
    first_query: usize,
    q_heads: usize,
    q_dim: usize,
    out_heads: usize,
    out: (usize, usize),
    sums: Option<usize>,
}

const CALL: Call = Call {
    k: (8, 4, 2),
    v_rows: 2,
    first_query: 0,
    q_heads: 2,
    q_dim: 4,
    out_heads: 2,
    out: (6, 3),
    sums: Some(4),
};

fn prefill(call: Call) -> Vec<Result<(), KernelError>> {
    let (k, v) = ([0u8; 16], [0u8; 12]);
    let past = [segment(&k, &v)];
    let zeros = [0.0; 64];
    let fresh_k = Rows {
        data: &zeros[..call.k.0],
        stride: call.k.1,
        rows: call.k.2,
        dim: 4,
    };
    let fresh_v = Rows {
        data: &zeros,
        stride: 3,
        rows: call.v_rows,
        dim: 3,
    };
    let q = vec![
        Rows {
            data: &zeros,
            stride: 4,
            rows: 2,
            dim: call.q_dim
        };
        call.q_heads
    ];
    let run = |kernels: Kernels| {
        let mut data = vec![vec![0.0; call.out.0]; call.out_heads];
        let rows = |data| RowsMut {
            data,
            stride: call.out.1,
            rows: 2,
            dim: 3,
        };
        let mut out: Vec<_> = data.iter_mut().map(|d| rows(&mut d[..])).collect();
        let mut sums = call.sums.map(|n| vec![0.0; n]);
        let sums = sums.as_mut().map(|out| ColumnSums {
            largest: false,
            last_queries: 1,
            out,
        });
        kernels.attend_prefill(
            &HEADS,
            &past,
            fresh_k,
            fresh_v,
            call.first_query,
            &q,
            &mut out,
            sums,
            &mut Scratch::default(),
        )
    };
    Kernels::available().into_iter().map(run).collect()
}

#[test]
fn prefill_arguments() {
    let length = |what, given, expected| {
        Err(KernelError::Length {
            what,
            given,
            expected,
        })
    };
    let stride = Err(KernelError::Stride {
        what: "outputs",
        given: 2,
        minimum: 3,
    });
    for (call, expected) in [
        (CALL, Ok(())),
        (Call { sums: None, ..CALL }, Ok(())),
        // Rows that are only read may overlap: a broadcast tensor has stride 0.
        (Call { k: (4, 0, 2), ..CALL }, Ok(())),
        (Call { k: (7, 4, 2), ..CALL }, length("fresh keys", 7, 8)),
        (
            Call {
                k: (64, usize::MAX, 2),
                ..CALL
            },
            length("fresh keys", 64, usize::MAX),
        ),
        (Call { v_rows: 1, ..CALL }, length("fresh values", 1, 2)),
        (
            Call {
                first_query: 1,
                ..CALL
            },
            length("queries from the first one on", 2, 1),
        ),
        (Call { q_heads: 3, ..CALL }, length("query heads", 3, 2)),
        (Call { q_dim: 5, ..CALL }, length("queries", 5, 4)),
        (Call { out_heads: 1, ..CALL }, length("output heads", 1, 2)),
        (Call { out: (5, 3), ..CALL }, length("outputs", 5, 6)),
        (Call { out: (6, 2), ..CALL }, stride),
        (
            Call {
                sums: Some(3),
                ..CALL
            },
            length("column sums", 3, 4),
        ),
    ] {
        for given in prefill(call) {
            assert_eq!(given, expected);
        }
    }
}

#[test]
fn messages_name_given_and_allowed() {
    let messages = [
        KernelError::Length {
            what: "output values",
            given: 7,
            expected: 6,
        }
        .to_string(),
        KernelError::Range {
            what: "softcap",
            given: -1.0,
            allowed: "finite and above 0",
        }
        .to_string(),
        KernelError::NonFinite {
            row: 3,
            column: 4,
            given: f32::NAN,
        }
        .to_string(),
    ];
    assert_eq!(messages[0], "output values: given 7, expected 6");
    assert_eq!(messages[1], "softcap: given -1, allowed finite and above 0");
    assert_eq!(messages[2], "row 3, column 4: given NaN, expected a finite value");
}

#[test]
fn merging_nothing_or_parts_of_other_heads() {
    let (mut partial, mut scratch) = (Partial::default(), Scratch::default());
    let (k, v) = ([0u8; 16], [0u8; 12]);
    for kernels in Kernels::available() {
        kernels
            .attend_decode(&HEADS, &[], &[0.0; 8], &mut partial, None, &mut scratch)
            .unwrap();
        assert!(
            partial
                .stats()
                .iter()
                .all(|s| s.max == f32::NEG_INFINITY && s.sum == 0.0)
        );
        let none: [&Partial; 0] = [];
        assert_eq!(merge(&HEADS, none, &mut [0.0; 6]), Err(KernelError::NoRows));
        assert_eq!(merge(&HEADS, [&partial], &mut [0.0; 6]), Err(KernelError::NoRows));

        let mut full = Partial::default();
        let segments = [segment(&k, &v)];
        kernels
            .attend_decode(&HEADS, &segments, &[0.0; 8], &mut full, None, &mut scratch)
            .unwrap();
        assert_eq!(merge(&HEADS, [&partial, &full], &mut [0.0; 6]), Ok(()));
        let length = |what, given, expected| {
            Err(KernelError::Length {
                what,
                given,
                expected,
            })
        };
        assert_eq!(
            merge(&HEADS, [&full], &mut [0.0; 5]),
            length("output values", 5, 6)
        );
        let other = Heads { q_heads: 1, ..HEADS };
        assert_eq!(
            merge(&other, [&full], &mut [0.0; 3]),
            length("query heads of a part", 2, 1)
        );
        let other = Heads { v_dim: 4, ..HEADS };
        assert_eq!(
            merge(&other, [&full], &mut [0.0; 8]),
            length("output values of a part", 6, 8)
        );
        assert_eq!(
            accumulate(&[0.0; 5], &[1.0; 2], &mut [0.0; 3]),
            length("weights", 5, 6)
        );
    }
}

#[test]
fn implementations_by_name() {
    for kernels in Kernels::available() {
        assert_eq!(Kernels::forced(kernels.name()), Ok(kernels));
        let zero = Err(KernelError::Zero { what: "dim" });
        assert_eq!(kernels.rotate(0, &mut []), zero);
        let ragged = Err(KernelError::Ragged {
            what: "values",
            given: 7,
            row: 4,
        });
        assert_eq!(kernels.rotate(4, &mut [0.0; 7]), ragged);
    }
    let error = Kernels::forced("neon").unwrap_err().to_string();
    assert!(
        error.starts_with("kernels: given \"neon\", expected one of scalar, portable"),
        "{error}"
    );
}

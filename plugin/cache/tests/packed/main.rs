//! What rows come back as, value by value, against oracles in f64 written from the papers, and what is attended to with them;
//! on random rows and on those of a real model.
#![allow(clippy::unwrap_used, reason = "a test that can't go on should say where")]

mod codec;
#[path = "../common/mod.rs"]
mod common;
mod identity;
mod matrix;
mod project;
mod quantize;

use std::sync::Arc;

use cinch_cache::{BlockView, HeadRows, HeadView, LayerView, Plugin};
use common::*;
use matrix::Rows;

/// Heads that every method can take.
const EVEN: Model = Model {
    layers: 3,
    kv_heads: 3,
    group: 2,
    k_dim: 64,
    v_dim: 64,
};

/// A sequence that was served.
struct Served {
    source: Source,
    plugin: Arc<Plugin>,
    seq: [Seq; 1],
    layers: Vec<LayerView>,
}

impl Served {
    /// Runs steps under a policy.
    fn new(source: Source, json: &str, steps: &[usize]) -> Self {
        let plugin = plugin(policy(json));
        let mut seq = [open(&plugin, &source.model, 1, source.text)];
        for fresh in steps {
            step(&plugin, &source.model, &mut seq, *fresh);
        }
        let layers = check_invariants(&plugin, &seq[0]);
        Self {
            source,
            plugin,
            seq,
            layers,
        }
    }

    fn heads(&self) -> impl Iterator<Item = Head<'_>> {
        let heads = self.layers.iter().enumerate().flat_map(|(layer, view)| {
            let heads = view.heads.iter().enumerate();
            heads.map(move |(kv, view)| (layer, kv, view))
        });
        heads.map(|(layer, kv, view)| Head {
            served: self,
            layer,
            kv,
            view,
            rows: self.plugin.rows(&*self.seq[0].cache, layer, kv).unwrap().unwrap(),
        })
    }
}

/// One of its heads.
struct Head<'a> {
    served: &'a Served,
    layer: usize,
    kv: usize,
    view: &'a HeadView,
    rows: HeadRows,
}

/// Rows of a block, as the store was given them and as they come back.
struct Block {
    view: BlockView,
    /// The first of its rows.
    start: usize,
    given: Rows,
    back: Rows,
}

impl Head<'_> {
    /// A side of a row as it came, in the store's f16.
    fn given(&self, what: What, token: usize) -> Vec<f64> {
        let row = self.served.source.vector(self.layer, what, self.kv, token);
        row.iter().map(|x| codec::half(f64::from(*x))).collect()
    }

    fn back(&self, what: What) -> Rows {
        let (values, dim) = match what {
            What::V => (&self.rows.v, self.served.source.model.v_dim),
            What::K | What::Q => (&self.rows.k, self.served.source.model.k_dim),
        };
        let row = |row: &[f32]| row.iter().map(|x| f64::from(*x)).collect();
        values.chunks_exact(dim).map(row).collect()
    }

    fn all_given(&self, what: What) -> Rows {
        let positions = self.view.positions.iter();
        positions.map(|token| self.given(what, *token as usize)).collect()
    }

    /// A side of each block that is packed; rows of the others come back as the store was given them, to the bit.
    fn packed(&self, what: What, is_packed: impl Fn(&BlockView) -> bool) -> Vec<Block> {
        let (given, back) = (self.all_given(what), self.back(what));
        let (mut start, mut blocks) = (0, Vec::new());
        for view in &self.view.blocks {
            let rows = start..start + view.rows;
            if is_packed(view) {
                blocks.push(Block {
                    view: *view,
                    start,
                    given: given[rows.clone()].to_vec(),
                    back: back[rows.clone()].to_vec(),
                });
            } else {
                assert_eq!(given[rows.clone()], back[rows.clone()], "{view:?}");
            }
            start = rows.end;
        }
        assert!(!blocks.is_empty());
        blocks
    }
}

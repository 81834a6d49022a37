//! One layer over plain lists: attention, what the method counts of it, and eviction one row at a time.

use cinch_cache::LayerView;
use cinch_protocol::{Heads, Layers, Merge, Select, SelectMethod};

use crate::common::*;
use crate::{fastgen, merge, ranks};

/// A kept token.
#[derive(Clone)]
pub(crate) struct Row {
    pub(crate) position: u32,
    /// Attention received, as the method counts it.
    pub(crate) score: f64,
    pub(crate) k: Vec<f64>,
    pub(crate) v: Vec<f64>,
}

/// One KV head.
pub(crate) struct Head {
    pub(crate) model: Model,
    pub(crate) text: u64,
    pub(crate) layer: usize,
    pub(crate) kv: usize,
    pub(crate) rows: Vec<Row>,
    /// Positions of queries and what each counts in their statistics.
    pub(crate) queries: Vec<(usize, f64)>,
    /// Cosine from which on evicted rows are merged.
    pub(crate) threshold: Option<f64>,
    /// Which of FastGen's policies it took at the end of the prompt.
    pub(crate) profile: Option<usize>,
}

/// What the crate kept after a step.
pub(crate) struct Given {
    /// Positions, of each head.
    pub(crate) heads: Vec<Vec<u32>>,
    /// How far off the cut, relative to it, ranks may be of rows that the crate sorts otherwise: f32 tells no closer
    /// ones apart. With 0 there are none.
    pub(crate) tolerance: f64,
}

impl Given {
    pub(crate) fn of(layer: &LayerView, tolerance: f64) -> Self {
        Self {
            heads: layer.heads.iter().map(|head| head.positions.clone()).collect(),
            tolerance,
        }
    }
}

pub(crate) struct Layer {
    pub(crate) heads: Vec<Head>,
    model: Model,
    layer: usize,
    seen: usize,
    since: usize,
    decoded: usize,
    /// What a prompt leaves waits for its second reading.
    pub(crate) held: bool,
    /// Rows that it got where layers competed, and those of an even layer.
    won: (usize, usize),
}

impl Layer {
    pub(crate) fn new(model: &Model, text: u64, layer: usize) -> Self {
        let head = |kv| Head {
            model: *model,
            text,
            layer,
            kv,
            rows: Vec::new(),
            queries: Vec::new(),
            threshold: None,
            profile: None,
        };
        Self {
            heads: (0..model.kv_heads).map(head).collect(),
            model: *model,
            layer,
            seen: 0,
            since: 0,
            decoded: 0,
            held: false,
            won: (1, 1),
        }
    }

    /// Every query attends to the past kept and to fresh tokens up to its own; then the layer evicts, as the crate did
    /// where that was a matter of rounding. Answers with the last query's output, one a query head.
    pub(crate) fn step(&mut self, select: &Select, fresh: usize, given: &Given) -> Vec<Vec<f64>> {
        self.decoded = if fresh == 1 { self.decoded + 1 } else { 0 };
        for head in &mut self.heads {
            head.append(self.seen, fresh);
        }
        let (counted, left) = self.counted(select, fresh);
        for head in &mut self.heads {
            head.rows.iter_mut().for_each(|row| row.score *= left);
        }
        for (query, times) in counted {
            let credits = self.credits(select, self.seen + query, fresh - 1 - query);
            for (head, credits) in self.heads.iter_mut().zip(credits) {
                for (row, credit) in head.rows.iter_mut().zip(credits) {
                    row.score = match select.method {
                        SelectMethod::Kvzip => row.score.max(credit),
                        _ => row.score + times * credit,
                    };
                }
            }
        }
        if fresh > 1 || self.seen.is_multiple_of(8) {
            for head in &mut self.heads {
                head.note_queries(select.sinks as usize, self.seen..self.seen + fresh);
            }
        }
        self.seen += fresh;
        self.since += fresh;
        let outputs = (0..self.model.q_heads()).map(|q_head| {
            let rows = &self.heads[q_head / self.model.group].rows;
            let weights = self.weights(q_head, self.seen - 1, 0);
            let column = |c: usize| weights.iter().zip(rows).map(|(w, row)| w * row.v[c]).sum();
            (0..self.model.v_dim).map(column).collect()
        });
        let outputs = outputs.collect();
        if fresh > 1 && self.held {
            self.since = 0;
        } else if fresh > 1 || self.since >= select.interval as usize {
            self.since = 0;
            self.evict(select, fresh > 1, given);
        }
        outputs
    }

    /// A part of a prompt's second reading: `fresh` tokens of `text` behind it, none of which stays.
    pub(crate) fn read_again(&mut self, text: u64, fresh: usize) {
        let model = self.model;
        for head in &mut self.heads {
            let of = |what, head, dim| -> Vec<Vec<f64>> {
                let tokens = self.seen..self.seen + fresh;
                tokens
                    .map(|token| wide(&vector(text, self.layer, what, head, token, dim)))
                    .collect()
            };
            let fresh_k = of(What::K, head.kv, model.k_dim);
            let mut largest = vec![0.0_f64; head.rows.len()];
            for q_head in head.kv * model.group..(head.kv + 1) * model.group {
                for (i, q) in of(What::Q, q_head, model.k_dim).iter().enumerate() {
                    let keys = head.rows.iter().map(|row| &row.k).chain(&fresh_k[..=i]);
                    let e: Vec<f64> = keys
                        .map(|k| (ranks::dot(q, k) / (model.k_dim as f64).sqrt()).exp())
                        .collect();
                    let sum: f64 = e.iter().sum();
                    largest
                        .iter_mut()
                        .zip(e)
                        .for_each(|(largest, e)| *largest = largest.max(e / sum));
                }
            }
            for (row, largest) in head.rows.iter_mut().zip(largest) {
                row.score = row.score.max(largest);
            }
        }
    }

    /// Forgets what rows received so far.
    pub(crate) fn forget(&mut self) {
        let rows = self.heads.iter_mut().flat_map(|head| &mut head.rows);
        rows.for_each(|row| row.score = 0.0);
    }

    /// The second reading is over.
    pub(crate) fn release(&mut self, select: &Select, given: &Given) {
        self.held = false;
        self.evict(select, true, given);
    }

    /// The second reading is over for all layers, whose heads compete: the lowest row of any goes, but of heads at their
    /// floor.
    pub(crate) fn release_all(layers: &mut [Self], select: &Select) {
        for layer in layers.iter_mut() {
            (layer.held, layer.won) = (false, (1, 1));
        }
        let even = layers[0].budget(select);
        let floor = (even as f64 * select.floor.unwrap_or(0.2)) as usize;
        let heads: usize = layers.iter().map(|layer| layer.heads.len()).sum();
        let all = |layers: &[Self]| -> usize {
            layers
                .iter()
                .flat_map(|layer| &layer.heads)
                .map(|head| head.rows.len())
                .sum()
        };
        while all(layers) > even * heads {
            let mut lowest: Option<(f64, usize, usize, usize)> = None;
            for (l, layer) in layers.iter().enumerate() {
                let open = layer
                    .heads
                    .iter()
                    .enumerate()
                    .filter(|(_, head)| head.rows.len() > floor);
                for (kv, head) in open {
                    for (i, row) in head.rows.iter().enumerate() {
                        let stays =
                            row.position < select.sinks || row.position + select.recent >= layer.seen as u32;
                        if !stays && lowest.is_none_or(|lowest| row.score < lowest.0) {
                            lowest = Some((row.score, l, kv, i));
                        }
                    }
                }
            }
            let (_, l, kv, i) = lowest.unwrap();
            layers[l].heads[kv].rows.remove(i);
        }
        for layer in layers {
            let rows = layer.heads.iter().map(|head| head.rows.len()).sum();
            layer.won = (rows, even * layer.heads.len());
        }
    }

    /// Softmax weights of a query over all rows but the last `unseen`.
    fn weights(&self, q_head: usize, token: usize, unseen: usize) -> Vec<f64> {
        let head = &self.heads[q_head / self.model.group];
        let q = wide(&vector(
            head.text,
            self.layer,
            What::Q,
            q_head,
            token,
            self.model.k_dim,
        ));
        let rows = &head.rows[..head.rows.len() - unseen];
        let scale = (self.model.k_dim as f64).sqrt();
        let logits: Vec<f64> = rows.iter().map(|row| ranks::dot(&q, &row.k) / scale).collect();
        let max = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let e: Vec<f64> = logits.iter().map(|logit| (logit - max).exp()).collect();
        let sum: f64 = e.iter().sum();
        e.iter().map(|e| e / sum).collect()
    }

    /// Which queries count and how often, and what is left of those before.
    fn counted(&self, select: &Select, fresh: usize) -> (Vec<(usize, f64)>, f64) {
        let window = match select.method {
            SelectMethod::Snapkv | SelectMethod::Scissorhands => Some(select.window.unwrap_or(64) as usize),
            SelectMethod::Tova => Some(1),
            SelectMethod::Fastgen => Some(64),
            _ => None,
        };
        let last = |n: usize| -> Vec<(usize, f64)> {
            (fresh.saturating_sub(n)..fresh)
                .map(|query| (query, 1.0))
                .collect()
        };
        if let Some(window) = window {
            // Steps until the next eviction.
            let until = (select.interval as usize).saturating_sub(self.since + 1);
            if fresh == 1 && until >= window.min(32) {
                return (Vec::new(), 1.0);
            }
            let counted = last(window);
            let left = 1.0 - counted.len() as f64 / window as f64;
            return (counted, left);
        }
        let counted = match (select.method, fresh) {
            (SelectMethod::H2o, _) => last(fresh),
            (_, 1) if self.seen.is_multiple_of(8) => vec![(0, 8.0)],
            (_, 1) => Vec::new(),
            (SelectMethod::Keyformer, _) => {
                let n = fresh.min(64);
                let each = fresh as f64 / n as f64;
                (1..=n).map(|i| (i * fresh / n - 1, each)).collect()
            }
            _ => last(64),
        };
        (counted, 1.0)
    }

    /// What one query adds to the scores of each head's rows.
    fn credits(&self, select: &Select, token: usize, unseen: usize) -> Vec<Vec<f64>> {
        let sum = |heads: std::ops::Range<usize>| {
            let mut sum = Vec::new();
            for q_head in heads {
                let weights = self.weights(q_head, token, unseen);
                sum.resize(weights.len(), 0.0);
                sum.iter_mut().zip(weights).for_each(|(sum, w)| *sum += w);
            }
            sum
        };
        let own = |head: &Head| sum(head.kv * self.model.group..(head.kv + 1) * self.model.group);
        let group = self.model.group as f64;
        let credits = |head: &Head| -> Vec<f64> {
            match select.method {
                // All heads of the layer together, since they keep the same rows.
                SelectMethod::Tova | SelectMethod::Streaming => sum(0..self.model.q_heads()),
                SelectMethod::Scissorhands => {
                    let sum = own(head);
                    let mean = 1.0 / sum.len() as f64;
                    sum.iter()
                        .map(|w| if w / group >= mean { group } else { 0.0 })
                        .collect()
                }
                SelectMethod::Keyformer => {
                    let last = select.temperature.unwrap_or(2.0);
                    let temperature = 1.0 + (last - 1.0) * (self.decoded as f64 / 512.0).min(1.0);
                    let seed = select.seed.unwrap_or(0);
                    let e = own(head).into_iter().zip(&head.rows).map(|(sum, row)| {
                        let noise = ranks::gumbel(seed, self.layer, head.kv, token, row.position);
                        (((sum / group).ln() + noise) / temperature).exp()
                    });
                    let e: Vec<f64> = e.collect();
                    let total: f64 = e.iter().sum();
                    e.iter().map(|e| group * e / total).collect()
                }
                SelectMethod::Kvzip => {
                    let heads = head.kv * self.model.group..(head.kv + 1) * self.model.group;
                    let heads: Vec<Vec<f64>> =
                        heads.map(|q_head| self.weights(q_head, token, unseen)).collect();
                    let largest = |row: usize| heads.iter().map(|weights| weights[row]).fold(0.0, f64::max);
                    (0..heads[0].len()).map(largest).collect()
                }
                _ => own(head),
            }
        };
        self.heads.iter().map(credits).collect()
    }

    /// Rows of this layer, a head of it on average.
    fn budget(&self, select: &Select) -> usize {
        // In integers, so that no rounding can move it: budgets here are whole percents.
        let percent = (select.budget * 100.0).round() as usize;
        let share = (percent * self.seen).div_ceil(100);
        let mean = share.max((select.sinks + select.recent) as usize).min(self.seen);
        match select.layers {
            Layers::Even => return mean,
            Layers::Adaptive => {
                let least = ((select.sinks + select.recent) as usize).min(self.seen);
                return (mean * self.won.0 / self.won.1).max(least);
            }
            Layers::Pyramid => {}
        }
        // Two layers: what the first gets above the mean, the last gets below it.
        assert_eq!(self.model.layers, 2);
        let protected = ((select.sinks + select.recent) as usize).min(mean);
        let (free, all) = ((mean - protected) as f64, (self.seen - protected) as f64);
        let first = (2.0 * free - free / f64::from(select.beta.unwrap_or(20)))
            .min(all)
            .round() as usize;
        match self.layer {
            0 => protected + first,
            _ => protected + 2 * (mean - protected) - first,
        }
    }

    /// The lowest row goes first, of equals the earlier; where heads compete, the lowest of any head that has more than
    /// its floor.
    fn evict(&mut self, select: &Select, prefilled: bool, given: &Given) {
        if !select.method.evicts() || self.layer < select.skip_layers.unwrap_or(0) as usize {
            return;
        }
        let budget = self.budget(select);
        let ranks: Vec<Vec<f64>> = self
            .heads
            .iter()
            .map(|head| ranks::of(head, select, self.seen))
            .collect();
        let before: Vec<Vec<Row>> = self.heads.iter().map(|head| head.rows.clone()).collect();
        let mut left: Vec<Vec<usize>> = before.iter().map(|rows| (0..rows.len()).collect()).collect();
        let recent = match select.method {
            SelectMethod::H2o => budget * 50 / 100,
            SelectMethod::Keyformer => budget * 30 / 100,
            _ => 0,
        };
        // Sinks come first.
        let room = budget - budget.min(select.sinks as usize);
        let recent = recent.min(room).max(select.recent as usize) as u32;
        let protected = |kv: usize, row: usize| {
            let position = before[kv][row].position;
            position < select.sinks || position + recent >= self.seen as u32
        };
        let floor = (budget as f64 * select.floor.unwrap_or(0.2)) as usize;
        if select.method == SelectMethod::Fastgen {
            for (head, left) in self.heads.iter_mut().zip(&mut left) {
                *left = fastgen::keep(head, select, self.seen, budget, prefilled);
            }
        }
        let mut cuts = vec![f64::NEG_INFINITY; left.len()];
        loop {
            let all: usize = left.iter().map(Vec::len).sum();
            let open = |kv: usize| match select.heads {
                Heads::Even => left[kv].len() > budget,
                Heads::Adaptive => all > budget * left.len() && left[kv].len() > floor,
            };
            let candidates = (0..left.len()).filter(|kv| open(*kv)).flat_map(|kv| {
                let rows = left[kv].iter().filter(move |row| !protected(kv, **row));
                rows.map(move |row| (kv, *row))
            });
            let loser = candidates.min_by(|a, b| {
                let rank = |(kv, row): &(usize, usize)| ranks[*kv][*row];
                rank(a)
                    .total_cmp(&rank(b))
                    .then(a.1.cmp(&b.1))
                    .then(b.0.cmp(&a.0))
            });
            let Some((kv, loser)) = loser else { break };
            left[kv].retain(|row| *row != loser);
            cuts[kv] = cuts[kv].max(ranks[kv][loser]);
        }
        if select.heads == Heads::Adaptive {
            // That of the heads which were not at their floor.
            let cut = cuts.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            cuts.fill(cut);
        }
        for (kv, left) in left.iter_mut().enumerate() {
            let kept = |row: &usize| given.heads[kv].contains(&before[kv][*row].position);
            let others = (0..before[kv].len()).filter(|row| kept(row) != left.contains(row));
            // Cosines are what they are to within rounding of 1, however small.
            let unit = match select.method {
                SelectMethod::Keydiff => 1.0,
                _ => cuts[kv].abs(),
            };
            let off = |row: usize| (ranks[kv][row] - cuts[kv]).abs() / unit;
            if others.map(off).all(|off| off <= given.tolerance) {
                *left = (0..before[kv].len()).filter(kept).collect();
            }
        }
        for ((head, before), left) in self.heads.iter_mut().zip(before).zip(left) {
            head.rows = left.iter().map(|row| before[*row].clone()).collect();
            match select.merge {
                Merge::None => {}
                Merge::D2o => merge::d2o(head, &before, &left, select.sinks),
                Merge::Cam => merge::cam(head, &before, &left, select.seed.unwrap_or(0)),
            }
        }
    }
}

impl Head {
    pub(crate) fn positions(&self) -> Vec<u32> {
        self.rows.iter().map(|row| row.position).collect()
    }

    fn append(&mut self, seen: usize, fresh: usize) {
        for token in seen..seen + fresh {
            let of = |what, dim| wide(&vector(self.text, self.layer, what, self.kv, token, dim));
            self.rows.push(Row {
                position: token as u32,
                score: 0.0,
                k: of(What::K, self.model.k_dim),
                v: of(What::V, self.model.v_dim),
            });
        }
    }

    /// Those of sinks do not count. Of more than 512, the older ones count for what is left.
    fn note_queries(&mut self, sinks: usize, tokens: std::ops::Range<usize>) {
        let new: Vec<usize> = tokens.filter(|token| *token >= sinks).collect();
        let new = &new[new.len().saturating_sub(512)..];
        let old: f64 = self.queries.iter().map(|query| query.1).sum();
        let room = 512.0 - new.len() as f64;
        if old > room {
            self.queries.iter_mut().for_each(|query| query.1 *= room / old);
        }
        self.queries.extend(new.iter().map(|token| (*token, 1.0)));
    }

    /// Rows before `position`.
    pub(crate) fn before(&self, position: u32) -> usize {
        self.rows.iter().filter(|row| row.position < position).count()
    }
}

pub(crate) fn wide(x: &[f32]) -> Vec<f64> {
    x.iter().map(|x| f64::from(*x)).collect()
}

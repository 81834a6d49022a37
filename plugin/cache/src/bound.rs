//! The most a sequence can hold: what admission reserves before a request runs. Structural, not measured: every
//! block, column and header that the stores may open, at the worst moment between two compactions.

use candle_core::DType;
use cinch_hooks::LayerShape;
use cinch_kernels::Layout;

use crate::plan::{Place, Plan, Won};
use crate::project;
use crate::quantize::Beside;
use crate::select::moments;
use crate::store::{BLOCK_ROWS, BOUNDS_HEADER, COLUMN_ROWS, HEADER, LINE, PAGE, Pair, extra_bytes};

/// Bytes of one layer's K and V of `tokens` tokens in f16.
pub(crate) fn uncompressed(shape: &LayerShape, tokens: usize) -> usize {
    shape.kv_heads * (shape.k_dim + shape.v_dim) * 2 * tokens
}

/// A layer of a sequence that has a plan of its own from its first token on.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Of<'a> {
    pub(crate) place: Place,
    pub(crate) shape: &'a LayerShape,
    /// Query heads that share a KV head.
    pub(crate) group: usize,
    pub(crate) plan: &'a Plan,
    pub(crate) dtype: DType,
}

/// Most bytes that one layer holds of a sequence that has come to `tokens` tokens.
pub(crate) fn layer(of: &Of<'_>, tokens: usize) -> usize {
    // Between two evictions rows gather that the next one drops.
    let kept = match (of.plan.budget(of.place, tokens, 0, Won::EVEN), of.plan.interval()) {
        (Some(budget), Some(interval)) => (budget.total + interval).min(tokens),
        _ => tokens,
    };
    holding(of, kept, 0)
}

/// The same while a prompt of `tokens` tokens is read once more: nothing has gone yet, and a part of it comes on top. 0 where
/// that is not asked for.
pub(crate) fn rereading(of: &Of<'_>, tokens: usize) -> usize {
    of.plan
        .rereads()
        .map_or(0, |pass| holding(of, tokens, pass.tokens))
}

/// Most bytes of `kept` rows, and of `more` behind them that are not packed.
fn holding(of: &Of<'_>, kept: usize, more: usize) -> usize {
    let Of {
        place,
        shape,
        group,
        plan,
        dtype,
    } = *of;
    let targets = plan.targets(place, dtype);
    let row = |pair: Pair| {
        let (k, v) = pair.least();
        k.row_bytes(shape.k_dim) + v.row_bytes(shape.v_dim)
    };
    // Blocks with something beside their codes are not filled up.
    let smallest = match targets.packed.beside {
        Beside::Nothing => BLOCK_ROWS,
        _ => targets.batch().min(BLOCK_ROWS),
    };
    // Rows in full precision, and room that was opened for rows to come: a window that is about to be packed
    // and the block behind it.
    let (full, packed, blocks) = if targets.packs() {
        let full = targets.sinks.min(kept) + 2 * targets.tail_capacity();
        (
            full,
            kept.saturating_sub(targets.residual + targets.sinks.min(kept)),
            // Of heads that hold more than others, some end in one more; and of layers, which are all counted as even.
            kept.div_ceil(smallest) * 2
                + 4
                + usize::from(plan.floor().is_some()) * 2
                + usize::from(plan.layers_compete()) * 2,
        )
    } else {
        let rows = targets.tail_capacity();
        (kept + rows, 0, kept.div_ceil(rows) + 1)
    };
    // Rows are projected when a prompt is whole: until then they have all their dimensions.
    let bases = plan.projects().map_or(0, |project| {
        project::most_bytes(project, shape.k_dim, shape.v_dim)
    });
    let (full, blocks) = (full + more, blocks + 2 * more.div_ceil(BLOCK_ROWS));
    let rows = full * row(Pair::both(targets.store)) + packed * row(targets.packed) + bases;
    let column = (kept + more + COLUMN_ROWS) * size_of::<f32>();
    let positions = if plan.interval().is_some() { column } else { 0 };
    let (own, shared) = if plan.head_scores() {
        (column, 0)
    } else {
        (0, column)
    };
    let own = match plan.method() {
        Some(method) if method.moments() => own + moments::values(group, shape.k_dim) * size_of::<f32>(),
        _ => own,
    };
    // A page may end early in every block.
    let pages = plan.attended(place).map_or(0, |_| {
        let bounds = 2 * shape.k_dim * size_of::<f32>();
        (kept.div_ceil(PAGE) + blocks) * bounds + blocks * BOUNDS_HEADER
    });
    // Each block's K and V end with whole cache lines. Keys that share a scale end with a whole tile, in every block that an
    // eviction may have left.
    let tile = (Layout::KeyChannels.step() - 1) * targets.packed.k.row_bytes(shape.k_dim);
    let tiles = match plan.interval() {
        _ if !targets.packed.channels => 0,
        Some(_) => blocks,
        None => 1,
    };
    let beside = extra_bytes(
        targets.packed.beside,
        packed.div_ceil(blocks.max(1)),
        (targets.packed.k, shape.k_dim),
        (targets.packed.v, shape.v_dim),
    );
    let padding = blocks * (HEADER + 2 * (LINE - 1) + beside) + tiles * tile;
    shape.kv_heads * (rows + padding + positions + own + pages) + shared
}

//! What is so from the start of the process to its end.

use cinch_protocol::Ladder;
use prometheus::{GaugeVec, IntGaugeVec, Opts, Registry};

use super::register::{add, gauge, signed};
use crate::memory;

pub(super) fn register(registry: &Registry, ladder: &Ladder, kernels: &str) -> prometheus::Result<()> {
    let build = IntGaugeVec::new(
        Opts::new(
            "cinch_build_info",
            "1; the versions, and the implementation of the kernels, are in the labels.",
        ),
        &["version", "mistralrs", "candle", "kernels"],
    )?;
    build
        .with_label_values(&[env!("CARGO_PKG_VERSION"), "0.8.1", "0.11.1", kernels])
        .set(1);
    add(registry, build)?;
    let ratios = GaugeVec::new(
        Opts::new(
            "cinch_ladder_bytes_ratio",
            "Bytes that a ladder level holds of those level 0 holds, as measured.",
        ),
        &["level", "name"],
    )?;
    for level in &ladder.levels {
        let number = level.level.to_string();
        let label = [number.as_str(), level.name.as_str()];
        ratios.with_label_values(&label).set(level.bytes_ratio);
    }
    add(registry, ratios)?;
    if let Some(limit) = memory::limit_bytes() {
        let name = "cinch_memory_limit_bytes";
        let help = "Memory that this process may use: the control group's limit, or the machine's memory.";
        gauge(registry, name, help)?.set(signed(limit));
    }
    #[cfg(target_os = "linux")]
    registry.register(Box::new(
        prometheus::process_collector::ProcessCollector::for_self(),
    ))?;
    Ok(())
}

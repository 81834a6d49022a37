//! This process's resident memory, as Linux counts it. What can't be read is absent, not zero.

/// Bytes resident now.
pub(super) fn resident() -> Option<u64> {
    status("VmRSS:")
}

/// The most bytes that were resident since the start, or since [`reset_peak`].
pub(super) fn peak() -> Option<u64> {
    status("VmHWM:")
}

/// Sets the peak back to what is resident now (proc(5), `clear_refs`: 5); false where the system does not.
pub(super) fn reset_peak() -> bool {
    std::fs::write("/proc/self/clear_refs", "5").is_ok()
}

fn status(field: &str) -> Option<u64> {
    kib(&std::fs::read_to_string("/proc/self/status").ok()?, field)
}

fn kib(status: &str, field: &str) -> Option<u64> {
    let line = status.lines().find_map(|line| line.strip_prefix(field))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_status() {
        let status = "VmPeak:\t  20 kB\nVmHWM:\t   12 kB\nVmRSS:\t    8 kB\n";
        assert_eq!(kib(status, "VmHWM:"), Some(12 << 10));
        assert_eq!(kib(status, "VmRSS:"), Some(8 << 10));
        assert_eq!(kib(status, "VmSwap:"), None);
    }
}

//! Logits are equal bit for bit only where the same instructions add in the same order: candle and gemm
//! choose kernels by CPU features and block sizes by cache sizes.

use std::collections::BTreeSet;

/// A name for this CPU's arithmetic, fit for a file name: model and the widest instruction set.
#[must_use]
pub fn cpu_key() -> String {
    key(&std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default())
}

fn key(cpuinfo: &str) -> String {
    let field = |name: &str| {
        cpuinfo
            .lines()
            .find_map(|line| line.split_once(':').filter(|(key, _)| key.trim() == name))
            .map_or("", |(_, value)| value.trim())
    };
    let flags: BTreeSet<&str> = field("flags").split_whitespace().collect();
    let widest = ["amx_int8", "avx512_vnni", "avx512f", "avx2", "sse4_2"]
        .into_iter()
        .find(|flag| flags.contains(flag))
        .unwrap_or("generic");
    let parts = [field("model name"), field("cpu family"), field("model"), widest];
    let text = parts.join(" ").to_lowercase();
    let words: Vec<&str> = text
        .split(|c: char| !c.is_ascii_alphanumeric())
        .filter(|word| !word.is_empty())
        .collect();
    words.join("-")
}

#[cfg(test)]
mod tests {
    use super::key;

    #[test]
    fn names_model_and_widest_set() {
        let info = "processor\t: 0\ncpu family\t: 25\nmodel\t\t: 1\nmodel name\t: AMD EPYC (R) 7B13\nflags\t\t: fpu avx2 sse4_2\n";
        assert_eq!(key(info), "amd-epyc-r-7b13-25-1-avx2");
        assert_eq!(key(""), "generic");
    }
}

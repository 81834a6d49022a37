//! The figures for people: Markdown, so that they can be pasted.

use std::fmt::Write;

use cinch_protocol::bench::Measured;

/// What was measured, on what, and a table a load.
pub(super) fn render(measured: &Measured) -> String {
    let mut out = format!(
        "{}, activations {}, {} threads, {}; {} new tokens, greedy; interleaved, medians over {} rounds{}\n",
        measured.model,
        measured.dtype,
        measured.threads,
        measured.cpu,
        measured.new_tokens,
        measured.rounds,
        measured.load_average.map_or_else(String::new, |load| format!(
            "; load average at the start {:.2}",
            load[0]
        )),
    );
    let mut load = None;
    for row in &measured.rows {
        if load != Some(&row.prompts) {
            load = Some(&row.prompts);
            out += &heading(&row.prompts);
        }
        let figures = &row.median;
        let peak = match (figures.loaded_peak_rss_bytes, figures.run_peak_rss_bytes) {
            (None, None) => "–".to_owned(),
            (loaded, run) => format!("{} / {}", megabytes(loaded), megabytes(run)),
        };
        // Writing to a string cannot fail.
        let _ = writeln!(
            out,
            "| {} | {} | {:.1} | {} | {:.1} | {:.0} | {:.1} | {:.1} | {:.1} | {peak} | {} |",
            row.system,
            row.kv,
            figures.prefill_tps,
            figures
                .decode_tps
                .map_or_else(|| "–".to_owned(), |tps| format!("{tps:.1}")),
            figures.total_tps,
            figures.ttft_p50_ms,
            figures.itl_p50_ms,
            figures.itl_p95_ms,
            figures.itl_p99_ms,
            megabytes(figures.kv_bytes),
        );
    }
    if !measured.kernel.is_empty() {
        out += "\nThe decode kernel by itself, against reading as a plain stream with as many threads:\n\n\
                | KV | GB/s of packed bytes | stream GB/s | of it |\n| --- | --- | --- | --- |\n";
        for row in &measured.kernel {
            let share = row.gb_s / row.roofline_gb_s * 100.0;
            let _ = writeln!(
                out,
                "| {} | {:.1} | {:.1} | {share:.0} % |",
                row.kv, row.gb_s, row.roofline_gb_s
            );
        }
    }
    out
}

fn heading(prompts: &[usize]) -> String {
    let what = match prompts {
        [one] => format!("A prompt of {one} tokens"),
        many => {
            let lengths: Vec<String> = many.iter().map(usize::to_string).collect();
            format!("{} prompts at once, of {} tokens", many.len(), lengths.join(", "))
        }
    };
    format!(
        "\n{what}:\n\n| system | KV | prefill tok/s | decode tok/s | total tok/s | TTFT ms | token p50 ms | p95 | p99 \
         | peak RSS MB, loaded / run | KV MB |\n| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |\n"
    )
}

fn megabytes(bytes: Option<u64>) -> String {
    bytes.map_or_else(|| "–".to_owned(), |bytes| format!("{:.1}", bytes as f64 / 1e6))
}

#[cfg(test)]
mod tests {
    use super::super::tests::measured;
    use super::*;

    #[test]
    fn one_table_a_load_and_nothing_made_up() {
        let text = render(&measured());
        assert!(text.starts_with("m.gguf, activations auto, 2 threads, a CPU; 8 new tokens, greedy; interleaved, medians over 3 rounds; load average at the start 0.25\n"), "{text}");
        assert_eq!(text.matches("| system |").count(), 3, "{text}");
        assert!(
            text.contains("A prompt of 64 tokens:")
                && text.contains("2 prompts at once, of 1024, 2048 tokens:")
        );
        assert!(
            text.contains(
                "| cinch | int4 | 300.0 | 70.0 | 150.0 | 20 | 14.0 | 15.0 | 16.0 | 300.0 / 350.0 | 2.5 |"
            ),
            "{text}"
        );
        assert!(
            text.contains("| llama.cpp | f16 | 500.0 | – | 250.0 | 20 | 14.0 | 15.0 | 16.0 | – | – |"),
            "{text}"
        );
        assert!(text.contains("| int4 | 10.0 | 20.0 | 50 % |"), "{text}");
    }
}

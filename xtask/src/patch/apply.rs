//! Applies a file's hunks, bottom-up, after every one of them has matched.

use super::{At, FilePatch, Finding, Hunk, PatchError};
use crate::digest;

/// The hash a hunk carries: of the `max(replace, 1)` lines from the 1-based `line`, each trimmed
/// (so that a re-indentation upstream does not count), joined by LF. `None` outside of the file;
/// one past its end, where a hunk may append, the hash is that of nothing.
pub(crate) fn hunk_hash(lines: &[&str], line: usize, replace: usize) -> Option<String> {
    let start = line.checked_sub(1)?;
    if replace == 0 && start == lines.len() {
        return Some(digest::bytes(b""));
    }
    let window = lines.get(start..start.checked_add(replace.max(1))?)?;
    let trimmed: Vec<_> = window.iter().map(|line| line.trim()).collect();
    Some(digest::bytes(trimmed.join("\n").as_bytes()))
}

/// The patched text of one file of crate `krate`, or why it cannot be.
pub(crate) fn apply(krate: &str, patch: &FilePatch, pristine: &[u8]) -> Result<String, PatchError> {
    let at = || (krate.to_owned(), patch.path.clone());
    let text = std::str::from_utf8(pristine).map_err(|_| {
        let (krate, path) = at();
        PatchError::NotText { krate, path }
    })?;
    let unhashed = patch.sha256.is_empty() || patch.hunks.iter().any(|hunk| hunk.sha256.is_empty());
    if unhashed {
        let (krate, path) = at();
        return Err(PatchError::Unhashed { krate, path });
    }
    let lines: Vec<&str> = text.split_inclusive('\n').collect();
    let given = digest::bytes(pristine);
    if given != patch.sha256 {
        let (krate, path) = at();
        let findings = patch.hunks.iter().map(|hunk| find(hunk, &lines)).collect();
        return Err(PatchError::UpstreamDiffers {
            krate,
            path,
            expected: patch.sha256.clone(),
            given,
            findings,
        });
    }
    let ordered = checked(krate, patch, &lines)?;
    let mut out: Vec<&str> = lines;
    let inserts: Vec<String> = ordered.iter().map(|hunk| ended(&hunk.insert)).collect();
    for (hunk, insert) in ordered.iter().zip(&inserts).rev() {
        let start = hunk.line - 1;
        out.splice(
            start..start + hunk.replace,
            (!insert.is_empty()).then_some(insert.as_str()),
        );
    }
    Ok(out.concat())
}

/// The hunks in line order (two insertions at one line: in the order written), each verified.
fn checked<'a>(krate: &str, patch: &'a FilePatch, lines: &[&str]) -> Result<Vec<&'a Hunk>, PatchError> {
    let at = |hunk: &Hunk| (krate.to_owned(), patch.path.clone(), hunk.name.clone());
    let mut ordered: Vec<_> = patch.hunks.iter().collect();
    ordered.sort_by_key(|hunk| hunk.line);
    for hunk in &ordered {
        let Some(given) = hunk_hash(lines, hunk.line, hunk.replace) else {
            let (krate, path, name) = at(hunk);
            let end = hunk.line.saturating_add(hunk.replace.max(1));
            return Err(PatchError::OutOfFile {
                krate,
                path,
                hunk: name,
                line: hunk.line,
                end,
                lines: lines.len(),
            });
        };
        if given != hunk.sha256 {
            let (krate, path, name) = at(hunk);
            let at = Box::new(At {
                krate,
                path,
                hunk: name,
                line: hunk.line,
            });
            return Err(PatchError::Hunk {
                at,
                expected: hunk.sha256.clone(),
                given,
            });
        }
    }
    for pair in ordered.windows(2) {
        if pair[0].line + pair[0].replace > pair[1].line {
            let (krate, path, first) = at(pair[0]);
            let second = pair[1].name.clone();
            return Err(PatchError::Overlap {
                krate,
                path,
                first,
                second,
                line: pair[1].line,
            });
        }
    }
    Ok(ordered)
}

fn find(hunk: &Hunk, lines: &[&str]) -> Finding {
    let matches = |line| hunk_hash(lines, line, hunk.replace).as_ref() == Some(&hunk.sha256);
    let name = hunk.name.clone();
    if matches(hunk.line) {
        return Finding::Matches {
            hunk: name,
            line: hunk.line,
        };
    }
    let found: Vec<_> = (1..=lines.len() + 1).filter(|&line| matches(line)).collect();
    if found.is_empty() {
        return Finding::Failed {
            hunk: name,
            line: hunk.line,
            expected: hunk.sha256.clone(),
        };
    }
    Finding::Moved {
        hunk: name,
        line: hunk.line,
        found,
    }
}

/// Our lines always end in one: the next line is upstream's.
fn ended(insert: &str) -> String {
    match insert {
        "" => String::new(),
        text if text.ends_with('\n') => text.to_owned(),
        text => format!("{text}\n"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PRISTINE: &str = "one\n  two\nthree\nfour\nfive\n";

    fn hunk(name: &str, line: usize, replace: usize, insert: &str) -> Hunk {
        let lines: Vec<_> = PRISTINE.split_inclusive('\n').collect();
        let sha256 = hunk_hash(&lines, line, replace).unwrap_or_else(|| "0".into());
        Hunk {
            name: name.into(),
            line,
            sha256,
            replace,
            insert: insert.into(),
        }
    }

    fn patch(hunks: Vec<Hunk>) -> FilePatch {
        FilePatch {
            path: "src/x.rs".into(),
            sha256: digest::bytes(PRISTINE.as_bytes()),
            hunks,
        }
    }

    fn run(hunks: Vec<Hunk>) -> Result<String, PatchError> {
        apply("host", &patch(hunks), PRISTINE.as_bytes())
    }

    #[test]
    fn inserts_replaces_deletes_and_appends_at_pristine_line_numbers() {
        let out = run(vec![
            hunk("append", 6, 0, "end"),
            hunk("before one", 1, 0, "zero\n"),
            hunk("swap", 2, 2, "TWO\nTHREE\nMORE\n"),
            hunk("delete", 5, 1, ""),
        ]);
        assert_eq!(out.unwrap(), "zero\none\nTWO\nTHREE\nMORE\nfour\nend\n");
    }

    #[test]
    fn two_insertions_at_one_line_keep_their_order() {
        let out = run(vec![
            hunk("a", 3, 0, "a\n"),
            hunk("b", 3, 0, "b\n"),
            hunk("c", 3, 1, "c\n"),
        ]);
        assert_eq!(out.unwrap(), "one\n  two\na\nb\nc\nfour\nfive\n");
    }

    #[test]
    fn a_patch_of_no_hunks_changes_nothing() {
        assert_eq!(run(vec![]).unwrap(), PRISTINE);
    }

    #[test]
    fn upstream_differing_names_each_hunk() {
        let hunks = vec![
            hunk("kept", 1, 0, "x"),
            hunk("shifted", 3, 1, "x"),
            hunk("gone", 5, 1, "x"),
        ];
        let differing = "one\nnew\n  two\n    three\nfour\nsix\n";
        let err = apply("host", &patch(hunks.clone()), differing.as_bytes()).unwrap_err();
        let message = err.to_string();
        let PatchError::UpstreamDiffers { findings, .. } = err else {
            panic!("{message}")
        };
        assert_eq!(
            findings,
            [
                Finding::Matches {
                    hunk: "kept".into(),
                    line: 1
                },
                Finding::Moved {
                    hunk: "shifted".into(),
                    line: 3,
                    found: vec![4]
                },
                Finding::Failed {
                    hunk: "gone".into(),
                    line: 5,
                    expected: hunks[2].sha256.clone()
                },
            ]
        );
        assert!(
            message.contains("src/x.rs") && message.contains("FAILED  \"gone\" at line 5"),
            "{message}"
        );
    }

    #[test]
    fn overlapping_hunks_are_refused() {
        let err = run(vec![hunk("wide", 2, 3, "x"), hunk("inside", 3, 0, "y")]).unwrap_err();
        assert!(matches!(err, PatchError::Overlap { line: 3, .. }), "{err}");
    }

    #[test]
    fn hunks_out_of_the_file_or_with_a_wrong_or_empty_hash_are_refused() {
        for (line, replace) in [(0, 0), (7, 0), (5, 2), (6, 1), (usize::MAX, 1)] {
            let err = run(vec![hunk("far", line, replace, "x")]).unwrap_err();
            assert!(matches!(err, PatchError::OutOfFile { .. }), "{err}");
        }
        let mut wrong = hunk("wrong", 2, 0, "x");
        wrong.line = 3;
        let message = run(vec![wrong]).unwrap_err().to_string();
        assert!(
            message.starts_with("host: src/x.rs: hunk \"wrong\" at line 3: expected sha256"),
            "{message}"
        );
        let mut empty = hunk("empty", 2, 0, "x");
        empty.sha256.clear();
        assert!(matches!(
            run(vec![empty]).unwrap_err(),
            PatchError::Unhashed { .. }
        ));
    }

    #[test]
    fn inserting_and_replacing_one_line_share_a_hash_and_indentation_does_not_count() {
        let lines: Vec<_> = PRISTINE.split_inclusive('\n').collect();
        assert_eq!(hunk_hash(&lines, 2, 0), hunk_hash(&lines, 2, 1));
        assert_eq!(hunk_hash(&lines, 2, 1), Some(digest::bytes(b"two")));
        assert_eq!(hunk_hash(&lines, 2, 2), Some(digest::bytes(b"two\nthree")));
    }
}

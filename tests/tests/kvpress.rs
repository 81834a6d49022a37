//! Selection methods beside kvpress, where it is installed: tests/kvpress says how to.

mod common;

#[test]
fn selection_is_as_close_to_the_full_cache_as_with_kvpress() {
    common::compare("kvpress", "CINCH_KVPRESS_PYTHON", "kvpress, transformers, gguf");
}

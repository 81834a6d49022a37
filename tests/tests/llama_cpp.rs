//! Quantized caches beside llama.cpp's, where it is installed: tests/llama_cpp says how to.

mod common;

#[test]
fn quantized_caches_are_as_close_to_the_full_one_as_in_llama_cpp() {
    common::compare("llama_cpp", "CINCH_LLAMA_CPP_PYTHON", "llama_cpp, numpy");
}

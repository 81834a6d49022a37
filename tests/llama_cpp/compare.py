"""Quantized caches beside llama.cpp's, on the same GGUF file and the same tokens.

A prompt is processed, the text that follows is forced a token at a time, and each step's distribution is compared with that of
the same system's f16 cache (Kullback-Leibler divergence, nats; change of perplexity). Cinch runs its serving path
(`cinch probe`), llama.cpp its C API with flash attention, as `cargo xtask bench --against llama.cpp` builds it. Bytes are what
each allocated (Cinch: the most that its blocks took; llama.cpp: the KV buffer in its log), over the f16 buffer in
llama.cpp's log, which has a place for each token and nothing else.

Both multiply in 8 bits, so that any change at all moves the logits. The rows "no change" show by how much: llama.cpp's f16
cache without flash attention, Cinch's `exact` store. llama.cpp rounds activations in blocks of 32 values; so does candle, but
for products that it repacks on CPUs with VNNI instructions, where blocks have 256 (of the demo model the second half of each
gated layer). That noise is the products' and as large as an 8-bit cache's whole effect, so Cinch is measured twice: as it
serves, and with `MISTRALRS_FORCE_AVX2=1`, with which candle repacks none of them.

Needs llama-cpp-python and numpy. Exits with 1 if, with the same blocks, llama.cpp has a cache to which none of ours of as many
bytes or fewer comes near: within TIMES of its divergence.
"""

import argparse
import ctypes
import re
import sys
import tempfile
from pathlib import Path

import llama_cpp as lib
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import probe  # noqa: E402

# Types of K and V.
CACHES = (("q8_0", "q8_0"), ("q8_0", "q4_0"), ("q4_0", "q8_0"), ("q5_1", "q5_1"), ("q4_0", "q4_0"))
# Bits of K and V, and what else is done to K.
POLICIES = (
    (8, 8, ""),
    (8, 4, ""),
    (8, 3, ""),
    (4, 4, ""),
    (4, 4, "rotated"),
    (4, 3, "rotated"),
    (4, 2, "rotated"),
    (3, 3, "rotated"),
    (4, 4, "per channel"),
    (3, 3, "per channel"),
)
FIELDS = {"": "", "rotated": ", rotate_k = true", "per channel": ', method = "kivi"'}
TIMES = 1.1
BATCH = 512
# llama.cpp's caches have a multiple of so many places: with as many tokens, none is empty.
PIECE = 256
# Of the bootstrap: consecutive steps that are drawn together, and how often all are drawn.
BLOCK, RESAMPLES = 16, 1000


class Llama:
    """llama.cpp on the same file."""

    def __init__(self, args):
        self.prefix, self.said = args.prefix, []
        # The callback must live as long as the library may call it.
        self.callback = lib.llama_log_callback(lambda level, text, data: self.said.append(text.decode()))
        lib.llama_log_set(self.callback, ctypes.c_void_p(0))
        lib.llama_backend_init()
        self.model = lib.llama_model_load_from_file(args.model.encode(), lib.llama_model_default_params())
        if not self.model:
            raise SystemExit(f"error: llama.cpp cannot load {args.model}")
        self.vocabulary = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(self.model))

    def run(self, tokens, k, v, flash=True):
        """Log-probabilities of each forced step, and the bytes of the cache's buffer."""
        params = lib.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = len(tokens), BATCH, BATCH
        # Speed is no matter, and one thread waits for no other.
        params.n_threads = params.n_threads_batch = 1
        attention = "ENABLED" if flash else "DISABLED"
        params.flash_attn_type = getattr(lib, f"LLAMA_FLASH_ATTN_TYPE_{attention}")
        params.type_k = getattr(lib, f"GGML_TYPE_{k.upper()}")
        params.type_v = getattr(lib, f"GGML_TYPE_{v.upper()}")
        self.said.clear()
        context = lib.llama_init_from_model(self.model, params)
        buffers = re.findall(r"KV buffer size = +([0-9.]+) MiB", "".join(self.said))
        if not context or not buffers:
            raise SystemExit(f"error: llama.cpp: no cache of {k} and {v}: {''.join(self.said)}")
        rows = []
        starts = [*range(0, self.prefix, BATCH), *range(self.prefix, len(tokens) - 1)]
        for start, end in zip(starts, [*starts[1:], len(tokens) - 1]):
            part = (lib.llama_token * (end - start))(*tokens[start:end])
            code = lib.llama_decode(context, lib.llama_batch_get_one(part, end - start))
            if code != 0:
                raise SystemExit(f"error: llama.cpp: llama_decode returned {code}")
            if end >= self.prefix:
                logits = lib.llama_get_logits_ith(context, -1)
                rows.append(np.ctypeslib.as_array(logits, (self.vocabulary,)).copy())
        lib.llama_free(context)
        return probe.log_softmax(np.stack(rows)), round(sum(map(float, buffers)) * 2**20)


class Measured:
    """A cache beside the f16 one of its system."""

    def __init__(self, name, forced, full, logits, size):
        steps = np.arange(len(forced))
        self.name, self.bytes = name, size
        self.kls = probe.divergences(full, logits)
        self.kl = self.kls.mean()
        self.perplexity = np.exp((full - logits)[steps, forced].mean()) - 1
        blocks = -(-len(forced) // BLOCK)
        first = np.random.default_rng(0).integers(0, len(forced) - BLOCK + 1, (RESAMPLES, blocks, 1))
        means = self.kls[first + np.arange(BLOCK)].mean(axis=(1, 2))
        self.low, self.high = np.quantile(means, (0.025, 0.975))

    def line(self, f16):
        return (
            f"| {self.name} | {self.bytes / f16:.4f} | {self.kl:.5f} | {self.low:.5f} to {self.high:.5f} "
            f"| {self.perplexity:+.2%} |"
        )


def name(policy):
    k, v, how = policy
    return f"K {k} {how}".strip() + f", V {v}"


def quantize(policy):
    k, v, how = policy
    return f"{{ quantize = {{ k_bits = {k}, v_bits = {v}{FIELDS[how]} }} }}"


def ours(cinch, tokens, forced):
    full, _ = cinch.run(tokens, "{}")
    for title, policy in (("no change", '{ store = "exact" }'), *((name(p), quantize(p)) for p in POLICIES)):
        yield Measured(title, forced, full, *cinch.run(tokens, policy))


def theirs(llama, tokens, forced, full):
    yield Measured("no change", forced, full, *llama.run(tokens, "f16", "f16", flash=False))
    for k, v in CACHES:
        yield Measured(k if k == v else f"K {k}, V {v}", forced, full, *llama.run(tokens, k, v))


def table(title, measured, f16):
    print(f"\n| {title} | bytes of f16 | KL | 95 % | perplexity |\n| --- | --- | --- | --- | --- |")
    sys.stdout.flush()
    caches = []
    for cache in measured:
        print(cache.line(f16), flush=True)
        if cache.name != "no change":
            caches.append(cache)
    return caches


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    probe.options(parser, prefix=1024, new=1024)
    args = parser.parse_args()
    length = args.prefix + args.new
    if length % PIECE:
        parser.error(f"--prefix and --new: given {length} tokens together, allowed multiples of {PIECE}")
    with tempfile.TemporaryDirectory() as folder:
        cinch = probe.Cinch(args, folder)
        same = probe.Cinch(args, folder, environment={"MISTRALRS_FORCE_AVX2": "1"})
        tokens = cinch.tokens()
        forced = np.array(tokens[args.prefix :])
        print(f"{args.prefix} tokens of prompt, {args.new} forced and scored")
        llama = Llama(args)
        full, f16 = llama.run(tokens, "f16", "f16")
        llama = table("llama.cpp", theirs(llama, tokens, forced, full), f16)
        systems = {
            "as it serves": table("Cinch as it serves", ours(cinch, tokens, forced), f16),
            "blocks of 32": table("Cinch, activations in blocks of 32", ours(same, tokens, forced), f16),
        }
    behind = []
    for title, caches in systems.items():
        print(f"\n| llama.cpp | KL | Cinch {title}, bytes no more | KL | lower |\n| --- | --- | --- | --- | --- |")
        for cache in llama:
            fits = [other for other in caches if other.bytes <= cache.bytes]
            best = min(fits, key=lambda other: other.kl, default=None)
            if best is None or best.kl > TIMES * cache.kl:
                behind += [cache.name] if caches is systems["blocks of 32"] else []
            found = "none | –" if best is None else f"{best.name}, {best.bytes / f16:.4f} | {best.kl:.5f}"
            lower = "yes" if best is not None and best.kl < cache.kl else "no"
            print(f"| {cache.name}, {cache.bytes / f16:.4f} | {cache.kl:.5f} | {found} | {lower} |")
    if behind:
        sys.exit("further from f16 than llama.cpp at as many bytes: " + ", ".join(behind))


if __name__ == "__main__":
    main()

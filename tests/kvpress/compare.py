"""Selection methods beside kvpress, on the same weights and tokens.

A prompt is compressed, the text that follows is forced, and each step's distribution is compared with that of the same
system's full cache (mean KL divergence). Cinch runs its serving path (`cinch probe`); kvpress runs transformers in f32 on
the weights of the same GGUF file. What differs between the two:

- The engine multiplies in 8 bits, so any change at all moves its logits a little. `floor` is the divergence of a policy that
  drops 1 % of the rows, and is taken off before comparing.
- The engine compresses a prompt chunk by chunk, kvpress once at its end.

Needs kvpress, transformers, gguf and torch. Exits with 1 if a method is further from the full cache than kvpress' own by more
than the tolerance.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import kvpress
import torch
from transformers import AutoModelForCausalLM, DynamicCache

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import probe  # noqa: E402

PRESSES = {
    "streaming": kvpress.StreamingLLMPress,
    "h2o": kvpress.ObservedAttentionPress,
    "snapkv": kvpress.SnapKVPress,
    "tova": kvpress.TOVAPress,
    "expected_attention": kvpress.ExpectedAttentionPress,
    "lagkv": kvpress.LagKVPress,
    "keydiff": kvpress.KeyDiffPress,
    "key_norm": kvpress.KnormPress,
}
BUDGETS = (0.5, 0.25)
# A method may be this many times as far from its full cache as kvpress' is, and so much in all cases.
TIMES, SLACK = 1.5, 0.004


class Kvpress:
    """transformers on the same weights."""

    def __init__(self, args):
        self.args, model = args, Path(args.model)
        self.model = AutoModelForCausalLM.from_pretrained(
            model.parent, gguf_file=model.name, dtype=torch.float32, attn_implementation="sdpa"
        ).eval()

    @torch.no_grad()
    def run(self, tokens, press):
        prefix, new = self.args.prefix, self.args.new
        ids, cache = torch.tensor([tokens]), DynamicCache()
        prompt = {"input_ids": ids[:, :prefix], "past_key_values": cache, "logits_to_keep": 1}
        if press is None:
            first = self.model(**prompt)
        else:
            # Observed attention needs the weights themselves.
            observed = isinstance(press, kvpress.ObservedAttentionPress)
            self.model.config._attn_implementation = "eager" if observed else "sdpa"
            with press(self.model):
                first = self.model(**prompt, output_attentions=observed)
            self.model.config._attn_implementation = "sdpa"
        kept = {layer.keys.shape[2] for layer in cache.layers}
        assert len(kept) == 1, kept
        (kept,), steps = kept, new - 1
        # Each forced token sees all rows that were kept, and the forced ones up to itself.
        mask = torch.zeros(1, 1, steps, kept + steps)
        mask[..., kept:] = torch.triu(torch.full((steps, steps), float("-inf")), 1)
        rest = self.model(
            ids[:, prefix : prefix + steps],
            past_key_values=cache,
            position_ids=torch.arange(prefix, prefix + steps)[None],
            attention_mask=mask,
        )
        logits = torch.cat([first.logits[0, -1:], rest.logits[0]])
        return probe.log_softmax(logits.numpy()), kept


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    probe.options(parser, prefix=1536, new=256)
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        cinch = probe.Cinch(args, folder)
        tokens = cinch.tokens()

        # No eviction but that of the prompt, as in kvpress.
        def policy(method, budget):
            return f'{{ select = {{ method = "{method}", budget = {budget}, interval = 1024 }} }}'

        full, _ = cinch.run(tokens, "{}")

        def divergence(policy):
            return probe.divergences(full, cinch.run(tokens, policy)[0]).mean()

        floor = divergence(policy("streaming", 0.99))
        theirs = Kvpress(args)
        their_full, _ = theirs.run(tokens, None)
        print(f"floor {floor:.4f}; {args.prefix} + {args.new} tokens")
        print(f"{'method':20} {'budget':>6} {'kvpress':>8} {'cinch':>8} {'- floor':>8}")
        worse = []
        for budget in BUDGETS:
            for method, press in PRESSES.items():
                logits, kept = theirs.run(tokens, press(1.0 - budget))
                assert kept == int(args.prefix * budget), (kept, args.prefix * budget)
                reference = probe.divergences(their_full, logits).mean()
                ours = divergence(policy(method, budget))
                print(f"{method:20} {budget:6} {reference:8.4f} {ours:8.4f} {ours - floor:8.4f}", flush=True)
                if ours - floor > TIMES * reference + SLACK:
                    worse.append(f"{method} at {budget}")
    if worse:
        sys.exit("further from the full cache than kvpress: " + ", ".join(worse))


if __name__ == "__main__":
    main()

"""The engine by way of `cinch probe`, and what is compared with it: for scripts that measure other systems beside it."""

import json
import os
import subprocess
from pathlib import Path

import numpy as np


def options(parser, prefix, new):
    """Adds what the engine is run with, and on which part of a text."""
    parser.add_argument("--cinch", required=True, help="the engine's binary")
    parser.add_argument("--config", default="configs/engine.toml")
    parser.add_argument("--model", required=True, help="a GGUF file of the Llama family")
    parser.add_argument("--text", required=True, help="plain text")
    parser.add_argument("--offset", type=int, default=20_000, help="characters to skip")
    parser.add_argument("--prefix", type=int, default=prefix, help="tokens that are compressed")
    parser.add_argument("--new", type=int, default=new, help="tokens that are forced")


def log_softmax(logits):
    """Of a row a step, f64."""
    logits = logits.astype(np.float64)
    logits -= logits.max(axis=1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


def divergences(full, other):
    """Kullback-Leibler divergence of each step, nats."""
    return (np.exp(full) * (full - other)).sum(axis=1)


class Cinch:
    """The engine, each time a process of its own; `args` are of `options`."""

    def __init__(self, args, folder, environment=None):
        self.args, self.folder = args, Path(folder)
        self.environment = {**os.environ, **(environment or {})}

    def probe(self, plan, policy):
        plan_file, report = self.folder / "plan.json", self.folder / "report.json"
        plan_file.write_text(json.dumps(plan))
        command = [self.args.cinch, "probe", "--config", self.args.config]
        for setting in (
            f"model.file={self.args.model}",
            "log.level=error",
            "engine.prefix_cache=false",
            f"class.default.policy={policy}",
        ):
            command += ["--set", setting]
        done = subprocess.run([*command, plan_file, report], env=self.environment, capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"cinch probe: {done.stderr}")
        return json.loads(report.read_text())

    def tokens(self):
        """Of the text, as many as are compressed and forced."""
        count = self.args.prefix + self.args.new
        text = Path(self.args.text).read_text()
        # More characters than the tokens can have.
        part = text[self.args.offset :][: 12 * count]
        tokens = self.probe({"groups": [], "timing": True, "tokenize": part}, "{}")["tokenized"]
        if len(tokens) < count:
            raise SystemExit(f"error: --text: given {len(tokens)} tokens, allowed {count} or more")
        return tokens[:count]

    def run(self, tokens, policy):
        """Log-probabilities of each forced step, and the most bytes that the cache took."""
        logits = self.folder / "logits.bin"
        prefix, new = self.args.prefix, self.args.new
        run = {"name": "text", "tokens": tokens[:prefix], "max_tokens": new, "force": tokens[prefix:]}
        report = self.probe({"groups": [[run]], "logits": str(logits)}, policy)
        rows = np.fromfile(logits, dtype="<f4").reshape(new, -1)
        return log_softmax(rows), report["kv_peak_bytes"]

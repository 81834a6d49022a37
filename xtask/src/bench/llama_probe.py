"""llama.cpp under the probe's plan: llama_probe.py MODEL KV THREADS PLAN.json REPORT.json

One request at a time, greedy, never ended by an end-of-text token; flash attention, the batch of 512 that
llama-cpp-python has by default. Times are from the first token sent to each token sampled. The C API is called
directly, so that Python is not what is measured.
"""

import ctypes
import json
import sys
import time

KV = {"f16": "GGML_TYPE_F16", "q8_0": "GGML_TYPE_Q8_0", "q4_0": "GGML_TYPE_Q4_0"}
BATCH = 512


def fail(message):
    sys.exit(f"error: llama.cpp: {message}")


def status(field):
    """Bytes that /proc says of this process; None where it says nothing."""
    try:
        with open("/proc/self/status", encoding="ascii") as lines:
            found = [line.split()[1] for line in lines if line.startswith(field)]
    except OSError:
        return None
    return int(found[0]) * 1024 if found else None


def reset_peak():
    try:
        with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
            file.write("5")
    except OSError:
        return False
    return True


def request(lib, context, sampler, run):
    """Prompt and new tokens of one request; the seconds after which each new one was sampled."""
    lib.llama_memory_clear(lib.llama_get_memory(context), False)
    start = time.perf_counter()
    steps = []

    def decode(tokens):
        array = (lib.llama_token * len(tokens))(*tokens)
        code = lib.llama_decode(context, lib.llama_batch_get_one(array, len(tokens)))
        if code != 0:
            fail(f"{run['name']}: llama_decode returned {code}")

    prompt = run["tokens"]
    for at in range(0, len(prompt), BATCH):
        decode(prompt[at : at + BATCH])
    while True:
        token = lib.llama_sampler_sample(sampler, context, -1)
        steps.append(time.perf_counter() - start)
        if len(steps) == run["max_tokens"]:
            return steps
        decode([token])


def main():
    if len(sys.argv) != 6:
        fail("usage: llama_probe.py MODEL KV THREADS PLAN.json REPORT.json")
    path, kv, threads, plan, out = sys.argv[1:]
    if kv not in KV:
        fail(f"KV: given {kv}, allowed {', '.join(KV)}")
    with open(plan, encoding="utf-8") as file:
        groups = json.load(file)["groups"]
    if any(len(group) != 1 for group in groups):
        fail("groups: given several requests at once, allowed one")
    try:
        import llama_cpp as lib
    except (ImportError, OSError, RuntimeError) as error:
        fail(f"cannot load llama-cpp-python: {error}")

    # It says a lot; the callback must live as long as the library may call it.
    quiet = lib.llama_log_callback(lambda level, text, data: None)
    lib.llama_log_set(quiet, ctypes.c_void_p(0))
    lib.llama_backend_init()
    model = lib.llama_model_load_from_file(path.encode(), lib.llama_model_default_params())
    if not model:
        fail(f"cannot load {path}")
    params = lib.llama_context_default_params()
    longest = max((len(run["tokens"]) + run["max_tokens"] for group in groups for run in group), default=1)
    # Its cache is allocated whole, and comes in pieces of 256.
    params.n_ctx = -(-longest // 256) * 256
    params.n_batch = params.n_ubatch = BATCH
    params.n_threads = params.n_threads_batch = int(threads)
    params.flash_attn_type = lib.LLAMA_FLASH_ATTN_TYPE_ENABLED
    params.type_k = params.type_v = getattr(lib, KV[kv])
    context = lib.llama_init_from_model(model, params)
    if not context:
        fail(f"no context of {params.n_ctx} tokens in {kv}")
    sampler = lib.llama_sampler_init_greedy()

    report = {
        "context": lib.llama_model_n_ctx_train(model),
        "loaded_rss": status("VmRSS:"),
        "loaded_peak_rss": status("VmHWM:"),
        "group_peak_rss": [],
        "group_seconds": [],
        "runs": [],
    }
    for (run,) in groups:
        fresh = reset_peak()
        steps = request(lib, context, sampler, run)
        report["group_seconds"].append(steps[-1])
        report["group_peak_rss"].append(status("VmHWM:") if fresh else None)
        report["runs"].append(
            {
                "name": run["name"],
                "prompt_tokens": len(run["tokens"]),
                "answered_tokens": len(steps),
                "first_token_seconds": steps[0],
                "seconds": steps[-1],
                "step_seconds": steps,
                "prompt": run["tokens"],
                "tokens": [],
                "gaps": [],
                "hashes": [],
                "texts": [],
            }
        )
    with open(out, "w", encoding="utf-8") as file:
        json.dump(report, file)


main()

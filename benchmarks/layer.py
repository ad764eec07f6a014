"""A slice of DeepSeek-V3 at true dimensions on a GPU (1 dense and 2 MoE layers and the head, BF16): one decode step
and a prefill, this package against transformers' own class, same weights, taking turns, both launched kernel by
kernel; and our step as `generate` runs it, replayed from a CUDA graph.
"""

import sys
from pathlib import Path

# Run as a script, Python looks for modules beside it, where kernels.py would pass for the `kernels` package.
sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from transformers import DynamicCache
from transformers.models.deepseek_v3.configuration_deepseek_v3 import DeepseekV3Config as NativeConfig
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3ForCausalLM as NativeForCausalLM

from benchmarks.common import finish, parser
from deepseek_v3 import DeepseekV3ForCausalLM, LatentCache
from deepseek_v3.configuration import preset

POINTS = [(1, 1024), (1, 32768), (1, 131072), (16, 8192), (64, 4096), (128, 4096)]
PREFILL = [4096, 16384]


def models():
    """Ours and transformers' own over one set of random weights on the GPU."""
    overrides = {"num_hidden_layers": 3, "first_k_dense_replace": 1, "num_nextn_predict_layers": 0}
    config = preset("deepseek-v3", **overrides, quantization_config=None)
    native_config = NativeConfig.from_dict({**config.to_dict(), "num_mtp_layers": 0, "quantization_config": None})
    built = []
    for cls, one in ((DeepseekV3ForCausalLM, config), (NativeForCausalLM, native_config)):
        one._attn_implementation = "sdpa"
        with torch.device("meta"):
            built.append(cls(one).to(torch.bfloat16).eval())
    ours, native = built
    torch.manual_seed(0)
    weights = {}
    for name, tensor in ours.state_dict().items():
        if name.endswith("e_score_correction_bias"):
            weights[name] = torch.zeros(tensor.shape, device="cuda")
        else:
            weights[name] = torch.empty(tensor.shape, dtype=torch.bfloat16, device="cuda")
            weights[name].fill_(1) if "norm" in name else weights[name].normal_(std=0.02)
    for model in built:
        model.load_state_dict(weights, assign=True)
        rotary = type(model.model.rotary_emb)(model.config)
        model.model.rotary_emb = rotary.to("cuda")
    return ours, native


def fill(cache, config, batch, tokens):
    for layer in range(config.num_hidden_layers):
        shape = (batch, 1, tokens)
        latent = torch.randn(*shape, config.kv_lora_rank, dtype=torch.bfloat16, device="cuda")
        rope = torch.randn(*shape, config.qk_rope_head_dim, dtype=torch.bfloat16, device="cuda")
        cache.update(latent, rope, layer)
    return cache


def timed(functions, rounds):
    """Milliseconds of each function, medians of turns."""
    times = {name: [] for name in functions}
    for turn in range(rounds + 2):
        for name, function in functions.items():
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            function()
            end.record()
            torch.cuda.synchronize()
            if turn >= 2:
                times[name].append(start.elapsed_time(end))
    return {name: sorted(values)[len(values) // 2] for name, values in times.items()}


def agreement(ours, native):
    """Cosine of each token's logits. The median over tokens is what counts: in BF16 a token near the border of two
    experts goes to one here and to the other there."""
    return torch.nn.functional.cosine_similarity(ours.flatten(0, 1).float(), native.flatten(0, 1).float(), dim=-1)


def decode_point(ours, native, batch, tokens, rounds):
    caches = {}
    for name, model, cache in (
        ("ours", ours, LatentCache(ours.config)),
        ("native", native, DynamicCache(config=native.config)),
    ):
        torch.manual_seed(1)
        caches[name] = (model, fill(cache, ours.config, batch, tokens))
    step = torch.arange(batch, device="cuda")[:, None] + 7

    def run(name, new=step, **more):
        model, cache = caches[name]
        logits = model(new, past_key_values=cache, **more).logits
        cache.crop(-1)
        return logits

    graphs = ours.model.decode_graphs(caches["ours"][1], None)

    def replayed():
        cache = caches["ours"][1]
        cache.graphs = graphs
        logits = run("ours", mla_spans=graphs.spans(cache, batch, 1))
        cache.graphs = None
        return logits

    first = run("ours")
    if not all(torch.equal(replayed(), first) for _ in range(3)):
        sys.exit("a replayed step differs from a launched one, nothing is reported")
    rows = [agreement(run("ours", step + i), run("native", step + i)) for i in range(8 if batch == 1 else 1)]
    close = torch.cat(rows).median()
    times = timed({**{name: lambda name=name: run(name) for name in caches}, "replayed": replayed}, rounds)
    return {"batch": batch, "tokens": tokens, "cosine": close.item(), **times}


def prefill_point(ours, native, tokens, rounds):
    ids = torch.randint(0, 129280, (1, tokens), device="cuda")

    def run(model, keep=1):
        return model(ids, use_cache=True, logits_to_keep=keep).logits

    close = agreement(run(ours, 64), run(native, 64)).median()
    times = timed({"ours": lambda: run(ours), "native": lambda: run(native)}, rounds)
    return {"batch": 1, "tokens": tokens, "prefill": True, "cosine": close.item(), **times}


@torch.inference_mode()
def main():
    args = parser(__doc__)
    args.add_argument("--rounds", type=int, default=7)
    options = args.parse_args()
    ours, native = models()
    points = []
    for batch, tokens in POINTS:
        points.append(decode_point(ours, native, batch, tokens, options.rounds))
        torch.cuda.empty_cache()
    points += [prefill_point(ours, native, tokens, options.rounds) for tokens in PREFILL]
    wrong = [point for point in points if not point["cosine"] > 0.99]
    if wrong:
        sys.exit(f"the logits differ, nothing is reported: {wrong}")
    rows = []
    for point in points:
        kind = "prefill" if "prefill" in point else "decode"
        speedup = point["native"] / point["ours"]
        graph = point.get("replayed", float("nan"))
        values = [point["cosine"], point["ours"], graph, point["native"], speedup, point["native"] / graph]
        rows.append([kind, point["batch"], point["tokens"], *values])
    columns = ["what", "batch", "tokens", "cosine", "ours ms", "replayed ms", "native ms", "times faster", "replayed"]
    finish("layer", columns, rows, {"points": points}, options.output)


if __name__ == "__main__":
    main()

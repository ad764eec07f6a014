"""One decode step: this package against transformers' own class, same weights, one process, taking turns.

Correctness comes first: no time is printed where the two steps' logits differ.
"""

import sys
from pathlib import Path

# Run as a script, Python looks for modules beside it, where kernels.py would pass for the `kernels` package.
sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from transformers import DynamicCache
from transformers.models.deepseek_v3.configuration_deepseek_v3 import DeepseekV3Config as NativeConfig
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3ForCausalLM as NativeForCausalLM

from benchmarks.common import alternate, finish, parser, ratio
from deepseek_v3 import DeepseekV3ForCausalLM, LatentCache
from deepseek_v3.configuration import account, preset

SHAPE = {
    "hidden_size": 1024,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "kv_lora_rank": 512,
    "q_lora_rank": 384,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
    "num_hidden_layers": 4,
    "intermediate_size": 2048,
    "moe_intermediate_size": 512,
    "n_routed_experts": 16,
    "num_nextn_predict_layers": 0,
    "max_position_embeddings": 32768,
}


def models():
    """Ours and transformers' own with the same weights."""
    torch.manual_seed(0)
    ours = DeepseekV3ForCausalLM(preset("small", **SHAPE)).eval()
    values = {**ours.config.to_dict(), "num_mtp_layers": 0}
    native = NativeForCausalLM(NativeConfig.from_dict(values)).eval()
    native.load_state_dict(ours.state_dict())
    return ours, native


def fill(cache, config, tokens):
    """Random latents of `tokens` tokens in every layer, the same in both kinds of cache."""
    generator = torch.Generator().manual_seed(1)
    for layer in range(config.num_hidden_layers):
        latent = torch.randn(1, 1, tokens, config.kv_lora_rank, generator=generator)
        rope = torch.randn(1, 1, tokens, config.qk_rope_head_dim, generator=generator)
        cache.update(latent, rope, layer)
    return cache


def measure(ours, native, tokens, rounds):
    """Logits' relative difference and the seconds of one step, the cache cropped back after each."""
    caches = {"ours": fill(LatentCache(ours.config), ours.config, tokens)}
    caches["native"] = fill(DynamicCache(config=native.config), ours.config, tokens)
    step = torch.tensor([[7]])

    def decode(name, model):
        logits = model(step, past_key_values=caches[name]).logits
        caches[name].crop(-1)
        return logits

    mine, theirs = decode("ours", ours), decode("native", native)
    difference = ((mine - theirs).norm() / theirs.norm()).item()
    if not difference < 1e-5:
        sys.exit(f"the two steps differ by {difference:.1e} at {tokens} tokens; nothing is timed")
    seconds = alternate({"ours": lambda: decode("ours", ours), "native": lambda: decode("native", native)}, rounds)
    expected = account(ours.config).cache_bytes_per_token("float32")
    assert caches["ours"].bytes_per_token() == expected, "the cache holds more than the accounting says"
    return difference, seconds, caches["ours"].bytes_per_token()


@torch.inference_mode()
def main():
    args = parser(__doc__)
    args.add_argument("--rounds", type=int, default=5)
    args.add_argument("--tokens", type=int, nargs="+", default=[1024, 4096, 16384])
    options = args.parse_args()
    ours, native = models()
    rows, points = [], []
    for tokens in options.tokens:
        difference, seconds, size = measure(ours, native, tokens, options.rounds)
        speedup = ratio(seconds["native"], seconds["ours"])
        fastest = {name: min(values) for name, values in seconds.items()}
        rows.append([tokens, difference, speedup["median"], speedup["min"], speedup["max"], size])
        points.append({"cached_tokens": tokens, "difference": difference, "speedup": speedup, "seconds": fastest})
    times = {point["cached_tokens"]: point["seconds"]["ours"] for point in points}
    growth = times[max(times)] / times[min(times)]
    data = {"shape": SHAPE, "points": points, "our_step_longest_over_shortest": growth, "cache_bytes_per_token": size}
    columns = ["cached tokens", "rel. difference", "times faster", "min", "max", "cache B/token"]
    print(f"our step at {max(times)} tokens costs {growth:.2f} x that at {min(times)}")
    finish("decode", columns, rows, data, options.output)


if __name__ == "__main__":
    main()

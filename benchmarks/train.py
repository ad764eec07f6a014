"""Forward and backward of one dense and one MoE layer of DeepSeek-V3 at true dimensions on a GPU: FP8 training, the
same class in BF16 and transformers' own class in BF16, same weights, taking turns. `--tiny` runs small ones anywhere.

What is timed is a micro-batch: FP8 codes of the weights are there, as in all but the first micro-batch of an
optimizer step; what making them costs is timed apart, as is a step at which the guard rails count what FP8 loses.
"""

import sys
from pathlib import Path

# Run as a script, Python looks for modules beside it, where kernels.py would pass for the `kernels` package.
sys.path[0] = str(Path(__file__).resolve().parents[1])

import json
import time

import torch
from torch.nn.functional import cosine_similarity
from transformers.models.deepseek_v3.configuration_deepseek_v3 import DeepseekV3Config as NativeConfig
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3ForCausalLM as NativeForCausalLM

from benchmarks.common import finish, parser
from deepseek_v3 import DeepseekV3ForCausalLM, FP8Recipe, enable_fp8_training
from deepseek_v3.configuration import preset
from deepseek_v3.training.fp8.enable import fp8_modules

# Measured on an H200: matrix products of 8192 x 8192 x 8192, TFLOP/s.
PEAK = {"bf16": 780e12, "fp8": 1220e12}
SEQUENCE = 4096
HEAD_START = 30_000_000  # cycles, about 15 ms: the host runs ahead of the device, as it does in training
OVERRIDES = {"num_hidden_layers": 2, "first_k_dense_replace": 1, "num_nextn_predict_layers": 0, "vocab_size": 1024}
TINY = {"hidden_size": 256, "intermediate_size": 512, "moe_intermediate_size": 128, "n_routed_experts": 16}
TINY |= {"num_attention_heads": 4, "num_key_value_heads": 4, "q_lora_rank": 128, "kv_lora_rank": 128, "n_group": 4}
TINY |= {"topk_group": 2, "num_experts_per_tok": 4}


def build(device, tiny, recipe):
    """{name: model} over one set of random weights; the gradients are each model's own."""
    config = preset("deepseek-v3", **OVERRIDES, **(TINY if tiny else {}), quantization_config=None, pad_token_id=None)
    native = NativeConfig.from_dict({**config.to_dict(), "num_mtp_layers": 0, "quantization_config": None})
    torch.manual_seed(0)
    weights, models = {}, {}
    for name, cls, one in (
        ("fp8", DeepseekV3ForCausalLM, config),
        ("bf16", DeepseekV3ForCausalLM, config),
        ("native", NativeForCausalLM, native),
    ):
        one._attn_implementation = "sdpa"
        with torch.device("meta"):
            model = cls(one).to(torch.bfloat16).train()
        for key, tensor in model.state_dict().items():
            if key in weights:
                continue
            if key.endswith("e_score_correction_bias"):
                weights[key] = torch.zeros(tensor.shape, device=device)
                continue
            weights[key] = torch.empty(tensor.shape, dtype=torch.bfloat16, device=device)
            weights[key].fill_(1) if "norm" in key else weights[key].normal_(std=tensor.shape[-1] ** -0.5)
        model.load_state_dict(weights, assign=True)
        model.model.rotary_emb = type(model.model.rotary_emb)(one).to(device)
        models[name] = model
    if device == "cuda":
        models["bf16"].set_experts_implementation("deepseek_v3")
    enable_fp8_training(models["fp8"], recipe)
    return models


class Step:
    """One layer's forward and backward over fixed tokens."""

    def __init__(self, model, index, x, dy):
        self.layer, self.dy = model.model.layers[index], dy
        self.x = x.detach().clone().requires_grad_()
        positions = torch.arange(x.shape[1], device=x.device)[None]
        self.angles = model.model.rotary_emb(x, positions)

    def forward(self):
        out = self.layer(self.x, position_embeddings=self.angles, attention_mask=None)
        return out[0] if isinstance(out, tuple) else out

    def __call__(self):
        self.forward().backward(self.dy)

    def clear(self):
        self.x.grad = None
        for parameter in self.layer.parameters():
            parameter.grad = None

    def counted(self):
        """A step of those at which the guard rails count what FP8 loses."""
        states = [module.fp8.statistics for module in fp8_modules(self.layer)]
        for statistics in states:
            statistics.active = True
        self()
        for statistics in states:
            statistics.active = False

    def forget_codes(self):
        for module in fp8_modules(self.layer):
            module.fp8.codes.clear()


def compare(steps):
    """Cosines between FP8 and BF16. Of output and input gradient the median over tokens: near the border of two
    experts a token goes to one here and to the other there; of weight gradients the least."""
    found = {}
    for name in ("fp8", "bf16"):
        step = steps[name]
        out = step.forward()
        out.backward(step.dy)
        found[name] = out.detach(), step.x.grad.detach(), {n: p.grad for n, p in step.layer.named_parameters()}
        step.x.grad = None
    (out, dx, left), (other, dx_other, right) = found["fp8"], found["bf16"]
    weights = {}
    for key, grad in left.items():
        weights[key] = _cosine(grad, right[key])
    tokens = [cosine_similarity(a.flatten(0, 1).float(), b.flatten(0, 1).float(), dim=-1).median().item()
              for a, b in ((out, other), (dx, dx_other))]  # fmt: skip
    for step in steps.values():
        step.clear()
    # The router's gradient is the small difference of its experts' outputs; it is listed, not judged.
    least = min(value for key, value in weights.items() if not key.endswith("gate.weight"))
    return {"output": tokens[0], "input_gradient": tokens[1], "least_weight_gradient": least, "weights": weights}


def _cosine(a, b):
    """In pieces: a stack of experts is too large to widen whole."""
    dots = torch.zeros(3, dtype=torch.float64, device=a.device)
    for x, y in zip(a.flatten().split(1 << 26), b.flatten().split(1 << 26), strict=True):
        x, y = x.float(), y.float()
        dots += torch.stack((x @ y, x @ x, y @ y))
    return (dots[0] / (dots[1] * dots[2]).sqrt()).item()


def activation_bytes(step, device):
    """Bytes that the forward leaves for the backward, and its peak."""
    if device != "cuda":
        return None, None
    step()
    step.clear()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = step.forward()
    torch.cuda.synchronize()
    kept, peak = torch.cuda.memory_allocated() - before, torch.cuda.max_memory_allocated() - before
    out.backward(step.dy)
    step.clear()
    return kept, peak


def timed(functions, clears, device, rounds):
    """Milliseconds of each function, every one in each round."""
    times = {name: [] for name in functions}
    for turn in range(rounds + 1):
        for name, function in functions.items():
            if device == "cuda":
                start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                torch.cuda._sleep(HEAD_START)
                start.record()
                function()
                end.record()
                torch.cuda.synchronize()
                elapsed = start.elapsed_time(end)
            else:
                begin = time.perf_counter()
                function()
                elapsed = 1e3 * (time.perf_counter() - begin)
            clears[name]()
            if turn:
                times[name].append(elapsed)
    return {name: sorted(values)[len(values) // 2] for name, values in times.items()}


def by_kernel(step, device, most=30):
    """Where an FP8 step's device time goes: [name, launches, milliseconds, share]."""
    activities = [torch.profiler.ProfilerActivity.CUDA] if device == "cuda" else [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as profile:
        step()
        if device == "cuda":
            torch.cuda.synchronize()
    step.clear()
    field = "self_device_time_total" if device == "cuda" else "self_cpu_time_total"
    events = sorted(profile.key_averages(), key=lambda event: -getattr(event, field))
    whole = sum(getattr(event, field) for event in events) or 1
    return [[e.key[:90], e.count, getattr(e, field) / 1e3, getattr(e, field) / whole] for e in events[:most]]


def floors(config, index, batch, length):
    """Milliseconds at the measured peaks: products of the linears in either format, attention itself in BF16."""
    heads, qk, v = config.num_attention_heads, config.qk_nope_head_dim + config.qk_rope_head_dim, config.v_head_dim
    d, latent = config.hidden_size, config.kv_lora_rank
    linears = d * config.q_lora_rank + config.q_lora_rank * heads * qk + d * (latent + config.qk_rope_head_dim)
    linears += latent * heads * (config.qk_nope_head_dim + v) + heads * v * d
    experts = config.num_experts_per_tok + config.n_shared_experts
    linears += 3 * d * (experts * config.moe_intermediate_size if index else config.intermediate_size)
    products = 6 * linears * batch * length
    # Causal: half. Forward QK and PV, backward QK, dV, dP, dQ, dK.
    core = batch * heads * length * length * (4 * qk + 3 * v)
    return {kind: 1e3 * (products / PEAK[kind] + core / PEAK["bf16"]) for kind in PEAK}


def point(models, index, batch, length, device, rounds):
    config = models["fp8"].config
    torch.manual_seed(1)
    x, dy = (torch.randn(batch, length, config.hidden_size, device=device).bfloat16() for _ in range(2))
    steps = {name: Step(model, index, x, dy) for name, model in models.items()}
    cosines = compare(steps)
    kept = {name: activation_bytes(step, device) for name, step in steps.items()}

    def with_codes():
        steps["fp8"].forget_codes()
        steps["fp8"]()

    more = {"fp8_quantising_weights": with_codes, "fp8_counting": steps["fp8"].counted}
    functions, clears = {**steps, **more}, {name: steps.get(name, steps["fp8"]).clear for name in (*steps, *more)}
    ms = timed(functions, clears, device, rounds)
    result = {"layer": "moe" if index else "dense", "tokens": batch * length, "cosine": cosines, "ms": ms}
    result["activation_bytes"] = {name: {"kept": k, "peak": p} for name, (k, p) in kept.items()}
    result["floor_ms"] = floors(config, index, batch, length)
    result["kernels"] = by_kernel(steps["fp8"], device)
    steps["fp8"].forget_codes()
    return result


def main():
    args = parser(__doc__)
    args.add_argument("--rounds", type=int, default=5)
    args.add_argument("--tiny", action="store_true", help="small layers, on the CPU where there is no GPU")
    args.add_argument("--batch", type=int, nargs="+", default=[1, 2], help="sequences of 4,096 tokens")
    args.add_argument("--recipe", default="{}", help="fields of FP8Recipe as JSON (default: its own defaults)")
    options = args.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not options.tiny:
        sys.exit("true dimensions need a GPU; --tiny runs small layers here")
    recipe = FP8Recipe(**{"wgrad_dtype": "bfloat16", **json.loads(options.recipe)})
    models = build(device, options.tiny, recipe)
    length = 128 if options.tiny else SEQUENCE
    points = []
    for index in (0, 1):
        for batch in options.batch:
            begin = time.perf_counter()
            points.append(point(models, index, batch, length, device, 1 if options.tiny else options.rounds))
            print(f"# {points[-1]['layer']} {points[-1]['tokens']}: {time.perf_counter() - begin:.0f} s", flush=True)
            if device == "cuda":
                torch.cuda.empty_cache()
    report(points, models, recipe, options.output)


def report(points, models, recipe, output):
    # Weight gradients hold the tokens that went to another expert.
    bounds = {"output": 0.99, "input_gradient": 0.99, "least_weight_gradient": 0.9}
    wrong = [p for p in points if any(not p["cosine"][key] > bound for key, bound in bounds.items())]
    if wrong:
        sys.exit(
            f"FP8 and BF16 differ, nothing is reported: {[(p['layer'], p['tokens'], p['cosine']) for p in wrong]}"
        )
    rows = []
    for p in points:
        ms, kept = p["ms"], p["activation_bytes"]
        p["faster_than"] = {name: ms[name] / ms["fp8"] for name in ("bf16", "native")}
        smaller = kept["fp8"]["kept"] / kept["bf16"]["kept"] if kept["bf16"]["kept"] else None
        p["activations_over_bf16"] = smaller
        row = [p["layer"], p["tokens"], p["cosine"]["output"], p["cosine"]["input_gradient"]]
        row += [ms["fp8"], ms["bf16"], ms["native"], *p["faster_than"].values()]
        rows.append([*row, p["floor_ms"]["fp8"] / ms["fp8"], ms["fp8_quantising_weights"] - ms["fp8"], smaller])
    for p in points:
        print(f"\n{p['layer']}, {p['tokens']} tokens: share of the FP8 step, ms, launches, kernel")
        for name, launches, ms, share in p["kernels"]:
            print(f"{share:6.1%} {ms:8.3f} {launches:4d}  {name}")
    columns = ["layer", "tokens", "cos out", "cos dx", "fp8 ms", "bf16 ms", "native ms", "x bf16", "x native"]
    columns += ["of floor", "weights ms", "memory"]
    kinds = {name: str(getattr(model.config, "_experts_implementation", None)) for name, model in models.items()}
    data = {"points": points, "recipe": vars(recipe), "peaks": PEAK, "experts_implementation": kinds}
    finish("train", columns, rows, data, output)


if __name__ == "__main__":
    main()

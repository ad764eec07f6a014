"""BF16 against FP8 training: same seed, same data, three seeds, on the source of Python's standard library; and the
experts' balance with and without the moving bias. `--tiny` is the small form for the CPU.

Both train float32 master weights with the same optimizer under BF16 autocast. What is compared is the mean loss of
the last tenth of the steps.
"""

import sys
from pathlib import Path

# Run as a script, Python looks for modules beside it, where kernels.py would pass for the `kernels` package.
sys.path[0] = str(Path(__file__).resolve().parents[1])

import math
import time

import torch

from benchmarks.common import finish, parser
from deepseek_v3 import DeepseekV3Config, DeepseekV3ForCausalLM, enable_fp8_training
from deepseek_v3.training import AdamWBF16, update_router_bias
from deepseek_v3.training.data import pack, read_texts, text_files, train_tokenizer
from deepseek_v3.training.demo import library_sources

# About 230 M parameters; every width is a multiple of 128.
LARGE = {"hidden_size": 1024, "intermediate_size": 2816, "moe_intermediate_size": 384, "num_hidden_layers": 7}
LARGE |= {"n_routed_experts": 24, "num_experts_per_tok": 4, "num_attention_heads": 8, "num_key_value_heads": 8}
LARGE |= {"q_lora_rank": 512, "kv_lora_rank": 256, "vocab_size": 8192}
SMALL = {"hidden_size": 128, "intermediate_size": 256, "moe_intermediate_size": 128, "num_hidden_layers": 2}
SMALL |= {"n_routed_experts": 8, "num_experts_per_tok": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
SMALL |= {"q_lora_rank": 128, "kv_lora_rank": 128, "vocab_size": 1024}
COMMON = {"first_k_dense_replace": 1, "n_group": 4, "topk_group": 2, "n_shared_experts": 1, "qk_nope_head_dim": 64}
COMMON |= {"qk_rope_head_dim": 64, "v_head_dim": 128, "num_nextn_predict_layers": 0, "initializer_range": 0.02}
SEEDS = (0, 1, 2)


def tokens_of(shape, length, most_bytes):
    """[n, length] token ids of the library's source."""
    texts = [text for _, text in read_texts(text_files(library_sources()), most_bytes)]
    tokenizer = train_tokenizer(texts[:200], shape["vocab_size"])
    return torch.tensor(pack(texts, tokenizer, length)["input_ids"])


def model_for(shape, seed, kind, device):
    torch.manual_seed(seed)
    model = DeepseekV3ForCausalLM(DeepseekV3Config(**COMMON | shape)).to(device).train()
    if device == "cuda":
        model.set_experts_implementation("deepseek_v3")
    return enable_fp8_training(model) if kind == "fp8" else model


class Run:
    """One training: `step()` by `step()`, the losses kept on the device."""

    def __init__(self, shape, data, seed, kind, steps, options, device, gamma):
        self.model = model_for(shape, seed, kind, device)
        self.optimizer = AdamWBF16(self.model.parameters(), lr=options.learning_rate)
        self.data, self.batch, self.steps, self.device, self.gamma = data, options.batch, steps, device, gamma
        self.order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))
        self.losses, self.violations, self.done = [], [], 0

    def step(self):
        picked = [self.order[(self.done * self.batch + i) % len(self.order)] for i in range(self.batch)]
        ids = self.data[torch.stack(picked)].to(self.device)
        warm, rate = max(1, self.steps // 20), self.done / max(1, self.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = (
                group["initial"] * min(1.0, (self.done + 1) / warm) * (0.55 + 0.45 * math.cos(math.pi * rate))
            )
        with torch.autocast(self.device, dtype=torch.bfloat16):
            loss = self.model(ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        loads = [load for load in update_router_bias(self.model, self.gamma) if load is not None]
        self.losses.append(loss.detach())
        self.violations.append(torch.stack([load.max() / load.mean() - 1 for load in loads]).mean())
        self.done += 1

    def train(self):
        for group in self.optimizer.param_groups:
            group["initial"] = group["lr"]
        for _ in range(self.steps):
            self.step()
        last = max(1, self.steps // 10)
        losses = torch.stack(self.losses).float()
        if not bool(losses.isfinite().all()):
            sys.exit(f"a loss is not finite: {losses.tolist()}")
        return {
            "loss": losses[-last:].mean().item(),
            "first_loss": losses[0].item(),
            "max_vio": torch.stack(self.violations[-last:]).mean().item(),
            "losses": losses.tolist()[:: max(1, self.steps // 50)],
        }


def steps_within(shape, data, options, device, runs, seconds):
    """How many steps of each run fit, from timed steps of both kinds (compilation left out)."""
    spent = 0.0
    for kind in ("bf16", "fp8"):
        run = Run(shape, data, 0, kind, 8, options, device, 0.0)
        for group in run.optimizer.param_groups:
            group["initial"] = group["lr"]
        for i in range(8):
            if i == 3:
                float(run.losses[-1])
                begin = time.perf_counter()
            run.step()
        float(run.losses[-1])
        spent = max(spent, (time.perf_counter() - begin) / 5)
        del run
    return max(10, int(seconds / (runs * spent)))


def main():
    args = parser(__doc__)
    args.add_argument("--minutes", type=float, default=8.0, help="for all runs together")
    args.add_argument("--steps", type=int, help="of each run, instead of what fits")
    args.add_argument("--tiny", action="store_true")
    args.add_argument("--batch", type=int, default=8)
    args.add_argument("--length", type=int, default=1024)
    args.add_argument("--learning-rate", type=float, default=6e-4)
    args.add_argument("--gamma", type=float, default=0.005, help="of the bias; larger than the report's: fewer steps")
    options = args.parse_args()
    begin = time.perf_counter()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shape = SMALL if options.tiny else LARGE
    if options.tiny:
        options.batch, options.length = min(options.batch, 4), min(options.length, 128)
    data = tokens_of(shape, options.length, 2_000_000 if options.tiny else 40_000_000)
    # A run for each seed and kind, and the first FP8 one once more without the moving bias.
    plan = [(seed, kind, options.gamma) for seed in SEEDS for kind in ("bf16", "fp8")] + [(0, "fp8", 0.0)]
    left = 60 * options.minutes - (time.perf_counter() - begin)
    steps = options.steps or steps_within(shape, data, options, device, len(plan), 0.85 * left)
    results = []
    for seed, kind, gamma in plan:
        results.append({"seed": seed, "kind": kind, "gamma": gamma}
                       | Run(shape, data, seed, kind, steps, options, device, gamma).train())  # fmt: skip
        print(f"# seed {seed} {kind} gamma {gamma}: {time.perf_counter() - begin:.0f} s", flush=True)
        if device == "cuda":
            torch.cuda.empty_cache()
    report(results, shape, steps, options)


def report(results, shape, steps, options):
    pairs = [results[i : i + 2] for i in range(0, len(results) - 1, 2)]
    differences = [fp8["loss"] / bf16["loss"] - 1 for bf16, fp8 in pairs]
    rows = [[r["seed"], r["kind"], r["gamma"], r["first_loss"], r["loss"], r["max_vio"]] for r in results]
    for (_, fp8), difference in zip(pairs, differences, strict=True):
        print(f"seed {fp8['seed']}: FP8 over BF16 {difference:+.4%}")
    with_bias, without = pairs[0][1], results[-1]
    balance = {"max_vio": with_bias["max_vio"], "max_vio_without": without["max_vio"]}
    balance["loss_over_without"] = with_bias["loss"] / without["loss"] - 1
    with torch.device("meta"):
        size = sum(p.numel() for p in DeepseekV3ForCausalLM(DeepseekV3Config(**COMMON | shape)).parameters())
    data = {"runs": results, "relative_difference": differences, "balance": balance, "steps": steps}
    data |= {"parameters": size, "shape": COMMON | shape, "tokens_a_step": options.batch * options.length}
    columns = ["seed", "kind", "gamma", "first loss", "last loss", "MaxVio"]
    finish("fp8_loss", columns, rows, data, options.output)


if __name__ == "__main__":
    main()

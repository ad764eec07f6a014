"""FP8 training against BF16: the same model, seed and data, several seeds, on real text (Python's standard library,
byte by byte). Reports the relative difference of the smoothed loss at the end (the report found less than 0.25 %),
beside what BF16 itself does to the float32 loss of the first seed, and what the routers' bias update does to the
experts' load. `--tiny` runs anywhere in minutes.
"""

import sys
from pathlib import Path

# Run as a script, Python looks for modules beside it, where kernels.py would pass for the `kernels` package.
sys.path[0] = str(Path(__file__).resolve().parents[1])

import sysconfig
import time

import torch

from benchmarks.common import finish, parser
from deepseek_v3 import DeepseekV3ForCausalLM, enable_fp8_training
from deepseek_v3.configuration import preset
from deepseek_v3.training.balance import routers_of, update_router_bias

LARGE = {"hidden_size": 768, "intermediate_size": 2048, "moe_intermediate_size": 512, "num_hidden_layers": 5}
LARGE |= {"n_routed_experts": 32, "num_experts_per_tok": 4, "n_group": 4, "topk_group": 2, "n_shared_experts": 1}
LARGE |= {"num_attention_heads": 8, "num_key_value_heads": 8, "q_lora_rank": 512, "kv_lora_rank": 256}
LARGE |= {"qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "first_k_dense_replace": 1}
TINY = {"hidden_size": 128, "intermediate_size": 256, "moe_intermediate_size": 128, "kv_lora_rank": 128}
VOCABULARY = 256


def read_text(limit):
    """The bytes of the standard library's modules, the same order everywhere."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    return torch.frombuffer(bytearray(b"".join(f.read_bytes() for f in files)[:limit]), dtype=torch.uint8).long()


def make_model(options, seed, device):
    sizes = TINY if options.tiny else LARGE
    torch.manual_seed(seed)
    config = preset("tiny", vocab_size=VOCABULARY, initializer_range=0.02, **sizes, pad_token_id=None)
    return DeepseekV3ForCausalLM(config).to(device).train()


def batch_of(text, options, generator, device):
    starts = torch.randint(0, len(text) - options.block, (options.batch,), generator=generator)
    return torch.stack([text[start : start + options.block] for start in starts]).to(device)


def rate(step, options):
    warm = max(1, options.steps // 20)
    return options.learning_rate * min(1.0, (step + 1) / warm) * (1 - 0.9 * step / options.steps)


def train(options, text, seed, precision, gamma, device):
    """Main loss of every step, and of the last quarter each router's load: (losses, MaxVio, seconds)."""
    model = make_model(options, seed, device)
    if precision == "fp8":
        enable_fp8_training(model)
    decay = [p for p in model.parameters() if p.dim() > 1]
    other = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": other, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=options.learning_rate, betas=(0.9, 0.95), fused=device == "cuda")
    generator, losses, loads = torch.Generator().manual_seed(seed), [], None
    start = time.perf_counter()
    for step in range(options.steps):
        tokens = batch_of(text, options, generator, device)
        for group in optimizer.param_groups:
            group["lr"] = rate(step, options)
        with torch.autocast(device, dtype=torch.bfloat16, enabled=precision != "fp32"):
            output = model(tokens, labels=tokens)
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        counted = torch.stack([load for load in update_router_bias(model, gamma) if load is not None])
        if step >= options.steps * 3 // 4:
            loads = counted if loads is None else loads + counted
        losses.append(output.main_loss.detach())
    seconds = time.perf_counter() - start
    assert loads is not None and len(loads) == len(routers_of(model))
    max_vio = (loads.amax(dim=1) / loads.mean(dim=1) - 1).mean()
    return torch.stack(losses).float().cpu(), max_vio.item(), seconds


def smoothed(losses, options):
    """Mean of the last tenth of the steps."""
    return losses[-max(1, options.steps // 10) :].mean().item()


def main():
    args = parser(__doc__)
    args.add_argument("--tiny", action="store_true")
    args.add_argument("--steps", type=int, default=400)
    args.add_argument("--seeds", type=int, default=3)
    args.add_argument("--batch", type=int, default=32)
    args.add_argument("--block", type=int, default=256)
    args.add_argument("--learning-rate", type=float, default=6e-4)
    options = args.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    text = read_text(1 << 20 if options.tiny else 1 << 24)
    parameters = sum(p.numel() for p in make_model(options, 0, "cpu").parameters())
    runs, rows = [], []
    for seed in range(options.seeds):
        ends = {}
        for precision in ("bf16", "fp8", "fp32") if seed == 0 else ("bf16", "fp8"):
            losses, max_vio, seconds = train(options, text, seed, precision, 0.001, device)
            ends[precision] = smoothed(losses, options)
            curve = losses.unfold(0, max(1, options.steps // 30), max(1, options.steps // 30)).mean(-1).tolist()
            run = {"seed": seed, "precision": precision, "loss": ends[precision], "max_vio": max_vio}
            runs.append({**run, "seconds": seconds, "curve": curve})
            print(f"# seed {seed} {precision}: loss {ends[precision]:.5f}, {seconds:.0f} s", flush=True)
        difference = ends["fp8"] / ends["bf16"] - 1
        floor = f"{ends['bf16'] / ends['fp32'] - 1:+.3%}" if "fp32" in ends else ""
        own = next(run for run in reversed(runs) if run["precision"] == "bf16")
        rows.append([seed, ends["bf16"], ends["fp8"], f"{difference:+.3%}", floor, own["max_vio"]])
    losses, max_vio, _ = train(options, text, 0, "bf16", 0.0, device)
    without = {"loss": smoothed(losses, options), "max_vio": max_vio}
    print(f"seed 0 without the bias update: loss {without['loss']:.4f}, MaxVio {max_vio:.2f}")
    columns = ["seed", "BF16 loss", "FP8 loss", "FP8 over BF16", "BF16 over float32", "MaxVio"]
    shape = {name: getattr(options, name) for name in ("steps", "batch", "block", "learning_rate")}
    data = {"parameters": parameters, **shape, "runs": runs, "without_bias_update": without}
    finish("fp8_loss", columns, rows, data, options.output)


if __name__ == "__main__":
    main()

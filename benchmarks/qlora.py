"""QLoRA at Moonlight-16B-A3B's sizes on one GPU: linears and routed experts in NF4, double quantised, LoRA over them,
activation checkpointing, AdamW. Random weights, made and packed tensor by tensor as the loader asks for them, so no
file is needed. Before anything is timed, one layer's experts are held against a dense float32 product with the widened
weights, and every adapter must have a gradient.

`--tiny` runs the same on a CPU with a few small layers; its figures say nothing.
"""

import resource
import sys
import time
from pathlib import Path

# Run as a script, Python looks for modules beside it, where kernels.py would pass for the `kernels` package.
sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from peft import LoraConfig, get_peft_model
from transformers import BitsAndBytesConfig

from benchmarks.common import finish, parser
from deepseek_v3 import DeepseekV3ForCausalLM, lora_target_modules
from deepseek_v3.configuration import account, preset
from deepseek_v3.configuration.accounting import NF4_BYTES
from deepseek_v3.quantization import BnbExperts


class RandomTensor:
    """Stands for a tensor of a checkpoint in transformers' loader; its numbers are drawn where they are wanted."""

    def __init__(self, name, shape):
        self.name, self.shape = name, shape

    def get_dtype(self):
        return "BF16"

    def get_shape(self):
        return list(self.shape)

    def __getitem__(self, index):
        return self

    def to(self, device=None, dtype=None):
        tensor = torch.zeros(self.shape, dtype=dtype or torch.bfloat16, device=device)
        if "norm" in self.name:
            return tensor.fill_(1)
        return tensor if self.name.endswith("e_score_correction_bias") else tensor.normal_(std=0.02)


def load(config, device):
    """The model as `from_pretrained` gives it."""
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in DeepseekV3ForCausalLM(config).state_dict().items()}
    torch.manual_seed(0)
    four_bit = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    return DeepseekV3ForCausalLM.from_pretrained(
        None,
        config=config,
        state_dict={name: RandomTensor(name, shape) for name, shape in shapes.items()},
        quantization_config=four_bit,
        dtype=torch.bfloat16,
        device_map={"": device},
    )


def check_experts(model, device):
    """Relative error of the packed experts of one layer against a dense product with their widened weights."""
    experts = next(module for module in model.modules() if isinstance(module, BnbExperts))
    index = torch.arange(16, device=device).view(8, 2) % experts.num_experts
    x = torch.randn(8, experts.hidden_dim, device=device, dtype=torch.bfloat16)
    weights = torch.rand(8, 2, device=device)
    expected = torch.zeros(8, experts.hidden_dim, device=device)
    for token, pair in enumerate(index):
        gate_up, down = (experts.widened(name, torch.float32, pair) for name in ("gate_up_proj", "down_proj"))
        for slot in range(2):
            gate, up = (gate_up[slot] @ x[token].float()).chunk(2)
            expected[token] += weights[token, slot] * (down[slot] @ (torch.nn.functional.silu(gate) * up))
    with torch.no_grad():
        found = experts(x, index, weights).float()
    return float((found - expected).norm() / expected.norm())


def peak_bytes(device):
    if device == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return torch.cuda.max_memory_allocated()


class Steps:
    """AdamW steps on random tokens."""

    def __init__(self, model, options, vocabulary, device):
        self.model, self.device = model, device
        self.shape, self.vocabulary = (options.batch, options.length), vocabulary
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-4)

    def backward(self):
        tokens = torch.randint(0, self.vocabulary, self.shape, device=self.device)
        loss = self.model(tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        return loss.item()

    def step(self):
        loss = self.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss

    def adapters_without_gradient(self):
        # B starts at zero, so at first only B has one.
        named = [(name, p) for name, p in self.model.named_parameters() if "lora_B" in name]
        return [name for name, p in named if p.grad is None or not bool(p.grad.any())]


def measure(steps, options, length):
    """Speed and peak memory of steps over rows of a length, after one that is not counted."""
    on_gpu = steps.device == "cuda"
    steps.shape = (options.batch, length)
    steps.step()
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    losses = [steps.step() for _ in range(options.steps)]  # each reads its loss, so each is finished
    if on_gpu:
        torch.cuda.synchronize()
    tokens = options.steps * options.batch * length
    return {
        "length": length,
        "tokens_per_second": tokens / (time.perf_counter() - start),
        "peak_bytes_training": peak_bytes(steps.device),
        "losses": losses,
    }


def main():
    args = parser(__doc__)
    args.add_argument("--tiny", action="store_true", help="small sizes, on the CPU")
    args.add_argument("--batch", type=int, default=1)
    args.add_argument("--length", type=int, default=2048)
    args.add_argument("--longer", type=int, default=8192, help="rows that are measured besides; 0 for none")
    args.add_argument("--rank", type=int, default=16)
    args.add_argument("--steps", type=int, default=6)
    options = args.parse_args()
    device = "cpu" if options.tiny else "cuda"
    if options.tiny:
        options.length, options.longer, config = (
            64,
            128,
            preset("tiny", q_lora_rank=64, eos_token_id=None, pad_token_id=0),
        )
    else:
        config = preset("moonlight-16b-a3b", eos_token_id=None, pad_token_id=0)
    base = load(config, device)
    loaded = peak_bytes(device)
    error = check_experts(base, device)
    resident = base.get_memory_footprint()
    experts = sum(module.nbytes() for module in base.modules() if isinstance(module, BnbExperts))
    targets = lora_target_modules(base.config, "all")
    model = get_peft_model(base, LoraConfig(r=options.rank, lora_alpha=2 * options.rank, **targets)).train()
    model.activation_checkpointing_enable({"use_reentrant": False})
    steps = Steps(model, options, config.vocab_size, device)
    steps.backward()
    still = steps.adapters_without_gradient()
    if error > 2e-2 or still:
        sys.exit(f"experts off by {error:.1e}, adapters without a gradient: {still[:3]}; nothing is reported")
    steps.optimizer.zero_grad()
    measured = measure(steps, options, options.length)
    longer = measure(steps, options, options.longer) if options.longer else None
    bill = account(config)
    data = {
        "model": "tiny" if options.tiny else "moonlight-16b-a3b",
        "parameters": base.num_parameters() - sum(p.numel() for p in steps.parameters),
        "adapter_parameters": sum(p.numel() for p in steps.parameters),
        "batch": options.batch,
        "rank": options.rank,
        "targets": "every projection, MLP and expert",
        "resident_weight_bytes": resident,
        "expert_bytes": experts,
        "expert_bytes_by_accounting": round(
            NF4_BYTES * config.n_routed_experts * bill.expert_parameters * len(base.model.routers())
        ),
        "peak_bytes_loading": loaded,
        **measured,
        "longer": longer,
        "experts_relative_error": error,
    }
    gb = {name: data[name] / 1e9 for name in data if "bytes" in name}
    rows = [[name.replace("_", " ").replace("bytes", "GB"), value] for name, value in gb.items()]
    if longer:
        rows.append([f"the same with {longer['length']:,} tokens", longer["peak_bytes_training"] / 1e9])
        rows.append(["tokens a second then", longer["tokens_per_second"]])
    rows += [["tokens a second", data["tokens_per_second"]], ["adapter's parameters", data["adapter_parameters"]]]
    finish("qlora", ["what", "value"], rows, data, options.output)


if __name__ == "__main__":
    main()

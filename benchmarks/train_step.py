"""One training step on the CPU: this package against transformers' own class, same weights, taking turns.

First with MTP and balance off, which makes it the same computation; then with both on, against nobody.
"""

import sys
from pathlib import Path

# Run as a script, Python looks for modules beside it, where kernels.py would pass for the `kernels` package.
sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

from benchmarks.common import alternate, finish, parser, ratio
from benchmarks.decode import NativeConfig, NativeForCausalLM
from deepseek_v3 import DeepseekV3ForCausalLM
from deepseek_v3.configuration import preset

SHAPE = {"hidden_size": 512, "intermediate_size": 1024, "moe_intermediate_size": 256, "num_attention_heads": 8}
SHAPE |= {"num_key_value_heads": 8, "kv_lora_rank": 128, "q_lora_rank": 192, "qk_rope_head_dim": 32}
SHAPE |= {"qk_nope_head_dim": 64, "v_head_dim": 64, "vocab_size": 8192}


def stepper(model, tokens):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def step():
        loss = model(tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def main():
    args = parser(__doc__)
    args.add_argument("--rounds", type=int, default=6)
    options = args.parse_args()
    torch.manual_seed(0)
    tokens = torch.randint(0, SHAPE["vocab_size"], (4, 512))
    plain = preset("small", **SHAPE, num_nextn_predict_layers=0, seq_balance_loss_alpha=0.0)
    ours = DeepseekV3ForCausalLM(plain).train()
    native = NativeForCausalLM(NativeConfig.from_dict({**plain.to_dict(), "num_mtp_layers": 0})).train()
    native.load_state_dict(ours.state_dict())
    whole = DeepseekV3ForCausalLM(preset("small", **SHAPE)).train()
    steps = {
        "ours": stepper(ours, tokens),
        "native": stepper(native, tokens),
        "with MTP and balance": stepper(whole, tokens),
    }
    mine, theirs = steps["ours"](), steps["native"]()
    if not abs(mine - theirs) < 1e-5 * theirs:
        sys.exit(f"the losses differ: {mine} and {theirs}; nothing is timed")
    seconds = alternate(steps, options.rounds)
    compared = {name: ratio(seconds[name], seconds["native"]) for name in ("ours", "with MTP and balance")}
    rows = [[name, r["median"], r["min"], r["max"]] for name, r in compared.items()]
    data = {"shape": SHAPE, "tokens": tokens.numel(), "cost_over_native": compared}
    finish("train_step", ["step", "cost over native", "min", "max"], rows, data, options.output)


if __name__ == "__main__":
    main()

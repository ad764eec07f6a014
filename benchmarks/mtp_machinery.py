"""What the machinery of speculative decoding costs on a GPU: Moonlight-16B-A3B's sizes with one MTP module, random
weights, drafts accepted with a given probability by construction, against our own plain decoding, in turns, both
replayed from CUDA graphs as `generate` does by itself; and the main model's forward over one token a row and over two,
replayed: verifying a draft reads the experts of both, whatever drafted it.

The drafts' tokens mean nothing here, so the output is not compared: that drafting is lossless is held by the tests.
"""

import sys
from pathlib import Path

# Run as a script, Python looks for modules beside it, where kernels.py would pass for the `kernels` package.
sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

from benchmarks.common import finish, parser
from benchmarks.layer import timed
from deepseek_v3 import DeepseekV3ForCausalLM, LatentCache
from deepseek_v3.configuration import preset
from deepseek_v3.generation import speculative


def make_model():
    """Random BF16 weights, made on the GPU."""
    config = preset("moonlight-16b-a3b", num_nextn_predict_layers=1, eos_token_id=None, pad_token_id=0)
    with torch.device("meta"):
        model = DeepseekV3ForCausalLM(config).to(torch.bfloat16).eval()
    torch.manual_seed(0)
    weights = {}
    for name, tensor in model.state_dict().items():
        dtype = torch.float32 if name.endswith("e_score_correction_bias") else torch.bfloat16
        weights[name] = torch.zeros(tensor.shape, dtype=dtype, device="cuda")
        if "norm" in name:
            weights[name].fill_(1)
        elif not name.endswith("e_score_correction_bias"):
            weights[name].normal_(std=0.02)
    model.load_state_dict(weights, assign=True)
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to("cuda")
    return model


def forced(rate):
    """A verification that accepts each draft with probability `rate`, whatever it is."""

    def accept(scores, drafts, drawn_from):
        right = torch.rand(drafts.shape, device=drafts.device) < rate
        accepted = right.long().cumprod(dim=1).sum(dim=1)
        return accepted, scores.argmax(dim=-1).gather(1, accepted[:, None])[:, 0]

    return accept


def forwards(model, prompt):
    """Milliseconds of the main model's forward over one new token a row and over two, replayed."""
    batch, cache = len(prompt), LatentCache(model.config)
    cache.expect(prompt.shape[1] + 64)
    model(prompt, past_key_values=cache, logits_to_keep=1)
    graphs = model.model.decode_graphs(cache, None)

    def replayed(tokens):
        new = torch.randint(0, 1000, (batch, tokens), device="cuda")
        cache.graphs = graphs
        model(new, past_key_values=cache, mla_spans=graphs.spans(cache, batch, tokens))
        cache.graphs = None
        cache.crop(-tokens)

    times = timed({"one": lambda: replayed(1), "two": lambda: replayed(2)}, rounds=20)
    return times["one"], times["two"]


def main():
    args = parser(__doc__)
    args.add_argument("--rate", type=float, default=0.85)
    args.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32, 128])
    args.add_argument("--new", type=int, default=512)
    args.add_argument("--rounds", type=int, default=3)
    options = args.parse_args()
    model = make_model()
    speculative.accept = forced(options.rate)
    rows, points = [], []
    for batch in options.batch:
        prompt = torch.randint(0, 1000, (batch, 128), device="cuda")
        kwargs = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": options.new, "do_sample": False}
        statistics = []

        def plain(kwargs=kwargs, prompt=prompt):
            model.generate(prompt, **kwargs)

        def mtp(kwargs=kwargs, prompt=prompt, statistics=statistics):
            more = {"use_mtp": True, "num_assistant_tokens": 1, "return_dict_in_generate": True}
            statistics.append(model.generate(prompt, **kwargs, **more).mtp)

        times = timed({"plain": plain, "mtp": mtp}, rounds=options.rounds)
        tokens = sum(s.tokens_per_step for s in statistics) / len(statistics)
        speedup = times["plain"] / times["mtp"]
        one, two = forwards(model, prompt)
        free = tokens * one / two
        rows.append([batch, times["plain"], times["mtp"], tokens, speedup, speedup / tokens, one, two, speedup / free])
        points.append(
            {
                "batch": batch,
                "new_tokens": options.new,
                **times,
                "tokens_per_step": tokens,
                "speedup": speedup,
                "forward_of_one_ms": one,
                "forward_of_two_ms": two,
            }
        )
    columns = ["batch", "plain ms", "with MTP ms", "tokens a step", "times faster", "of the tokens"]
    columns += ["1 token ms", "2 tokens ms", "of the verification"]
    finish("mtp_machinery", columns, rows, {"rate": options.rate, "points": points}, options.output)


if __name__ == "__main__":
    with torch.inference_mode():
        main()

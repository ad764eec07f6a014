"""The decode step that a GPU takes, its kernels' torch truths standing in for them: against transformers' own class,
and against the modules wherever something wraps them."""

import copy
import pickle

import pytest
import torch
from torch import nn

from deepseek_v3 import LatentCache
from deepseek_v3.modeling_deepseek_v3 import decoder, layers, model, moe, rope
from twins import make_model, native_twin

FP8 = torch.float8_e4m3fn
KINDS = [{"dtype": FP8}, {"sliding_window": 5}, {"dtype": FP8, "sliding_window": 5}]


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch):
    for module in (decoder, layers, model, moe, rope):
        monkeypatch.setattr(module, "on_kernels", lambda x: not torch.is_grad_enabled())


def fused(**overrides):
    made = make_model(**overrides)
    made.set_experts_implementation("deepseek_v3")
    return made


@torch.no_grad()
def decoded(one, tokens, prompt=9, together=1, mask=None, **kind):
    """Logits of the tokens after the prompt, so many together at a time, over a cache of that kind."""
    cache = LatentCache(one.config, **kind)
    logits = []
    for start, end in [(0, prompt), *((i, i + together) for i in range(prompt, tokens.shape[1], together))]:
        given = None if mask is None else mask[:, :end]
        logits.append(one(tokens[:, start:end], attention_mask=given, past_key_values=cache).logits)
    return torch.cat(logits[1:], dim=1)


def relative(got, wanted):
    return ((got - wanted).norm() / wanted.norm()).item()


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("q_lora", [48, None])
def test_steps_equal_transformers_uncached_forward(rows, q_lora):
    tokens = torch.randint(3, 60, (rows, 14), generator=torch.Generator().manual_seed(rows))
    made = fused(q_lora_rank=q_lora)
    with torch.no_grad():
        wanted = native_twin(made)(tokens).logits[:, 9:]
    assert relative(decoded(made, tokens), wanted) < 1e-5


def calls(module, seen):
    return module.register_forward_hook(lambda *arguments: seen.append(1))


@pytest.mark.parametrize(
    "name",
    [
        "mlp.shared_experts.up_proj", "mlp.shared_experts", "mlp.experts", "mlp.gate", "mlp",
        "post_attention_layernorm", "self_attn.q_a_layernorm", "self_attn.kv_a_layernorm", "self_attn",
    ],
)  # fmt: skip
def test_a_hooked_module_is_called(name):
    tokens = torch.randint(3, 60, (1, 12), generator=torch.Generator().manual_seed(3))
    made, seen = fused(), []
    wanted = decoded(made, tokens)
    calls(made.model.layers[-1 - len(made.model.mtp_layers)].get_submodule(name), seen)
    assert relative(decoded(made, tokens), wanted) < 1e-5
    assert len(seen) == 1 + 3


@pytest.mark.parametrize("name", ["mlp.shared_experts.down_proj", "self_attn.kv_b_proj", "self_attn.q_a_proj"])
def test_a_replaced_linear_counts_at_once(name):
    class Doubled(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner, self.weight, self.in_features = inner, inner.weight, inner.in_features

        def forward(self, x):
            return 2 * self.inner(x)

    tokens = torch.randint(3, 60, (1, 12), generator=torch.Generator().manual_seed(5))
    made = fused()
    layer = made.model.layers[-1 - len(made.model.mtp_layers)]
    decoded(made, tokens)
    parent, _, leaf = name.rpartition(".")
    setattr(layer.get_submodule(parent), leaf, Doubled(layer.get_submodule(name)))
    wrapped = decoded(made, tokens)
    setattr(layer.get_submodule(parent), leaf, layer.get_submodule(name).inner)
    with torch.no_grad():
        layer.get_submodule(name).weight.mul_(2)
    assert relative(wrapped, decoded(made, tokens)) < 1e-5


@pytest.mark.parametrize("together", [1, 2])
@pytest.mark.parametrize("length", [None, 20])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(
    "kind",
    [{"dtype": torch.float8_e4m3fn}, {"sliding_window": 5}, {"dtype": torch.float8_e4m3fn, "sliding_window": 5}],
)
def test_steps_over_codes_and_windows_are_those_of_the_modules(kind, padded, length, together, monkeypatch):
    """A chunk of several tokens goes through `write_latents` as well, and a mask is read as spans."""
    tokens = torch.randint(3, 60, (2, 15), generator=torch.Generator().manual_seed(7))
    mask = torch.ones_like(tokens) if padded else None
    if padded:
        mask[1, :4] = 0
    made = fused(kv_lora_rank=160)
    ours = decoded(made, tokens, 9, together, mask, max_cache_len=length, **kind)
    for module in (decoder, layers, model, moe, rope):
        monkeypatch.setattr(module, "on_kernels", lambda x: False)
    # Codes that lie between two numbers fall to either side with the last digit of what they are made of.
    bound = 2e-3 if "dtype" in kind else 1e-5
    assert relative(ours, decoded(made, tokens, 9, together, mask, max_cache_len=length, **kind)) < bound


@pytest.mark.parametrize("name", ["self_attn.o_proj", "mlp.experts", "mlp.gate", "mlp.shared_experts.up_proj"])
@pytest.mark.parametrize("how", ["parameter", "data", "in place", "state dict"])
def test_weights_that_change_between_steps_count(name, how):
    tokens = torch.randint(3, 60, (1, 12), generator=torch.Generator().manual_seed(9))
    made = fused()
    before = decoded(made, tokens)
    module = made.model.layers[-1 - len(made.model.mtp_layers)].get_submodule(name)
    key = "down_proj" if name == "mlp.experts" else "weight"
    weight = getattr(module, key)
    changed = weight.detach().flip(0) * 3
    if how == "parameter":
        setattr(module, key, nn.Parameter(changed))
    elif how == "data":
        weight.data = changed
    elif how == "in place":
        with torch.no_grad():
            weight.copy_(changed)
    else:
        module.load_state_dict(module.state_dict() | {key: changed}, assign=True)
    after, fresh = decoded(made, tokens), fused()
    fresh.load_state_dict(made.state_dict())
    assert relative(after, decoded(fresh, tokens)) < 1e-6 < relative(after, before)


def test_a_layers_step_is_no_part_of_it():
    """A copy makes its own, a cast model makes another, and neither is kept alive by the first."""
    tokens = torch.randint(3, 60, (1, 12), generator=torch.Generator().manual_seed(11))
    made = fused()
    wanted = decoded(made, tokens)
    assert all(layer._steps._attention is not None for layer in made.model.layers[: made.config.num_hidden_layers])
    other = pickle.loads(pickle.dumps(copy.deepcopy(made)))
    assert all(layer._steps._attention is None for layer in other.model.layers)
    assert relative(decoded(other, tokens), wanted) < 1e-6
    made.double()
    assert all(layer._steps._attention is None and layer._steps._mlp is None for layer in made.model.layers)
    assert relative(decoded(made, tokens).float(), wanted) < 1e-5

"""The model on a GPU, where the kernels serve it, against itself on the CPU."""

import copy

import pytest
import torch

from deepseek_v3 import LatentCache
from twins import make_model

pytestmark = pytest.mark.gpu

SHAPE = {"hidden_size": 256, "num_attention_heads": 16, "num_key_value_heads": 16, "kv_lora_rank": 512}
SHAPE |= {"qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128, "moe_intermediate_size": 128}


@pytest.fixture
def pair():
    model = make_model(**SHAPE)
    on_gpu = make_model(**SHAPE).to("cuda")
    on_gpu.set_experts_implementation("deepseek_v3")
    return model, on_gpu


def close(gpu, cpu, bound):
    return ((gpu.float().cpu() - cpu).norm() / cpu.norm()).item() < bound


@pytest.mark.parametrize("padded", [False, True])
def test_prefill_and_decode_equal_the_cpu(pair, tokens, padded):
    # In float32: lower precision moves tokens near the border of two experts to the other one.
    cpu, gpu = pair
    mask = torch.ones_like(tokens)
    if padded:
        mask[0, :5] = 0
    caches = LatentCache(cpu.config), LatentCache(cpu.config)
    with torch.no_grad():
        for start, end in ((0, 16), (16, 17), (17, 18), (18, 22), (22, 24)):
            logits = []
            for model, cache, device in ((cpu, caches[0], "cpu"), (gpu, caches[1], "cuda")):
                inputs = tokens[:, start:end].to(device), mask[:, :end].to(device)
                positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, start:end].to(device)
                output = model(inputs[0], attention_mask=inputs[1], position_ids=positions, past_key_values=cache)
                logits.append(output.logits)
            real = mask[:, start:end].bool()
            assert close(logits[1].cpu()[real], logits[0][real], 1e-3), (start, end)


def test_speculative_decoding_equals_plain_greedy(pair, tokens):
    _, gpu = pair
    prompt = tokens.to("cuda")
    kwargs = {"max_new_tokens": 20, "do_sample": False, "attention_mask": torch.ones_like(prompt)}
    plain = gpu.generate(prompt, **kwargs)
    for drafts in (1, 3):
        assert torch.equal(gpu.generate(prompt, use_mtp=True, num_assistant_tokens=drafts, **kwargs), plain)


def test_gradients_equal_the_cpu(pair, tokens):
    cpu, gpu = pair
    for model, device in ((cpu, "cpu"), (gpu, "cuda")):
        model.train()
        model(tokens.to(device), labels=tokens.to(device)).loss.backward()
    theirs = dict(gpu.named_parameters())
    for name, parameter in cpu.named_parameters():
        assert close(theirs[name].grad, parameter.grad, 2e-3), name


@pytest.mark.parametrize("padded", [False, True])
def test_replayed_steps_give_the_tokens_of_steps_that_are_not(pair, tokens, padded):
    # In float32, and in BF16 where the kernels serve the step: the same launches, so the same bits.
    for dtype in (torch.float32, torch.bfloat16):
        gpu = pair[1].to(dtype)
        prompt, mask = tokens.to("cuda"), torch.ones_like(tokens, device="cuda")
        if padded:
            mask[0, :5] = 0
        kwargs = {"max_new_tokens": 90, "do_sample": False, "attention_mask": mask, "eos_token_id": None}
        for mtp in ({}, {"use_mtp": True, "num_assistant_tokens": 2}):
            plain = gpu.generate(prompt, disable_compile=True, **kwargs, **mtp)
            assert torch.equal(gpu.generate(prompt, **kwargs, **mtp), plain), (dtype, mtp)


@pytest.mark.parametrize("dtype", [None, "float8_e4m3fn"])
@pytest.mark.parametrize("window", [None, 20])
def test_codes_and_windows_decode_alike_replayed_or_not(pair, tokens, dtype, window):
    gpu, prompt = pair[1], tokens.to("cuda")
    mask = torch.ones_like(prompt)
    mask[0, :5] = 0
    kind = {"dtype": dtype, "sliding_window": window}
    kwargs = {"max_new_tokens": 40, "do_sample": False, "attention_mask": mask, "eos_token_id": None}
    plain = gpu.generate(prompt, disable_compile=True, cache_config=kind, **kwargs)
    assert torch.equal(gpu.generate(prompt, cache_config=kind, **kwargs), plain)
    drafts = {"use_mtp": True, "num_assistant_tokens": 2}
    assert torch.equal(gpu.generate(prompt, cache_config=kind, **drafts, **kwargs), plain)


def test_steps_are_replayed_where_nothing_forbids_it(pair, tokens, monkeypatch):
    replays = []
    replay = torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda graph: replays.append(1) or replay(graph))
    pair[1].generate(tokens.to("cuda"), max_new_tokens=20, do_sample=False, eos_token_id=None)
    assert len(replays) == 18


@pytest.mark.parametrize("kind", [{}, {"dtype": "float8_e4m3fn"}, {"sliding_window": 20}])
def test_a_single_sequence_decodes_alike_replayed_or_not(pair, tokens, kind):
    for dtype in (torch.float32, torch.bfloat16):
        gpu, prompt = pair[1].to(dtype), tokens[:1].to("cuda")
        kwargs = {"max_new_tokens": 40, "do_sample": False, "eos_token_id": None, "cache_config": kind or None}
        plain = gpu.generate(prompt, disable_compile=True, **kwargs)
        assert torch.equal(gpu.generate(prompt, **kwargs), plain), dtype


def test_a_single_sequence_equals_the_cpu(pair, tokens):
    """In BF16, a step's rounding apart, over the launches that a single token has."""
    cpu, gpu = pair[0], pair[1].bfloat16()
    caches = LatentCache(cpu.config), LatentCache(cpu.config)
    with torch.no_grad():
        for start, end in ((0, 16), *((i, i + 1) for i in range(16, 24))):
            wanted = cpu(tokens[:1, start:end], past_key_values=caches[0]).logits
            got = gpu(tokens[:1, start:end].to("cuda"), past_key_values=caches[1]).logits
            similar = torch.nn.functional.cosine_similarity(got.float().cpu(), wanted, dim=-1)
            assert similar.median() > 0.99, (start, similar)
    layers = gpu.model.layers[: cpu.config.num_hidden_layers]
    assert all(layer._steps._attention is not None and layer._steps._mlp is not None for layer in layers)


@torch.no_grad()
def test_a_weight_that_moves_counts_at_once(pair, tokens):
    """Launches that are bound to addresses see that a parameter has got another."""
    gpu = pair[1].bfloat16()

    def step(model):
        cache = LatentCache(model.config)
        model(tokens[:1].to("cuda"), past_key_values=cache)
        return model(tokens[:1, :1].to("cuda"), past_key_values=cache).logits

    before = step(gpu)
    for weight in gpu.model.layers[0].parameters():
        old, weight.data = weight.data, 2 * weight.data
        old.zero_()
    after = step(gpu)
    assert torch.equal(after, step(copy.deepcopy(gpu))) and not torch.equal(after, before)

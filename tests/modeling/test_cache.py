"""`LatentCache` against transformers' caches, and what each of its operations must keep."""

import pytest
import torch
from transformers import DynamicCache, QuantizedCache, StaticCache

from deepseek_v3 import LatentCache
from deepseek_v3.configuration import account
from twins import make_model, native_twin


def filled(model, tokens):
    cache = LatentCache(model.config)
    with torch.inference_mode():
        model(tokens, past_key_values=cache)
    return cache


def step(model, tokens, cache):
    with torch.inference_mode():
        return model(tokens, past_key_values=cache).logits


@torch.inference_mode()
def poison(cache):
    """NaN in every slot that holds no valid token."""
    for layer in cache.layers:
        layer._storage[:, :, layer.get_seq_length() :] = float("nan")


def same(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_bytes_equal_the_accounting(model, tokens):
    cache = filled(model, tokens)
    expected = account(model.config).cache_bytes_per_token("float32")
    assert cache.bytes_per_token() == expected
    assert cache.nbytes() == expected * tokens.numel()
    assert LatentCache(model.config).nbytes() == LatentCache(model.config).bytes_per_token() == 0


def test_a_decode_step_copies_no_history(model, tokens):
    cache = filled(model, tokens)
    step(model, tokens[:, :1], cache)
    before = [layer.keys.data_ptr() for layer in cache.layers]
    for _ in range(20):
        step(model, tokens[:, :1], cache)
    assert [layer.keys.data_ptr() for layer in cache.layers] == before
    assert cache.get_seq_length() == tokens.shape[1] + 21


def test_growth_is_amortised(model):
    layer = LatentCache(model.config)
    moves, pointer = 0, None
    latent, rope = torch.randn(1, 1, 1, 32), torch.randn(1, 1, 1, 8)
    for _ in range(4000):
        keys, _ = layer.update(latent, rope, 0)
        moves, pointer = moves + (keys.data_ptr() != pointer), keys.data_ptr()
    assert moves < 20


def test_storage_beyond_the_valid_tokens_is_never_read(model, tokens):
    cache, clean = filled(model, tokens), filled(model, tokens)
    poison(cache)
    same(step(model, tokens[:, :2], cache), step(model, tokens[:, :2], clean))


def test_crop_then_go_on_equals_never_having_seen_the_tail(model, tokens):
    cache = filled(model, tokens)
    cache.crop(-5)
    assert cache.get_seq_length() == tokens.shape[1] - 5
    poison(cache)
    same(step(model, tokens[:, -5:], cache), step(model, tokens[:, -5:], filled(model, tokens[:, :-5])))
    with pytest.raises(ValueError, match="negative"):
        cache.crop(3)


@pytest.mark.parametrize("rows", [[1, 0], [1, 1, 0], [1]])
def test_rows_can_be_reordered_selected_and_repeated(model, tokens, rows):
    picked = torch.tensor(rows)
    cache = filled(model, tokens)
    cache.batch_select_indices(picked)
    same(step(model, tokens[picked][:, :1], cache), step(model, tokens[picked][:, :1], filled(model, tokens[picked])))
    if len(rows) == 2:
        beams = filled(model, tokens)
        beams.reorder_cache(picked)
        same(
            step(model, tokens[picked][:, :1], beams),
            step(model, tokens[picked][:, :1], filled(model, tokens[picked])),
        )


def test_repeat_and_boolean_selection(model, tokens):
    cache = filled(model, tokens)
    cache.batch_repeat_interleave(3)
    repeated = tokens.repeat_interleave(3, 0)
    same(step(model, repeated[:, :1], cache), step(model, repeated[:, :1], filled(model, repeated)))
    cache = filled(model, tokens)
    cache.batch_select_indices(torch.tensor([False, True]))
    same(step(model, tokens[1:, :1], cache), step(model, tokens[1:, :1], filled(model, tokens[1:])))


def test_reset_forgets_the_sequence_and_the_batch_size(model, tokens):
    cache = filled(model, tokens)
    cache.reset()
    assert cache.get_seq_length() == 0
    same(step(model, tokens[:1], cache), step(model, tokens[:1], LatentCache(model.config)))


def test_a_layer_moves_off_and_back_between_uses(model, tokens):
    cache = filled(model, tokens)
    for layer in cache.layers:
        layer.offload()
        assert layer.keys.device.type == "cpu"
        layer.prefetch()
        assert layer.keys.device == layer.device
    same(step(model, tokens[:, :1], cache), step(model, tokens[:, :1], filled(model, tokens)))


def test_gradients_flow_through_a_cache_that_is_written_twice(tokens):
    model = make_model().train()
    cache = LatentCache(model.config)
    first = model(tokens[:, :10], past_key_values=cache).logits
    second = model(tokens[:, 10:], past_key_values=cache).logits
    (first.sum() + second.sum()).backward()
    cached = model.model.layers[0].self_attn.kv_a_proj_with_mqa.weight.grad.clone()
    model.zero_grad()
    model(tokens).logits.sum().backward()
    torch.testing.assert_close(
        cached, model.model.layers[0].self_attn.kv_a_proj_with_mqa.weight.grad, rtol=1e-3, atol=1e-4
    )


@pytest.mark.parametrize("make", ["dynamic", "static", "latent static", "quantized"])
def test_every_transformers_cache_decodes_alike(model, tokens, make):
    make_cache = {
        "dynamic": lambda: DynamicCache(config=model.config),
        "static": lambda: StaticCache(config=model.config, max_cache_len=40),
        "latent static": lambda: LatentCache(model.config, max_cache_len=40),
        "quantized": lambda: QuantizedCache(backend="fp8", config=model.config),
    }[make]
    cache = make_cache()
    step(model, tokens[:, :20], cache)
    logits = torch.cat([step(model, tokens[:, i : i + 1], cache) for i in range(20, 24)], dim=1)
    expected = step(model, tokens, None)[:, 20:]
    if make == "quantized":  # lossy: as the native class loses
        native, cache = native_twin(model), make_cache()
        step(native, tokens[:, :20], cache)
        expected = torch.cat([step(native, tokens[:, i : i + 1], cache) for i in range(20, 24)], dim=1)
    same(logits, expected)


def test_a_cache_of_another_model_or_batch_is_refused(model, tokens):
    other = make_model(kv_lora_rank=16)
    with pytest.raises(ValueError, match="16.*latents of shape"):
        step(model, tokens[:, :1], filled(other, tokens))
    with pytest.raises(ValueError, match="2 sequences and the input has 1"):
        step(model, tokens[:1, :1], filled(model, tokens))
    with pytest.raises(ValueError, match="max_cache_len = 0"):
        LatentCache(model.config, max_cache_len=0)


def test_a_cache_made_in_inference_mode_goes_on_outside_of_it(model, tokens):
    cache = filled(model, tokens)
    with torch.no_grad():
        outside = model(tokens[:, :1], past_key_values=cache).logits
    same(outside, step(model, tokens[:, :1], filled(model, tokens)))

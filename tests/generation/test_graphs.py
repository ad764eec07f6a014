"""Replayed decode steps: on the CPU a stand-in for the graph runs the captured function on its own static inputs, so
that everything around a replay (what is copied, what the keys tell apart, growth, rows) shows in the tokens."""

import pytest
import torch

from deepseek_v3 import LatentCache
from deepseek_v3.generation import statistics
from deepseek_v3.modeling_deepseek_v3 import graphs, model
from twins import YARN, make_model


class Recomputed(graphs.DecodeGraphs):
    """A replay that runs the function again, as a graph would: with what Python knew at the capture, forgetting what
    Python does meanwhile."""

    def __init__(self, starts, cache, log):
        super().__init__(starts, set())
        self.cache, self.log = cache, log

    def _capture(self, function, inputs):
        self.log["captures"] += 1

        def replay():
            assert self._inside
            self.log["replays"] += 1
            layers = self.cache.layers
            lengths = [layer.get_seq_length() for layer in layers]
            output = function(*inputs)
            for layer, length in zip(layers, lengths, strict=True):
                layer._length = length
            return output

        return replay


@pytest.fixture
def log(monkeypatch):
    counts = {"captures": 0, "replays": 0}

    def make(base, cache, mask):
        side_by_side, starts = graphs.starts_of(mask)
        return Recomputed(starts, cache, counts) if side_by_side else None

    monkeypatch.setattr(model, "make_graphs", make)
    return counts


def batch(padding):
    prompt = torch.randint(3, 6, (4, 11), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(prompt)
    for row, pad in enumerate((0, 3, 7, 10) if padding != "none" else ()):
        mask[row, slice(pad) if padding == "left" else slice(11 - pad, None)] = 0
    return prompt.masked_fill(mask == 0, 2), mask


def small(**overrides):
    return make_model(vocab_size=6, pad_token_id=2, eos_token_id=1, rope_scaling=dict(YARN), **overrides)


@pytest.mark.parametrize("padding", ["none", "left"])
def test_plain_tokens_are_the_same_over_growths_of_the_storage(padding, log, monkeypatch):
    own = small()
    prompt, mask = batch(padding)
    kwargs = {"attention_mask": mask, "max_new_tokens": 130, "do_sample": False, "eos_token_id": None}
    expected = own.generate(prompt, disable_compile=True, **kwargs)
    assert log["captures"] == 0
    assert torch.equal(own.generate(prompt, **kwargs), expected)
    # Storage for all at once: one capture, after one step in eager mode.
    assert log["captures"] == 1 and log["replays"] == 129 - 1
    monkeypatch.setattr(LatentCache, "expect", lambda cache, tokens: None)
    assert torch.equal(own.generate(prompt, **kwargs), expected)
    assert log["captures"] == 1 + 2  # 128 slots, then 256


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("drafts", [1, 3])
@pytest.mark.parametrize("depths", [1, 2])
def test_speculative_tokens_are_those_of_plain_decoding(padding, drafts, depths, log):
    own = small(num_nextn_predict_layers=depths)
    prompt, mask = batch(padding)
    kwargs = {"attention_mask": mask, "max_new_tokens": 40, "do_sample": False, "disable_compile": True}
    use = {"use_mtp": True, "num_assistant_tokens": drafts, "return_dict_in_generate": True}
    expected = own.generate(prompt, **kwargs, **use)
    kwargs["disable_compile"] = False
    output = own.generate(prompt, **kwargs, **use)
    assert torch.equal(output.sequences, expected.sequences)
    assert output.mtp.accepted == expected.mtp.accepted  # the drafts were the same too
    assert log["replays"] > 20


def test_a_conversation_goes_on_from_replayed_steps(log):
    own = small()
    prompt, mask = batch("left")
    kwargs = {"do_sample": False, "eos_token_id": None, "max_new_tokens": 9}
    cache = LatentCache(own.config)
    first = own.generate(prompt, attention_mask=mask, past_key_values=cache, **kwargs)
    assert cache.graphs is None
    mask = torch.nn.functional.pad(mask, (0, first.shape[1] - mask.shape[1]), value=1)
    after = own.generate(first, attention_mask=mask, past_key_values=cache, **kwargs)
    assert torch.equal(after, own.generate(first, attention_mask=mask, disable_compile=True, **kwargs))


def test_what_cannot_be_replayed_is_not(log):
    own = small()
    prompt, mask = batch("none")
    holes = mask.clone()
    holes[:, 4] = 0
    kwargs = {"max_new_tokens": 6, "do_sample": False}
    own.generate(prompt, attention_mask=holes, **kwargs)
    own.generate(prompt, attention_mask=mask, cache_implementation="static", **kwargs)
    own.generate(prompt, attention_mask=mask, num_beams=2, **kwargs)
    asked = {"output_hidden_states": True, "return_dict_in_generate": True}
    output = own.generate(prompt, attention_mask=mask, **asked, **kwargs)
    assert len(output.hidden_states) == 6 and len(output.hidden_states[3]) == own.config.num_hidden_layers + 1
    assert log == {"captures": 0, "replays": 0}


def test_where_tokens_start():
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 0]]).bool()
    side_by_side, starts = graphs.starts_of(mask)
    assert side_by_side and starts.tolist() == [1, 0]
    assert graphs.starts_of(torch.ones(2, 3).bool()) == (True, None)
    assert not graphs.starts_of(torch.tensor([[1, 0, 1]]).bool())[0]


def test_a_model_off_the_gpu_or_with_hooks_is_not_captured():
    own = small()
    assert not graphs.is_capturable(own.model)
    assert graphs._is_capturable(own.model.layers[0].mlp.gate_proj)
    own.model.layers[0].mlp.gate_proj.register_forward_hook(lambda *arguments: None)
    assert not graphs._is_capturable(own.model.layers[0].mlp.gate_proj)


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()  # the limit on recompiling a forward counts across tests


@pytest.mark.parametrize("cache", [None, "static"])
def test_a_compiled_model_drafts_and_verifies(cache, fresh_compiler):
    own = make_model(vocab_size=40, pad_token_id=2, eos_token_id=1, num_hidden_layers=2)
    prompt, mask = batch("left")
    kwargs = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    expected = own.generate(prompt, **kwargs)
    own.forward = torch.compile(own.forward, backend="eager")
    kwargs |= {"use_mtp": True, "num_assistant_tokens": 1}
    before = sum(torch._dynamo.utils.counters["stats"].values())
    assert torch.equal(own.generate(prompt, cache_implementation=cache, **kwargs), expected)
    assert sum(torch._dynamo.utils.counters["stats"].values()) > before  # it was compiled
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.parametrize("replayed, idle", [(False, 0), (True, 0), (True, 32), (False, 6), (False, 32)])
@pytest.mark.parametrize("depths", [1, 2])
def test_modules_miss_no_row_while_nothing_is_drafted(depths, replayed, idle, log, monkeypatch):
    """Their caches after plain steps are those after drafting ones: drafts made later see the whole text."""
    monkeypatch.setattr(statistics.FixedDepth, "idle", idle)
    own = small(num_nextn_predict_layers=depths)
    prompt, mask = batch("left")
    kwargs = {"attention_mask": mask, "max_new_tokens": 23, "do_sample": False, "eos_token_id": None}
    kwargs |= {"use_mtp": True, "return_dict_in_generate": True, "disable_compile": not replayed}
    drafting = own.generate(prompt, num_assistant_tokens=3, **kwargs)
    monkeypatch.setattr(statistics.FixedDepth, "next", lambda policy: 0)
    plain = own.generate(prompt, num_assistant_tokens=3, **kwargs)
    assert plain.mtp.drafted == [] and torch.equal(plain.sequences, drafting.sequences)
    end = prompt.shape[1] + 23 - 1 - depths  # beyond it tokens are guessed
    for module in range(depths):
        caches = [output.past_key_values.layers[own.config.num_hidden_layers + module] for output in (drafting, plain)]
        for row, pad in enumerate((0, 3, 7, 10)):
            ours, other = (cache.joint()[row, pad:end] for cache in caches)
            torch.testing.assert_close(ours, other, rtol=1e-4, atol=1e-5)

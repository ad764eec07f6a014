"""A `LatentCache` in FP8 and one with a sliding window: against a full cache of what the codes stand for, or with an
explicit band mask."""

import pytest
import torch

from deepseek_v3 import LatentCache
from deepseek_v3.configuration import account, preset
from deepseek_v3.modeling_deepseek_v3 import attention, cache_growing, graphs
from deepseek_v3.modeling_deepseek_v3 import model as model_file
from deepseek_v3.modeling_deepseek_v3.cache_growing import LatentLayer
from twins import make_model

FP8 = torch.float8_e4m3fn
CHUNKS = (16, 1, 1, 5, 1)
KINDS = [{"dtype": FP8}, {"sliding_window": 6}, {"dtype": FP8, "sliding_window": 6}]


def same(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@torch.inference_mode()
def run(model, tokens, cache, chunks, mask=None, **kwargs):
    """Logits of all chunks; `mask` [B, S] or a function of the chunk's first and end slot."""
    logits, start = [], 0
    for count in chunks:
        end = start + count
        given = mask(start, end) if callable(mask) else None if mask is None else mask[:, :end]
        positions = torch.arange(start, end).expand(len(tokens), -1)
        output = model(
            tokens[:, start:end], attention_mask=given, position_ids=positions, past_key_values=cache, **kwargs
        )
        logits.append(output.logits)
        start = end
    return torch.cat(logits, dim=1)


def rounded(monkeypatch):
    """Every latent through E4M3 by the formula, before a cache of the model's own dtype keeps it."""
    update = LatentLayer.update

    def coarse(self, keys, values, *args, **kwargs):
        parts = []
        for part in keys.split(128, dim=-1):
            scale = part.abs().amax(dim=-1, keepdim=True).clamp(min=1e-30) / 448
            parts.append((part / scale).to(FP8).float() * scale)
        return update(self, torch.cat(parts, dim=-1), values, *args, **kwargs)

    monkeypatch.setattr(LatentLayer, "update", coarse)


@pytest.mark.parametrize("form", ["auto", "expanded", "absorbed"])
@pytest.mark.parametrize("rank, length", [(32, None), (160, None), (32, 30)])
def test_fp8_attends_to_what_the_codes_stand_for(tokens, form, rank, length, monkeypatch):
    model = make_model(kv_lora_rank=rank)
    cache = LatentCache(model.config, max_cache_len=length, dtype=FP8)
    kwargs = {} if form == "auto" else {"mla_form": form}
    coded = run(model, tokens, cache, CHUNKS, **kwargs)
    plain = run(model, tokens, LatentCache(model.config), CHUNKS, **kwargs)
    rounded(monkeypatch)
    same(coded, run(model, tokens, LatentCache(model.config), CHUNKS, **kwargs))
    assert (coded - plain).abs().max() > 1e-3  # the codes are read, not what they were made of


def test_fp8_bytes_are_those_of_the_accounting():
    model = make_model(kv_lora_rank=160).to(torch.bfloat16)
    cache = LatentCache(model.config, dtype=FP8)
    with torch.inference_mode():
        model(torch.ones(2, 7, dtype=torch.long), past_key_values=cache)
    expected = account(model.config).cache_bytes_per_token("float8_e4m3fn")
    assert cache.bytes_per_token() == expected
    assert cache.nbytes() == 14 * expected
    layer = LatentCache(preset("deepseek-v3"), dtype=FP8)
    layer.update(torch.randn(1, 1, 3, 512).bfloat16(), torch.randn(1, 1, 3, 64).bfloat16(), 0)
    assert layer.bytes_per_token() == 656 and layer.nbytes() == 3 * 656
    assert layer.layers[0]._storage.element_size() * layer.layers[0]._storage.shape[-1] == 656


@pytest.mark.parametrize("kind", KINDS)
def test_rows_and_tails_are_handled_as_in_a_plain_cache(model, tokens, kind):
    def fresh(rows):
        cache = LatentCache(model.config, **kind)
        run(model, rows, cache, (rows.shape[1],))
        return cache

    def step(rows, cache):
        with torch.inference_mode():
            return model(rows, past_key_values=cache).logits

    other = tokens[:, :1]
    for change, rows in (
        (lambda cache: cache.reorder_cache(torch.tensor([1, 0])), tokens.flip(0)),
        (lambda cache: cache.batch_select_indices(torch.tensor([1])), tokens[1:]),
        (lambda cache: cache.batch_repeat_interleave(2), tokens.repeat_interleave(2, 0)),
        (lambda cache: [layer.offload() or layer.prefetch() for layer in cache.layers], tokens),
        (lambda cache: cache.crop(-5), tokens[:, :-5]),
    ):
        cache = fresh(tokens)
        change(cache)
        for layer in cache.layers:  # dead slots hold no number
            layer._storage[:, :, layer.get_seq_length() :].view(torch.uint8).fill_(255)
        new = other[: len(rows)] if len(rows) <= 2 else other.repeat_interleave(2, 0)
        same(step(new, cache), step(new, fresh(rows)))
    cache.reset()
    same(step(tokens[:1], cache), step(tokens[:1], LatentCache(model.config, **kind)))


def band(window, mask=None):
    def make(start, end):
        queries, slots = torch.arange(start, end)[:, None], torch.arange(end)[None]
        seen = (slots <= queries) & (slots > queries - window)
        return seen[None, None] if mask is None else seen & mask[:, None, None, :end]

    return make


@pytest.mark.parametrize("window", [1, 4, 12, 40])
@pytest.mark.parametrize("form", ["expanded", "absorbed"])
@pytest.mark.parametrize("length", [None, 24])
def test_a_window_equals_a_band_mask_over_everything(model, tokens, window, form, length):
    mask = torch.ones_like(tokens).bool()
    mask[0, :3] = False
    for padding in (None, mask):
        for chunks in (CHUNKS, (24,), (1,) * 24):
            cache = LatentCache(model.config, length, sliding_window=window)
            ours = run(model, tokens, cache, chunks, padding, mla_form=form)
            whole = LatentCache(model.config)
            theirs = run(model, tokens, whole, chunks, band(window, padding), mla_form=form)
            real = mask if padding is not None else torch.ones_like(mask)
            same(ours[real], theirs[real])


def test_a_window_takes_bounded_memory():
    model = make_model(num_hidden_layers=2, max_position_embeddings=4096)
    tokens = torch.randint(3, 512, (1, 1000), generator=torch.Generator().manual_seed(1))
    cache = LatentCache(model.config, sliding_window=50)
    ours = run(model, tokens, cache, (600, *[8] * 30, *[1] * 160))
    assert cache.get_seq_length() == 1000
    for layer in cache.layers:
        assert layer._storage.shape[2] <= 2 * (64 + 64)
        assert layer.keys.shape[2] == 50
    assert cache.nbytes() == 50 * cache.bytes_per_token()
    theirs = run(model, tokens, LatentCache(model.config), (1000,), band(50))
    same(ours[:, -20:], theirs[:, -20:])
    with pytest.raises(ValueError, match="sliding_window = 50"):
        cache.crop(-500)


@pytest.mark.parametrize("kind", [{"dtype": FP8}, {"sliding_window": 9}, {"dtype": FP8, "sliding_window": 9}])
@pytest.mark.parametrize("replayed", [False, True])
def test_drafts_are_those_of_plain_decoding_and_generation_goes_on(kind, replayed, monkeypatch):
    model = make_model(vocab_size=6, pad_token_id=2, eos_token_id=1, num_nextn_predict_layers=2)
    prompt = torch.randint(3, 6, (3, 11), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(prompt)
    mask[1, :4], prompt[1, :4] = 0, 2
    captured = []
    if replayed:
        stand_in(monkeypatch, captured)
    monkeypatch.setattr(cache_growing, "_ROOM", 8)  # a window soon drops what it does not show
    kwargs = {"do_sample": False, "eos_token_id": None, "max_new_tokens": 80}

    def make():
        return LatentCache(model.config, **kind)

    plain = model.generate(prompt, attention_mask=mask, past_key_values=make(), disable_compile=True, **kwargs)
    assert torch.equal(model.generate(prompt, attention_mask=mask, past_key_values=make(), **kwargs), plain)
    cache = make()
    kwargs |= {"use_mtp": True, "num_assistant_tokens": 3}
    drafted = model.generate(prompt, attention_mask=mask, past_key_values=cache, **kwargs)
    assert torch.equal(drafted, plain)
    assert bool(captured) == replayed
    # Scores keep the step as a whole out of a graph; its forwards are replayed one by one.
    record = {"output_scores": True, "return_dict_in_generate": True}
    recorded = model.generate(prompt, attention_mask=mask, past_key_values=make(), **record, **kwargs)
    assert torch.equal(recorded.sequences, plain)
    wide = torch.nn.functional.pad(mask, (0, 80), value=1)
    kwargs["max_new_tokens"] = 12
    after = model.generate(drafted, attention_mask=wide, past_key_values=cache, **kwargs)
    assert torch.equal(after, model.generate(drafted, attention_mask=wide, past_key_values=make(), **kwargs))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"cache_implementation": "static", "disable_compile": True},
        {"use_mtp": True, "num_assistant_tokens": 2},
        {"use_mtp": True, "num_assistant_tokens": 2, "cache_implementation": "static"},
        {"num_beams": 2},
        {"prompt_lookup_num_tokens": 3},
    ],
    ids=lambda kwargs: ", ".join(kwargs),
)
def test_generate_makes_the_cache_that_cache_config_names(kind, kwargs, monkeypatch):
    model = make_model(vocab_size=6, pad_token_id=2, eos_token_id=None, num_nextn_predict_layers=1)
    rows = 1 if "prompt_lookup_num_tokens" in kwargs else 3
    prompt = torch.randint(3, 6, (rows, 11), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(prompt)
    if rows > 1:
        mask[1, :4], prompt[1, :4] = 0, 2
    made, start = [], LatentCache.__init__

    def note(cache, *arguments, **options):
        made.append(cache)
        start(cache, *arguments, **options)

    monkeypatch.setattr(LatentCache, "__init__", note)
    kwargs = {"attention_mask": mask, "do_sample": False, "max_new_tokens": 20, **kwargs}
    named = {name: "float8_e4m3fn" if value is FP8 else value for name, value in kind.items()}
    ours = model.generate(prompt, cache_config=named, **kwargs)
    assert [(cache.dtype, cache.sliding_window) for cache in made] == [(kind.get("dtype"), kind.get("sliding_window"))]
    assert (made[0].max_cache_len is not None) == ("cache_implementation" in kwargs)
    if "dtype" in kind:
        rounded(monkeypatch)
    if "num_beams" in kwargs:  # a full cache is not what a window's beams see
        given = LatentCache(model.config, sliding_window=kind.get("sliding_window"))
        assert torch.equal(ours, model.generate(prompt, past_key_values=given, **kwargs))
    else:
        assert torch.equal(ours, greedy(model, prompt, mask, kind.get("sliding_window", 99)))


def greedy(model, prompt, mask, window):
    """20 tokens more, each from a forward over the whole text under a band mask."""
    for _ in range(20):
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        seen = band(window, mask.bool())(0, prompt.shape[1])
        with torch.inference_mode():
            logits = model(
                prompt, attention_mask=seen, position_ids=positions, past_key_values=LatentCache(model.config)
            ).logits
        prompt = torch.cat((prompt, logits[:, -1:].argmax(-1)), dim=1)
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)
    return prompt


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("drafts", [0, 2])
def test_a_conversation_goes_on_from_a_returned_cache(kind, drafts, monkeypatch):
    monkeypatch.setattr(cache_growing, "_ROOM", 8)
    model = make_model(vocab_size=6, pad_token_id=2, eos_token_id=None, num_nextn_predict_layers=1)
    prompt = torch.randint(3, 6, (2, 9), generator=torch.Generator().manual_seed(4))
    kwargs = {"do_sample": False, "cache_config": kind, "return_dict_in_generate": True}
    if drafts:
        kwargs |= {"use_mtp": True, "num_assistant_tokens": drafts}
    first = model.generate(prompt, max_new_tokens=50, attention_mask=torch.ones_like(prompt), **kwargs)
    turn = torch.cat((first.sequences, prompt), dim=1)
    kwargs |= {"max_new_tokens": 12, "attention_mask": torch.ones_like(turn)}
    after = model.generate(turn, past_key_values=first.past_key_values, **kwargs)
    assert after.past_key_values is first.past_key_values
    assert torch.equal(after.sequences, model.generate(turn, **kwargs).sequences)
    if "sliding_window" in kind:
        with pytest.raises(ValueError, match="sliding_window = 6 has dropped"):
            after.past_key_values.crop(-60)


@pytest.mark.parametrize("drafts", [0, 1])
def test_a_compiled_model_decodes_over_a_fixed_cache_of_both_kinds(drafts, fresh_compiler):
    model = make_model(num_hidden_layers=2, vocab_size=40, pad_token_id=2, eos_token_id=None)
    prompt = torch.randint(3, 40, (2, 9), generator=torch.Generator().manual_seed(4))
    mask = torch.ones_like(prompt)
    mask[0, :3] = 0
    kwargs = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "cache_config": KINDS[-1]}
    expected = model.generate(prompt, **kwargs)
    model.forward = torch.compile(model.forward, backend="eager")
    if drafts:
        kwargs |= {"use_mtp": True, "num_assistant_tokens": drafts}
    assert torch.equal(model.generate(prompt, cache_implementation="static", **kwargs), expected)
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()  # the limit on recompiling a forward counts across tests


def test_the_choice_of_a_cache_is_saved_with_the_model(tmp_path):
    model = make_model(pad_token_id=2)
    model.generation_config.cache_config = {"dtype": FP8, "sliding_window": 7}
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    kwargs = {"max_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True}
    cache = again.generate(torch.tensor([[5, 6]]), **kwargs).past_key_values
    assert (cache.dtype, cache.sliding_window) == (FP8, 7)
    given = LatentCache(model.config)
    assert again.generate(torch.tensor([[5, 6]]), past_key_values=given, **kwargs).past_key_values is given
    with pytest.raises(ValueError, match="cache_config holds 'nbits'"):
        again.generate(torch.tensor([[5, 6]]), cache_config={"nbits": 4}, **kwargs)
    with pytest.raises(ValueError, match="dtype = int4"):
        again.generate(torch.tensor([[5, 6]]), cache_config={"dtype": "int4"}, **kwargs)


def stand_in(monkeypatch, captured):
    """Graphs that run the captured function again; see tests/generation/test_graphs.py."""

    class Again(graphs.DecodeGraphs):
        def __init__(self, starts, cache):
            super().__init__(starts, set())
            self.cache = cache

        def _capture(self, function, inputs):
            captured.append(function)

            def replay():
                lengths = [layer.get_seq_length() for layer in self.cache.layers]
                output = function(*inputs)
                for layer, length in zip(self.cache.layers, lengths, strict=True):
                    layer._length = length
                return output

            return replay

    monkeypatch.setattr(model_file, "make_graphs", lambda base, cache, mask: Again(graphs.starts_of(mask)[1], cache))


@pytest.mark.parametrize(
    "kind, words",
    [
        ({"dtype": torch.float16}, "dtype = torch.float16"),
        ({"sliding_window": 0}, "sliding_window = 0"),
    ],
)
def test_what_no_cache_can_be_is_refused(model, kind, words):
    with pytest.raises(ValueError, match=words):
        LatentCache(model.config, **kind)


def test_what_a_form_cannot_do_is_refused(model, tokens):
    with pytest.raises(ValueError, match="no gradient"):
        model(tokens, past_key_values=LatentCache(model.config, dtype=FP8))
    cache = LatentCache(model.config, sliding_window=5)
    run(model, tokens, cache, (20,))
    with pytest.raises(ValueError, match="attention_mask of shape"), torch.inference_mode():
        model(tokens[:, 20:22], attention_mask=torch.ones(2, 1, 2, 22).bool(), past_key_values=cache)


def test_gradients_flow_through_a_window(tokens, monkeypatch):
    monkeypatch.setattr(cache_growing, "_ROOM", 2)  # so that the first chunk outgrows it
    model = make_model(num_hidden_layers=2).train()
    gradients = []
    for cache, mask in ((LatentCache(model.config, sliding_window=4), None), (LatentCache(model.config), band(4))):
        model.zero_grad()
        total, start = 0.0, 0
        for end in (16, 19, 24):
            given = None if mask is None else mask(start, end)
            total = total + model(tokens[:, start:end], attention_mask=given, past_key_values=cache).logits.sum()
            start = end
        total.backward()
        gradients.append(model.model.layers[0].self_attn.kv_a_proj_with_mqa.weight.grad.clone())
    assert gradients[0].norm() > 0
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-4)


class Largest(torch.utils._python_dispatch.TorchDispatchMode):
    """The largest tensor that any operation gives, in bytes."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.bytes = max(self.bytes, tensor.numel() * tensor.element_size())
        return result


def test_a_long_prompt_expands_some_heads_at_a_time(monkeypatch):
    model = make_model(num_attention_heads=16, num_key_value_heads=16, num_hidden_layers=2, vocab_size=64)
    config = model.config
    tokens = torch.randint(3, 64, (1, 1024), generator=torch.Generator().manual_seed(1))

    def chunked():
        with Largest() as largest:
            logits = run(model, tokens, LatentCache(config), (32,) * 32, mla_form="expanded", logits_to_keep=1)
        return logits, largest.bytes

    whole, before = chunked()
    a_head = 1024 * (config.qk_nope_head_dim + config.v_head_dim) * 4
    assert before >= 16 * a_head
    width = 2 * (config.qk_nope_head_dim + config.v_head_dim) + config.qk_rope_head_dim
    monkeypatch.setattr(attention, "EXPANDED_BYTES", 2 * 1024 * width * 4)
    parts, after = chunked()
    same(parts, whole)
    assert after <= before / 4

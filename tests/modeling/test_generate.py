"""`generate` and `pipeline` against transformers' own class, over every strategy the class supports."""

import pytest
import torch
from transformers import DynamicCache, StaticCache, pipeline

from deepseek_v3 import DeepseekV3ForSequenceClassification, LatentCache
from deepseek_v3.configuration import preset
from deepseek_v3.training.data import train_tokenizer
from twins import YARN, make_model, native_twin

STRATEGIES = {
    "greedy": {"do_sample": False},
    "sample": {"do_sample": True, "top_k": 20, "temperature": 0.8},
    "beam": {"num_beams": 3, "do_sample": False},
    "beam sample": {"num_beams": 2, "do_sample": True},
    "several": {"do_sample": True, "num_return_sequences": 3},
    "prompt lookup": {"do_sample": False, "prompt_lookup_num_tokens": 3},
    "static": {"do_sample": False, "cache_implementation": "static", "disable_compile": True},
    "no cache": {"do_sample": False, "use_cache": False},
    "chunked prefill": {"do_sample": False, "prefill_chunk_size": 4},
}


def both(model, native, seed=0, **kwargs):
    outputs = []
    for one in (model, native):
        torch.manual_seed(seed)
        outputs.append(one.generate(**kwargs))
    return outputs


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_same_tokens_as_the_native_class(strategy, tokens):
    model = make_model(rope_scaling=dict(YARN), pad_token_id=2, eos_token_id=1)
    prompt = tokens[:1, :12] if strategy == "prompt lookup" else tokens[:, :12]
    mask = torch.ones_like(prompt)
    if len(prompt) > 1:
        mask[0, :4], prompt = 0, torch.where(torch.arange(12) < torch.tensor([[4], [0]]), 2, prompt)
    ours, theirs = both(
        model, native_twin(model), input_ids=prompt, attention_mask=mask, max_new_tokens=16, **STRATEGIES[strategy]
    )
    assert torch.equal(ours, theirs)


def test_assisted_generation_equals_greedy(tokens):
    model, assistant = make_model(pad_token_id=2), make_model(seed=3, pad_token_id=2)
    prompt = tokens[:1, :10]
    plain = model.generate(prompt, max_new_tokens=14, do_sample=False)
    assert torch.equal(model.generate(prompt, max_new_tokens=14, do_sample=False, assistant_model=assistant), plain)


def test_default_cache_is_the_latent_one_and_a_given_one_is_kept(model, tokens):
    generate = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True}
    output = model.generate(tokens, **generate)
    assert type(output.past_key_values) is LatentCache
    assert len(output.past_key_values.layers) == model.config.num_hidden_layers
    for cache in (DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=40)):
        given = model.generate(tokens, past_key_values=cache, **generate)
        assert given.past_key_values is cache
        assert torch.equal(given.sequences, output.sequences)


def test_a_conversation_goes_on_from_its_cache(model, tokens):
    first = model.generate(tokens[:, :10], max_new_tokens=5, do_sample=False, return_dict_in_generate=True)
    turn = torch.cat([first.sequences, tokens[:, 10:15]], dim=1)
    kwargs = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(turn)}
    assert torch.equal(
        model.generate(turn, past_key_values=first.past_key_values, **kwargs), model.generate(turn, **kwargs)
    )


def test_generation_from_embeddings_equals_that_from_tokens(model, tokens):
    by_token = model.generate(tokens, max_new_tokens=6, do_sample=False)
    embedded = model.model.embed_tokens(tokens).detach()
    by_embedding = model.generate(inputs_embeds=embedded, max_new_tokens=6, do_sample=False)
    assert torch.equal(by_token[:, tokens.shape[1] :], by_embedding)


def test_scores_hidden_states_and_attentions_come_back(tokens):
    model = make_model()
    model.set_attn_implementation("eager")
    output = model.generate(
        tokens,
        max_new_tokens=3,
        do_sample=False,
        return_dict_in_generate=True,
        output_scores=True,
        output_logits=True,
        output_hidden_states=True,
        output_attentions=True,
    )
    assert len(output.scores) == len(output.logits) == len(output.hidden_states) == len(output.attentions) == 3
    assert len(output.hidden_states[0]) == model.config.num_hidden_layers + 1
    assert output.attentions[0][0].shape == (2, 4, 24, 24)
    assert output.attentions[2][0].shape == (2, 4, 1, 26)  # an absorbed step has attention weights too
    torch.testing.assert_close(output.attentions[2][0].sum(-1), torch.ones(2, 4, 1))


def test_attentions_and_hidden_states_equal_the_native_class(tokens):
    model = make_model()
    native = native_twin(model)
    model.set_attn_implementation("eager")
    native.set_attn_implementation("eager")
    kwargs = {"output_attentions": True, "output_hidden_states": True, "output_router_logits": True}
    with torch.no_grad():
        ours, theirs = model(tokens, **kwargs), native(tokens, **kwargs)
    for name in ("attentions", "hidden_states", "router_logits"):
        assert len(ours[name]) == len(theirs[name])
        for a, b in zip(ours[name], theirs[name], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_return_dict_false_gives_the_loss_first(model, tokens):
    plain = model(tokens, labels=tokens, return_dict=False)
    named = model(tokens, labels=tokens)
    assert isinstance(plain, tuple)
    assert torch.equal(plain[0], named.loss)


@pytest.mark.parametrize("form", ["auto", "absorbed"])
def test_compiles_into_one_graph(form, tokens):
    model = make_model(mla_form=form, num_hidden_layers=2)  # one dense, one with experts
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    cache, plain = (StaticCache(config=model.config, max_cache_len=32) for _ in range(2))
    with torch.no_grad():
        torch.testing.assert_close(compiled(tokens).logits, model(tokens).logits, rtol=1e-4, atol=1e-5)
        for one in (cache, plain):
            model(tokens, past_key_values=one)
        step = tokens[:, :1]
        torch.testing.assert_close(
            compiled(step, past_key_values=cache).logits,
            model(step, past_key_values=plain).logits,
            rtol=1e-4,
            atol=1e-5,
        )


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["def main():\n    return 'hello world'\n"] * 20, 300)


def test_text_generation_pipeline_from_a_folder(tokenizer, tmp_path):
    model = make_model(vocab_size=len(tokenizer), pad_token_id=2)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    generate = pipeline("text-generation", model=str(tmp_path))
    outputs = generate(["def main", "return 'hello"], max_new_tokens=8, do_sample=False, batch_size=2)
    alone = [generate(prompt, max_new_tokens=8, do_sample=False) for prompt in ("def main", "return 'hello")]
    assert outputs == alone
    assert outputs[0][0]["generated_text"].startswith("def main")


def test_text_classification_pipeline(tokenizer, tmp_path):
    config = preset("tiny", vocab_size=len(tokenizer), pad_token_id=2, num_labels=3)
    DeepseekV3ForSequenceClassification(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    classify = pipeline("text-classification", model=str(tmp_path))
    batch = classify(["def main", "return 'hello world'"], batch_size=2, top_k=None)
    assert [sorted(score["label"] for score in scores) for scores in batch] == [["LABEL_0", "LABEL_1", "LABEL_2"]] * 2
    alone = classify("def main", top_k=None)
    assert [s["score"] for s in alone] == pytest.approx([s["score"] for s in batch[0]], rel=1e-4)

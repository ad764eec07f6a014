"""`generate(use_mtp=True)`: the tokens of plain decoding, row by row, whatever is accepted when."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from transformers import GenerationConfig, LogitsProcessor, StoppingCriteria, TextStreamer, pipeline

from deepseek_v3 import DeepseekV3ForCausalLM, LatentCache
from deepseek_v3.configuration import preset
from deepseek_v3.modeling_deepseek_v3.cache_growing import LatentLayer
from deepseek_v3.training.data import train_tokenizer
from twins import YARN, make_model


def small(seed=0, depths=1, vocab=6, **overrides):
    """A model of few words, so that some drafts are right and some are wrong."""
    return make_model(
        seed, vocab_size=vocab, num_nextn_predict_layers=depths, pad_token_id=2, eos_token_id=1, **overrides
    )


def successor(vocab=40, depths=1):
    """A model whose next token is its last plus one, and whose MTP modules know it."""
    config = preset("tiny", vocab_size=vocab, eos_token_id=0, pad_token_id=0, num_nextn_predict_layers=depths)
    model = DeepseekV3ForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight", "experts.down_proj")):
                parameter.zero_()
        basis = torch.linalg.qr(torch.randn(64, 64))[0][:vocab]
        model.model.embed_tokens.weight.copy_(basis)
        model.lm_head.weight.copy_(basis.roll(1, dims=0))
        for layer in model.model.mtp_layers:
            layer.eh_proj.weight.copy_(torch.cat((torch.eye(64), torch.zeros(64, 64)), dim=1))
    return model


def plain_row(model, row, mask, **kwargs):
    """Greedy continuation of one row without its padding: the new tokens up to where it ends."""
    prompt = row[mask.bool()][None]
    output = model.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False, **kwargs)
    return output[0, prompt.shape[1] :].tolist()


def trimmed(tokens, end=1):
    return tokens[: tokens.index(end) + 1] if end in tokens else tokens


@pytest.mark.parametrize("drafts", [1, 2, 3, 6])
@pytest.mark.parametrize("depths", [1, 2])
def test_greedy_batches_give_the_tokens_of_plain_greedy(drafts, depths):
    model = small(depths=depths, rope_scaling=dict(YARN))
    prompt = torch.randint(3, 6, (6, 9), generator=torch.Generator().manual_seed(3))
    kwargs = {"max_new_tokens": 30, "do_sample": False, "attention_mask": torch.ones_like(prompt)}
    plain = model.generate(prompt, **kwargs)
    output = model.generate(prompt, use_mtp=True, num_assistant_tokens=drafts, return_dict_in_generate=True, **kwargs)
    assert torch.equal(output.sequences, plain)
    assert 0 < sum(output.mtp.accepted) < sum(output.mtp.drafted)  # the test sees both


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(
    seed=st.integers(0, 1000),
    lengths=st.lists(st.integers(1, 7), min_size=1, max_size=4),
    side=st.sampled_from(["left", "right"]),
    drafts=st.integers(1, 4),
    depths=st.integers(1, 2),
    new=st.integers(1, 12),
    end=st.sampled_from([1, 3, 4]),
)
def test_any_batch_equals_its_rows_alone(seed, lengths, side, drafts, depths, new, end):
    model = small(seed, depths)
    generator = torch.Generator().manual_seed(seed)
    longest = max(lengths)
    prompt, mask = torch.full((len(lengths), longest), 2), torch.zeros(len(lengths), longest, dtype=torch.long)
    for row, length in enumerate(lengths):
        real = slice(longest - length, None) if side == "left" else slice(0, length)
        prompt[row, real] = torch.randint(0, 6, (length,), generator=generator)
        mask[row, real] = 1
    kwargs = {"max_new_tokens": new, "eos_token_id": end, "pad_token_id": 2}
    output = model.generate(
        prompt, attention_mask=mask, use_mtp=True, num_assistant_tokens=drafts, do_sample=False, **kwargs
    )
    assert torch.equal(output[:, :longest], prompt)
    for row in range(len(lengths)):
        expected = plain_row(model, prompt[row], mask[row], **kwargs)
        got = output[row, longest:].tolist()
        assert got[: len(expected)] == expected
        assert set(got[len(expected) :]) <= {2}


def test_rejected_drafts_are_never_attended_to(monkeypatch):
    """NaN in every slot that holds no valid token, before every forward of every module."""
    model = small(depths=2)
    prompt = torch.randint(3, 6, (4, 5))
    kwargs = {"max_new_tokens": 25, "do_sample": False, "attention_mask": torch.ones_like(prompt)}
    plain = model.generate(prompt, **kwargs)
    update = LatentLayer.update

    def poisoned(self, keys, values, *args, rows=None, **more):
        if rows is not None and self._storage is not None:
            slots = torch.arange(self._storage.shape[2])
            # What stays valid is what lies before the first slot that is about to be written.
            dead = slots[None] >= rows.slots.amin(dim=1)[:, None]
            self._storage[:, 0].masked_fill_(dead[..., None], float("nan"))
        return update(self, keys, values, *args, rows=rows, **more)

    monkeypatch.setattr(LatentLayer, "update", poisoned)
    assert torch.equal(model.generate(prompt, use_mtp=True, num_assistant_tokens=3, **kwargs), plain)


@pytest.mark.parametrize("depths", [1, 2])
@pytest.mark.parametrize("drafts", [1, 3])
def test_perfect_drafts_need_the_fewest_steps_to_the_token(drafts, depths):
    model = successor(depths=depths)
    prompt = torch.tensor([[3, 4], [7, 9]])
    output = model.generate(
        prompt,
        max_new_tokens=25,
        do_sample=False,
        use_mtp=True,
        num_assistant_tokens=drafts,
        return_dict_in_generate=True,
    )
    assert output.sequences[:, 2:].tolist() == [[5 + i for i in range(25)], [10 + i for i in range(25)]]
    # The prompt's forward gives one token, each step k + 1.
    assert output.mtp.steps == 24 // (drafts + 1)
    assert output.mtp.tokens_per_step == drafts + 1
    assert output.mtp.acceptance == [1.0] * drafts


def test_rows_that_end_stop_counting_and_leave_the_batch():
    model = successor()
    prompt = torch.tensor([[30], [5], [36], [20]])  # ends at 40, which is 0 again: the EOS
    output = model.generate(prompt, max_new_tokens=100, do_sample=False, use_mtp=True, return_dict_in_generate=True)
    for row, start in enumerate((30, 5, 36, 20)):
        expected = [*range(start, 40), 0]
        assert output.sequences[row].tolist() == expected + [0] * (output.sequences.shape[1] - len(expected))
    assert output.mtp.row_steps < 4 * output.mtp.steps
    kept = model.generate(prompt, max_new_tokens=100, do_sample=False, use_mtp=True)
    assert torch.equal(kept, output.sequences)


@pytest.mark.parametrize("new", [1, 2])
def test_very_few_new_tokens(new):
    model = small()
    prompt = torch.tensor([[4]])
    kwargs = {"max_new_tokens": new, "do_sample": False}
    for drafts in (1, 4, "auto"):
        assert torch.equal(
            model.generate(prompt, use_mtp=True, num_assistant_tokens=drafts, **kwargs),
            model.generate(prompt, **kwargs),
        )


@pytest.mark.parametrize(
    "control",
    [
        {"max_length": 17},
        {"min_new_tokens": 12},
        {"eos_token_id": [1, 4]},
        {"repetition_penalty": 1.7},
        {"no_repeat_ngram_size": 2},
        {"bad_words_ids": [[3], [5, 4]]},
        {"forced_eos_token_id": 1, "max_new_tokens": 9},
        {"suppress_tokens": [4]},
        {"exponential_decay_length_penalty": (3, 1.5)},
        {"sequence_bias": [[[4], 2.0]]},
    ],
    ids=lambda control: next(iter(control)),
)
@pytest.mark.parametrize("rows", [1, 3])
def test_controls_work_as_in_plain_decoding(control, rows):
    model = small(vocab=8)
    prompt = torch.randint(3, 8, (rows, 5), generator=torch.Generator().manual_seed(1))
    kwargs = {
        "do_sample": False,
        "attention_mask": torch.ones_like(prompt),
        **({} if "max_length" in control else {"max_new_tokens": 20}),
    }
    kwargs |= control
    assert torch.equal(
        model.generate(prompt, use_mtp=True, num_assistant_tokens=3, **kwargs), model.generate(prompt, **kwargs)
    )


class EveryThird(LogitsProcessor):
    """Forces a token at every third call: state that a call too many would spoil."""

    def __init__(self):
        self.calls = 0

    def __call__(self, input_ids, scores):
        self.calls += 1
        if self.calls % 3 == 0:
            scores = torch.full_like(scores, -1e9)
            scores[:, self.calls % 5] = 0
        return scores


class OwnLength(StoppingCriteria):
    """Ends row b after 4 + 2 b new tokens, and remembers the lengths it saw."""

    def __init__(self, prompt):
        self.prompt, self.seen = prompt, []

    def __call__(self, input_ids, scores, **kwargs):
        self.seen.append(input_ids.shape[1])
        rows = torch.arange(len(input_ids))
        return input_ids.shape[1] - self.prompt >= 4 + 2 * rows


@pytest.mark.parametrize("rows", [1, 3])
def test_processors_with_state_and_custom_criteria(rows):
    model = small(vocab=8)
    prompt = torch.randint(3, 8, (rows, 5))
    outputs, seen = [], []
    for mtp in ({}, {"use_mtp": True, "num_assistant_tokens": 3}):
        criterion = OwnLength(5)
        outputs.append(
            model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=20,
                do_sample=False,
                logits_processor=[EveryThird()],
                stopping_criteria=[criterion],
                **mtp,
            )
        )
        seen.append(sorted(set(criterion.seen)))
    assert torch.equal(*outputs)
    assert seen[0] == seen[1]  # no length skipped although several tokens arrive at once


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["def main():\n    return 'hello world'\n"] * 20, 290)


def test_pipeline_stop_strings_and_generation_config(tokenizer, tmp_path):
    model = make_model(vocab_size=len(tokenizer), pad_token_id=2)
    with torch.no_grad():
        model.lm_head.weight.zero_()
        word = tokenizer("ret", add_special_tokens=False)["input_ids"][0]
        model.lm_head.weight[word] = model.model.norm.weight  # says one word, over and over
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    generate = pipeline("text-generation", model=str(tmp_path))
    kwargs = {"max_new_tokens": 12, "do_sample": False}
    plain = generate(["def", "hello world"], batch_size=2, **kwargs)
    assert generate(["def", "hello world"], batch_size=2, use_mtp=True, num_assistant_tokens=2, **kwargs) == plain
    config = GenerationConfig(use_mtp=True, num_assistant_tokens=2, pad_token_id=2, eos_token_id=1, **kwargs)
    assert generate(["def", "hello world"], batch_size=2, generation_config=config) == plain
    stop = tokenizer.decode([word, word])
    stopped = [
        generate("def", stop_strings=[stop], tokenizer=tokenizer, **kwargs, **mtp) for mtp in ({}, {"use_mtp": True})
    ]
    assert stopped[0] == stopped[1]
    assert len(stopped[0][0]["generated_text"]) < len(plain[0][0]["generated_text"])


def test_streamer_gets_every_token_once_and_in_order(tokenizer, capsys):
    model = make_model(vocab_size=len(tokenizer), pad_token_id=2)
    prompt = tokenizer("def main", return_tensors="pt")["input_ids"]
    texts = []
    for mtp in ({}, {"use_mtp": True, "num_assistant_tokens": 3}):
        model.generate(prompt, max_new_tokens=12, do_sample=False, streamer=TextStreamer(tokenizer), **mtp)
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != ""


@pytest.mark.parametrize("rows", [1, 3])
def test_scores_logits_and_hidden_states_are_those_of_plain_decoding(rows):
    model = small(vocab=8)
    prompt = torch.randint(3, 8, (rows, 5))
    kwargs = {"max_new_tokens": 10, "do_sample": False, "return_dict_in_generate": True, "eos_token_id": 100}
    kwargs |= {"output_scores": True, "output_logits": True, "output_hidden_states": True, "repetition_penalty": 1.3}
    kwargs |= {"attention_mask": torch.ones_like(prompt)}
    plain = model.generate(prompt, **kwargs)
    mtp = model.generate(prompt, use_mtp=True, num_assistant_tokens=2, **kwargs)
    assert torch.equal(plain.sequences, mtp.sequences)
    for name in ("scores", "logits"):
        assert len(plain[name]) == len(mtp[name]) == 10
        for one, two in zip(plain[name], mtp[name], strict=True):
            torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)
    for one, two in zip(plain.hidden_states, mtp.hidden_states, strict=True):
        for a, b in zip(one, two, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("first", [{}, {"use_mtp": True, "num_assistant_tokens": 2}])
def test_a_conversation_goes_on_from_the_cache_of_an_earlier_call(first):
    model = small()
    prompt = torch.randint(3, 6, (3, 5))
    kwargs = {"do_sample": False, "max_new_tokens": 9, "eos_token_id": 100, "return_dict_in_generate": True}
    start = model.generate(prompt, attention_mask=torch.ones_like(prompt), **first, **kwargs)
    turn = torch.cat((start.sequences, torch.randint(3, 6, (3, 4))), dim=1)
    ones = torch.ones_like(turn)
    fresh = model.generate(turn, attention_mask=ones, use_mtp=True, num_assistant_tokens=2, **kwargs)
    again = model.generate(
        turn,
        attention_mask=ones,
        past_key_values=start.past_key_values,
        use_mtp=True,
        num_assistant_tokens=2,
        **kwargs,
    )
    assert torch.equal(again.sequences, fresh.sequences)
    if first:  # the modules' part of the cache came along: the very same drafts were right
        assert again.mtp == fresh.mtp
    plain = model.generate(
        turn, attention_mask=ones, past_key_values=again.past_key_values.__class__(model.config), **kwargs
    )
    assert torch.equal(plain.sequences, fresh.sequences)


def test_a_cache_left_by_drafting_serves_plain_decoding():
    model = small()
    prompt = torch.randint(3, 6, (2, 5))
    kwargs = {"do_sample": False, "max_new_tokens": 9, "eos_token_id": 100, "return_dict_in_generate": True}
    start = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), use_mtp=True, num_assistant_tokens=3, **kwargs
    )
    assert start.past_key_values.get_seq_length() == start.sequences.shape[1] - 1
    turn = torch.cat((start.sequences, torch.randint(3, 6, (2, 4))), dim=1)
    ones = torch.ones_like(turn)
    expected = model.generate(turn, attention_mask=ones, **kwargs).sequences
    assert torch.equal(
        model.generate(turn, attention_mask=ones, past_key_values=start.past_key_values, **kwargs).sequences, expected
    )


def test_prompts_as_embeddings_several_returns_and_a_fixed_cache():
    model = small()
    prompt = torch.randint(3, 6, (2, 5))
    kwargs = {"do_sample": False, "max_new_tokens": 15, "attention_mask": torch.ones_like(prompt)}
    plain = model.generate(prompt, **kwargs)
    embedded = model.generate(
        inputs_embeds=model.model.embed_tokens(prompt).detach(), use_mtp=True, num_assistant_tokens=2, **kwargs
    )
    assert torch.equal(embedded, plain[:, 5:])
    fixed = LatentCache(model.config, max_cache_len=40)
    assert torch.equal(
        model.generate(prompt, past_key_values=fixed, use_mtp=True, num_assistant_tokens=2, **kwargs), plain
    )
    static = model.generate(prompt, cache_implementation="static", use_mtp=True, num_assistant_tokens=2, **kwargs)
    assert torch.equal(static, plain)
    torch.manual_seed(0)
    several = model.generate(
        prompt,
        max_new_tokens=6,
        do_sample=True,
        num_return_sequences=3,
        use_mtp=True,
        attention_mask=torch.ones_like(prompt),
    )
    assert several.shape[0] == 6


def test_an_adapter_drafts_and_verifies_with_its_own_weights():
    base = small(vocab=8)
    torch.manual_seed(0)
    lora = LoraConfig(r=4, target_modules=["kv_b_proj", "q_b_proj", "eh_proj"], init_lora_weights=False)
    model = get_peft_model(base, lora).eval()
    prompt = torch.randint(3, 8, (2, 5))
    kwargs = {"do_sample": False, "max_new_tokens": 12, "attention_mask": torch.ones_like(prompt)}
    adapted = model.generate(input_ids=prompt, **kwargs)
    assert torch.equal(model.generate(input_ids=prompt, use_mtp=True, num_assistant_tokens=2, **kwargs), adapted)


def test_auto_depth_measures_chooses_and_stays_lossless(caplog):
    model = successor(vocab=60)
    prompt = torch.tensor([[1]])
    kwargs = {"max_new_tokens": 58, "do_sample": False, "use_mtp": True, "num_assistant_tokens": "auto"}
    with caplog.at_level("INFO", logger="deepseek_v3"), caplog.at_level("INFO", logger="transformers"):
        output = model.generate(prompt, return_dict_in_generate=True, **kwargs)
    assert output.sequences[0].tolist() == list(range(1, 60))
    assert f"MTP: {output.mtp.depth} drafts a step" in caplog.text


def test_no_acceptance_over_many_drafts_warns_with_the_cause(caplog):
    make_model(pad_token_id=2, eos_token_id=None).generate(
        torch.tensor([[5, 6, 7]]), max_new_tokens=80, do_sample=False, use_mtp=True, num_assistant_tokens=1
    )
    assert "drafts was accepted" in caplog.text
    assert "MTP weights" in caplog.text


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_beams": 2}, "num_beams"),
        ({"penalty_alpha": 0.6, "top_k": 4}, "contrastive"),
        ({"prompt_lookup_num_tokens": 3}, "prompt_lookup_num_tokens"),
        ({"use_cache": False}, "use_cache"),
        ({"num_assistant_tokens": 0}, "num_assistant_tokens = 0"),
        ({"num_assistant_tokens": "deep"}, "num_assistant_tokens = 'deep'"),
        ({"guidance_scale": 2.0}, "guidance_scale"),
        ({"output_attentions": True, "return_dict_in_generate": True}, "attentions"),
    ],
)
def test_what_drafts_cannot_serve_is_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        small().generate(torch.tensor([[3, 4]]), max_new_tokens=4, use_mtp=True, **kwargs)


def test_wrong_models_and_caches_are_refused():
    from transformers import DynamicCache

    with pytest.raises(ValueError, match="num_nextn_predict_layers"):
        small(depths=0).generate(torch.tensor([[3, 4]]), use_mtp=True, max_new_tokens=3)
    model = small()
    with pytest.raises(ValueError, match="LatentCache"):
        model.generate(torch.tensor([[3, 4]]), use_mtp=True, max_new_tokens=3, past_key_values=DynamicCache())

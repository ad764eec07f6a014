"""Distilling the MTP modules: what learns, towards what, and that drafts are what `generate` makes."""

import pytest
import torch
from torch.nn.functional import log_softmax

from deepseek_v3.training.distill import distill_mtp, draft_losses, main_states, own_text
from twins import make_model


@pytest.fixture
def prompts():
    return torch.randint(3, 512, (6, 8), generator=torch.Generator().manual_seed(3))


def greedy(model, prompts, new_tokens, **options):
    return model.generate(
        prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=new_tokens, do_sample=False, **options
    )


def test_own_text_is_what_the_model_writes_greedily(prompts):
    model = make_model(num_nextn_predict_layers=1)
    text = own_text(model, prompts, 5, batch=4)
    torch.testing.assert_close(text, greedy(model, prompts, 5, eos_token_id=None))
    ends = int(text[0, 9])
    model.generation_config.eos_token_id = ends
    torch.testing.assert_close(own_text(model, prompts, 5), text)  # goes on after a text's end
    torch.manual_seed(0)
    sampled = own_text(model, prompts, 5, do_sample=True, temperature=2.0)
    assert torch.equal(sampled[:, :8], prompts) and not torch.equal(sampled, text)


@pytest.mark.parametrize("state", ["post_norm", "pre_norm"])
@pytest.mark.parametrize("modules", [1, 2])
def test_losses_are_those_of_the_drafts_that_generate_makes(modules, state, prompts):
    """Every depth's distribution, row by row, against the drafter's own over the cache."""
    model = make_model(num_nextn_predict_layers=modules, mtp_hidden_state=state)
    depth = 3
    text = own_text(model, prompts[:1], 12)
    seen = drafted_logits(model, text, depth)
    with torch.no_grad():
        targets = log_softmax(model(text).logits[0], dim=-1)
        losses = draft_losses(model, text, main_states(model, text), depth)
    rows = text.shape[1] - depth
    for k in range(1, depth + 1):
        drafts = torch.stack([seen[row][k - 1] for row in range(rows)])
        target = targets[k : k + rows]
        expected = (target.exp() * (target - drafts)).sum(-1).mean()
        torch.testing.assert_close(losses[k - 1], expected, rtol=1e-4, atol=1e-6)


def drafted_logits(model, text, depth):
    """Log-probabilities of each depth's draft after each token of [1, T], every module run from the first token on
    for one row after another, without cache or mask: what the drafter does where all of its drafts are right."""
    embeds, modules = model.get_input_embeddings()(text), model.config.num_nextn_predict_layers
    pre_norm, result = model.config.mtp_hidden_state == "pre_norm", []
    with torch.no_grad():
        base = model.model(text)
        states = base.pre_norm_hidden_state if pre_norm else base.last_hidden_state
        for row in range(text.shape[1] - depth):
            previous, logits = states[:, : row + 1], []
            for k in range(1, depth + 1):
                if k <= modules:
                    inputs = (previous, embeds[:, k : row + 1 + k])
                else:  # a row more, of the last module's own output
                    more = (previous[:, -1:], embeds[:, row + k : row + k + 1])
                    inputs = tuple(torch.cat(pair, dim=1) for pair in zip(inputs, more, strict=True))
                rows = torch.arange(inputs[0].shape[1])[None]
                normed, previous = model.draft(min(k, modules) - 1, *inputs, None, rows)
                logits.append(log_softmax(model.lm_head(normed[0, -1]), dim=-1))
            result.append(logits)
    return result


def test_only_the_modules_learn_and_their_drafts_improve(prompts, tmp_path):
    model = make_model(num_nextn_predict_layers=1)
    model.model.embed_tokens.weight.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    text = own_text(model, prompts, 24)
    states = main_states(model, text)
    with torch.no_grad():
        first = draft_losses(model, text, states, 2)
    history = distill_mtp(model, text, str(tmp_path), depth=2, steps=60, batch=6, learning_rate=1e-2, warmup=5)
    with torch.no_grad():
        last = draft_losses(model, text, states, 2)
    assert (last < 0.5 * first).all()
    assert history[0]["loss"] > history[-2]["loss"]
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    index = model.config.num_hidden_layers
    assert changed and all(name.startswith(f"model.layers.{index}.") for name in changed)
    assert {name for name in before if name.startswith(f"model.layers.{index}.")} - changed == {
        f"model.layers.{index}.mlp.gate.e_score_correction_bias"
    }
    assert not model.training and not model.model.embed_tokens.weight.requires_grad
    assert model.lm_head.weight.requires_grad and all(p.grad is None for p in model.parameters())


def test_distilled_drafts_are_accepted_more_often_and_change_no_token(prompts, tmp_path):
    model = make_model(num_nextn_predict_layers=1)
    text = own_text(model, prompts, 32)

    def speculative():
        options = {"use_mtp": True, "num_assistant_tokens": 2, "return_dict_in_generate": True, "eos_token_id": None}
        output = greedy(model, prompts, 32, **options)
        torch.testing.assert_close(output.sequences, text)
        return output.mtp.tokens_per_step

    before = speculative()
    distill_mtp(model, text, str(tmp_path), depth=2, steps=80, batch=6, learning_rate=1e-2, warmup=5)
    assert speculative() > before + 0.3


def test_bad_input_says_what_to_change(prompts, tmp_path):
    with pytest.raises(ValueError, match="no MTP module"):
        distill_mtp(make_model(num_nextn_predict_layers=0), prompts, str(tmp_path))
    model = make_model(num_nextn_predict_layers=2)
    with pytest.raises(ValueError, match="depth = 1"):
        distill_mtp(model, prompts, str(tmp_path), depth=1)
    with pytest.raises(ValueError, match="depth = 8"):
        distill_mtp(model, prompts, str(tmp_path), depth=8)
    projection = model.model.mtp_layers[1].eh_proj
    projection.weight = torch.nn.Parameter(projection.weight.to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(ValueError, match="eh_proj.weight is quantised"):
        distill_mtp(model, prompts, str(tmp_path))

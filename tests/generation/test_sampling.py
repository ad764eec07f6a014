"""Sampled drafts leave the distribution of plain sampling as it is: the joint of the next three tokens.

The exact joint comes from the model's own logits in float64. A chi-square test over its cells (at most 125) rejects at
1e-4. n samples of a joint that is off by TV in total variation have a noncentrality of at least 4 n TV^2; at 240 the
power is above 0.999, which is TV = 0.05 with the 24,000 samples without processors, TV = 0.1 with 6,000, and TV = 0.14
with the 3,000 where a processor looks at the tokens, row by row. The last tests show it on a sampler that is wrong in
the usual way.
"""

import itertools

import pytest
import torch
from transformers.generation import logits_process as processors

from deepseek_v3.generation import acceptance
from twins import make_model

VOCABULARY = 5


@pytest.fixture(scope="module")
def sampled_model():
    """As small as a model with experts and a module can be: thousands of rows go through it."""
    sizes = {"hidden_size": 32, "intermediate_size": 32, "moe_intermediate_size": 16, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 2, "q_lora_rank": 16, "kv_lora_rank": 16}
    return make_model(3, vocab_size=VOCABULARY, pad_token_id=2, eos_token_id=None, **sizes)


SETTINGS = {
    "plain": {},
    "temperature": {"temperature": 0.6},
    "top-k": {"top_k": 3},
    "top-p": {"top_p": 0.8},
    "min-p": {"min_p": 0.2},
    "repetition penalty": {"repetition_penalty": 1.6},
    "all": {"temperature": 1.4, "top_k": 4, "top_p": 0.9, "repetition_penalty": 1.2},
}
WARPERS = {
    "repetition_penalty": processors.RepetitionPenaltyLogitsProcessor,
    "temperature": processors.TemperatureLogitsWarper,
    "top_k": processors.TopKLogitsWarper,
    "top_p": processors.TopPLogitsWarper,
    "min_p": processors.MinPLogitsWarper,
}


def exact_joint(model, prompt, setting):
    """P(a, b, c) of the next three tokens, [V, V, V] in float64."""
    chain = [WARPERS[name](setting[name]) for name in WARPERS if name in setting]

    def following(tokens):
        with torch.no_grad():
            scores = model(tokens).logits[:, -1].double()
        for warper in chain:
            scores = warper(tokens, scores)
        return scores.softmax(-1)

    joint = torch.zeros((VOCABULARY,) * 3, dtype=torch.float64)
    first = following(prompt)[0]
    for a, b in itertools.product(range(VOCABULARY), repeat=2):
        second = following(torch.cat((prompt, torch.tensor([[a]])), 1))[0]
        third = following(torch.cat((prompt, torch.tensor([[a, b]])), 1))[0]
        joint[a, b] = first[a] * second[b] * third
    return joint


def sampled_counts(model, prompt, setting, drafts):
    torch.manual_seed(0)
    counts = torch.zeros((VOCABULARY,) * 3, dtype=torch.long)
    samples = 3_000 if "repetition_penalty" in setting else 6_000 if setting else 24_000
    for start in range(0, samples, 2000):
        output = model.generate(
            prompt.expand(min(2000, samples - start), -1),
            attention_mask=torch.ones(min(2000, samples - start), prompt.shape[1], dtype=torch.long),
            max_new_tokens=3,
            do_sample=True,
            use_mtp=True,
            num_assistant_tokens=drafts,
            **{"top_k": 0, **setting},
        )[:, prompt.shape[1] :]
        flat = (output * torch.tensor([VOCABULARY**2, VOCABULARY, 1])).sum(-1)
        counts += torch.bincount(flat, minlength=VOCABULARY**3).view_as(counts)
    return counts


def p_value(counts, joint):
    """Chi-square goodness of fit; cells expected less than 5 times are pooled, impossible ones must be empty."""
    expected = joint * counts.sum()
    assert counts[joint == 0].sum() == 0, "a token that plain sampling excludes was drawn"
    rare = expected < 5
    observed = torch.cat((counts[~rare].double(), counts[rare].sum()[None].double()))
    wanted = torch.cat((expected[~rare], expected[rare].sum()[None]))
    observed, wanted = observed[wanted > 0], wanted[wanted > 0]
    statistic = ((observed - wanted) ** 2 / wanted).sum()
    return torch.special.gammaincc(torch.tensor((len(wanted) - 1) / 2.0, dtype=torch.float64), statistic / 2).item()


# The token after an accepted draft and what replaces a rejected second draft; processors see no difference.
@pytest.mark.parametrize(("name", "drafts"), [("plain", 1), ("all", 1), *((name, 2) for name in SETTINGS)])
def test_joint_of_three_tokens_is_that_of_plain_sampling(sampled_model, name, drafts):
    prompt = torch.tensor([[3, 1, 4, 0]])
    joint = exact_joint(sampled_model, prompt, SETTINGS[name])
    assert p_value(sampled_counts(sampled_model, prompt, SETTINGS[name], drafts), joint) > 1e-4


def test_a_wrong_sampler_is_found(sampled_model, monkeypatch):
    """Drawing what replaces a rejected draft from p, and not from what the draft left of it."""
    monkeypatch.setattr(acceptance, "_residual", lambda target, drawn_from: target)
    prompt = torch.tensor([[3, 1, 4, 0]])
    joint = exact_joint(sampled_model, prompt, {})
    assert p_value(sampled_counts(sampled_model, prompt, {}, 1), joint) < 1e-6


def test_one_draft_of_one_row_follows_the_same_law():
    torch.manual_seed(0)
    target, drawn_from = torch.tensor([0.5, 0.3, 0.2, 0.0]), torch.tensor([0.1, 0.2, 0.3, 0.4])
    scores = target.log()
    counts = torch.zeros(4, dtype=torch.long)
    for _ in range(5_000):
        draft = int(torch.multinomial(drawn_from, 1))
        counts[acceptance.accept_one(scores, draft, drawn_from)[1]] += 1
    assert p_value(counts[:3], target[:3].double()) > 1e-4
    assert counts[3] == 0

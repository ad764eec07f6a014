"""What the drafter drafts, against the modules run over the whole sequence without a cache: a wrong row would change
no token, only how many drafts are right."""

import pytest
import torch

from deepseek_v3.generation.drafting import Drafter, Rows
from twins import make_model


def whole_drafts(model, tokens, count):
    """Greedy drafts after the known tokens [n + 1], every module run over all rows at once."""
    known, modules, drafts = tokens[None], model.config.num_nextn_predict_layers, []
    states, embed = model.model(known).last_hidden_state[:, :-1], model.get_input_embeddings()
    rows = states.shape[1]
    for depth in range(count):
        following = embed(torch.cat((known, torch.tensor([drafts], dtype=torch.long)), dim=1))
        if depth < modules:
            inputs = (states, following[:, depth + 1 : depth + 1 + rows])
        else:  # the last module once more, on its own output
            inputs = tuple(torch.cat(p, dim=1) for p in zip(inputs, (states[:, -1:], following[:, -1:]), strict=True))
        normed, states = model.draft(min(depth, modules - 1), *inputs, None, torch.arange(inputs[0].shape[1])[None])
        drafts.append(int(model.lm_head(normed[0, -1]).argmax()))
    return drafts


@pytest.mark.parametrize("padding", [0, 3])
@pytest.mark.parametrize("depths", [1, 2])
def test_drafts_are_those_of_the_whole_sequence(depths, padding, monkeypatch):
    model, seen = make_model(4, vocab_size=8, num_nextn_predict_layers=depths, eos_token_id=None, pad_token_id=2), []
    draft, append = Drafter.draft, Drafter._append
    appended = []

    def recorded(self, count, choose):
        result = draft(self, count, choose)
        seen.append((self.rows.stands[0], result[0][0].tolist()))
        return result

    def counted(self, *args):
        result = append(self, *args)
        appended.append(result is not None)
        return result

    monkeypatch.setattr(Drafter, "draft", recorded)
    monkeypatch.setattr(Drafter, "_append", counted)
    prompt = torch.randint(3, 8, (1, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(prompt)
    mask[:, :padding] = 0
    kwargs = {"attention_mask": mask, "max_new_tokens": 30, "do_sample": False, "return_dict_in_generate": True}
    output = model.generate(prompt, use_mtp=True, num_assistant_tokens=4, **kwargs)
    # Padded rows have places of their own; the first rows of all reach before a short prompt.
    assert not any(appended) if padding else sum(appended) > len(appended) // 2
    tokens = output.sequences[0]
    with torch.no_grad():
        for n, drafts in seen:
            assert drafts == whole_drafts(model, tokens[padding : n + 1], len(drafts)), n
    assert 0 < output.mtp.accepted[0] < output.mtp.drafted[0]


def test_rows_are_abreast_where_the_same_slots_are_known():
    mask = torch.ones(2, 5, dtype=torch.bool)
    positions = torch.arange(5).expand(2, -1)
    rows = Rows(mask, positions, past=2, grows=True)
    assert rows.abreast(0) == 5 and rows.abreast(-3) == 2 and rows.abreast(-4) is None
    assert Rows(mask, positions, past=2, grows=False).abreast(0) is None
    rows.count([2, 1])
    assert rows.abreast(0) is None
    rows.count([0, 1])
    assert rows.abreast(1) == 8
    mask[0, 0] = False
    assert Rows(mask, positions, past=0, grows=True).abreast(0) is None

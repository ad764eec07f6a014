"""The MTP modules against the report's equations, written out here token by token."""

import pytest
import torch
from torch import nn
from transformers import masking_utils
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3DecoderLayer as NativeLayer

from deepseek_v3.modeling_deepseek_v3.mtp import depth_labels
from twins import make_model, native_twin


def rms(x, weight, eps=1e-6):
    return weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


def mtp_by_hand(model, tokens):
    """Logits of every depth: equations 21 to 23, with transformers' own decoder layer as the block."""
    native = native_twin(model)
    length = tokens.shape[1]
    embeddings = model.model.embed_tokens.weight[tokens]
    state = native.model(tokens).last_hidden_state
    logits = []
    for depth, layer in enumerate(model.model.mtp_layers, start=1):
        rows = length - depth
        embedded, previous = embeddings[:, depth:], state[:, :rows]
        joined = torch.cat([rms(embedded, layer.enorm.weight), rms(previous, layer.hnorm.weight)], dim=-1)
        block = NativeLayer(native.config, native.config.num_hidden_layers + depth)
        own = {k: v for k, v in layer.state_dict().items() if k in dict(block.named_parameters()) or "bias" in k}
        block.load_state_dict(own)
        positions = torch.arange(rows)[None]
        mask = torch.full((rows, rows), float("-inf")).triu(1)[None, None]
        block.self_attn.config._attn_implementation = "eager"
        output = block(
            joined @ layer.eh_proj.weight.T,
            attention_mask=mask,
            position_embeddings=native.model.rotary_emb(joined, positions),
        )
        state = rms(output, layer.shared_head.norm.weight)
        logits.append(state @ model.lm_head.weight.T)
    return logits


@pytest.mark.parametrize("depths", [1, 2])
def test_logits_follow_the_report(depths, tokens):
    model = make_model(num_nextn_predict_layers=depths)
    with torch.no_grad():
        output = model(tokens, output_mtp_logits=True)
        expected = mtp_by_hand(model, tokens)
    assert [tuple(logits.shape) for logits in output.mtp_logits] == [(2, 24 - k, 512) for k in range(1, depths + 1)]
    for got, want in zip(output.mtp_logits, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("depths", [1, 2])
def test_loss_follows_the_report(depths, tokens):
    model = make_model(num_nextn_predict_layers=depths, mtp_loss_weight=0.3)
    labels = tokens.clone()
    labels[0, 5:9] = -100
    with torch.no_grad():
        output = model(tokens, labels=labels, output_mtp_logits=True)
        logits = [logits.double() for logits in mtp_by_hand(model, tokens)]
    counted = (labels[:, 1:] != -100).sum()
    expected = 0.0
    for depth, drafted in enumerate(logits, start=1):
        for row in range(2):
            for i in range(24 - depth - 1):
                if (target := labels[row, i + depth + 1]) != -100:
                    expected -= drafted[row, i].log_softmax(-1)[target].item() / counted.item() / depths
    assert output.mtp_loss.item() == pytest.approx(expected, rel=1e-5)
    total = output.main_loss + 0.3 * output.mtp_loss + output.balance_loss
    assert output.loss.item() == pytest.approx(total.item(), rel=1e-6)


def test_main_loss_is_the_native_class_loss(tokens):
    model = make_model()
    native = native_twin(model)
    labels = tokens.clone()
    labels[1, :7] = -100
    with torch.no_grad():
        for items in (None, torch.tensor(100)):
            kwargs = {} if items is None else {"num_items_in_batch": items}
            expected = native(tokens, labels=labels, **kwargs).loss
            assert model(tokens, labels=labels, **kwargs).main_loss.item() == pytest.approx(expected.item(), rel=1e-6)


def test_gradients_reach_the_shared_embedding_and_head_from_the_mtp_loss_alone(tokens):
    model = make_model()
    model(tokens, labels=tokens).mtp_loss.backward()
    for parameter in (model.model.embed_tokens.weight, model.lm_head.weight, *model.model.mtp_layers[0].parameters()):
        assert parameter.grad is not None
        assert parameter.grad.abs().sum() > 0


def test_gradient_of_the_losses_equals_plain_cross_entropy(tokens):
    model = make_model(seq_balance_loss_alpha=0.0)
    labels = tokens.clone()
    labels[0, :3] = -100
    model(tokens, labels=labels).loss.backward()
    ours = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    output = model(tokens, output_mtp_logits=True)
    main = nn.functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    terms = (labels[:, 1:] != -100).sum()
    mtp = nn.functional.cross_entropy(
        output.mtp_logits[0][:, :-1].flatten(0, 1), labels[:, 2:].flatten(), reduction="sum"
    )
    (main + 0.3 * mtp / terms).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(ours[name], parameter.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_a_draft_never_sees_past_its_token_and_documents_never_leak(tokens):
    model = make_model()
    positions = torch.cat([torch.arange(10), torch.arange(14)])[None].expand(2, -1)
    with torch.no_grad():
        packed = model(tokens, position_ids=positions, output_mtp_logits=True)
        first = model(tokens[:, :10], output_mtp_logits=True)
        second = model(tokens[:, 10:], output_mtp_logits=True)
    torch.testing.assert_close(packed.logits[:, :10], first.logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(packed.logits[:, 10:], second.logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(packed.mtp_logits[0][:, :9], first.mtp_logits[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(packed.mtp_logits[0][:, 10:], second.mtp_logits[0], rtol=1e-4, atol=1e-5)


def test_positions_that_nobody_gave_are_not_searched_for_documents(tokens, monkeypatch):
    """The search reads from the device, which a training step must not wait for."""
    searched, search = [], masking_utils.find_packed_sequence_indices
    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", lambda p: searched.append(p) or search(p))
    model = make_model(num_nextn_predict_layers=2).train()
    model(tokens, labels=tokens, use_cache=False)
    assert not searched
    model(tokens, labels=tokens, position_ids=torch.arange(tokens.shape[1])[None], use_cache=False)
    assert len(searched) == 3


def test_labels_across_a_document_border_are_not_learnt(tokens):
    positions = torch.cat([torch.arange(10), torch.arange(14)])[None]
    expected = torch.full_like(tokens, -100)
    expected[:, :8], expected[:, 10:22] = tokens[:, 2:10], tokens[:, 12:24]
    assert torch.equal(depth_labels(tokens, positions, 1), expected)
    model = make_model()
    with torch.no_grad():
        packed = model(tokens, labels=tokens, position_ids=positions.expand(2, -1)).mtp_loss * 46
        parts = [model(t, labels=t).mtp_loss * (t.shape[1] - 1) * 2 for t in (tokens[:, :10], tokens[:, 10:])]
    assert packed.item() == pytest.approx(sum(parts).item(), rel=1e-4)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_no_real_draft(side, tokens):
    model = make_model()
    mask = torch.ones_like(tokens)
    if side == "left":
        mask[0, :6] = 0
    else:
        mask[0, -6:] = 0
    with torch.no_grad():
        padded = model(tokens, attention_mask=mask, output_mtp_logits=True).mtp_logits[0][0]
        real = tokens[:1, 6:] if side == "left" else tokens[:1, :-6]
        alone = model(real, output_mtp_logits=True).mtp_logits[0][0]
    torch.testing.assert_close(padded[6:] if side == "left" else padded[:17], alone, rtol=1e-4, atol=1e-4)


def test_pre_norm_and_hidden_first_are_other_functions(tokens):
    with torch.no_grad():
        default = make_model()(tokens, output_mtp_logits=True).mtp_logits[0]
        for switch in ({"mtp_hidden_state": "pre_norm"}, {"mtp_hidden_states_first": True}):
            other = make_model(**switch)(tokens, output_mtp_logits=True).mtp_logits[0]
            assert (other - default).abs().max() > 1e-2


def test_a_model_without_mtp_says_so(tokens):
    model = make_model(num_nextn_predict_layers=0)
    with pytest.raises(ValueError, match="num_nextn_predict_layers"):
        model(tokens, output_mtp_logits=True)
    assert model(tokens, labels=tokens).mtp_loss is None


def test_a_weight_of_zero_switches_the_mtp_loss_off(tokens):
    output = make_model(mtp_loss_weight=0.0)(tokens, labels=tokens)
    assert output.mtp_loss is None


def test_short_sequences_and_embeddings_as_input(tokens):
    model = make_model(num_nextn_predict_layers=2)
    with torch.no_grad():
        assert torch.isfinite(model(tokens[:, :1], labels=tokens[:, :1]).loss)
        assert [d.shape[1] for d in model(tokens[:, :2], output_mtp_logits=True).mtp_logits] == [1]
        embedded = model.model.embed_tokens(tokens)
        by_embedding = model(inputs_embeds=embedded, labels=tokens, output_mtp_logits=True)
        by_token = model(tokens, labels=tokens, output_mtp_logits=True)
    assert torch.equal(by_embedding.loss, by_token.loss)
    assert torch.equal(by_embedding.mtp_logits[1], by_token.mtp_logits[1])


@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_counts_for_no_expert(side, tokens):
    """The load of every router, MTP modules included, is that of the sequences by themselves."""
    loads = []
    for padding in (None, 0, 5):
        model = make_model(num_nextn_predict_layers=2).train()
        for length in (24, 9):
            given = tokens[:1, :length]
            if padding is not None:
                rest = torch.full((1, 24 + padding - length), 2)
                parts = (given, rest) if side == "right" else (rest, given)
                mask = torch.cat([torch.ones_like(part) * int(part is given) for part in parts], dim=1)
                given = torch.cat(parts, dim=1)
                model(given, attention_mask=mask, labels=given.masked_fill(mask == 0, -100))
            else:
                model(given, labels=given)
        loads.append(torch.stack([router.expert_load for router in model.model.routers().values()]))
    assert loads[0].sum(dim=1).tolist() == [2 * 33, 2 * 33, 2 * 31, 2 * 29]
    assert torch.equal(loads[1], loads[0]) and torch.equal(loads[2], loads[0])

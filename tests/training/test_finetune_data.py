"""Data for fine-tuning: every kind of file, assistant-only labels, packing that leaks nothing."""

import json
from collections import Counter

import datasets
import pytest
import torch

from deepseek_v3.training.data import train_tokenizer
from deepseek_v3.training.finetune_data import PaddingCollator, encode_chat, fit, load_files, pack, prepare
from twins import make_model

PLAIN = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}User: {{ m.content }}\n{% else %}"
    "Bot:{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}{% if add_generation_prompt %}Bot:{% endif %}"
)
MARKED = PLAIN.replace(
    "{{ m.content }}{{ eos_token }}", "{% generation %}{{ m.content }}{{ eos_token }}{% endgeneration %}"
)
# Shows the last answer only, as templates do that drop earlier reasoning.
REWRITING = PLAIN.replace("Bot:{{ m.content }}", "Bot:{{ m.content if loop.last else '...' }}")
CHAT = [
    {"role": "user", "content": "two and two"},
    {"role": "assistant", "content": "four"},
    {"role": "user", "content": "and one more"},
    {"role": "assistant", "content": "that is five"},
]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["two and two is four, and one more is five. User: Bot: that"] * 4, 300)


def with_template(tokenizer, template):
    tokenizer.chat_template = template
    return tokenizer


def learnt(tokenizer, encoded):
    """The text that has labels, pieces joined by |."""
    pieces, last = [], None
    for i, label in enumerate(encoded["labels"]):
        if label == -100:
            continue
        assert label == encoded["input_ids"][i]
        pieces.append(("" if last == i - 1 else "|") + tokenizer.decode([label]))
        last = i
    return "".join(pieces)


@pytest.mark.parametrize("template", [PLAIN, MARKED], ids=["by turns", "by markers"])
def test_what_the_assistant_says_is_learnt_and_nothing_else(template, tokenizer):
    encoded = encode_chat(CHAT, with_template(tokenizer, template))
    assert learnt(tokenizer, encoded) == "|four<|end|>|that is five<|end|>"
    text = "<|begin|>User: two and two\nBot:four<|end|>User: and one more\nBot:that is five<|end|>"
    assert tokenizer.decode(encoded["input_ids"]) == text


def test_a_template_that_rewrites_earlier_turns_is_refused(tokenizer):
    with pytest.raises(ValueError, match=r"turn 2 of a conversation otherwise once others follow.*generation"):
        encode_chat(CHAT, with_template(tokenizer, REWRITING))
    assert "five" in learnt(tokenizer, encode_chat(CHAT[2:], tokenizer))


def write(path, rows):
    if path.suffix == ".parquet":
        datasets.Dataset.from_list(rows).to_parquet(path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".parquet"])
def test_every_kind_of_file_gives_the_same_rows(suffix, stream, tokenizer, tmp_path):
    rows = [{"prompt": "two and", "completion": " two"}, {"prompt": "one", "completion": " more"}]
    file = write(tmp_path / f"data{suffix}", rows)
    data = list(prepare(load_files([file], stream), tokenizer, 64, packing=False))
    assert [learnt(tokenizer, row) for row in data] == ["| two<|end|>", "| more<|end|>"]
    assert tokenizer.decode(data[0]["input_ids"]) == "<|begin|>two and two<|end|>"
    assert set(data[0]) == {"input_ids", "labels"}


def test_conversations_as_prompt_and_completion_and_texts(tokenizer, tmp_path):
    with_template(tokenizer, PLAIN)
    pairs = write(tmp_path / "pairs.jsonl", [{"prompt": CHAT[:1], "completion": CHAT[1:2]}])
    assert learnt(tokenizer, next(iter(prepare(load_files([pairs]), tokenizer, 64)))) == "|four<|end|>"
    (tmp_path / "a.txt").write_text("one more\nand two")
    (tmp_path / "b.txt").write_text("four")
    texts = list(prepare(load_files([tmp_path / "a.txt", tmp_path / "b.txt"]), tokenizer, 64, packing=False))
    expected = ["|<|begin|>one more\nand two<|end|>", "|<|begin|>four<|end|>"]
    assert [learnt(tokenizer, row) for row in texts] == expected


def test_bad_data_is_refused_by_name(tokenizer, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.json does not exist"):
        load_files([tmp_path / "nowhere.json"])
    wrong = write(tmp_path / "wrong.jsonl", [{"question": "x", "answer": "y"}])
    with pytest.raises(ValueError, match=r"columns 'question', 'answer'; needed is 'messages'.*Rename"):
        prepare(load_files([wrong]), tokenizer, 64)
    (tmp_path / "t.txt").write_text("x")
    with pytest.raises(ValueError, match=r"--data holds .jsonl, .txt: give files of one kind"):
        load_files([wrong, tmp_path / "t.txt"])
    (tmp_path / "broken.jsonl").write_text("{no json")
    with pytest.raises(ValueError, match="broken.jsonl cannot be read as json"):
        load_files([tmp_path / "broken.jsonl"])
    chat = write(tmp_path / "chat.jsonl", [{"messages": CHAT}])
    with pytest.raises(ValueError, match="the tokenizer no chat template"):
        prepare(load_files([chat]), with_template(tokenizer, None), 64)


@pytest.mark.parametrize("stream", [False, True])
def test_masked_labels_are_an_error_where_all_are_and_left_out_where_some_are(stream, tokenizer, tmp_path):
    with_template(tokenizer, PLAIN)
    asked, answered = {"messages": CHAT[:1]}, {"messages": CHAT}
    some = load_files([write(tmp_path / "some.jsonl", [asked, answered, asked])], stream)
    assert len(list(prepare(some, tokenizer, 64, packing=False))) == 1
    with pytest.raises(ValueError, match="every label is masked: no row has a token to learn in its first 64"):
        prepare(load_files([write(tmp_path / "all.jsonl", [asked, asked])], stream), tokenizer, 64)
    with pytest.raises(ValueError, match="in its first 3. .*raise --max-length"):
        prepare(some, tokenizer, 3)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("how", ["cut", "split"])
def test_long_documents_are_cut_or_split_and_counted(how, stream, tokenizer, tmp_path):
    texts = ["one", "two and two is four, and one more", "five. " * 7]
    rows = load_files([write(tmp_path / "texts.jsonl", [{"text": text} for text in texts])], stream)
    ids = [[tokenizer.bos_token_id, *tokenizer(t)["input_ids"], tokenizer.eos_token_id] for t in texts]
    ids = [[i for j, i in enumerate(row) if j == 0 or i != tokenizer.bos_token_id] for row in ids]
    counts = Counter()
    data = list(prepare(rows, tokenizer, 6, packing=False, long_documents=how, counts=counts))
    assert counts["documents"] == 3 and counts["long_documents"] == sum(len(row) > 6 for row in ids) == 2
    assert all(len(row["input_ids"]) <= 6 for row in data)
    # What is learnt is what is predicted: every token of a row but its first.
    learnt = sorted(token for row in data for token in row["labels"][1:] if token != -100)
    if how == "split":
        assert learnt == sorted(token for row in ids for token in row[1:])
    else:
        assert learnt == sorted(token for row in ids for token in row[1:6])
    with pytest.raises(ValueError, match="long_documents = 'drop', length = 6: choose cut or split"):
        prepare(rows, tokenizer, 6, long_documents="drop")


def test_pieces_share_one_token_and_lose_none():
    document = {"input_ids": list(range(10, 21)), "labels": [-100, *range(11, 21)]}
    pieces = fit(document, 4, "split")
    assert [piece["input_ids"] for piece in pieces] == [[10, 11, 12, 13], [13, 14, 15, 16], [16, 17, 18, 19], [19, 20]]
    assert [piece["labels"][1:] for piece in pieces] == [[11, 12, 13], [14, 15, 16], [17, 18, 19], [20]]
    assert fit(document, 4) == [{"input_ids": [10, 11, 12, 13], "labels": [-100, 11, 12, 13]}]
    assert [fit(document, length, "split") for length in (11, 12)] == [[document]] * 2
    assert len(fit(document, 10, "split")) == 2


def test_rows_that_lack_what_others_have_are_shown(tokenizer, tmp_path):
    def load(*rows):
        return load_files([write(tmp_path / "rows.jsonl", list(rows))])

    with_template(tokenizer, PLAIN)
    for rows, message in [
        ([{"messages": CHAT}, {"messages": None, "id": 7}], r"a row has no 'messages', as others have: .*'id': 7"),
        ([{"prompt": "a", "completion": "b"}, {"prompt": "a"}], "a row has no 'completion'"),
        ([{"text": "a"}, {"text": None}], "a row has no 'text'"),
        ([{"messages": [{"content": "hello"}]}], "a message has no 'role' or no 'content': .*hello"),
    ]:
        with pytest.raises(ValueError, match=message):
            prepare(load(*rows), tokenizer, 64)


def test_rows_before_the_first_that_teaches_are_no_obstacle(tokenizer, tmp_path):
    """`datasets` takes a column's type from the first thousand rows."""
    with_template(tokenizer, PLAIN)
    rows = [{"messages": CHAT[:1]}] * 1001 + [{"messages": CHAT}]
    counts = Counter()
    data = prepare(load_files([write(tmp_path / "rows.jsonl", rows)]), tokenizer, 64, counts=counts)
    assert len(data) == 1 and set(data[0]) == {"input_ids", "labels", "position_ids"}
    assert counts == {"documents": 1002, "long_documents": 0, "documents_left_out": 1001}


def documents(seed=0, count=9):
    generator = torch.Generator().manual_seed(seed)
    ids = [torch.randint(3, 512, (int(n),), generator=generator).tolist() for n in torch.randint(2, 17, (count,))]
    return {"input_ids": ids, "labels": [[-100 if t % 3 == 0 else t for t in document] for document in ids]}


def test_packing_splits_and_loses_nothing():
    given = documents()
    packed = pack(given, 20)
    found = []
    for ids, labels, positions in zip(*packed.values(), strict=True):
        assert len(ids) == len(labels) == len(positions) <= 20
        starts = [i for i, p in enumerate(positions) if p == 0]
        for start, stop in zip(starts, [*starts[1:], len(ids)], strict=True):
            assert positions[start:stop] == list(range(stop - start)) and labels[start] == -100
            found.append((ids[start:stop], labels[start + 1 : stop]))
    expected = [(ids, labels[1:]) for ids, labels in zip(*given.values(), strict=True)]
    assert sorted(found) == sorted(expected)
    assert len(packed["input_ids"]) < len(given["input_ids"])


def test_packed_documents_give_the_losses_and_gradients_of_documents_apart():
    """Attention and MTP see no other document, nor the padding: with the balance loss, a sequence's own, left out."""
    model = make_model(seq_balance_loss_alpha=0.0, attention_dropout=0.0).train()
    given = documents()
    packed = pack(given, 20)
    collate = PaddingCollator(pad_token_id=2)
    rows = [dict(zip(packed, values, strict=True)) for values in zip(*packed.values(), strict=True)]
    apart = [{"input_ids": ids, "labels": labels} for ids, labels in zip(*given.values(), strict=True)]
    batch = collate(rows)
    assert "attention_mask" not in batch and (batch["input_ids"] == 2).any()
    results = []
    for inputs in (batch, collate(apart)):
        model.zero_grad()
        output = model(**inputs, num_items_in_batch=10)
        output.loss.backward()
        results.append((output.main_loss, output.mtp_loss, {n: p.grad.clone() for n, p in model.named_parameters()}))
    assert float(results[0][1]) > 0
    torch.testing.assert_close(results[0][:2], results[1][:2], rtol=1e-5, atol=0)
    for name, grad in results[0][2].items():
        torch.testing.assert_close(grad, results[1][2][name], rtol=1e-3, atol=1e-6, msg=name)


@pytest.mark.parametrize("depths", [1, 2])
def test_the_experts_load_is_that_of_the_documents_whatever_they_are_packed_and_padded_to(depths):
    given, loads = documents(), []
    for length in (17, 20, 45):
        packed, model = pack(given, length), make_model(num_nextn_predict_layers=depths).train()
        rows = [dict(zip(packed, row, strict=True)) for row in zip(*packed.values(), strict=True)]
        model(**PaddingCollator(pad_token_id=2)(rows))
        loads.append(torch.stack([router.expert_load for router in model.model.routers().values()]))
    model = make_model(num_nextn_predict_layers=depths).train()
    for ids in given["input_ids"]:
        model(input_ids=torch.tensor([ids]), labels=torch.tensor([ids]))
    alone = torch.stack([router.expert_load for router in model.model.routers().values()])
    assert alone[0].sum() == 2 * sum(map(len, given["input_ids"]))
    assert all(torch.equal(load, alone) for load in loads)
    # Positions that all rows share.
    model = make_model(num_nextn_predict_layers=depths).train()
    shared = torch.tensor([[*range(5), *range(7)]])
    model(torch.full((2, 12), 5), labels=torch.full((2, 12), 5), position_ids=shared)
    assert [int(router.expert_load.sum()) for router in model.model.routers().values()][2:] == [40, 32][:depths]


def test_changing_one_document_changes_no_logit_of_another():
    model = make_model()
    row = {name: torch.tensor(values[:1]) for name, values in pack(documents(), 60).items()}
    with torch.no_grad():
        before = model(row["input_ids"], position_ids=row["position_ids"], output_mtp_logits=True)
        length = int((row["position_ids"][0] == 0).nonzero()[1])
        changed = row["input_ids"].clone()
        changed[0, :length] = 7
        after = model(changed, position_ids=row["position_ids"], output_mtp_logits=True)
    assert not torch.equal(before.logits[:, :length], after.logits[:, :length])
    torch.testing.assert_close(before.logits[:, length:], after.logits[:, length:], rtol=0, atol=1e-6)
    # MTP's row i looks at token i + 1 too.
    torch.testing.assert_close(before.mtp_logits[0][:, length:], after.mtp_logits[0][:, length:], rtol=0, atol=1e-5)

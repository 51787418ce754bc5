from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tapeline.errors import UsageError
from tapeline.train.data import IGNORED_LABEL, Collator, Record, encode, largest_batch, load_records
from tapeline.train.demo import byte_tokenizer, demo_records

TOKENIZER = byte_tokenizer()


def jsonl(path: Path, *rows: Any) -> str:
    path.write_text(
        "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n", encoding="utf-8"
    )
    return str(path)


def test_the_three_kinds_of_record(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    path = jsonl(
        tmp_path / "a.jsonl", {"text": "abc"}, {"prompt": "p", "completion": "c", "id": 3}, "", {"messages": messages}
    )
    text, pair, chat = load_records(path)
    assert (text.text, pair.prompt, pair.completion, chat.messages) == ("abc", "p", "c", tuple(messages))
    array = tmp_path / "b.json"
    array.write_text(json.dumps([{"text": "x"}]))
    assert load_records(str(array)) == [Record(text="x")]


def test_text_files_and_folders(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("some text")
    (tmp_path / "sub").mkdir()
    jsonl(tmp_path / "sub" / "b.jsonl", {"text": "more"})
    (tmp_path / "image.bin").write_bytes(b"\xff\xfe\x00")
    (tmp_path / ".hidden").write_text("no")
    assert [record.text for record in load_records(str(tmp_path))] == ["some text", "more"]
    assert load_records(str(tmp_path / "a.txt"))[0].is_file


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"text": "a"}, "{broken"], "line 2: not JSON"),
        ([{"text": "a"}, {"txt": "b"}], "line 2: no column 'text'.*did you mean 'text'"),
        ([{"prompt": "a"}], "line 1: column 'completion' is missing"),
        ([{"text": 3}], "line 1: column 'text' must be text, found int"),
        (["3"], "line 1: a record must be an object"),
        ([{"messages": "hi"}], "line 1: 'messages' must be a list"),
        ([{"messages": [{"content": "hi"}]}], "line 1: each message needs a 'role'"),
        ([{}], "line 1: no column.*found no columns"),
        ([], "is empty"),
    ],
)
def test_a_broken_file_is_named_by_line(tmp_path: Path, rows: list[Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load_records(jsonl(tmp_path / "a.jsonl", *rows))


def test_missing_and_binary_files(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="No such data file"):
        load_records(str(tmp_path / "none.jsonl"))
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="not UTF-8"):
        load_records(str(tmp_path / "a.txt"))
    with pytest.raises(UsageError, match="No text in the folder"):
        load_records(str(tmp_path))


def test_the_loss_is_on_the_completion_only() -> None:
    (sequence,) = encode([Record(prompt="ab", completion="cd")], TOKENIZER, max_length=50, packing=False)
    ids = TOKENIZER("abcd")["input_ids"]
    assert sequence["input_ids"] == [*ids, TOKENIZER.eos_token_id]
    assert sequence["labels"] == [IGNORED_LABEL] * 2 + [*ids[2:], TOKENIZER.eos_token_id]


def test_chats_use_the_template_of_the_tokenizer() -> None:
    record = Record(messages=({"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}))
    (sequence,) = encode([record], TOKENIZER, max_length=50, packing=False)
    assert TOKENIZER.decode(sequence["input_ids"]) == "user: hi</s>assistant: ho</s>"
    plain = byte_tokenizer()
    plain.chat_template = None
    (sequence,) = encode([record], plain, max_length=50, packing=False)
    assert plain.decode(sequence["input_ids"]) == "<|user|>\nhi\n<|assistant|>\nho\n</s>"


def test_records_are_cut_and_files_are_split() -> None:
    assert len(encode([Record(text="x" * 100)], TOKENIZER, max_length=30, packing=False)) == 1
    pieces = encode([Record(text="x" * 100, is_file=True)], TOKENIZER, max_length=30, packing=False)
    assert [len(piece["input_ids"]) for piece in pieces] == [30, 30, 30]
    packed = encode([Record(text="x" * 20), Record(text="y" * 20)], TOKENIZER, max_length=14, packing=True)
    assert [len(piece["input_ids"]) for piece in packed] == [14, 14, 14]


def test_nothing_to_learn_from_is_an_error() -> None:
    with pytest.raises(UsageError, match="Nothing to train on"):
        encode([Record(prompt="x" * 100, completion="y")], TOKENIZER, max_length=30, packing=False)


def test_the_collator_pads_on_the_right() -> None:
    batch = Collator(0)([{"input_ids": [5, 6, 7], "labels": [5, 6, 7]}, {"input_ids": [8], "labels": [8]}])
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[5, 6, 7], [8, IGNORED_LABEL, IGNORED_LABEL]]


def test_the_largest_batch_has_the_longest_sequence_and_padding() -> None:
    sequences = [{"input_ids": [1] * n, "labels": [1] * n} for n in (3, 9, 5, 4)]
    assert [len(s["input_ids"]) for s in largest_batch(sequences, 3)] == [9, 3, 4]


def test_the_byte_tokenizer_is_one_token_per_byte_and_loads_anywhere(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    text = "def f(x):\n    return 'é'\t# ok"
    ids = TOKENIZER(text)["input_ids"]
    assert len(ids) == len(text.encode())
    assert TOKENIZER.decode(ids) == text
    TOKENIZER.save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path)(text)["input_ids"] == ids


def test_the_demo_text_is_on_every_machine() -> None:
    records = demo_records()
    assert sum(len(record.text or "") for record in records) > 500_000

"""Training data: records from files, and token sequences from records.

Three kinds of record, with the column names of TRL: ``text``; ``prompt`` and ``completion`` (the loss is on the
completion); ``messages``, a list of ``{"role": ..., "content": ...}``.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tapeline.errors import UsageError, did_you_mean

logger = logging.getLogger(__name__)

IGNORED_LABEL = -100
_COLUMNS = ("text", "prompt", "completion", "messages")
_JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
_PLAIN_CHAT = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\\n' + message['content'] + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """One training example as it stands in a file; exactly one of the three kinds is set."""

    text: str | None = None
    prompt: str | None = None
    completion: str | None = None
    messages: tuple[dict[str, Any], ...] | None = None
    is_file: bool = False
    """The text is a whole file, to be split rather than cut."""


def load_records(path: str) -> list[Record]:
    """Read a JSONL file, a text file, or a folder of both.

    Raises:
        UsageError: for a missing or empty file, a broken line (named by number) or a missing column.
    """
    root = Path(path).expanduser()
    if root.is_dir():
        records = list(_folder_records(root))
        if not records:
            raise UsageError(f"No text in the folder {path!r}: it holds no JSONL and no UTF-8 text file.")
        return records
    if not root.is_file():
        raise UsageError(f"No such data file: {path!r}.")
    records = list(_file_records(root))
    if not records:
        raise UsageError(f"The data file {path!r} is empty.")
    return records


def encode(records: Sequence[Record], tokenizer: Any, *, max_length: int, packing: bool) -> list[dict[str, list[int]]]:
    """Turn records into token sequences of at most `max_length`.

    Args:
        records: the records.
        tokenizer: a transformers tokenizer; one without a chat template gets a plain one for ``messages``.
        max_length: longest sequence, in tokens.
        packing: join the texts into sequences of exactly `max_length`.

    Returns:
        For each sequence its ``input_ids`` and ``labels``, lists of equal length.

    Raises:
        UsageError: if nothing is left to train on.
    """
    sequences: list[dict[str, list[int]]] = []
    stream: list[int] = []
    for record in records:
        ids, labels = _encode_record(record, tokenizer)
        if record.text is not None and packing:
            stream += ids
        elif record.is_file:
            sequences += _split(ids, max_length)
        else:
            sequences.append({"input_ids": ids[:max_length], "labels": labels[:max_length]})
    sequences += _split(stream, max_length)
    usable = [
        s for s in sequences if len(s["input_ids"]) > 1 and any(label != IGNORED_LABEL for label in s["labels"][1:])
    ]
    if len(usable) < len(sequences):
        logger.warning(
            "%d of %d records have nothing to learn from within max_length and are left out",
            len(sequences) - len(usable),
            len(sequences),
        )
    if not usable:
        raise UsageError(
            f"Nothing to train on: none of the {len(records)} records has a token to predict within max_length={max_length}."
        )
    return usable


class Collator:
    """Pads a list of sequences on the right to the longest of them."""

    def __init__(self, pad_token_id: int) -> None:
        self.pad_token_id = pad_token_id

    def __call__(self, sequences: Sequence[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        """Returns ``input_ids``, ``attention_mask`` and ``labels``, each int64 of shape (batch, longest)."""
        length = max(len(s["input_ids"]) for s in sequences)
        return {
            "input_ids": self._pad([s["input_ids"] for s in sequences], length, self.pad_token_id),
            "attention_mask": self._pad([[1] * len(s["input_ids"]) for s in sequences], length, 0),
            "labels": self._pad([s["labels"] for s in sequences], length, IGNORED_LABEL),
        }

    @staticmethod
    def _pad(rows: list[list[int]], length: int, value: int) -> torch.Tensor:
        return torch.tensor([row + [value] * (length - len(row)) for row in rows])


def largest_batch(sequences: Sequence[dict[str, list[int]]], batch_size: int) -> list[dict[str, list[int]]]:
    """The batch that needs most memory: the longest sequence with the shortest, so that a padding mask is needed if ever."""
    ordered = sorted(sequences, key=lambda s: len(s["input_ids"]))
    return [ordered[-1], *ordered[: min(batch_size, len(ordered)) - 1]]


def _folder_records(root: Path) -> Iterator[Record]:
    skipped = 0
    for path in sorted(p for p in root.rglob("*") if p.is_file()):
        if any(part.startswith(".") for part in path.relative_to(root).parts):
            continue
        if path.suffix.lower() in _JSON_SUFFIXES:
            yield from _json_records(path)
        elif (text := _read_text(path)) is None:
            skipped += 1
        elif text.strip():
            yield Record(text=text, is_file=True)
    if skipped:
        logger.warning("%d files in %s are not UTF-8 text and are left out", skipped, root)


def _file_records(path: Path) -> Iterator[Record]:
    if path.suffix.lower() in _JSON_SUFFIXES:
        yield from _json_records(path)
        return
    text = _read_text(path)
    if text is None:
        raise UsageError(f"Cannot read {str(path)!r} as text: it is not UTF-8.")
    if text.strip():
        yield Record(text=text, is_file=True)


def _read_text(path: Path) -> str | None:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return None
    except OSError as error:
        raise UsageError(f"Cannot read {str(path)!r}: {error.strerror}.") from error
    return None if "\0" in text else text


def _json_records(path: Path) -> Iterator[Record]:
    text = _read_text(path)
    if text is None:
        raise UsageError(f"Cannot read {str(path)!r} as JSONL: it is not UTF-8 text.")
    if text.lstrip().startswith("["):
        try:
            rows = json.loads(text)
        except json.JSONDecodeError as error:
            raise UsageError(f"{path}, line {error.lineno}: not JSON ({error.msg}).") from error
        yield from (_to_record(row, f"{path}, entry {number}") for number, row in enumerate(rows, start=1))
        return
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UsageError(f"{path}, line {number}: not JSON ({error.msg} at column {error.colno}).") from error
        yield _to_record(row, f"{path}, line {number}")


def _to_record(row: Any, where: str) -> Record:
    if not isinstance(row, dict):
        raise UsageError(f"{where}: a record must be an object with text, prompt and completion, or messages.")
    if "messages" in row:
        return Record(messages=_messages(row["messages"], where))
    if "prompt" in row or "completion" in row:
        missing = [name for name in ("prompt", "completion") if name not in row]
        if missing:
            raise UsageError(f"{where}: column {missing[0]!r} is missing, found {_names(row)}.")
        return Record(prompt=_string(row, "prompt", where), completion=_string(row, "completion", where))
    if "text" in row:
        return Record(text=_string(row, "text", where))
    hint = next((h for name in row if (h := did_you_mean(str(name), _COLUMNS))), "")
    raise UsageError(f"{where}: no column 'text', 'prompt' and 'completion', or 'messages'; found {_names(row)}{hint}.")


def _messages(value: Any, where: str) -> tuple[dict[str, Any], ...]:
    if not isinstance(value, list) or not value:
        raise UsageError(f"{where}: 'messages' must be a list with at least one message.")
    for message in value:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str) or "content" not in message:
            raise UsageError(f"{where}: each message needs a 'role' and a 'content', found {message!r}.")
    return tuple(value)


def _string(row: dict[str, Any], name: str, where: str) -> str:
    if not isinstance(row[name], str):
        raise UsageError(f"{where}: column {name!r} must be text, found {type(row[name]).__name__}.")
    return str(row[name])


def _names(row: dict[str, Any]) -> str:
    return ", ".join(repr(name) for name in row) or "no columns"


def _encode_record(record: Record, tokenizer: Any) -> tuple[list[int], list[int]]:
    if record.messages is not None:
        template = None if tokenizer.chat_template else _PLAIN_CHAT
        text = tokenizer.apply_chat_template(list(record.messages), tokenize=False, chat_template=template)
        ids = tokenizer(text, add_special_tokens=template is not None)["input_ids"]
        ids = ids if template is None else _ended(ids, tokenizer)
        return ids, ids
    if record.prompt is not None and record.completion is not None:
        prompt = tokenizer(record.prompt)["input_ids"]
        if prompt and prompt[-1] == tokenizer.eos_token_id:
            prompt = prompt[:-1]
        completion = _ended(tokenizer(record.completion, add_special_tokens=False)["input_ids"], tokenizer)
        return prompt + completion, [IGNORED_LABEL] * len(prompt) + completion
    ids = _ended(tokenizer(record.text, verbose=False)["input_ids"], tokenizer)
    return ids, ids


def _ended(ids: list[int], tokenizer: Any) -> list[int]:
    end = tokenizer.eos_token_id
    return ids if end is None or (ids and ids[-1] == end) else [*ids, end]


def _split(ids: list[int], max_length: int) -> Iterable[dict[str, list[int]]]:
    """Pieces of exactly `max_length`; what is left over counts only if it is all there is."""
    num_pieces = max(1, len(ids) // max_length) if ids else 0
    for index in range(num_pieces):
        piece = ids[index * max_length : (index + 1) * max_length]
        yield {"input_ids": piece, "labels": piece}

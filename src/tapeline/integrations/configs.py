"""Configurations of models by name: those that are known here, those of a local directory, those of the hub.

Planning needs a model's shape and none of its weights, so a name is enough where the shape is known.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tapeline.errors import UsageError, did_you_mean

_TABLE = Path(__file__).with_name("configs.json")


@dataclass(frozen=True, kw_only=True, slots=True)
class KnownModel:
    """What is known of a published model."""

    name: str
    """Short name, such as ``llama-3.1-8b``."""
    source: str
    """Repository on the hub that the facts are of."""
    also: tuple[str, ...]
    """Other repositories with models of the same shape."""
    num_parameters: int
    """As published; shared weights are counted once."""
    note: str
    """How the model here differs from the published one; empty where it does not."""
    fields: dict[str, Any]
    """The fields of its ``config.json``."""


@functools.cache
def known_models() -> dict[str, KnownModel]:
    """The models that need neither a directory nor the hub, by short name."""
    table = json.loads(_TABLE.read_text(encoding="utf-8"))
    return {
        name: KnownModel(
            name=name,
            source=row["source"],
            also=tuple(row.get("also", ())),
            num_parameters=row["num_parameters"],
            note=row.get("note", ""),
            fields=row["config"],
        )
        for name, row in table.items()
    }


def find_known(name: str) -> KnownModel | None:
    """The known model of a name, or ``None``.

    Args:
        name: the short name, or the name of a repository on the hub with or without its owner; case does not matter,
            nor whether words are joined by ``-``, ``_`` or a space.

    Example:
        >>> find_known("Llama 3.1 8B").source
        'meta-llama/Llama-3.1-8B'
    """
    return _by_any_name().get(_plain(name))


def find_config(name: str) -> Any:
    """The configuration of a model: a known one, that of a local directory, or that of a repository on the hub.

    A known name comes before a directory of that name; write ``./name`` to mean the directory. The hub is asked as
    transformers is set up to do it; offline, that is its cache.

    Args:
        name: as in `find_known`, or a directory with a ``config.json``, or a repository.

    Returns:
        A `transformers.PretrainedConfig`, which nobody else holds.

    Raises:
        UsageError: if there is no such model, or its configuration cannot be used.
    """
    if (known := find_known(name)) is not None:
        return _made(known)
    if Path(name).is_dir():
        if not (Path(name) / "config.json").is_file():
            raise UsageError(f"No model in {name!r}: the directory has no config.json.")
        return _read(name, f"Cannot use the configuration in the directory {name!r}")
    if _is_path(name):
        raise UsageError(f"No model in {name!r}: name a local directory with a config.json.")
    close = did_you_mean(_plain(name), known_models())
    listed = "" if close or "/" in name else f" ({', '.join(known_models())})"
    return _read(
        name,
        f"No model {name!r}{close}: it is not a known name{listed}, there is no local directory of that name, and the "
        "hub says",
    )


def _made(known: KnownModel) -> Any:
    from transformers import AutoConfig

    from tapeline.integrations.transformers import quiet_transformers

    fields = json.loads(json.dumps(known.fields))  # a configuration keeps the lists it is given
    try:
        with quiet_transformers():
            return AutoConfig.for_model(fields.pop("model_type"), **fields)
    except Exception as error:  # a configuration checks itself with errors of its own
        raise UsageError(f"This version of transformers cannot make {known.name!r}: {_first_line(error)}") from error


def _read(name: str, problem: str) -> Any:
    from transformers import AutoConfig

    from tapeline.integrations.transformers import quiet_transformers

    try:
        with quiet_transformers():
            return AutoConfig.from_pretrained(name)
    except Exception as error:  # as above
        raise UsageError(f"{problem}: {_first_line(error)}") from error


@functools.cache
def _by_any_name() -> dict[str, KnownModel]:
    found: dict[str, KnownModel] = {}
    for model in known_models().values():
        repositories = (model.source, *model.also)
        for name in (model.name, *repositories, *(repository.partition("/")[2] for repository in repositories)):
            found[_plain(name)] = model
    return found


def _plain(name: str) -> str:
    return "-".join(name.lower().replace("_", " ").replace("-", " ").split())


def _is_path(name: str) -> bool:
    return name.startswith(("/", ".", "~")) or name.count("/") > 1 or "\\" in name


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__

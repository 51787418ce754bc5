from __future__ import annotations

from pathlib import Path

import pytest

from tapeline.errors import UsageError
from tapeline.train.config import DEMO_DEFAULTS, TrainConfig, load_config


def test_no_settings_are_the_demo() -> None:
    config = load_config({})
    assert config.model == "demo"
    assert config.tokenizer == "bytes"
    assert config.max_steps == DEMO_DEFAULTS["max_steps"]


def test_given_settings_win_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("max_length: 77\nlearning_rate: 2e-5\nload_in_4bit: false\nbudget: 1000000000\nseed: 1\n")
    config = load_config({"max_length": 99}, str(file))
    assert (config.max_length, config.learning_rate, config.budget, config.seed) == (99, 2e-5, "1000000000", 1)


def test_epochs_replace_the_steps_of_the_demo() -> None:
    assert load_config({"num_train_epochs": 1.0}).max_steps == -1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max_lenght: 5", "did you mean 'max_length'"),
        ("- a\n- b", "must be a mapping"),
        ("a: [", "not YAML"),
        ("max_length: many", "must be a whole number"),
        ("max_length: 1.5", "must be a whole number"),
        ("load_in_4bit: 1", "must be true or false"),
        ("learning_rate: [1]", "must be a number"),
        ("budget: [1]", "must be text"),
        ("learning_rate: .inf", "must be a number"),
    ],
)
def test_a_wrong_file_is_refused_with_the_reason(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(UsageError, match=message):
        load_config({}, str(file))


def test_a_missing_file_is_refused() -> None:
    with pytest.raises(UsageError, match="Cannot read the configuration"):
        load_config({}, "/nowhere/run.yaml")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"budget": "12 parsecs"}, "Unknown unit"),
        ({"budget": "-1"}, "more than zero"),
        ({"mode": "recomputed"}, "did you mean 'recompute'"),
        ({"margin": "x"}, "Cannot read"),
        ({"max_length": 1}, "max_length must be at least 2"),
        ({"per_device_train_batch_size": 0}, "at least 1"),
        ({"learning_rate": -1.0}, "at least 0"),
        ({"max_steps": 0}, "max_steps"),
        ({"num_train_epochs": 0.0}, "nothing to train"),
        ({"eval_fraction": 1.0}, "below 1"),
        ({"load_in_4bit": True}, "--lora_r"),
        ({"model": "some/model"}, "No data"),
        ({"colour": "red"}, "Unknown setting 'colour'"),
    ],
)
def test_absurd_settings_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load_config(settings)


def test_every_setting_explains_itself() -> None:
    from dataclasses import fields

    assert all(field.metadata["help"] for field in fields(TrainConfig))

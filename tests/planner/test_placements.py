"""The options of small blocks against numbers worked out by hand, and of Llama blocks against laws."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
from bench.planner import DEVICES, MODELS

from tapeline.planner import placements as module
from tapeline.planner.placements import Options, placements
from tapeline.planner.route import Route
from tapeline.planner.stage import Stage
from tapeline.planner.synthetic import LlamaBlock, Training, U
from tests.planner.small import ladder, line

X, A, B = 0, 1, 2
COPIED = ("produced", "released", "fetched", "produced_last", "fetched_first")


def llama(model: str = "Llama-2-7B", training: Training = "full", device: str = "H200@700") -> Stage:
    return LlamaBlock(MODELS[model], DEVICES[device][0], length=4096, batch=2, training=training).stage()


@pytest.fixture(scope="module")
def llama_options() -> Options:
    return placements(llama())


def numbers(options: Options, kept: set[int], moved: set[int]) -> dict[str, list[float]]:
    """What is said of one option, by part."""
    index = options.find(frozenset(kept), frozenset(moved))
    names = (*COPIED, "seconds", "forward_peak", "forward_peak_safe", "backward_peak", "backward_peak_safe")
    found = {name: getattr(options, name)[index].tolist() for name in names}
    return found | {name: float(getattr(options, name)[index]) for name in ("kept_bytes", "moved_bytes", "moved_input")}


def test_an_option_that_moves_one_value() -> None:
    found = numbers(placements(ladder()), {X}, {B})
    assert (found["kept_bytes"], found["moved_bytes"], found["moved_input"]) == (10, 40, 0)
    assert found["seconds"] == [1, 0]
    assert found["produced"] == found["produced_last"] == [40, 0], "made by the last operation of the first part"
    assert found["released"] == [0, 40], "read by the second part"
    assert found["fetched"] == found["fetched_first"] == [0, 40]
    assert found["forward_peak"] == found["forward_peak_safe"] == [10 + 20 + 40, 10 + 40 + 10]
    assert found["backward_peak"] == [20 + 60, 40 + 50], "a beside its gradients; b beside its own; x is kept anyway"
    assert found["backward_peak_safe"] == found["backward_peak"]


def test_an_option_that_moves_the_input() -> None:
    found = numbers(placements(ladder()), {B}, {X})
    assert (found["kept_bytes"], found["moved_bytes"], found["moved_input"]) == (40, 10, 10)
    assert found["produced"] == found["produced_last"] == [0, 0], "the stage before has made it"
    assert found["released"] == [0, 10]
    assert found["fetched"] == found["fetched_first"] == [10, 0], "the replay of the first part begins with it"


def test_what_is_moved_and_released_within_a_part_may_be_there_to_its_end() -> None:
    """Only the first operation reads x here, and only its backward."""
    stage = ladder()
    stage = replace(stage, ops=(*stage.ops[:2], replace(stage.ops[2], reads=(B,))))
    found = numbers(placements(stage), {A, B}, {X})
    assert found["released"] == [10, 0]
    assert found["forward_peak"] == [20 + 40, 20 + 40 + 10]
    assert found["forward_peak_safe"] == [10 + 20 + 40, 20 + 40 + 10]
    assert found["fetched"] == [10, 0]
    assert found["fetched_first"] == [0, 0], "the backward of second runs before"
    assert found["backward_peak"] == [60 - 40, 50]
    assert found["backward_peak_safe"] == [60 - 40 + 10, 50]


def test_what_is_kept_is_gone_after_its_last_need() -> None:
    found = numbers(placements(ladder()), {X, A, B}, set())
    assert found["kept_bytes"] == 70
    assert found["backward_peak"] == [60 - 40, 50], "b is gone when the first part runs backward"


def test_counts_are_numbers_of_values(llama_options: Options) -> None:
    for name in ("moved_input", *COPIED):
        values, counts = getattr(llama_options, name), llama_options.counts[name]
        assert ((values > 0) == (counts > 0)).all(), name
        assert (counts == counts.round()).all(), name


def every_option(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> Options:
    """The options before the dominated ones are left out."""
    with monkeypatch.context() as patch:
        patch.setattr(module, "_best", lambda options: range(len(options)))
        return placements(stage)


def measures(options: Options) -> np.ndarray:
    """What options are compared by."""
    return np.stack(
        [
            *(options.kept_bytes, options.moved_bytes, options.seconds.sum(axis=1)),
            *(options.backward_peak.max(axis=1), options.forward_peak.max(axis=1)),
        ],
        axis=1,
    )


def test_all_sets_and_splits_that_can_be_run_are_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three values that may be saved, of which the input must be."""
    options = every_option(ladder(), monkeypatch)
    pairs = set(zip(options.kept, options.moved, strict=True))
    saved = [{X}, {X, A}, {X, B}, {X, A, B}]
    expected = {
        (frozenset(keep), frozenset(some - set(keep)))
        for some in saved
        for count in range(len(some) + 1)
        for keep in combinations(some, count)
    }
    assert pairs == expected
    assert len(options) == 2 + 4 + 4 + 8


@pytest.mark.parametrize("stage", [ladder(), llama(training="lora")], ids=["ladder", "llama"])
def test_none_is_dominated_and_all_left_out_are(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen, every = measures(placements(stage)), measures(every_option(stage, monkeypatch))
    for row in chosen[:: max(1, len(chosen) // 100)]:
        at_most = (chosen <= row * (1 - 1e-6)).all(axis=1)
        assert not at_most.any()
    for row in every[:: max(1, len(every) // 300)]:
        assert (chosen <= row + np.abs(row) * 1e-6 + 1e-9).all(axis=1).any()


def test_bytes_add_up(llama_options: Options) -> None:
    options = llama_options
    sizes = options.stage.sizes
    for index in range(len(options)):
        kept, moved = options.kept[index], options.moved[index]
        assert not kept & moved
        assert options.rebuilds[index].saved == kept | moved
        assert options.kept_bytes[index] == sum(sizes[value] for value in kept)
        assert options.moved_bytes[index] == sum(sizes[value] for value in moved)
        assert options.seconds[index].sum() == pytest.approx(
            sum(moment.seconds for moment in options.rebuilds[index].moments if moment.replays is not None)
        )
    assert (options.produced.sum(axis=1) + options.moved_input == options.moved_bytes).all()
    assert (options.released.sum(axis=1) == options.moved_bytes).all()
    assert (options.fetched.sum(axis=1) <= options.moved_bytes).all()
    assert (options.fetched_first <= options.fetched).all()
    assert (options.produced_last <= options.produced).all()
    assert (options.forward_peak <= options.forward_peak_safe).all()
    assert (options.backward_peak <= options.backward_peak_safe).all()


def test_nobody_saves_what_is_free_to_recompute(llama_options: Options) -> None:
    """Keeping everything is an option, and so is the input alone on either tier."""
    assert llama_options.find(llama_options.stage.needed) >= 0
    assert llama_options.seconds[llama_options.find(llama_options.stage.needed)].sum() == 0
    assert llama_options.find((X,)) != llama_options.find((), (X,))
    with pytest.raises(KeyError, match="no option"):
        llama_options.find((U,))


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("training", ["full", "lora"])
def test_a_llama_block_has_hundreds_of_options_not_thousands(model: str, training: Training) -> None:
    assert 450 <= len(placements(llama(model, training))) <= 900


def test_parts_change_the_numbers_and_not_the_options(llama_options: Options) -> None:
    route = Route(stages=(llama_options.stage,) * 2, options=(llama_options,) * 2)
    fine = route.refined().choices[0]
    assert len(fine.stage.ops) >= fine.stage.num_parts > llama_options.stage.num_parts
    assert set(fine.stage.halves) > set(llama_options.stage.halves)
    assert (fine.kept, fine.moved) == (llama_options.kept, llama_options.moved)
    for name in ("produced", "released", "fetched", "seconds"):
        assert getattr(fine, name).sum(axis=1) == pytest.approx(getattr(llama_options, name).sum(axis=1))
    assert fine.backward_peak.max(axis=1) == pytest.approx(llama_options.backward_peak.max(axis=1))


def test_a_frozen_block_has_one_option() -> None:
    options = placements(line(is_frozen=True))
    assert (options.kept, options.moved) == ((frozenset(),), (frozenset(),))
    assert options.seconds.sum() == 0
    assert options.forward_peak.tolist() == [[200.0]]
    assert options.backward_peak.max() == 0


def test_values_of_a_unit_go_together_and_held_ones_stay() -> None:
    stage = replace(ladder(), units=(frozenset((A, B)),))
    saved = {kept | moved for kept, moved in zip(placements(stage).kept, placements(stage).moved, strict=True)}
    assert saved <= {frozenset((X,)), frozenset((X, A, B))}
    held = placements(replace(ladder(), held=frozenset((B,))))
    assert all(B in kept for kept in held.kept)


def test_a_stage_says_what_is_wrong_with_it() -> None:
    with pytest.raises(ValueError, match="as many names as sizes"):
        replace(ladder(), names=("x",))
    with pytest.raises(ValueError, match="does not have"):
        replace(line(), ops=(replace(line().ops[0], reads=(7,)),))

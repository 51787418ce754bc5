"""Rules of thumb for gradient checkpointing, as users are told them, each with its reason and where it comes from.

tapeline plans with none of them: they are for printing beside a computed answer, so that a user who knows them sees where
they hold and where they do not. docs/rules.md has them as a table, with what they leave out.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Literal

from tapeline.errors import UsageError, did_you_mean
from tapeline.table import text_table
from tapeline.units import format_bytes

SMALL_VRAM_BYTES = 16 * 2**30
LARGE_VRAM_BYTES = 24 * 2**30
SMALL_MODEL = 3_000_000_000
LARGE_MODEL = 7_000_000_000
SHORT_LENGTH = 512
LONG_LENGTH = 4096
TOLERANCE = 0.03
"""A rule that is this share slower than the best that fits is still called right."""

TABLE = "guide for Unsloth users: decision table"
MODES = "guide for Unsloth users: checkpointing modes"
TIP = "guide for Unsloth users: checkpointing tip"
PRINCIPLE = "guide for Unsloth users: principle, after Chen et al. 2016"
FACTORY = "guide for LLaMA-Factory users"

Training = Literal["full", "lora"]
Stance = Literal["enable", "optional", "kind"]
Share = tuple[float, float]
_NEAR = 0.9
_SIZES = {
    "vram_bytes": (1, "give the memory of the device in bytes, 24 * 2**30 for 24 GiB"),
    "num_parameters": (1, "give the number of parameters of the model, 7_000_000_000 for 7B"),
    "max_length": (1, "give the longest sequence in tokens, such as 2048"),
    "batch_size": (1, "give the sequences of one micro-batch, at least 1"),
    "lora_r": (0, "give the rank of the adapters, or 0 for none"),
    "num_layers": (1, "give the number of decoder layers, such as 32"),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Situation:
    """What the rules ask about. No rule reads the batch size, the rank or what is trained; that is one of their limits.

    Raises:
        UsageError: for a size below its smallest, an unknown `training`, or settings that contradict each other.
    """

    vram_bytes: int
    """Memory of the device, or the budget for it."""
    num_parameters: int
    """All parameters of the model, as numbers."""
    max_length: int
    """Longest sequence, in tokens."""
    num_layers: int
    """Decoder layers."""
    batch_size: int = 1
    """Sequences of one micro-batch."""
    load_in_4bit: bool = False
    """Whether the base model is quantised to 4 bits."""
    lora_r: int = 0
    """Rank of the adapters; 0 if there are none."""
    training: Training = "full"
    """``full``: all weights; ``lora``: adapters only."""

    def __post_init__(self) -> None:
        for name, (least, hint) in _SIZES.items():
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise UsageError(f"{name} must be a whole number of at least {least}, got {value!r}: {hint}.")
        if self.training not in ("full", "lora"):
            hint = did_you_mean(str(self.training), ("full", "lora"))
            raise UsageError(f"Unknown training {self.training!r}{hint}: use full or lora.")
        if (self.training == "lora") != (self.lora_r > 0):
            given = f"training={self.training!r} with lora_r={self.lora_r}"
            raise UsageError(f"{given} makes no sense: use training='lora' with a rank such as 16, or 'full' with 0.")
        if self.load_in_4bit and self.training == "full":
            raise UsageError("load_in_4bit freezes the model: use training='lora' with a rank such as lora_r=16.")


@dataclass(frozen=True, kw_only=True, slots=True)
class Claim:
    """What a guide promises for a mode. Shares are from and to, of the VRAM or of the step time without checkpointing."""

    mode: str
    """tapeline's word for the mode."""
    saved: Share | None
    """Share of VRAM said to be saved; ``None`` if it does not say."""
    slowdown: Share | None
    """Share of step time said to be added; ``None`` if it does not say."""
    source: str
    """Where it is promised."""
    remark: str = ""
    """What the numbers alone do not tell."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Advice:
    """What a rule says, and why."""

    rule: str
    """Name of the rule: ``vram``, ``size``, ``length``, ``4bit``, ``mode``, ``sqrt``, or ``combined``."""
    answer: str
    """The mode in tapeline's words; ``segments:k`` with its k."""
    word: str | bool
    """The same in the guide's words."""
    stance: Stance
    """``enable``: it asks for checkpointing; ``optional``: it leaves it off; ``kind``: it only says which kind."""
    reason: str
    """Why the rule says so, in our words."""
    source: str
    """The guide that it comes from."""
    claim: Claim
    """What is promised for it."""
    conflicts: tuple[str, ...] = ()
    """Where rules, or rows of one rule, contradict each other here; only `combined` names them."""

    def to_json(self) -> str:
        """Write it as JSON text."""
        return json.dumps(asdict(self), indent=2, allow_nan=False)


# What the guides promise for the modes that a rule answers with, whatever the situation.
NOTHING = Claim(mode="none", saved=(0.0, 0.0), slowdown=(0.0, 0.0), source=TABLE)
ENABLED = Claim(mode="recompute", saved=(0.4, 0.6), slowdown=(0.2, 0.3), source=TABLE)
PLAIN = Claim(mode="recompute", saved=(0.3, 0.4), slowdown=(0.2, 0.2), source=MODES)
PLAIN_FACTORY = Claim(mode="recompute", saved=(0.4, 0.5), slowdown=(0.2, 0.3), source=FACTORY)
MOVED = Claim(mode="offload", saved=(0.5, 0.6), slowdown=None, source=MODES)
MOVED_TIP = Claim(mode="offload", saved=(0.5, 0.6), slowdown=(0.2, 0.2), source=TIP)
_MORE = "10-20 points more than plain checkpointing, at a slowdown above its 20-30%"
MOVED_FACTORY = Claim(mode="offload", saved=(0.5, 0.7), slowdown=None, source=FACTORY, remark=_MORE)
CLAIMS = (NOTHING, ENABLED, PLAIN, PLAIN_FACTORY, MOVED, MOVED_TIP, MOVED_FACTORY)


def advise(situation: Situation) -> tuple[Advice, ...]:
    """Ask every rule; those that have nothing to say about the situation are left out.

    Example:
        >>> card = Situation(vram_bytes=24 * 2**30, num_parameters=8_000_000_000, max_length=2048, num_layers=32)
        >>> [(one.rule, one.answer, one.word) for one in advise(card)][:3]
        [('vram', 'none', 'optional'), ('size', 'offload', 'unsloth'), ('mode', 'offload', 'unsloth')]
    """
    return tuple(one for rule in _RULES if (one := rule(situation)) is not None)


def combined(situation: Situation) -> Advice:
    """What the rules say together: one that asks for checkpointing wins, and the length says which kind.

    `Advice.conflicts` names the rules that say something else, and the thresholds at which the guides contradict themselves.
    """
    advice = advise(situation)
    asking = [one.rule for one in advice if one.stance == "enable"]
    kind = _mode(situation)
    conflicts = (*_conflicts(advice, kind, asking), *_edges(situation))
    together = _leave("combined", "optional", "no rule asks for checkpointing, so that speed decides")
    if asking:
        reason = f"asked for by {', '.join(asking)}; {kind.reason}"
        together = _advice("combined", kind.answer, kind.word, "enable", reason, _promised(kind.answer))
    return replace(together, conflicts=conflicts)


def compare(
    advice: Advice | Iterable[Advice], computed: Mapping[str, tuple[int, float]], *, budget_bytes: int
) -> tuple[str, ...]:
    """Say where rules and the computed answer disagree; rules that say the same share a line.

    Args:
        advice: what the rules say; one that is within `TOLERANCE` of the best that fits has no line.
        computed: for each mode its peak in bytes and its slowdown: a step relative to the untouched one, 1.0 adds nothing.
        budget_bytes: what the peak may reach.

    Raises:
        UsageError: if there is nothing to compare with, or a number in it makes no sense.

    Example:
        >>> card = Situation(vram_bytes=8 * 2**30, num_parameters=10**9, max_length=256, num_layers=16)
        >>> computed = {"none": (6 * 2**30, 1.0), "recompute": (4 * 2**30, 1.25)}
        >>> compare(combined(card), computed, budget_bytes=card.vram_bytes)
        ("combined: 'recompute' makes a step 25.0% slower and is not needed: 'none' (6.00 GiB, 1.000x) fits in 8.00 GiB",)
    """
    _check(computed, budget_bytes)
    rules_by_line: dict[str, list[str]] = {}
    for one in (advice,) if isinstance(advice, Advice) else advice:
        if line := _disagreement(one.answer, computed, budget_bytes):
            rules_by_line.setdefault(line, []).append(one.rule)
    return tuple(f"{', '.join(rules)}: {line}" for line, rules in rules_by_line.items())


def to_text(advice: Advice | Iterable[Advice], disagreements: Sequence[str] = ()) -> str:
    """Write rules for people: a table, the reasons, what contradicts itself, and where a computed answer disagrees."""
    rows = (advice,) if isinstance(advice, Advice) else tuple(advice)
    header = ("rule", "mode", "in the guide", "promises to save", "at a slowdown of", "from")
    cells = [
        (one.rule, one.answer, str(one.word), _range(one.claim.saved), _range(one.claim.slowdown), one.source)
        for one in rows
    ]
    parts = [
        text_table(header, cells, left=len(header)),
        "\n".join(f"{one.rule}: {one.reason}" for one in rows),
        "\n".join(f"promise of {one.rule}: {one.claim.remark}" for one in rows if one.claim.remark),
        "\n".join(f"conflict: {conflict}" for one in rows for conflict in one.conflicts),
        "\n".join(f"computed otherwise: {line}" for line in disagreements),
    ]
    return "\n\n".join(part for part in parts if part)


def segment_length(num_layers: int) -> int:
    """The k of "keep every k-th layer": about the square root of the number of layers, and at least 2."""
    return max(2, round(math.sqrt(num_layers)))


def _vram(situation: Situation) -> Advice:
    if situation.vram_bytes < SMALL_VRAM_BYTES:
        return _enable("vram", "below 16 GiB checkpointing is held necessary for a model to fit")
    if situation.vram_bytes >= LARGE_VRAM_BYTES:
        return _leave("vram", "optional", "from 24 GiB it is a choice between speed and memory")
    if situation.num_parameters >= LARGE_MODEL:
        return _enable("vram", "from 16 to 24 GiB it is asked for from 7B parameters")
    return _leave("vram", "optional", "from 16 to 24 GiB it is asked for from 7B parameters, and this model has fewer")


def _size(situation: Situation) -> Advice:
    if situation.num_parameters < SMALL_MODEL:
        return _leave("size", "disable", "below 3B parameters it is to be off where VRAM allows; no number says where")
    if situation.num_parameters < LARGE_MODEL:
        reason = "between 3B and 7B parameters the VRAM decides, at 16 GiB"
        is_small = situation.vram_bytes < SMALL_VRAM_BYTES
        return _enable("size", reason) if is_small else _leave("size", "optional", reason)
    if situation.vram_bytes > LARGE_VRAM_BYTES:
        return _enable("size", "from 7B parameters one is to start with checkpointing on, whatever the VRAM")
    reason = "from 7B parameters on a consumer card (24 GB), hidden states are to go to the host too"
    return _advice("size", "offload", "unsloth", "enable", reason, MOVED_TIP, f"{TIP}; {FACTORY}")


def _length(situation: Situation) -> Advice | None:
    if situation.max_length < LONG_LENGTH:
        return None
    return _enable("length", "from 4096 tokens activations, which grow with the length, are to be recomputed")


def _four_bit(situation: Situation) -> Advice | None:
    if not situation.load_in_4bit:
        return None
    return _leave(
        "4bit", "usually optional", "4-bit weights are held to save enough; the same guide wants both at once"
    )


def _mode(situation: Situation) -> Advice:
    if situation.max_length < SHORT_LENGTH:
        reason = "below 512 tokens moving activations is held not to pay, so that unsloth becomes plain checkpointing"
        return _advice("mode", "recompute", True, "kind", reason, PLAIN)
    reason = "from 512 tokens unsloth, the default, is held to pay for what it moves"
    return _advice("mode", "offload", "unsloth", "kind", reason, MOVED)


def _sqrt(situation: Situation) -> Advice | None:
    num_layers = situation.num_layers
    if num_layers < 2:
        return None
    length = segment_length(num_layers)
    num_kept = math.ceil(num_layers / length)
    saved = max(0.0, 1 - (num_kept + length) / num_layers)
    remark = "of layer activations, by its formula L/k + k, in which a layer saves no more than its input"
    claim = Claim(mode="segments", saved=(saved, saved), slowdown=None, source=PRINCIPLE, remark=remark)
    reason = (
        f"keep {num_kept} of {num_layers} layer inputs, one in {length}; it costs one more forward of the other "
        f"{num_layers - num_kept} layers, beyond what recomputing inside each layer costs"
    )
    return _advice("sqrt", f"segments:{length}", "every sqrt(L)-th layer", "kind", reason, claim)


_RULES: tuple[Callable[[Situation], Advice | None], ...] = (_vram, _size, _length, _four_bit, _mode, _sqrt)


def _enable(rule: str, reason: str) -> Advice:
    return _advice(rule, "recompute", "enable", "enable", reason, ENABLED)


def _leave(rule: str, word: str, reason: str) -> Advice:
    return _advice(rule, "none", word, "optional", reason, NOTHING)


def _advice(
    rule: str, answer: str, word: str | bool, stance: Stance, reason: str, claim: Claim, source: str = ""
) -> Advice:
    source = source or claim.source
    return Advice(rule=rule, answer=answer, word=word, stance=stance, reason=reason, source=source, claim=claim)


def _promised(mode: str) -> Claim:
    """What all guides together promise for a mode: from the least to the most."""
    claims = [claim for claim in CLAIMS if claim.mode == mode]
    return Claim(
        mode=mode,
        saved=_union(claim.saved for claim in claims),
        slowdown=_union(claim.slowdown for claim in claims),
        source="; ".join(claim.source for claim in claims),
        remark="; ".join(claim.remark for claim in claims if claim.remark),
    )


def _conflicts(advice: Sequence[Advice], kind: Advice, asking: Sequence[str]) -> Iterator[str]:
    """Pairs of rules that cannot both be followed, and which of them is."""
    if not asking:
        yield f"mode has {kind.word!r} by default, no other rule asks for checkpointing; taken: off"
        return
    if leaving := ", ".join(one.rule for one in advice if one.stance == "optional"):
        yield f"checkpointing is asked for by {', '.join(asking)}, left off by {leaving}; taken: on"
    for one in advice:
        if one.word == "unsloth" and kind.answer == "recompute":
            yield f"{one.rule} says 'unsloth', mode makes it plain checkpointing below 512 tokens; taken: plain"
        if one.rule == "sqrt":
            yield f"sqrt keeps one layer input in {one.answer.partition(':')[2]}, mode every one; taken: every one"


def _edges(situation: Situation) -> Iterator[str]:
    """Thresholds that are so close that the guides, or the name of a card or model, may mean the other side."""
    vram, size = situation.vram_bytes, situation.num_parameters
    for limit in (SMALL_VRAM_BYTES, LARGE_VRAM_BYTES):
        if _NEAR * limit <= vram < limit:
            yield f"{format_bytes(vram)} are below {limit >> 30} GiB, but may be a card sold as {limit >> 30} GB; taken: below"
    for limit in (SMALL_MODEL, LARGE_MODEL):
        if _NEAR * limit <= size < limit:
            yield f"{size:,} parameters are below {limit // 10**9}B, but may be a model called that; taken: below"
    if vram == LARGE_VRAM_BYTES:
        yield "24 GiB is the end of one row of the table and the start of the next; taken: the next"
    if size == LARGE_MODEL:
        yield "at 7B parameters the table asks for checkpointing, the tree only above; taken: on"
    if situation.max_length == LONG_LENGTH:
        yield "at 4096 tokens the table asks for checkpointing, the tree only above; taken: on"


def _disagreement(answer: str, computed: Mapping[str, tuple[int, float]], budget_bytes: int) -> str:
    """One line, or nothing if the answer is among the best that fit."""
    name = answer if answer in computed else answer.partition(":")[0]
    fitting = [mode for mode, (peak, _) in computed.items() if peak <= budget_bytes]
    if name != "none" and "none" in fitting:
        cost = f"makes a step {computed[name][1] - 1:.1%} slower and " if name in computed else ""
        return f"{answer!r} {cost}is not needed: {_shown('none', computed)} fits in {format_bytes(budget_bytes)}"
    if name not in computed:
        return f"{answer!r} cannot be compared: computed are {', '.join(computed)}"
    peak, slowdown = computed[name]
    best = min(fitting, key=lambda mode: (computed[mode][1], computed[mode][0]), default=None)
    if best is None:
        smallest = min(computed, key=lambda mode: computed[mode][0])
        least = _shown(smallest, computed)
        return f"{answer!r} does not fit, nor does any other: {_over(peak, budget_bytes)}; {least} is the smallest"
    if peak > budget_bytes:
        return f"{answer!r} does not fit: {_over(peak, budget_bytes)}; {_shown(best, computed)} is the best that does"
    if slowdown > computed[best][1] * (1 + TOLERANCE) + 1e-9:
        slower = slowdown / computed[best][1] - 1
        return f"{answer!r} fits, but is {slower:.1%} slower than {_shown(best, computed)}"
    return ""


def _check(computed: Mapping[str, tuple[int, float]], budget_bytes: int) -> None:
    if budget_bytes < 1:
        raise UsageError(
            f"budget_bytes must be at least 1, got {budget_bytes}: give the bytes that the peak may reach."
        )
    if not computed:
        raise UsageError("No computed mode to compare with, got 0: give at least {'none': (peak_bytes, 1.0)}.")
    for mode, (peak, slowdown) in computed.items():
        if peak < 0 or not (math.isfinite(slowdown) and slowdown > 0):
            numbers = f"peak {peak} and slowdown {slowdown}"
            raise UsageError(f"Computed {mode!r} has {numbers}: give bytes, and a ratio above 0 (1.0 is untouched).")


def _over(peak: int, budget_bytes: int) -> str:
    return f"peak {format_bytes(peak)}, {format_bytes(peak - budget_bytes)} over {format_bytes(budget_bytes)}"


def _shown(mode: str, computed: Mapping[str, tuple[int, float]]) -> str:
    peak, slowdown = computed[mode]
    return f"{mode!r} ({format_bytes(peak)}, {slowdown:.3f}x)"


def _union(shares: Iterable[Share | None]) -> Share | None:
    known = [share for share in shares if share is not None]
    return (min(low for low, _ in known), max(high for _, high in known)) if known else None


def _range(share: Share | None) -> str:
    if share is None:
        return "-"
    low, high = (f"{100 * one:.0f}" for one in share)
    return f"{low}%" if low == high else f"{low}-{high}%"

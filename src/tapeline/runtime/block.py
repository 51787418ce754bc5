"""What runs in place of one block's forward while a session is in force."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from tapeline.compat import foreign_hooks, has_transforms
from tapeline.runtime.ambient import Ambient
from tapeline.runtime.finding import Given, Prepared, PreparedCalls, find_sources
from tapeline.runtime.frame import Frame, Late, keep, unpack
from tapeline.runtime.guard import BlockGuard
from tapeline.runtime.inputs import Away, Chain, OutputRecipe, RebuiltInput
from tapeline.runtime.invocation import Invocation
from tapeline.runtime.library import MAX_CLASSES, MAX_TAPES, CallClass, Library, remember
from tapeline.runtime.moving import MovedCall
from tapeline.runtime.rerun import Rerun
from tapeline.runtime.role import Role
from tapeline.runtime.signature import arguments_key, has_objects, surroundings
from tapeline.runtime.strict import run_strictly
from tapeline.runtime.verifier import output_program, settle, settle_rerun
from tapeline.tape.graph import ARGUMENT, Source, Tape, first_difference
from tapeline.tape.program import Recipe
from tapeline.tape.record import DRAWS_NUMBERS, Recorder
from tapeline.tape.sources import Getter, getter

_MAX_DRIFTS = 3
_MAX_CHANGES = 2
RUNS_BACKWARD = "it runs backward inside its forward"


class BlockSeam:
    """Runs a block under one pair of saved-tensor hooks, so that what the plan drops is replayed in backward.

    Args:
        name: the block's name in the model.
        module: the block.
        library: recipes, shared by the blocks of a session.
        chain: shared by the blocks of a session.
        role: what the plan has for it.
    """

    def __init__(self, name: str, module: nn.Module, library: Library, chain: Chain, role: Role) -> None:
        self.name, self.module, self.library, self.chain = name, module, library, chain
        self.guard = BlockGuard(name, module)
        self.records = library.records(name, module)
        self.fingerprint = self.records.fingerprint
        self.is_in_force = True
        """False in a copied or unpickled model, which belongs to no session: the block runs as it is."""
        self.num_calls = 0
        """Calls so far in which autograd recorded something."""
        self.num_chained = 0
        """Such calls whose input was the output of the block called before."""
        self.num_reruns = 0
        """Such calls that fell back to running the whole block again."""
        self.num_recorded = 0
        """Such calls that were recorded."""
        self.num_drifts = 0
        self.reasons: dict[str, None] = {}
        """Why calls were not replayed from a tape, each reason once."""
        self.is_due_for_audit = False
        """Verify the next call again."""
        self.is_strict = False
        """Keep everything, replay every op of every call, and raise where one differs."""
        self._prepared = PreparedCalls()
        self.was_idle = False
        """Whether any plan so far had nothing for it to do."""
        self._generation = library.generation, self.fingerprint.num_rebuilt
        self._unexpected: set[Any] = set()
        """Classes of calls that were not as those of another block of its like, and are yet to be verified."""
        self.place(role)

    def place(self, role: Role) -> None:
        """Treat the calls from now on like this; what was forwarded before stays as it is."""
        self.role, self.policy, self.is_idle = role, role.policy, role.is_idle
        self.was_idle = self.was_idle or self.is_idle
        self._prepared.take(role)

    def __call__(self, forward: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """Run ``forward(*args, **kwargs)``; nothing is spent where autograd records nothing."""
        is_training = self.is_in_force and self.module.training and torch.is_grad_enabled()
        if not is_training or self.is_idle or torch.compiler.is_compiling() or has_transforms():
            return forward(*args, **kwargs)
        key, tensors = arguments_key(args, kwargs)
        token = self.fingerprint.token()
        if not (self.fingerprint.has_trainable or any(tensor.requires_grad for tensor in tensors)):
            return forward(*args, **kwargs)
        foreign, can_compose = foreign_hooks()
        if not can_compose:
            self.reasons.setdefault("somebody else checkpoints or forbids saved-tensor hooks around it")
            return forward(*args, **kwargs)
        self.num_calls += 1
        settings, invocation = surroundings(), Invocation(forward, args, kwargs)
        if self.is_strict:
            return run_strictly(self, invocation, tensors, settings)
        given = Given(invocation, tensors, foreign, self._rebuilt(tensors), self._begin_moves(), self.role.moves_input)
        out = self._dispatch((token, settings, key), given)
        if given.moves is not None:
            given.moves.end(out)
        return out

    def _dispatch(self, key: Any, given: Given) -> Any:
        """Run a call in the way that fits its class."""
        generation = self.library.generation, self.fingerprint.num_rebuilt
        if self._generation != generation:
            self._generation = generation
            self._prepared.clear()
        prepared = self._prepared.find(key) or self._prepare(key)
        if prepared is None or (self.is_due_for_audit and prepared.recipe is not None):
            self.is_due_for_audit = False
            expected = self._expected(key) if prepared is None else None
            if expected is not None:
                return self._record_as_expected(key, given, expected)
            return self._record(key, given, prepared)
        self.records.num_new = 0
        if prepared.recipe is None:
            return self._fall_back(key, prepared.known, given)
        return self._run(key, prepared, given)

    def __getstate__(self) -> dict[str, Any]:
        return {"name": self.name, "is_in_force": False}

    # -- ways to run a call ----------------------------------------------------------------------------------------

    def _run(self, key: Any, prepared: Prepared, given: Given) -> Any:
        """As recorded: keep, drop and move what the recipe says."""
        invocation, ambient = given.invocation, Ambient(key[1], given.tensors)
        before = self._versions(invocation)
        frame = self._frame(prepared, given, ambient)
        away = frame.away
        with saved_tensors_hooks(frame.pack, unpack):
            out = invocation.run()
        if frame.finish() and self._casts_are_current(prepared, frame) and frame.complete():
            self._note_output(out, prepared, ambient, given.tensors, away)
        else:
            self._drifted(key, frame, invocation, ambient, before)
        return out

    def _frame(self, prepared: Prepared, given: Given, ambient: Ambient) -> Frame:
        recipe = prepared.recipe
        assert recipe is not None, "checked by the caller"
        away = given.away(recipe)
        sources = find_sources(prepared.getters, given.tensors, away)
        return Frame(self.name, recipe, sources, ambient, given.foreign, away, given.moves)

    def _record(self, key: Any, given: Given, audited: Prepared | None) -> Any:
        """Record the call while it runs; then treat it as any later one. An audit compares with what was known."""
        self.num_recorded += 1
        invocation, tensors, foreign = given.invocation, given.tensors, given.foreign
        ambient, before = Ambient(key[1], tensors), self._versions(invocation)
        recorder = Recorder(self.module, (invocation.args, invocation.kwargs))
        late: list[Late] = []

        def pack(tensor: torch.Tensor) -> Any:
            recorder.pack(tensor)
            late.append(Late(tensor))
            if foreign is None:
                return late[-1]
            # hooks of somebody else get what is saved now, before it may be overwritten: all of it, this once
            with recorder.paused():
                return keep(tensor, foreign)

        with saved_tensors_hooks(pack, unpack), recorder:
            out = invocation.run()
        if any(place.is_unpacked for place in late):
            recorder.refuse(RUNS_BACKWARD)
        tape = recorder.finish(out)
        places, late = late, []  # autograd keeps the pack hook, and so what it refers to
        known = self._classify(key, tape, tensors, has_written=before != self._versions(invocation))
        if known.tape is None:
            self.note_reason(known.reason)
            if not settle_rerun(self._rerun(known, invocation, ambient), places, verifies=self.library.verifies):
                known.can_rerun = False
                self.note_reason("running it again gave something else, so it is kept")
            self.chain.note(None, None)
            return out
        if audited is not None and audited.known.tape is not None and audited.known.tape.digest != tape.digest:
            self.note_reason(f"an audit found another tape: {first_difference(audited.known.tape, tape)}")
        recipe = self.library.recipe(tape, self.policy)
        prepared = self._with_getters(known, recipe)
        here = Given(invocation, tensors, None, None, given.moves if foreign is None else None, given.tier)
        frame = self._frame(prepared, here, ambient)
        self.library.casts.note(prepared.cast_parameters())
        away = frame.away
        is_settled = settle(self, frame, places, is_audit=audited is not None)
        if given.moves is not None:
            given.moves.release()
        if is_settled:
            self._remember(key, prepared)
            self.library.expected[self._kind(), key[1:], self.policy] = recipe
        else:
            self._prepared.drop(key)
        self._note_output(out, prepared, ambient, tensors, away)
        return out

    def _record_as_expected(self, key: Any, given: Given, recipe: Recipe) -> Any:
        """Record the call while its tensors are dropped as those of a block of its like were.

        So recording the second and all later blocks needs no more memory than running them. If the tape turns out to be
        another one, this call falls back to running the whole block again, and the next is recorded with everything held.
        """
        self.num_recorded += 1
        invocation, tensors = given.invocation, given.tensors
        ambient, before = Ambient(key[1], tensors), self._versions(invocation)
        recorder = Recorder(self.module, (invocation.args, invocation.kwargs))
        prepared = self._with_getters(CallClass(recipe.tape), recipe)
        frame = self._frame(prepared, given, ambient)
        away = frame.away

        def pack(tensor: torch.Tensor) -> Any:
            recorder.pack(tensor)
            with recorder.paused():
                return frame.pack(tensor)

        with saved_tensors_hooks(pack, unpack), recorder:
            out = invocation.run()
        tape = recorder.finish(out)
        known = self._classify(key, tape, tensors, has_written=before != self._versions(invocation))
        is_equal = known.tape is not None and known.tape.digest == recipe.tape.digest
        if is_equal and frame.finish() and self._casts_are_current(prepared, frame) and frame.complete():
            self._remember(key, prepared)
            self._note_output(out, prepared, ambient, tensors, away)
            return out
        frame.drift = frame.drift or "it has another tape than a block built alike"
        self._recover(frame, key, invocation, ambient, before, tape)
        self.chain.note(None, None)
        if known.tape is not None and not self.library.is_verified(known.tape, self.policy):
            del self.records.classes[key]
            self._unexpected.add(key)
        return out

    def _expected(self, key: Any) -> Recipe | None:
        """The recipe of a block of its like, if a call that turns out to be another one can be run again."""
        recipe = self.library.expected.get((self._kind(), key[1:], self.policy))
        # in a state that this block was not in before, a number may be another again before backward
        is_new_state = self.records.classes and all(key[0] != token for token, *_ in self.records.classes)
        is_safe = key not in self._unexpected and not has_objects(key[2]) and not is_new_state
        return recipe if recipe is not None and is_safe and not recipe.tape.changes_state else None

    def _classify(self, key: Any, tape: Tape, tensors: list[torch.Tensor], *, has_written: bool) -> CallClass:
        """Keep what a recording has found out about a class of calls."""
        records = self.records
        if self.fingerprint.token() != key[0]:
            records.num_changes += 1
            if records.num_changes >= _MAX_CHANGES:
                records.fixed = CallClass(None, "its forward changes its own attributes", can_rerun=False)
                self._prepared.clear()
                self.note_reason(records.fixed.reason)
        shapes = tuple(tensor.shape for tensor in tensors)
        if any(known.shapes == shapes for known in records.classes.values()):
            records.num_new += 1
            if records.num_new == MAX_CLASSES:
                self.note_reason(f"each of {MAX_CLASSES} calls was different, and is recorded anew: this takes time")
        known = CallClass(self.library.canonical(tape), shapes=shapes)
        if tape.obstacle:
            can_rerun = self._can_rerun(key, tape, has_written=has_written) and tape.obstacle != RUNS_BACKWARD
            known = CallClass(None, tape.obstacle, can_rerun, shapes)
            remember(self.library.obstacles, (self._kind(), key[1:]), known, MAX_TAPES)
            self._remember(key, self._with_getters(known, None))
        if (group := self.library.groups.get(self.name)) is not None:
            remember(self.library.shared, (group, key[1:]), known, MAX_TAPES)
        return remember(records.classes, key, known, MAX_CLASSES)

    def _can_rerun(self, key: Any, tape: Tape, *, has_written: bool) -> bool:
        """Whether running such a call again changes nothing but what it returns."""
        changes = has_written or tape.changes_state or tape.obstacle == DRAWS_NUMBERS or has_objects(key[2])
        return not changes and self.fingerprint.token() == key[0]

    def _prepare(self, key: Any) -> Prepared | None:
        """The recipe for a class that was recorded under another policy, or by another block of its like."""
        known = (
            self.records.fixed
            or self.records.classes.get(key)
            or self.library.obstacles.get((self._kind(), key[1:]))
            or self.library.shared.get((self.library.groups.get(self.name), key[1:]))
        )
        if known is None or (known.tape is not None and not self.library.is_verified(known.tape, self.policy)):
            return None
        recipe = self.library.recipe(known.tape, self.policy) if known.tape is not None else None
        return self._remember(key, self._with_getters(known, recipe))

    def _fall_back(self, key: Any, known: CallClass, given: Given) -> Any:
        """Without a tape: drop everything and run the whole block again, or keep everything."""
        self.note_reason(known.reason)
        invocation, foreign = given.invocation, given.foreign
        rerun = self._rerun(known, invocation, Ambient(key[1], given.tensors))
        self.chain.note(None, None)
        if rerun is None:
            return invocation.run()
        number = -1

        def pack(tensor: torch.Tensor) -> Any:
            nonlocal number
            number += 1
            return rerun.drop(number, tensor) or keep(tensor, foreign)

        with saved_tensors_hooks(pack, unpack):
            return invocation.run()

    def _rerun(self, known: CallClass, invocation: Invocation, ambient: Ambient) -> Rerun | None:
        """The whole-block fall-back, where the policy would recompute everything and the block allows it."""
        if not known.can_rerun or not self.policy.drops_all:
            return None
        self.num_reruns += 1
        return Rerun(self.guard, self.fingerprint, invocation, ambient)

    def _recover(
        self, frame: Frame, key: Any, invocation: Invocation, ambient: Ambient, before: list[int], tape: Tape
    ) -> None:
        """Bring back what a call has dropped that was not as recorded, or make asking for it an error."""
        if not self._can_rerun(key, tape, has_written=before != self._versions(invocation)):
            frame.lose(
                f"Block {self.name!r} differed from its tape ({frame.drift}) and cannot be run again: it changes state."
            )
        else:
            self.num_reruns += 1
            frame.recover(Rerun(self.guard, self.fingerprint, invocation, ambient), frame.cursor)

    def _versions(self, invocation: Invocation) -> list[int]:
        """How often what the block is made of, and what it is given, has been written."""
        given = [tensor._version for tensor in invocation.tensors() if not tensor.is_inference()]
        return self.fingerprint.versions() + given

    def _drifted(self, key: Any, frame: Frame, invocation: Invocation, ambient: Ambient, before: list[int]) -> None:
        """The call did something else than what was recorded: recover exactly, and record the next one anew."""
        self.num_drifts += 1
        self.note_reason(f"a call differed from the tape: {frame.drift}")
        self._recover(frame, key, invocation, ambient, before, frame.recipe.tape)
        self.chain.note(None, None)
        self._prepared.drop(key)
        self.records.classes.pop(key, None)
        if self.num_drifts >= _MAX_DRIFTS:
            can_rerun = self._can_rerun(key, frame.recipe.tape, has_written=before != self._versions(invocation))
            known = CallClass(None, "its calls differ though nothing it is given does", can_rerun)
            self.records.classes[key] = known
            self._remember(key, self._with_getters(known, None))

    # -- what a call is given --------------------------------------------------------------------------------------

    def getters(self, sources: tuple[Source, ...] | list[Source]) -> list[Getter | int]:
        """How to find each source in a call of this block."""
        return [source.place if source.kind == ARGUMENT else getter(self.module, source) for source in sources]

    def _with_getters(self, known: CallClass, recipe: Recipe | None) -> Prepared:
        if recipe is None:
            return Prepared(known, None, [], [], [])
        outputs = self.library.all_sources(recipe.tape) if self.role.feeds_next else []
        casts = self.getters(recipe.tape.casts)
        return Prepared(known, recipe, self.getters(recipe.sources), casts, self.getters(outputs))

    def _remember(self, key: Any, prepared: Prepared) -> Prepared:
        return self._prepared.remember(key, prepared)

    def _rebuilt(self, tensors: list[torch.Tensor]) -> RebuiltInput | None:
        match = self.chain.match(tensors[0] if tensors else None)
        self.num_chained += match is not None
        if self.role.drops_input and match is not None and match[0] is not None:
            return RebuiltInput(match[0], match[1])
        return None

    def _begin_moves(self) -> MovedCall | None:
        role, mover = self.role, self.library.mover
        if mover is None or not role.has_moves:
            return None
        return mover.call(self.name, role.ahead_bytes)

    def _note_output(
        self, out: Any, prepared: Prepared, ambient: Ambient, tensors: list[torch.Tensor], away: Away | None
    ) -> None:
        output = None
        program = output_program(self, prepared, out, tensors, ambient) if self.role.feeds_next else None
        if program is not None:
            sources = find_sources(prepared.output_getters, tensors, away)
            output = OutputRecipe(self.name, program, sources, ambient)
        self.chain.note(out, output)

    def _casts_are_current(self, prepared: Prepared, frame: Frame) -> bool:
        """Whether copies that autocast has cached are those of the parameters as they are."""
        if prepared.cast_getters and not self.library.casts.note(prepared.cast_parameters(), frame.num_found):
            frame.drift = "autocast used copies of parameters from before they were changed"
            frame.lose(
                f"Block {self.name!r} ran in an autocast context that has cached copies of its parameters from before the "
                "optimizer step. Leave the context after each forward, or use torch.autocast(..., cache_enabled=False)."
            )
        return not frame.drift

    def _kind(self) -> Any:  # what blocks that are built alike have in common
        return tuple((type(part), part.training) for part in self.module.modules()), self.fingerprint.layouts()

    def note_reason(self, reason: str) -> None:
        if reason:
            self.reasons.setdefault(reason)

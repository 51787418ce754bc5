"""One fine-tuning run: load, plan, train under the plan, compare with the promise, save."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tapeline.errors import BudgetExceededError, FullTierError, TapelineError, UsageError
from tapeline.integrations.transformers import (
    load_model,
    load_tokenizer,
    no_progress_bars,
    quiet_transformers,
    trainer_loss,
)
from tapeline.planner.schema import Plan
from tapeline.runtime.predict import FakeStep
from tapeline.runtime.search import Search
from tapeline.runtime.session import Report, Session
from tapeline.runtime.session_tiers import less_room
from tapeline.runtime.shape_plans import ShapePlans
from tapeline.runtime.wanted import Wanted
from tapeline.train.config import BYTES, DEMO, TrainConfig
from tapeline.train.data import Collator, Record, encode, largest_batch, load_records
from tapeline.train.demo import byte_tokenizer, demo_model, demo_records
from tapeline.train.interrupt import GracefulStop
from tapeline.train.loop import Measurement, Observer, TrainingLoop, disk_errors, memory_errors
from tapeline.train.output import (
    PLAN_FILE,
    REPORT_FILE,
    check_output_dir,
    find_checkpoint,
    last_checkpoint,
    make_output_dir,
    nothing_left_behind,
)
from tapeline.units import format_bytes

_LOOP_BYTES = 1024  # the running loss, token counts and gradient norm that the Trainer holds

Sequences = list[dict[str, list[int]]]


@dataclass(kw_only=True, slots=True)
class Result:
    """What a run did."""

    status: str
    """``done`` or ``interrupted``."""
    plan: Plan
    """The plan it ran under."""
    report: Report
    """Promise against measurement, over all measured steps."""
    measurements: list[Measurement]
    """Each measured step."""
    num_steps: int
    """Optimizer steps done, those before a resume included."""
    losses: list[tuple[int, float]]
    """(step, loss) as reported."""
    eval_loss: float | None = None
    """Loss on the evaluation data, if there is any."""
    output_dir: str = ""
    """Where the result is."""
    checkpoint: str | None = None
    """The checkpoint to resume from, if interrupted."""


@dataclass(kw_only=True)
class _Job:
    """The parts of a run, ready to start."""

    config: TrainConfig
    model: nn.Module
    tokenizer: Any
    collator: Collator
    train_data: Sequences
    eval_data: Sequences
    output_dir: Path
    checkpoint: Path | None
    observer: Observer


def train(config: TrainConfig, observer: Observer) -> Result:
    """Fine-tune a causal language model under a byte budget.

    Raises:
        UsageError: for settings, data or directories that cannot be used; nothing has been written then.
        InfeasibleBudgetError: if no plan fits.
        BudgetExceededError: if a measured peak was above the budget; the result has been saved.
        OutOfMemoryError: if the device ran out of memory although the plan fits.
    """
    output_dir = check_output_dir(config)
    checkpoint = find_checkpoint(config, output_dir)
    _require_libraries()
    with nothing_left_behind(output_dir):
        return _plan_and_run(_prepare(config, output_dir, checkpoint, observer))


def _plan_and_run(job: _Job) -> Result:
    config, output_dir = job.config, job.output_dir
    trainer = _make_trainer(job)
    trainer.create_optimizer()
    micro_batch = job.collator(largest_batch(job.train_data, config.per_device_train_batch_size))
    micro_batch = {name: tensor.to(trainer.args.device) for name, tensor in micro_batch.items()}
    job.model.train()
    wanted = Wanted(
        mode=config.mode,
        margin=config.margin or None,
        reserve=_LOOP_BYTES,
        host_budget=config.host_budget or None,
        disk_budget=config.disk_budget or None,
        on_full_tier=config.on_full_tier,  # type: ignore[arg-type]  # checked at run time, as every setting
        optimizer=trainer.optimizer,
        loss_fn=trainer_loss,
        accumulation=config.gradient_accumulation_steps,
    )
    session, predictor = _session(job, micro_batch, wanted)
    plan = session.plan
    with disk_errors(output_dir), session:
        make_output_dir(config, output_dir)
        result = _run(job, trainer, session, predictor)
    with disk_errors(output_dir):
        if result.status == "done":
            _save(job, trainer, result)
    if result.status == "done" and job.eval_data:
        result.eval_loss = _evaluate(job, trainer)
    if result.report.is_within_budget is False:
        raise BudgetExceededError(
            f"The measured peak {format_bytes(result.report.measured_peak_bytes or 0)} is above the budget "
            f"{format_bytes(plan.budget_bytes or 0)} (predicted {format_bytes(plan.peak_bytes)}). The result is saved in "
            f"{config.output_dir}. Train with a --margin, and please report the model and its configuration."
        )
    return result


def _session(job: _Job, micro_batch: Any, wanted: Wanted) -> tuple[Session, FakeStep]:
    """A plan in force on the model, and what predicts for other batches; with less room below the device where there is not as much as it needs."""
    config, observer = job.config, job.observer
    while True:
        search = Search(job.model, micro_batch, config.budget, wanted)
        plan = search.plan()
        observer.planned(plan)
        shapes = _shape_plans(config, search, plan, observer)
        predictor = FakeStep(
            job.model,
            micro_batch,
            [block.name for block in plan.blocks],
            reserve_bytes=_LOOP_BYTES,
            optimizer=wanted.optimizer,
            loss_fn=wanted.loss_fn,
            accumulation=wanted.accumulation,
        )
        try:
            session = Session(
                job.model,
                plan,
                measure=False,
                shapes=shapes,
                offload_dir=config.offload_dir or None,
                checksums=config.checksums,
            )
        except FullTierError as error:
            wanted = less_room(wanted, plan, error)
        else:
            return session, predictor


def _shape_plans(config: TrainConfig, search: Search, plan: Plan, observer: Observer) -> ShapePlans | None:
    """Plans for other shapes than the largest, where there is something to choose for each."""
    if not config.per_shape or search.wanted.name != "auto" or plan.keeps_all:
        return None
    if (obstacle := search.obstacle_beside_training()) is not None:
        observer.said(f"One plan for all shapes of batches: {obstacle}.")
        return None
    return ShapePlans(search, plan)


def _prepare(config: TrainConfig, output_dir: Path, checkpoint: Path | None, observer: Observer) -> _Job:
    from transformers import set_seed

    records = load_records(config.data) if config.data else demo_records()
    tokenizer = byte_tokenizer() if config.tokenizer == BYTES else load_tokenizer(config.tokenizer)
    limits: dict[str, Any] = {"max_length": config.max_length, "packing": config.packing}
    if any(record.messages for record in records) and not tokenizer.chat_template:
        observer.said("The tokenizer has no chat template: messages are written as <|role|> lines.")
    sequences = encode(records, tokenizer, **limits)
    eval_data = encode(load_records(config.eval_data), tokenizer, **limits) if config.eval_data else []
    num_held_back = round(len(sequences) * config.eval_fraction) if not eval_data else 0
    if num_held_back:
        if num_held_back == len(sequences):
            raise UsageError(
                f"eval_fraction {config.eval_fraction} leaves none of the {len(sequences)} sequences to train on."
            )
        sequences, eval_data = sequences[:-num_held_back], sequences[-num_held_back:]
    set_seed(config.seed)
    model = _make_model(config, len(tokenizer))
    _check_vocabulary(model, sequences)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    job = _Job(
        config=config,
        model=model,
        tokenizer=tokenizer,
        collator=Collator(pad),
        train_data=sequences,
        eval_data=eval_data,
        output_dir=output_dir,
        checkpoint=checkpoint,
        observer=observer,
    )
    _describe(job, records)
    return job


def _make_model(config: TrainConfig, vocab_size: int) -> nn.Module:
    from tapeline.integrations.peft import add_lora

    if config.model == DEMO:
        if config.load_in_4bit:
            raise UsageError("The demo model has no saved weights to quantise: name a model with --model.")
        model = demo_model(vocab_size)
        if config.dtype != "auto":
            model.to(getattr(torch, config.dtype))
    else:
        model = load_model(config.model, dtype=config.dtype, load_in_4bit=config.load_in_4bit)
    if config.lora_r:
        model = add_lora(
            model,
            r=config.lora_r,
            alpha=config.lora_alpha,
            dropout=config.lora_dropout,
            target_modules=config.lora_target_modules,
        )
    return model


def _make_trainer(job: _Job) -> Any:
    from transformers import PrinterCallback, Trainer, TrainingArguments

    config = job.config
    try:
        with quiet_transformers():
            arguments = TrainingArguments(
                output_dir=str(job.output_dir),
                per_device_train_batch_size=config.per_device_train_batch_size,
                per_device_eval_batch_size=config.per_device_train_batch_size,
                gradient_accumulation_steps=config.gradient_accumulation_steps,
                learning_rate=config.learning_rate,
                lr_scheduler_type=config.lr_scheduler_type,
                warmup_steps=config.warmup_steps,
                weight_decay=config.weight_decay,
                max_grad_norm=config.max_grad_norm,
                optim=config.optim,
                max_steps=config.max_steps,
                num_train_epochs=config.num_train_epochs,
                seed=config.seed,
                logging_steps=config.logging_steps,
                save_strategy="steps",
                save_steps=config.save_steps,
                save_total_limit=config.save_total_limit,
                report_to="none",
                disable_tqdm=True,
                remove_unused_columns=False,
                dataloader_pin_memory=torch.accelerator.is_available(),
            )
            trainer = Trainer(
                model=job.model,
                args=arguments,
                train_dataset=job.train_data,
                eval_dataset=job.eval_data or None,
                data_collator=job.collator,
                processing_class=job.tokenizer,
            )
            trainer.remove_callback(PrinterCallback)
    except ValueError as error:
        raise UsageError(f"transformers refuses the settings: {' '.join(str(error).split())}") from error
    return trainer


def _run(job: _Job, trainer: Any, session: Session, predictor: FakeStep) -> Result:
    start = 0 if job.checkpoint is None else int(job.checkpoint.name.rsplit("-", 1)[-1])
    with (
        GracefulStop(job.observer.said) as stop,
        memory_errors(f"the plan, which needs only {format_bytes(session.plan.peak_bytes)},"),
        no_progress_bars(),
    ):
        loop = TrainingLoop(session, predictor, job.observer, stop, first_step=start + 1, output_dir=job.output_dir)
        for callback in loop.callbacks():
            trainer.add_callback(callback)
        try:
            trainer.train(resume_from_checkpoint=str(job.checkpoint) if job.checkpoint else None)
        finally:
            loop.close()
        was_interrupted = stop.is_requested and trainer.state.global_step < trainer.state.max_steps
    newest = last_checkpoint(job.output_dir) if was_interrupted else None
    return Result(
        status="interrupted" if was_interrupted else "done",
        plan=session.plan,
        report=session.report(),
        measurements=loop.measurements,
        num_steps=trainer.state.global_step,
        losses=loop.losses,
        output_dir=job.config.output_dir,
        checkpoint=str(newest) if newest else None,
    )


def _save(job: _Job, trainer: Any, result: Result) -> None:
    """Write the model or adapter, the tokenizer, the plan and the report."""
    with quiet_transformers():
        trainer.save_model(str(job.output_dir))
    (job.output_dir / PLAN_FILE).write_text(result.plan.to_json(), encoding="utf-8")
    (job.output_dir / REPORT_FILE).write_text(result.report.to_json(), encoding="utf-8")


def _evaluate(job: _Job, trainer: Any) -> float:
    try:
        with no_progress_bars(), memory_errors("the evaluation"):
            return float(trainer.evaluate()["eval_loss"])
    except RuntimeError as error:
        raise TapelineError(
            f"Training is done and the result is saved in {job.config.output_dir}, but the evaluation failed: {error}"
        ) from error


def _check_vocabulary(model: nn.Module, sequences: Sequences) -> None:
    size = model.get_input_embeddings().num_embeddings  # type: ignore[operator]
    largest = max(max(s["input_ids"]) for s in sequences)
    if largest >= size:
        raise UsageError(
            f"The tokenizer does not belong to the model: it gives token {largest}, the model knows {size}. "
            "Name the right one with --tokenizer."
        )


def _describe(job: _Job, records: list[Record]) -> None:
    parameters = list(job.model.parameters())
    total, trained = sum(p.numel() for p in parameters), sum(p.numel() for p in parameters if p.requires_grad)
    lengths = [len(s["input_ids"]) for s in job.train_data]
    job.observer.said(
        f"model: {job.config.model}, {total / 1e6:.1f} M parameters ({trained / 1e6:.2f} M trained), {parameters[0].dtype}"
        + (", 4-bit base" if job.config.load_in_4bit else "")
    )
    job.observer.said(
        f"data: {len(records)} records, {len(lengths)} sequences of {min(lengths)} to {max(lengths)} tokens"
        + (f", {len(job.eval_data)} more to evaluate on" if job.eval_data else "")
    )


def _require_libraries() -> None:
    missing = [name for name in ("transformers", "peft", "accelerate") if find_spec(name) is None]
    if missing:
        raise UsageError(f"Training needs {', '.join(missing)}: pip install 'tapeline[hf]'.")

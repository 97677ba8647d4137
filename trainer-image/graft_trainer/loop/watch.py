"""The work around the training steps: progress, the loss curve, the held-out loss, and when a checkpoint is due."""

import logging
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

from graft.contracts.progress import Reason
from transformers import TrainerCallback

from graft_trainer.checkpoints.store import CheckpointWriter
from graft_trainer.data.tokens import Collator, Tokenisation, Tokenised
from graft_trainer.loop.pace import Pace
from graft_trainer.model.loss import mean_loss, shared_loss
from graft_trainer.processes import distributed
from graft_trainer.recipe.resolve import Resolved
from graft_trainer.run.failures import Failure, Interrupted
from graft_trainer.run.interruption import Interruption
from graft_trainer.run.progress import ProgressReporter, now

log = logging.getLogger(__name__)
TELL = 0.5  # seconds between updates of the progress in memory
TIMED = 2  # batches of each rank that tell how long an evaluation takes


class Watch(TrainerCallback):  # type: ignore[misc]
    """Follows every step. Its state() is part of each checkpoint, so an attempt that resumes knows the whole run."""

    def __init__(
        self,
        progress: ProgressReporter,
        interruption: Interruption,
        resolved: Resolved,
        collator: Collator,
        held_out: Tokenisation | None,
        writer: CheckpointWriter,
        save_seconds: float,
        tokens_per_step: float,
    ) -> None:
        self.progress = progress
        self.interruption = interruption
        self.resolved = resolved
        self.collator = collator
        self.held_out = held_out
        self.save_seconds = save_seconds  # between checkpoints, if training.saveSteps is not set
        self.tokens_per_step = tokens_per_step  # mean over an epoch
        self.writer = writer
        self.curve: list[dict[str, float]] = []
        self.events: list[dict[str, Any]] = []  # the lines of events.jsonl
        self.tokens = 0  # read in all steps, by all ranks
        self.learned_tokens = 0  # the part of them that the loss covers
        self.seconds = 0.0  # of training, including earlier attempts
        self.resumed_from: int | None = None
        self.leaving = False  # True: all ranks have agreed to write a checkpoint and end
        self.pace = Pace()
        self.told = 0.0
        self._due = False
        self._saved = self._since = time.monotonic()
        self._read = 0  # the part of collator.tokens that is already counted in self.tokens
        self._learned = 0  # tokens that the loss covers in this rank's part of the step

    def state(self) -> dict[str, Any]:
        """Return what an attempt needs to resume, except the weights and the optimizer's state."""
        self._count_time()
        return {
            "curve": list(self.curve),
            "events": list(self.events),
            "tokens": self.tokens,
            "learnedTokens": self.learned_tokens,
            "seconds": self.seconds,
        }

    def restore(self, state: dict[str, Any], step: int) -> None:
        """Restore state() from a checkpoint of `step` steps. events.jsonl and the progress then cover the whole run."""
        self.curve, self.events = state["curve"], state["events"]
        self.tokens, self.seconds = state["tokens"], state["seconds"]
        self.learned_tokens = state.get("learnedTokens", 0)  # checkpoints of earlier releases have no count
        self.resumed_from = step
        for event in self.events:
            self.progress.event(**event)
        measured = [event["evalLoss"] for event in self.events if "evalLoss" in event]
        self.progress.update(
            step=step,
            percent=100 * step // self.resolved.max_steps,
            loss=self.curve[-1]["loss"] if self.curve else None,
            eval_loss=measured[-1] if measured else None,
            resumed_from=step,
        )

    def saved(self) -> None:
        """Record that a checkpoint was taken."""
        self._due, self._saved = False, time.monotonic()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._saved = self._since = time.monotonic()
        self._read = self.collator.tokens
        self.pace = Pace()
        self.pace.step(state.global_step, self.tokens)
        # The checkpoint may be of a step whose evaluation was not done yet.
        self.catch_up(kwargs["model"], state.global_step)
        if self.leaving:
            raise self.parting()

    def count_learned(self, tokens: int) -> None:
        """Count tokens that the loss covers in this rank's part of the current step."""
        self._learned += tokens

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        step, total = state.global_step, self.resolved.max_steps
        save = self._agree(step)
        self.pace.step(step, self.tokens)
        if time.monotonic() - self.told >= TELL or save or step == total:
            self.told = time.monotonic()
            self.progress.update(
                step=step,
                percent=100 * step // total,
                tokens_per_second=self.pace.tokens_per_second(),
                eta_seconds=self.eta_seconds(step),
            )
        control.should_save = save and step < total  # after the last step, the final checkpoint is written

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if not logs or "loss" not in logs:
            return
        step, loss, rate = state.global_step, float(logs["loss"]), float(logs.get("learning_rate", 0.0))
        if not math.isfinite(loss) or (not math.isfinite(float(logs.get("grad_norm", 0.0))) and self.precise()):
            raise Failure(
                Reason.CONFIGURATION_INVALID,
                f"training diverged: the loss is {loss} at step {step}",
                f"Lower spec.training.learningRate (it was {self.resolved.learning_rate:g}), for example to "
                f"{self.resolved.learning_rate / 10:g}, or raise spec.training.warmupRatio.",
            )
        record = {"step": step, "loss": round(loss, 5), "learningRate": rate}
        if math.isfinite(norm := float(logs.get("grad_norm", math.nan))):
            record["gradNorm"] = float(f"{norm:.5g}")  # of the step's gradients before they are clipped
        self.curve.append(record)
        self._event(**record)
        self.progress.update(step=step, loss=round(loss, 5))
        speed = self.pace.tokens_per_second()
        eta = self.eta_seconds(step)
        if distributed.is_main():
            log.info(
                "step %d/%d  loss %.4f  lr %.2e%s%s",
                step,
                self.resolved.max_steps,
                loss,
                rate,
                f"  {speed:.0f} tokens/s" if speed else "",
                f"  {eta} s left" if eta is not None else "",
            )

    def held_out_curve(self) -> list[dict[str, float]]:
        """Return the held-out losses, {step, evalLoss}, in the order in which they were measured."""
        return [{"step": event["step"], "evalLoss": event["evalLoss"]} for event in self.events if "evalLoss" in event]

    def precise(self) -> bool:
        """Return whether an infinite gradient norm means divergence.

        With fp16 it does not: the scaler skips such steps.
        """
        return self.resolved.precision != "fp16"

    def owes(self, step: int) -> bool:
        """Return whether an evaluation is due after this step and not done yet.

        After the last step none is due: the stage Evaluating measures the version as it is published.
        """
        every = self.resolved.eval_steps
        if self.held_out is None or every is None or not 0 < step < self.resolved.max_steps:
            return False
        return step % every == 0 and not any("evalLoss" in event and event["step"] == step for event in self.events)

    def evaluations_after(self, step: int) -> int:
        """Return how many evaluations are due after later steps than `step`."""
        every = self.resolved.eval_steps
        if self.held_out is None or every is None:
            return 0
        return max(0, (self.resolved.max_steps - 1) // every - step // every)

    def eta_seconds(self, step: int) -> int | None:
        """Return the remaining seconds of training after this step, with the evaluation that is due after it."""
        evaluations = self.evaluations_after(step - 1)
        return self.pace.eta_seconds(self.resolved.max_steps, self.tokens_per_step, evaluations)

    def catch_up(self, model: Any, step: int) -> None:
        """Measure the held-out loss if it is due. If a rank is interrupted meanwhile, set `leaving`.

        Before the first evaluation, measure how long it will take.
        """
        if self.leaving:
            return
        try:
            if self.owes(step):
                self.measure(model, step)
            elif step and not self.pace.knows_evaluations and self.evaluations_after(step):
                self.time_some(model)
        except _BrokenOff:
            self.leaving = True

    def time_some(self, model: Any) -> None:
        """Measure the duration of an evaluation on a few held-out examples. Raises _BrokenOff as measure() does."""
        assert self.held_out is not None  # noqa: S101 - evaluations_after() has checked it
        examples = sorted(self.held_out.examples, key=lambda item: item.tokens)
        count = self.resolved.per_device_train_batch_size * distributed.world_size() * TIMED
        if len(examples) <= 2 * count:  # an evaluation takes hardly longer than a step
            return
        some = examples[:: len(examples) // count][:count]  # of every length
        begin = time.monotonic()
        self._loss(model, some)
        seconds = time.monotonic() - begin
        self.pace.pause(seconds)
        tokens = sum(item.tokens for item in examples)
        self.pace.expect(seconds * tokens / max(1, sum(item.tokens for item in some)))

    def measure(self, model: Any, step: int) -> None:
        """Measure and report the held-out loss. Raises _BrokenOff if a rank is interrupted."""
        assert self.held_out is not None  # noqa: S101 - owes() has checked it
        begin = time.monotonic()
        loss = self._loss(model, self.held_out.examples)
        self.pace.evaluated(time.monotonic() - begin)
        self._event(step=step, evalLoss=round(loss, 5))
        self.progress.update(eval_loss=round(loss, 5))
        if distributed.is_main():
            log.info("step %d/%d  held-out loss %.4f", step, self.resolved.max_steps, loss)

    def _loss(self, model: Any, examples: Sequence[Tokenised]) -> float:
        batch, pad = self.resolved.per_device_train_batch_size, self.collator.pad
        if distributed.joined():
            return shared_loss(model, examples, pad, batch, self._go_on)
        return mean_loss(model, examples, pad, batch, _Between(self._go_on))

    def parting(self) -> BaseException:
        """Return the exception with which this rank ends, if all ranks are `leaving`."""
        if self.interruption.wanted:
            return Interrupted()
        return Failure(
            Reason.PEER_LOST,
            "Another pod of the run was interrupted.",
            "No action is needed. The Job resumes from the checkpoint.",
        )

    def _go_on(self) -> None:
        """Raise _BrokenOff in all ranks if one rank is interrupted: an evaluation may take longer than the remaining
        time.
        """
        if distributed.total([self.interruption.wanted])[0]:
            raise _BrokenOff

    def _agree(self, step: int) -> bool:
        """Return whether all ranks write a checkpoint of this step.

        They do if a rank is interrupted, or if a checkpoint is due and no rank is still writing the previous one.
        """
        if self.resolved.save_steps is not None:
            self._due = self._due or step % self.resolved.save_steps == 0
        else:
            self._due = time.monotonic() - self._saved >= self.save_seconds
        read, self._read = self.collator.tokens - self._read, self.collator.tokens
        learned, self._learned = self._learned, 0
        wanted, due, late, tokens, covered = distributed.total(
            [self.interruption.wanted, self._due, self.writer.busy, read, learned]
        )
        self.tokens += tokens
        self.learned_tokens += covered
        self.leaving = wanted > 0
        return self.leaving or (due > 0 and late == 0)

    def _event(self, **record: Any) -> None:
        record = {"time": now()} | record
        self.events.append(record)
        self.progress.event(**record)

    def _count_time(self) -> None:
        self.seconds += time.monotonic() - self._since
        self._since = time.monotonic()


class _BrokenOff(Exception):
    """The measurement of the held-out loss was interrupted."""


class _Between:
    """Calls `check` after each batch."""

    def __init__(self, check: Callable[[], None]) -> None:
        self.check = check

    def step(self, count: int) -> None:
        self.check()

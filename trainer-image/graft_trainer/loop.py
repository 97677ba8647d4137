"""The training loop: transformers' Trainer with our progress, held-out loss and end of a run that diverged.

It knows nothing of methods: whatever of the model requires a gradient is trained.
"""

import logging
import math
import time
from collections.abc import Sequence
from typing import Any

from graft.contracts import Reason
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from graft_trainer.evaluate import mean_loss
from graft_trainer.failures import Failure
from graft_trainer.pace import Pace
from graft_trainer.progress import ProgressReporter
from graft_trainer.resolve import Device, Resolved
from graft_trainer.run import Run
from graft_trainer.tokens import Collator, Tokenisation

log = logging.getLogger(__name__)
TELL = 0.5  # seconds between updates of the progress in memory


def run_loop(
    run: Run,
    model: Any,
    examples: Sequence[Any],
    collator: Collator,
    resolved: Resolved,
    device: Device,
    held_out: Tokenisation | None,
) -> "Watch":
    """Train `model` in place; what was seen on the way."""
    watch = Watch(run.progress, resolved, collator, held_out)
    trainer = LeanTrainer(
        model=model,
        args=training_arguments(run, resolved, device),
        train_dataset=examples,
        data_collator=collator,
        callbacks=[watch],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return watch


def training_arguments(run: Run, resolved: Resolved, device: Device) -> TrainingArguments:
    """What transformers is told. Saving, logging and evaluation are ours: see Watch and publish."""
    arguments = TrainingArguments(
        output_dir=str(run.settings.work_dir / "trainer"),
        max_steps=resolved.max_steps,
        learning_rate=resolved.learning_rate,
        per_device_train_batch_size=resolved.per_device_train_batch_size,
        gradient_accumulation_steps=resolved.gradient_accumulation_steps,
        lr_scheduler_type=resolved.lr_scheduler_type,
        warmup_steps=resolved.warmup_steps,
        weight_decay=resolved.weight_decay,
        max_grad_norm=resolved.max_grad_norm,
        bf16=resolved.precision == "bf16",
        fp16=resolved.precision == "fp16",
        activation_checkpointing=resolved.gradient_checkpointing,
        activation_checkpointing_kwargs={"use_reentrant": False} if resolved.gradient_checkpointing else None,
        logging_steps=resolved.logging_steps,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        seed=resolved.seed,
        data_seed=resolved.seed,
        # On a CPU the fused step waits for all threads at each of the many small matrices.
        optim="adamw_torch_fused" if device.kind == "cuda" else "adamw_torch",
        use_cpu=device.kind == "cpu",
        save_strategy="no",
        eval_strategy="no",
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_num_workers=0,  # the examples are tokenised and in memory
        dataloader_pin_memory=device.kind == "cuda",
        average_tokens_across_devices=False,
        push_to_hub=False,
        log_level="error",
    )
    arguments._n_gpu = min(1, arguments.n_gpu)  # DataParallel would wrap the model as soon as there are two
    return arguments


class LeanTrainer(Trainer):  # type: ignore[misc]
    """Trainer without the count of floating-point operations, which walks all modules at every micro-batch."""

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        return 0


class Watch(TrainerCallback):  # type: ignore[misc]
    """What happens beside the steps: progress, the loss curve, held-out loss, and the end of a run that diverged."""

    def __init__(
        self, progress: ProgressReporter, resolved: Resolved, collator: Collator, held_out: Tokenisation | None
    ) -> None:
        self.progress = progress
        self.resolved = resolved
        self.collator = collator
        self.held_out = held_out
        self.curve: list[dict[str, float]] = []
        self.last_eval_loss: float | None = None  # None again as soon as a step follows
        self.pace = Pace()
        self.told = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.pace = Pace()
        self.pace.step(0, 0)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        step, total = state.global_step, self.resolved.max_steps
        self.last_eval_loss = None
        self.pace.step(step, self.collator.tokens)
        every = self.resolved.eval_steps
        if self.held_out is not None and every is not None and (step % every == 0 or step == total):
            self.measure(kwargs["model"], step)
        if time.monotonic() - self.told >= TELL or step == total:
            self.told = time.monotonic()
            left = total // every - step // every if every else 0
            self.progress.update(
                step=step,
                percent=100 * step // total,
                tokens_per_second=self.pace.tokens_per_second(),
                eta_seconds=self.pace.eta_seconds(total, left),
            )

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if not logs or "loss" not in logs:
            return
        step, loss, rate = state.global_step, float(logs["loss"]), float(logs.get("learning_rate", 0.0))
        if not math.isfinite(loss) or (not math.isfinite(float(logs.get("grad_norm", 0.0))) and self.precise()):
            raise Failure(
                Reason.CONFIGURATION_INVALID,
                f"training diverged: the loss is {loss} at step {step}",
                f"Lower training.learningRate (it was {self.resolved.learning_rate:g}), for example to "
                f"{self.resolved.learning_rate / 10:g}, or raise training.warmupRatio.",
            )
        record = {"step": step, "loss": round(loss, 5), "learningRate": rate}
        self.curve.append(record)
        self.progress.event(**record)
        self.progress.update(step=step, loss=round(loss, 5))
        speed, eta = self.pace.tokens_per_second(), self.pace.eta_seconds(self.resolved.max_steps)
        log.info(
            "step %d/%d  loss %.4f  lr %.2e%s%s",
            step,
            self.resolved.max_steps,
            loss,
            rate,
            f"  {speed:.0f} tokens/s" if speed else "",
            f"  {eta} s left" if eta is not None else "",
        )

    def precise(self) -> bool:
        """In fp16 the scaler skips steps whose gradients overflow; an infinite norm is no sign of divergence there."""
        return self.resolved.precision != "fp16"

    def measure(self, model: Any, step: int) -> None:
        assert self.held_out is not None  # noqa: S101 - on_step_end asked
        begin = time.monotonic()
        batch = self.resolved.per_device_train_batch_size
        loss = mean_loss(model, self.held_out.examples, self.collator.pad, batch)
        self.pace.pause(time.monotonic() - begin)
        self.last_eval_loss = loss
        self.progress.event(step=step, evalLoss=round(loss, 5))
        self.progress.update(eval_loss=round(loss, 5))
        log.info("step %d/%d  held-out loss %.4f", step, self.resolved.max_steps, loss)

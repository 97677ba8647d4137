"""transformers' Trainer with three parts replaced: the order of the examples, the division of the loss by tokens, and
how the state is saved and restored."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments

from graft_trainer.checkpoints.resume import Resume
from graft_trainer.checkpoints.state import (
    optimizer_state,
    random_state,
    restore_optimizer,
    restore_random,
    restore_weights,
    trained_weights,
    unwrapped,
)
from graft_trainer.checkpoints.store import CheckpointWriter
from graft_trainer.data.data_order import DataOrder, EpochLoader
from graft_trainer.data.tokens import IGNORED
from graft_trainer.loop.watch import Watch
from graft_trainer.model import sharding
from graft_trainer.model.sharding import share_table
from graft_trainer.processes import distributed
from graft_trainer.recipe.resolve import Device, Resolved

log = logging.getLogger(__name__)
OPTIMIZERS = {"adamw": "adamw_torch", "adamw8bit": "adamw_bnb_8bit", "adafactor": "adafactor"}
# By default, the library's polynomial schedule ends at 1e-7, and it rejects a lower learning rate.
SCHEDULER_ARGUMENTS = {"polynomial": {"lr_end": 0.0}}


def training_arguments(work_dir: Path, resolved: Resolved, device: Device) -> TrainingArguments:
    """Return the settings for transformers.

    Watch and CheckpointWriter do the logging, the evaluation and the saving.
    """
    optimizer = OPTIMIZERS[resolved.optim]
    if optimizer == "adamw_torch" and device.kind == "cuda":
        # Not on a CPU: there it waits for all threads at each of the many small matrices.
        optimizer = "adamw_torch_fused"
    sharded = {"fsdp": True, "fsdp_config": {"version": 2, "reshard_after_forward": True}}
    arguments = TrainingArguments(
        output_dir=str(work_dir / "trainer"),
        max_steps=resolved.max_steps,
        learning_rate=resolved.learning_rate,
        per_device_train_batch_size=resolved.per_device_train_batch_size,
        gradient_accumulation_steps=resolved.gradient_accumulation_steps,
        lr_scheduler_type=resolved.lr_scheduler_type,
        lr_scheduler_kwargs=SCHEDULER_ARGUMENTS.get(resolved.lr_scheduler_type),
        warmup_steps=resolved.warmup_steps,
        weight_decay=resolved.weight_decay,
        adam_beta1=resolved.adam_beta1,
        adam_beta2=resolved.adam_beta2,
        adam_epsilon=resolved.adam_epsilon,
        max_grad_norm=resolved.max_grad_norm,
        bf16=resolved.precision == "bf16",
        fp16=resolved.precision == "fp16",
        # For fsdp the library recommends its own activation checkpointing. That one draws other dropout masks when it
        # recomputes a block, so its gradients are wrong. With FSDP2, this setting does not gather weights more often.
        activation_checkpointing=resolved.gradient_checkpointing,
        activation_checkpointing_kwargs={"use_reentrant": False} if resolved.gradient_checkpointing else None,
        logging_steps=resolved.logging_steps,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        seed=resolved.seed,
        data_seed=resolved.seed,
        optim=optimizer,
        use_liger_kernel=resolved.use_liger_kernel,
        use_cpu=device.kind == "cpu",
        save_strategy="no",
        eval_strategy="no",
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_num_workers=0,  # the examples are already tokenised and in memory
        dataloader_pin_memory=device.kind == "cuda",
        average_tokens_across_devices=distributed.joined(),
        ddp_find_unused_parameters=False,
        ddp_broadcast_buffers=False,
        push_to_hub=False,
        log_level="error",
        **(sharded if resolved.sharding == "fsdp" else {}),
    )
    # With two or more GPUs, the Trainer would wrap the model in DataParallel.
    arguments._n_gpu = min(1, arguments.n_gpu)
    return arguments


class RoomForCheckpoints(TrainerCallback):  # type: ignore[misc]
    """Starts to allocate memory for the first checkpoint as soon as the optimizer has a state.

    That is after the first step, or with fp16 after the first step whose gradients did not overflow.
    """

    def __init__(self, reserve: Callable[[], None]) -> None:
        self.reserve = reserve
        self.reserved = False

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.reserved and unwrapped(kwargs["optimizer"]).state:
            self.reserved = True
            self.reserve()


class LeanTrainer(Trainer):  # type: ignore[misc]
    """The Trainer of one run. Call begin() before train()."""

    model_accepts_loss_kwargs: bool
    _loss_shifts_labels: bool
    is_fsdp_enabled: bool

    def begin(self, watch: Watch, writer: CheckpointWriter, resume: Resume | None) -> None:
        """Prepare to train from `resume`, or from the first step if it is None."""
        self.watch = watch
        self.writer = writer
        self.resumed = resume
        self.add_callback(RoomForCheckpoints(lambda: writer.reserve(self._state_of_training())))
        # Only the library's loss for causal models divides by the given number of tokens. Other losses, such as T5's,
        # are means over a micro-batch: their forward() accepts the number but ignores it.
        self.divides = bool(self.model_accepts_loss_kwargs and self._loss_shifts_labels)
        self.model_accepts_loss_kwargs = True
        self._loss_shifts_labels = not getattr(self.model.config, "is_encoder_decoder", False)
        if self.is_fsdp_enabled:
            share_table(self.model)

    def create_accelerator_and_postprocess(self) -> None:
        """Enable sharding on CPUs, too. accelerate enables it only on GPUs, although FSDP2 does not need one."""
        super().create_accelerator_and_postprocess()
        if self.args.fsdp_plugin_args is None or self.is_fsdp_enabled:
            return
        plugin = FullyShardedDataParallelPlugin(**self.args.fsdp_plugin_args)
        if self.args.mixed_precision != "no":
            plugin.set_mixed_precision(self.args.mixed_precision)
        state = self.accelerator.state
        state.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        state.fsdp_plugin = plugin
        self.is_fsdp_enabled = True

    def resume_folder(self, resume: Resume) -> Path:
        """Write the folder that the library expects of a checkpoint, which contains only the step, and restore the
        watch."""
        folder = Path(self.args.output_dir) / f"resume-{distributed.rank()}"
        folder.mkdir(parents=True, exist_ok=True)
        state = TrainerState(
            global_step=resume.step,
            epoch=resume.state["loop"]["epoch"],
            train_batch_size=self.args.per_device_train_batch_size,
        )
        state.compute_steps(self.args, self.args.max_steps)
        state.save_to_json(str(folder / "trainer_state.json"))
        self.watch.restore(resume.state["watch"], resume.step)
        return folder

    def get_train_dataloader(self) -> EpochLoader:
        order = DataOrder(
            len(self.train_dataset),
            self.args.per_device_train_batch_size,
            self.args.gradient_accumulation_steps,
            self.args.data_seed,
            distributed.rank(),
            distributed.world_size(),
        )
        return EpochLoader(self.train_dataset, order, self.data_collator, pin=self.args.dataloader_pin_memory)

    def get_batch_samples(self, *arguments: Any, **named: Any) -> Any:
        """Return the micro-batches of the next step, and count the tokens that the loss covers in them."""
        batches, items = super().get_batch_samples(*arguments, **named)
        for batch in batches:
            labels = batch["labels"][:, 1:] if self._loss_shifts_labels else batch["labels"]
            self.watch.count_learned(int(labels.ne(IGNORED).sum()))
        return batches, items

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the loss of a micro-batch: the sum over its trained tokens, divided by the trained tokens of the whole
        step.

        So the gradients do not depend on how a step is divided into micro-batches and ranks.
        """
        if self.divides:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        outputs = model(**inputs)
        labels = inputs["labels"][:, 1:] if self._loss_shifts_labels else inputs["labels"]
        learned = labels.ne(IGNORED).sum()
        # Without any trained token, the mean would be NaN.
        loss = outputs.loss * learned if int(learned) else outputs.logits.sum() * 0.0
        loss = loss / num_items_in_batch * (self.accelerator.num_processes if distributed.joined() else 1)
        return (loss, outputs) if return_outputs else loss

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Return 0: counting would visit all modules at every micro-batch."""
        return 0

    def _state_of_training(self) -> dict[str, Any]:
        """Return everything that an attempt needs to resume from here."""
        scaler = getattr(self.accelerator, "scaler", None)
        # Without sharding all ranks hold the same weights, so only rank 0's part contains them.
        whole = distributed.is_main() or self.is_fsdp_enabled
        return {
            "weights": trained_weights(self.model) if whole else None,
            "optimizer": optimizer_state(self.optimizer) if whole else None,
            "scheduler": self.lr_scheduler.state_dict(),
            "scaler": scaler.state_dict() if scaler is not None else None,
            "random": random_state(),
            "loop": {
                "epoch": self.state.epoch,
                "loss": self._tr_loss.item(),  # of the steps since the last record
                "logged": self._globalstep_last_logged,
            },
            "watch": self.watch.state(),
        }

    def _maybe_log_save_evaluate(
        self, tr_loss: Any, grad_norm: Any, model: Any, trial: Any, *rest: Any, **named: Any
    ) -> None:
        """Take the step's checkpoint before its evaluation. After an interruption, take one before this rank ends."""
        taken = self.control.should_save
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, model, trial, *rest, **named)
        self.watch.catch_up(self.model, self.state.global_step)
        # After the last step, train_on writes the final checkpoint instead.
        if self.watch.leaving and self.state.global_step < self.args.max_steps:
            if not taken:
                self._save_checkpoint(model, trial)
            self.writer.wait()
            raise self.watch.parting()

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        stall = self.writer.take(self._state_of_training(), self.state.global_step)
        self.watch.saved()
        log.info("step %d: checkpoint taken in %.2f s", self.state.global_step, stall)

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None) -> Any:
        if not self.is_fsdp_enabled:
            return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        # Only rank 0 has loaded the weights: see load_base_model.
        whole = {name: parameter.detach() for name, parameter in self.model.named_parameters()}
        prepared = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        sharding.deal(self.model, whole if distributed.is_main() else None)
        if resume_from_checkpoint is not None:
            restore_weights(self.model, self._resumed().state.pop("weights"))
        return prepared

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if not self.is_fsdp_enabled:
            restore_weights(self.model, self._resumed().state.pop("weights"))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        restore_optimizer(self.optimizer, self._resumed().state.pop("optimizer"))
        self.lr_scheduler.load_state_dict(self._resumed().state["scheduler"])

    def _load_scaler(self, checkpoint: str | None) -> None:
        if checkpoint is not None and (saved := self._resumed().state["scaler"]) is not None:
            self.accelerator.scaler.load_state_dict(saved)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Restore the loss sum and the random generators.

        The library calls this last, just before the first micro-batch.
        """
        if checkpoint is None:
            return
        loop = self._resumed().state["loop"]
        self._tr_loss = torch.tensor(loop["loss"], device=self.args.device)
        self._globalstep_last_logged = loop["logged"]
        restore_random(self._resumed().state["random"])

    def _resumed(self) -> Resume:
        if self.resumed is None:
            raise RuntimeError("there is no checkpoint to resume from")
        return self.resumed

"""`ScheduledTrainer`: transformers' Trainer under a `ReportSchedule`.

Trainer counts micro-batches in units of one fixed `gradient_accumulation_steps`: when to step, where an epoch ends and
what a resumed run skips would all be wrong if a callback changed it on the way. So here a batch of the loader is a
whole optimizer step, of whatever size the schedule wants, and `training_step` runs it in pieces.
"""

import contextlib
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset
from transformers import Trainer
from transformers.trainer_callback import TrainerCallback

from .schedules import ReportSchedule, StepBatches, split_step
from .stream import StepStream


class ScheduleCallback(TrainerCallback):
    """Sets the model's `mtp_loss_weight` and `router_bias_update_rate` for each step, and both back at the end.

    `RouterBalanceCallback()` without a rate of its own follows the second. Works in any Trainer.
    """

    def __init__(self, schedule: ReportSchedule) -> None:
        self.schedule = schedule
        self._before: tuple[float, float] | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self._before = model.config.mtp_loss_weight, model.config.router_bias_update_rate

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        model.config.mtp_loss_weight = self.schedule.mtp_loss_weight(state.global_step)
        model.config.router_bias_update_rate = self.schedule.bias_update_rate(state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if self._before is not None:
            model.config.mtp_loss_weight, model.config.router_bias_update_rate = self._before


class ScheduledTrainer(Trainer):
    """Trainer whose learning rate, gamma, lambda and batch size follow a `ReportSchedule`.

    With a batch ramp `per_device_train_batch_size` is the number of sequences in a forward, and
    `gradient_accumulation_steps` stays 1: each step accumulates as many forwards as its size takes. Data with a
    length is shuffled by `args.seed`; data without (an IterableDataset) comes in its own order, pass after pass, and
    each process reads all of it. Checkpoints, resuming and the loss's division by the step's tokens are Trainer's own.

    Args:
        schedule: its `steps` are `args.max_steps`.
        arguments: as of `transformers.Trainer`.

    Raises:
        ValueError: the schedule is of another number of steps; a batch ramp together with gradient accumulation.
    """

    def __init__(self, *arguments: Any, schedule: ReportSchedule, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.schedule = schedule
        if schedule.steps != self.args.max_steps:
            raise ValueError(
                f"the schedule has {schedule.steps} steps and max_steps is {self.args.max_steps}; set the two equal"
            )
        if schedule.sizes is not None and self.args.gradient_accumulation_steps != 1:
            raise ValueError("a batch ramp accumulates by itself; set gradient_accumulation_steps=1")
        # In front of the others, so that they see the step's values.
        self.callback_handler.callbacks.insert(0, ScheduleCallback(schedule))

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        if self.lr_scheduler is None:
            chosen: Any = self.optimizer if optimizer is None else optimizer
            self.lr_scheduler = self.schedule.lr_scheduler(chosen)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def get_train_dataloader(self) -> DataLoader:
        if self.schedule.sizes is None:
            return super().get_train_dataloader()
        dataset: Any = self.train_dataset
        ranks, rank = self.args.world_size, self.args.process_index
        if isinstance(dataset, IterableDataset):
            return DataLoader(
                StepStream(dataset, self.schedule.sizes, rank, ranks),
                batch_size=None,
                collate_fn=self._get_collator_with_removed_columns(self.data_collator, description="Training"),
                num_workers=min(1, self.args.dataloader_num_workers),  # a second one would read the same
                pin_memory=self.args.dataloader_pin_memory,
            )
        dataset = self._remove_unused_columns(dataset, description="Training")
        # Each rank draws its own part: accelerate's sharding takes batches of one size.
        return DataLoader(
            dataset,
            batch_sampler=StepBatches(len(dataset), self.schedule.sizes, self.args.seed, rank, ranks),
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
        )

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        if self.schedule.sizes is None:
            return super().training_step(model, inputs, num_items_in_batch)
        pieces = split_step(dict(inputs), self.args.per_device_train_batch_size)
        self.current_gradient_accumulation_steps = len(pieces)
        losses = []
        for index, piece in enumerate(pieces):
            last = index == len(pieces) - 1
            with contextlib.nullcontext() if last else self.accelerator.no_sync(model=model):
                losses.append(super().training_step(model, piece, num_items_in_batch))
        return torch.stack(losses).sum()

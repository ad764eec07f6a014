"""The Trainers of the train command: measurements on held-out text, and exact logs and streams after a kill."""

from typing import Any

from transformers import Trainer
from transformers.trainer_callback import TrainerCallback

from .evaluation import held_out_measures
from .scheduled_trainer import ScheduledTrainer


class CheckpointLogCallback(TrainerCallback):
    """Logs at every checkpoint and at the last step.

    Trainer forgets the losses since the last log when it resumes; so a checkpoint leaves none behind, and a resumed
    run logs what the uninterrupted one logs.
    """

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if control.should_save or state.global_step >= state.max_steps:
            control.should_log = True


class _Measured(Trainer):
    """Trainer with `held_out_measures` for an evaluation.

    Args:
        held_out: the texts of `eval_dataset`, which holds their blocks.
        arguments: as of `transformers.Trainer`, `processing_class` being the tokenizer.
    """

    def __init__(self, *arguments: Any, held_out: list[str], **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.held_out = held_out
        self._random_state_of: str | None = None

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Measure, log as eval_*, tell the callbacks."""
        blocks: Any = self.eval_dataset if eval_dataset is None else eval_dataset
        measures = held_out_measures(self.model, self.processing_class, self.held_out, blocks)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in measures.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    # A stream skips nothing, and then Trainer restores the random state before the loader draws its seed from it; here
    # it is restored once more after that, as Trainer itself does where it skips.
    def _load_rng_state(self, checkpoint: str | None) -> None:
        super()._load_rng_state(checkpoint)
        self._random_state_of = checkpoint if self.args.ignore_data_skip else None

    def get_batch_samples(self, *arguments: Any, **named: Any) -> Any:
        samples = super().get_batch_samples(*arguments, **named)
        if self._random_state_of is not None:
            super()._load_rng_state(self._random_state_of)
            self._random_state_of = None
        return samples


class RunTrainer(_Measured):
    """With Trainer's own schedules."""


class ScheduledRunTrainer(_Measured, ScheduledTrainer):
    """With a `ReportSchedule`."""

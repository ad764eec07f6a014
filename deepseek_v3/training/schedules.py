"""The report's schedules: learning rate, bias update rate, MTP weight and batch size over a run of any length.

Breakpoints are shares of the run's tokens, taken from the published counts (report, section 4.2). Everything is a
function of the optimizer step alone, so that a resumed run goes on exactly.
"""

import math
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR

REPORT_TOKENS = 14.8e12
REPORT_SEQUENCE = 4096
# Tokens seen when a phase ends, over all tokens.
_PEAK_ENDS = 10.0e12 / REPORT_TOKENS
_COSINE_ENDS = 14.3e12 / REPORT_TOKENS
_LOW_ENDS = 14.633e12 / REPORT_TOKENS
# Of the peak learning rate, 2.2e-4.
_LOW = 2.2e-5 / 2.2e-4
_LOWEST = 7.3e-6 / 2.2e-4
# 2,000 of the optimizer steps that 14.8T tokens make with the report's batch sizes.
_WARMUP_SHARE = 2000 / 242_783


@dataclass(frozen=True)
class BatchRamp:
    """Sequences in each optimizer step: from `first` to `last`, linear in the sequences seen so far, then constant.

    Attributes:
        first, last: sequences in the first step and after the ramp.
        sequences: how many the ramp takes. The report's ramp is `BatchRamp(3072, 15360, 114_501_953)`: 469B tokens.
        multiple_of: each step's number is a multiple of it; ranks times sequences in a forward.

    Raises:
        ValueError: a number is not positive, or the ramp falls.
    """

    first: int
    last: int
    sequences: int
    multiple_of: int = 1

    def __post_init__(self) -> None:
        for name in ("first", "last", "sequences", "multiple_of"):
            if getattr(self, name) < 1:
                raise ValueError(f"BatchRamp: {name} = {getattr(self, name)} must be at least 1")
        if self.first > self.last:
            raise ValueError(f"BatchRamp: first = {self.first} exceeds last = {self.last}; a ramp rises")

    def sizes(self, steps: int) -> list[int]:
        """Sequences in each of `steps` optimizer steps."""
        sizes, seen = [], 0
        for _ in range(steps):
            size = self.first + (self.last - self.first) * min(1.0, seen / self.sequences)
            sizes.append(max(1, round(size / self.multiple_of)) * self.multiple_of)
            seen += sizes[-1]
        return sizes


@dataclass(frozen=True)
class ReportSchedule:
    """A run of `steps` optimizer steps divided as the report divided its 14.8T tokens.

    The learning rate rises linearly over `warmup_steps`, stays at its peak until 10T of 14.8T, falls by a cosine to a
    tenth until 14.3T, stays there for 333B and ends with 167B at a thirtieth.

    Attributes:
        steps: optimizer steps of the whole run.
        warmup_steps: of the learning rate; None takes the report's share, 2,000 of 242,783.
        batch_ramp: sequences a step; None is the same number in every step.
        bias_update_rates: gamma before and after 14.3T of 14.8T.
        mtp_loss_weights: lambda before and after 10T of 14.8T.

    Raises:
        ValueError: there is no step, or the warm-up is negative.
    """

    steps: int
    warmup_steps: int | None = None
    batch_ramp: BatchRamp | None = None
    bias_update_rates: tuple[float, float] = (0.001, 0.0)
    mtp_loss_weights: tuple[float, float] = (0.3, 0.1)
    sizes: list[int] | None = field(init=False, repr=False, default=None)
    _seen: list[int] | None = field(init=False, repr=False, default=None)

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"ReportSchedule: steps = {self.steps} must be at least 1")
        if self.warmup_steps is not None and self.warmup_steps < 0:
            raise ValueError(f"ReportSchedule: warmup_steps = {self.warmup_steps} must not be negative")
        if self.batch_ramp is not None:
            object.__setattr__(self, "sizes", self.batch_ramp.sizes(self.steps))
            object.__setattr__(self, "_seen", [0, *accumulate(self.sizes)])  # type: ignore[arg-type]

    def share(self, step: int) -> float:
        """Share of the run's tokens seen before optimizer step `step`, counted from 0."""
        if self._seen is None:
            return min(step / self.steps, 1.0)
        return self._seen[min(step, self.steps)] / self._seen[-1]

    def learning_rate_factor(self, step: int) -> float:
        """What the peak learning rate is multiplied by in optimizer step `step`, counted from 0."""
        warmup = max(1, round(self.steps * _WARMUP_SHARE)) if self.warmup_steps is None else self.warmup_steps
        if step < warmup:
            return step / warmup
        share = self.share(step)
        if share < _PEAK_ENDS:
            return 1.0
        if share < _COSINE_ENDS:
            through = (share - _PEAK_ENDS) / (_COSINE_ENDS - _PEAK_ENDS)
            return _LOW + (1 - _LOW) * 0.5 * (1 + math.cos(math.pi * through))
        return _LOW if share < _LOW_ENDS else _LOWEST

    def bias_update_rate(self, step: int) -> float:
        """Gamma in optimizer step `step`, counted from 0."""
        return self.bias_update_rates[bisect_right([_COSINE_ENDS], self.share(step))]

    def mtp_loss_weight(self, step: int) -> float:
        """Lambda in optimizer step `step`, counted from 0."""
        return self.mtp_loss_weights[bisect_right([_PEAK_ENDS], self.share(step))]

    def lr_scheduler(self, optimizer: torch.optim.Optimizer) -> LambdaLR:
        """The learning rate as a plain scheduler: for loops of one's own and for `Trainer(optimizers=(opt, this))`."""
        return LambdaLR(optimizer, self.learning_rate_factor)


class StepBatches(torch.utils.data.Sampler[list[int]]):
    """One list of rows for each optimizer step: as many as the step takes on this rank, in a shuffled order.

    An epoch is the whole run. Passes over the data follow one another, each with its own permutation.

    Args:
        rows: rows of the data set.
        sizes: sequences in each step, over all ranks.
        seed: of the permutations.
        rank, ranks: this process and how many there are; each size is divisible by `ranks`.
    """

    def __init__(self, rows: int, sizes: list[int], seed: int, rank: int = 0, ranks: int = 1) -> None:
        uneven = next((size for size in sizes if size % ranks), None)
        if uneven is not None:
            raise ValueError(
                f"a step of {uneven} sequences is not divisible by {ranks} processes; "
                f"set BatchRamp(multiple_of={ranks}) or a multiple of it"
            )
        self.rows, self.sizes, self.seed, self.rank, self.ranks = rows, sizes, seed, rank, ranks

    def __len__(self) -> int:
        return len(self.sizes)

    def __iter__(self) -> Iterator[list[int]]:
        order = self._order()
        for size in self.sizes:
            step = [next(order) for _ in range(size)]
            yield step[self.rank :: self.ranks]

    def _order(self) -> Iterator[int]:
        passes = 0
        while True:
            generator = torch.Generator().manual_seed(self.seed + passes)
            yield from torch.randperm(self.rows, generator=generator).tolist()
            passes += 1


def split_step(inputs: dict[str, Any], rows: int) -> list[dict[str, Any]]:
    """A step's inputs, all of them tensors [B, ...], in pieces of at most `rows` rows."""
    total = next(iter(inputs.values())).shape[0]
    return [{name: value[at : at + rows] for name, value in inputs.items()} for at in range(0, total, rows)]

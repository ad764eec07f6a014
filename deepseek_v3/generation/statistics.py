"""What speculative decoding did, and which depth it should draft to."""

from collections import deque
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

from transformers.generation.utils import GenerateDecoderOnlyOutput
from transformers.utils import logging

logger = logging.get_logger(__name__)

_MANY_DRAFTS = 64  # drafts of depth 1 after which not one accepted cannot be chance


@dataclass
class MtpStatistics:
    """Counts of one `generate(use_mtp=True)` call.

    Attributes:
        steps: forwards of the main model after the prompt's.
        row_steps: the same, times the rows that were unfinished in each.
        tokens: tokens that these forwards gave, over all rows.
        drafted, accepted: drafts by depth (index 0 is depth 1) that were verified, and that were right.
        depth: drafts a step; with `num_assistant_tokens="auto"` the best one so far.
    """

    steps: int = 0
    row_steps: int = 0
    tokens: int = 0
    drafted: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)
    depth: int = 0

    @property
    def tokens_per_step(self) -> float:
        """Tokens of a row for each forward of the main model; 1 in plain decoding."""
        return self.tokens / self.row_steps if self.row_steps else 0.0

    @property
    def acceptance(self) -> list[float]:
        """Accepted over drafted, by depth; a depth counts as drafted where all shallower ones were accepted."""
        return [right / tried if tried else 0.0 for right, tried in zip(self.accepted, self.drafted, strict=True)]

    def count(self, accepted: list[int], kept: list[int], drafts: int) -> None:
        """Take one step: drafts accepted by each unfinished row, tokens that each kept, drafts that each was given."""
        self.steps += 1
        self.row_steps += len(kept)
        self.tokens += sum(kept)
        missing = drafts - len(self.drafted)
        self.drafted.extend([0] * missing)
        self.accepted.extend([0] * missing)
        for right in accepted:
            for depth in range(min(right + 1, drafts)):
                self.drafted[depth] += 1
                self.accepted[depth] += depth < right

    def warn_if_useless(self) -> None:
        """Say it loudly where not one of many drafts was accepted: nobody sees it in the tokens."""
        if self.drafted and self.drafted[0] >= _MANY_DRAFTS and self.accepted[0] == 0:
            logger.warning(
                f"MTP: none of {self.drafted[0]} drafts was accepted. The output is right, but drafting only costs. "
                "The MTP weights do not belong to this model: they were not in the checkpoint, came without their "
                "FP8 scales, or were not trained along with it. Load a checkpoint that holds them, or train them."
            )


@dataclass
class GenerateMtpOutput(GenerateDecoderOnlyOutput):
    """`GenerateDecoderOnlyOutput` and `mtp`, a `MtpStatistics`."""

    mtp: MtpStatistics | None = None


class FixedDepth:
    """Drafts `depth` tokens in every step."""

    idle = 0

    def __init__(self, depth: int) -> None:
        self.deepest = depth

    def begin(self, statistics: MtpStatistics) -> None:
        """A call starts, whose counts `statistics` will hold."""
        statistics.depth = self.deepest

    def next(self) -> int:
        """Drafts of the next step."""
        return self.deepest

    def took(self, drafts: int, seconds: float) -> None:
        """A step with `drafts` drafts took `seconds`."""


class AutoDepth:
    """Climbs to the depth that gives most tokens a second, and goes on from there in the next call.

    One draft, none (plain decoding) and two are tried for a few steps each, then what lies beside the best one so far.
    The best stays for `patience` steps, after which its neighbours and plain decoding are tried again: acceptance and
    costs change as the text does, and as rows end. The tokens of a step come from the acceptance by depth, this call's
    and, as `memory` drafts at most, that of calls before it; its cost from the fastest of its latest trials.
    """

    idle = 32  # tokens a row that the modules may fall behind while nothing is drafted

    def __init__(self, deepest: int = 4, trials: int = 4, patience: int = 64, memory: int = 128) -> None:
        self.deepest, self.trials, self.patience, self.memory = deepest, trials, patience, memory
        self.chosen: int | None = None
        self._tried = min(1, deepest)
        self._left = 2 * trials  # whether drafts are accepted at all takes more of them to see
        self._seconds: dict[int, deque[float]] = {}
        self._call = MtpStatistics()
        self._drafted, self._accepted = [0.0] * deepest, [0.0] * deepest  # of the calls before

    def begin(self, statistics: MtpStatistics) -> None:
        """A new call starts, whose counts `statistics` will hold."""
        drafted, accepted = self._counts()
        scale = min(1.0, self.memory / max(drafted[0], 1.0)) if drafted else 1.0
        self._drafted, self._accepted = [n * scale for n in drafted], [n * scale for n in accepted]
        self._call = statistics
        statistics.depth = self._tried if self.chosen is None else self.chosen

    def next(self) -> int:
        return self._tried

    def took(self, drafts: int, seconds: float) -> None:
        # The first steps of a depth pay for what is made once: compilation, allocation, the capture of a graph.
        self._seconds.setdefault(drafts, deque(maxlen=self.trials)).append(seconds)
        self._left -= 1
        if self._left:
            return
        if self._tried == self.chosen:
            for other in {0, self.chosen - 1, self.chosen + 1} - {self.chosen}:
                self._seconds.pop(other, None)
        best = self._call.depth = self._best()
        # Drafting at all has a price of its own, so that between plain decoding and two drafts one may be the worst.
        wanted = (0, 2, best + 1, best - 1) if self.chosen is None else (0, best + 1, best - 1)
        new = [depth for depth in wanted if 0 <= depth <= self.deepest and depth not in self._seconds]
        if new:
            self._tried, self._left = new[0], self.trials
        else:
            self.chosen = self._tried = best
            self._left = self.patience

    def _counts(self) -> tuple[list[float], list[float]]:
        """Drafted and accepted by depth, of this call and of what is remembered."""
        call = self._call
        missing = [0] * self.deepest
        drafted = [old + new for old, new in zip(self._drafted, call.drafted + missing, strict=False)]
        accepted = [old + new for old, new in zip(self._accepted, call.accepted + missing, strict=False)]
        return drafted, accepted

    def _best(self) -> int:
        drafted, accepted = self._counts()
        rates: dict[int, float] = {}
        expected, chain = 1.0, 1.0
        for depth in range(self.deepest + 1):
            if depth:
                chain *= accepted[depth - 1] / drafted[depth - 1] if drafted[depth - 1] else 0.0
                expected += chain
            if depth in self._seconds:
                rates[depth] = expected / min(self._seconds[depth])
        best = max(rates, key=lambda depth: rates[depth])
        shown = ", ".join(f"{depth}: {rate:.1f}" for depth, rate in sorted(rates.items()))
        logger.info(f"MTP: {best} drafts a step give most tokens a second a row ({shown})")
        return best


# By model and by the number of rows, to a power of two: what a step costs hangs on both.
_LEARNT: WeakKeyDictionary[Any, dict[int, AutoDepth]] = WeakKeyDictionary()


def make_depth(asked: Any, model: Any, batch: int) -> FixedDepth | AutoDepth:
    """The policy behind `num_assistant_tokens`: an integer from 1, "auto", or None for one draft a module.

    "auto" goes on with what earlier calls of `model` over about as many rows have measured.

    Raises:
        ValueError: anything else.
    """
    if asked == "auto":
        return _LEARNT.setdefault(model, {}).setdefault((batch - 1).bit_length(), AutoDepth())
    if asked is None:
        return FixedDepth(model.config.num_nextn_predict_layers)
    if isinstance(asked, bool) or not isinstance(asked, int) or asked < 1:
        raise ValueError(f"num_assistant_tokens = {asked!r}: give a number of drafts from 1, or 'auto'")
    return FixedDepth(asked)

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

    def saw(self, rows: list[int], accepted: list[int], drafts: int) -> None:
        """A step gave each of the unfinished `rows` so many `drafts`, and so many were `accepted`."""

    def next(self) -> int:
        """Drafts of the next step."""
        return self.deepest

    def took(self, drafts: int, seconds: float) -> None:
        """A step with `drafts` drafts took `seconds`."""


class AutoDepth:
    """Climbs to the depth that ends a call soonest, and goes on from there in the next call.

    One draft, none (plain decoding) and two are tried for a few steps each, then what lies beside the best one so far.
    The best stays for `patience` steps, after which its neighbours and plain decoding are tried again: acceptance and
    costs change as the text does, and as rows end. Where drafting has not paid, it is tried ever less often.

    A step's cost is the fastest of its latest trials. Its tokens come from the acceptance by depth, this call's and
    that of calls before it (as `memory` drafts at most). A call lasts as long as its slowest row, so that row's tokens
    count: by what it has accepted, and by `prior` drafts accepted as all rows' are.

    Args:
        deepest: drafts a step at most.
        rows: rows of a call, about.
    """

    def __init__(
        self, deepest: int = 4, trials: int = 4, patience: int = 64, memory: int = 128, prior: int = 16, rows: int = 1
    ) -> None:
        self.deepest, self.trials, self.patience, self.memory, self.prior = deepest, trials, patience, memory, prior
        # Tokens a row that the modules may fall behind while nothing is drafted: their states are kept until then.
        self.idle = max(32, min(256, 8192 // rows))
        self.chosen: int | None = None
        self._tried = min(1, deepest)
        self._left = 2 * trials  # whether drafts are accepted at all takes more of them to see
        self._wait = patience
        self._seconds: dict[int, deque[float]] = {}
        self._call = MtpStatistics()
        self._drafted, self._accepted = [0.0] * deepest, [0.0] * deepest  # of the calls before
        self._rows: dict[int, MtpStatistics] = {}
        self._unfinished: list[int] = []

    def begin(self, statistics: MtpStatistics) -> None:
        """A new call starts, whose counts `statistics` will hold."""
        drafted, accepted = self._counts()
        scale = min(1.0, self.memory / max(drafted[0], 1.0)) if drafted else 1.0
        self._drafted, self._accepted = [n * scale for n in drafted], [n * scale for n in accepted]
        self._call, self._rows, self._unfinished = statistics, {}, []
        statistics.depth = self._tried if self.chosen is None else self.chosen

    def next(self) -> int:
        return self._tried

    def saw(self, rows: list[int], accepted: list[int], drafts: int) -> None:
        self._unfinished = rows
        if drafts:
            for row, right in zip(rows, accepted, strict=True):
                self._rows.setdefault(row, MtpStatistics()).count([right], [], drafts)

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
            self._wait = min(2 * self._wait, 8 * self.patience) if best == self.chosen == 0 else self.patience
            self.chosen = self._tried = best
            self._left = self._wait

    def _counts(self) -> tuple[list[float], list[float]]:
        """Drafted and accepted by depth, of this call and of what is remembered."""
        drafted, accepted = _padded(self._call, self.deepest)
        return (
            [old + new for old, new in zip(self._drafted, drafted, strict=True)],
            [old + new for old, new in zip(self._accepted, accepted, strict=True)],
        )

    def _expected(self) -> list[float]:
        """Tokens that a step with 0 .. deepest drafts gives the row that it gives the fewest."""
        usual = [right / tried if tried else 0.0 for tried, right in zip(*self._counts(), strict=True)]
        fewest: list[float] = []
        nothing = MtpStatistics()
        for row in [self._rows.get(index, nothing) for index in self._unfinished] or [nothing]:
            expected, chain = [1.0], 1.0
            for tried, right, rate in zip(*_padded(row, self.deepest), usual, strict=True):
                chain *= (right + self.prior * rate) / (tried + self.prior)
                expected.append(expected[-1] + chain)
            fewest = [min(pair) for pair in zip(fewest or expected, expected, strict=True)]
        return fewest

    def _best(self) -> int:
        expected = self._expected()
        rates = {depth: expected[depth] / min(seconds) for depth, seconds in self._seconds.items()}
        best = max(rates, key=lambda depth: rates[depth])
        shown = ", ".join(f"{depth}: {rate:.1f}" for depth, rate in sorted(rates.items()))
        logger.info(f"MTP: {best} drafts a step give the slowest row most tokens a second ({shown})")
        return best


def _padded(statistics: MtpStatistics, depths: int) -> tuple[list[int], list[int]]:
    """Drafted and accepted by depth, of the first `depths`."""
    missing = [0] * depths
    return (statistics.drafted + missing)[:depths], (statistics.accepted + missing)[:depths]


# By model and by the number of rows, to a power of two: what a step costs hangs on both.
_LEARNT: WeakKeyDictionary[Any, dict[int, AutoDepth]] = WeakKeyDictionary()


def make_depth(asked: Any, model: Any, batch: int) -> FixedDepth | AutoDepth:
    """The policy behind `num_assistant_tokens`: an integer from 1, "auto", or None for one draft a module.

    "auto" goes on with what earlier calls of `model` over about as many rows have measured.

    Raises:
        ValueError: anything else.
    """
    if asked == "auto":
        return _LEARNT.setdefault(model, {}).setdefault((batch - 1).bit_length(), AutoDepth(rows=batch))
    if asked is None:
        return FixedDepth(model.config.num_nextn_predict_layers)
    if isinstance(asked, bool) or not isinstance(asked, int) or asked < 1:
        raise ValueError(f"num_assistant_tokens = {asked!r}: give a number of drafts from 1, or 'auto'")
    return FixedDepth(asked)

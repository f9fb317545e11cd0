"""All layouts of a number of GPUs side by side: what each needs, how fast it is, which is best, what is refused."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from parallel.layout import Layout

from ..models.spec import ModelSpec
from .cost import CostModel, Time
from .footprint import CHECKPOINT_SHARE, Footprint, Storage
from .hardware import Hardware

MAX_BATCH = 1 << 16
MOST = 1 << 40  # sequences: where the search for how many fit ends
LONGEST = 1 << 24  # tokens: where the search for a crossover ends
STEP_ROWS = 64  # decode rows beside a chunk: scheduler.max_batch


@dataclass(frozen=True)
class Refusal:
    """A layout that cannot be, and the rule that it breaks; ``ep`` is named in the rule where it matters."""

    kvp: int
    tpa: int
    why: str


@dataclass(frozen=True)
class Row:
    """One layout in one case.

    Attributes:
        context: tokens of each sequence; batch: sequences.
        weights_bytes: of the fullest rank.
        cache_bytes_per_token: of one sequence on the fullest rank, averaged over its tokens.
        max_tokens: what the caches of all ranks hold; max_sequences: of this context.
        ttl: of a step; ttft: of one prompt of this context.
        best: the lowest TTL of this case among layouts that hold the batch; where the batch was chosen, the most tokens
            a second and GPU.
    """

    layout: Layout
    context: int
    batch: int
    weights_bytes: int
    cache_bytes_per_token: float
    max_tokens: int
    max_sequences: int
    ttl: Time
    ttft: Time
    best: bool = False

    @property
    def fits(self) -> bool:
        """True where the caches hold the whole batch."""
        return self.batch <= self.max_sequences

    @property
    def tokens_per_s_user(self) -> float:
        """Tokens a second of each sequence."""
        return 1e6 / self.ttl.us

    @property
    def tokens_per_s_gpu(self) -> float:
        """Tokens a second of all sequences for each GPU."""
        return self.batch * self.tokens_per_s_user / self.layout.world_size


@dataclass(frozen=True)
class Setup:
    """What a plan is made for.

    Attributes:
        block_size, memory_fraction, prefill_chunk: as cache.block_size, cache.memory_fraction, scheduler.prefill_chunk.
    """

    spec: ModelSpec
    hardware: Hardware
    storage: Storage = field(default_factory=Storage)
    block_size: int = 64
    memory_fraction: float = 0.9
    prefill_chunk: int = 2048

    def cost_of(self, layout: Layout) -> CostModel:
        """Return the model of a layout's cost.

        Raises:
            ValueError: where the layout does not fit the model.
        """
        foot = Footprint(self.spec, layout, self.storage, self.block_size)
        _ = foot.part
        return CostModel(foot, self.hardware, self.prefill_chunk)

    def num_pages(self, foot: Footprint) -> int:
        """Return the pages a rank that there is room for beside what STEP_ROWS sequences keep elsewhere.

        Raises:
            ValueError: when there is none.
        """
        hw = self.hardware
        pages = foot.num_pages(self._free_bytes(foot, STEP_ROWS), page_bytes_beside=_checkpoints_bytes(foot))
        if not pages:
            raise ValueError(
                f"{foot.weights_bytes / 1e9:.1f} GB of weights a rank leave no memory for one page: "
                f"cache.memory_fraction = {self.memory_fraction} of {hw.memory_bytes / 1e9:.1f} GB; use more GPUs, "
                "raise it, or use narrower weights"
            )
        used = STEP_ROWS * foot.pages_of(foot.spec.max_position)
        return pages if foot.page_bytes else min(pages, used)  # pages of no full layer are free

    def max_sequences(self, foot: Footprint, context: int) -> int:
        """Return how many sequences of ``context`` tokens fit, first owners in turn, with their windows and states."""
        blocks, kvp = foot.placement.num_blocks(context), foot.layout.kvp

        def exceed(count: int) -> bool:
            page_bytes = foot.page_bytes + _checkpoints_bytes(foot)
            return -(-count * blocks // kvp) * page_bytes > self._free_bytes(foot, count)

        return (_first(exceed, 1, MOST) or MOST) - 1

    def _free_bytes(self, foot: Footprint, num_sequences: int) -> int:
        """Return what weights, activations, what the machine reserves, states and windows leave of a rank's memory."""
        hw = self.hardware
        taken = foot.weights_bytes + foot.activation_bytes(self.prefill_chunk + STEP_ROWS) + int(hw.reserved_bytes)
        taken += foot.states_bytes(num_sequences, max_run=1)
        taken += foot.windows_bytes(num_sequences, prefill_chunk=self.prefill_chunk)
        return int(hw.memory_bytes * self.memory_fraction) - taken


def _checkpoints_bytes(foot: Footprint) -> int:
    """Return what checkpoints of states may take for each page."""
    return foot.page_bytes // CHECKPOINT_SHARE if foot.spec.states is not None else 0


class Plan:
    """Every layout of ``gpus`` ranks for a setup.

    Attributes:
        costs: the model of cost and the pages a rank of each layout that can be, plain TP first.
        refused: the others.
    """

    def __init__(self, setup: Setup, gpus: int) -> None:
        self.setup, self.gpus = setup, gpus
        self.costs: list[tuple[CostModel, int]] = []
        self.refused: list[Refusal] = []
        has_experts = setup.spec.experts is not None
        for kvp in _divisors(gpus):
            for ep in _divisors(gpus) if has_experts else [1]:
                self._try(Layout(kvp=kvp, tpa=gpus // kvp, ep=ep))

    def rows(self, contexts: Sequence[int], batches: Sequence[int]) -> list[Row]:
        """Return each layout in each case, the best of a case marked."""
        rows = []
        for context in contexts:
            for batch in batches:
                case = [self._row(cost, pages, context, batch) for cost, pages in self.costs]
                rows += _mark_best(case, lambda row: -row.ttl.us)
        return rows

    def crossover(self, batch: int) -> int | None:
        """Return about the shortest context, in tokens, from which a layout with KVP decodes faster than plain TP.

        None where plain TP cannot be, where no KVP can be, or where TP is never overtaken up to 16M tokens.
        """
        plain = [cost for cost, _ in self.costs if cost.footprint.layout.kvp == 1]
        sharded = [cost for cost, _ in self.costs if cost.footprint.layout.kvp > 1]
        if not plain or not sharded:
            return None

        def overtakes(context: int) -> bool:
            return _fastest(sharded, context, batch) < _fastest(plain, context, batch)

        step = self.setup.block_size * self.gpus  # whole turns of ownership, between which nothing jumps
        return _first(overtakes, step, LONGEST)

    def fastest(self, context: int, batch: int) -> Layout | None:
        """Return the layout of the lowest TTL among those that hold the batch; None where none does."""
        best = [row.layout for row in self.rows([context], [batch]) if row.best]
        return best[0] if best else None

    def _try(self, layout: Layout) -> None:
        try:
            cost = self.setup.cost_of(layout)
            pages = self.setup.num_pages(cost.footprint)
        except ValueError as problem:
            refusal = Refusal(layout.kvp, layout.tpa, str(problem))
            if refusal not in self.refused:
                self.refused.append(refusal)
        else:
            self.costs.append((cost, pages))

    def _row(self, cost: CostModel, pages: int, context: int, batch: int) -> Row:
        foot = cost.footprint
        return Row(
            layout=foot.layout,
            context=context,
            batch=batch,
            weights_bytes=foot.weights_bytes,
            cache_bytes_per_token=foot.cache_bytes_per_token(context),
            max_tokens=foot.max_tokens(pages),
            max_sequences=self.setup.max_sequences(foot, context),
            ttl=cost.decode(context, batch),
            ttft=cost.prefill(context),
        )

    def largest_within(self, context: int, ttl_ms: float) -> list[Row]:
        """Return, for each layout that has one, its largest batch whose TTL stays within a limit, in milliseconds."""
        rows = []
        for cost, pages in self.costs:
            most = min(self.setup.max_sequences(cost.footprint, context), MAX_BATCH)

            def exceeds(batch: int, cost: CostModel = cost, most: int = most) -> bool:
                return batch > most or cost.decode(context, batch).us > ttl_ms * 1e3

            batch = (_first(exceeds, 1, MAX_BATCH + 1) or MAX_BATCH + 1) - 1
            if batch:
                rows.append(self._row(cost, pages, context, batch))
        return rows


@dataclass(frozen=True)
class Fleet:
    """Plans of all world sizes that divide a number of GPUs: smaller worlds stand for several replicas."""

    setup: Setup
    gpus: int

    @cached_property
    def plans(self) -> list[Plan]:
        """The plans, the whole number of GPUs first."""
        return [Plan(self.setup, size) for size in reversed(_divisors(self.gpus))]

    def rows(self, contexts: Sequence[int], ttl_ms: float) -> list[Row]:
        """Return each layout of each size with its largest batch within the limit; the best of a context is marked."""
        rows = []
        for context in contexts:
            case = [row for plan in self.plans for row in plan.largest_within(context, ttl_ms)]
            rows += _mark_best(case, lambda row: row.tokens_per_s_gpu)
        return rows


def _fastest(costs: Sequence[CostModel], context: int, batch: int) -> float:
    return min(cost.decode(context, batch).us for cost in costs)


def _mark_best(case: list[Row], worth: Callable[[Row], float]) -> list[Row]:
    fitting = [row for row in case if row.fits]
    if not fitting:
        return case
    best = max(fitting, key=worth)
    return [replace(row, best=row is best) for row in case]


def _first(holds: Callable[[int], bool], step: int, limit: int) -> int | None:
    """Return the first multiple of ``step`` from which on a condition holds; None where that is none up to a limit."""
    low, high = 0, 1
    while not holds(high * step):
        low, high = high, 2 * high
        if low * step >= limit:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle * step) else (middle, high)
    return high * step


def _divisors(number: int) -> list[int]:
    return [each for each in range(1, number + 1) if number % each == 0]

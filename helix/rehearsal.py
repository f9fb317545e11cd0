"""Steps of rows that are nobody's, before the first request: what they take is measured, what they launch is compiled.

Such rows store nothing; they see nothing, or tokens that nobody wrote. What is only compiled runs through one layer of
each sort.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from attention.ranges import PAGE

from .batch import LocalRows, StepRows
from .compile_ahead import compile_ahead
from .graphs import buckets_up_to
from .models.linear import MAX_ROWS
from .models.unlike import one_of_each_layer
from .runner import Runner

_LONG = 1 << 16  # tokens; attention over so many is cut into parts wherever it can be


def warm_up(runner: Runner, num_rows: int, num_choices: int) -> None:
    """Run a step of so many rows, of which so many choose: its peak memory is known then, and libraries are loaded.

    Collective over the world.
    """
    hidden = runner.forward(StepRows.for_nobody(num_rows), _for_nobody(runner, num_rows), repeat=2)
    runner.decoder.gather_logits(runner.decoder.local_logits(hidden[:1].expand(num_choices, -1)))
    if runner.sampler is not None:
        runner.sampler.scorer.warm_up(hidden[:1])


def compile_steps(runner: Runner, most_rows: int) -> None:
    """Compile what steps without a graph launch, up to so many rows: nothing is left to compile while requests run.

    Collective over the world; does nothing without a GPU.
    """
    powers = [1 << power for power in range(most_rows.bit_length()) if 1 << power < most_rows]
    sizes = {*powers, *(size + 1 for size in powers), most_rows}  # Triton tells multiples of 16 from others
    most_seen, decoder = min(_LONG, runner.tables.max_local_len), runner.decoder
    with compile_ahead(decoder.device) as ahead, one_of_each_layer(decoder):
        for num_rows in sorted(sizes, reverse=True) if ahead else ():  # what takes longest is compiled first
            for visible in (1, most_seen):  # rows that are whole, and rows that are in parts
                hidden = runner.forward(StepRows.for_nobody(num_rows), _for_nobody(runner, num_rows, visible))
            decoder.greedy(decoder.local_logits(hidden[: runner.max_batch]))
            decoder.local_logits(hidden[:MAX_ROWS])  # of prompts that are scored
        if ahead and runner.next_states is None and 0 < runner.expand_rows <= most_rows:
            _compile_wanted(runner)
        if ahead and runner.sampler is not None:
            runner.sampler.warm_up()


def _compile_wanted(runner: Runner) -> None:
    """Compile what steps launch that attend to a workspace once, and their last layers, for rows that choose alone:
    one of each sequence, whole and in parts, all in one filling or in several.
    """
    assert runner.decoder.made is not None
    num_rows, capacity = runner.expand_rows, runner.decoder.made.capacity
    each = np.arange(num_rows)
    step = replace(StepRows.for_nobody(num_rows), row_seq=np.minimum(each, runner.max_batch - 1))
    for num_wanted in buckets_up_to(min(runner.max_batch, num_rows)):
        share, longest = capacity // num_wanted // PAGE * PAGE, max(capacity - num_wanted * PAGE, capacity // 2)
        # of equal rows as many as there are programs are whole; beside short ones long ones never are
        uneven = np.where(each == 0, longest, 1), np.where(each % 2 == 0, longest, 1)
        for visible in (1, share, share + PAGE, *uneven):
            seen = np.clip(np.broadcast_to(visible, num_rows), 1, runner.tables.max_local_len)
            local = replace(_for_nobody(runner, num_rows, int(seen[0])), visible=seen)
            runner.forward(step, local, wanted=np.arange(num_wanted))


def _for_nobody(runner: Runner, num_rows: int, visible: int = 0) -> LocalRows:
    return LocalRows.for_nobody(num_rows, visible=visible, window=runner.decoder.spec.window)

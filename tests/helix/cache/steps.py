"""What random walks through a scheduler share: sequences that arrive, steps that are launched ahead, tokens."""

import random

from helix.request import RequestOutput, Sequence
from helix.sampling import SamplingParams
from helix.scheduler import Scheduler


class Walk:
    """Runs a scheduler as the engine does; ``launch`` is the device. Tokens follow from those before them."""

    scheduler: Scheduler

    def __init__(self, seed, longest):
        self.rng, self.longest = random.Random(seed), longest
        self.num_reused = self.num_made = 0

    def token(self, tokens):
        return hash(tuple(tokens)) % 7  # of integers: alike in every process

    def tokens_of(self, chunk):
        """A sequence's tokens up to the end of a chunk, known or not."""
        tokens = list(chunk.seq.token_ids)
        while len(tokens) < chunk.stop:
            tokens.append(self.token(tokens))
        return tokens

    def arrive(self):
        beginning = [self.rng.randrange(2)] * self.rng.randrange(1, self.longest)
        prompt = beginning + [self.rng.randrange(3) for _ in range(self.rng.randrange(1, 30))]
        seq = Sequence(
            index=self.num_made, token_ids=prompt, prompt_len=len(prompt), sampling=SamplingParams(), seed=0,
            max_len=len(prompt) + self.rng.randrange(1, 40), output=RequestOutput(None),
        )  # fmt: skip
        self.num_made += 1
        self.scheduler.add(seq)

    def launch(self, step):
        """Do what the device does for a step."""
        raise NotImplementedError

    def land(self, step, in_flight):
        going_on = []
        for chunk in step.chunks:
            if chunk.seq.has_ended:
                self.scheduler.remove(chunk.seq)
            else:
                going_on.append(chunk)
        self.scheduler.commit(going_on)
        for chunk in going_on:
            seq = chunk.seq
            if chunk.samples:
                seq.token_ids.append(self.token(seq.token_ids))
                if len(seq.token_ids) == seq.max_len or self.rng.random() < 0.02:
                    seq.output.finish_reason = "stop"
                    if in_flight is None or all(other.seq is not seq for other in in_flight.chunks):
                        self.scheduler.remove(seq)

    def run(self, num_arrivals):
        flight = None
        for _ in range(5000):
            if self.num_made < num_arrivals and self.rng.random() < 0.15:
                self.arrive()
            if flight is None:
                if not self.scheduler.has_work:
                    continue
                flight = self.scheduler.schedule()
                self.launch(flight)
                self.num_reused += sum(seq.num_computed for seq in flight.admitted)
            ahead = self.scheduler.look_ahead(flight) if self.rng.random() < 0.7 else None
            if ahead is not None:
                self.launch(ahead)
                self.num_reused += sum(seq.num_computed for seq in ahead.admitted)
            self.land(flight, ahead)
            flight = ahead
        assert not self.scheduler.has_work and flight is None

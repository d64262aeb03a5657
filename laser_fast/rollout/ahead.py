"""One step off-policy: sample the next step's completions while this step trains.

    policy    | update t-1 | sync t | train on the batch of t ........ | sync t+1 | train on t+1
    engine                          | sample t+1 from the weights of t |          | sample t+2

The engine samples in a thread of its own, so `generate` must not be collective: HTTP to a server
is fine, an engine that shares the training's devices or process group is not. Weights may change
only while nothing is in flight.
"""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from laser_fast.records import Group, Prompt, Sampling
from laser_fast.rollout.engine import Engine


class RolloutAhead:
    """At most one rollout in the background; the next `drain` or `take` raises its error."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="rollout-ahead")
        self._in_flight: tuple[int, Future[list[Group]]] | None = None

    def start(self, step: int, prompts: Sequence[Prompt], sampling: Sampling) -> None:
        """Begin to sample the completions of `step` from the engine's current weights."""
        assert self._in_flight is None, "the rollout in flight was not taken"
        self._in_flight = step, self._pool.submit(self._engine.generate, prompts, sampling)

    def drain(self) -> None:
        """Wait until nothing is in flight; the groups stay to be taken."""
        if self._in_flight is not None:
            self._in_flight[1].result()

    def take(self, step: int) -> list[Group] | None:
        """Wait for the groups of `step`; None if nothing was started."""
        if self._in_flight is None:
            return None
        of_step, groups = self._in_flight
        assert of_step == step
        self._in_flight = None
        return groups.result()

"""Many sites' training requests answered at once, each as its own agent would answer alone.

For a simulation that trains many small models in one step. Each site's policy, ledger and egress
are asked one by one; only the arithmetic between is shared.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from intramural.client.agent import SiteAgent
from intramural.core.messages import Reply, TrainRequest
from intramural.models.job import Job, Trained

Results = Sequence[Trained | Exception]
"""Of each job in order: what came of it, or why nothing did."""


@dataclass(frozen=True, kw_only=True)
class _Open:
    """A site that waits for what its job comes to; its ledger is charged."""

    place: int
    agent: SiteAgent
    request: TrainRequest
    job: Job
    settled: ExitStack

    def close(self, result: Trained | Exception) -> Reply:
        try:
            with self.settled:
                if isinstance(result, Exception):
                    raise result
            delta, loss = result
            update = self.agent.update(self.request, self.job, delta, loss=loss, seconds=0.0)
            return self.agent.let_out(update)
        except Exception as error:  # noqa: BLE001 (as `SiteAgent.answer`)
            return self.agent.refusal(error)


def answer_together(
    asked: Sequence[tuple[SiteAgent, TrainRequest]], *, train: Callable[[list[Job]], Results]
) -> list[Reply]:
    """Return the sites' replies, in the order they were asked.

    Args:
        asked: Different sites, each with its request.
        train: Trains the jobs of those sites that may.

    Guarantees:
        Those of `SiteAgent.answer` for each site: it is charged before its records are read, and
        settled as failed where its job, or all of them, failed.
    """
    replies: dict[int, Reply] = {}
    waiting: list[_Open] = []
    with ExitStack() as all_settled:  # should the process be interrupted in between
        for place, (agent, request) in enumerate(asked):
            settled = all_settled.enter_context(ExitStack())
            try:
                agent.check_request(request)
                job = settled.enter_context(agent.training(request))
            except Exception as error:  # noqa: BLE001 (as `SiteAgent.answer`)
                replies[place] = agent.refusal(error)
                continue
            waiting.append(
                _Open(place=place, agent=agent, request=request, job=job, settled=settled)
            )
        results: Results
        try:
            results = train([one.job for one in waiting])
        except Exception as error:  # noqa: BLE001 (each site says that it failed)
            results = [error] * len(waiting)
        for one, result in zip(waiting, results, strict=True):
            replies[one.place] = one.close(result)
    return [replies[place] for place in range(len(asked))]

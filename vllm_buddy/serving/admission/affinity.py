"""Budget affinity: requests of like depth go to the same replica. Numbers only, nothing of vLLM or Ray.

A decode step costs the union of its requests' paths, so a batch of one budget is faster than one of several. Replicas
are therefore put in order, and each depth has a *home*: the replicas of its part of the traffic. Of the n newest
requests, n_d have depth d and n_<d a smaller one. The part of depth d on N replicas is

    [N n_<d / n, N (n_<d + n_d) / n) ,

where replica r holds [r, r + 1). The part is rounded to whole replicas: one belongs to the home if half of it lies in
the part, or half of the part in it. Traffic that wavers, and depths that are served faster and so come back sooner, do
not mix depths on a replica. A request goes to the least loaded replica of its home. Affinity yields to load: where that
replica has more than

    spill + 2 * (load of the least loaded of all)

requests, the least loaded of all takes it. Twice, because a replica of deep requests holds more of them at the same
rate of arrivals than one of shallow ones, which is no reason to mix them. With one depth only, the home is all replicas
and the rule is to take the least loaded.
"""

from collections import deque
from collections.abc import Iterable, Sequence

REMEMBERED = 64
_ROUNDING = 1e-9


class BudgetAffinity:
    """Chooses the replica of each arriving request.

    spill: at least 0, requests more than twice those of the least loaded replica that a home may have.
    remembered: number of newest requests for each replica whose depths count, at least 1.
    first: the replica that equally loaded ones begin with, so that several choosers do not all begin with one.
    """

    def __init__(self, spill: int, remembered: int = REMEMBERED, first: int = 0) -> None:
        self._spill = spill
        self._remembered = remembered
        self._seen: deque[float] = deque()
        self._turn = first - 1

    def choose(
        self, depth: float, loads: Sequence[float], *, num_requests: Sequence[float] | None = None, is_new: bool = True
    ) -> int:
        """Count a request and return the index of the replica that should run it.

        depth: layers, or whatever else orders requests by their paths, such as budgets. loads: [num_replicas], at
            least one, by which the least loaded is found; replicas keep their places from call to call. num_requests:
            [num_replicas], requests that each has, to which `spill` applies; None: loads are such numbers. is_new:
            whether the request was not counted before.
        """
        counts = loads if num_requests is None else num_requests
        if is_new:
            self._seen.append(depth)
        while len(self._seen) > self._remembered * len(loads):
            self._seen.popleft()
        self._turn += 1
        least = self._least(range(len(loads)), loads)
        home = self._least(self.home(depth, len(loads)), loads)
        return least if counts[home] > self._spill + 2 * counts[least] else home

    def home(self, depth: float, num_replicas: int) -> list[int]:
        """The replicas of a depth, ascending, at least one. All of them if no request had it yet."""
        of_depth = self._seen.count(depth)
        if not of_depth:
            return list(range(num_replicas))
        scale = num_replicas / len(self._seen)
        start = scale * sum(1 for seen in self._seen if seen < depth)
        part = scale * of_depth
        half = 0.5 * min(1.0, part) - _ROUNDING
        return [r for r in range(num_replicas) if min(r + 1, start + part) - max(r, start) >= half]

    def _least(self, replicas: Iterable[int], loads: Sequence[float]) -> int:
        """The least loaded of these; equal ones take turns."""
        return min(replicas, key=lambda r: (loads[r], (r - self._turn) % len(loads)))

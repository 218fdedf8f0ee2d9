"""For Ray Serve LLM: budget affinity, and a refusal of nodes without this package.

Both are named in the configuration of the deployment that serves the model:

    LLMConfig(
        deployment_config=dict(
            request_router_config=RequestRouterConfig(request_router_class="vllm_buddy.ray.BudgetRouter")
        ),
        callback_config=vllm_buddy.ray.needs_plugin(),
        ...
    )
"""

import time
from collections import Counter
from typing import Any, NamedTuple

try:
    from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica
except ImportError as error:
    raise ImportError(
        "vllm_buddy.ray needs Ray Serve: pip install 'ray[serve]==2.60.0'. Ray's own extra, ray[llm], would "
        "replace vLLM by the version that it pins"
    ) from error

from vllm_buddy import __version__
from vllm_buddy.errors import BudgetError, SettingsError
from vllm_buddy.method import parse_budget
from vllm_buddy.serving.admission.affinity import BudgetAffinity
from vllm_buddy.serving.admission.option_names import BUDGET_KEY, LOSSLESS, MODE_KEY

_FORGOTTEN_S = 10.0


class _Said(NamedTuple):
    """What a replica has said. num_requests: that it has, from all routers. in_flight: those of this router then.
    when: in seconds, monotonic."""

    num_requests: int
    in_flight: int
    when: float


class BudgetRouter(RequestRouter):
    """Sends a request to the replica of its budget, or to the least loaded one: see admission/affinity.py.

    Each ingress process has a router of its own. It learns the load of a replica from what it has in flight there,
    and from what the replica says, which counts for 10 s as it does in Ray's own router.
    """

    def initialize_state(self, default_budget: float | str = 1.0, auto_budget: float = 0.75, spill: int = 8) -> None:
        """Take `request_router_kwargs`.

        default_budget: the server's, of requests that name none; "auto" too. auto_budget: of requests with budget
            "auto", whose depth is chosen on the replica. spill: requests that a replica may have beyond twice those of
            the least loaded one.

        Raises:
            SettingsError: one of them is out of range.
        """
        if not isinstance(spill, int) or spill < 0:
            raise SettingsError(f"request_router_kwargs: spill is {spill!r}; allowed is a whole number from 0 up")
        try:
            self._auto_budget = parse_budget(auto_budget)
            self._default_budget = self._auto_budget if default_budget == "auto" else parse_budget(default_budget)
        except BudgetError as error:
            raise SettingsError(f"request_router_kwargs: {error}") from None
        self._affinity = BudgetAffinity(spill)
        self._in_flight: Counter[ReplicaID] = Counter()
        self._said: dict[ReplicaID, _Said] = {}

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """The replica of the request's budget, then the others: Ray takes them if the first does not answer."""
        # In the same order on every call and in every ingress process.
        replicas = sorted(candidate_replicas, key=lambda replica: replica.replica_id.unique_id)
        is_new = True
        if pending_request is not None:  # Ray asks again while no replica takes it, at once if this is not set
            is_new = not pending_request.routing_context.should_backoff
            pending_request.routing_context.should_backoff = True
        budget = self._budget(pending_request)
        if budget is None or not replicas:
            return [replicas]
        loads = [self._load(replica.replica_id) for replica in replicas]
        chosen = replicas.pop(self._affinity.choose(budget, loads, is_new=is_new))
        return [[chosen], replicas]

    def _budget(self, pending: PendingRequest | None) -> float | None:
        """The budget of a request; None if it is not one for text, or one that the replica will refuse."""

        request: Any = pending.args[0] if pending is not None and pending.args else None
        if not hasattr(request, "vllm_xargs"):
            return None
        options = request.vllm_xargs or {}
        if options.get(MODE_KEY) == LOSSLESS:
            return 1.0
        value = options.get(BUDGET_KEY, self._default_budget)
        try:
            return self._auto_budget if value == "auto" else parse_budget(value)
        except BudgetError:
            return None

    def _load(self, replica_id: ReplicaID) -> int:
        """Requests that a replica has: what it said of late, and what this router has sent and taken back since."""
        in_flight, said = self._in_flight[replica_id], self._said.get(replica_id)
        if said is None or time.monotonic() - said.when > _FORGOTTEN_S:
            return in_flight
        return max(in_flight, said.num_requests + in_flight - said.in_flight)

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        super().update_replicas(replicas)
        ids = {replica.replica_id for replica in replicas}
        self._in_flight = Counter({one: number for one, number in self._in_flight.items() if one in ids})
        self._said = {one: said for one, said in self._said.items() if one in ids}

    def on_send_request(self, replica_id: ReplicaID) -> None:
        super().on_send_request(replica_id)
        self._in_flight[replica_id] += 1

    def on_new_queue_len_info(self, replica_id: ReplicaID, num_ongoing_requests: int) -> None:
        """A replica has said how many requests it has from all routers."""
        super().on_new_queue_len_info(replica_id, num_ongoing_requests)
        self._said[replica_id] = _Said(num_ongoing_requests, self._in_flight[replica_id], time.monotonic())

    def decrement_queue_len_cache(self, replica_id: ReplicaID) -> None:
        """A request has ended."""
        super().decrement_queue_len_cache(replica_id)
        self._in_flight[replica_id] = max(0, self._in_flight[replica_id] - 1)


def needs_plugin() -> dict[str, Any]:
    """A `callback_config` of LLMConfig with which a replica does not start on a node that lacks this package.

    vLLM does not miss a plugin that is not installed: it would serve the model unrouted. The deployment fails instead,
    with a message that names the node and what to install there. So does one whose node has another version.
    """
    from ray.llm._internal.common.callbacks.base import CallbackBase

    version = __version__

    class NeedsPlugin(CallbackBase):
        """Runs in the replica, before its engine. Ray sends a class that is made in a function with its code; one of a
        module would have to be imported there, from the package that is missing."""

        async def on_before_node_init(self) -> None:
            """Raise RuntimeError if vLLM would not load the plugin here."""
            from ray.util import get_node_ip_address

            try:
                import vllm_buddy
                from vllm_buddy.cli.plugin_check import plugin_problem
            except ImportError as error:
                problem: str | None = f"has no vllm_buddy ({error})"
            else:
                told = plugin_problem()
                problem = None if told is None else f"would not load it: {told[0]}"
                if vllm_buddy.__version__ != version:
                    problem = f"has vllm_buddy {vllm_buddy.__version__} instead of {version}"
            if problem is not None:
                raise RuntimeError(
                    f"node {get_node_ip_address()} {problem}, and would not serve what was asked for; install "
                    f"vllm-buddy {version} there, in the environment of Ray's workers (`pip install .` in a checkout)"
                )

    return {"callback_class": NeedsPlugin}

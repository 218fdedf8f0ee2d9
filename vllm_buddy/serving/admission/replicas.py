"""Which of vLLM's data-parallel replicas runs a request: by its depth and their load."""

from typing import TYPE_CHECKING, Any

from vllm_buddy.artifact import load_artifact
from vllm_buddy.serving.admission.affinity import BudgetAffinity
from vllm_buddy.serving.admission.auto_limits import AutoBudget
from vllm_buddy.serving.admission.chooser import BudgetChooser
from vllm_buddy.serving.compat import replica_loads
from vllm_buddy.serving.start.attached import limits_of
from vllm_buddy.serving.start.settings import engine_settings

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.engine import EngineCoreRequest


class ReplicaChooser:
    """Chooses the replicas of the requests of one engine client. Each API server has one of its own.

    first: the replica that the client begins with, as in vLLM's own balancer.
    """

    def __init__(self, vllm_config: "VllmConfig", first: int = 0) -> None:
        self._settings = engine_settings(vllm_config)
        self._limits = limits_of(vllm_config.model_config)
        # Behind max_num_seqs requests, another waits.
        spill = min(self._settings.affinity.spill, vllm_config.scheduler_config.max_num_seqs)
        self._affinity = BudgetAffinity(spill, first=first)
        # The scheduler has a chooser in another process. This one is never told of load. Made now, not at the first
        # "auto", because reading an artifact holds up what streams.
        self._chooser = None
        if self._settings.affinity.enabled and self._limits.auto is not None:
            artifact = load_artifact(self._settings.artifact_folder)
            self._chooser = BudgetChooser.from_settings(self._settings, artifact, self._limits.auto)

    def rank(self, client: Any, request: "EngineCoreRequest") -> int | None:
        """The index among the client's replicas; None: vLLM is to choose, because affinity is switched off.

        client: vLLM's DPLBAsyncMPClient.
        """
        if not self._settings.affinity.enabled:
            return None
        scores, num_requests = replica_loads(client)
        return self._affinity.choose(self.depth(request), scores, num_requests=num_requests)

    def depth(self, request: "EngineCoreRequest") -> int:
        """Layers that a request is expected to run: of budget "auto" those that are chosen without load."""
        if request.resumable:  # a streaming-input session
            return self._limits.num_layers
        params, token_ids = request.sampling_params, request.prompt_token_ids
        assert params is not None
        asked = self._limits.resolve(params.extra_args)
        if not isinstance(asked, AutoBudget):
            return asked.depth
        assert self._chooser is not None
        assert token_ids is not None
        return self._chooser.choose(asked, self._chooser.take_in(token_ids)).depth

"""What a front end shows of a pretend engine's statistics, which go through vLLM's own encoding to its stat loggers."""

from collections.abc import Sequence
from typing import Any

from tests.harness.pretend_worker import PretendEngine


class ShownMetrics:
    """The metrics `vllm_buddy:*` of a front end with these engines."""

    def __init__(self, config: Any, engines: Sequence[int] = (0,)) -> None:
        from vllm.v1.metrics.loggers import StatLoggerManager

        self.manager = StatLoggerManager(vllm_config=config, engine_idxs=list(engines))
        self._model_name = config.model_config.served_model_name

    def take(self, engine: PretendEngine, index: int = 0) -> None:
        """Receive the statistics of all steps since the last time. index: of the engine."""
        for stats in engine.stats:
            self.manager.record(received(stats), None, engine_idx=index)
        engine.stats.clear()

    def value(self, name: str, engine: int = 0, **labels: str) -> float | None:
        """A sample; None if it is not shown."""
        from prometheus_client import REGISTRY

        labels |= {"model_name": self._model_name, "engine": str(engine)}
        return REGISTRY.get_sample_value(f"vllm_buddy:{name}", labels)


def received(stats: Any) -> Any:
    """vLLM's SchedulerStats as they arrive in another process."""
    from vllm.v1.engine import EngineCoreOutputs
    from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

    encoded = MsgpackEncoder().encode(EngineCoreOutputs(scheduler_stats=stats))
    return MsgpackDecoder(EngineCoreOutputs).decode(encoded).scheduler_stats

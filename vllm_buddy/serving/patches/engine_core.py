"""Patches of the engine: its KV cache groups, its start beside other replicas, its statistics and its sleep."""

from collections.abc import Callable
from typing import Any

from vllm.v1.core import kv_cache_utils
from vllm.v1.engine.core import EngineCore, EngineCoreProc
from vllm.v1.engine.core_client import MPClient
from vllm.v1.metrics.loggers import PrometheusStatLogger, StatLoggerManager

from vllm_buddy.errors import UnsupportedError
from vllm_buddy.serving.compat import add_to_ready_response, groups_by_units, told_when_ready, units_problem
from vllm_buddy.serving.patches.wrapping import is_routed, wrap
from vllm_buddy.serving.start.agreement import Served, refuse_differences
from vllm_buddy.serving.start.attached import kv_units_of, served_of
from vllm_buddy.serving.start.refusal_note import telling_refusals


def wrap_get_kv_cache_groups() -> None:
    """Give each KV unit a group, where the config hook chose units. vLLM imports the function late in other modules.

    Why: vLLM groups layers by the kind of their caches, and those of one model are alike.
    Nearest hook: a KVCacheSpec of our own per unit, which vLLM would take for several kinds of attention.
    Remove when: a model class can name the groups (`SupportsKVCacheGrouping`, from vLLM 0.33 on).
    """
    if units_problem():  # the config hook refuses units then
        return

    def around(original: Callable[..., Any]) -> Callable[..., Any]:
        def get_kv_cache_groups(vllm_config: Any, kv_cache_spec: Any) -> Any:
            groups = original(vllm_config, kv_cache_spec)
            units = kv_units_of(vllm_config.model_config) if is_routed(vllm_config) else None
            return groups if units is None else groups_by_units(groups, units)

        return get_kv_cache_groups

    wrap(kv_cache_utils, "get_kv_cache_groups", around)


def wrap_ready_response() -> None:
    """Compare what the replicas serve, where vLLM's engines tell their front ends that they are ready.

    Why: with `--headless`, an engine on another node has a configuration of its own, and vLLM compares it for models
    that are mixtures of experts only.
    Nearest hook: none.
    Remove when: the hash in vLLM's handshake covers additional_config, for all models.
    """

    def around_make(original: Callable[..., Any]) -> Callable[..., Any]:
        def make_ready_response(self: EngineCoreProc) -> Any:
            response = original(self)
            if not is_routed(self.vllm_config):
                return response
            return add_to_ready_response(response, served_of(self.vllm_config.model_config))

        return make_ready_response

    def around_apply(original: Callable[..., Any]) -> Callable[..., Any]:
        def apply_ready_response(self: MPClient, payload: bytes) -> None:
            original(self, payload)
            if is_routed(self.vllm_config) and (told := told_when_ready(payload)) is not None:
                rank, found = told
                with telling_refusals():
                    refuse_differences(served_of(self.vllm_config.model_config), [(f"replica {rank}", Served(*found))])

        return apply_ready_response

    wrap(EngineCoreProc, "_make_ready_response", around_make)
    wrap(MPClient, "_apply_ready_response", around_apply)


def wrap_stat_loggers() -> None:
    """Record the scheduler's figures beside vLLM's own, where a front end makes its loggers.

    Why: the metrics `vllm_buddy:*` are shown for models that are routed only, and offline too.
    Nearest hook: the entry points `vllm.stat_logger_plugins`. One that is installed turns on the statistics of every
    server, also of one without routing that was started with `--disable-log-stats`; and `LLM` does not load them.
    Remove when: a plugin can decline a configuration.
    """

    def around(original: Callable[..., Any]) -> Callable[..., Any]:
        def init(self: StatLoggerManager, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
            original(self, vllm_config, *args, **kwargs)
            if is_routed(vllm_config):
                from vllm_buddy.serving.telemetry.stat_logger import BuddyStatLogger

                vllms = next(logger for logger in self.stat_loggers if isinstance(logger, PrometheusStatLogger))
                # First, because it takes the figures out of what the others read.
                self.stat_loggers.insert(0, BuddyStatLogger(vllm_config, self.engine_indexes, vllms))

        return init

    wrap(StatLoggerManager, "__init__", around)


def wrap_sleep() -> None:
    """Refuse level 2, which drops the bypass, that vLLM could not load again, before anything is paused.

    Why: the worker, whose class is ours, is asked after vLLM has ended all requests and paused.
    Nearest hook: the worker's `sleep`.
    Remove when: vLLM asks before it pauses.
    """

    def around(original: Callable[..., Any]) -> Callable[..., Any]:
        def sleep(self: EngineCore, level: int = 1, *args: Any, **kwargs: Any) -> Any:
            if level >= 2 and is_routed(self.vllm_config):
                raise UnsupportedError(
                    "--model-impl buddy can sleep at level 1 only: level 2 would drop the bypass for good"
                )
            return original(self, level, *args, **kwargs)

        return sleep

    wrap(EngineCore, "sleep", around)

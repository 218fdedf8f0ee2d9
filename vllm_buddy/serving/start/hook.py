"""vLLM's config hook: checks the whole configuration before any process starts, and puts routing in place."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm.config import CompilationMode, CUDAGraphMode
from vllm.distributed.utils import get_pp_indices
from vllm.logger import init_logger
from vllm.model_executor.models.config import VerifyAndUpdateConfig
from vllm.platforms import current_platform

from vllm_buddy.artifact import Artifact, load_artifact, resolve_artifact
from vllm_buddy.errors import SettingsError
from vllm_buddy.method.kv_policy import KV_ONLY
from vllm_buddy.method.kv_units import KVUnits
from vllm_buddy.serving.admission.limits import RequestLimits
from vllm_buddy.serving.compat import TESTED_VLLM, vllm_version
from vllm_buddy.serving.schedule import SCHEDULER
from vllm_buddy.serving.schedule.draft_pace import DraftPasses, drafts_by_depth
from vllm_buddy.serving.schedule.route_maker import check_schedule
from vllm_buddy.serving.start.agreement import served
from vllm_buddy.serving.start.attached import attach
from vllm_buddy.serving.start.base_model import check_base_model, check_lora, identify_served_model
from vllm_buddy.serving.start.devices import with_device_settings
from vllm_buddy.serving.start.kv_layout import kv_units
from vllm_buddy.serving.start.refusals import refuse_unsupported
from vllm_buddy.serving.start.setting_sections import AUTO
from vllm_buddy.serving.start.settings import CONFIG_KEY, BuddySettings, parse_settings

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = init_logger(f"vllm.{__name__}")

CPU_WORKER = "vllm_buddy.serving.worker.worker.BuddyCPUWorker"
GPU_WORKER = "vllm_buddy.serving.worker.worker.BuddyGPUWorker"


class BuddyModelConfig(VerifyAndUpdateConfig):
    """vLLM's per-architecture config hook (MODELS_CONFIG_MAP) for the routed models."""

    @staticmethod
    def verify_and_update_config(vllm_config: "VllmConfig") -> None:
        """Check settings, features and artifact, and set vLLM's scheduler and worker classes to ours.

        Raises:
            BuddyError: with what was found, what is allowed and what to do; vLLM then refuses to start.
        """
        if vllm_version() not in TESTED_VLLM:
            logger.warning("vllm_buddy was tested with vLLM %s, this is %s", ", ".join(TESTED_VLLM), vllm_version())
        settings = with_device_settings(parse_settings(vllm_config.additional_config), vllm_config)
        refuse_unsupported(vllm_config)
        folder, artifact = _load_artifact(settings, vllm_config)
        check_schedule(settings, artifact)
        _check_lora_policy(settings, vllm_config)
        units = kv_units(settings, artifact, vllm_config)
        limits = RequestLimits.from_settings(settings, artifact, lossless=drafts_by_depth(vllm_config))
        _check_max_budget(limits, vllm_config)
        _check_drafts(settings, artifact, limits, vllm_config)
        settings = settings.model_copy(update={"artifact": str(folder)})
        _put_in_place(vllm_config, settings, artifact, limits, units)
        _log_summary(settings, artifact, limits, units)


def _load_artifact(settings: BuddySettings, vllm_config: "VllmConfig") -> tuple[Path, Artifact]:
    """The artifact and its folder: the one that the settings name, else the shipped one that fits.

    Raises:
        BuddyError: there is none, it cannot be read, or it does not belong to the model.
    """
    by_token = settings.schedule.by_token
    folder = resolve_artifact(settings.artifact, lambda: identify_served_model(vllm_config), by_token=by_token)
    artifact = load_artifact(folder)
    check_base_model(artifact, vllm_config, by_shape=settings.base_check == "shape")
    check_lora(artifact, vllm_config)
    if artifact.config.recipe is None:
        logger.warning(
            "artifact '%s' is untrained: its paths leave layers out and put nothing in their place, so that answers "
            "are poor well below budget 1 (docs/own_model.md)",
            artifact.config.name,
        )
    trained = artifact.config.budgets
    if trained is not None and (settings.min_budget or 0) < trained[0]:
        logger.info(
            "artifact '%s' was trained for budgets from %g up; smaller ones run untrained, min_budget refuses them",
            artifact.config.name,
            trained[0],
        )
    return folder, artifact


def _check_lora_policy(settings: BuddySettings, vllm_config: "VllmConfig") -> None:
    """Raise SettingsError where a KV policy would leave out the adapters of requests."""
    if vllm_config.lora_config is not None and settings.kv == KV_ONLY:
        raise SettingsError(
            "kv_policy: kv_only projects K and V of skipped layers by the base weights, without a request's adapter; "
            "with --enable-lora choose masked or zero"
        )


def _check_max_budget(limits: RequestLimits, vllm_config: "VllmConfig") -> None:
    """Raise SettingsError for a max_budget that a pipeline stage cannot have, and warn of one that saves nothing."""
    if limits.max_budget == 1.0:
        return
    _check_stages(limits, vllm_config.parallel_config.pipeline_parallel_size)
    if limits.layers.bit_count() == limits.num_layers:
        logger.warning(
            'max_budget %g saves no memory: paths up to it may hold any layer; "paths": "library" of an artifact with '
            "few paths, or a smaller max_budget, would",
            limits.max_budget,
        )


def _check_stages(limits: RequestLimits, num_stages: int) -> None:
    """Raise SettingsError for a pipeline stage without any layer: vLLM gives each of its workers a KV cache."""
    for stage in range(num_stages):
        layers = range(*get_pp_indices(limits.num_layers, stage, num_stages))
        if not any(limits.layers >> layer & 1 for layer in layers):
            raise SettingsError(
                f"max_budget {limits.max_budget:g} leaves no layer to pipeline stage {stage}, which has layers "
                f"{layers.start} to {layers.stop - 1}; lower --pipeline-parallel-size, or raise max_budget"
            )


def _check_drafts(
    settings: BuddySettings, artifact: Artifact, limits: RequestLimits, vllm_config: "VllmConfig"
) -> None:
    """Raise SettingsError for settings of drafts that cannot be had, or without anything that drafts."""
    if limits.lossless:
        drafts = DraftPasses.of(settings, artifact, vllm_config.model_config.hf_text_config)
        if drafts.refining is not None and vllm_config.speculative_config.num_speculative_tokens < 2:
            raise SettingsError(
                "drafts.refine_depth needs two drafts per step, because its pass adds one to those that it checks; "
                "start with `--lossless-drafts 2` or more, or leave it out"
            )
        logger.info("vllm_buddy: %s", drafts.summary(artifact))
    elif "drafts" in settings.model_fields_set:
        raise SettingsError("drafts: nothing drafts; start with `vllm-buddy serve --lossless-drafts N`")


def _put_in_place(
    vllm_config: "VllmConfig",
    settings: BuddySettings,
    artifact: Artifact,
    limits: RequestLimits,
    units: KVUnits | None,
) -> None:
    """Write what was found into vLLM's configuration, from which all processes read it.

    settings: with the artifact's folder.

    Raises:
        SettingsError: a compilation mode that cannot be had.
    """
    # Attributes of the config objects travel with them to every process; additional_config alone is hashed.
    vllm_config.additional_config = {
        **vllm_config.additional_config,
        # Without unset ones: what was not given must not look given to the process that reads this.
        CONFIG_KEY: settings.model_dump(exclude_unset=True),
    }
    attach(vllm_config.model_config, limits, units, served(vllm_config, artifact))
    vllm_config.scheduler_config.scheduler_cls = SCHEDULER
    vllm_config.parallel_config.worker_cls = CPU_WORKER if current_platform.is_cpu() else GPU_WORKER
    if vllm_config.speculative_config is not None:
        vllm_config.scheduler_config.async_scheduling = False  # vLLM decides after this hook; see refusals.py
    _configure_compilation(vllm_config)


def _configure_compilation(vllm_config: "VllmConfig") -> None:
    """On CPU keep vLLM's compilation mode, which is applied per layer. On a GPU switch off what fixes the layers.

    A model compiled as a whole, and vLLM's own CUDA graphs, replay a fixed list of layers; a path is another list.
    """
    compilation: Any = vllm_config.compilation_config
    if current_platform.is_cpu():
        if compilation.mode == CompilationMode.STOCK_TORCH_COMPILE:
            raise SettingsError("compilation mode STOCK_TORCH_COMPILE compiles the whole model; use the default or 0")
        return
    compilation.mode = CompilationMode.NONE
    compilation.cudagraph_mode = CUDAGraphMode.NONE


def _log_summary(settings: BuddySettings, artifact: Artifact, limits: RequestLimits, units: KVUnits | None) -> None:
    logger.info(
        "vllm_buddy: artifact %s (%s), KV policy %s, layout %s, kernels %s, CUDA graphs %s, default budget %s, "
        "from %g to %g%s%s",
        artifact.config.name,
        artifact.digest,
        settings.kv,
        "dense" if units is None else f"units of {units.num_classes} layers",
        settings.kernels or "none",
        "on" if settings.graphs.enabled else "off",
        limits.default_budget,
        limits.min_budget,
        limits.max_budget,
        f" on {limits.layers.bit_count()} of {limits.num_layers} layers" if limits.max_budget < 1.0 else "",
        "" if limits.auto is None else f', "auto" chooses {limits.auto.summary()}',
    )
    if (settings.load or settings.slo) and limits.default_budget != AUTO:
        logger.warning(
            'vllm_buddy: load and slo lower requests of budget "auto" only; those that name no budget run at '
            'default_budget %s; set it to "auto" to have them lowered too',
            limits.default_budget,
        )

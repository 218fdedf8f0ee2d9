"""What happens at server start: vLLM calls the config hook with the whole configuration, before any process starts."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm.config import CompilationMode, CUDAGraphMode
from vllm.logger import init_logger
from vllm.model_executor.models.config import VerifyAndUpdateConfig
from vllm.platforms import current_platform

from vllm_buddy.artifact import NO_WEIGHTS, Artifact, BaseModelIdentity, identify, load_artifact, resolve_artifact
from vllm_buddy.errors import ArtifactError, SettingsError, UnsupportedError
from vllm_buddy.method import smallest_budget
from vllm_buddy.serving.admission.chooser import auto_limits
from vllm_buddy.serving.admission.options import RequestLimits
from vllm_buddy.serving.compat import TESTED_VLLM, vllm_version
from vllm_buddy.serving.schedule import metrics
from vllm_buddy.serving.start.devices import with_device_settings
from vllm_buddy.serving.start.refusals import refuse_unsupported
from vllm_buddy.serving.start.settings import CONFIG_KEY, BuddySettings, parse_settings

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig

logger = init_logger(f"vllm.{__name__}")

SCHEDULER = "vllm_buddy.serving.schedule.scheduler.make_scheduler"
CPU_WORKER = "vllm_buddy.serving.worker.worker.BuddyCPUWorker"
GPU_WORKER = "vllm_buddy.serving.worker.worker.BuddyGPUWorker"

# Those that hand a model the tensors of its checkpoint, under their own names.
_MERGEABLE_FORMATS = (
    "auto",
    "hf",
    "safetensors",
    "pt",
    "npcache",
    "fastsafetensors",
    "instanttensor",
    "runai_streamer",
)


class BuddyModelConfig(VerifyAndUpdateConfig):
    """vLLM's per-architecture config hook (MODELS_CONFIG_MAP) for the routed models."""

    @staticmethod
    def verify_and_update_config(vllm_config: "VllmConfig") -> None:
        """Check settings, features and artifact; put our scheduler and worker in place.

        Raises:
            BuddyError: with what was found, what is allowed and what to do; vLLM then refuses to start.
        """
        if vllm_version() not in TESTED_VLLM:
            logger.warning("vllm_buddy was tested with vLLM %s, this is %s", ", ".join(TESTED_VLLM), vllm_version())
        settings = with_device_settings(parse_settings(vllm_config.additional_config), vllm_config)
        refuse_unsupported(vllm_config)
        folder = resolve_artifact(
            settings.artifact, lambda: _identify_served_model(vllm_config.model_config, vllm_config)
        )
        artifact = load_artifact(folder)
        check_base_model(artifact, vllm_config)
        check_lora(artifact, vllm_config)
        trained = artifact.config.budgets
        if trained is not None and (settings.min_budget or 0) < trained[0]:
            logger.info(
                "artifact '%s' was trained for budgets from %g up; smaller ones run untrained, min_budget refuses them",
                artifact.config.name,
                trained[0],
            )
        router = artifact.router(library=settings.library)
        num_layers = artifact.config.base_model.num_layers
        floor = smallest_budget(num_layers)
        min_budget = max(settings.min_budget or floor, floor)
        limits = RequestLimits(
            num_layers=num_layers,
            default_budget=settings.default_budget,
            min_budget=min_budget,
            depths=None if router.depths is None else tuple(router.depths),
            auto=auto_limits(settings, artifact, min_budget),
        )
        limits.resolve(None)  # the default must be allowed too
        # Attributes of the config objects travel with them to every process; additional_config alone is hashed.
        vllm_config.model_config.buddy_limits = limits
        vllm_config.additional_config = {
            **vllm_config.additional_config,
            # What was not given must not look given to the process that reads this.
            CONFIG_KEY: settings.model_copy(update={"artifact": str(folder)}).model_dump(exclude_unset=True),
        }
        vllm_config.scheduler_config.scheduler_cls = SCHEDULER
        vllm_config.parallel_config.worker_cls = CPU_WORKER if current_platform.is_cpu() else GPU_WORKER
        _configure_compilation(vllm_config)
        metrics.export_from_this_process(vllm_config.instance_id)
        logger.info(
            "vllm_buddy: artifact %s (%s), KV policy %s, kernels %s, CUDA graphs %s, default budget %s, smallest %g%s",
            artifact.config.name,
            artifact.digest,
            settings.kv_policy,
            settings.kernels or "none",
            "on" if settings.cuda_graphs else "off",
            limits.default_budget,
            limits.min_budget,
            "" if limits.auto is None else f', "auto" chooses {limits.auto.summary()}',
        )


def engine_settings(vllm_config: "VllmConfig") -> BuddySettings:
    """The settings as the hook left them, artifact resolved to a folder. For the engine's processes."""
    return parse_settings(vllm_config.additional_config)


def check_base_model(artifact: Artifact, vllm_config: "VllmConfig") -> None:
    """Refuse an artifact that was made for another model.

    Raises:
        ArtifactError: names both models.
    """
    wanted = artifact.config.base_model
    found = _identify_served_model(vllm_config.model_config, vllm_config)
    if not wanted.same_model(found):
        raise ArtifactError(
            f"artifact '{artifact.config.name}' was made for {wanted.summary()}, "
            f"but the model served is {found.summary()}"
        )
    num_layers = vllm_config.model_config.hf_text_config.num_hidden_layers
    if num_layers != wanted.num_layers:  # the files fit, but --hf-overrides cuts the model
        raise ArtifactError(
            f"artifact '{artifact.config.name}' was made for {wanted.summary()}, "
            f"but {num_layers} layers of it are to be served"
        )


def check_lora(artifact: Artifact, vllm_config: "VllmConfig") -> None:
    """Refuse to merge an artifact's LoRA into weights where that cannot be done.

    Raises:
        UnsupportedError: the weights are quantised, or vLLM loads them in a form of its own.
    """
    if artifact.lora is None:
        return
    what = f"artifact '{artifact.config.name}' changes the base weights (recipe {artifact.config.recipe}), which cannot"
    quantization = vllm_config.model_config.quantization
    if quantization is not None:
        raise UnsupportedError(
            f"{what} be done where they are quantised ({quantization}); serve the unquantised model, or an artifact "
            "with a bypass, which leaves the base weights alone"
        )
    load_format = vllm_config.load_config.load_format
    if load_format not in _MERGEABLE_FORMATS:
        raise UnsupportedError(
            f"{what} be done with --load-format {load_format}; use one of {', '.join(_MERGEABLE_FORMATS)}"
        )


def _identify_served_model(model_config: "ModelConfig", vllm_config: "VllmConfig") -> BaseModelIdentity:
    name = str(model_config.model)
    if vllm_config.load_config.load_format == "dummy":
        hf_config = model_config.hf_text_config
        return BaseModelIdentity(
            id=name,
            architecture=model_config.architectures[0],
            num_layers=hf_config.num_hidden_layers,
            hidden_size=hf_config.hidden_size,
            vocab_size=hf_config.vocab_size,
            fingerprint=NO_WEIGHTS,
        )
    folder = Path(name)
    if not folder.is_dir():
        from vllm.model_executor.model_loader.weight_utils import download_weights_from_hf

        # vLLM's worker downloads the same files a moment later, into the same cache.
        folder = Path(
            download_weights_from_hf(
                name, vllm_config.load_config.download_dir, ["*.safetensors", "config.json"], model_config.revision
            )
        )
    return identify(folder, name=name)


def _configure_compilation(vllm_config: "VllmConfig") -> None:
    """On CPU keep vLLM's compilation mode: it is applied per layer. Elsewhere layers run as they are, in our graphs.

    A compiled whole model and vLLM's CUDA graphs replay a fixed list of layers, which a path is not.
    """
    compilation: Any = vllm_config.compilation_config
    if current_platform.is_cpu():
        if compilation.mode == CompilationMode.STOCK_TORCH_COMPILE:
            raise SettingsError("compilation mode STOCK_TORCH_COMPILE compiles the whole model; use the default or 0")
        return
    compilation.mode = CompilationMode.NONE
    compilation.cudagraph_mode = CUDAGraphMode.NONE

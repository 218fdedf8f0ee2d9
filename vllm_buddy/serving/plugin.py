"""Entry point of group `vllm.general_plugins`. vLLM calls register() once in each of its processes."""

import logging
import os

DISABLE_VARIABLE = "VLLM_BUDDY_DISABLE"


def register() -> None:
    """Make `--model-impl buddy` known to vLLM. Idempotent; without that option nothing changes for vLLM.

    vLLM accepts any string for --model-impl and would serve the stock model under a name it does not know.
    So if the plugin is switched off or cannot be loaded, what is registered is a refusal with the reason.
    """
    if os.environ.get(DISABLE_VARIABLE, "0") not in ("", "0"):
        _refuse(f"vllm_buddy is switched off by {DISABLE_VARIABLE}; unset it")
        return
    try:
        from vllm_buddy.serving import patches

        patches.apply()
    except Exception as error:  # anything: the alternative is serving the wrong model
        # Not raised: vLLM would end, for a model that does not ask for routing too.
        reason = f"the vllm_buddy plugin failed to load ({type(error).__name__}: {error}); run `vllm-buddy doctor`"
        logging.getLogger("vllm.vllm_buddy").warning("--model-impl buddy will be refused: %s", reason)
        _refuse(reason)


def _refuse(reason: str) -> None:
    """Make vLLM refuse `--model-impl buddy`. Stands alone: it must work when the rest cannot be imported."""
    from vllm.model_executor.models.registry import _ModelRegistry

    normalize_arch = _ModelRegistry._normalize_arch

    def refuse_buddy(self, architecture, model_config):  # type: ignore[no-untyped-def]
        if getattr(model_config, "model_impl", None) == "buddy":
            raise ValueError(f"--model-impl buddy was asked for, but {reason}.")
        return normalize_arch(self, architecture, model_config)

    _ModelRegistry._normalize_arch = refuse_buddy

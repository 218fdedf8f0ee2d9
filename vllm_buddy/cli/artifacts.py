"""`vllm-buddy artifacts`: lists the artifacts that come with the package."""

import argparse

from vllm_buddy.artifact import load_artifact, shipped_artifacts
from vllm_buddy.artifact.config import BuddyConfig
from vllm_buddy.errors import ArtifactError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add nothing."""
    del parser  # the command has no options


def run(args: argparse.Namespace) -> int:
    """Print each shipped artifact with what it holds; returns 0.

    Raises:
        ArtifactError: the installation has no artifacts, or one of them cannot be read.
    """
    del args
    blocks = []
    for name, folder in shipped_artifacts().items():
        config = load_artifact(folder).config
        paths = "trained Decision Module" if config.has_decision_module else f"{config.prior.indicator} prior alone"
        model = f"{config.base_model.id}, fingerprint {config.base_model.fingerprint}"
        about = {"base model": model, "paths follow": paths, "trained": _trained(config)}
        blocks.append("\n".join([name, *(f"  {key + ':':<13} {value}" for key, value in about.items())]))
    if not blocks:
        raise ArtifactError("this installation has no artifacts; install the package again, from a wheel or git")
    print("\n\n".join(blocks))
    return 0


def _trained(config: BuddyConfig) -> str:
    """Describe what the artifact has besides the routing, and the budgets that it is trained for."""
    parts = [f"recipe {config.recipe}"] if config.recipe else []
    if config.bypass_rank:
        parts.append(f"bypass of rank {config.bypass_rank}")
    if config.lora is not None:
        parts.append(f"LoRA of rank {config.lora.rank}, merged")
    if config.token is not None:
        parts.append(f"depths per token: {', '.join(str(len(path)) for path in config.token.paths)}")
    if config.predictor is not None:
        parts.append(f"budget auto among {len(config.predictor.depths)} depths")
    if config.drafts is not None:
        among = "" if config.drafts.vocabulary is None else f" among {config.drafts.vocabulary} tokens"
        parts.append(f"draft exits of {', '.join(str(len(layers)) for layers in config.drafts.exits)} layers{among}")
    if config.budgets is not None:
        parts.append("budgets {:g} to {:g}".format(*config.budgets))
    return "; ".join(parts) or "nothing"

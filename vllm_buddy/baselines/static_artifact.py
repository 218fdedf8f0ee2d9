"""Makes artifacts without trained parts: the base model and a fixed set of layers per depth."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from vllm_buddy.artifact import Artifact
from vllm_buddy.artifact.config import FORMAT_VERSION, BuddyConfig, PriorConfig
from vllm_buddy.artifact.fingerprint import BaseModelIdentity
from vllm_buddy.baselines.base import static_path, static_prior
from vllm_buddy.method import LayerPath, layers_of
from vllm_buddy.method.budget import MIN_DEPTH


def bare_artifact(name: str, base: BaseModelIdentity, prior: PriorConfig | None = None) -> Artifact:
    """Return an artifact with an all-zero prior and nothing trained. prior: the recorded origin of the prior."""
    config = BuddyConfig(
        format_version=FORMAT_VERSION,
        name=name,
        base_model=base,
        prior=prior or PriorConfig(indicator=name, calibration="none", num_tokens=0),
        has_decision_module=False,
    )
    return Artifact(config, np.zeros(base.num_layers - 2, dtype=np.float32))


def with_fixed_paths(artifact: Artifact, paths: Mapping[int, LayerPath]) -> Artifact:
    """Return `artifact` with a library of one path per depth instead of its Decision Module.

    Its Budget Predictor, which chooses among more depths, is left out.
    """
    artifact = artifact.without_predictor()
    num_layers = artifact.config.base_model.num_layers
    library = {depth: [layers_of(path)] for depth, path in paths.items() if depth < num_layers}
    config = artifact.config.model_copy(update={"library": library, "has_decision_module": False})
    return replace(artifact, config=config, decision=None)


def static_artifact(
    name: str, base: BaseModelIdentity, order: Sequence[int], prior: PriorConfig | None = None
) -> Artifact:
    """Return an artifact that removes layers in `order`, at every depth (see static_path).

    The path of a request never changes. The prior agrees with the library, so an engine that does not use the library
    runs the same layers.

    prior: the recorded origin of the order.
    """
    paths = {depth: static_path(order, depth) for depth in range(MIN_DEPTH, base.num_layers)}
    fixed = with_fixed_paths(bare_artifact(name, base, prior), paths)
    config = fixed.config.model_copy(update={"route_every": 0})
    return replace(fixed, config=config, prior=static_prior(order))

"""The artifact that a run of stage 1 leaves."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from vllm_buddy.artifact import Artifact, with_drafts
from vllm_buddy.artifact.config import FORMAT_VERSION, BuddyConfig, LoraConfig, PriorConfig
from vllm_buddy.artifact.fingerprint import BaseModelIdentity
from vllm_buddy.baselines import static_prior
from vllm_buddy.method import FoldedDecision
from vllm_buddy.method.router import OMEGA
from vllm_buddy.training.repair import Repair
from vllm_buddy.training.stage1_settings import Stage1Settings
from vllm_buddy.training.start import LEARNED, SEARCHED, Start


def trained_artifact(
    settings: Stage1Settings,
    base: BaseModelIdentity,
    start: Start,
    repair: Repair,
    folded: FoldedDecision | None,
    library: Mapping[int, list[list[int]]],
) -> Artifact:
    """The artifact of a run: what was trained, and what the artifact had that the run started from.

    start: of the run. folded: the Decision Module, None without one. library: layers of the paths of each depth.
    """
    bypass, deltas = repair.bypass(), repair.deltas()
    prior = PriorConfig(indicator=settings.prior, calibration="as `vllm-buddy orders` has it", num_tokens=0)
    if settings.paths == SEARCHED:
        names = ", ".join(source.name for source in settings.data)
        prior = PriorConfig(indicator="searched", calibration=names, num_tokens=settings.search_tokens)
    elif settings.paths != LEARNED:
        prior = prior.model_copy(update={"indicator": settings.paths})
    config = BuddyConfig(
        format_version=FORMAT_VERSION,
        name=settings.name or settings.out.absolute().name,
        base_model=base,
        prior=prior,
        omega=OMEGA,
        has_decision_module=folded is not None,
        library=None if settings.paths == LEARNED else dict(library),
        route_every=settings.decide_every,
        recipe=settings.recipe,
        budgets=(settings.min_budget, 1.0),
        bypass_rank=bypass.rank if bypass is not None else 0,
        bypass_eps=bypass.eps if bypass is not None else 0.0,
        lora=LoraConfig(rank=deltas.rank, alpha=deltas.alpha) if deltas is not None else None,
    )
    rounded = None if bypass is None else bypass.rounded()
    if start.artifact is None:
        return Artifact(config, static_prior(start.order), folded, rounded, deltas)
    # All that is not trained here stays as it was, but a Budget Predictor knows the losses with another bypass, and
    # adapters the states after it.
    kept = start.artifact.without_predictor().without_drafts()
    update: dict[str, Any] = {"name": config.name, "budgets": config.budgets, "token": None}
    if settings.decide_every is not None:
        update["route_every"] = settings.decide_every
    if folded is not None:
        update["has_decision_module"] = True
    if settings.paths == LEARNED:  # the module was trained to choose any layers
        update["library"] = None
    decision = kept.decision if folded is None else folded
    return dataclasses.replace(
        kept, config=kept.config.model_copy(update=update), decision=decision, bypass=rounded, token=None
    )


def with_kept(artifact: Artifact, before: Artifact, settings: Stage1Settings) -> Artifact:
    """Add what an artifact had that is of use with another bypass of the same paths.

    Draft exits with bypasses of their own depend on the base model alone. The Budget Predictor reads prompts, and goes
    on choosing as it did.
    """
    if before.predictor is not None and settings.schedule == "request":
        config = artifact.config.model_copy(update={"predictor": before.config.predictor})
        artifact = dataclasses.replace(artifact, config=config, predictor=before.predictor)
    if before.drafts and before.drafts[0].bypass is not None:
        artifact = with_drafts(artifact, before.drafts, before.draft_vocabulary)
    return artifact

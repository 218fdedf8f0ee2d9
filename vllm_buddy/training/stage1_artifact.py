"""The artifact that a run of stage 1 leaves."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from vllm_buddy.artifact import Artifact, with_drafts
from vllm_buddy.artifact.config import FORMAT_VERSION, BuddyConfig, LoraConfig, PriorConfig
from vllm_buddy.artifact.files import one_line
from vllm_buddy.artifact.fingerprint import LONGEST_LINE, BaseModelIdentity
from vllm_buddy.baselines import static_prior
from vllm_buddy.errors import TrainingError, cut
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
    config = BuddyConfig(
        **_described(settings, base),
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
    if settings.base_model_id is not None:
        update["base_model"] = base
    if folded is not None:
        update["has_decision_module"] = True
    if settings.paths == LEARNED:  # the module was trained to choose any layers
        update["library"] = None
    decision = kept.decision if folded is None else folded
    return dataclasses.replace(
        kept, config=kept.config.model_copy(update=update), decision=decision, bypass=rounded, token=None
    )


def check_described(settings: Stage1Settings, base: BaseModelIdentity) -> None:
    """Raise a TrainingError for settings with which the artifact could not be saved, which is the end of a run."""
    try:
        BuddyConfig(
            **_described(settings, base),
            has_decision_module=False,
            lora=None if settings.recipe == "bypass" else LoraConfig(rank=settings.rank, alpha=settings.lora_alpha),
        )
    except ValidationError as error:
        raise TrainingError(f"these settings describe no artifact: {one_line(error)}") from None


def _described(settings: Stage1Settings, base: BaseModelIdentity) -> dict[str, Any]:
    """What the configuration of the artifact says of where it comes from."""
    prior = PriorConfig(indicator=settings.prior, calibration="as `vllm-buddy orders` has it", num_tokens=0)
    if settings.paths == SEARCHED:
        names = cut(", ".join(source.name for source in settings.data), LONGEST_LINE)
        prior = PriorConfig(indicator="searched", calibration=names, num_tokens=settings.search_tokens)
    elif settings.paths != LEARNED:
        prior = prior.model_copy(update={"indicator": settings.paths})
    name = settings.name or settings.out.absolute().name
    return {"format_version": FORMAT_VERSION, "name": name, "base_model": base, "prior": prior}


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

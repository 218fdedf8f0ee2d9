"""Plans an evaluation: reads and checks data, artifacts and budgets before any model is loaded."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from vllm_buddy.artifact import load_artifact, resolve_artifact
from vllm_buddy.artifact.fingerprint import BaseModelIdentity, identify
from vllm_buddy.artifact.provenance import trained_share
from vllm_buddy.baselines import MEASURED, OrderFile, layer_order, measure_order, shipped_orders
from vllm_buddy.errors import BaselineError, EvaluationError
from vllm_buddy.evaluation.choices import ChoiceRow, read_choices
from vllm_buddy.evaluation.engine import Report, Variant
from vllm_buddy.evaluation.eval_settings import EvalSettings
from vllm_buddy.evaluation.policy import (
    DENSE,
    FROZEN,
    FULL_PROMPT,
    PROMPT_ONLY,
    SHUFFLED,
    TOKEN,
    Policy,
    PolicySpec,
    dense_policy,
    static_policy,
)
from vllm_buddy.evaluation.sample import Sample
from vllm_buddy.evaluation.windows import text_samples
from vllm_buddy.importance import CalibrationText
from vllm_buddy.method import TokenSchedule, depth_for_budget
from vllm_buddy.method.kv_policy import ZERO
from vllm_buddy.models.folder import load_config, load_tokenizer


@dataclass(frozen=True)
class EvalPlan:
    """The samples of an evaluation and the variants that score them.

    variants: the unrouted model first. windows: of the text; empty without one. choices: two samples for each of
    `rows`, in their order. warnings: lines about text that an artifact was trained on.
    """

    model_dir: Path
    variants: list[Variant]
    windows: list[Sample]
    rows: list[ChoiceRow]
    choices: list[Sample]
    warnings: list[str] = field(default_factory=list)

    @property
    def samples(self) -> list[Sample]:
        return [*self.windows, *self.choices]


def make_plan(settings: EvalSettings, model_dir: Path, report: Report) -> EvalPlan:
    """Read data and artifacts and make the plan.

    report: shows progress of measuring layer orders. That is done last, because only that needs the model.

    Raises:
        BuddyError: data, artifact, policy or budget cannot be used.
    """
    text = None if settings.text is None else CalibrationText.read(settings.text)
    rows = [] if settings.piqa is None else read_choices(settings.piqa, settings.piqa_rows or None)
    base = identify(model_dir)
    depths = [depth_for_budget(budget, base.num_layers) for budget in settings.budgets]
    find_order = _orders(settings, base, model_dir, text, report)
    specs = [spec for spec in settings.policy if spec.base_name != DENSE]
    routed = {spec.name: _routed_policy(spec, settings, base, depths) for spec in specs if not spec.is_static}
    tokenizer = load_tokenizer(model_dir)
    plan = EvalPlan(
        model_dir,
        [Variant(dense_policy(base), 1.0, base.num_layers)],
        [] if text is None else _windows(text, tokenizer, settings),
        rows,
        [sample for row in rows for sample in row.samples(tokenizer)],
    )
    _check_lengths(plan.samples, settings, load_config(model_dir).max_position_embeddings)
    if text is not None:
        plan.warnings.extend(_seen(specs, settings, base, text, tokenizer))
    for spec in specs:
        policy = static_policy(spec.name, base, find_order(spec.name)) if spec.is_static else routed[spec.name]
        if spec.variant == FROZEN:
            policy = policy.frozen(plan.samples, depths)
        plan.variants.extend(Variant(policy, budget, depth) for budget, depth in zip(settings.budgets, depths))
    return plan


def _folder(spec: PolicySpec, settings: EvalSettings, base: BaseModelIdentity) -> Path:
    by_token = spec.variant in (TOKEN, SHUFFLED)
    return spec.folder or resolve_artifact(settings.artifact, lambda: base, by_token=by_token)


def _seen(
    specs: Sequence[PolicySpec], settings: EvalSettings, base: BaseModelIdentity, text: CalibrationText, tokenizer: Any
) -> list[str]:
    """A warning for each artifact that was trained on a part of what is evaluated of `text`."""
    folders = {_folder(spec, settings, base): spec.name for spec in specs if not spec.is_static}
    shares = {name: trained_share(folder, text.sha256) for folder, name in folders.items()}
    if not any(shares.values()):
        return []
    num_tokens = len(_token_ids(text, tokenizer))
    return [
        f"warning: policy '{name}' was trained on the first {share:.0%} of {text.name}, {int(share * num_tokens)} "
        f"tokens, and --text-skip {settings.text_skip} evaluates it on some; skip all of them for text that is new"
        for name, share in shares.items()
        if settings.text_skip < int(share * num_tokens)
    ]


def _routed_policy(spec: PolicySpec, settings: EvalSettings, base: BaseModelIdentity, depths: list[int]) -> Policy:
    by_token = spec.variant in (TOKEN, SHUFFLED)
    artifact = load_artifact(_folder(spec, settings, base))
    artifact.require_base(base, EvaluationError, where=f"policy '{spec.name}': ")
    schedule = artifact.schedule(0 if spec.variant == PROMPT_ONLY else settings.route_every)
    policy = Policy(spec.name, artifact, schedule, settings.library, full_prompt=spec.variant == FULL_PROMPT)
    if by_token:
        return _token_policy(policy, settings, depths, shuffled=spec.variant == SHUFFLED)
    allowed = policy.router.depths
    for budget, depth in zip(settings.budgets, depths):
        if allowed is not None and depth not in (*allowed, base.num_layers):
            raise EvaluationError(
                f"policy '{spec.name}': budget {budget:g} is {depth} layers, for which the path library has no path; "
                f"it has paths of {', '.join(map(str, allowed))} layers"
            )
    return policy


def _token_policy(policy: Policy, settings: EvalSettings, depths: list[int], *, shuffled: bool) -> Policy:
    """The policy with a path for each token."""
    router = policy.artifact.token
    if router is None:
        raise EvaluationError(f"policy '{policy.name}': the artifact has no nested paths for the schedule token")
    if low := [depth for depth in depths if depth < router.depths[0]]:
        raise EvaluationError(
            f"policy '{policy.name}': a mean of {low[0]} layers is below its shallowest path, {router.depths[0]} layers"
        )
    if settings.kv_policy == ZERO:
        raise EvaluationError(f"policy '{policy.name}': the schedule token needs the KV policy kv_only or masked")
    return replace(policy, tokens=TokenSchedule(), shuffled=shuffled)


def _check_lengths(samples: Sequence[Sample], settings: EvalSettings, most: int) -> None:
    needed = max(len(sample.token_ids) for sample in samples) + (settings.engine == "vllm")  # which generates a token
    if needed > most:
        raise EvaluationError(f"the longest sample needs {needed} positions, the model has {most}; lower --window")


def _token_ids(text: CalibrationText, tokenizer: Any) -> list[int]:
    # Not verbose: tokenizers warn of texts beyond the model's length, but this one is cut into windows.
    return tokenizer(text.text, add_special_tokens=False, verbose=False)["input_ids"]


def _windows(text: CalibrationText, tokenizer: Any, settings: EvalSettings) -> list[Sample]:
    ids = _token_ids(text, tokenizer)[settings.text_skip :]
    ids = ids[: settings.text_tokens or None]
    return text_samples(ids, settings.window, settings.window_stride, settings.context)


def _orders(
    settings: EvalSettings, base: BaseModelIdentity, model_dir: Path, text: CalibrationText | None, report: Report
) -> Callable[[str], list[int]]:
    """Return a function from static method to layer order, after checking that all orders are on file or measurable."""
    files = shipped_orders() if settings.orders is None else [OrderFile.load(settings.orders)]
    calibration = None if settings.calibration is None else CalibrationText.read(settings.calibration)
    orders = {}
    advice = "name FILE with --orders, or give a text to measure it on with --calibration"
    for spec in settings.policy:
        if not spec.is_static:
            continue
        try:
            orders[spec.name] = layer_order(spec.name, base, seed=settings.seed, files=files, advice=advice)
        except BaselineError as error:
            if calibration is None:
                raise EvaluationError(str(error)) from None
            used = MEASURED[spec.name].tokens
            if text is not None and calibration.sha256 == text.sha256 and settings.text_skip < used:
                raise EvaluationError(
                    f"the order of '{spec.name}' would be measured on the first {used} tokens of the text that is "
                    "evaluated; name another file with --calibration, or skip these with --text-skip"
                ) from None

    def find(name: str) -> list[int]:
        if name not in orders:
            assert calibration is not None
            orders[name] = measure_order(name, model_dir, calibration, report=report).layers
        return orders[name]

    return find

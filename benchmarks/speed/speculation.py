"""Measures what drafts add to routing, and what routing adds to drafts.

    python -m benchmarks.speed.speculation          # SmolLM2-135M on CPU: about 25 minutes on 2 cores

Stock vLLM and buddy run with and without n-gram drafts, in one process, and so does lossless mode: drafts from short
paths of the model's own layers, always, as the pace allows, and where no n-gram is found. Depths are those of the
artifact's draft exits, and paths those that its router picks. Engines alternate in each round. Prompts are passages of
prose; one task is answered by copying, the other is not.

Before a variant is timed, what it computes is compared with a plain forward; a lossless answer must consist of greedy
choices of the whole model, up to bf16's rounding. `tokens_per_s` counts all tokens after the first of each request,
over the time from the first token of a batch to its last; `over_stock` and `over_ngram` are its ratios to stock vLLM
without and with n-grams. `accepted_per_step` is the number of drafts that a step of a request accepts on average.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import engines
from benchmarks.harness.engines import Variant
from benchmarks.harness.lineup import NUM_DRAFTS, Lineup, add_lineup_options, open_lineup
from benchmarks.harness.real_prompts import TASKS, draw_prompts, passages
from benchmarks.harness.reference_check import NUM_CHECKED
from benchmarks.harness.result_rows import RESULTS_DIR, device, environment, report
from benchmarks.harness.rounds import Refused, Rounds, add_rounds_option, in_turn, positive_int
from benchmarks.peers.greedy_check import BFLOAT16_GAP, GreedyCheck, LayersRun, num_agreed
from vllm_buddy.artifact import load_artifact
from vllm_buddy.method.path import full_path
from vllm_buddy.models.folder import load_tokenizer
from vllm_buddy.serving.schedule.draft_pace import Drafting, DraftPasses
from vllm_buddy.serving.start.setting_sections import DraftSettings
from vllm_buddy.serving.start.settings import BuddySettings

NUM_TOKENS = 64
NUM_PROMPTS = 8  # of a round, in batches: how fast one prompt is copied says little
BUDGETS = (0.75, 0.5)
LEAST_AGREED = 24  # tokens before bf16's rounding leads to another text: the mean over the prompts
STOCK, STOCK_NGRAM = "stock", "stock, n-gram"
NGRAM = {"method": "ngram", "num_speculative_tokens": NUM_DRAFTS, "prompt_lookup_max": 3, "prompt_lookup_min": 1}


@dataclass(kw_only=True)
class Drafted(Variant):
    """Requests of the drafting engine. ngrams: whether those are used.

    drafts: in lossless mode, where drafts come from; None: not in lossless mode. most: draft passes after a step.
    paced: whether the scheduler decides how many drafts there are; else there are as many as there may be.
    pace: what the scheduler knows of this variant's drafts, as if it had a server of its own.
    """

    ngrams: bool
    drafts: DraftPasses | None = None
    most: int = NUM_DRAFTS
    paced: bool = True
    pace: Drafting | None = None

    @property
    def extra_args(self) -> dict[str, Any] | None:
        return super().extra_args if self.drafts is None else {"buddy_mode": "lossless"}

    def prepare(self) -> None:
        """Set where drafts come from, beside router and schedule."""
        super().prepare()
        core = engines.core(self.llm)
        drafter = core.model_executor.driver_worker.worker.model_runner.drafter
        drafter.kept_ngrams = getattr(drafter, "kept_ngrams", drafter._ngrams)
        drafter._ngrams = drafter.kept_ngrams if self.ngrams else None
        if self.pace is None:
            row_cost = None if self.paced else 0.0  # with cost 0 too, the most drafts gain the most
            own = core.scheduler._drafts.drafting
            settings = own.settings.model_copy(update={"row_cost": row_cost, "most": self.most})
            self.pace = Drafting(self.drafts or own.passes, settings, NUM_DRAFTS)
        drafter.use(self.pace.passes)
        core.scheduler._drafts.drafting = self.pace


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speed.speculation",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--batch", type=positive_int, nargs="+", default=[1, 4, 8])
    add_rounds_option(parser, 7)
    parser.add_argument("--out", type=Path, default=RESULTS_DIR / f"{device()}_speculation.jsonl")
    add_lineup_options(parser)
    args = parser.parse_args()
    env = environment()
    with open_lineup(args) as lineup:
        rows = measure(lineup, args.batch, args.rounds)
    report(args.out, rows, env)


def measure(lineup: Lineup, batches: Sequence[int], num_rounds: int) -> list[dict[str, Any]]:
    """Check all variants, time them, and return one row per figure."""
    variants = _variants(lineup)
    tokenizer, texts = load_tokenizer(lineup.model), passages()
    rng = np.random.default_rng(0)
    checked = [draw_prompts(tokenizer, task, texts, rng, NUM_CHECKED // 2) for task in TASKS]
    _check(lineup, variants, [prompt for prompts in checked for prompt in prompts])
    rows = []
    for task in TASKS:
        for batch in batches:
            rounds = Rounds(num_rounds)
            rounds.mark_checked([variant.name for variant in variants])
            for index in range(-1, num_rounds):  # round -1 warms up
                prompts = draw_prompts(tokenizer, task, texts, rng, max(batch, NUM_PROMPTS))
                groups = [prompts[start : start + batch] for start in range(0, len(prompts), batch)]
                for variant in in_turn(variants, index):
                    figures = _timed(variant, groups)
                    if index >= 0:
                        rounds.add(index, variant.name, **figures)
            for variant in variants:
                about = {"variant": variant.name, "task": task, "batch": batch, "layers": variant.layers}
                about |= {"budget": variant.budget, **lineup.about()}
                found = {
                    "tokens_per_s": rounds.values("tokens_per_s", variant.name),
                    "over_stock": rounds.ratio("tokens_per_s", variant.name, STOCK),
                    "over_ngram": rounds.ratio("tokens_per_s", variant.name, STOCK_NGRAM),
                    "accepted_per_step": rounds.values("accepted_per_step", variant.name),
                }
                rows += [rounds.row(metric, values, **about) for metric, values in found.items()]
    return rows


def _variants(lineup: Lineup) -> list[Variant]:
    """All variants, and their engines started."""
    whole, schedule = full_path(lineup.num_layers), lineup.artifact.schedule()
    found: list[Variant] = [lineup.stock()]
    routed = [lineup.routed(budget, own_paths=True, schedule=schedule) for budget in (1.0, *BUDGETS)]
    found += routed
    with _numba_hidden():
        drafting = lineup.drafting
    common: dict[str, Any] = {"llm": drafting, "router": lineup.artifact.router(), "schedule": schedule}
    for one in routed:
        name, layers = f"{one.name}, n-gram", one.layers
        found.append(Drafted(name=name, layers=layers, budget=one.budget, ngrams=True, **common))

    def lossless(name: str, **how: Any) -> Drafted:
        return Drafted(name=f"lossless, {name}", layers=lineup.num_layers, budget=1.0, **common, **how)

    def always(name: str, drafts: DraftPasses, most: int) -> Drafted:
        refining = drafts.refining and replace(drafts.refining, cost=0.0)
        free = replace(drafts, drafting=replace(drafts.drafting, cost=0.0), refining=refining)
        return lossless(f"always {name}", ngrams=False, drafts=free, most=most, paced=False)

    exits = [draft.path.bit_count() for draft in lineup.artifact.drafts]
    for depth in exits:
        found.append(always(f"1 draft of {depth} layers", _draft_passes(lineup, depth=depth), 1))
    if lineup.artifact.draft_vocabulary is not None:
        among_all = _draft_passes(lineup, vocabulary="all")
        found.append(always(f"1 draft of {among_all.drafting.path.bit_count()} layers, all tokens", among_all, 1))
    drafts = _draft_passes(lineup)
    found.append(always(f"3 drafts of {drafts.drafting.path.bit_count()} layers", drafts, 3))
    if len(exits) > 1:
        refined = _draft_passes(lineup, refine_depth=exits[1])
        found.append(always(f"2 drafts of {exits[0]} layers, refined by {exits[1]}", refined, 2))
    found.append(lossless("as it pays", ngrams=False, drafts=drafts))
    found.append(lossless("n-gram, then as it pays", ngrams=True, drafts=drafts))
    with _numba_hidden():
        engine = engines.start_engine(str(lineup.model), speculative_config=NGRAM)
    found.insert(1, Variant(name=STOCK_NGRAM, layers=lineup.num_layers, path=whole, llm=engine))
    return found


def _draft_passes(lineup: Lineup, **drafts: Any) -> DraftPasses:
    settings = BuddySettings(drafts=DraftSettings(**drafts))
    artifact = load_artifact(Path(engines.core(lineup.drafting).vllm_config.additional_config["buddy"]["artifact"]))
    hf_config = engines.core(lineup.drafting).vllm_config.model_config.hf_text_config
    return DraftPasses.of(settings, artifact, hf_config)


def _check(lineup: Lineup, variants: Sequence[Variant], prompts: Sequence[list[int]]) -> None:
    """Raise Refused if a variant computes something else than a plain forward.

    vLLM allows no forced token beside drafts, so a lossy variant with drafts is compared with the same one without.
    """
    drafts = [variant for variant in variants if isinstance(variant, Drafted) or variant.name == STOCK_NGRAM]
    lineup.check([variant for variant in variants if variant not in drafts], list(prompts), Rounds(1))
    greedy = GreedyCheck.load(lineup.model)
    answers = {variant.name: engines.decode(variant, prompts, NUM_TOKENS).token_ids for variant in variants}
    for variant in variants:
        if variant.layers == lineup.num_layers:
            greedy.check(variant.name, prompts, answers[variant.name], LayersRun(), BFLOAT16_GAP)
        elif variant in drafts:
            pairs = zip(answers[variant.name], answers[variant.name.removesuffix(", n-gram")])
            agreed = [num_agreed(ours, without) for ours, without in pairs]
            if np.mean(agreed) < LEAST_AGREED:
                raise Refused(f"{variant.name} agrees with the same without drafts on {agreed} tokens only")


def _timed(variant: Variant, groups: Sequence[Sequence[list[int]]]) -> dict[str, float]:
    """Decode groups of prompts, one after the other, each as one batch."""
    num_tokens, all_ms, accepted = 0, 0.0, []
    for prompts in groups:
        run = engines.decode(variant, prompts, NUM_TOKENS)
        ends = np.cumsum(run.all_ms)
        # From the first token of a batch to its last: requests whose drafts are wrong end later than others.
        all_ms += ends[max(steps[-1] for steps in run.token_steps)] - ends[min(steps[0] for steps in run.token_steps)]
        num_tokens += sum(len(tokens) - 1 for tokens in run.token_ids)
        num_steps = [len(steps) - 1 for steps in run.token_steps]
        accepted += [(len(tokens) - 1) / num - 1 for tokens, num in zip(run.token_ids, num_steps)]
    return {"tokens_per_s": 1e3 * num_tokens / float(all_ms), "accepted_per_step": float(np.mean(accepted))}


@contextmanager
def _numba_hidden() -> Iterator[None]:
    """Start an engine beside one that drafts n-grams.

    vLLM 0.32 looks for kernels in all loaded modules, and fails on one that numba, which n-gram drafting uses, loads.
    """
    hidden = {name: module for name, module in sys.modules.items() if name.split(".")[0] in ("llvmlite", "numba")}
    for name in hidden:
        del sys.modules[name]
    try:
        yield
    finally:
        sys.modules.update(hidden)


if __name__ == "__main__":
    main()

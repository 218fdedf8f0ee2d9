"""Measures what choosing depths per token is worth, on text that training has not seen, one kind of text at a time.

    python -m benchmarks.quality.routing_worth RECIPE ... --data-dir DATA      # about 6 minutes on 2 cores

RECIPE is the recipe of the artifact's training; several, if it was trained on. From each file of the first one it takes
windows that none of them used (the training of the artifact which they start from may have). The divergence from the
full model is measured with depths chosen per token (`token`), with the same depths dealt to the tokens of each window
at random (`shuffled`), and with one depth for all tokens, on the paths of the artifact's router (`constant`), all with
the same bypasses and under `kv_only`. Rows of `gain` are the difference to `token` in nats per token. Its standard
error is over windows, of the differences within each window.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.harness.result_rows import RESULTS_DIR, environment, write_rows
from benchmarks.harness.rounds import Refused, at_least
from vllm_buddy.artifact import SHIPPED_DIR, load_artifact
from vllm_buddy.errors import EvaluationError
from vllm_buddy.evaluation import HfEngine, Policy, Sample, Task, Variant
from vllm_buddy.method import PathSchedule, TokenSchedule, depth_for_budget
from vllm_buddy.method.kv_policy import KV_ONLY
from vllm_buddy.models.embedded import DEFAULT_MODEL, fetch
from vllm_buddy.models.folder import load_model, load_tokenizer
from vllm_buddy.training.corpus import Corpus
from vllm_buddy.training.sources import DataSource
from vllm_buddy.training.stage1_settings import Stage1Settings

BUDGETS = (0.875, 0.75, 0.5)
CONTEXT = 64  # tokens of a window that are not scored


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality.routing_worth",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("recipes", type=Path, nargs="+", metavar="RECIPE")
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--artifact", type=Path, default=SHIPPED_DIR / f"{DEFAULT_MODEL}-token")
    parser.add_argument("--budgets", type=float, nargs="+", default=BUDGETS)
    parser.add_argument("--windows", type=at_least(2), default=16, help="of each kind of text")
    parser.add_argument(
        "--skip", nargs="*", default=["sampled.jsonl"], metavar="FILE", help="files that are not measured on"
    )
    parser.add_argument("--out", type=Path, default=RESULTS_DIR / "quality_routing.jsonl")
    args = parser.parse_args()
    env = environment("cpu")
    rows = measure(args)
    write_rows(args.out, rows, env)
    for row in rows:
        print("  ".join(str(value) for value in row.values()))


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Return one row per kind of text, depth, policy and figure."""
    artifact = load_artifact(args.artifact)
    if artifact.token is None:
        raise Refused(f"artifact '{artifact.config.name}' has no schedule `token`")
    engine = HfEngine(load_model(fetch(), torch.bfloat16), KV_ONLY)
    policies = [
        Policy("token", artifact, PathSchedule(0), tokens=TokenSchedule()),
        Policy("shuffled", artifact, PathSchedule(0), tokens=TokenSchedule(), shuffled=True),
        Policy("constant", artifact, PathSchedule(0)),
    ]
    num_layers = artifact.config.base_model.num_layers
    variants = [Variant(p, b, depth_for_budget(b, num_layers)) for b in args.budgets for p in policies]
    rows = []
    for kind, windows in unseen(args.recipes, args.data_dir, args.windows).items():
        if kind in args.skip:
            continue
        samples = [Sample(window.tolist(), CONTEXT) for window in windows]
        task = Task(kind, samples, compare=True)
        (scores,) = engine.score([task], variants, lambda *_: None)
        means = {}
        for variant, found in zip(variants, scores):
            assert found.kl is not None
            means[variant.depth, variant.policy.name] = np.array([kl.mean(dtype=np.float64) for kl in found.kl])
        for (depth, name), kl in means.items():
            about = {"text": kind, "layers": depth, "policy": name, "windows": len(samples)}
            rows.append(about | {"metric": "kl", **_with_error(kl)})
            if name != "token":
                rows.append(about | {"metric": "gain", **_with_error(kl - means[depth, "token"])})
    return rows


def unseen(recipes: Sequence[Path], data_dir: Path, count: int) -> dict[str, np.ndarray]:
    """Return up to `count` windows of each file of the first recipe that training by none of them uses: [n, length]."""
    tokenizer = load_tokenizer(fetch())
    runs = [Stage1Settings.read(recipe, {"data_dir": str(data_dir), "out": "unused"}) for recipe in recipes]
    seen = [Corpus.read(run.data, data_dir, tokenizer, run.length, run.tokens // run.length, run.seed) for run in runs]
    files = [source for source in runs[0].data if isinstance(source, DataSource)]
    if len(files) < len(runs[0].data):
        raise EvaluationError(f"{recipes[0]} trains on data sets; what it leaves over can be told of files alone")
    whole = [source.model_copy(update={"share": 1.0}) for source in files]
    every = Corpus.read(whole, data_dir, tokenizer, runs[0].length, 0, runs[0].seed)
    found = fresh_windows(seen, every, files)
    return {name: windows[:count] for name, windows in found.items()}


def fresh_windows(seen: Sequence[Corpus], every: Corpus, sources: Sequence[DataSource]) -> dict[str, np.ndarray]:
    """Return the windows of each file that no sequence of training equals: [n, length] each.

    seen: what training reads, run by run; every: the whole files, in the same windows. Of a file that training reads in
    part, the rest is returned: it is kept for development.
    """
    trained = {row.tobytes() for corpus in seen for row in corpus.sequences[np.unique(corpus.order)]}
    read = {row.tobytes() for corpus in seen for row in corpus.sequences}
    found = {}
    for source, start, end in zip(sources, every.starts[:-1], every.starts[1:]):
        known = read if source.share < 1 else trained
        found[source.name] = np.array([w for w in every.sequences[start:end] if w.tobytes() not in known])
    return found


def _with_error(values: np.ndarray) -> dict[str, float]:
    error = float(values.std(ddof=1) / len(values) ** 0.5)
    return {"value": round(float(values.mean()), 5), "stderr": round(error, 5)}


if __name__ == "__main__":
    main()

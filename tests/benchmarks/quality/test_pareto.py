"""Tests the pairing of quality and speed, and the picture of both."""

from pathlib import Path
from typing import Any

import pytest

from benchmarks.harness.rounds import Refused
from benchmarks.quality.pareto import draw
from benchmarks.quality.pareto_points import ACCURACY, PERPLEXITY, Point, front, points
from vllm_buddy.evaluation import Figure

BATCH = 8
SPEEDS = {"stock": 1.0, "pruned 0.5": 1.8, "buddy 0.5": 1.4, "buddy 0.5, no bypass": 1.7}


def _rows(**changes: Any) -> list[dict[str, Any]]:
    rows = []
    for variant, p50 in SPEEDS.items():
        layers = 8 if variant == "stock" else 4
        row = {"metric": "ratio_to_stock", "variant": variant, "batch": BATCH, "layers": layers, "p50": p50}
        rows.append({**row, "p20": p50 - 0.1, "p80": p50 + 0.2, **changes})
        # Other rows of the file must not be mistaken for it.
        rows += [{**rows[-1], "batch": 1, "p50": 99.0}, {**rows[-1], "metric": "ratio_to_pruned", "p50": 99.0}]
    return rows


def _file(policies: dict[str, str], dense: float = 20.0, n: int = 100) -> list[Figure]:
    """Return a results file with one perplexity and one accuracy for each policy. policies: name -> repair."""
    figures = []
    for metric, value, stderr in ((PERPLEXITY, dense, 2.0), (ACCURACY, 0.7, 0.02)):
        figures.append(Figure("dense", "none", 1.0, 8, metric, value, stderr, n))
        for name, repair in policies.items():
            figures.append(Figure(name, repair, 0.5, 4, metric, 2 * value, 2 * stderr, n))  # type: ignore[arg-type]
    return figures


def test_every_policy_is_drawn_at_the_speed_of_its_kind() -> None:
    """Fails if a policy is drawn at the speed of a variant that computes something else."""
    policies = {"buddy": "bypass", "paper": "lora", "sleb": "none", "prior": "none", "bypass+sleb": "bypass"}
    found = {point.policy: point for point in points([_file(policies)], _rows(), BATCH, PERPLEXITY)}
    assert {name: (point.family, point.speed[1]) for name, point in found.items()} == {
        "dense": ("dense", 1.0),
        "buddy": ("bypass", 1.4),
        "paper": ("lora", 1.7),
        "sleb": ("static", 1.8),
        "prior": ("none", 1.7),
        "bypass+sleb": ("bypass", 1.4),
    }
    assert found["buddy"].speed == pytest.approx((1.3, 1.4, 1.6))


def test_perplexity_is_over_that_of_its_own_file() -> None:
    """Fails if a policy is compared with another run's unrouted model, or the unrouted model is drawn twice."""
    files = [_file({"buddy": "bypass"}, dense=10.0), _file({"sleb": "none"}, dense=40.0, n=900)]
    found = points(files, _rows(), BATCH, PERPLEXITY)
    assert [(p.policy, p.quality, p.stderr) for p in found] == [
        ("dense", 1.0, 0.05),
        ("buddy", 2.0, 0.4),
        ("sleb", 2.0, 0.1),
    ]
    assert [(p.policy, p.quality, p.stderr) for p in points(files, _rows(), BATCH, ACCURACY)] == [
        ("dense", 0.7, 0.02),
        ("buddy", 1.4, 0.04),
        ("sleb", 1.4, 0.04),
    ]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [row for row in _rows() if row["variant"] != "buddy 0.5, no bypass"],
            "policy 'paper' at 4 layers needs the speed of 'buddy 0.5, no bypass' at batch 8, and there is none",
        ),
        (_rows(layers=5), "policy 'dense' at 8 layers needs the speed of 'stock' at batch 8, and there is one of 5"),
        (_rows(batch=1), "needs the speed of 'stock' at batch 8, and there is none"),
    ],
)
def test_a_missing_speed_is_an_error_that_names_it(rows: list[dict[str, Any]], message: str) -> None:
    """Fails if a policy is silently missing in the picture, or has the speed of another depth."""
    with pytest.raises(Refused, match=message):
        points([_file({"paper": "lora"})], rows, BATCH, PERPLEXITY)


def test_a_file_without_the_unrouted_model() -> None:
    """Fails if perplexities of unlike texts share an axis."""
    figures = [figure for figure in _file({"buddy": "bypass"}) if figure.policy != "dense"]
    with pytest.raises(Refused, match="perplexity of buddy has nothing to be compared with"):
        points([figures], _rows(), BATCH, PERPLEXITY)
    with pytest.raises(Refused, match="no file has figures of kl"):
        points([figures], _rows(), BATCH, "kl")


def test_front() -> None:
    """Fails if a policy that another beats in both speed and quality is on the front."""

    def point(name: str, speed: float, quality: float) -> Point:
        return Point(name, "bypass", (speed, speed, speed), quality, 0.0)

    found = [point("a", 1.0, 1.0), point("b", 1.5, 3.0), point("c", 1.4, 3.5), point("d", 1.5, 2.0)]
    assert [p.policy for p in front(found, lower_is_better=True)] == ["d", "a"]
    assert [p.policy for p in front(found, lower_is_better=False)] == ["b", "c"]


def test_every_policy_is_in_the_picture(tmp_path: Path) -> None:
    """Fails if a policy without accuracy, or one of a family of its own, is left out or ends the drawing."""
    pytest.importorskip("matplotlib", reason="the extra `plot` is not installed")
    policies = {"buddy": "bypass", "paper": "lora", "sleb": "none", "prior": "none"}
    figures = [f for f in _file(policies) if f.policy != "paper" or f.metric == PERPLEXITY]
    draw({m: points([figures], _rows(), BATCH, m) for m in (PERPLEXITY, ACCURACY)}, BATCH, tmp_path / "a.svg")
    picture = (tmp_path / "a.svg").read_text()
    assert all(f"<!-- {name} -->" in picture for name in (*policies, "unrouted, stock vLLM"))
    with pytest.raises(Refused, match="cannot write the picture"):
        draw({m: points([figures], _rows(), BATCH, m) for m in (PERPLEXITY, ACCURACY)}, BATCH, tmp_path / "a.nonsense")

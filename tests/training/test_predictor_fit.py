"""Stage 2 of training: what the predictor learns, and the way from files to an artifact with a predictor."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.harness.tiny_models import NUM_LAYERS, load_model, random_artifact, random_exits
from vllm_buddy.artifact import load_artifact, with_drafts
from vllm_buddy.artifact.provenance import with_section, without_key
from vllm_buddy.cli.main import main
from vllm_buddy.evaluation.cost_quality import choices, compare
from vllm_buddy.training.predictor_fit import Contexts, fit_predictor
from vllm_buddy.training.stage2_record import CURVES_FILE, LOG_FILE
from vllm_buddy.training.stage2_settings import Stage2Settings

DEPTHS = (4, 6, 8)
DATA = [{"file": "not used"}]


def _fit(kinds: np.ndarray, losses: np.ndarray, **settings: Any) -> tuple[np.ndarray, list[dict[str, Any]], np.ndarray]:
    """Return (expected excess of all samples, log, held-out indices). kinds: [num_samples], visible in the contexts."""
    rng = np.random.default_rng(0)
    means, newest = torch.from_numpy(rng.normal(size=(2, len(kinds), 6)).astype(np.float32))
    means[:, 0] += torch.from_numpy(6.0 * kinds).float()
    contexts, log = Contexts(means, newest), []
    checked = Stage2Settings(out="x", data=DATA, steps=200, **settings)
    predictor, held_out = fit_predictor(contexts, losses, DEPTHS, NUM_LAYERS, checked, log.append)
    with torch.no_grad():
        return predictor.excess(means, newest).numpy(), log, held_out.numpy()


@pytest.fixture(scope="module")
def two_kinds() -> tuple[np.ndarray, np.ndarray]:
    """Return kinds and losses. Half of the samples gain nothing from layers, the others one nat; all vary by nats."""
    rng = np.random.default_rng(0)
    kinds = rng.integers(2, size=400)
    curve = np.where(kinds[:, None], [1.0, 0.5, 0.0], 0.0)
    return kinds, curve + rng.normal(3.0, 2.0, (400, 1)) + rng.normal(0, 0.1, (400, 3))


@pytest.mark.parametrize("group", [0, 4])
def test_layers_go_where_they_help(two_kinds: tuple[np.ndarray, np.ndarray], group: int) -> None:
    """Fails if the noise between samples, four times the difference between depths, is not removed by the baseline."""
    kinds, losses = two_kinds
    excess, log, held_out = _fit(kinds, losses, group=group, max_price=3.0)
    chosen = choices(excess, DEPTHS, NUM_LAYERS, 1.0)[held_out]
    assert (np.asarray(DEPTHS)[chosen][kinds[held_out] == 0] == 4).mean() > 0.9
    assert (np.asarray(DEPTHS)[chosen][kinds[held_out] == 1] == 8).mean() > 0.9
    found = compare(losses[held_out], DEPTHS, chosen)
    assert found.gain > 4 * found.stderr
    assert log[-1]["budget_stdev"] > log[0]["budget_stdev"] + 0.05
    assert min(row["held_out"] for row in log) < log[0]["held_out"]


def test_price_is_in_nats(two_kinds: tuple[np.ndarray, np.ndarray]) -> None:
    """Fails if prices are not in nats: half the layers save one nat, so they are worth it up to a price of 2."""
    kinds, losses = two_kinds
    excess, _, held_out = _fit(kinds, losses, max_price=3.0)
    of_kind = np.flatnonzero(kinds[held_out] == 1)
    mean = {
        price: np.asarray(DEPTHS)[choices(excess, DEPTHS, NUM_LAYERS, price)[held_out][of_kind]].mean()
        for price in (1.5, 2.5)
    }
    assert mean[1.5] > 7 > 5 > mean[2.5]
    assert set(choices(excess, DEPTHS, NUM_LAYERS, 0.0)) == {2}
    assert set(choices(excess, DEPTHS, NUM_LAYERS, 100.0)) == {0}


def test_contexts_that_say_nothing_choose_nothing() -> None:
    """Fails if a fit to noise is worse than the constant budget that it starts from."""
    rng = np.random.default_rng(1)
    losses = np.array([1.0, 0.6, 0.3]) + rng.normal(0, 1.0, (200, 1)) + rng.normal(0, 0.3, (200, 3))
    _, log, _ = _fit(rng.integers(2, size=200), losses)
    assert min(row["held_out"] for row in log) <= log[0]["held_out"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"depths": [6, 4]}, "must be at least two and ascend"),
        ({"depths": [6]}, "must be at least two and ascend"),
        ({"group": 1}, "a group of one has nothing to compare"),
        ({"max_price": float("nan")}, "max_price"),
        ({"examples": 8, "held_out": 0.1}, "of 8 examples is none"),
        ({"examples": 8, "held_out": 0.2}, "of 8 examples is one sample"),
    ],
)
def test_settings_that_cannot_work_are_refused(change: dict[str, Any], message: str) -> None:
    """Fails if settings that cannot work are found only after the losses are measured."""
    with pytest.raises(ValueError, match=message):
        Stage2Settings(out="x", data=DATA, **change)


@pytest.fixture
def run(tmp_path: Path, model_with_tokenizer: Path) -> tuple[Path, list[str]]:
    """Return (folder for the artifact, command line)."""
    random_artifact(tmp_path / "artifact", model_with_tokenizer, bypass_rank=4)
    (tmp_path / "text.txt").write_text(" ".join(f"{i * i % 97} and {i % 13}" for i in range(200)))
    rows = [{"instruction": f"Say {i}.", "output": f"Here is {i}, as you asked."} for i in range(30)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    config = tmp_path / "budget.yaml"
    config.write_text(
        f"artifact: {tmp_path / 'artifact'}\nmodel: {model_with_tokenizer}\ndata_dir: {tmp_path}\n"
        "data: [{file: text.txt, share: 0.8}, {file: rows.json, share: 0.8}]\n"
        "examples: 12\ndepths: [4, 6, 8]\ncontext: 16\nanswer: 16\nsteps: 20\nbatch: 8\ndtype: float32\n"
    )
    return tmp_path / "out", ["train-budget", str(config), f"out={tmp_path / 'out'}"]


def test_from_files_to_an_artifact_that_is_evaluated(
    run: tuple[Path, list[str]], model_with_tokenizer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fails if the commands of the README do not work on a tiny model, or if results are measured or written twice."""
    out, command = run
    assert main(command) == 0
    artifact, before = load_artifact(out), load_artifact(out.parent / "artifact")
    assert artifact.config.predictor is not None
    assert artifact.predictor is not None
    assert artifact.predictor.depths == (4, 6, 8)
    assert artifact.without_predictor().digest == before.digest != artifact.digest
    budgets = [point.budget for point in artifact.config.predictor.prices]
    assert budgets == sorted(budgets, reverse=True)
    assert {LOG_FILE, CURVES_FILE, "README.md", "run.yaml"} <= {path.name for path in out.iterdir()}
    assert "## Budget Predictor" in (out / "README.md").read_text()
    # Again, from the result itself: measured losses are found, and the section is replaced.
    assert main([*command, f"artifact={out}"]) == 0
    assert (out / "README.md").read_text().count("## Budget Predictor") == 1
    assert (out / "run.yaml").read_text().count("budget_predictor:") == 1
    data = ",".join(str(out.parent / name) for name in ("text.txt", "rows.json"))
    options = ["--model", str(model_with_tokenizer), "--artifact", str(out), "--examples", "3", "--context", "16"]
    options += ["--answer", "16", "--dtype", "float32", "--json", str(out / "e.json"), "--plot", str(out / "e.png")]
    capsys.readouterr()
    assert main(["eval-budget", data, *options]) == 0
    printed, warned = capsys.readouterr()
    assert "warning:" not in warned
    found = json.loads((out / "e.json").read_text())
    assert {(row["data_set"], row["samples"]) for row in found} == {("text.txt", 3), ("rows.json", 3), ("mixed", 6)}
    auto = [row for row in found if row["series"] == "auto"]
    assert {row["layers"] for row in auto if row["price"] == 0.0} == {8.0}
    assert all(row["best"] <= row["loss"] + 1e-4 for row in auto)
    assert sum(row["own_price"] for row in auto) == 3
    assert main(["eval-budget", data, *options[:-2], "--part", "0.5,1"]) == 0
    assert "was trained on the first 80% of text.txt" in capsys.readouterr().err, "training text passes for new text"
    assert main(["eval-budget", data, *options[:-1], str(out / "e.nothing")]) == 2
    assert "cannot write the picture" in capsys.readouterr().err
    assert "mixed" in printed
    assert (out / "e.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("depths=[4, 9]", "must lie in 3 to 8"),
        ("artifact=nowhere", "no artifact at nowhere"),
        ("data=[{file: missing.txt}]", "cannot read the data file"),
        ("examples=1000", "1000 samples were asked for"),
        ("stpes=3", "unknown settings stpes"),
    ],
)
def test_what_cannot_be_trained_is_one_line(
    run: tuple[Path, list[str]], change: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fails if a mistake ends in a traceback."""
    assert main([*run[1], change]) == 2
    assert message in capsys.readouterr().err


def test_another_artifact_is_not_overwritten(
    run: tuple[Path, list[str]], model_with_tokenizer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fails if an artifact of another training is lost, or the same command cannot be run again."""
    out, command = run
    before = random_artifact(out, model_with_tokenizer, bypass_rank=2)
    assert main(command) == 2
    assert (
        f"{out} holds another artifact than {out.parent / 'artifact'}, which would be lost" in capsys.readouterr().err
    )
    (out / "model.safetensors").write_bytes(b"cut off")
    assert main(command) == 2
    assert "holds another artifact" in capsys.readouterr().err
    before.save(out)
    source = load_artifact(out.parent / "artifact")
    source.save(out)
    assert main(command) == 0
    assert main(command) == 0  # over its own result
    exits = random_exits(load_model(model_with_tokenizer), (4,), seed=0)
    with_drafts(load_artifact(out), exits).save(out)
    assert main(command) == 2  # which would lose the exits


def test_two_held_out_samples_are_enough(run: tuple[Path, list[str]]) -> None:
    """Fails if the fewest samples that may be held out end in a traceback, or in figures that are no numbers."""
    out, command = run
    assert main([*command, "data=[{file: text.txt}]", "examples=10"]) == 0
    log = [json.loads(line) for line in (out / LOG_FILE).read_text().splitlines()]
    assert np.isfinite([row["budget_stdev"] for row in log]).all()


def test_files_of_the_user_are_not_overwritten(run: tuple[Path, list[str]], capsys: pytest.CaptureFixture[str]) -> None:
    """Fails if a user's own files are lost, or losses of a run that was stopped must be measured again."""
    out, command = run
    out.mkdir()
    (out / "README.md").write_text("mine")
    assert main(command) == 2
    assert f"{out} holds README.md, which no run has made" in capsys.readouterr().err
    assert [path.name for path in out.iterdir()] == ["README.md"]
    (out / "README.md").rename(out / "losses-0.npy")
    assert main(command) == 0


def test_missing_matplotlib_is_told_before_anything_is_measured(
    run: tuple[Path, list[str]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fails if the package that draws the curves is found missing when all is trained."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(run[1]) == 2
    assert "curves need matplotlib: pip install matplotlib" in capsys.readouterr().err
    assert not run[0].exists()


def test_an_artifact_without_a_predictor_cannot_be_evaluated(
    run: tuple[Path, list[str]], model_with_tokenizer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fails if the message does not name the command that makes a predictor."""
    folder = run[0].parent
    options = ["--model", str(model_with_tokenizer), "--artifact", str(folder / "artifact")]
    assert main(["eval-budget", str(folder / "text.txt"), *options]) == 2
    assert "`vllm-buddy train-budget` makes one" in capsys.readouterr().err


def test_a_part_of_a_card_is_replaced_and_the_rest_kept() -> None:
    """Fails if a model card or a record loses its other sections."""
    card = "# a\n\ntext\n\n## Evaluation\n\nx\n\n## How it was made\n\ny\n"
    once = with_section(card, "## New\n\nfirst\n\n")
    assert once == "# a\n\ntext\n\n## Evaluation\n\nx\n\n## New\n\nfirst\n\n## How it was made\n\ny\n"
    assert with_section(once, "## New\n\nsecond\n\n") == once.replace("first", "second")
    assert without_key("a: 1\nb:\n  c: 2\nd: 3\n", "b") == "a: 1\nd: 3\n"

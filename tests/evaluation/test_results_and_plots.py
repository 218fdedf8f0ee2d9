"""Results of `vllm-buddy eval` as files and as pictures."""

import importlib.util
import math
from pathlib import Path

import pytest

from tests.evaluation.commands import run_eval
from vllm_buddy.cli.main import main
from vllm_buddy.evaluation.results import load_results, save_results


def test_results_are_read_as_they_were_written(data: list[str], tmp_path: Path) -> None:
    """Fails if figures are rounded when they are written and read."""
    out = tmp_path / "a.json"
    run_eval(data, out, "--policy", "buddy", "--budgets", "0.5")
    figures = load_results(out)
    save_results(figures, tmp_path / "b.json")
    assert (tmp_path / "b.json").read_text() == out.read_text()
    assert all(math.isfinite(figure.value) for figure in figures)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "holds no figures"),
        ("{}", "is not a results file"),
        (
            '[{"policy": "a", "budget": 1, "layers": 3, "metric": "kl", "value": 0, "stderr": 0, "n": 1}]',
            "is not a results file of `vllm-buddy eval`: 0.repair: Field required",
        ),
    ],
)
def test_a_results_file_of_another_form(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, content: str, message: str
) -> None:
    """Fails if a results file in another format gives an empty picture or a traceback."""
    monkeypatch.setattr("vllm_buddy.evaluation.plot.check_plotting", lambda: None)
    (tmp_path / "a.json").write_text(content)
    assert main(["plot", str(tmp_path / "a.json"), str(tmp_path / "a.png")]) == 2
    assert message in capsys.readouterr().err
    assert main(["plot", str(tmp_path / "none"), str(tmp_path / "a.png")]) == 2
    assert "cannot read" in capsys.readouterr().err


def test_a_plot_without_matplotlib(
    data: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fails if a missing matplotlib is noticed only after the measurement."""
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else found(name))
    assert main(["eval", *data, "--plot", str(tmp_path / "a.png"), "--json", str(tmp_path / "a.json")]) == 2
    assert "a plot needs matplotlib; pip install matplotlib" in capsys.readouterr().err
    assert not (tmp_path / "a.json").exists()


def test_plot(data: list[str], tmp_path: Path) -> None:
    """Fails if a metric or a policy is not drawn, or a zero on a logarithmic scale raises an error."""
    pytest.importorskip("matplotlib", reason="the extra `plot` is not installed")
    out = tmp_path / "a.svg"
    run_eval(data, tmp_path / "a.json", "--policy", "buddy,reverse", "--plot", str(out))
    picture = out.read_text()
    for shown in ("buddy", "reverse", "unrouted", "perplexity (lower is better)", "PIQA accuracy per character"):
        assert f"<!-- {shown} -->" in picture
    assert main(["plot", str(tmp_path / "a.json"), str(tmp_path / "again.png")]) == 0
    assert (tmp_path / "again.png").read_bytes().startswith(b"\x89PNG")
    assert main(["plot", str(tmp_path / "a.json"), str(tmp_path / "again.nonsense")]) == 2

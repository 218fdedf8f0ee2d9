"""Settings of `vllm-buddy eval-budget` that cannot work."""

from pathlib import Path

import pytest

from vllm_buddy.cli.main import main


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--part", "0.8"], "two shares with a comma between"),
        (["--part", "a,b"], "two shares with a comma between"),
        (["--part", "0.9,0.1"], "two ascending shares from 0 to 1"),
        (["--part", "0.5,nan"], "two ascending shares from 0 to 1"),
        (["--examples", "1"], "greater than or equal to 2"),
        (["--answer", "0"], "greater than or equal to 1"),
    ],
)
def test_options_are_refused_in_one_line(
    tmp_path: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fails if a wrong option ends in a traceback, or is noticed only after a model is loaded."""
    assert main(["eval-budget", str(tmp_path / "text.txt"), *options]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1

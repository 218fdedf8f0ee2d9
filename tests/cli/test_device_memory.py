"""A device whose memory is full, as commands report it."""

import pytest
import torch

from vllm_buddy.cli import main

FULL = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 139.80 GiB of which 1.00 GiB is "
    "free. If reserved but unallocated memory is large try setting PYTORCH_ALLOC_CONF."
)
COMMANDS = {
    "train": (["tokens=1"], "vllm_buddy.cli.train.config_and_overrides", "micro_batch"),
    "train-budget": (["examples=9"], "vllm_buddy.cli.train_budget.config_and_overrides", "dtype=bfloat16"),
    "train-drafts": (["tokens=1"], "vllm_buddy.cli.train_drafts.config_and_overrides", "search_tokens"),
    "eval": ([], "vllm_buddy.cli.eval.read_settings", "--dtype bfloat16"),
    "eval-budget": (["a.txt"], "vllm_buddy.cli.eval_budget.read_settings", "--dtype bfloat16"),
    "depth-profile": (["--text", "a.txt"], "vllm_buddy.cli.depth_profile.read_settings", "--passage-tokens"),
    "prior": (["model", "out", "--text", "a.txt"], "vllm_buddy.cli.prior.read_settings", "--device cpu"),
    "orders": (["out", "--text", "a.txt"], "vllm_buddy.cli.orders.read_settings", "--device cpu"),
    "prune": (["shortgpt", "out", "--layers", "4"], "vllm_buddy.cli.prune.read_settings", "--device cpu"),
}


@pytest.mark.parametrize("command", list(COMMANDS))
def test_a_full_device_is_one_line_with_what_helps(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fails if a model that is too large ends in a traceback, or nobody says which setting to lower."""
    words, called, advice = COMMANDS[command]

    def full(*_: object) -> None:
        raise torch.OutOfMemoryError(FULL)

    monkeypatch.setattr(called, full)
    assert main([command, *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "the memory of the device is full (CUDA out of memory. Tried to allocate 2.00 GiB);" in line
    assert advice in line


def test_other_errors_of_torch_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a mistake of this package is reported as one of the user's."""

    def broken(*_: object) -> None:
        raise RuntimeError("shapes do not fit")

    monkeypatch.setattr("vllm_buddy.cli.eval.read_settings", broken)
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        main(["eval"])

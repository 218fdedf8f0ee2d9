"""What `vllm-buddy depth-profile` counts and predicts."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.harness.tiny_models import NUM_LAYERS, load_model, random_artifact, random_prompts, save_tiny_model
from vllm_buddy.cli.main import main
from vllm_buddy.evaluation import depth_profile
from vllm_buddy.evaluation.depth_profile import _exit_rows, _written
from vllm_buddy.evaluation.dex import dex_row, earliest_agreeing
from vllm_buddy.evaluation.draft_walk import Drafts, ngram_drafts, walk
from vllm_buddy.method.draft_chains import draft_chains, full_pass
from vllm_buddy.models.folder import load_tokenizer


def drafts_of(text: list[int], chains: dict[int, list[list[int]]], start: int = 0) -> Drafts:
    said = torch.tensor([[*text[1:], -1]])
    known = {depth: torch.tensor(chain)[:, None] for depth, chain in chains.items()}
    return Drafts(torch.tensor([text]), said, start, known, {})


def test_a_walk_counts_steps_passes_and_rows() -> None:
    """Fails if a rejected draft is not paid for, or an accepted one is written twice."""
    text = [1, 2, 3, 4, 5, 6]
    right, wrong = [2, 3, 4, 5, 6, 0], [9] * 6
    always = walk(drafts_of(text, {4: [right, right]}), None, 4, 2)
    assert (always.tokens, always.steps, always.passes, always.checked) == (5, 2, 3, 3)
    never = walk(drafts_of(text, {4: [wrong, wrong]}), None, 4, 1)
    assert (never.tokens, never.steps, never.passes) == (5, 5, 4)
    plain = walk(drafts_of(text, {}), None, None, 0)
    assert plain.speedup(0.0, 0.0) == 1.0
    assert always.speedup(0.25, 0.0) == pytest.approx(5 / 2.75)


def test_ngrams_come_before_depth() -> None:
    """Fails if layers draft where an n-gram was found."""
    text = [1, 2, 3, 1, 2, 3]
    ngrams = [[ngram_drafts(text[: p + 1], 2, 4, 2) for p in range(len(text))]]
    assert ngrams[0] == [[], [], [], [], [3, 1], [1, 2]]
    walked = walk(drafts_of(text, {4: [[0] * 6]}), ngrams, 4, 1)
    assert (walked.tokens, walked.steps, walked.passes) == (5, 5, 4)


def test_the_earliest_agreeing_depth_is_one_that_all_deeper_ones_confirm() -> None:
    """Fails if a depth counts that is right by chance, where a deeper one is wrong."""
    said = torch.tensor([[7, 7, 7, 7]])
    shallow, deep = torch.tensor([[7, 7, 0, 0]]), torch.tensor([[7, 0, 7, 0]])
    assert earliest_agreeing([shallow, deep], said).tolist() == [[0, 2, 1, 2]]


def test_exploration_gains_the_mean_of_what_each_token_needs() -> None:
    """Fails if a single exit is not charged for the tokens that it gets wrong."""
    row = dex_row(torch.tensor([1, 1, 2, 4]), 4)
    assert row["exploration_speedup"] == 2.0
    assert (row["exit_stage"], row["exit_speedup"]) == (2, 4 / 2.5)
    assert row["ratio"] == pytest.approx(1.25)


def test_the_command_writes_what_it_prints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fails if the command does not run from a folder to its files, or a depth without a path is not refused."""
    folder = save_tiny_model(tmp_path / "model", "llama")
    random_artifact(tmp_path / "artifact", folder, bypass_rank=4)
    _save_tokenizer(folder)
    text = tmp_path / "text.txt"
    text.write_text("a b c d e f g h " * 60)
    options = ["--model", str(folder), "--artifact", str(tmp_path / "artifact"), "--text", str(text)]
    options += ["--passages", "3", "--passage-tokens", "8", "--tokens", "16", "--drafts", "2", "--devices", "2,4"]
    out = tmp_path / "new" / "profile.json"
    assert main(["depth-profile", *options, "--json", str(out), "--plot", str(tmp_path / "plots" / "profile.png")]) == 0
    found = json.loads(out.read_text())
    assert sum(row["ead"] for row in found["depths"]) == pytest.approx(1.0)
    assert all(row["right"][0] >= row["right"][1] for row in found["depths"])
    assert {row["batch"] for row in found["speedups"]} == {1, 4, 16}
    assert [row["devices"] for row in found["dex"]] == [2, 4]
    assert (tmp_path / "plots" / "profile.png").stat().st_size > 10_000
    assert "exploration" in capsys.readouterr().out
    assert found["exits"] == []
    for wrong, problem in (
        (["--depths", "2,5"], "known depths are 3, 4"),
        (["--devices", "1"], "greater than or equal to 2"),
        (["--batches", "0"], "greater than 0"),
    ):
        assert main(["depth-profile", *options, *wrong]) == 2
        assert problem in capsys.readouterr().err


def test_the_text_is_what_the_layers_say(tmp_path: Path) -> None:
    """Fails if a repetition penalty of the model's configuration changes the text, which no draft follows."""
    model = load_model(save_tiny_model(tmp_path, "llama"))
    model.generation_config.repetition_penalty = 1.5
    text = _written(model, torch.tensor(random_prompts(1, seed=1, min_tokens=8, max_tokens=8)), 24)
    said, _ = full_pass(model, text)
    assert torch.equal(said[:, 7:-1], text[:, 8:])


def test_trained_exits_are_shown_beside_what_they_were_trained_from(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fails if an exit's adapter or path is not the one that is measured, or its depth is left out."""
    folder = save_tiny_model(tmp_path / "model", "llama")
    artifact = random_artifact(tmp_path / "artifact", folder, bypass_rank=4, draft_depths=(4, 6), draft_vocabulary=60)
    _save_tokenizer(folder)
    text, out = tmp_path / "text.txt", tmp_path / "profile.json"
    text.write_text("a b c d e f g h " * 60)
    options = ["--model", str(folder), "--artifact", str(tmp_path / "artifact"), "--text", str(text), "--depths", "4,5"]
    options += ["--passages", "3", "--passage-tokens", "8", "--tokens", "16", "--drafts", "2", "--json", str(out)]
    assert main(["depth-profile", *options]) == 0
    found = json.loads(out.read_text())
    assert [row["depth"] for row in found["depths"]] == [4, 5, NUM_LAYERS]
    (row,) = found["exits"]
    assert row["depth"] == 4
    assert row["right"] == found["depths"][0]["right"]
    assert "with the bypass of each layer" in capsys.readouterr().out
    # The same path without an adapter, and the library's, as an artifact without exits has them.
    model, tokens = load_model(folder), torch.tensor(random_prompts(1, seed=2, min_tokens=40, max_tokens=40))
    said, full = full_pass(model, tokens)
    exit_path, library_path = artifact.drafts[0].path, artifact.first_path(4)
    assert library_path is not None
    bare = [draft_chains(model, tokens, path, 2, full, artifact.bypass) for path in (exit_path, library_path)]
    adapted = tokens, exit_path, 2, full, artifact.bypass, artifact.drafts[0].adapter
    all_tokens, chain = draft_chains(model, *adapted), draft_chains(model, *adapted, artifact.draft_vocabulary)
    assert not torch.equal(all_tokens, chain)
    (shown,) = _exit_rows(Drafts(tokens, said, 0, {4: chain}, {}, {4: [all_tokens, *bare]}))
    n = tokens.shape[1] - 2
    for name, one in zip(("right", "all_tokens", "untrained", "library"), (chain, all_tokens, *bare)):
        assert shown[name][0] == pytest.approx(float((one[0, :, :n] == said[:, :n]).float().mean()), abs=1e-4)


def test_the_lora_of_an_artifact_belongs_to_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if drafts are measured on weights without the artifact's LoRA, which no server runs."""
    folder = save_tiny_model(tmp_path / "model", "llama")
    artifact = random_artifact(tmp_path / "artifact", folder, lora_rank=2)
    _save_tokenizer(folder)
    text = tmp_path / "text.txt"
    text.write_text("a b c d e f g h " * 60)
    drafted, measured = depth_profile._drafted, []

    def watched(settings: Any, artifact: Any, model: Any, *others: Any) -> Drafts:
        measured.append(model)
        return drafted(settings, artifact, model, *others)

    monkeypatch.setattr(depth_profile, "_drafted", watched)
    options = ["--model", str(folder), "--artifact", str(tmp_path / "artifact"), "--text", str(text), "--depths", "4"]
    options += ["--passages", "1", "--passage-tokens", "8", "--tokens", "8", "--drafts", "1", "--devices", "2"]
    assert main(["depth-profile", *options]) == 0
    served = load_model(folder)
    assert artifact.lora is not None
    artifact.lora.merge_into(served)
    (model,) = measured
    for name, weight in served.state_dict().items():
        assert torch.equal(model.state_dict()[name], weight), name


def test_drafts_that_leave_nothing_to_count_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    """Fails if a chain as long as what the model writes gives shares of nothing, which are no numbers."""
    for drafts in ("16", "17"):
        assert main(["depth-profile", "--text", "none.txt", "--tokens", "16", "--drafts", drafts]) == 2
        assert f"a chain of {drafts} drafts leaves nothing to count of 16 tokens" in capsys.readouterr().err


def test_passages_are_skipped_and_the_dtype_is_that_of_the_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fails if held-out passages cannot be asked for, or the model runs in another dtype or on another device."""
    folder = save_tiny_model(tmp_path / "model", "llama")
    random_artifact(tmp_path / "artifact", folder, bypass_rank=4, draft_depths=(4,))
    _save_tokenizer(folder)
    text, out = tmp_path / "text.txt", tmp_path / "profile.json"
    text.write_text("a b c d " * 10 + "e f g h " * 10)
    seen, written = [], depth_profile._written

    def watched(model: Any, passages: torch.Tensor, num_tokens: int) -> torch.Tensor:
        seen.append((model.dtype, passages))
        return written(model, passages, num_tokens)

    monkeypatch.setattr(depth_profile, "_written", watched)
    options = ["--model", str(folder), "--artifact", str(tmp_path / "artifact"), "--text", str(text), "--depths", "4"]
    options += ["--passages", "2", "--passage-tokens", "4", "--tokens", "8", "--drafts", "1", "--devices", "2"]
    assert main(["depth-profile", *options, "--text-skip", "40", "--dtype", "bfloat16", "--json", str(out)]) == 0
    ((dtype, passages),) = seen
    assert dtype == torch.bfloat16
    later = load_tokenizer(folder)("e f g h")["input_ids"]
    assert passages.tolist() == [later, later]
    assert json.loads(out.read_text())["about"]["text_skip"] == 40
    assert main(["depth-profile", *options, "--text-skip", "78"]) == 2
    assert "2 tokens after the first 78" in capsys.readouterr().err
    assert main(["depth-profile", *options, "--device", "abacus"]) == 2
    assert "no device 'abacus'" in capsys.readouterr().err


def _save_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({c: i for i, c in enumerate("abcdefgh")} | {"?": 8}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?").save_pretrained(folder)

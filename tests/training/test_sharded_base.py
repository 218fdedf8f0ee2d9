"""Training on a base model that is shared out among two processes."""

import json
import os
import subprocess
from typing import Any

import pytest

from tests.harness.tiny_models import save_tiny_model
from tests.importance.conftest import with_byte_tokenizer
from tests.training.conftest import ON_CPU, TWO_PROCESSES, WORDS, run
from vllm_buddy.errors import TrainingError
from vllm_buddy.training.stage1_settings import Stage1Settings

STOPPED, SAVED = 3, 2  # step at which a run is stopped, and the last one that it had saved
RECIPES: dict[str, dict[str, Any]] = {
    "bypass": {"paths": "searched", "explore_tokens": 3 * 4 * 32, "tokens": 9 * 4 * 32, "router_windows": 12}
    | {"library": 2, "stop_after": STOPPED},
    "bypass, activations computed again": {"paths": "reverse", "checkpoint_activations": True},
    "bypass from zeros, paths learned": {"paths": "learned", "prior": "reverse", "init_tokens": 0},
    "distill": {"recipe": "distill", "paths": "reverse"},
    "paper": {"recipe": "paper", "paths": "learned", "prior": "reverse", "rank": 8},
}
TIED = {"model": "tied", "paths": "reverse"}
BY_TOKEN = {"schedule": "token", "token_depths": (4, 6), "kv_policy": "kv_only", "token_windows": 12}
NAMES = (*RECIPES, "one matrix for embedding and head", "depths per token")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What two processes made of each recipe, with a base that is whole and one that is shared out."""
    pytest.importorskip("accelerate")
    root = tmp_path_factory.mktemp("sharded")
    models = {"llama": save_tiny_model(root / "llama", "llama")}
    models["tied"] = save_tiny_model(root / "tied", "qwen3", tie_word_embeddings=True)
    for folder in models.values():
        with_byte_tokenizer(folder)
    (root / "data.txt").write_text(" ".join(f"{WORDS[i * i % 17]} {WORDS[i * 7 % 19]}" for i in range(400)))
    settings = {
        "data": [{"file": root / "data.txt"}],
        "model": models["llama"],
        "rank": 4,
        "length": 32,
        "batch": 4,
        "tokens": 3 * 4 * 32,
        "init_tokens": 256,
        "search_tokens": 128,
        "top_logits": 8,
        "dtype": "float32",
        "warmup_steps": 2,
        "save_every": SAVED,
        "name": "sharded",
    }
    cases = {name: settings | changes for name, changes in RECIPES.items()}
    cases[NAMES[-2]] = settings | TIED | {"model": models["tied"]}
    cases[NAMES[-1]] = settings | BY_TOKEN | {"start_from": root / "0" / "whole"}
    for number, case in enumerate(cases.values()):
        case["out"] = root / str(number)
    (root / "cases.json").write_text(json.dumps(cases, default=str))
    words = ("-m", "tests.training.two_runs", str(root / "cases.json"), str(root / "found.json"))
    environment = os.environ | ON_CPU
    process = subprocess.run([*TWO_PROCESSES, *words], capture_output=True, text=True, timeout=900, env=environment)
    assert process.returncode == 0, process.stderr[-4000:]
    results = json.loads((root / "found.json").read_text())
    assert results["processes"] == 2
    return results


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_base_that_is_shared_out_trains_what_a_whole_one_trains(found: dict[str, Any], name: str) -> None:
    """Fails if a layer runs with other weights, a gradient passes none, or the processes wait for each other."""
    whole, split = found[name]["whole"], found[name]["split"]
    assert split["losses"] == whole["losses"]
    assert split["digest"] == whole["digest"]
    assert split["trained"] == whole["trained"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_process_has_its_half_of_the_weights(found: dict[str, Any], name: str) -> None:
    """Fails if a process keeps what it has gathered, or an embedding that is the head too is kept twice."""
    whole, split = found[name]["whole"], found[name]["split"]
    lora = whole["trained"] if name in ("distill", "paper") else 0  # it stands in the layers, and is whole
    assert 0.5 <= (split["base_bytes"] - lora) / (whole["base_bytes"] - lora) < 0.51
    assert whole["gathered_bytes"] == 0 < split["gathered_bytes"]


@pytest.mark.slow
def test_the_processes_were_on_different_paths(found: dict[str, Any]) -> None:
    """Fails if the other tests show nothing, because both processes always run the same layers."""
    steps = found["bypass"]["split"]["losses"]
    assert any(passes[0][0] != passes[1][0] for passes in steps)


@pytest.mark.slow
def test_a_stopped_run_goes_on_with_the_same_losses(found: dict[str, Any]) -> None:
    """Fails if a run that was stopped ends elsewhere than one that was not, or cannot change to a whole base."""
    split = found["bypass"]["split"]
    for name in ("resumed", "resumed whole"):
        resumed = found["bypass"][name]
        assert resumed["losses"] == split["losses"][-len(resumed["losses"]) :]
        assert resumed["digest"] == split["digest"]


@pytest.mark.slow
def test_a_dry_run_tells_the_share(found: dict[str, Any]) -> None:
    """Fails if the memory that a dry run tells is that of the whole base."""
    memory, split = found["bypass"]["memory"], found["bypass"]["split"]
    assert memory["base weights (float32), one of 2 shares"] == split["base_bytes"]
    assert memory["base weights gathered for use, at most"] == split["gathered_bytes"]


def test_one_process_cannot_share(settings: dict[str, Any]) -> None:
    """Fails if the setting is ignored where it cannot do anything, and the base does not fit all the same."""
    with pytest.raises(TrainingError, match=r"there is one; start several with `accelerate launch --num_processes N"):
        run(settings | {"shard_base": True})


def test_a_quantised_base_is_not_shared_out(settings: dict[str, Any]) -> None:
    """Fails if one of the two settings wins silently."""
    with pytest.raises(ValueError, match="shard_base and base_quantisation cannot be combined"):
        Stage1Settings(**settings | {"shard_base": True, "base_quantisation": "nf4"})


def test_a_run_may_change_to_a_shared_base_and_back(settings: dict[str, Any]) -> None:
    """Fails if a run that no longer fits must be thrown away, or stopped runs of older versions are refused."""
    digests = {Stage1Settings(**settings | {"shard_base": split}).digest for split in (False, True)}
    assert len(digests) == 1


def test_passes_that_cannot_be_divided_are_refused(settings: dict[str, Any]) -> None:
    """Fails if a process would run one pass more than another and wait for it for ever."""
    from types import SimpleNamespace

    from vllm_buddy.training.frozen_base import check_processes

    checked = Stage1Settings(**settings | {"shard_base": True})
    check_processes(checked, SimpleNamespace(num_processes=2))
    with pytest.raises(TrainingError, match=r"4 \(batch / micro_batch\) cannot be divided among 3"):
        check_processes(checked, SimpleNamespace(num_processes=3))

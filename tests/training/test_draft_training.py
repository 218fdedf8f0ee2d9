"""The search for draft paths, the training of their adapters, and the way from files to an artifact with exits."""

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.harness.tiny_models import (
    NUM_LAYERS,
    VOCAB_SIZE,
    load_model,
    random_artifact,
    random_prompts,
    save_tiny_model,
)
from vllm_buddy.artifact import Artifact, load_artifact
from vllm_buddy.artifact.provenance import DRAFTS_HEADING
from vllm_buddy.cli.main import main
from vllm_buddy.method import full_path, layers_of, path_of
from vllm_buddy.method.draft_chains import draft_chains, full_pass
from vllm_buddy.method.draft_head import frequent_tokens
from vllm_buddy.method.kv_policy import MASKED
from vllm_buddy.method.reference import routed_logits
from vllm_buddy.training.corpus import Corpus
from vllm_buddy.training.draft_fit import DraftTeacher, fit_exits, fit_gaps, measure
from vllm_buddy.training.draft_record import LOG_FILE
from vllm_buddy.training.draft_search import DraftPaths, search_drafts, starting_path
from vllm_buddy.training.draft_settings import DraftTrainingSettings

DATA = [{"file": "not used"}]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Artifact]:
    root = tmp_path_factory.mktemp("drafts")
    folder = save_tiny_model(root / "model", "llama")
    model = load_model(folder).requires_grad_(False)
    return model, random_artifact(root / "artifact", folder, bypass_rank=4)


def test_a_draft_path_is_measured_after_a_prefix_of_the_whole_model(made: tuple[Any, Artifact]) -> None:
    """Fails if the search lets a draft read K and V of other drafts, as requests on the path itself would."""
    model, artifact = made
    tokens = torch.tensor(random_prompts(2, seed=1, min_tokens=20, max_tokens=20))
    path = artifact.first_path(5)
    assert path is not None
    skipped = set(range(NUM_LAYERS)) - set(layers_of(path))
    found = DraftPaths(model, tokens, artifact.bypass)
    said, full = full_pass(model, tokens)
    drafted = draft_chains(model, tokens, path, 1, full, artifact.bypass)[0]
    assert found.agreement(skipped) == pytest.approx(float((drafted == said).float().mean()))
    text, last = tokens[0].tolist(), 9
    paths = [full_path(NUM_LAYERS)] * last + [path]
    one = routed_logits(model, text[: last + 1], paths, MASKED, artifact.bypass)[-1]
    assert int(drafted[0, last]) == int(one.argmax())
    some = artifact.config.base_model.vocab_size // 2
    among = DraftPaths(model, tokens, artifact.bypass, np.arange(some))
    assert among.agreement(set()) == pytest.approx(float((said < some).float().mean()))
    assert found.divergence(set()) == pytest.approx(0.0, abs=1e-5)
    assert found.agreement(set()) == 1.0


def test_the_search_goes_on_from_a_trained_path(made: tuple[Any, Artifact]) -> None:
    """Fails if drafts skip the bypasses that were trained, or paths of several depths are not nested."""
    model, artifact = made
    tokens = torch.tensor(random_prompts(2, seed=1, min_tokens=20, max_tokens=20))
    assert starting_path(artifact, 4) == full_path(NUM_LAYERS)  # nothing says what it was trained for
    trained = Artifact(
        artifact.config.model_copy(update={"budgets": (0.75, 1.0)}), artifact.prior, None, artifact.bypass
    )
    start = trained.first_path(6)
    assert start is not None
    assert starting_path(trained, 4) == start
    assert starting_path(trained, 7) == trained.first_path(7)
    lines: list[str] = []
    found = search_drafts(model, tokens, trained, [3, 4, 6], 0.05, lines.append)
    assert [c.depth for c in found] == [c.path.bit_count() for c in found] == [3, 4, 6]
    assert found[-1].path == start
    for shallow, deep in pairwise(found):
        assert shallow.path & deep.path == shallow.path
        assert shallow.path & 1
        assert shallow.path >> NUM_LAYERS - 1 == 1
    assert "from 6 layers down to 3" in lines[0]


def test_a_layer_that_does_nothing_goes_first(tmp_path: Path) -> None:
    """Fails if the search removes layers without measuring what each is worth."""
    folder = save_tiny_model(tmp_path / "model", "llama")
    model = load_model(folder).requires_grad_(False)
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        model.get_parameter(f"model.layers.3.{name}.weight").zero_()
    artifact = random_artifact(tmp_path / "artifact", folder)
    tokens = torch.tensor(random_prompts(2, seed=1, min_tokens=20, max_tokens=20))
    (found,) = search_drafts(model, tokens, artifact, [7], 0.05, lambda _: None)
    assert layers_of(found.path) == [0, 1, 2, 4, 5, 6, 7]
    assert (found.agreement, found.divergence) == (1.0, pytest.approx(0.0, abs=1e-5))


@pytest.mark.parametrize("gaps", [False, True], ids=["adapters", "gaps"])
def test_an_exit_learns_what_the_whole_model_says(gaps: bool, made: tuple[Any, Artifact]) -> None:
    """Fails if the loss has no gradient in what is trained, another exit is trained instead, or rounding loses it."""
    model, artifact = made
    settings = DraftTrainingSettings(
        out="x", data=DATA, rank=32, length=32, batch=8, tokens=60 * 256, learning_rate=0.01, min_depth=3, max_depth=4
    )  # fmt: skip
    paths = [artifact.first_path(depth) or 0 for depth in (4, 6)]
    teacher = DraftTeacher(model, settings.top_logits)
    rng = np.random.default_rng(0)
    # Few tokens, so that much of what comes next can be learned from few texts.
    texts = rng.integers(0, 24, (settings.num_steps + 4, 8, 32))
    held_out = texts[-4:].reshape(-1, 32)
    # Without the artifact's bypass, which is random and leaves little to learn from.
    starts = fit_gaps(model, torch.from_numpy(texts[0]), settings.rank, paths) if gaps else [None, None]
    before = measure(teacher, held_out, [(path, start, None) for path, start in zip(paths, starts)])
    log: list[dict[str, Any]] = []
    exits = fit_exits(teacher, list(texts[: settings.num_steps]), paths, starts, None, settings, log.append)
    after = measure(teacher, held_out, [(draft.path, draft.bypass, draft.adapter) for draft in exits])
    assert [draft.path for draft in exits] == paths
    assert len(log) == settings.num_steps
    for old, new in zip(before, after):
        assert new.divergence < 0.9 * old.divergence
        assert new.agreement > old.agreement
    swapped = [(draft.path, draft.bypass, other.adapter) for draft, other in zip(exits, reversed(exits), strict=True)]
    assert all(right.divergence > new.divergence for right, new in zip(measure(teacher, held_out, swapped), after))


def test_the_bypass_of_a_gap_starts_where_it_predicts_the_gap(made: tuple[Any, Artifact]) -> None:
    """Fails if a gap's bypass is computed from other layers than those of the gap, or goes to another path."""
    model, _ = made
    text = np.random.default_rng(0).integers(0, 24, (8, 32))
    teacher = DraftTeacher(model, 16)
    paths = [path_of([0, 1, 2, 6, NUM_LAYERS - 1]), path_of([0, 1, 2, 4, 6, NUM_LAYERS - 1])]
    starts = fit_gaps(model, torch.from_numpy(text), 16, paths)
    assert [start.layers for start in starts] == [(3,), (3, 5)]
    swapped = [replace(starts[1], layers=(3,)), replace(starts[0], layers=(5,))]
    bare, fitted, wrong = (
        measure(teacher, text, [(path, bypass, None) for path, bypass in zip(paths, of_paths)])
        for of_paths in ([None, None], starts, swapped)
    )
    for nothing, own, other in zip(bare, fitted, wrong):
        assert own.divergence < nothing.divergence
        assert own.divergence < other.divergence


@pytest.mark.parametrize("gaps", [False, True], ids=["adapters", "gaps"])
def test_memory_does_not_grow_with_the_batch(
    gaps: bool, made: tuple[Any, Artifact], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if the logits of a whole batch are in memory at once: batch times length times vocabulary."""
    model, artifact = made
    length, batch, rows = 64, 8, []
    linear = torch.nn.functional.linear

    def watched(hidden: torch.Tensor, weight: torch.Tensor, *others: Any) -> torch.Tensor:
        if len(weight) == VOCAB_SIZE:
            rows.append(hidden.numel() // hidden.shape[-1])
        return linear(hidden, weight, *others)

    monkeypatch.setattr(torch.nn.functional, "linear", watched)
    settings = DraftTrainingSettings(
        out="x", data=DATA, length=length, batch=batch, tokens=batch * length, min_depth=3, max_depth=4
    )
    paths = [artifact.first_path(4) or 0]
    text = np.random.default_rng(0).integers(0, VOCAB_SIZE, (batch, length))
    starts = fit_gaps(model, torch.from_numpy(text), settings.rank, paths) if gaps else [None]
    fit_exits(
        DraftTeacher(model, settings.top_logits), [text], paths, starts, artifact.bypass, settings, lambda _: None
    )
    assert len(rows) > batch
    assert max(rows) <= 128


def test_frequent_is_what_the_mix_has_most_of() -> None:
    """Fails if a long source drowns a short one of more weight, or held-out text counts."""
    sequences = np.array([[1, 1, 2], [7, 7, 7], [3, 3, 4], [3, 3, 4], [3, 3, 4]], dtype=np.int32)
    corpus = Corpus(sequences, np.arange(5), np.array([0, 2, 5]), "", {})
    counts = corpus.counts([3.0, 1.0], 9, held_out=np.array([1]))
    np.testing.assert_allclose(counts, [0, 2, 1, 2 / 3, 1 / 3, 0, 0, 0, 0])
    assert frequent_tokens(counts, 2).tolist() == [1, 2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"min_depth": 9, "max_depth": 8}, "min_depth .* is more than max_depth"),
        ({"refine_depth": 12}, "refine_depth .* must be more than the 12 layers"),
        ({"depth": 5, "refine_depth": 5}, "must be more than the 5 layers"),
        ({"tokens": 100}, "less than one batch of 2 x 256"),
        ({"held_out_tokens": 100}, "less than one sequence of 256"),
        ({"depth": 2}, "depth"),
        ({"learning_rate": float("nan")}, "learning_rate"),
        ({"rank": 5}, "rank must be even, not 5"),
    ],
)
def test_settings_that_cannot_work_are_refused(change: dict[str, Any], message: str) -> None:
    """Fails if settings that cannot work are found only after the search."""
    with pytest.raises(ValueError, match=message):
        DraftTrainingSettings(out="x", data=DATA, **change)


@pytest.fixture
def command(tmp_path: Path, model_with_tokenizer: Path, data: Path) -> list[str]:
    random_artifact(tmp_path / "artifact", model_with_tokenizer, bypass_rank=4, predictor_depths=(4, 8))
    (tmp_path / "artifact" / "README.md").write_text(f"# a\n\n{DRAFTS_HEADING}\n\nThere are none.\n\n## Last\n")
    config = tmp_path / "drafts.yaml"
    config.write_text(
        f"artifact: {tmp_path / 'artifact'}\nmodel: {model_with_tokenizer}\ndata: [{{file: {data}}}]\n"
        "min_depth: 3\nmax_depth: 5\nrefine_depth: 7\nrank: 4\nlength: 32\nbatch: 2\ntokens: 512\n"
        "held_out_tokens: 128\nsearch_tokens: 128\nvocabulary: 20\ndtype: float32\n"
    )
    return ["train-drafts", str(config), f"out={tmp_path / 'out'}"]


def test_from_files_to_an_artifact_with_exits(
    tmp_path: Path, command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Fails if the command loses a part of the artifact, or exits, card and record do not say the same."""
    assert main(command) == 0
    out = tmp_path / "out"
    before, artifact = load_artifact(tmp_path / "artifact"), load_artifact(out)
    assert artifact.without_drafts().digest == before.digest
    depths = [draft.path.bit_count() for draft in artifact.drafts]
    assert depths[0] in (3, 4, 5)
    assert depths[1:] == [7]
    assert len((out / LOG_FILE).read_text().splitlines()) == 512 // (2 * 32)
    card, record = (out / "README.md").read_text(), (out / "run.yaml").read_text()
    assert f"| {', '.join(map(str, layers_of(artifact.drafts[0].path)))} |" in card
    assert "There are none" not in card
    assert card.endswith("\n## Last\n")
    found = json.loads(f"[{record.split('layers: ')[1].splitlines()[0]}]")
    assert found[0][0] == 0
    assert artifact.draft_vocabulary is not None
    assert len(artifact.draft_vocabulary) == 20
    assert "Drafts choose among the 20 tokens that are most frequent" in card
    printed = capsys.readouterr()
    assert f"{depths[0]} layers, on held-out text" in printed.out
    assert "5 layers:" in printed.err
    assert main(command) == 0  # over its own result
    # Again, from the result itself: exits are replaced, not added.
    assert main([*command, f"artifact={out}", "depth=4", "refine_depth=null", "vocabulary=null"]) == 0
    again = load_artifact(out)
    assert [draft.path.bit_count() for draft in again.drafts] == [4]
    assert again.draft_vocabulary is None
    assert (out / "README.md").read_text().count(DRAFTS_HEADING) == 1
    assert (out / "run.yaml").read_text().count("\ndrafts:") + (out / "run.yaml").read_text().startswith("drafts:") == 1


def test_another_artifact_is_not_overwritten(
    tmp_path: Path, command: list[str], model_with_tokenizer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fails if an artifact of another training is lost."""
    out = tmp_path / "out"
    before = random_artifact(out, model_with_tokenizer, bypass_rank=2)
    assert main(command) == 2
    assert f"{out} holds another artifact than {tmp_path / 'artifact'}" in capsys.readouterr().err
    assert load_artifact(out).digest == before.digest


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("refine_depth=8", "drafts of 8 layers were asked for, the model has 8"),
        ("artifact=nowhere", "no artifact at nowhere"),
        ("vocabulary=100000", "lower vocabulary, or leave it out"),
        ("tokens=1000000", "none is left to hold out"),
        ("out=/proc/no/such", "cannot make the folder"),
        ("depht=3", "unknown settings depht"),
        ("learning_rate=1e30", "lower learning_rate"),
    ],
)
def test_what_cannot_be_trained_is_one_line(
    command: list[str], change: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fails if a mistake ends in a traceback."""
    assert main([*command, change]) == 2
    assert message in capsys.readouterr().err

"""Stage 1 of training, from settings to an artifact that can be served."""

import json
import re
import shlex
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from tests.harness.tiny_models import NUM_LAYERS, load_model
from tests.training.conftest import run
from vllm_buddy.artifact import RUN_FILE, identify, load_artifact, with_drafts
from vllm_buddy.baselines import LayerOrder, OrderFile
from vllm_buddy.cli import main
from vllm_buddy.data_file import DataFile
from vllm_buddy.errors import BuddyError, DataError, TrainingError
from vllm_buddy.evaluation.request_samples import SampleShape, request_samples
from vllm_buddy.method import (
    DraftExit,
    ExitAdapter,
    FoldedDecision,
    PathSchedule,
    RequestRoute,
    batched,
    layers_of,
)
from vllm_buddy.method.decision import value_table
from vllm_buddy.method.reference import generate, routed_logits
from vllm_buddy.models.folder import load_tokenizer
from vllm_buddy.training import checkpoint, start
from vllm_buddy.training.corpus import Corpus
from vllm_buddy.training.draft_settings import DraftTrainingSettings
from vllm_buddy.training.dry_run import dry_run
from vllm_buddy.training.loop import LOG_FILE
from vllm_buddy.training.regression import fit_bypass
from vllm_buddy.training.routing import LearnedRouting
from vllm_buddy.training.settings_file import read_settings_file
from vllm_buddy.training.stage1_record import finish_run
from vllm_buddy.training.stage1_settings import Stage1Settings
from vllm_buddy.training.stage2_settings import Stage2Settings

RECIPES_DIR = Path(__file__).parents[2] / "recipes"
RECIPES = {
    "bypass": {"paths": "searched"},
    "bypass, static order": {"paths": "reverse"},
    "bypass by muon": {"paths": "reverse", "optimizer": "muon"},
    "bypass with a router": {"paths": "searched", "router_windows": 12, "library": 2, "decide_every": 0},
    "bypass from zeros, paths learned": {"paths": "learned", "prior": "reverse", "init_tokens": 0},
    "bypass with full prompts": {"paths": "searched", "full_prompt_share": 0.5},
    "bypass explored first": {"paths": "searched", "explore_tokens": 3 * 4 * 32, "tokens": 9 * 4 * 32},
    "distill": {"recipe": "distill", "paths": "learned", "prior": "reverse"},
    "distill, static order": {"recipe": "distill", "paths": "reverse"},
    "paper": {"recipe": "paper", "paths": "learned", "prior": "reverse", "rank": 8},
}


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_makes_an_artifact_that_loads_and_routes(settings: dict[str, Any], name: str) -> None:
    """Fails if a recipe trains an artifact that cannot be loaded or routed."""
    artifact, stage, losses = run(settings | RECIPES[name])
    finish_run(artifact, stage, Stage1Settings(**settings | RECIPES[name]), "vllm-buddy train", None)
    loaded = load_artifact(settings["out"])
    assert loaded.digest == artifact.digest
    assert loaded.schedule().interval == RECIPES[name].get("decide_every", PathSchedule().interval)
    assert all(np.isfinite(losses))
    assert len(losses) == RECIPES[name].get("tokens", 6 * 4 * 32) // (4 * 32)
    assert {p.name for p in settings["out"].iterdir()} >= {"README.md", "run.yaml", "curves.png", LOG_FILE}
    recipe = RECIPES[name].get("recipe", "bypass")
    assert (loaded.bypass is not None, loaded.lora is not None) == (recipe == "bypass", recipe != "bypass")
    model = load_model(settings["model"])
    if loaded.lora is not None:
        loaded.lora.merge_into(model)
    route = RequestRoute(loaded.router(), PathSchedule(4), 5, [5, 6, 7])
    done = generate(model, route, [5, 6, 7], 9, "masked", bypass=loaded.bypass)
    assert {len(layers_of(path)) for path in done.paths} == {5}


def test_a_learned_decision_is_served_on_what_it_was_trained_on(settings: dict[str, Any]) -> None:
    """Fails if a Decision Module that learned from the base model's values is folded over those of the trained LoRA."""
    artifact, stage, _ = run(settings | RECIPES["paper"] | {"learning_rate": 0.05})
    assert isinstance(stage.routing, LearnedRouting)
    expected = FoldedDecision.fold(stage.routing.decision, value_table(load_model(settings["model"])))
    trained = FoldedDecision.fold(stage.routing.decision, value_table(stage.model))
    assert artifact.decision is not None
    assert not np.array_equal(expected.table_context, trained.table_context)
    assert np.array_equal(artifact.decision.table_context, expected.table_context)


def test_full_depth_is_the_base_model_to_the_last_bit(settings: dict[str, Any]) -> None:
    """Fails if a bypass changes a request at budget 1.0."""
    artifact, _, _ = run(settings)
    model = load_model(settings["model"])
    tokens = list(range(40, 60))
    full = [(1 << NUM_LAYERS) - 1] * len(tokens)
    with_bypass = routed_logits(model, tokens, full, "masked", bypass=artifact.bypass)
    assert torch.equal(with_bypass, routed_logits(model, tokens, full, "masked"))


@pytest.mark.parametrize("name", ["bypass", "paper"])
def test_two_runs_of_one_seed_are_one_run(settings: dict[str, Any], name: str, tmp_path: Path) -> None:
    """Fails if a second run with the same seed gives other losses, or a run with another seed the same."""
    first, _, losses = run(settings | RECIPES[name])
    second, _, again = run(settings | RECIPES[name] | {"out": tmp_path / "again", "name": "run"})
    assert losses == again
    assert first.digest == second.digest
    _, _, other = run(settings | RECIPES[name] | {"out": tmp_path / "other", "seed": 1})
    assert other != losses


@pytest.mark.parametrize("name", ["bypass", "bypass by muon", "paper"])
@pytest.mark.parametrize(("stop_after", "saved"), [(3, 2), (6, 4)])
def test_a_stopped_run_goes_on_with_the_same_losses(
    settings: dict[str, Any], name: str, stop_after: int, saved: int, tmp_path: Path
) -> None:
    """Fails if a resumed run draws other data, loses the optimizer's state or logs a step twice."""
    whole, _, losses = run(settings | RECIPES[name] | {"out": tmp_path / "whole", "name": "run"})
    with pytest.raises(KeyboardInterrupt):
        run(settings | RECIPES[name], stop_after)
    with (settings["out"] / LOG_FILE).open("a") as log:
        log.write('{"step": 4, "lo')  # what a full disk leaves
    resumed, _, rest = run(settings | RECIPES[name])
    assert rest == losses[saved:]
    assert resumed.digest == whole.digest
    rows = [json.loads(line) for line in (settings["out"] / LOG_FILE).read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(6))
    assert [row["loss"] for row in rows] == losses


def test_a_stopped_run_may_be_shortened(settings: dict[str, Any]) -> None:
    """Fails if a run that takes too long must be thrown away, or its record hides that it was to be longer."""
    with pytest.raises(KeyboardInterrupt):
        run(settings, 3)
    shorter = settings | {"tokens": settings["tokens"] * 5 // 6}
    artifact, stage, rest = run(shorter)
    assert len(rest) == 3  # steps 2 to 4
    finish_run(artifact, stage, Stage1Settings(**shorter), "vllm-buddy train", None)
    record = yaml.safe_load((settings["out"] / RUN_FILE).read_text())
    assert record["lengths"] == [
        {"from_step": 0, "tokens": settings["tokens"]},
        {"from_step": 2, "tokens": shorter["tokens"]},
    ]


def test_the_card_counts_what_was_trained(settings: dict[str, Any]) -> None:
    """Fails if a run that was shortened after more steps than it has now is said to have seen less text."""
    explored = settings | {"explore_tokens": 2 * 4 * 32 + 5}
    run(explored)
    shorter = explored | {"tokens": 4 * 4 * 32}
    artifact, stage, rest = run(shorter)
    assert rest == []
    finish_run(artifact, stage, Stage1Settings(**shorter), "vllm-buddy train", None)
    assert f"Trained on {6 * 4 * 32} tokens of" in (settings["out"] / "README.md").read_text()
    assert yaml.safe_load((settings["out"] / RUN_FILE).read_text())["trained_tokens"] == 6 * 4 * 32


def test_a_folder_with_another_run_is_refused(settings: dict[str, Any]) -> None:
    """Fails if a run is resumed with other settings."""
    run(settings)
    with pytest.raises(TrainingError, match="other settings"):
        run(settings | {"learning_rate": 0.5})


def test_a_run_is_not_resumed_on_other_weights_or_another_order(settings: dict[str, Any], tmp_path: Path) -> None:
    """Fails if a run goes on with the model, the artifact or the orders that were put in the place of its own."""
    model = tmp_path / "model"
    shutil.copytree(settings["model"], model)
    run(settings | {"model": model})
    tuned: Any = load_model(model)
    with torch.no_grad():
        tuned.model.layers[3].mlp.down_proj.weight.mul_(1.5)
    tuned.save_pretrained(model)
    with pytest.raises(TrainingError, match="other settings, data or weights"):
        run(settings | {"model": model})

    first, second = run(settings | {"out": tmp_path / "a"})[0], run(settings | {"out": tmp_path / "b", "seed": 1})[0]
    more = settings | {"start_from": str(tmp_path / "start"), "out": tmp_path / "more"}
    first.save(tmp_path / "start")
    run(more)
    second.save(tmp_path / "start")
    with pytest.raises(TrainingError, match="other settings, data or weights"):
        run(more)

    orders = tmp_path / "orders.json"
    static = settings | {"paths": "shortgpt", "orders": orders, "out": tmp_path / "static"}
    for layers in ([3, 5, 1, 2, 4, 6], [5, 3, 1, 2, 4, 6]):
        order = LayerOrder(
            method="shortgpt", calibration="x", calibration_sha256="0", num_tokens=1, window=1, layers=layers
        )
        OrderFile(base_model=identify(settings["model"]), orders=[order]).save(orders)
        if layers[0] == 3:
            run(static)
    with pytest.raises(TrainingError, match="other settings, data or weights"):
        run(static)


def test_a_full_disk_leaves_the_last_checkpoint(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a full disk destroys the last checkpoint."""
    saved = torch.save

    def full(state: dict[str, Any], file: Any) -> None:
        if state.get("step", 0) > 2:
            file.write(b"half")
            raise OSError(28, "No space left on device")
        saved(state, file)

    monkeypatch.setattr(checkpoint.torch, "save", full)
    with pytest.raises(TrainingError, match=r"No space left on device.*is intact"):
        run(settings)
    monkeypatch.undo()
    assert checkpoint.load_state(settings["out"] / checkpoint.CHECKPOINT_FILE)["step"] == 2
    assert not list(settings["out"].glob("*.partial"))
    _, _, rest = run(settings)
    assert len(rest) == 4


def test_a_loss_that_is_not_finite_stops_and_names_the_step(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if weights that are NaN replace the last good checkpoint."""
    from vllm_buddy.training import loop

    calls, loss = [], loop.distillation_loss

    def broken(*args: Any) -> torch.Tensor:
        calls.append(1)
        return loss(*args) * (float("nan") if len(calls) > 4 * 3 else 1.0)

    monkeypatch.setattr(loop, "distillation_loss", broken)
    with pytest.raises(TrainingError, match="step 3: the loss is nan"):
        run(settings)
    state = checkpoint.load_state(settings["out"] / checkpoint.CHECKPOINT_FILE)
    assert state["step"] == 2
    assert all(p.isfinite().all() for p in state["parameters"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"paths": "best"}, "unknown static method 'best'"),
        ({"recipe": "distill"}, "paths are searched for a bypass"),
        ({"recipe": "paper"}, "set paths to learned"),
        ({"rank": 3}, "rank must be even"),
        ({"optimizer": "muon", "recipe": "distill", "paths": "learned"}, "optimizer muon is for recipe bypass"),
        ({"batch": 4, "micro_batch": 3}, "multiple of micro_batch"),
        ({"tokens": 5}, "less than one batch"),
        ({"kv_policy": "none"}, "none"),
        ({"min_budget": 0.999999999}, "is all 8 layers"),
        ({"top_logits": 1 << 20}, "top_logits is 1048576, the model has"),
        ({"full_prompt_share": 0.5, "paths": "learned"}, "of one searched or static path"),
        ({"router_windows": 3}, "set it to 0 or to 4 and more"),
        ({"start_from": "smollm2-135m", "paths": "shortgpt"}, "shortgpt would be ignored"),
        ({"router_windows": 4, "batch": 2, "tokens": 64}, "fitted on 4 sequences or more, and training has 2"),
        ({"min_budget": 0.01}, "budget"),
        ({"length": 4096, "tokens": 1 << 20}, "beyond the model's|less than one sequence"),
        ({"data": []}, "at least 1"),
        ({"learning_rate": float("nan")}, "finite"),
        ({"colour": 1}, "[Ee]xtra"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, Any], change: dict[str, Any], message: str) -> None:
    """Fails if settings that cannot work are found only after training has started."""
    with pytest.raises((BuddyError, ValueError), match=message):
        run(settings | change)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", None, "cannot read"),
        ("a.txt", b"", "is empty"),
        ("a.txt", b" \n ", "is empty"),
        ("a.txt", b"ab\0cd" * 100, "NUL"),
        ("a.txt", b"\xff\xfe\xfd" * 100, "not UTF-8"),
        ("a.txt", b"short", "less than one sequence"),
        ("a.csv", b"x,y\n" * 100, "known are .txt, .json and .jsonl"),
        ("a.json", b"{", "is not JSON"),
        ("a.json", b"{}", "list of rows"),
        ("a.jsonl", b'{"question": "?"}', "row 0 has neither"),
        ("a.jsonl", b'{"text": "x"}\n\n{"text": ', "line 3 is not JSON"),
        ("a.jsonl", b'{"text": "x", "id": ' + b"9" * 5000 + b"}", "line 1 is not JSON"),
        ("a.json", b"[" * 10**6, "is not JSON"),
        ("a.jsonl", b'{"text": "a\\ud800b"}', "`text` holds half of a surrogate pair"),
        ("a.jsonl", b'{"instruction": "a", "input": 5, "output": "b"}', "row 0: `input` is not text"),
        ("a.json", b'[{"text": "' + b"x" * 64 + b'"}, {"instruction": 1}]', "row 1 has neither"),
    ],
)
def test_data_that_cannot_be_used_is_refused(
    settings: dict[str, Any], tmp_path: Path, name: str, content: bytes | None, message: str
) -> None:
    """Fails if unusable data is accepted, or the message does not name the file and what is allowed."""
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises((DataError, TrainingError), match=message) as caught:
        run(settings | {"data": [{"file": tmp_path / name}]})
    assert name in str(caught.value)


@pytest.mark.parametrize("kind", [Stage1Settings, Stage2Settings, DraftTrainingSettings])
def test_a_tilde_is_the_home_of_the_user(kind: type[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a path of a YAML file that begins with `~` makes a folder of that name, or is not found."""
    monkeypatch.setenv("HOME", str(tmp_path))
    place = "start_from" if kind is Stage1Settings else "artifact"
    names = [name for name in ("out", "data_dir", "model", "orders", "cache_dir", place) if name in kind.model_fields]
    config = tmp_path / "config.yaml"
    config.write_text("".join(f"{name}: ~/{name}\n" for name in names) + "data: [{file: ~/a.txt}]\n")
    settings = read_settings_file(kind, config, {})
    for name in names:
        assert getattr(settings, name) == type(getattr(settings, name))(tmp_path / name)
    assert settings.data[0].file == tmp_path / "a.txt"
    assert read_settings_file(kind, None, {"out": "b", "data": "[{file: c}]", place: "smollm2-135m"}).out == Path("b")


@pytest.mark.parametrize("kind", [Stage1Settings, Stage2Settings, DraftTrainingSettings])
def test_two_sources_of_one_name_are_refused(kind: type[Any], tmp_path: Path) -> None:
    """Fails if one of two files of the same name is missing in the record and the hashes of a run."""
    sources = [{"file": tmp_path / folder / "rows.jsonl"} for folder in ("a", "b")]
    with pytest.raises(ValueError, match=r"two sources are named rows\.jsonl"):
        kind(out=tmp_path, data=sources)
    assert kind(out=tmp_path, data=sources[:1]).data


def test_rows_of_instructions_become_conversations(settings: dict[str, Any], tmp_path: Path) -> None:
    """Fails if instruction data loses its inputs or its answers."""
    rows = [{"instruction": f"Say {i}", "input": "twice", "output": f"{i} {i}"} for i in range(200)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    _, stage, _ = run(settings | {"data": [{"file": tmp_path / "rows.json"}]})
    texts = load_tokenizer(settings["model"]).batch_decode(stage.corpus.sequences)
    assert any(re.search(r"Say (\d+)\n\ntwice\n\n\1 \1", text) for text in texts)


def test_a_share_of_rows_is_the_part_that_evaluation_leaves_out(settings: dict[str, Any], tmp_path: Path) -> None:
    """Fails if training sees rows that `eval-budget` draws its samples from."""
    lengths = [10] * 8 + [200, 200]  # of ten rows, the last two hold most of the tokens
    rows = [{"text": letter * length} for letter, length in zip("abcdefghij", lengths, strict=True)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    sources = Stage1Settings(**settings | {"data": [{"file": tmp_path / "rows.json", "share": 0.8}]}).data
    tokenizer = load_tokenizer(settings["model"])
    corpus = Corpus.read(sources, None, tokenizer, 16, 2, 0)
    assert set(tokenizer.decode(corpus.sequences.ravel(), skip_special_tokens=True)) <= set("abcdefgh")
    file = DataFile.read(tmp_path / "rows.json")
    drawn = request_samples(file, tokenizer, (0.8, 1.0), 2, SampleShape(8, 16, 16), 0)
    assert {char for sample in drawn for char in tokenizer.decode(list(sample.token_ids))} <= set("ij")


def test_a_share_without_rows_is_told(settings: dict[str, Any], tmp_path: Path) -> None:
    """Fails if a share that rounds to no row ends in a tokenizer's traceback."""
    (tmp_path / "rows.json").write_text(json.dumps([{"text": "abc"}] * 3))
    with pytest.raises(TrainingError, match="less than one sequence"):
        run(settings | {"data": [{"file": tmp_path / "rows.json", "share": 0.3}]})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "two\nlines"}, "describe no artifact: name"),
        ({"recipe": "distill", "paths": "reverse", "lora_alpha": 1e9}, "describe no artifact: alpha"),
    ],
)
def test_what_cannot_be_saved_is_not_trained(settings: dict[str, Any], changes: dict[str, Any], message: str) -> None:
    """Fails if hours of training end in an artifact that its own schema refuses."""
    with pytest.raises(TrainingError, match=message):
        run(settings | changes, 1)


def test_a_repair_larger_than_an_artifact_may_be_is_not_trained(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if the limit of an artifact's size is looked at when training is done."""
    monkeypatch.setattr("vllm_buddy.artifact.files.MOST_WEIGHTS_BYTES", 1000)
    with pytest.raises(BuddyError, match="the repair that is to be trained would take"):
        run(settings, 1)


def test_many_sources_fit_into_the_artifacts_record(settings: dict[str, Any], data: Path, tmp_path: Path) -> None:
    """Fails if a run of many sources ends, when all is trained, in a name that is too long for the artifact."""
    sources = []
    for number in range(12):
        (tmp_path / f"{number:060}.txt").write_text(data.read_text())
        sources.append({"file": tmp_path / f"{number:060}.txt"})
    artifact, _, _ = run(settings | {"data": sources})
    artifact.save(tmp_path / "saved")
    assert load_artifact(tmp_path / "saved").config.prior.calibration.endswith("...")


def test_a_run_does_not_replace_what_it_has_not_made(settings: dict[str, Any], tmp_path: Path) -> None:
    """Fails if `train` overwrites the artifact it starts from, another one, or what was added to its own."""
    first = tmp_path / "first"
    artifact, stage, _ = run(settings | {"out": first})
    finish_run(artifact, stage, Stage1Settings(**settings | {"out": first}), "vllm-buddy train", None)
    with pytest.raises(TrainingError, match="start_from and out are both"):
        run(settings | {"out": first, "start_from": str(first)}, 1)
    shutil.copytree(first, tmp_path / "other", ignore=shutil.ignore_patterns("*.pt"))
    with pytest.raises(TrainingError, match="an artifact of another origin"):
        run(settings | {"out": tmp_path / "other"}, 1)
    run(settings | {"out": first})  # going on with what is done
    exits = DraftExit(0b1000_0101, ExitAdapter(torch.zeros(2, 128), torch.zeros(128, 2), 1e-6))
    with_drafts(load_artifact(first), (exits,), None).save(first)
    with pytest.raises(TrainingError, match="has got draft exits since it was trained"):
        run(settings | {"out": first}, 1)


def test_rows_may_hold_separators_of_lines(tmp_path: Path) -> None:
    """Fails if a string of JSON is cut at a character that ends lines elsewhere."""
    rows = [{"text": "one\u2028two\u0085three"}, {"text": "four"}]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\r\n" for row in rows))
    assert DataFile.read(file).rows == rows


def test_overrides_go_on_top_of_the_file(tmp_path: Path) -> None:
    """Fails if an override does not replace the value of the file, or a mistyped key is ignored."""
    config = tmp_path / "run.yaml"
    config.write_text("out: here\ndata: [{file: a.txt}]\nrank: 8\n")
    read = Stage1Settings.read(config, {"rank": "16", "learning_rate": "0.002"})
    assert (read.rank, read.learning_rate, str(read.out)) == (16, 0.002, "here")
    with pytest.raises(TrainingError, match="unknown settings rnk; known are"):
        Stage1Settings.read(config, {"rnk": "16"})
    with pytest.raises(TrainingError, match="cannot read"):
        Stage1Settings.read(tmp_path / "no.yaml", {})
    for wrong in ("2026-13-45", "9" * 5000, "[" * 10**4):
        with pytest.raises(TrainingError, match="is not YAML"):
            Stage1Settings.read(config, {"rank": wrong})
    config.write_text("5: 3\non: x\n")
    with pytest.raises(TrainingError, match="unknown settings 5, True; known are"):
        Stage1Settings.read(config, {})


@pytest.mark.parametrize("overrides", [{}, {"data": "text.txt"}])
def test_data_that_is_no_list_is_answered_with_an_example(overrides: dict[str, str]) -> None:
    """Fails if who leaves the data out, or names a file alone, is not told how data are named."""
    with pytest.raises(TrainingError, match=r"data=\[{file: text.txt}\]"):
        Stage1Settings.read(None, {"out": "here", **overrides})


def test_no_room_for_the_logits_is_found_before_training(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if a full disk is noticed only by a write to the mapped file, which kills the process without a message."""
    usage = shutil.disk_usage("/")
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(TrainingError, match=r"logits need .* MiB .* cache_dir"):
        run(settings)


def test_a_second_run_finds_the_logits_of_the_first(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if a second run computes the full model's logits again."""
    from vllm_buddy.training.teacher import Teacher

    computed: list[int] = []
    compute = Teacher._compute

    def counted(self: Teacher, token_ids: torch.Tensor) -> Any:
        computed.append(len(token_ids))
        return compute(self, token_ids)

    monkeypatch.setattr(Teacher, "_compute", counted)
    cache, usage = {"cache_dir": tmp_path / "cache"}, shutil.disk_usage("/")
    _, stage, losses = run(settings | cache)
    assert sum(computed) == len(np.unique(stage.corpus.order))
    computed.clear()
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage._replace(free=1000))  # which is enough now
    assert run(settings | cache | {"out": tmp_path / "again"})[2] == losses
    assert computed == []


def test_a_folder_that_cannot_be_made_is_one_line(settings: dict[str, Any], data: Path) -> None:
    """Fails if naming a file as the folder ends in a traceback."""
    with pytest.raises(TrainingError, match="cannot make the folder"):
        run(settings | {"out": data})
    with pytest.raises(TrainingError, match=r"cannot write the full model's logits to .*: Not a directory"):
        run(settings | {"cache_dir": data})


@pytest.mark.parametrize("name", sorted(path.name for path in RECIPES_DIR.glob("*.yaml")))
def test_every_recipe_is_valid(name: str) -> None:
    """Fails if a recipe in the repository has a setting that training no longer knows."""
    others = {"budget": Stage2Settings, "drafts": DraftTrainingSettings}
    kind = name.removesuffix(".yaml").rsplit("-", 1)[-1]
    assert read_settings_file(others.get(kind, Stage1Settings), RECIPES_DIR / name, {"out": "out"}).data


def test_checkpointed_activations_change_nothing_but_memory(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if activations are kept all the same, gradients differ, or a stopped run cannot switch to it."""
    calls: list[int] = []
    checkpointed = batched.checkpointed

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(len(losses))
        return checkpointed(*args, **kwargs)

    monkeypatch.setattr(batched, "checkpointed", counted)
    again = settings | {"out": tmp_path / "again", "checkpoint_activations": True}
    losses: list[list[float]] = []
    for one in (settings, again):
        losses.append(run(one)[2])
    assert set(calls) == {1}
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)
    assert Stage1Settings(**settings).digest == Stage1Settings(**again).digest


def test_the_closed_form_start_keeps_no_activations(settings: dict[str, Any]) -> None:
    """Fails if the start of a run that recomputes activations keeps them, or begins with another bypass."""
    model = load_model(settings["model"]).requires_grad_(False)
    windows = torch.randint(0, 512, (2, 32), generator=torch.Generator().manual_seed(0))
    kept: list[int] = []
    found = []
    for again in (False, True):
        kept.append(0)

        def count(tensor: torch.Tensor) -> torch.Tensor:
            kept[-1] += tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            found.append(fit_bypass(model, windows, 4, checkpoint=again))
    assert torch.equal(found[0].up, found[1].up)
    assert torch.equal(found[0].down, found[1].down)
    assert kept[1] < kept[0] / 4


def test_orders_of_another_model_come_from_a_file(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if a static order is not taken from the file, or is found missing only after the model was loaded."""
    static = settings | {"recipe": "distill", "paths": "shortgpt"}
    with monkeypatch.context() as patched:
        patched.setattr("vllm_buddy.training.stage1.load_base", None)
        with pytest.raises(BuddyError, match="vllm-buddy orders FILE --methods shortgpt"):
            run(static)
    layers = [3, 5, 1, 2, 4, 6]
    order = LayerOrder(
        method="shortgpt", calibration="x", calibration_sha256="0", num_tokens=1, window=1, layers=layers
    )
    OrderFile(base_model=identify(settings["model"]), orders=[order]).save(tmp_path / "orders.json")
    artifact, stage, _ = run(static | {"orders": tmp_path / "orders.json"})
    library = artifact.config.library
    assert library is not None
    assert library[NUM_LAYERS - 2][0] == [0, 1, 2, 4, 6, 7]
    assert stage.settings.orders is not None


def test_the_regression_is_not_made_twice(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a run that is killed while it explores begins again with the closed-form start."""
    exploring = settings | RECIPES["bypass explored first"]
    with pytest.raises(KeyboardInterrupt):
        run(exploring, 1)
    monkeypatch.setattr(start, "fit_bypass", None)
    run(exploring)


def test_a_dry_run_measures(settings: dict[str, Any], tmp_path: Path) -> None:
    """Fails if the numbers of a dry run are not those of this model and these settings."""
    checked = Stage1Settings(**settings)
    found = dry_run(checked, settings["model"])
    weights, repair, moments = found.memory.values()
    parameters = sum(p.numel() for p in load_model(settings["model"]).parameters())
    hidden, middle = 128, NUM_LAYERS - 2
    assert weights == 4 * parameters
    assert repair == 4 * 4 * middle * 2 * hidden * checked.rank
    assert moments == 3 * 4 * middle * hidden**2
    assert found.disk == 6 * 4 * 32 * checked.top_logits * 6  # sequences, their tokens, and bytes of a logit
    assert found.peak > weights
    assert found.start_peak > weights
    assert found.seconds == pytest.approx(checked.tokens / found.tokens_per_second)


def test_a_dry_run_needs_no_room_for_the_whole_run(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a small temporary folder keeps a user from measuring what a large run takes."""
    room = 3 * 4 * 32 * settings["top_logits"] * 6  # of the steps that it measures
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=room))
    assert dry_run(Stage1Settings(**settings), settings["model"]).disk == 2 * room


def test_a_dry_run_of_a_short_run_measures_the_usual_steps(settings: dict[str, Any]) -> None:
    """Fails if the dry run of a run of fewer steps than it measures runs out of sequences."""
    found = dry_run(Stage1Settings(**settings | {"tokens": 4 * 32}), settings["model"])
    assert found.disk == 4 * 32 * settings["top_logits"] * 6  # of the one step that the run has
    assert found.seconds == pytest.approx(4 * 32 / found.tokens_per_second)


def test_settings_without_a_file(settings: dict[str, Any], data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fails if a run needs a file though all its settings are given, or its record cannot be pasted into a shell."""
    assert main(["train"]) == 2
    assert "KEY=VALUE" in capsys.readouterr().err
    assert main(["train", "tokens=1000"]) == 2
    assert "data: Field required" in capsys.readouterr().err
    words = [f"{key}={value}" for key, value in settings.items() if key != "data"]
    assert main(["train", *words, f"data=[{{file: {data}}}]"]) == 0
    assert load_artifact(settings["out"]).bypass is not None
    command = yaml.safe_load((settings["out"] / RUN_FILE).read_text())["command"]
    assert shlex.split(command) == ["vllm-buddy", "train", *words, f"data=[{{file: {data}}}]"]


@pytest.mark.parametrize("recipe", ["bypass", "distill"])
def test_a_dry_run_tells_and_writes_nothing(
    settings: dict[str, Any], data: Path, recipe: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fails if a dry run leaves files, or does not say memory, disk and time."""
    paths = "searched" if recipe == "bypass" else "random"
    words = [f"{key}={value}" for key, value in settings.items() if key != "data"]
    assert main(["train", *words, f"data=[{{file: {data}}}]", f"recipe={recipe}", f"paths={paths}", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "base weights (float32)" in said
    assert said.count("closed-form start") == (3 if recipe == "bypass" else 0)
    assert "tokens/s on random paths: 768 tokens take 0.0 hours" in said
    assert not settings["out"].exists()


def test_list_shows_the_settings_without_a_config(capsys: pytest.CaptureFixture[str]) -> None:
    """Fails if the list of settings needs a configuration file."""
    assert main(["train", "--list"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in Stage1Settings.model_fields)
    assert main(["train"]) == 2

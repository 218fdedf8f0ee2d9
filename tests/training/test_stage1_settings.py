"""Settings of training: how they are read, and which are refused before anything is trained."""

from pathlib import Path
from typing import Any

import pytest

from tests.training.conftest import run
from vllm_buddy.errors import BuddyError, TrainingError
from vllm_buddy.training.draft_settings import DraftTrainingSettings
from vllm_buddy.training.settings_file import read_settings_file
from vllm_buddy.training.stage1_settings import Stage1Settings
from vllm_buddy.training.stage2_settings import Stage2Settings

RECIPES_DIR = Path(__file__).parents[2] / "recipes"
BY_TOKEN = {"schedule": "token", "token_depths": (4, 6), "kv_policy": "kv_only", "token_windows": 12}


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
        (BY_TOKEN | {"paths": "learned"}, "schedule token needs one path of each depth"),
        (BY_TOKEN | {"token_depths": (4, 9)}, "there is no path of 9 layers; those of a model of 8 layers have 3 to 7"),
        (BY_TOKEN | {"token_depths": (2, 6)}, "there is no path of 2 layers"),
        ({"data": []}, "at least 1"),
        ({"learning_rate": float("nan")}, "finite"),
        ({"colour": 1}, "[Ee]xtra"),
    ],
)
def test_settings_that_cannot_work_are_refused(
    settings: dict[str, Any], change: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if settings that cannot work are found only after the start of training was computed."""
    monkeypatch.setattr("vllm_buddy.training.start.fit_bypass", lambda *_, **__: pytest.fail("a regression began"))
    with pytest.raises((BuddyError, ValueError), match=message):
        run(settings | change)


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


@pytest.mark.parametrize("text", ["/x/run #2", "2026-11-30", "5", "a: b", "~/off", "[x"])
def test_words_and_paths_on_the_command_line_are_taken_as_they_are(text: str, tmp_path: Path) -> None:
    """Fails if a path that means something in YAML becomes another one, or is refused."""
    given = {"out": text, "name": text, "start_from": text, "data": "[{file: a.txt}]"}
    read = Stage1Settings.read(None, given)
    assert read.out == Path(text).expanduser()
    assert read.name == text
    assert read.start_from == str(Path(text).expanduser())
    stage2 = read_settings_file(Stage2Settings, None, {"out": text, "data": "[{file: a.txt}]", "depths": "[4, 6]"})
    assert (stage2.out, stage2.depths) == (read.out, (4, 6))
    with pytest.raises(TrainingError, match="out: Input is not a valid path"):
        Stage1Settings.read(None, given | {"out": ""})
    config = tmp_path / "run.yaml"
    config.write_text("out: here\ndata: [{file: a.txt}]\nname: x\nbase_quantisation: nf4\n")
    absent = Stage1Settings.read(config, {"name": "null", "base_quantisation": "null", "recipe": "bypass"})
    assert (absent.name, absent.base_quantisation) == (None, None)


@pytest.mark.parametrize("overrides", [{}, {"data": "text.txt"}])
def test_data_that_is_no_list_is_answered_with_an_example(overrides: dict[str, str]) -> None:
    """Fails if who leaves the data out, or names a file alone, is not told how data are named."""
    with pytest.raises(TrainingError, match=r"data=\[{file: text.txt}\]"):
        Stage1Settings.read(None, {"out": "here", **overrides})


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

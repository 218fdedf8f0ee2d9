"""Tests of what a user may name as an artifact."""

from pathlib import Path

import pytest

from vllm_buddy.artifact import NO_WEIGHTS, BaseModelIdentity, load_artifact, resolve_artifact, shipped_artifacts
from vllm_buddy.errors import ArtifactError

SHIPPED = "smollm2-135m"


def _must_not_be_called() -> BaseModelIdentity:
    raise AssertionError("the base model was identified although an artifact was named")


def _shipped_base(**changes: object) -> BaseModelIdentity:
    return load_artifact(shipped_artifacts()[SHIPPED]).config.base_model.model_copy(update=changes)


def test_a_name_is_a_shipped_artifact_or_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a named artifact is looked up elsewhere, or needs the base model, which may have to be downloaded."""
    (tmp_path / SHIPPED).mkdir()
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert resolve_artifact(SHIPPED, _must_not_be_called) == shipped_artifacts()[SHIPPED]
    assert resolve_artifact(f"./{SHIPPED}", _must_not_be_called) == Path(SHIPPED)
    assert resolve_artifact("runs/mine", _must_not_be_called) == Path("runs/mine")


@pytest.mark.parametrize("name", ["nowhere", "./runs/mine", "/runs/mine", "a/b/c"])
def test_a_name_that_can_be_no_hub_id_is_refused_without_asking_the_hub(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if a mistyped folder waits for the hub, or the message hides what was named and what there is."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *args, **kwargs: pytest.fail("the hub was asked"))
    with pytest.raises(ArtifactError, match=rf"no artifact at {name}: .*shipped artifact \(.*{SHIPPED}.*\)"):
        resolve_artifact(name, _must_not_be_called)


def test_a_hub_id_is_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if an artifact on the hub cannot be named, or a failed download ends in the hub client's own error."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, allow_patterns: str(tmp_path / name))
    assert resolve_artifact("someone/artifact", _must_not_be_called) == tmp_path / "someone/artifact"

    def offline(name: str, allow_patterns: list[str]) -> str:
        raise OSError("no route to host")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(ArtifactError, match=r"'someone/artifact' is no folder.*no route to host"):
        resolve_artifact("someone/artifact", _must_not_be_called)


@pytest.mark.parametrize("changes", [{}, {"id": "a copy", "revision": "main"}, {"fingerprint": NO_WEIGHTS}])
def test_without_a_name_the_shipped_artifact_of_the_model_is_taken(changes: dict[str, str]) -> None:
    """Fails if a model with a shipped artifact needs one to be named, under another name or without its weights."""
    assert resolve_artifact(None, lambda: _shipped_base(**changes)) == shipped_artifacts()[SHIPPED]


def test_without_a_name_the_schedule_decides_among_those_that_fit() -> None:
    """Fails if a server whose tokens have depths of their own must name the artifact that is made for it."""
    folder = resolve_artifact(None, _shipped_base, by_token=True)
    assert load_artifact(folder).token is not None
    assert load_artifact(resolve_artifact(None, _shipped_base)).token is None


@pytest.mark.parametrize("changes", [{"fingerprint": "0" * 16}, {"vocab_size": 7, "fingerprint": NO_WEIGHTS}])
def test_without_a_name_a_model_without_a_shipped_artifact_is_refused(changes: dict[str, object]) -> None:
    """Fails if a model runs with the artifact of another one, or a command that gets one lacks an option."""
    with pytest.raises(ArtifactError, match=rf"shipped are: .*{SHIPPED}.*vllm-buddy prior MODEL OUT --text FILE`"):
        resolve_artifact(None, lambda: _shipped_base(**changes))


def test_a_model_of_a_shipped_shape_is_told_what_would_serve_it() -> None:
    """Fails if who serves the hub's checkpoint of an embedded model is not told how, or others are told it too."""
    way = rf'"artifact": "{SHIPPED}", "base_check": "shape"'
    with pytest.raises(ArtifactError, match=f"{way}.*not been measured"):
        resolve_artifact(None, lambda: _shipped_base(fingerprint="0" * 16))
    with pytest.raises(ArtifactError) as refused:
        resolve_artifact(None, lambda: _shipped_base(vocab_size=7))
    assert "base_check" not in str(refused.value)

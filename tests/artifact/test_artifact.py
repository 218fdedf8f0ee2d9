"""Tests of saving and loading an artifact, and of each kind of damage to its files."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from tests.harness.random_router import NUM_LAYERS, VOCAB_SIZE, random_decision
from vllm_buddy.artifact import CONFIG_FILE, WEIGHTS_FILE, Artifact, load_artifact, shipped_artifacts, with_drafts
from vllm_buddy.artifact.config import FORMAT_VERSION, BuddyConfig, LoraConfig, PriorConfig
from vllm_buddy.artifact.fingerprint import BaseModelIdentity
from vllm_buddy.errors import ArtifactError
from vllm_buddy.method import DecisionModule, DraftExit, ExitAdapter, FoldedDecision, path_of
from vllm_buddy.method.bypass import Bypass
from vllm_buddy.method.lora import LoraDeltas
from vllm_buddy.method.path import gap_starts

BASE = BaseModelIdentity(
    id="tiny", architecture="LlamaForCausalLM", num_layers=NUM_LAYERS, hidden_size=8, vocab_size=VOCAB_SIZE,
    fingerprint="0123456789abcdef",
)  # fmt: skip
LIBRARY = {4: [[0, 1, 2, 9], [0, 1, 3, 9]], 5: [[0, 1, 2, 3, 9]]}


RANK = 3
EPS = 1e-5


def _bypass() -> Bypass:
    generator = torch.Generator().manual_seed(0)
    shape = (NUM_LAYERS - 2, RANK, BASE.hidden_size)
    down, up = torch.randn(2, *shape, generator=generator).half().float()
    return Bypass(down, up.mT.contiguous(), EPS)


def _lora() -> LoraDeltas:
    generator = torch.Generator().manual_seed(1)
    a, b = torch.randn(2, 2, 2, 8, generator=generator).half().float()
    names = ("model.layers.3.self_attn.q_proj", "model.layers.0.mlp.down_proj")
    return LoraDeltas(dict(zip(names, a)), dict(zip(names, b.mT)), alpha=4.0)


def _artifact(
    *,
    decision: bool | FoldedDecision = True,
    library: dict[int, list[list[int]]] | None = None,
    bypass: Bypass | None = None,
    lora: LoraDeltas | None = None,
) -> Artifact:
    config = BuddyConfig(
        format_version=FORMAT_VERSION,
        name="round-trip",
        base_model=BASE,
        prior=PriorConfig(indicator="taylor", calibration="random", num_tokens=17),
        has_decision_module=bool(decision),
        library=library,
        bypass_rank=0 if bypass is None else bypass.rank,
        bypass_eps=0.0 if bypass is None else bypass.eps,
        lora=None if lora is None else LoraConfig(rank=lora.rank, alpha=lora.alpha),
    )
    prior = np.random.default_rng(0).standard_normal(NUM_LAYERS - 2).astype(np.float32)
    return Artifact(config, prior, random_decision() if decision is True else decision or None, bypass, lora)


def _exits(*, rounded: bool = True, gaps: bool = False) -> list[DraftExit]:
    exits = []
    for seed, layers in enumerate(([0, 1, 4, 9], [0, 1, 4, 5, 9])):
        down, up = torch.randn(2, RANK, BASE.hidden_size, generator=torch.Generator().manual_seed(seed)).half().float()
        adapter = ExitAdapter(down, up.T.contiguous(), EPS)
        exit_ = DraftExit(path_of(layers), adapter.rounded() if rounded else adapter)
        if gaps:
            firsts = gap_starts(exit_.path)
            scales = torch.arange(1, len(firsts) + 1)[:, None, None]
            own = Bypass(scales * down, scales * up.T, EPS, firsts)
            exit_ = dataclasses.replace(exit_, bypass=own.rounded() if rounded else own)
        exits.append(exit_)
    return exits


def _folded() -> FoldedDecision:
    torch.manual_seed(0)
    return FoldedDecision.fold(DecisionModule(5, NUM_LAYERS - 2, hidden=6), torch.randn(VOCAB_SIZE, 5))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    _artifact(library=LIBRARY).save(tmp_path / "artifact")
    return tmp_path / "artifact"


def _edit_config(folder: Path, **changes: Any) -> None:
    raw = json.loads((folder / CONFIG_FILE).read_text())
    (folder / CONFIG_FILE).write_text(json.dumps(raw | changes))


def _edit_tensors(folder: Path, **changes: np.ndarray | None) -> None:
    tensors = load_file(folder / WEIGHTS_FILE)
    for name, array in changes.items():
        name = name.replace("__", ".")
        tensors.pop(name, None)
        if array is not None:
            tensors[name] = array
    save_file(tensors, folder / WEIGHTS_FILE)


@pytest.mark.parametrize("decision", [False, True])
@pytest.mark.parametrize("library", [None, LIBRARY])
def test_round_trip(tmp_path: Path, decision: bool, library: dict[int, list[list[int]]] | None) -> None:
    """Fails if a loaded artifact differs from the saved one in any number, or its digest changes between runs."""
    artifact = _artifact(decision=decision, library=library)
    artifact.save(tmp_path)
    loaded = load_artifact(tmp_path)
    assert loaded.config == artifact.config
    assert loaded.digest == artifact.digest
    np.testing.assert_array_equal(loaded.prior, artifact.prior)
    assert (loaded.decision is None) == (not decision)
    if loaded.decision is not None and artifact.decision is not None:
        for field in dataclasses.fields(artifact.decision):
            np.testing.assert_array_equal(getattr(loaded.decision, field.name), getattr(artifact.decision, field.name))


@pytest.mark.parametrize(
    ("parts", "repair"),
    [({}, "none"), ({"lora": _lora()}, "lora"), ({"bypass": _bypass(), "lora": _lora()}, "bypass")],
)
def test_repair_says_what_runs_on_skipped_rows(parts: dict[str, Any], repair: str) -> None:
    """Fails if an artifact that computes a bypass on skipped layers is reported as one that computes nothing there."""
    assert _artifact(**parts).repair == repair


@pytest.mark.parametrize(
    ("decision", "library", "own"), [(True, LIBRARY, True), (True, None, False), (False, LIBRARY, False)]
)
def test_the_library_is_used_where_a_decision_module_was_trained_on_it(decision, library, own) -> None:
    """Fails if a router that was trained on the library's paths chooses freely, or another one uses the library."""
    artifact = _artifact(decision=_folded() if decision else None, library=library)
    assert (artifact.router().depths is not None) == own
    assert artifact.router(library=False).depths is None


def test_a_rounded_bypass_takes_a_byte_a_weight(tmp_path: Path) -> None:
    """Fails if a rounded bypass is stored in 16 bits, or the loaded weights differ from the rounded ones."""
    given = _bypass()
    rounded = given.rounded()
    _artifact(bypass=rounded).save(tmp_path)
    stored = load_file(tmp_path / WEIGHTS_FILE)
    assert stored["bypass.down"].dtype == stored["bypass.up"].dtype == np.int8
    loaded = load_artifact(tmp_path).bypass
    assert loaded
    assert torch.equal(loaded.down, rounded.down)
    assert torch.equal(loaded.up, rounded.up)
    for weight, other in ((given.down, rounded.down), (given.up, rounded.up)):
        assert bool(((weight - other).abs() <= weight.abs().amax(dim=-1, keepdim=True) / 253).all())


def test_round_trip_of_what_was_trained(tmp_path: Path) -> None:
    """Fails if the loaded tables, bypass or LoRA differ in a bit from those that training measured."""
    artifact = _artifact(decision=_folded(), bypass=_bypass(), lora=_lora())
    artifact.save(tmp_path)
    loaded = load_artifact(tmp_path)
    assert loaded.digest == artifact.digest
    assert loaded.config == artifact.config
    assert loaded.decision
    assert loaded.bypass
    assert loaded.lora
    assert artifact.decision
    assert artifact.bypass
    for field in dataclasses.fields(FoldedDecision):
        np.testing.assert_array_equal(getattr(loaded.decision, field.name), getattr(artifact.decision, field.name))
    assert load_file(tmp_path / WEIGHTS_FILE)["decision.table_newest"].dtype == np.int8
    assert torch.equal(loaded.bypass.down, artifact.bypass.down)
    assert torch.equal(loaded.bypass.up, artifact.bypass.up)
    assert (loaded.bypass.eps, loaded.lora.alpha) == (EPS, 4.0)
    for part in ("a", "b"):
        found, wanted = getattr(loaded.lora, part), getattr(_lora(), part)
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], wanted[name]) for name in found)


def test_format_version_1(folder: Path) -> None:
    """Fails if an artifact of format version 1, with tables in float32, is refused or read with other numbers."""
    artifact = load_artifact(folder)
    _edit_config(folder, format_version=1)
    raw = json.loads((folder / CONFIG_FILE).read_text())
    for name in ("recipe", "budgets", "bypass_rank", "bypass_eps", "lora"):
        del raw[name]
    (folder / CONFIG_FILE).write_text(json.dumps(raw))
    loaded = load_artifact(folder)
    assert loaded.decision is not None
    assert artifact.decision is not None
    assert load_file(folder / WEIGHTS_FILE)["decision.table_context"].dtype == np.float32
    np.testing.assert_array_equal(loaded.decision.table_context, artifact.decision.table_context)


@pytest.mark.parametrize("rounded", [True, False])
def test_round_trip_of_draft_exits(tmp_path: Path, rounded: bool) -> None:
    """Fails if exits are loaded in another order, with other weights, or take more than a byte a weight if rounded."""
    artifact = with_drafts(_artifact(bypass=_bypass()), _exits(rounded=rounded))
    artifact.save(tmp_path)
    loaded = load_artifact(tmp_path)
    assert loaded.config == artifact.config
    assert loaded.digest == artifact.digest != artifact.without_drafts().digest
    assert artifact.without_drafts().digest == _artifact(bypass=_bypass()).digest
    for found, wanted in zip(loaded.drafts, _exits(rounded=rounded), strict=True):
        assert found.path == wanted.path
        assert torch.equal(found.adapter.down, wanted.adapter.down)
        assert torch.equal(found.adapter.up, wanted.adapter.up)
        assert found.adapter.eps == EPS
    assert load_file(tmp_path / WEIGHTS_FILE)["drafts.up"].dtype == (np.int8 if rounded else np.float16)


@pytest.mark.parametrize("rounded", [True, False])
def test_round_trip_of_the_bypasses_of_gaps(tmp_path: Path, rounded: bool) -> None:
    """Fails if a gap gets the bypass of another, of another exit, or a digest does not tell one from the other."""
    exits = _exits(rounded=rounded, gaps=True)
    artifact = with_drafts(_artifact(bypass=_bypass()), exits)
    artifact.save(tmp_path)
    loaded = load_artifact(tmp_path)
    assert loaded.config.drafts is not None
    assert loaded.config.drafts.gaps
    assert loaded.digest == artifact.digest != with_drafts(_artifact(bypass=_bypass()), _exits(rounded=rounded)).digest
    for found, wanted, firsts in zip(loaded.drafts, exits, [(2, 5), (2, 6)], strict=True):
        assert found.bypass is not None
        assert wanted.bypass is not None
        assert found.bypass.layers == wanted.bypass.layers == firsts
        assert torch.equal(found.bypass.down, wanted.bypass.down)
        assert torch.equal(found.bypass.up, wanted.bypass.up)
    assert load_file(tmp_path / WEIGHTS_FILE)["drafts.bypass.up"].dtype == (np.int8 if rounded else np.float16)


def test_exits_without_bypasses_of_gaps_keep_their_digest(tmp_path: Path) -> None:
    """Fails if an artifact of format version 5, which knows no bypasses of gaps, is refused or gets another digest."""
    artifact = with_drafts(_artifact(), _exits())
    artifact.save(tmp_path)
    raw = json.loads((tmp_path / CONFIG_FILE).read_text())
    del raw["drafts"]["gaps"]
    assert '"gaps"' not in json.dumps(raw)
    (tmp_path / CONFIG_FILE).write_text(json.dumps(raw | {"format_version": 5}))
    loaded = load_artifact(tmp_path)
    assert [draft.bypass for draft in loaded.drafts] == [None, None]
    assert loaded.digest == artifact.digest


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        ("drafts__bypass.down", np.zeros((3, RANK, 8), np.float16), r"shape \(3, 3, 8\), expected \(4, 3, 8\)"),
        ("drafts__bypass.up", None, r"shape None, expected \(4, 8, 3\)"),
        ("drafts__bypass.up_scale", np.full(32, np.inf, np.float32), "not finite"),
    ],
)
def test_bypasses_of_gaps_of_wrong_shape(tmp_path: Path, name: str, array: np.ndarray | None, message: str) -> None:
    """Fails if bypasses that do not fit the gaps are loaded and stop the engine later."""
    with_drafts(_artifact(), _exits(gaps=True)).save(tmp_path)
    _edit_tensors(tmp_path, **{name: array})
    with pytest.raises(ArtifactError, match=message):
        load_artifact(tmp_path)


def test_round_trip_of_the_tokens_that_drafts_choose_among(tmp_path: Path) -> None:
    """Fails if drafts choose among other tokens than were saved, or artifacts that differ in them have one digest."""
    some = np.array([0, 3, VOCAB_SIZE - 1])
    artifact = with_drafts(_artifact(), _exits(), some)
    artifact.save(tmp_path)
    loaded = load_artifact(tmp_path)
    assert loaded.config.drafts is not None
    assert loaded.config.drafts.vocabulary == 3
    np.testing.assert_array_equal(loaded.draft_vocabulary, some)
    assert loaded.digest == artifact.digest != with_drafts(_artifact(), _exits(), some[1:]).digest
    assert loaded.without_drafts().draft_vocabulary is None
    assert loaded.without_drafts().digest == _artifact().digest


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (None, rf"shape None, expected \({VOCAB_SIZE},\)"),
        (np.ones(VOCAB_SIZE - 1, np.int8), rf"expected \({VOCAB_SIZE},\)"),
        (np.ones(VOCAB_SIZE, np.int8), "by tensor 'drafts.vocabulary', among 3 by the configuration"),
    ],
)
def test_tokens_of_drafts_that_do_not_fit(tmp_path: Path, array: np.ndarray | None, message: str) -> None:
    """Fails if a vocabulary of another model, or another size than is said, is loaded and stops the engine later."""
    with_drafts(_artifact(), _exits(), np.arange(3)).save(tmp_path)
    _edit_tensors(tmp_path, drafts__vocabulary=array)
    with pytest.raises(ArtifactError, match=message):
        load_artifact(tmp_path)


def test_an_artifact_of_before_has_no_draft_exits(folder: Path) -> None:
    """Fails if an artifact of format version 4, which knows no exits, is refused or gets another digest."""
    digest = load_artifact(folder).digest
    raw = json.loads((folder / CONFIG_FILE).read_text())
    del raw["drafts"]
    (folder / CONFIG_FILE).write_text(json.dumps(raw | {"format_version": 4}))
    loaded = load_artifact(folder)
    assert loaded.drafts == ()
    assert loaded.digest == digest


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        ("drafts__down", np.zeros((1, RANK, 8), np.float16), r"shape \(1, 3, 8\), expected \(2, 3, 8\)"),
        ("drafts__up", np.zeros((2, 8, 4), np.float16), r"shape \(2, 8, 4\), expected \(2, 8, 3\)"),
        ("drafts__up", None, r"shape None, expected \(2, 8, 3\)"),
        ("drafts__up_scale", None, r"shape None, expected \(16,\)"),
        ("drafts__up_scale", np.full(16, np.nan, np.float32), "not finite"),
        ("drafts__up_scale", np.full(16, 3e38, np.float32), "so large that its values are not finite"),
        ("drafts__alpha", np.zeros(1, np.float32), "says nothing of tensor 'drafts.alpha'"),
    ],
)
def test_adapters_of_wrong_shape(tmp_path: Path, name: str, array: np.ndarray | None, message: str) -> None:
    """Fails if adapters that do not fit the exits are loaded and stop the engine later."""
    with_drafts(_artifact(), _exits()).save(tmp_path)
    _edit_tensors(tmp_path, **{name: array})
    with pytest.raises(ArtifactError, match=message):
        load_artifact(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"exits": []}, "exits"),
        ({"exits": [[0, 1, 4, 9], [0, 2, 5, 6, 9]]}, "each path must be a subset of the next"),
        ({"exits": [[0, 4, 1, 9], [0, 1, 4, 5, 9]]}, "must ascend"),
        ({"exits": [[0, 1, 4, 8], [0, 1, 4, 5, 8]]}, "an exit holds layers 0 and 9"),
        ({"exits": [[0, 9], [0, 1, 9]]}, "at least 3 layers"),
        ({"exits": [[0, 1, 9], list(range(NUM_LAYERS))]}, "not all"),
        ({"rank": 0}, "rank"),
        ({"eps": float("nan")}, "eps"),
        ({"alpha": 1.0}, "alpha"),
        ({"vocabulary": 0}, "vocabulary"),
        ({"vocabulary": VOCAB_SIZE}, f"of which the model has {VOCAB_SIZE}"),
    ],
)
def test_exits_that_cannot_draft(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    """Fails if a path that the model cannot run, or a misspelt field, is found only when a request is served."""
    artifact = with_drafts(_artifact(), _exits())
    artifact.save(tmp_path)
    raw = json.loads((tmp_path / CONFIG_FILE).read_text())
    _edit_config(tmp_path, drafts=raw["drafts"] | change)
    with pytest.raises(ArtifactError, match=message):
        load_artifact(tmp_path)


def test_loaded_artifact_routes_as_the_saved_one(folder: Path) -> None:
    """Fails if the library is loaded with its depths as strings, or the router is built with another prior."""
    for library in (False, True):
        routers = _artifact(library=LIBRARY).router(library=library), load_artifact(folder).router(library=library)
        for token in range(20):
            paths = []
            for router in routers:
                context = router.new_context()
                assert context is not None
                context.extend([token])
                paths.append(router.path(context, 4))
            assert paths[0] == paths[1]
            assert not library or paths[0] in [path_of(layers) for layers in LIBRARY[4]]


def test_config_keeps_a_path_on_one_line(folder: Path) -> None:
    """Fails if a path library is written with one number per line, which takes thousands of lines for 30 layers."""
    assert "      [0, 1, 3, 9]\n" in (folder / CONFIG_FILE).read_text()


def test_digest_changes_with_whatever_can_change_what_is_computed() -> None:
    """Fails if two artifacts have the same digest, so that one reads the other's entries of the prefix cache."""
    artifact = _artifact()
    assert artifact.decision is not None
    b2 = artifact.decision.b2.copy()
    b2[0] += 1e-3
    bypass, lora = _artifact(bypass=_bypass()), _artifact(lora=_lora())
    up, a = _bypass().up, dict(_lora().a)
    up[0, 0, 0] += 1.0
    a["model.layers.0.mlp.down_proj"] = 2 * a["model.layers.0.mlp.down_proj"]
    others = [
        bypass,
        dataclasses.replace(bypass, bypass=dataclasses.replace(_bypass(), up=up)),
        lora,
        dataclasses.replace(lora, lora=dataclasses.replace(_lora(), a=a)),
        _artifact(decision=False),
        _artifact(library=LIBRARY),
        dataclasses.replace(artifact, prior=artifact.prior[::-1].copy()),
        dataclasses.replace(artifact, decision=dataclasses.replace(artifact.decision, b2=b2)),
        dataclasses.replace(artifact, config=artifact.config.model_copy(update={"omega": 0.2})),
    ]
    assert len({a.digest for a in (artifact, *others)}) == 10


def test_asking_for_a_missing_library(tmp_path: Path) -> None:
    """Fails if `paths: library` with an artifact that has no library silently chooses among all paths."""
    with pytest.raises(ArtifactError, match="artifact 'round-trip' has no path library; serve it with"):
        _artifact().router(library=True)


def test_missing_folder_and_files(folder: Path) -> None:
    """Fails if a wrong artifact folder raises anything but an error that names the missing file."""
    with pytest.raises(ArtifactError, match=f"no artifact at {folder / 'no'}: {CONFIG_FILE} is missing"):
        load_artifact(folder / "no")
    (folder / WEIGHTS_FILE).unlink()
    with pytest.raises(ArtifactError, match=f"has no {WEIGHTS_FILE}"):
        load_artifact(folder)


@pytest.mark.parametrize("kept_fraction", [0.0, 0.1, 0.9])
def test_truncated_weights(folder: Path, kept_fraction: float) -> None:
    """Fails if a truncated file of weights is loaded."""
    data = (folder / WEIGHTS_FILE).read_bytes()
    (folder / WEIGHTS_FILE).write_bytes(data[: int(kept_fraction * len(data))])
    with pytest.raises(ArtifactError, match=r"is not a complete safetensors file .* get the artifact again"):
        load_artifact(folder)


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", '"text"', "\ufffe"])
def test_config_that_is_not_a_json_object(folder: Path, text: str) -> None:
    """Fails if a configuration that is no JSON object raises a TypeError instead of an error that names the file."""
    (folder / CONFIG_FILE).write_bytes(text.encode("utf-16") if text == "\ufffe" else text.encode())
    with pytest.raises(ArtifactError, match=f"{CONFIG_FILE} (is not JSON|does not fit the schema)"):
        load_artifact(folder)


def test_newer_format(folder: Path) -> None:
    """Fails if an artifact of a newer format version is loaded as if its fields had the same meaning."""
    _edit_config(folder, format_version=FORMAT_VERSION + 1, something_new=[1, 2])
    with pytest.raises(
        ArtifactError,
        match=f"has format version {FORMAT_VERSION + 1}, this vllm_buddy reads up to {FORMAT_VERSION}; update",
    ):
        load_artifact(folder)


def test_unknown_and_missing_fields(folder: Path) -> None:
    """Fails if a misspelt field is ignored and its default is used, or a required field may be missing."""
    _edit_config(folder, omegaa=0.3)
    with pytest.raises(ArtifactError, match=r"(?s)does not fit the schema.*omegaa"):
        load_artifact(folder)
    (folder / CONFIG_FILE).write_text(json.dumps({"format_version": FORMAT_VERSION}))
    with pytest.raises(ArtifactError, match=r"(?s)does not fit the schema.*base_model"):
        load_artifact(folder)


@pytest.mark.parametrize(
    ("name", "array"),
    [
        ("prior", None),
        ("prior", np.zeros(7, np.float32)),
        ("prior", np.zeros((8, 1), np.float32)),
        ("decision__table_context", np.zeros((63, 6), np.float32)),
        ("decision__table_newest", None),
        ("decision__w2", np.zeros((7, 6), np.float32)),
        ("decision__b2", np.zeros(9, np.float32)),
    ],
)
def test_wrong_shapes(folder: Path, name: str, array: np.ndarray | None) -> None:
    """Fails if tables of another vocabulary or depth are loaded, and a token id is out of range during serving."""
    _edit_tensors(folder, **{name: array})
    with pytest.raises(ArtifactError, match=rf"'{name.replace('__', '.')}' has shape .*expected .*tiny \(Llama"):
        load_artifact(folder)


def test_widths_that_disagree(folder: Path) -> None:
    """Fails if tables of different width pass the check of single shapes and raise at the first request."""
    _edit_tensors(folder, decision__table_newest=np.zeros((VOCAB_SIZE, 5), np.float32))
    with pytest.raises(ArtifactError, match=r"disagree on their width: \[5, 6\]"):
        load_artifact(folder)


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        ("bypass__down", np.zeros((8, 4, 8), np.float16), r"shape \(8, 4, 8\), expected \(8, 3, 8\)"),
        ("bypass__up", np.zeros((8, 3, 8), np.float16), r"shape \(8, 3, 8\), expected \(8, 8, 3\)"),
        ("bypass__up", None, r"shape None, expected \(8, 8, 3\)"),
        ("bypass__up", np.full((8, 8, 3), np.inf, np.float16), "not finite"),
        ("lora__model.layers.0.mlp.down_proj__a", np.zeros((3, 8), np.float16), r"\(3, 8\), expected \(2, None\)"),
        ("lora__model.layers.0.mlp.down_proj__b", None, r"shape None, expected \(None, 2\)"),
        ("lora__something__c", np.zeros(1, np.float16), "says nothing of tensor 'lora.something.c'"),
        ("decision__table_context_scale", np.ones(5, np.float32), r"disagree on their width: \[5, 6\]"),
        ("decision__table_context_scale", None, r"shape None, expected \(None,\)"),
    ],
)
def test_wrong_shapes_of_what_was_trained(tmp_path: Path, name: str, array: np.ndarray | None, message: str) -> None:
    """Fails if trained parts of wrong shape are loaded and stop the engine later, or are ignored silently."""
    _artifact(decision=_folded(), bypass=_bypass(), lora=_lora()).save(tmp_path)
    _edit_tensors(tmp_path, **{name: array})
    with pytest.raises(ArtifactError, match=message):
        load_artifact(tmp_path)


def test_weights_that_the_configuration_does_not_mention(tmp_path: Path) -> None:
    """Fails if weights that do not match the configuration are saved, and are then ignored when serving."""
    plain = _artifact()
    with pytest.raises(ArtifactError, match=r"says nothing of tensor 'bypass.down'"):
        dataclasses.replace(plain, bypass=_bypass()).save(tmp_path)
    with pytest.raises(ArtifactError, match=r"predictor.depths and drafts of the configuration are .*1e-05, .*0.1"):
        dataclasses.replace(_artifact(bypass=_bypass()), bypass=dataclasses.replace(_bypass(), eps=0.1)).save(tmp_path)
    with pytest.raises(ArtifactError, match=r"'bypass.down' holds values that are not finite"):
        too_large = dataclasses.replace(_bypass(), down=1e6 * _bypass().down)
        _artifact(bypass=too_large).save(tmp_path)
    with pytest.raises(ArtifactError, match=r"says nothing of tensor 'drafts.down'"):
        dataclasses.replace(plain, drafts=tuple(_exits())).save(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite(folder: Path, value: float) -> None:
    """Fails if NaN or infinity from a diverged training is loaded, and every request runs the same arbitrary path."""
    _edit_tensors(folder, prior=np.full(8, value, np.float32))
    with pytest.raises(ArtifactError, match="tensor 'prior' holds values that are not finite"):
        load_artifact(folder)


@pytest.mark.parametrize(
    "layers",
    [[0, 1, 9], [0, 1, 2, 3, 9], [1, 2, 3, 9], [0, 1, 2, 8], [0, 1, 9, 10], [-1, 0, 1, 9], [0, 1, 1, 9], []],
)
def test_library_paths_that_are_no_paths(folder: Path, layers: list[int]) -> None:
    """Fails if a library path has another depth than its budget promises, or lacks the first or last layer."""
    _edit_config(folder, library={"4": [[0, 1, 2, 9], layers]})
    with pytest.raises(ArtifactError, match="is not a set of 4 layers with 0 and 9"):
        load_artifact(folder)


def test_library_without_paths_at_a_depth(folder: Path) -> None:
    """Fails if the library may list a depth without paths, and the first request at that depth stops the engine."""
    _edit_config(folder, library={"4": []})
    with pytest.raises(ArtifactError, match="the library holds no path of 4 layers"):
        load_artifact(folder)


def test_shipped_artifacts_load() -> None:
    """Fails if a shipped artifact cannot be loaded, or has no model card or record."""
    shipped = shipped_artifacts()
    assert "smollm2-135m" in shipped
    for name, path in shipped.items():
        assert load_artifact(path).config.name == name
        assert (path / "README.md").is_file()
        assert (path / "run.yaml").is_file()


def test_a_library_without_paths_is_refused(tmp_path: Path) -> None:
    """Fails if a server starts with a router that has nothing to choose from, or ends in a traceback."""
    _artifact(library=LIBRARY).save(tmp_path)
    config = json.loads((tmp_path / CONFIG_FILE).read_text())
    (tmp_path / CONFIG_FILE).write_text(json.dumps(config | {"library": {}}))
    with pytest.raises(ArtifactError, match="library"):
        load_artifact(tmp_path)

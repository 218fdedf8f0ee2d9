"""What a server may be started with, and what the others are told. No engine is started here."""

import json
import logging
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.config import CompilationMode, CUDAGraphMode
from vllm.platforms import current_platform

from tests.harness.engine import Tiny
from tests.harness.tiny_models import (
    NUM_LAYERS,
    PREDICTOR_DEPTHS,
    PREDICTOR_PRICE,
    random_artifact,
    save_tiny_model,
)
from vllm_buddy.artifact import CONFIG_FILE, WEIGHTS_FILE, Artifact
from vllm_buddy.artifact.config import FORMAT_VERSION
from vllm_buddy.errors import ArtifactError
from vllm_buddy.method import path_of
from vllm_buddy.serving.admission.auto_limits import AutoLimits
from vllm_buddy.serving.compat import TESTED_VLLM
from vllm_buddy.serving.schedule.draft_pace import DEPTH_DRAFTS
from vllm_buddy.serving.start import hook
from vllm_buddy.serving.start.base_model import check_base_model, identify_served_model
from vllm_buddy.serving.start.refusals import _CHECKS
from vllm_buddy.serving.start.settings import engine_settings, known_settings

START_TIMEOUT_S = 300.0  # importing vLLM takes 5 s on an idle core
BASE = {
    "model_impl": "buddy",
    "dtype": "float32",
    "skip_tokenizer_init": True,
    "max_model_len": 512,
    "enforce_eager": True,
}
NGRAM = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3}


@pytest.fixture
def llama_model(tiny: Callable[[str], Tiny]) -> Tiny:
    return tiny("llama")


@pytest.fixture
def artifact_copy(llama_model: Tiny, tmp_path: Path) -> Path:
    """An artifact to damage."""
    return shutil.copytree(llama_model.artifact_folder, tmp_path / "artifact")


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What the plugin logs."""
    # vLLM sets up logging anew with an engine's configuration, and takes handlers off.
    monkeypatch.setattr("vllm.engine.arg_utils.configure_logging_if_needed", lambda *_: None)
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("vllm.vllm_buddy")
    level = logger.level
    logger.setLevel(logging.INFO)  # other tests may have made vLLM quieter
    logger.addHandler(handler)
    yield messages
    logger.removeHandler(handler)
    logger.setLevel(level)


def configure(tiny: Tiny, buddy: Any = None, **options: Any) -> Any:
    """The engine's configuration, as a server makes it before it starts any process."""
    from vllm import EngineArgs

    settings = {"artifact": str(tiny.artifact_folder)} | (buddy or {})
    options = {**BASE, "model": str(tiny.folder), "additional_config": {"buddy": settings}, **options}
    return EngineArgs(**options).create_engine_config()


def refusal(tiny: Tiny, buddy: Any = None, **options: Any) -> str:
    with pytest.raises(ValueError) as caught:
        configure(tiny, buddy, **options)
    return str(caught.value)


def test_a_good_configuration_gets_our_scheduler_and_worker(llama_model: Tiny) -> None:
    """Fails if the refusals below come from somewhere else, or routing is not put in place."""
    config = configure(llama_model)
    assert config.scheduler_config.scheduler_cls == "vllm_buddy.serving.schedule.scheduler.make_scheduler"
    assert config.parallel_config.worker_cls.startswith("vllm_buddy.serving.worker.worker.")
    assert config.model_config.buddy_limits.num_layers == 8


@pytest.mark.parametrize(
    "buddy",
    [
        {"artefact": "x"},
        {"route_every": "4"},
        {"route_every": 4.0},
        {"route_every": True},
        {"route_every": -1},
        {"decision_lag": -1},
        {"decision_lag": 0.5},
        {"kv_policy": "mask"},
        {"kv_policy": 1},
        {"paths": "some"},
        {"artifact": 3},
        {"default_budget": 0},
        {"default_budget": 1.5},
        {"default_budget": "0.5"},
        {"default_budget": True},
        {"default_budget": math.nan},
        {"min_budget": -0.5},
        {"min_budget": [0.5]},
        {"default_budget": "Auto"},
        {"default_budget": None},
        {"auto": {"min": "auto"}},
        {"auto": {"min": 0}},
        {"auto": {"max": 1.1}},
        {"auto": {"mim": 0.5}},
        {"auto": None},
        {"auto": 0.5},
        {"schedule": "token"},
        {"schedule": {"decode": "tokens"}},
        {"schedule": {"saved_layers": -1}},
        {"graphs": True},
        {"graphs": {"sizes": [2, 1]}},
        {"load": {}},
        {"load": 3.0},
        {"auto": {"price": -0.1}},
        {"auto": {"price": math.nan}},
        {"auto": {"price": math.inf}},
        {"auto": {"price": True}},
        {"auto": {"price": "1"}},
        {"load": {"price": -1}},
        {"load": {"price": math.inf}},
        {"load": {"price": 90.0, "waiting": [8, 1]}},
        {"load": {"price": 90.0, "waiting": [1, 1]}},
        {"load": {"price": 90.0, "waiting": [1]}},
        {"load": {"price": 90.0, "waiting": [1, 8.0]}},
        {"load": {"price": 90.0, "waiting": 8}},
        {"load": {"price": 90.0, "waiting": None}},
        {"load": {"price": 90.0, "running": [-1, 8]}},
        {"load": {"price": 90.0, "running": [False, True]}},
        {"load": {"price": 90.0, "kv_use": [0.5, 1.1]}},
        {"load": {"price": 90.0, "kv_use": [0.9, 0.5]}},
        {"load": {"price": 90.0, "kv_use": [math.nan, 0.5]}},
        {"load": {"price": 90.0, "floor": 0}},
        {"load": {"price": 90.0, "hysteresis": 1}},
        {"load": {"price": 90.0, "hysteresis": -0.1}},
        {"load": {"price": 90.0, "hysteresis": math.nan}},
        {"slo": {}},
        {"slo": {"itl_ms": 0}},
        {"slo": {"itl_ms": -5.0}},
        {"slo": {"ttft_ms": math.nan}},
        {"slo": {"ttft_ms": math.inf}},
        {"slo": {"ttft_ms": "500"}},
        {"slo": {"itl": 50}},
        {"slo": {"itl_ms": 50, "floor": 0}},
        {"slo": {"itl_ms": 50, "hysteresis": 1}},
        {"slo": 50},
    ],
    ids=str,
)
def test_a_setting_that_is_unknown_or_wrong_is_refused_with_the_known_ones(llama_model: Tiny, buddy: Any) -> None:
    """Fails if a misspelt or impossible setting starts a server that does something else."""
    message = refusal(llama_model, buddy)
    (name,) = buddy
    assert f"'{name}" in message
    assert all(known in message for known in known_settings())


@pytest.mark.parametrize("buddy", ["x", None, [], 3], ids=str)
def test_settings_that_are_no_object_are_refused(llama_model: Tiny, buddy: Any) -> None:
    """Fails if `buddy` given as something else than an object counts as no settings."""
    assert "kv_policy" in refusal(llama_model, additional_config={"buddy": buddy})


@pytest.fixture
def few_depths(llama_model: Tiny, tmp_path: Path) -> Path:
    """An artifact whose library has paths of 3, 4 and 6 layers alone."""
    sets = {3: [[0, 2, 7]], 4: [[0, 2, 3, 7]], 6: [[0, 1, 2, 3, 4, 7]]}
    config = llama_model.artifact.config.model_copy(update={"library": sets})
    replace(llama_model.artifact, config=config).save(folder := tmp_path / "narrow")
    return folder


def test_a_default_budget_that_no_request_could_ask_for_is_refused(llama_model: Tiny, few_depths: Path) -> None:
    """Fails if the server's default is below its own floor, below three layers, or without a path in the library."""
    assert "0.375" in refusal(llama_model, {"default_budget": 0.3})
    assert "0.6" in refusal(llama_model, {"default_budget": 0.5, "min_budget": 0.6})
    message = refusal(llama_model, {"default_budget": 1.0, "max_budget": 0.75})
    assert "default_budget: budget 1 is above the largest allowed budget 0.75" in message
    assert "set default_budget" in message
    message = refusal(llama_model, {"artifact": str(few_depths), "default_budget": 0.7})
    assert "default_budget: budget 0.7 is 5 of 8 layers, for which the path library has no path" in message
    assert "it has paths of 3, 4, 6, 8 layers" in message
    for buddy in ({"default_budget": 0.75}, {"default_budget": 0.7, "paths": "free"}):
        configure(llama_model, {"artifact": str(few_depths), **buddy})


@pytest.fixture(scope="module")
def without_predictor(tiny: Callable[[str], Tiny], tmp_path_factory: pytest.TempPathFactory) -> str:
    """An artifact of the tiny Llama that chooses no budgets."""
    folder = tmp_path_factory.mktemp("without") / "plain"
    random_artifact(folder, tiny("llama").folder)
    return str(folder)


AUTO_ALONE: tuple[dict[str, Any], ...] = (
    {"default_budget": "auto"},
    {"auto": {"min": 0.5}},
    {"auto": {"max": 0.9}},
    {"auto": {"price": 0.1}},
    {"load": {"price": 0.1}},
    {"load": {"price": 0.1, "waiting": [1, 8]}},
    {"slo": {"itl_ms": 50}},
    {"default_budget": "auto", "auto": {"price": 0.0}},
)


@pytest.mark.parametrize("buddy", AUTO_ALONE, ids=str)
def test_auto_without_a_budget_predictor_is_refused_with_the_ways_out(
    llama_model: Tiny, without_predictor: str, buddy: dict[str, Any]
) -> None:
    """Fails if a server whose operator counts on "auto" starts with something else."""
    message = refusal(llama_model, {"artifact": without_predictor, **buddy})
    assert "artifact 'plain' has no Budget Predictor" in message
    assert "`vllm-buddy train-budget`" in message
    assert ("set default_budget to a number in (0, 1]" in message) == ("default_budget" in buddy)
    assert all(name in message for name in buddy)


def test_an_artifact_without_a_budget_predictor_is_served(llama_model: Tiny, without_predictor: str) -> None:
    """Fails if the settings of "auto" are in the way of those who do not use it."""
    config = configure(llama_model, {"artifact": without_predictor, "load": None, "auto": {"min": None}})
    assert config.model_config.buddy_limits.auto is None


@pytest.mark.parametrize("part", ["prefill", "decode"])
def test_depths_per_token_need_an_artifact_with_nested_paths(
    llama_model: Tiny, without_predictor: str, part: str
) -> None:
    """Fails if a server that cannot choose depths per token starts, and serves one depth in silence."""
    message = refusal(llama_model, {"artifact": without_predictor, "schedule": {part: "token"}})
    assert "no nested paths" in message
    assert '"request"' in message


def test_depths_per_token_are_refused_under_zero_and_bring_kv_only(llama_model: Tiny) -> None:
    """Fails if deep tokens attend to zeros of shallow ones, or the default leaves them nothing to attend to."""
    schedule = {"prefill": "token", "decode": "token"}
    assert '"kv_only"' in refusal(llama_model, {"schedule": schedule, "kv_policy": "zero"})
    assert engine_settings(configure(llama_model, {"schedule": schedule})).kv == "kv_only"
    assert engine_settings(configure(llama_model, {"schedule": schedule, "kv_policy": "masked"})).kv == "masked"
    assert engine_settings(configure(llama_model)).kv == "masked"


@pytest.mark.parametrize(
    ("buddy", "options", "told"),
    [
        ({"kv_policy": "kv_only"}, {}, '"kv_only" writes every layer of every token'),
        ({"kv_policy": "zero"}, {}, '"zero" writes every layer of every token'),
        ({"schedule": {"decode": "token"}}, {}, '"kv_only" writes every layer of every token'),
        ({"schedule": {"decode": "token"}, "kv_policy": "masked"}, {}, 'schedule "token"'),
        ({}, {"speculative_config": NGRAM}, "start without a speculator"),
        ({}, {"pipeline_parallel_size": 2}, "use tensor or data parallelism"),
        ({}, {"enable_lora": True}, "start without --enable-lora"),
        ({"max_budget": 0.75}, {}, "set max_budget to 1"),
        (
            {"kv_classes": 3},
            {},
            "kv_classes 3 must divide the model's 8 layers and leave two units; choose one of 1, 2, 4",
        ),
        ({"kv_classes": 8}, {}, "choose one of 1, 2, 4"),
        ({}, {"kv_transfer_config": {"kv_connector": "x", "kv_role": "kv_both"}}, "a KV connector"),
        ({"kv_layout": "dense", "kv_classes": 2}, {}, 'with kv_layout "units" only'),
    ],
    ids=str,
)
def test_kv_units_that_cannot_be_had_are_refused_with_the_reason(
    llama_model: Tiny, buddy: dict[str, Any], options: dict[str, Any], told: str
) -> None:
    """Fails if a server starts that promises memory that it does not save, or loses track of a layer."""
    assert told in refusal(llama_model, {"kv_layout": "units", **buddy}, **options)


def test_kv_units_become_groups_of_one_layer_of_each_class(llama_model: Tiny) -> None:
    """Fails if vLLM groups layers otherwise than the plan, or groups those of other servers."""
    config = configure(llama_model, {"kv_layout": "units"})
    units = config.model_config.buddy_kv_units
    groups = kv_cache_groups(config)
    assert len(groups) == units.num_units == 4
    for unit, group in enumerate(groups):
        layers = [int(name.split(".")[2]) for name in group.layer_names]
        assert [units.class_of[layer] for layer in layers] == [0, 1]
        assert [units.home[layer] for layer in layers] == [unit, unit]
    assert configure(llama_model).model_config.buddy_kv_units is None
    assert len(kv_cache_groups(configure(llama_model))) == 1


def test_kv_units_of_a_model_without_some_layers_are_refused(llama_model: Tiny) -> None:
    """Fails if layers that have no KV cache would shift the others into each other's memory."""
    from vllm.v1.core import kv_cache_utils

    specs = kv_cache_specs()
    specs.pop("model.layers.3.self_attn.attn")
    with pytest.raises(ValueError, match="needs a KV cache in each of 8 layers, found 7"):
        kv_cache_utils.get_kv_cache_groups(configure(llama_model, {"kv_layout": "units"}), specs)


def test_a_memory_too_small_for_one_request_at_full_depth_is_refused_with_the_numbers(llama_model: Tiny) -> None:
    """Fails if a server with units starts that would preempt its only request for ever."""
    from vllm.v1.core import kv_cache_utils

    def start_with(num_blocks: int) -> Any:
        config = configure(llama_model, {"kv_layout": "units"}, num_gpu_blocks_override=num_blocks)
        config.cache_config.kv_cache_layout = "NHD"
        return kv_cache_utils.get_kv_cache_configs(config, [kv_cache_specs()], [1 << 30])[0]

    # 512 tokens take 4 blocks in each of 4 units, and vLLM keeps a block.
    with pytest.raises(ValueError, match=r"max seq len \(512\).*estimated maximum model length is 384"):
        start_with(16)
    assert start_with(17).num_blocks == 17


def kv_cache_specs() -> dict[str, Any]:
    """What the layers of a tiny model say of their KV caches, in blocks of 128 tokens."""
    import torch
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    spec = FullAttentionSpec(block_size=128, num_kv_heads=2, head_size=32, dtype=torch.float32)
    return {f"model.layers.{layer}.self_attn.attn": spec for layer in range(NUM_LAYERS)}


def kv_cache_groups(config: Any) -> list[Any]:
    from vllm.v1.core import kv_cache_utils

    return kv_cache_utils.get_kv_cache_groups(config, kv_cache_specs())


def test_a_dotted_setting_is_answered_with_the_nested_form(llama_model: Tiny) -> None:
    """Fails if the name that documentation and messages use for a setting is unknown without a way out."""
    assert '{"buddy": {"auto": {"min": ...}}}' in refusal(llama_model, {"auto.min": 0.5})


@pytest.mark.parametrize(
    ("old", "value", "new"),
    [
        ("auto_min", 0.5, "auto.min"),
        ("price", 0.5, "auto.price"),
        ("load_price", 2.0, "load.price"),
        ("load_waiting", [1, 8], "load.waiting"),
        ("cuda_graphs", True, "graphs.enabled"),
        ("graph_sizes", [1, 2], "graphs.sizes"),
    ],
)
def test_a_setting_that_has_moved_is_answered_with_its_new_name(
    llama_model: Tiny, old: str, value: Any, new: str
) -> None:
    """Fails if an operator with an older configuration is told that a setting is unknown, and not where it is."""
    section, name = new.split(".")
    message = refusal(llama_model, {old: value})
    assert f"'{old}' is now '{new}'" in message
    assert f'{{"buddy": {{"{section}": {{"{name}": ...}}}}}}' in message


CONTRADICTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "turned range": ({"auto": {"min": 0.8, "max": 0.5}}, "auto.max 0.5 is below auto.min, 0.8"),
    "range below all requests": (
        {"min_budget": 0.6, "auto": {"max": 0.5}},
        "auto.max 0.5 is below the smallest budget",
    ),
    "below min_budget": ({"min_budget": 0.6, "auto": {"min": 0.5}}, "auto.min 0.5 is below the smallest budget"),
    "above max_budget": (
        {"default_budget": 0.5, "max_budget": 0.75, "auto": {"max": 0.8}},
        "auto.max 0.8 is above max_budget 0.75",
    ),
    "ceiling below the floor": (
        {"default_budget": 0.5, "max_budget": 0.5, "min_budget": 0.6},
        "max_budget 0.5 is below the smallest budget a request may ask for, 0.6",
    ),
    "below three layers": ({"auto": {"min": 0.2}}, "0.375"),
    "nothing of the grid": ({"auto": {"min": 0.625, "max": 0.7}}, "has no budget in [0.625, 0.7]"),
    "floor above the range": (
        {"auto": {"max": 0.8}, "load": {"price": 90.0, "floor": 0.9}},
        "load.floor 0.9 lies outside",
    ),
    "floor below the range": (
        {"auto": {"min": 0.5}, "load": {"price": 90.0, "floor": 0.4}},
        "load.floor 0.4 lies outside",
    ),
    "no dearer": (
        {"auto": {"price": 2.0}, "load": {"price": 2.0}},
        "load.price 2 is not above the price without load, 2",
    ),
    "no dearer than the artifact says": (
        {"load": {"price": PREDICTOR_PRICE}},
        "is not above the price without load, 8",
    ),
    "two prices": (
        {"load": {"price": 90.0}, "slo": {"itl_ms": 50}},
        "'load' sets by hand the price that 'slo' finds from latencies; leave out one of load.price and slo",
    ),
    "objective without a choice": (
        {"auto": {"max": 0.5}, "slo": {"itl_ms": 50, "floor": 0.5}},
        "slo has no two budgets to choose between",
    ),
    "floor of objectives above the range": (
        {"auto": {"max": 0.8}, "slo": {"itl_ms": 50, "floor": 0.9}},
        "slo.floor 0.9 lies outside",
    ),
}


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_settings_of_auto_that_contradict_each_other_are_refused(llama_model: Tiny, name: str) -> None:
    """Fails if a server starts whose requests with budget "auto" would be refused, or whose load changes nothing."""
    buddy, told = CONTRADICTIONS[name]
    assert told in refusal(llama_model, buddy)


DRAFTS = {"method": "custom_class", "model": DEPTH_DRAFTS, "num_speculative_tokens": 3}

BELOW_FULL_DEPTH: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "nothing left": ({"min_budget": 0.7}, {}, "below the smallest budget a request may ask for, 0.7"),
    "default above": ({"default_budget": 0.7}, {}, "default_budget: budget 0.7 is above the largest allowed"),
    "auto above": ({"auto": {"max": 0.7}}, {}, "auto.max 0.7 is above max_budget 0.65"),
    "auto from above": ({"auto": {"min": 0.7}}, {}, "max_budget 0.65 is below auto.min, 0.7"),
    "full prompts": ({"prompt": "full"}, {}, 'prompt "full"'),
    "tokens": ({"schedule": {"decode": "token"}}, {}, 'schedule "token"'),
    "lossless": ({}, {"speculative_config": DRAFTS}, "lossless drafts"),
}


@pytest.mark.parametrize("name", BELOW_FULL_DEPTH)
def test_what_needs_more_than_max_budget_is_refused(llama_model: Tiny, name: str) -> None:
    """Fails if a server starts that would need layers that it does not load."""
    buddy, options, told = BELOW_FULL_DEPTH[name]
    message = refusal(llama_model, {"max_budget": 0.65, **buddy}, **options)
    assert "0.65" in message
    assert told in message


def test_max_budget_says_what_it_saves(llama_model: Tiny, few_depths: Path, said: list[str]) -> None:
    """Fails if layers are dropped that a router might choose, or a setting that saves nothing looks as if it did."""
    limits = configure(llama_model, {"max_budget": 0.65, "paths": "free"}).model_config.buddy_limits
    assert limits.layers == (1 << NUM_LAYERS) - 1
    assert limits.default_budget == 0.65
    assert limits.auto.largest == 0.65
    assert "max_budget 0.65 saves no memory" in "".join(said)
    narrow = {"max_budget": 0.65, "default_budget": 0.5, "artifact": str(few_depths)}
    assert configure(llama_model, narrow).model_config.buddy_limits.layers == path_of([0, 2, 3, 7])
    assert "from 0.375 to 0.65 on 4 of 8 layers" in "".join(said)
    message = refusal(llama_model, narrow, pipeline_parallel_size=4)
    assert "leaves no layer to pipeline stage 2, which has layers 4 to 5" in message


def test_auto_reaches_the_limits_of_requests_and_the_log(llama_model: Tiny, said: list[str]) -> None:
    """Fails if a setting is dropped on the way, or the operator cannot see what "auto" will do."""
    settings = {"min_budget": 0.45, "auto": {"price": 2.0}, "load": {"price": 9, "floor": 0.8, "waiting": [0, 4]}}
    config = configure(llama_model, {"default_budget": "auto", **settings})
    limits = config.model_config.buddy_limits
    assert limits.default_budget == "auto"
    assert limits.auto == AutoLimits(NUM_LAYERS, PREDICTOR_DEPTHS, 0.45, 1.0, 2.0, 9.0, 0.8)
    told = 'default budget auto, from 0.45 to 1, "auto" chooses among 0.45, 0.5, 0.8, 1 at price 2, 9 when fully loaded'
    assert any(line.endswith(told) for line in said)
    settings = {"min_budget": 0.45, "slo": {"itl_ms": 50, "floor": 0.5}}
    keeping = configure(llama_model, settings)
    assert keeping.model_config.buddy_limits.auto.objectives_s == {"itl": 0.05}
    told = "0.8, 1 at price 8 and above, down to 0.5, to keep p99 of itl within 50 ms"
    assert any(line.endswith(told) for line in said)
    assert engine_settings(keeping).slo.itl_ms == 50
    # The engine's process reads them again; what nobody gave must not look given there.
    read = engine_settings(config)
    assert read.load.waiting == (0, 4)
    assert read.load.price == 9
    assert "kv_use" not in read.load.model_fields_set


def test_without_an_artifact_the_ways_to_get_one_are_told(llama_model: Tiny) -> None:
    """Fails if a model without a shipped artifact is served unrouted, or the user is left alone."""
    message = refusal(llama_model, additional_config={})
    assert "vllm-buddy prior" in message
    assert "LlamaForCausalLM, 8 layers" in message


@pytest.mark.parametrize("name", ["/no/such/folder", "./none", "nobody/nothing", "noname"])
def test_an_artifact_that_is_not_there_is_refused_by_name(
    llama_model: Tiny, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if a wrong name starts a server with another artifact, or none."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert name in refusal(llama_model, {"artifact": name})


def damage_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / CONFIG_FILE).read_text())
    (folder / CONFIG_FILE).write_text(json.dumps({**config, **changes}))


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "weights truncated": (
        lambda f: (f / WEIGHTS_FILE).write_bytes((f / WEIGHTS_FILE).read_bytes()[:-100]),
        "not a complete safetensors file",
    ),
    "weights empty": (lambda f: (f / WEIGHTS_FILE).write_bytes(b""), WEIGHTS_FILE),
    "weights missing": (lambda f: (f / WEIGHTS_FILE).unlink(), WEIGHTS_FILE),
    "config truncated": (
        lambda f: (f / CONFIG_FILE).write_text((f / CONFIG_FILE).read_text()[:-30]),
        "is not JSON",
    ),
    "config missing": (lambda f: (f / CONFIG_FILE).unlink(), CONFIG_FILE),
    "config of another kind": (lambda f: (f / CONFIG_FILE).write_text("[1]"), CONFIG_FILE),
    "newer format": (lambda f: damage_config(f, format_version=FORMAT_VERSION + 1), "update vllm_buddy"),
    "unknown field": (lambda f: damage_config(f, surprise=1), "surprise"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_artifact_is_refused(llama_model: Tiny, artifact_copy: Path, name: str) -> None:
    """Fails if half an artifact routes half a model."""
    damage, told = DAMAGE[name]
    damage(artifact_copy)
    message = refusal(llama_model, {"artifact": str(artifact_copy)})
    assert told in message
    assert str(artifact_copy) in message


@pytest.mark.parametrize("other", ["family", "weights"])
def test_an_artifact_of_another_model_is_refused_with_both_named(
    llama_model: Tiny, tmp_path: Path, tiny: Callable[[str], Tiny], other: str
) -> None:
    """Fails if a router trained for one model routes another, even one of the same shape."""
    if other == "family":
        artifact = tiny("qwen2").artifact_folder
    else:
        model = save_tiny_model(tmp_path / "other", "llama", seed=1)
        random_artifact(tmp_path / "artifact", model)
        artifact = tmp_path / "artifact"
    message = refusal(llama_model, {"artifact": str(artifact)})
    assert "was made for" in message
    assert message.count("fingerprint") == 2


def quantised_copy(folder: Path, tiny: Tiny) -> Path:
    """A copy of a model whose quantiser has scaled a norm."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(tiny.folder, folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"] * 2
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_a_copy_with_other_norms_is_served_if_the_shape_is_to_decide(llama_model: Tiny, tmp_path: Path) -> None:
    """Fails if a copy that AWQ has made cannot be served at all, or one of another shape can."""
    copy = quantised_copy(tmp_path / "copy", llama_model)
    assert "was made for" in refusal(llama_model, model=str(copy))
    configure(llama_model, {"base_check": "shape"}, model=str(copy))
    other = save_tiny_model(tmp_path / "other", "qwen3")
    assert "was made for" in refusal(llama_model, {"base_check": "shape"}, model=str(other))


def test_who_serves_a_quantised_copy_is_told_of_the_setting(
    llama_model: Tiny, tmp_path: Path, tiny: Callable[[str], Tiny]
) -> None:
    """Fails if a user of AWQ is not told of base_check, or it is advised for a model that only looks alike."""
    config = configure(llama_model)
    config.model_config.model = str(quantised_copy(tmp_path / "copy", llama_model))

    def told(artifact: Artifact, quantization: str | None) -> str:
        config.model_config.quantization = quantization
        with pytest.raises(ArtifactError) as caught:
            check_base_model(artifact, config)
        return str(caught.value)

    hint = 'whose quantiser (awq) scaled the norms, as those of AWQ and SmoothQuant do, set "base_check": "shape"'
    assert hint in told(llama_model.artifact, "awq")
    assert "base_check" not in told(llama_model.artifact, None)
    assert "base_check" not in told(tiny("qwen2").artifact, "awq")


def test_a_model_without_weights_takes_an_artifact_of_its_shape(llama_model: Tiny, tmp_path: Path) -> None:
    """Fails if benchmarks on random weights need a checkpoint, or are routed by an artifact of another shape."""

    def without_weights(folder: Path) -> dict[str, Any]:
        copy = shutil.copytree(
            folder, tmp_path / "dummies" / folder.name, ignore=shutil.ignore_patterns("*.safetensors")
        )
        return {"model": str(copy), "load_format": "dummy"}

    configure(llama_model, **without_weights(llama_model.folder))
    changes: tuple[dict[str, Any], ...] = ({"hidden_size": 64}, {"vocab_size": 256}, {"num_hidden_layers": 6})
    for number, change in enumerate(changes):
        other = save_tiny_model(tmp_path / f"other{number}", "llama", **change)
        random_artifact(tmp_path / f"artifact{number}", other)
        dummy = without_weights(other)
        configure(llama_model, {"artifact": str(tmp_path / f"artifact{number}")}, **dummy)
        assert "was made for" in refusal(llama_model, **dummy)


def test_a_vllm_that_was_not_tried_is_told(llama_model: Tiny, said: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if an operator with another vLLM looks for a fault elsewhere, or one with a tried vLLM is worried."""
    configure(llama_model)
    assert not any("was tested with" in line for line in said)
    monkeypatch.setattr("vllm.__version__", "0.99.0+cpu")
    configure(llama_model)
    (line,) = (line for line in said if "was tested with" in line)
    assert ", ".join(TESTED_VLLM) in line
    assert line.endswith("this is 0.99.0")


def test_budgets_below_those_of_the_training_are_told(llama_model: Tiny, tmp_path: Path, said: list[str]) -> None:
    """Fails if an operator does not learn that requests may ask for what nothing was trained for."""

    def told(**buddy: Any) -> list[str]:
        said.clear()
        configure(llama_model, {"artifact": str(tmp_path / "trained"), **buddy})
        return [line for line in said if "was trained for budgets from" in line]

    config = llama_model.artifact.config.model_copy(update={"budgets": (0.5, 1.0)})
    replace(llama_model.artifact, config=config).save(tmp_path / "trained")
    for buddy in ({}, {"min_budget": 0.4}):
        (line,) = told(**buddy)
        assert "artifact 'artifact' was trained for budgets from 0.5 up" in line
        assert "min_budget refuses them" in line
    assert told(min_budget=0.5) == told(min_budget=0.6) == []


@pytest.mark.parametrize("buddy", [{"load": {"price": 90.0}}, {"slo": {"itl_ms": 50}}])
def test_what_load_does_not_lower_is_told(llama_model: Tiny, said: list[str], buddy: dict[str, Any]) -> None:
    """Fails if an operator who sets an objective does not learn that requests without a budget are not lowered."""
    configure(llama_model, buddy)
    (line,) = (line for line in said if 'of budget "auto" only' in line)
    assert "run at default_budget 1" in line
    said.clear()
    configure(llama_model, {**buddy, "default_budget": "auto"})
    assert not [line for line in said if 'of budget "auto" only' in line]


def test_a_hub_model_is_identified_in_the_folder_that_vllm_downloads_to(
    llama_model: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if config.json is not asked for: vLLM downloads what the first pattern that matches stands for."""
    from vllm.model_executor.model_loader import weight_utils

    asked: list[Any] = []

    def download(name: str, cache_dir: str | None, patterns: list[str], revision: str | None) -> str:
        asked.append((name, cache_dir, patterns, revision))
        return str(llama_model.folder)

    monkeypatch.setattr(weight_utils, "download_weights_from_hf", download)
    config = configure(llama_model)
    config.model_config.model, config.load_config.download_dir = "owner/name", "elsewhere"
    found = identify_served_model(config)
    assert found.fingerprint == llama_model.artifact.config.base_model.fingerprint
    assert [call[2] for call in asked] == [["*.safetensors"], ["config.json"]]
    assert {call[:2] for call in asked} == {("owner/name", "elsewhere")}


def test_a_model_cut_by_overrides_is_refused(llama_model: Tiny) -> None:
    """Fails if the artifact fits the files and not the model: paths would lose layers, the last one first."""
    assert "6 layers" in refusal(llama_model, hf_overrides={"num_hidden_layers": 6})


CONNECTOR = {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}
UNSUPPORTED: dict[str, tuple[dict[str, Any], str]] = {
    "architecture": (
        {"hf_overrides": {"architectures": ["GemmaForCausalLM"]}},
        "LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM",
    ),
    "sliding window": ({"hf_overrides": {"sliding_window": 16}}, "sliding-window"),
    "sliding layers": ({"hf_overrides": {"layer_types": ["sliding_attention"] * 8}}, "sliding-window"),
    "LoRA beside drafts": ({"enable_lora": True, "speculative_config": NGRAM}, "LoRA adapters beside speculative"),
    "LoRA of two ranks": ({"enable_lora": True, "tensor_parallel_size": 2}, "LoRA adapters beside tensor or pipeline"),
    "KV connector": ({"kv_transfer_config": CONNECTOR}, "--kv-transfer-config"),
    "KV offloading": ({"kv_offloading_size": 1.0}, "--kv-offloading-size"),
    "speculator": (
        {"speculative_config": {**NGRAM, "method": "ngram_gpu"}},
        "choose one of ngram, suffix, draft_model, eagle, eagle3, custom_class",
    ),
    "drafts of two ranks": ({"speculative_config": DRAFTS, "tensor_parallel_size": 2}, "tensor parallelism"),
    "many drafts": ({"speculative_config": {**NGRAM, "num_speculative_tokens": 129}}, "at most 128 of a request"),
    "drafts by batch size": (
        {"speculative_config": {**DRAFTS, "num_speculative_tokens_per_batch_size": [[1, 4, 2], [5, 99, 1]]}},
        "leave out num_speculative_tokens_per_batch_size",
    ),
    "drafts by chance": (
        {
            "speculative_config": {
                **NGRAM,
                "rejection_sample_method": "synthetic",
                "synthetic_acceptance_rates": [0.5, 0.4],
            }
        },
        "leave out rejection_sample_method",
    ),
    "block rejection": (
        {"speculative_config": {**DRAFTS, "rejection_sample_method": "block"}},
        "leave out rejection_sample_method",
    ),
    "asynchronous drafts": ({"speculative_config": NGRAM, "async_scheduling": True}, "--async-scheduling"),
    "FlashInfer": ({"attention_config": {"backend": "FLASHINFER"}}, "--attention-backend with one of CPU_ATTN"),
    "FlexAttention": ({"attention_config": {"backend": "FLEX_ATTENTION"}}, "--attention-backend with one of CPU_ATTN"),
    "drafts of two stages": ({"speculative_config": NGRAM, "pipeline_parallel_size": 2}, "--speculative-config"),
    "scheduler": ({"scheduler_cls": "vllm.v1.core.sched.scheduler.Scheduler"}, "--scheduler-cls"),
    "worker": ({"worker_cls": "vllm.v1.worker.cpu_worker.CPUWorker"}, "--worker-cls"),
    "prompt embeddings": ({"enable_prompt_embeds": True}, "--enable-prompt-embeds"),
    "pooling": ({"runner": "pooling", "convert": "embed"}, "text generation"),
    "prefetch": ({"offload_group_size": 2, "offload_num_in_group": 1}, "--cpu-offload-gb"),
    "weight transfer": ({"weight_transfer_config": {"backend": "nccl"}}, "weight transfer"),
    "dual batch": ({"enable_dbo": True}, "--enable-dbo"),
    "whole compilation": ({"enforce_eager": False, "compilation_config": {"mode": 1}}, "STOCK_TORCH_COMPILE"),
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_what_cannot_be_routed_is_refused_with_the_reason(llama_model: Tiny, name: str) -> None:
    """Fails if a feature that routing breaks starts, or the user is not told which and what to do."""
    options, told = UNSUPPORTED[name]
    assert told in refusal(llama_model, **options)
    if name not in ("architecture", "sliding window", "sliding layers", "whole compilation"):
        return
    # The same without routing is vLLM's affair, and starts.
    configure(llama_model, additional_config={}, **{**options, "model_impl": "auto"})


@pytest.mark.slow
@pytest.mark.parametrize("name", UNSUPPORTED)
def test_a_server_says_so_in_one_line_and_ends(llama_model: Tiny, name: str) -> None:
    """Fails if `vllm-buddy serve` starts such a server, or shows its user a traceback, or nothing."""
    options, told = UNSUPPORTED[name]
    settings = {"buddy": {"artifact": str(llama_model.artifact_folder)}}
    arguments = as_arguments({**BASE, "additional_config": settings, **options})
    command = [sys.executable, "-m", "vllm_buddy", "serve", str(llama_model.folder), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=START_TIMEOUT_S)
    assert done.returncode == 2, done.stderr[-2000:]
    (error,) = (line for line in done.stderr.splitlines() if line.startswith("vllm-buddy: error:"))
    assert told in error
    assert "Traceback" not in done.stdout + done.stderr


def as_arguments(options: dict[str, Any]) -> list[str]:
    """Options of vLLM's engine as arguments of its server."""
    found = []
    for name, value in options.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            found.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            found += [f"--{flag}", json.dumps(value) if isinstance(value, dict) else str(value)]
    return found


@pytest.mark.parametrize("speculator", [None, NGRAM], ids=["alone", "drafts"])
@pytest.mark.parametrize("on_gpu", [False, True], ids=["cpu", "gpu"])
def test_the_worker_and_what_is_compiled_follow_the_device(
    llama_model: Tiny, speculator: dict[str, Any] | None, on_gpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if a GPU gets the worker of CPUs or a model compiled as a whole, which has fixed layers.

    Or if drafts are scheduled asynchronously: vLLM decides on that after the hook, where nobody has.
    """
    config = configure(llama_model, {"kernels": "reference"}, enforce_eager=False, speculative_config=speculator)
    config.parallel_config.worker_cls, config.scheduler_config.scheduler_cls = "auto", None
    config.scheduler_config.async_scheduling = None
    compilation = config.compilation_config
    compilation.mode, compilation.cudagraph_mode = CompilationMode.VLLM_COMPILE, CUDAGraphMode.FULL_AND_PIECEWISE
    monkeypatch.setattr(current_platform, "is_cpu", lambda: not on_gpu)
    hook.BuddyModelConfig.verify_and_update_config(config)
    assert config.parallel_config.worker_cls == (hook.GPU_WORKER if on_gpu else hook.CPU_WORKER)
    assert hook.GPU_WORKER.endswith("BuddyGPUWorker")
    assert hook.CPU_WORKER.endswith("BuddyCPUWorker")
    unchanged = CompilationMode.VLLM_COMPILE, CUDAGraphMode.FULL_AND_PIECEWISE
    expected = (CompilationMode.NONE, CUDAGraphMode.NONE) if on_gpu else unchanged
    assert (compilation.mode, compilation.cudagraph_mode) == expected
    assert config.scheduler_config.async_scheduling is (None if speculator is None else False)


def test_pipeline_stages_start_where_they_were_tried(llama_model: Tiny) -> None:
    """Fails if pipeline parallelism is refused, or an executor or a model runner of which nothing is known is not."""
    assert configure(llama_model, pipeline_parallel_size=2).parallel_config.worker_cls.startswith("vllm_buddy.")
    asked_for = {name: check for name, check, _ in _CHECKS}
    for backend, is_v2 in (("mp", False), ("ray", False), ("mp", True)):
        parallel = SimpleNamespace(pipeline_parallel_size=2, distributed_executor_backend=backend)
        config: Any = SimpleNamespace(parallel_config=parallel, use_v2_model_runner=is_v2)
        assert asked_for["pipeline parallelism on Model Runner V2"](config) == is_v2
        assert asked_for["pipeline parallelism with this executor"](config) == (backend == "ray")


def test_adapters_are_served_where_they_were_tried() -> None:
    """Fails if kernels that know one mapping of rows to adapters are given another row set without a word."""
    asked_for = {name: check for name, check, _ in _CHECKS}
    for is_v2 in (False, True):
        config: Any = SimpleNamespace(lora_config=object(), use_v2_model_runner=is_v2)
        assert asked_for["LoRA adapters on a GPU"](config) == (is_v2 or torch.cuda.is_available())


def test_the_lossless_drafter_lets_requests_ask_for_it(llama_model: Tiny) -> None:
    """Fails if a server without the drafter accepts the mode, or one with it does not."""
    assert not configure(llama_model).model_config.buddy_limits.lossless
    assert not configure(llama_model, speculative_config=NGRAM).model_config.buddy_limits.lossless
    assert configure(llama_model, speculative_config=DRAFTS).model_config.buddy_limits.lossless


def test_settings_of_drafts_that_cannot_be_are_refused(llama_model: Tiny) -> None:
    """Fails if a depth that there is no path of, or a setting that nothing reads, is found out later."""
    assert "drafts.depth is 8" in refusal(llama_model, {"drafts": {"depth": 8}}, speculative_config=DRAFTS)
    assert "below drafts.ngram_min" in refusal(llama_model, {"drafts": {"ngram_max": 1}}, speculative_config=DRAFTS)
    assert "--lossless-drafts" in refusal(llama_model, {"drafts": {"depth": 4}})
    # The refining pass would write to a slot that the request may not have.
    one, refined = {**DRAFTS, "num_speculative_tokens": 1}, {"drafts": {"depth": 4, "refine_depth": 6}}
    assert "drafts.refine_depth needs two drafts" in refusal(llama_model, refined, speculative_config=one)


def test_adapters_need_a_policy_that_leaves_their_keys_alone(llama_model: Tiny) -> None:
    """Fails if skipped layers write K and V without the request's adapter."""
    configure(llama_model, {"kv_policy": "masked"}, enable_lora=True)
    refused = refusal(llama_model, {"kv_policy": "kv_only"}, enable_lora=True)
    assert "kv_policy: kv_only projects" in refused
    assert "choose masked or zero" in refused


@pytest.mark.parametrize("buddy", [{"graphs": {"enabled": True}}, {"graphs": {"sizes": [1, 2]}}])
def test_what_the_device_does_not_have_is_refused(llama_model: Tiny, buddy: dict[str, Any]) -> None:
    """Fails if a server starts without what it was told to use."""
    assert "they need a CUDA device" in refusal(llama_model, buddy)


def test_the_rust_front_end_is_refused(llama_model: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a front end that validates no budgets is put before a routed engine."""
    monkeypatch.setenv("VLLM_USE_RUST_FRONTEND", "1")
    assert "VLLM_USE_RUST_FRONTEND" in refusal(llama_model)


START = """
import sys
from vllm import EngineArgs
config = EngineArgs(model=sys.argv[1], model_impl=sys.argv[2], dtype="float32", skip_tokenizer_init=True,
                    additional_config={"buddy": {"artifact": sys.argv[3]}}).create_engine_config()
print("STARTED", config.scheduler_config.scheduler_cls)
"""


def start(tiny: Tiny, model_impl: str, **environment: str) -> str:
    """Make a configuration in a process of its own; returns what it said."""
    command = [sys.executable, "-c", START, str(tiny.folder), model_impl, str(tiny.artifact_folder)]
    environment = {**os.environ, **environment}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=START_TIMEOUT_S)
    assert (result.returncode == 0) == ("STARTED" in result.stdout)
    return result.stdout + result.stderr


@pytest.mark.slow
def test_switched_off_it_refuses_buddy_and_nothing_else(llama_model: Tiny) -> None:
    """Fails if `--model-impl buddy` serves the stock model where the plugin is switched off."""
    said = start(llama_model, "buddy", VLLM_BUDDY_DISABLE="1")
    assert "STARTED" not in said
    assert "VLLM_BUDDY_DISABLE" in said
    assert "STARTED None" in start(llama_model, "auto", VLLM_BUDDY_DISABLE="1")


def test_a_plugin_that_fails_to_load_refuses_buddy_and_nothing_else(llama_model: Tiny, tmp_path: Path) -> None:
    """Fails if `--model-impl buddy` serves the stock model where the plugin cannot be imported."""
    # A module that shadows one the plugin needs, as a broken installation would.
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['vllm_buddy.serving.patches'] = None\n")
    path = os.pathsep.join((str(tmp_path), os.environ.get("PYTHONPATH", "")))
    said = start(llama_model, "buddy", PYTHONPATH=path)
    assert "STARTED" not in said
    assert "failed to load" in said
    assert "vllm-buddy doctor" in said
    assert "STARTED None" in start(llama_model, "auto", PYTHONPATH=path)


def test_patches_that_fail_halfway_refuse_buddy(llama_model: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if one patch is in place and the other is not: budgets would go unchecked."""
    from vllm.model_executor.models.registry import _ModelRegistry

    from vllm_buddy.serving import patches, plugin

    def fail() -> None:
        raise ImportError("moved")

    monkeypatch.setattr(patches, "_wrap_verify", fail)
    monkeypatch.setattr(_ModelRegistry, "_normalize_arch", _ModelRegistry._normalize_arch)
    plugin.register()
    assert "moved" in refusal(llama_model)

"""Kernels and CUDA graphs in the settings: what is chosen on which devices, and what is refused."""

from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from vllm_buddy.errors import SettingsError, UnsupportedError
from vllm_buddy.serving.start import devices
from vllm_buddy.serving.start.devices import with_device_settings
from vllm_buddy.serving.start.settings import BuddySettings


def resolved(
    settings: dict[str, Any],
    *,
    eager: bool = False,
    max_num_seqs: int = 64,
    stages: int = 1,
    speculator: str | None = None,
) -> BuddySettings:
    config: Any = SimpleNamespace(
        model_config=SimpleNamespace(enforce_eager=eager),
        scheduler_config=SimpleNamespace(max_num_seqs=max_num_seqs),
        parallel_config=SimpleNamespace(pipeline_parallel_size=stages),
        speculative_config=None if speculator is None else SimpleNamespace(method=speculator),
    )
    return with_device_settings(BuddySettings(**settings), config)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Settings are resolved as on a GPU where Triton works."""
    monkeypatch.setattr(devices, "current_platform", SimpleNamespace(is_cpu=lambda: False))
    monkeypatch.setattr(devices, "why_unavailable", lambda on: None)
    return monkeypatch


@pytest.fixture
def cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "current_platform", SimpleNamespace(is_cpu=lambda: True))


def test_on_cpu_layers_are_compiled_and_nothing_is_captured(cpu: None) -> None:
    """Fails if a CPU server gets kernels that it did not ask for."""
    settings = resolved({})
    assert settings.kernels is None
    assert settings.graphs.enabled is False
    assert resolved({"kernels": "reference"}).kernels == "reference"


def test_on_a_gpu_both_are_the_default(gpu: pytest.MonkeyPatch) -> None:
    """Fails if a GPU server runs without kernels or graphs by default, or captures sizes that no batch has."""
    settings = resolved({})
    assert settings.kernels == "triton"
    assert settings.graphs.enabled is True
    assert settings.graphs.sizes == (1, 2, 4, 8, 16, 24, 32, 48, 64)
    assert resolved({}, max_num_seqs=5).graphs.sizes == (1, 2, 4, 5)
    assert resolved({}, max_num_seqs=1000).graphs.sizes[-1] == 256
    assert resolved({"graphs": {"sizes": [3, 7]}}).graphs.sizes == (3, 7)


def test_each_way_to_switch_graphs_off(gpu: pytest.MonkeyPatch) -> None:
    """Fails if graphs are captured where they were switched off or cannot be."""
    assert resolved({"graphs": {"enabled": False}}).graphs.enabled is False
    assert resolved({}, eager=True).graphs.enabled is False
    assert resolved({"kernels": "reference"}).graphs.enabled is False
    assert resolved({"kv_policy": "zero"}).graphs.enabled is False
    assert resolved({}, stages=2).graphs.enabled is False
    assert resolved({}, speculator="eagle3").graphs.enabled is False
    assert resolved({}, speculator="eagle").graphs.enabled is True


def test_a_missing_triton_is_refused_with_the_setting_to_do_without(gpu: pytest.MonkeyPatch) -> None:
    """Fails if serving falls back to slow code without a word."""
    gpu.setattr(devices, "why_unavailable", lambda on: "Triton is not installed")
    with pytest.raises(SettingsError, match='Triton is not installed; set "kernels": "reference" to do without'):
        resolved({})
    assert resolved({"kernels": "reference"}).kernels == "reference"


def test_kernels_on_cpu_without_the_interpreter_are_refused(cpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a CPU server starts with kernels that cannot run there."""
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(SettingsError, match=r"need a CUDA device, not cpu.*leave it out"):
        resolved({"kernels": "triton"})


@pytest.mark.parametrize(
    ("settings", "eager", "reason"),
    [
        ({"kv_policy": "zero"}, False, "KV policy zero cannot be captured"),
        ({"kernels": "reference"}, False, 'made of the kernels "triton"'),
        ({}, True, "--enforce-eager forbids them"),
    ],
)
def test_graphs_that_cannot_be_had_are_refused(
    gpu: pytest.MonkeyPatch, settings: dict[str, Any], eager: bool, reason: str
) -> None:
    """Fails if a server that was asked for graphs runs without them."""
    with pytest.raises(SettingsError, match=f"{reason}; leave it out or set it to false"):
        resolved({"graphs": {"enabled": True}, **settings}, eager=eager)


def test_graphs_of_pipeline_stages_are_refused(gpu: pytest.MonkeyPatch) -> None:
    """Fails if graphs that read the embedding and the last norm are captured where a stage has neither."""
    with pytest.raises(SettingsError, match="never tried with pipeline parallelism; leave it out"):
        resolved({"graphs": {"enabled": True}}, stages=2)


def test_graphs_on_cpu_are_refused(cpu: None) -> None:
    """Fails if a server that was asked for graphs runs without them."""
    with pytest.raises(SettingsError, match="need a CUDA device"):
        resolved({"graphs": {"enabled": True}})


@pytest.mark.parametrize("settings", [{"sizes": (1, 2)}, {"memory_mib": 512}])
def test_settings_of_graphs_without_graphs_are_refused(gpu: pytest.MonkeyPatch, settings: dict[str, Any]) -> None:
    """Fails if a server ignores what it was told."""
    (name,) = settings
    with pytest.raises(SettingsError, match=f"graphs.{name} without CUDA graphs: they are switched off"):
        resolved({"graphs": {**settings, "enabled": False}})
    with pytest.raises(SettingsError, match=f"graphs.{name} without CUDA graphs: --enforce-eager"):
        resolved({"graphs": settings}, eager=True)
    assert resolved({"graphs": settings}).graphs.enabled


def test_sizes_that_no_step_has_are_refused(gpu: pytest.MonkeyPatch) -> None:
    """Fails if graphs are captured, and memory is taken, for batches that cannot be."""
    with pytest.raises(SettingsError, match=r"graphs.sizes go to 65, .* --max-num-seqs 64"):
        resolved({"graphs": {"sizes": (1, 65)}})


@pytest.mark.parametrize("sizes", [[], [2, 1], [1, 1], [0, 1]])
def test_sizes_that_do_not_grow_are_refused(sizes: list[int]) -> None:
    """Fails if a step may be padded to a size that was not captured, or to a smaller one."""
    with pytest.raises(ValueError):
        BuddySettings(graphs={"sizes": sizes})


@pytest.mark.parametrize("block_size", [32, 128])
def test_kernels_are_tried_in_every_form_at_start(block_size: int) -> None:
    """Fails if a kernel's first compilation, or its refusal of the model's shapes, waits for a request."""
    from vllm_buddy_kernels import KERNELS, KernelError, Kernels, OutOfResources

    from vllm_buddy.method.bypass import Bypass
    from vllm_buddy.serving.forward.layer import fused_bypasses, try_kernels

    calls: list[tuple[str, Any]] = []
    block_sizes: set[int] = set()

    def logged(name: str) -> Any:
        def call(*args: Any) -> Any:
            calls.append((name, [None if arg is None else type(arg).__name__ for arg in args]))
            if name == "layer_slots":
                block_sizes.add(args[6])
            return getattr(KERNELS["reference"], name)(*args)

        return call

    kernels = Kernels(*(logged(name) for name in ("layer_slots", "gather_rows", "scatter_rows", "bypass_rows")))
    layer = SimpleNamespace(input_layernorm=SimpleNamespace(weight=torch.ones(8), variance_epsilon=1e-6))
    bypass = Bypass(torch.zeros(1, 2, 8), torch.zeros(1, 8, 2), 1e-6)
    try_kernels([layer] * 3, fused_bypasses(bypass, kernels), kernels, block_size)
    assert block_sizes == {block_size}  # the kernel is compiled for one
    forms = {(name, tuple(arg is None for arg in args)) for name, args in calls}
    assert len([1 for name, _ in forms if name == "scatter_rows"]) == 4
    assert len([1 for name, _ in forms if name == "gather_rows"]) == 2
    assert len([1 for name, _ in forms if name == "bypass_rows"]) == 2
    assert len([1 for name, _ in forms if name == "layer_slots"]) == 2

    for error in (KernelError("the rank is 1000"), OutOfResources(120, 99, "shared memory")):
        refuses = Mock(side_effect=error)
        with pytest.raises(UnsupportedError, match=rf'{error}.*set "kernels": "reference"'):
            try_kernels([layer] * 3, None, Kernels(refuses, refuses, refuses, refuses), block_size)

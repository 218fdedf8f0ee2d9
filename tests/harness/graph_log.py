"""Records what decode steps replay, and counts which kernels an engine calls."""

from collections import Counter
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from vllm_buddy_kernels import Kernels

from tests.harness.engine import Engine

SIZES = (1, 2, 4, 8)
KERNELS = "triton" if torch.cuda.is_available() else "reference"  # the references wait for the device


class GraphLog:
    """What a step replays: each step's pieces, or its path."""

    def __init__(self, graphs: Any) -> None:
        self.steps: list[list[Any]] = []
        self.captured: list[Any] = []
        pieces, run, capture = graphs._pieces, graphs.run, graphs._capture
        graphs._pieces = {key: self._logged(key, replay) for key, replay in pieces.items()}

        def logged_run(step: Any, *inputs: Any) -> Any:
            self.steps.append([])
            return run(step, *inputs)

        def logged_capture(bodies: Any) -> Any:
            (body,) = bodies
            self.captured.append(body.args)
            (replay,), num_bytes = capture(bodies)
            return [self._logged(body.args, replay)], num_bytes

        graphs.run, graphs._capture = logged_run, logged_capture

    def _logged(self, key: Any, replay: Callable[[], Any]) -> Callable[[], Any]:
        def call() -> None:
            self.steps[-1].append(key)
            replay()

        return call


def counted_kernels(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Count what the engine calls of its kernels, until monkeypatch is undone."""
    calls: Counter[str] = Counter()

    def counted(name: str, kernel: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            calls[name] += 1
            calls[f"{name} with norm"] += name == "scatter_rows" and args[-2] is not None
            return kernel(*args)

        return call

    state, backbone = engine.state, engine.runner.model.model
    kernels = Kernels(
        **{field.name: counted(field.name, getattr(state.kernels, field.name)) for field in fields(Kernels)}
    )
    monkeypatch.setattr(state, "kernels", kernels)
    monkeypatch.setattr(state, "_moves_rows", kernels)
    if backbone.bypasses is not None:
        monkeypatch.setattr(backbone, "bypasses", [b and replace(b, kernels=kernels) for b in backbone.bypasses])
    return calls

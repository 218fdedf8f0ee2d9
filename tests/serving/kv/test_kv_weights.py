"""K and V projections of skipped rows, where vLLM's loader fills in the weights itself."""

import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.model_executor.layers.linear import UnquantizedLinearMethod

from vllm_buddy.serving.kv import kv_only
from vllm_buddy.serving.kv.kv_only import keep_missing_kv_weights

Q_SIZE = 4


def layer(*, quantised: bool = False) -> Any:
    method = object() if quantised else UnquantizedLinearMethod()
    proj = SimpleNamespace(quant_method=method, weight=torch.nn.Parameter(torch.arange(16.0).view(8, 2)))
    return SimpleNamespace(self_attn=SimpleNamespace(qkv_proj=proj, q_size=Q_SIZE))


def rows_of(one: Any) -> Any:
    return getattr(one.self_attn.qkv_proj, "buddy_kv_weight", None)


def test_on_a_gpu_the_rows_are_kept_when_the_weights_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if --load-format sharded_state makes each skipped layer compute its queries."""
    monkeypatch.setattr(kv_only.current_platform, "is_cpu", lambda: False)
    plain, packed = layer(), layer(quantised=True)
    keep_missing_kv_weights([plain, packed])
    assert torch.equal(rows_of(plain), plain.self_attn.qkv_proj.weight[Q_SIZE:])
    assert rows_of(packed) is None


def test_on_cpu_that_costs_is_told(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Fails if a server is slower than it could be and nobody learns why, or one that is not is warned."""
    monkeypatch.setattr(kv_only.current_platform, "is_cpu", lambda: True)
    kv_only.logger.addHandler(caplog.handler)
    with caplog.at_level(logging.WARNING):
        keep_missing_kv_weights([layer(quantised=True)])
        assert not caplog.records
        keep_missing_kv_weights([plain := layer()])
    kv_only.logger.removeHandler(caplog.handler)
    assert "this --load-format" in caplog.text
    assert rows_of(plain) is None

"""Ranks and replicas that do not serve what the server was configured for are refused, in one line."""

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch.distributed

from tests.harness.engine import Tiny
from tests.harness.server_config import BASE, as_arguments, configure
from tests.harness.tiny_models import random_artifact
from vllm_buddy.errors import ArtifactError, SettingsError
from vllm_buddy.serving.schedule.draft_pace import DEPTH_DRAFTS
from vllm_buddy.serving.start import agreement
from vllm_buddy.serving.start.agreement import Served, load_agreed_artifact, refuse_differences, served

START_TIMEOUT_S = 600.0

HERE = Served("head", {"vllm_buddy": "0.1.0", "artifact": "'a' (1)", "setting kv_policy": '"masked"'})


def told(*found: tuple[str, Served]) -> str:
    with pytest.raises(SettingsError) as caught:
        refuse_differences(HERE, found)
    message = str(caught.value)
    assert "\n" not in message
    return message


def elsewhere(node: str = "other", **facts: str) -> Served:
    return Served(node, HERE.facts | facts)


def test_processes_that_agree_are_not_refused() -> None:
    """Fails if nodes with other names, which agree in everything else, cannot serve together."""
    refuse_differences(HERE, [("rank 0", HERE), ("rank 1", elsewhere())])


def test_two_checkouts_of_one_version_differ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a node with another commit of the package, which has the same version, is served with."""
    file = tmp_path / "package" / "one.py"
    file.parent.mkdir()
    monkeypatch.setattr(agreement.vllm_buddy, "__path__", [str(file.parent)])
    digests = []
    for text in ("a = 1", "a = 2", "a = 1"):
        file.write_text(text)
        digests.append(agreement._source_digest.__wrapped__())
    assert digests[0] == digests[2] != digests[1]


def test_the_code_is_among_what_is_compared(tiny: Callable[[str], Tiny]) -> None:
    """Fails if the digest of the code does not reach the other ranks."""
    config, artifact = configure(tiny("llama")), tiny("llama").artifact
    assert agreement._source_digest() in served(config, artifact).facts["vllm_buddy"]


def test_what_differs_is_told_with_rank_node_and_both_values() -> None:
    """Fails if the operator must guess which node has the wrong version, artifact or setting."""
    message = told(("rank 0", HERE), ("rank 1", elsewhere(artifact="'b' (2)")))
    assert "configured on head, but rank 1 on other has artifact 'b' (2) instead of 'a' (1)." in message
    message = told(("rank 1", elsewhere(**{"setting kv_policy": '"zero"'})))
    assert 'rank 1 on other has setting kv_policy "zero" instead of "masked".' in message


def test_settings_of_another_version_are_not_compared() -> None:
    """Fails if a version that has other settings hides behind a list of them."""
    message = told(("rank 1", elsewhere(vllm_buddy="0.2.0", **{"setting new": "1"})))
    assert "rank 1 on other has vllm_buddy 0.2.0 instead of 0.1.0." in message
    assert "setting new" not in message


def test_ranks_that_differ_in_the_same_are_told_together() -> None:
    """Fails if a node with eight ranks gives a message of pages."""
    other = elsewhere(vllm_buddy="0.2.0")
    message = told(("rank 1", other), ("rank 2", other), ("rank 3", elsewhere("third", artifact="'b' (2)")))
    assert "rank 1, rank 2 on other has vllm_buddy 0.2.0 instead of 0.1.0; rank 3 on third has artifact" in message


def configured(spec: Any = None, **settings: Any) -> Any:
    """What `served` reads of a VllmConfig."""
    return SimpleNamespace(additional_config={"buddy": {"artifact": "/a", **settings}}, speculative_config=spec)


def test_a_replica_without_the_drafts_of_the_others_differs(tiny: Callable[[str], Tiny]) -> None:
    """Fails if a replica starts that a lossless request, which the front end lets pass, would end."""
    artifact = tiny("llama").artifact
    lossless, ngrams = (
        SimpleNamespace(method=method, model=model, num_speculative_tokens=4)
        for method, model in (("custom_class", DEPTH_DRAFTS), ("ngram", "ngram"))
    )
    found = [served(configured(spec), artifact).facts["speculator"] for spec in (None, lossless, ngrams)]
    assert found == ["none", f"{DEPTH_DRAFTS} with 4 drafts", "ngram with 4 drafts"]


def test_every_setting_but_the_folder_of_a_node_counts(tiny: Callable[[str], Tiny]) -> None:
    """Fails if ranks with another policy or kernels go unnoticed, or each node must keep the artifact in one place."""
    artifact = tiny("llama").artifact
    facts = served(configured(), artifact).facts
    assert facts == served(configured(artifact="/b"), artifact).facts
    assert facts != served(configured(kv_policy="zero"), artifact).facts
    assert artifact.digest in facts["artifact"]
    lost = served(configured(), ArtifactError("/a is missing")).facts
    assert lost["artifact"] == "none (/a is missing)"


def test_the_configuration_says_what_it_serves(tiny: Callable[[str], Tiny]) -> None:
    """Fails if a server on one node differs from its own configuration."""
    llama = tiny("llama")
    config = configure(llama, {"kv_policy": "zero", "load": {"price": 90.0}})
    assert config.model_config.buddy_served == served(config, llama.artifact)


def load_beside(config: Any, others: list[Any], monkeypatch: pytest.MonkeyPatch) -> Any:
    """Load the artifact as rank 0 of a server, beside ranks that say this of themselves."""
    from vllm.distributed import parallel_state

    group = SimpleNamespace(world_size=1 + len(others), cpu_group=object())

    def gather(into: list[Any], ours: Any, group: Any) -> None:
        assert group is parallel_state._WORLD.cpu_group
        assert len(into) == 1 + len(others)
        into[:] = [ours, *others]

    monkeypatch.setattr(parallel_state, "_WORLD", group)
    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    return load_agreed_artifact(config)


def test_a_rank_that_serves_something_else_is_refused_where_the_artifact_is_loaded(
    tiny: Callable[[str], Tiny], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Fails if ranks tell each other what they serve and nobody compares it, or a rank without an artifact hangs."""
    llama = tiny("llama")
    config = configure(llama)
    ours = config.model_config.buddy_served
    same = ours, Served("other", ours.facts)
    assert load_beside(config, [same], monkeypatch).digest == llama.artifact.digest
    different = ours, Served("other", ours.facts | {"artifact": "'b' (2)"})
    with pytest.raises(SettingsError, match=r"rank 2 on other has artifact 'b' \(2\) instead of 'artifact'"):
        load_beside(config, [same, different], monkeypatch)
    settings = config.additional_config["buddy"]
    config.additional_config = {"buddy": {**settings, "artifact": str(tmp_path / "gone")}}
    with pytest.raises(SettingsError, match=r"rank 0 on .* has artifact none \(no artifact at .*gone"):
        load_beside(config, [same], monkeypatch)


def ready_message(config: Any, found: Served) -> bytes:
    """What an engine with vLLM's usual message sends when it is ready."""
    from vllm.v1.engine import EngineCoreReadyResponse

    from vllm_buddy.serving.compat import add_to_ready_response

    values: dict[str, Any] = {
        field.name: {int: 0, str: "", bool: False}.get(field.type) for field in fields(EngineCoreReadyResponse)
    }
    values |= {"max_model_len": config.model_config.max_model_len, "num_gpu_blocks": 7, "block_size": 32}
    response = EngineCoreReadyResponse(**(values | {"data_parallel_rank": 3}))
    return msgspec.msgpack.encode(add_to_ready_response(response, found))


def test_a_replica_with_another_artifact_is_refused_by_its_front_end(tiny: Callable[[str], Tiny]) -> None:
    """Fails if replicas of several nodes answer from different artifacts, or vLLM does not read its own message."""
    from vllm.v1.engine.core_client import MPClient

    config = configure(tiny("llama"))
    ours = config.model_config.buddy_served
    client = SimpleNamespace(vllm_config=config, _effective_attention_block_sizes=set())
    MPClient._apply_ready_response(client, ready_message(config, ours))
    assert config.cache_config.num_gpu_blocks == 7  # vLLM's own part
    other = Served("other", ours.facts | {"artifact": "'b' (2)"})
    with pytest.raises(SettingsError, match=r"replica 3 on other has artifact 'b' \(2\) instead of 'artifact'"):
        MPClient._apply_ready_response(client, ready_message(config, other))


def test_a_stock_engine_sends_vllms_own_message(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if the plugin changes what servers without routing send."""
    from vllm.v1.engine.core import EngineCoreProc

    from vllm_buddy.serving.patches.engine_core import wrap_ready_response
    from vllm_buddy.serving.patches.wrapping import MARK

    monkeypatch.setattr(EngineCoreProc, "_make_ready_response", lambda self: "vLLM's")
    wrap_ready_response()
    assert hasattr(EngineCoreProc._make_ready_response, MARK)
    model_config = SimpleNamespace(model_impl="auto")
    engine: Any = SimpleNamespace(vllm_config=SimpleNamespace(model_config=model_config))
    assert EngineCoreProc._make_ready_response(engine) == "vLLM's"


_SERVE = """
import os, sys
from pathlib import Path

import torch.distributed
from vllm_buddy.serving.start import agreement

load = agreement.load_artifact


def load_of_this_rank(folder):
    # In a process of a rank; the configuration is made without.
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    return load(Path(os.environ["OTHER_ARTIFACT"]) if rank == 1 else folder)


agreement.load_artifact = load_of_this_rank  # vLLM's processes import this file again

if __name__ == "__main__":
    from vllm_buddy.cli import main

    sys.exit(main(["serve", *sys.argv[1:]]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("other", ["another artifact", "no artifact"])
def test_a_rank_with_another_artifact_ends_the_server_in_one_line(
    tiny: Callable[[str], Tiny], tmp_path: Path, other: str
) -> None:
    """Fails if two ranks serve different artifacts, wait for each other, or the user gets a traceback at the end."""
    if (os.cpu_count() or 1) < 2:
        pytest.skip("two ranks need two cores")
    llama = tiny("llama")
    folder = tmp_path / "another"
    if other == "another artifact":
        random_artifact(folder, llama.folder, seed=1)
    script = tmp_path / "serve.py"
    script.write_text(_SERVE)
    settings = {"buddy": {"artifact": str(llama.artifact_folder)}}
    arguments = as_arguments({**BASE, "additional_config": settings, "tensor_parallel_size": 2})
    done = subprocess.run(
        [sys.executable, str(script), str(llama.folder), *arguments, "--kv-cache-memory-bytes", str(32 << 20)],
        env={
            **os.environ,
            "VLLM_CPU_OMP_THREADS_BIND": "0|1",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
            "OTHER_ARTIFACT": str(folder),
        },
        capture_output=True,
        text=True,
        timeout=START_TIMEOUT_S,
    )
    assert done.returncode == 2, done.stderr[-3000:]
    # Python's resource tracker may still warn of what vLLM's processes left.
    lines = done.stderr.splitlines()
    (place,) = (i for i, line in enumerate(lines) if line.startswith("vllm-buddy: error: "))
    assert "Traceback" not in "".join(lines[place:])
    assert "rank 1 on " in lines[place]
    assert "rank 0" not in lines[place]
    assert f"instead of 'artifact' ({llama.artifact.digest})" in lines[place]
    found = "artifact 'another' (" if other == "another artifact" else f"artifact none (no artifact at {folder}"
    assert found in lines[place]

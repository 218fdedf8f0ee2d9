"""An abort leaves nothing behind, not even for a request of the same id."""

import pytest

from tests.harness.engine import Ask, Engine
from tests.harness.tiny_models import random_prompts

PROMPTS = [tuple(p) for p in random_prompts(4, seed=61, min_tokens=20, max_tokens=60)]


def test_the_same_id_again_right_after_an_abort(llama: Engine) -> None:
    """Fails if a request inherits path, lengths or count of an aborted one with its id."""
    llama.configure("masked", 1)
    first, second = Ask(PROMPTS[0], 0.5, 30), Ask(PROMPTS[1], 0.75, 12)
    for _ in range(3):
        llama.add(first, "again")
        for _ in range(4):
            llama.step()
        llama.abort("again")
        llama.add(second, "again")
        outputs = llama.finish()
        llama.check([second], [outputs["again"]])
        assert outputs["again"].kv_transfer_params["buddy"]["tokens"] <= len(second.prompt) + second.max_tokens - 1


def test_the_engines_own_id_may_come_again(llama: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if scheduler or worker keep state under the id of a finished request: vLLM can be told to keep ids."""
    monkeypatch.setattr("vllm.v1.engine.input_processor.random_uuid", lambda: "same")
    llama.configure("masked", 1)
    first, second = Ask(PROMPTS[0], 0.5, 30), Ask(PROMPTS[1], 0.75, 12)
    llama.add(first, "id")
    for _ in range(4):
        llama.step()
    llama.abort("id")
    llama.add(second, "id")
    llama.check([second], [llama.finish()["id"]])


def test_an_abort_leaves_nothing_behind_and_disturbs_nobody(llama: Engine) -> None:
    """Fails if an aborted request keeps its route, its outcome or its slot in the KV policy."""
    llama.configure("masked", 1, chunk=33)
    for when in (0, 1, 2, 5):
        good = [Ask(PROMPTS[0], 0.5, 10), Ask(PROMPTS[2], 0.75, 10)]
        ids = [llama.add(ask) for ask in good]
        victim = llama.add(Ask(PROMPTS[1], 0.5, 50))
        for _ in range(when):
            llama.step()
        llama.abort(victim)
        outputs = llama.finish()
        llama.check(good, [outputs[i] for i in ids])
    llama.abort_all()
    assert not llama.scheduler._routed
    assert not llama.runner.buddy_state.policy._slot

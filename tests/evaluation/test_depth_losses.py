"""Losses at every depth, and the samples that they are measured on."""

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from tests.evaluation.conftest import Tiny
from tests.harness.tiny_models import NUM_LAYERS
from vllm_buddy.data_file import DataFile
from vllm_buddy.errors import DataError, EvaluationError
from vllm_buddy.evaluation import Sample
from vllm_buddy.evaluation.depth_losses import measure_depth_losses
from vllm_buddy.evaluation.request_samples import SampleShape, request_samples
from vllm_buddy.method.lora import LoraDeltas

FP32 = 2e-4  # sums in another order, through eight layers
DEPTHS = (3, 5, NUM_LAYERS)
SHAPE = SampleShape(context=8, prompt=40, answer=12, shortest_answer=4)


def _ignore(done: int, total: int) -> None:
    pass


def test_losses_are_those_of_the_reference(tiny: Tiny, samples: list[Sample]) -> None:
    """Fails if a loss is off by a token or belongs to another path."""
    found = measure_depth_losses(tiny.model, tiny.artifact, samples, DEPTHS, _ignore)
    for sample, losses in zip(samples, found.losses, strict=True):
        for depth, loss in zip(DEPTHS, losses, strict=True):
            log_probs = tiny.by_hand(sample, depth, 0, "masked")
            wanted = -np.mean([float(row[t]) for row, t in zip(log_probs, sample.targets, strict=True)])
            assert loss == pytest.approx(wanted, abs=FP32)


def test_what_was_measured_is_not_measured_again(tiny: Tiny, samples: list[Sample], tmp_path: Path) -> None:
    """Fails if measured losses are lost after a stop, or are found for other depths."""
    first = measure_depth_losses(tiny.model, tiny.artifact, samples, DEPTHS, _ignore, tmp_path)
    (file,) = tmp_path.glob("losses-*.npy")
    halved = np.load(file)
    halved[0] = 7.0
    halved[2:] = np.nan
    np.save(file, halved)
    resumed = measure_depth_losses(tiny.model, tiny.artifact, samples, DEPTHS, _ignore, tmp_path)
    assert (resumed.losses[0] == 7.0).all()
    np.testing.assert_array_equal(resumed.losses[1:], first.losses[1:])
    file.write_bytes(b"cut off")
    with pytest.raises(EvaluationError, match="remove it to measure again"):
        measure_depth_losses(tiny.model, tiny.artifact, samples, DEPTHS, _ignore, tmp_path)
    measure_depth_losses(tiny.model, tiny.artifact, samples, (3, 4), _ignore, tmp_path)
    assert len(list(tmp_path.glob("losses-*.npy"))) == 2


def test_losses_of_another_model_are_not_taken(tiny: Tiny, samples: list[Sample], tmp_path: Path) -> None:
    """Fails if a fine-tuned model with the norms and embedding of its base gets the losses of its base."""
    base = measure_depth_losses(tiny.model, tiny.artifact, samples, DEPTHS, _ignore, tmp_path)
    tuned = copy.deepcopy(tiny.model)
    with torch.no_grad():
        tuned.model.layers[2].mlp.down_proj.weight.mul_(3)  # type: ignore[union-attr, index]
    other = measure_depth_losses(tuned, tiny.artifact, samples, DEPTHS, _ignore, tmp_path)
    assert not np.allclose(other.losses, base.losses)


def test_an_artifact_that_changes_weights_is_refused(tiny: Tiny, samples: list[Sample]) -> None:
    """Fails if an artifact that changes weights is measured without the change."""
    artifact = replace(tiny.artifact, lora=LoraDeltas({}, {}, 1.0))
    with pytest.raises(EvaluationError, match="changes the base weights"):
        measure_depth_losses(tiny.model, artifact, samples, DEPTHS, _ignore)


@pytest.fixture
def tokenizer(model_with_tokenizer: Path) -> Any:
    return AutoTokenizer.from_pretrained(model_with_tokenizer)


def test_a_row_is_a_prompt_and_its_answer(tokenizer: Any, tmp_path: Path) -> None:
    """Fails if the context is not the prompt that a server sees, or more than the answer is scored."""
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    tokenizer.chat_template += "{% if add_generation_prompt %}<assistant>{% endif %}"
    rows = [{"instruction": "Add.", "input": "1+1", "output": "It is two, and no more."}]
    rows.append({"instruction": "x" * 60, "output": "too long a prompt"})
    rows.append({"instruction": "Short.", "output": "no"})
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows))
    (sample,) = request_samples(DataFile.read(path), tokenizer, (0, 1), 1, SHAPE, 0)
    assert tokenizer.decode(sample.token_ids[: sample.num_context]) == "<user>Add.\n\n1+1<assistant>"
    assert tokenizer.decode(sample.targets) == "It is two, a"
    with pytest.raises(DataError, match="2 samples were asked for, but from 0% to 100% of it there are 1"):
        request_samples(DataFile.read(path), tokenizer, (0, 1), 2, SHAPE, 0)


def test_the_longest_prompt_is_that_which_was_asked_for(tokenizer: Any, tmp_path: Path) -> None:
    """Fails if a prompt may be as long as the context of running text, however short --prompt is."""
    rows = [{"instruction": "x" * size, "output": "an answer that is long"} for size in (4, 30)]
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows))
    whole = request_samples(DataFile.read(path), tokenizer, (0, 1), 2, SampleShape(64, 64, 12), 0)
    short, long = sorted(sample.num_context for sample in whole)
    (sample,) = request_samples(DataFile.read(path), tokenizer, (0, 1), 1, SampleShape(64, long - 1, 12), 0)
    assert sample.num_context == short
    with pytest.raises(DataError, match="there are 1"):
        request_samples(DataFile.read(path), tokenizer, (0, 1), 2, SampleShape(64, long - 1, 12), 0)


def test_parts_of_a_text_share_nothing(tokenizer: Any, tmp_path: Path) -> None:
    """Fails if two parts of a text share tokens."""
    path = tmp_path / "text.txt"
    text = "".join(f"{number:05d} " for number in range(200))
    path.write_text(text)
    file = DataFile.read(path)
    train = request_samples(file, tokenizer, (0.0, 0.8), 48, SHAPE, 0)
    test = request_samples(file, tokenizer, (0.8, 1.0), 12, SHAPE, 0)
    starts = [text.index(tokenizer.decode(sample.token_ids)) for sample in (*train, *test)]
    assert len(set(starts)) == 60
    assert max(starts[:48]) + 20 <= 0.8 * len(text) <= min(starts[48:])
    assert {(len(s.token_ids), s.num_context) for s in (*train, *test)} == {(20, 8)}

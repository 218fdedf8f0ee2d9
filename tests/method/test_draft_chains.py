"""Drafts of all positions at once are those that the reference makes one by one."""

import pytest
import torch

from tests.harness.tiny_models import (
    NUM_LAYERS,
    VOCAB_SIZE,
    load_model,
    random_artifact,
    random_prompts,
    save_tiny_model,
)
from vllm_buddy.method import full_path
from vllm_buddy.method.draft_chains import draft_chains, full_pass
from vllm_buddy.method.kv_policy import MASKED
from vllm_buddy.method.reference import routed_logits


@pytest.mark.parametrize("some", [False, True], ids=["all tokens", "some tokens"])
@pytest.mark.parametrize("trained", ["no", "adapter", "gaps"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_chains_equal_drafts_made_one_by_one(
    family: str, trained: str, some: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Fails if a draft reads an entry of another chain, of a later token, or of the whole model within the chain.

    Or if the adapter of the path's exit, the bypasses of its gaps, or a choice among some tokens, change what is
    drafted otherwise than in the reference.
    """
    root = tmp_path_factory.mktemp(family)
    folder = save_tiny_model(root / "model", family)
    artifact = random_artifact(
        root / "artifact", folder, bypass_rank=4, draft_depths=(5,), draft_vocabulary=40, draft_gaps=True
    )
    model, path, length = load_model(folder), artifact.drafts[0].path, 3
    adapter = None if trained == "no" else artifact.drafts[0].adapter
    bypass = artifact.drafts[0].bypass if trained == "gaps" else artifact.bypass
    tokens = torch.tensor(random_prompts(2, seed=3, min_tokens=24, max_tokens=24))
    said, full = full_pass(model, tokens)
    vocabulary = artifact.draft_vocabulary if some else None
    allowed = list(range(VOCAB_SIZE)) if vocabulary is None else vocabulary.tolist()
    chains = draft_chains(model, tokens, path, length, full, bypass, adapter, vocabulary)
    plain = draft_chains(model, tokens, path, length, full, artifact.bypass)
    assert torch.equal(chains, plain) == (trained == "no" and not some)
    whole = full_path(NUM_LAYERS)
    for row, text in enumerate(tokens.tolist()):
        logits = routed_logits(model, text, [whole] * len(text), MASKED)
        assert said[row].tolist() == logits.argmax(dim=-1).tolist()
        for last in (0, 3, 11, 23):
            for step in range(min(length, last + 1)):
                paths = [whole] * (last - step) + [path] * (step + 1)
                one = routed_logits(model, text[: last + 1], paths, MASKED, bypass, adapter)[-1]
                assert int(chains[step, row, last]) == allowed[int(one[allowed].argmax())]

"""Tests of the reference implementation against Hugging Face's own layers, and against itself."""

from pathlib import Path

import pytest
import torch
from torch import nn

from tests.harness.tiny_models import NUM_LAYERS, load_model, random_artifact, random_prompts, save_tiny_model
from tests.method.conftest import Tiny
from vllm_buddy.errors import SettingsError, UnsupportedError
from vllm_buddy.method import PathSchedule, RequestRoute, full_path, path_of
from vllm_buddy.method.bypass import Bypass
from vllm_buddy.method.kv_policy import KV_ONLY, KV_POLICIES, MASKED, ZERO
from vllm_buddy.method.reference import generate, routed_logits

# fp32 logits of magnitude 5 after 8 layers; products of other shapes sum in another order
LOGIT_TOLERANCE = 1e-4


@pytest.fixture
def bypass(tiny: Tiny, tmp_path: Path) -> Bypass:
    artifact = random_artifact(tmp_path, tiny.folder, bypass_rank=4)
    assert artifact.bypass is not None
    return artifact.bypass


def _random_paths(num: int, seed: int = 0) -> list[int]:
    """Return `num` random paths, one per position, that hold the first and the last layer."""
    generator = torch.Generator().manual_seed(seed)
    middle = torch.randint(0, 1 << NUM_LAYERS - 2, (num,), generator=generator).tolist()
    return [1 | m << 1 | 1 << NUM_LAYERS - 1 for m in middle]


def _explicitly_masked_logits(
    model: nn.Module, token_ids: list[int], paths: list[int], kv_policy: str, bypass: Bypass | None = None
) -> torch.Tensor:
    """Compute the KV policies in another way: all layers run on all rows, in Hugging Face's own code.

    masked: an additive attention mask hides skipped keys. kv_only: plain causal attention. zero: hooks set the key and
    value projections of skipped rows to zero. The output of a layer is discarded for rows that skip it.
    """
    backbone = model.model
    num_tokens = len(token_ids)
    hidden = backbone.embed_tokens(torch.tensor([token_ids]))
    position_ids = torch.arange(num_tokens)[None]
    embeddings = backbone.rotary_emb(hidden, position_ids)
    causal = torch.ones(num_tokens, num_tokens, dtype=torch.bool).tril()
    for index, layer in enumerate(backbone.layers):
        runs = torch.tensor([bool(path >> index & 1) for path in paths])
        visible = causal & (runs[None, :] | torch.eye(num_tokens, dtype=torch.bool)) if kv_policy == MASKED else causal
        mask = torch.zeros(1, 1, num_tokens, num_tokens).masked_fill(~visible, torch.finfo(torch.float32).min)
        hooks = []
        if kv_policy == ZERO:
            hooks = [
                projection.register_forward_hook(lambda _module, _args, out, runs=runs: out * runs[:, None])
                for projection in (layer.self_attn.k_proj, layer.self_attn.v_proj)
            ]
        out = layer(hidden, attention_mask=mask, position_ids=position_ids, position_embeddings=embeddings)
        for hook in hooks:
            hook.remove()
        instead = hidden if bypass is None or runs.all() else bypass.apply(index, hidden)
        hidden = torch.where(runs[None, :, None], out, instead)
    return model.lm_head(backbone.norm(hidden))[0]


def test_full_path_is_the_model_itself(tiny: Tiny) -> None:
    """Fails if the reference omits a norm or a bias, or has the wrong rotary order: comparisons with it are void."""
    for prompt in random_prompts(4, seed=1):
        with torch.no_grad():
            wanted = tiny.model(torch.tensor([prompt])).logits[0]
        for kv_policy in KV_POLICIES:
            found = routed_logits(tiny.model, prompt, [full_path(NUM_LAYERS)] * len(prompt), kv_policy)
            torch.testing.assert_close(found, wanted, atol=LOGIT_TOLERANCE, rtol=0)


@pytest.mark.parametrize("kv_policy", KV_POLICIES)
def test_policies_equal_explicit_masks(tiny: Tiny, kv_policy: str) -> None:
    """Fails if a skipped position is visible under `masked`, hidden under `kv_only`, or has no weight under `zero`."""
    for seed, prompt in enumerate(random_prompts(4, seed=2)):
        paths = _random_paths(len(prompt), seed)
        with torch.no_grad():
            wanted = _explicitly_masked_logits(tiny.model, prompt, paths, kv_policy)
        found = routed_logits(tiny.model, prompt, paths, kv_policy)
        torch.testing.assert_close(found, wanted, atol=LOGIT_TOLERANCE, rtol=0)


@pytest.mark.parametrize("kv_policy", KV_POLICIES)
def test_a_bypass_replaces_skipped_layers_and_nothing_else(tiny: Tiny, bypass: Bypass, kv_policy: str) -> None:
    """Fails if a row gets the bypass of another layer, or the cache holds K and V computed after a bypass."""
    for seed, prompt in enumerate(random_prompts(4, seed=2)):
        paths = _random_paths(len(prompt), seed)
        with torch.no_grad():
            wanted = _explicitly_masked_logits(tiny.model, prompt, paths, kv_policy, bypass)
        found = routed_logits(tiny.model, prompt, paths, kv_policy, bypass)
        torch.testing.assert_close(found, wanted, atol=LOGIT_TOLERANCE, rtol=0)
        assert not torch.allclose(found, routed_logits(tiny.model, prompt, paths, kv_policy), atol=LOGIT_TOLERANCE)


def test_a_bypass_leaves_the_full_path_as_it_is(tiny: Tiny, bypass: Bypass) -> None:
    """Fails if an artifact with a bypass changes a bit of the logits at budget 1.0."""
    prompt = random_prompts(1, seed=1)[0]
    full = [full_path(NUM_LAYERS)] * len(prompt)
    plain, beside = (routed_logits(tiny.model, prompt, full, MASKED, b) for b in (None, bypass))
    assert torch.equal(plain, beside)


def test_policies_differ(tiny: Tiny) -> None:
    """Fails if the three policies compute the same values, which makes the tests above meaningless."""
    prompt = random_prompts(1, seed=6, min_tokens=30, max_tokens=30)[0]
    paths = _random_paths(30)
    masked, kv_only, zero = (routed_logits(tiny.model, prompt, paths, policy) for policy in (MASKED, KV_ONLY, ZERO))
    for a, b in ((masked, kv_only), (masked, zero), (kv_only, zero)):
        assert (a - b).abs().max() > 1000 * LOGIT_TOLERANCE


def test_one_path_for_all_equals_the_pruned_model(tiny: Tiny) -> None:
    """Fails if only the attention or only the MLP of a skipped layer is skipped."""
    layers = [0, 2, 3, 6, 7]
    pruned = load_model(tiny.folder)
    pruned.model.layers = nn.ModuleList(pruned.model.layers[i] for i in layers)
    prompt = random_prompts(1, seed=7)[0]
    with torch.no_grad():
        wanted = pruned(torch.tensor([prompt]), use_cache=False).logits[0]
    found = routed_logits(tiny.model, prompt, [path_of(layers)] * len(prompt), MASKED)
    torch.testing.assert_close(found, wanted, atol=LOGIT_TOLERANCE, rtol=0)


@pytest.mark.parametrize("interval", [0, 1, 4, 16])
@pytest.mark.parametrize("kv_policy", KV_POLICIES)
def test_generation_equals_computing_from_scratch(tiny: Tiny, kv_policy: str, interval: int) -> None:
    """Fails if generation with a cache gives other logits than computing every position from scratch."""
    router = tiny.artifact.router()
    for prompt in random_prompts(2, seed=8):
        for depth in (4, 6, NUM_LAYERS):
            sequence = generate(
                tiny.model, RequestRoute(router, PathSchedule(interval), depth, prompt), prompt, 20, kv_policy
            )
            assert len(sequence.token_ids) == len(sequence.logprobs) == 20
            token_ids = prompt + sequence.token_ids
            assert len(sequence.paths) == len(token_ids) - 1
            logits = routed_logits(tiny.model, token_ids[:-1], sequence.paths, kv_policy)[len(prompt) - 1 :]
            assert logits.argmax(dim=-1).tolist() == sequence.token_ids
            logprobs = logits.log_softmax(dim=-1)[range(20), sequence.token_ids]
            torch.testing.assert_close(logprobs, torch.tensor(sequence.logprobs), atol=LOGIT_TOLERANCE, rtol=0)


def test_generated_paths_are_the_schedulers(tiny: Tiny) -> None:
    """Fails if `generate` does not take its paths from RequestRoute, or the paths never change in this test."""
    router, schedule = tiny.artifact.router(), PathSchedule(interval=1)
    distinct = set()
    for prompt in random_prompts(4, seed=9):
        sequence = generate(tiny.model, RequestRoute(router, schedule, 4, prompt), prompt, 24, MASKED)
        token_ids = prompt + sequence.token_ids[:-1]
        runs = RequestRoute(router, schedule, 4, prompt).runs(0, len(token_ids), token_ids)
        assert sequence.paths == [run.path for run in runs for _ in range(run.num_tokens)]
        assert {path.bit_count() for path in sequence.paths} == {4}
        distinct.add(len(set(sequence.paths)))
    assert max(distinct) > 2


def test_full_depth_generation_is_greedy_decoding_of_the_model(tiny: Tiny) -> None:
    """Fails if `generate` at full depth differs from greedy decoding of the unrouted model."""
    prompt = random_prompts(1, seed=10)[0]
    token_ids = list(prompt)
    with torch.no_grad():
        for _ in range(16):
            token_ids.append(int(tiny.model(torch.tensor([token_ids])).logits[0, -1].argmax()))
    sequence = generate(
        tiny.model, RequestRoute(tiny.artifact.router(), PathSchedule(1), NUM_LAYERS, prompt), prompt, 16, MASKED
    )
    assert prompt + sequence.token_ids == token_ids


def test_bad_calls_are_refused(tiny: Tiny) -> None:
    """Fails if a path without an end layer, or too few paths, are accepted and give logits of another model."""
    with pytest.raises(ValueError, match="2 tokens but 1 paths"):
        routed_logits(tiny.model, [1, 2], [full_path(NUM_LAYERS)], MASKED)
    for path in (path_of(range(NUM_LAYERS - 1)), path_of(range(1, NUM_LAYERS)), full_path(NUM_LAYERS + 1)):
        with pytest.raises(ValueError, match="must hold layers 0 and"):
            routed_logits(tiny.model, [1], [path], MASKED)
    with pytest.raises(SettingsError, match="unknown KV policy 'zeros'; known are masked, kv_only, zero"):
        routed_logits(tiny.model, [1], [full_path(NUM_LAYERS)], "zeros")


def test_other_architectures_are_refused(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Fails if a sliding-window or mixture-of-experts model runs as if it were dense with full attention."""
    model = load_model(save_tiny_model(tmp_path_factory.mktemp("other"), "qwen2"))
    model.config.layer_types = ["full_attention"] * 6 + ["sliding_attention"] * 2
    with pytest.raises(UnsupportedError, match="layers with sliding_attention are not supported"):
        routed_logits(model, [1], [full_path(NUM_LAYERS)], MASKED)
    model.config.model_type = "mixtral"
    with pytest.raises(UnsupportedError, match="'mixtral' is not supported; known are llama, mistral, qwen2, qwen3"):
        routed_logits(model, [1], [full_path(NUM_LAYERS)], MASKED)

"""Draws damage of an artifact's files, and checks that it is refused in one line or loads as something that works."""

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vllm_buddy.artifact import CONFIG_FILE, WEIGHTS_FILE, Artifact, BaseModelIdentity, load_artifact
from vllm_buddy.artifact.config import (
    FORMAT_VERSION,
    BuddyConfig,
    DraftConfig,
    LoraConfig,
    PredictorConfig,
    PricePoint,
    PriorConfig,
    TokenConfig,
)
from vllm_buddy.errors import ArtifactError, BuddyError
from vllm_buddy.method import (
    DraftExit,
    ExitAdapter,
    FoldedDecision,
    FoldedPredictor,
    LayerPath,
    TokenRouter,
    path_of,
)
from vllm_buddy.method.budget import MIN_DEPTH
from vllm_buddy.method.bypass import Bypass
from vllm_buddy.method.byte_grid import on_byte_grid
from vllm_buddy.method.lora import LoraDeltas
from vllm_buddy.method.path import gap_starts
from vllm_buddy.serving.admission.limits import RequestLimits
from vllm_buddy.serving.start.settings import BuddySettings

_LAYERS, _HIDDEN, _VOCAB, _RANK = 8, 16, 64, 4
_MOST_CHARACTERS = 1500
_STRINGS = ("", "../../etc/passwd", "/etc/passwd", "a\nb", "\x1b[2J", "x" * 10**5, "\x00", "‮gpj.exe", "NaN", "4")
_NUMBERS = (0, 1, -1, 2, 2**31, 2**63, 10**9, 10**15, 10**400, 1e308, -1e308, 0.5, float("nan"), float("inf"), -0.0)
_HOSTILE: tuple[Any, ...] = (None, True, [], {}, [[]], {"a": 1}, [0], [7, 0], [10**12], *_STRINGS, *_NUMBERS)
_DTYPES = ("F64", "F32", "F16", "BF16", "F8_E4M3", "I64", "I32", "I8", "U8", "BOOL", "C64", "Q4", "")
_NAMES = ("../prior", "/etc/passwd", "lora.../../x.a", "a\nb", "__class__", "x" * 5000, "prior.", "lora..a")


def write_sample(folder: Path) -> None:
    """Write an artifact with all parts, small enough to be read in a millisecond."""
    rng = np.random.default_rng(0)
    middle = _LAYERS - 2

    def decision(outputs: int) -> FoldedDecision:
        tables = [on_byte_grid(rng.standard_normal((_VOCAB, 5)).astype(np.float32)) for _ in range(2)]
        rest = [rng.standard_normal(shape).astype(np.float32) for shape in ((5,), (outputs, 5), (outputs,))]
        return FoldedDecision(*tables, *rest)

    depths, paths = (4, 6, 8), ([0, 1, 2, 7], [0, 1, 2, 3, 4, 7], list(range(_LAYERS)))
    down, up = torch.randn(2, middle, _RANK, _HIDDEN, generator=torch.Generator().manual_seed(0))
    names = [f"model.layers.{i}.mlp.down_proj" for i in (1, 2)]
    lora = {name: torch.ones(2, _HIDDEN) for name in names}
    token = TokenConfig(
        paths=tuple(map(tuple, paths)),
        prices=(PricePoint(price=2, budget=0.5), PricePoint(price=0, budget=1)),
        decay=0.5,
    )
    config = BuddyConfig(
        format_version=FORMAT_VERSION,
        name="sample",
        base_model=BaseModelIdentity(
            id="tiny",
            architecture="LlamaForCausalLM",
            num_layers=_LAYERS,
            hidden_size=_HIDDEN,
            vocab_size=_VOCAB,
            fingerprint="0123456789abcdef",
        ),
        prior=PriorConfig(indicator="taylor", calibration="random", num_tokens=1),
        has_decision_module=True,
        library={depth: [sorted({0, 7, *range(1, depth - 1)})] for depth in range(MIN_DEPTH, _LAYERS)},
        route_every=16,
        budgets=(0.5, 1.0),
        bypass_rank=_RANK,
        bypass_eps=1e-5,
        lora=LoraConfig(rank=2, alpha=2.0),
        token=token,
        predictor=PredictorConfig(depths=depths, price=0.5),
        drafts=DraftConfig(exits=tuple(map(tuple, paths[:2])), rank=_RANK, eps=1e-5, gaps=True, vocabulary=5),
    )
    prices = tuple((point.budget, point.price) for point in token.prices)
    router = TokenRouter(FoldedPredictor(decision(2), depths, _LAYERS), tuple(map(path_of, paths)), prices, 0.5)
    Artifact(
        config,
        rng.standard_normal(middle).astype(np.float32),
        decision(middle),
        Bypass(down, up.mT.contiguous(), 1e-5).rounded(),
        LoraDeltas(lora, {name: tensor.T for name, tensor in lora.items()}, alpha=2.0),
        FoldedPredictor(decision(2), depths, _LAYERS),
        router,
        tuple(exit_of(path_of(layers), down[i:]) for i, layers in enumerate(paths[:2])),
        np.arange(5),
    ).save(folder)


def exit_of(path: LayerPath, weights: torch.Tensor) -> DraftExit:
    """An exit with bypasses of its gaps. weights: [at least 1 + its gaps, rank, hidden_size]."""
    firsts = gap_starts(path)
    of_gaps = weights[1 : 1 + len(firsts)]
    adapter = ExitAdapter(weights[0], weights[0].T.contiguous(), 1e-5).rounded()
    return DraftExit(path, adapter, Bypass(of_gaps, of_gaps.mT.contiguous(), 1e-5, firsts).rounded())


def fuzz(num_cases: int, folder: Path) -> int:
    """Check `num_cases` damaged copies of an artifact in `folder`, which is new; returns how many were refused."""
    sample, damaged = folder / "sample", folder / "damaged"
    write_sample(sample)
    assert check(sample)
    refused = 0
    for number in range(num_cases):
        rng = random.Random(number)
        shutil.rmtree(damaged, ignore_errors=True)
        shutil.copytree(sample, damaged)
        damage = rng.choices(*zip(*_DAMAGES))[0]
        try:
            damage(rng, damaged)
            refused += not check(damaged)
        except Exception as error:
            raise AssertionError(f"case {number}, {damage.__name__}: {type(error).__name__}: {error}") from error
    shutil.rmtree(damaged, ignore_errors=True)
    return refused


def check(folder: Path) -> bool:
    """Whether an artifact loads. If it does, it must route and be served like any other.

    Raises:
        AssertionError: it loads and does not work, or its refusal is no single line. Any other error: what a user would
            see as a traceback.
    """
    try:
        artifact = load_artifact(folder)
    except ArtifactError as error:
        text = str(error)
        assert "\n" not in text, text
        assert len(text) <= _MOST_CHARACTERS, len(text)
        assert text.isprintable(), ascii(text)
        return False
    try:
        limits = RequestLimits.from_settings(BuddySettings(), artifact)
    except BuddyError:
        return False
    assert len(artifact.digest) == 16
    tokens = range(min(4, artifact.config.base_model.vocab_size))
    for library in (None, False):
        router = artifact.router(library=library)
        context = router.new_context()
        if context is not None:
            context.extend(tokens)
        depths = router.depths or range(MIN_DEPTH, limits.num_layers + 1)
        for depth in depths:
            path = router.path(context, depth)
            assert path.bit_count() == depth, (depth, path)
    if artifact.predictor is not None:
        assert np.isfinite(artifact.predictor.excess(tokens)).all()
    if artifact.token is not None:
        assert np.isfinite(artifact.token.excess(artifact.token.recent_mean(), tokens)).all()
        assert np.isfinite(artifact.token.price(0.7))
    state = torch.ones(artifact.config.base_model.hidden_size)
    for draft in artifact.drafts:
        assert MIN_DEPTH <= draft.path.bit_count() < limits.num_layers
        assert draft.adapter.apply(state).shape == state.shape
    if (drafted := artifact.draft_vocabulary) is not None:
        assert 0 <= drafted.min() <= drafted.max() < artifact.config.base_model.vocab_size
    return True


# --- damages ---------------------------------------------------------------------------------------------------


def _field(rng: random.Random, folder: Path) -> None:
    """Another value, or none, for one field of the configuration."""
    config = json.loads((folder / CONFIG_FILE).read_text())
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        owner, key = rng.choice(_places(config))
        if rng.random() < 0.1:
            del owner[key]
        elif isinstance(owner, dict) and rng.random() < 0.1:
            owner[rng.choice(_STRINGS)] = owner.pop(key)
        else:
            value = json.dumps(rng.choice(_HOSTILE))
            owner[key] = json.loads(value)  # of its own: the next change may be in it
    (folder / CONFIG_FILE).write_text(json.dumps(config))


def _text(rng: random.Random, folder: Path) -> None:
    """A configuration that is cut, scrambled or not text."""
    path = folder / CONFIG_FILE
    data = bytearray(path.read_bytes())
    kind = rng.randrange(5)
    if kind == 0:
        data = data[: rng.randrange(len(data))]
    elif kind == 1:
        for _ in range(rng.randrange(1, 10)):
            data[rng.randrange(len(data))] = rng.randrange(256)
    elif kind == 2:
        data = bytearray((b"[", b'{"a":')[rng.randrange(2)] * rng.choice((10, 10**5)))
    elif kind == 3:
        data = bytearray(b'{"format_version": ' + b"9" * rng.choice((5, 5000)) + b"}")
    else:
        data = bytearray(rng.randbytes(rng.randrange(200)))
    path.write_bytes(data)


def _header(rng: random.Random, folder: Path) -> None:
    """Another name, type, shape or place for a tensor, in a file whose header can be read."""
    header, body = _safetensors(folder)
    for _ in range(rng.choice((1, 1, 2))):
        name = rng.choice(list(header))
        tensor = header[name]
        kind = rng.randrange(6)
        if kind == 0:
            header[rng.choice((*_NAMES, *header))] = header.pop(name)
        elif kind == 1:
            tensor["dtype"] = rng.choice(_DTYPES)
        elif kind == 2:
            shape = [*tensor["shape"]]
            place = rng.randrange(len(shape)) if shape else 0
            longer = 2 * shape[place] if shape else 1
            shape[place : place + 1] = [rng.choice((0, 1, -1, 2**31, 2**62, 2**64, longer))]
            tensor["shape"] = rng.choice((shape, shape[::-1], [], [1, *shape], None))
        elif kind == 3:
            start, end = tensor["data_offsets"]
            tensor["data_offsets"] = rng.choice(([end, start], [start, end + 2**40], [0, 0], [-1, end], [start], "x"))
        elif kind == 4:
            del header[name]
        else:
            header[rng.choice(_NAMES)] = dict(tensor)
        if not header:
            break
    _write_safetensors(folder, header, body)


def _gigantic(rng: random.Random, folder: Path) -> None:
    """A sparse file that holds, by its header, a tensor of gigabytes to petabytes."""
    config = json.loads((folder / CONFIG_FILE).read_text())
    dtype, width = rng.choice((("F32", 4), ("I8", 1), ("F16", 2)))
    parts = ("decision.table_context", "bypass.down", "prior", "lora.model.layers.1.mlp.down_proj.a", "drafts.up", "x")
    name = rng.choice(parts)
    if rng.random() < 0.5:
        config["base_model"]["vocab_size"] = rng.choice((10**6, 10**7, 10**9, 10**12))
    if rng.random() < 0.3:
        config["bypass_rank"] = rng.choice((10**5, 10**9))
    (folder / CONFIG_FILE).write_text(json.dumps(config))
    vocabulary = int(config["base_model"]["vocab_size"])
    shape = rng.choice(([vocabulary, 10**5], [2**20, 2**12], [2**40], [6, 10**5, 16]))
    size = width
    for length in shape:
        size *= length
    text = json.dumps({name: {"dtype": dtype, "shape": shape, "data_offsets": [0, size]}}).encode()
    with (folder / WEIGHTS_FILE).open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        try:
            file.truncate(8 + len(text) + size)
        except OSError:  # more than the file system allows
            file.truncate(8 + len(text) + 2**34)


def _bytes(rng: random.Random, folder: Path) -> None:
    """A file of weights that is cut, scrambled or something else."""
    path = folder / WEIGHTS_FILE
    data = bytearray(path.read_bytes())
    kind = rng.randrange(4)
    if kind == 0:
        data = data[: rng.randrange(len(data))]
    elif kind == 1:
        for _ in range(rng.randrange(1, 20)):
            data[rng.randrange(len(data))] = rng.randrange(256)
    elif kind == 2:
        data[:8] = rng.choice((0, 2, 2**20, 2**40, 2**64 - 1)).to_bytes(8, "little")
    else:
        data = bytearray(rng.randbytes(rng.randrange(200)))
    path.write_bytes(data)


def _values(rng: random.Random, folder: Path) -> None:
    """Values that are not finite, or so large that they do not stay so."""
    header, body = _safetensors(folder)
    name = rng.choice([n for n in header if header[n]["dtype"] in ("F32", "F16")])
    kind = np.float32 if header[name]["dtype"] == "F32" else np.float16
    start, end = header[name]["data_offsets"]
    array = np.frombuffer(body[start:end], kind).copy()
    value = rng.choice((np.nan, np.inf, -np.inf, np.finfo(kind).max, -np.finfo(kind).max, 0, -0.0, 1e-30))
    array[rng.randrange(len(array)) :: rng.choice((1, 10**9))] = value
    body[start:end] = array.tobytes()
    _write_safetensors(folder, header, body)


def _files(rng: random.Random, folder: Path) -> None:
    """Something else than a file in place of one."""
    path = folder / rng.choice((CONFIG_FILE, WEIGHTS_FILE))
    kind = rng.randrange(9)
    moved = folder / "elsewhere"
    path.rename(moved)
    if kind == 0:
        path.symlink_to(moved)  # as in the cache of the hub: this loads
    elif kind == 1:
        path.symlink_to(path.name)
    elif kind == 2:
        path.symlink_to(rng.choice(("/dev/zero", "/dev/stdin", "/etc/passwd", "/proc/self/mem", "/proc/kcore", "/")))
    elif kind == 3:
        os.mkfifo(path)
    elif kind == 4:
        path.mkdir()
    elif kind == 5:
        path.touch()
    elif kind == 6:
        path.symlink_to("nowhere")
    elif kind == 7:
        path.write_bytes(moved.read_bytes())
        path.chmod(0)
    else:
        with path.open("wb") as file:
            file.truncate(2**36)


_DAMAGES: list[tuple[Callable[[random.Random, Path], None], int]] = [
    (_field, 10),
    (_text, 3),
    (_header, 6),
    (_gigantic, 2),
    (_bytes, 3),
    (_values, 3),
    (_files, 3),
]


def _places(value: Any) -> list[tuple[Any, Any]]:
    """All (container, key) pairs within a JSON value."""
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    return [(value, key) for key in keys] + [place for key in keys for place in _places(value[key])]


def _safetensors(folder: Path) -> tuple[dict[str, Any], bytearray]:
    data = (folder / WEIGHTS_FILE).read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header.pop("__metadata__", None)
    return header, bytearray(data[8 + length :])


def _write_safetensors(folder: Path, header: dict[str, Any], body: bytearray) -> None:
    text = json.dumps(header).encode()
    (folder / WEIGHTS_FILE).write_bytes(len(text).to_bytes(8, "little") + text + body)

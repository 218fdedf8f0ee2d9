"""Writes a pruned checkpoint: a Hugging Face model without some of its layers, which stock vLLM can serve."""

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from vllm_buddy.errors import BaselineError
from vllm_buddy.models.embedded import SOURCE_FILE

CONFIG_FILE = "config.json"
INDEX_FILE = "model.safetensors.index.json"

_LAYER = re.compile(r"^model\.layers\.(\d+)\.")
# Not copied: weights of any format, files that are written anew, and the file that certifies the unpruned model.
_WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx"}
_REPLACED = {CONFIG_FILE, INDEX_FILE, SOURCE_FILE}


@dataclass(frozen=True)
class Shard:
    """A file of weights. renamed: the new name of each tensor that is kept, by old name."""

    path: Path
    renamed: dict[str, str]


def save_pruned_checkpoint(model_dir: Path, layers: Sequence[int], out: Path) -> Path:
    """Write the Hugging Face model in `model_dir` to `out` with only `layers`, renumbered; returns `out`.

    The checkpoint shows the speed limit of routing at the same depth: stock vLLM runs these layers and knows no others.
    Only one shard of the weights is in memory at a time. Each shard with a kept tensor becomes one shard of `out`.

    Raises:
        BaselineError: the model has no layer of that index, is quantised or is incomplete. Nothing is written then.
    """
    config = _read_json(model_dir / CONFIG_FILE)
    kept = sorted(set(layers))
    if not kept or kept[0] < 0 or kept[-1] >= config["num_hidden_layers"]:
        raise BaselineError(f"layers {list(layers)} are not layers of a model with {config['num_hidden_layers']}")
    if config.get("quantization_config"):
        # A quantisation configuration may name layers by their old numbers.
        raise BaselineError(f"{model_dir} is quantised; prune the model it was made from and quantise what is left")
    shards = _kept_shards(model_dir, {old: new for new, old in enumerate(kept)})
    out.mkdir(parents=True, exist_ok=True)
    for path in model_dir.iterdir():
        if path.is_file() and path.suffix not in _WEIGHTS and path.name not in _REPLACED:
            shutil.copy(path, out / path.name)
    (out / CONFIG_FILE).write_text(json.dumps(pruned_config(config, kept), indent=2))
    _write_shards(shards, out)
    return out


def pruned_config(config: Mapping[str, Any], kept: Sequence[int]) -> dict[str, Any]:
    """Return config.json for the layers `kept` (ascending), with the per-layer entries of these layers."""
    pruned = {**config, "num_hidden_layers": len(kept)}
    if config.get("layer_types"):
        pruned["layer_types"] = [config["layer_types"][layer] for layer in kept]
    if config.get("max_window_layers") is not None:  # this many layers, counted from the first, have no sliding window
        pruned["max_window_layers"] = sum(layer < config["max_window_layers"] for layer in kept)
    return pruned


def _kept_shards(model_dir: Path, new_index: Mapping[int, int]) -> list[Shard]:
    """Return the files of weights that hold a kept tensor, sorted by name."""
    shards = []
    for path in _weight_files(model_dir):
        renamed = {}
        try:
            with safe_open(path, framework="pt") as f:
                names = list(f.keys())
        except (SafetensorError, OSError) as error:
            raise BaselineError(f"{path} is not a complete safetensors file ({error}); get the model again") from None
        for name in names:
            layer = _LAYER.match(name)
            if layer is None:
                renamed[name] = name
            elif int(layer[1]) in new_index:
                renamed[name] = f"model.layers.{new_index[int(layer[1])]}.{name[layer.end() :]}"
        if renamed:
            shards.append(Shard(path, renamed))
    if not shards:
        raise BaselineError(f"{model_dir} holds no safetensors; a checkpoint in another format has to be converted")
    return shards


def _weight_files(model_dir: Path) -> list[Path]:
    """Return the files that the index names, if there is one: others may hold the same tensors a second time."""
    index = model_dir / INDEX_FILE
    if index.is_file():
        return [model_dir / name for name in sorted(set(_read_json(index)["weight_map"].values()))]
    return sorted(model_dir.glob("*.safetensors"))


def _write_shards(shards: Sequence[Shard], out: Path) -> None:
    weight_map: dict[str, str] = {}
    total_size = 0
    for number, shard in enumerate(shards, start=1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        with safe_open(shard.path, framework="pt") as f:
            tensors = {new: f.get_tensor(old) for old, new in shard.renamed.items()}
        save_file(tensors, out / file, metadata={"format": "pt"})
        shutil.copymode(shard.path, out / file)  # safetensors makes a file that only its owner can read
        weight_map |= dict.fromkeys(tensors, file)
        total_size += sum(tensor.nbytes for tensor in tensors.values())
    if len(shards) > 1:
        index = {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(weight_map.items()))}
        (out / INDEX_FILE).write_text(json.dumps(index, indent=2))


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise BaselineError(f"{path} cannot be read ({error}), so its folder holds no Hugging Face model") from None

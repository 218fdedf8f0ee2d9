"""A physically pruned checkpoint: the model with some of its layers removed, for stock vLLM."""

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path as FilePath

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from vllm_buddy.errors import BuddyError

_LAYER = re.compile(r"^model\.layers\.(\d+)\.")


def save_pruned_checkpoint(model_dir: FilePath, layers: Sequence[int], out: FilePath) -> FilePath:
    """Write the Hugging Face model in `model_dir` with `layers` only, renumbered, to `out`; returns `out`.

    The speed limit for routing at the same depth: stock vLLM runs these layers and knows of no others.

    Raises:
        BuddyError: a layer index that the model does not have.
    """
    config = json.loads((model_dir / "config.json").read_text())
    kept = sorted(set(layers))
    if not kept or kept[0] < 0 or kept[-1] >= config["num_hidden_layers"]:
        raise BuddyError(f"layers {list(layers)} are not layers of a model with {config['num_hidden_layers']}")
    new_index = {old: new for new, old in enumerate(kept)}
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(model_dir.glob("*.safetensors")):
        with safe_open(path, framework="pt") as f:
            for name in f.keys():
                layer = _LAYER.match(name)
                if layer is None:
                    tensors[name] = f.get_tensor(name)
                elif int(layer[1]) in new_index:
                    new = f"model.layers.{new_index[int(layer[1])]}.{name[layer.end() :]}"
                    tensors[new] = f.get_tensor(name)
    config["num_hidden_layers"] = len(kept)
    if config.get("layer_types"):
        config["layer_types"] = [config["layer_types"][layer] for layer in kept]
    out.mkdir(parents=True, exist_ok=True)
    for path in model_dir.iterdir():
        if path.is_file() and path.suffix != ".safetensors" and not path.name.endswith(".index.json"):
            shutil.copy(path, out / path.name)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    (out / "config.json").write_text(json.dumps(config, indent=2))
    return out

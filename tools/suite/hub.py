"""A Hugging Face cache in which every model that the tests name is the embedded SmolLM2, for machines without a hub.

A name leads to a folder of links to the files of SmolLM2-135M-Instruct, a name of an adapter to a LoRA adapter for it
with random weights. So tests whose outcome does not depend on weights run as they are.
"""

import json
import re
from collections.abc import Iterable
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import save_file

from vllm_buddy.models.embedded import fetch

_REVISION = "0" * 40
_ID = re.compile(r"""["']([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)["']""")
_RANK = 8
_ADAPTED = ("q_proj", "v_proj")
_ADAPTER = {"peft_type": "LORA", "r": _RANK, "lora_alpha": 2 * _RANK, "target_modules": _ADAPTED, "bias": "none"}


def make(home: Path, sources: Iterable[Path], adapters: Iterable[str]) -> None:
    """Make the cache in `home` (a value for HF_HOME).

    sources: Python files; each string of the form "owner/name" in them counts as the name of a model.
    adapters: names that are adapters instead.
    """
    model = fetch()
    own = set(adapters)
    names = {name for source in sources for name in _ID.findall(source.read_text())}
    for name in sorted(names | own):
        snapshot = home / "hub" / f"models--{name.replace('/', '--')}" / "snapshots" / _REVISION
        if snapshot.is_dir():
            continue
        partial = snapshot.with_name("partial")
        partial.mkdir(parents=True, exist_ok=True)
        if name in own:
            _write_adapter(partial, model)
        else:
            for file in model.iterdir():
                (partial / file.name).unlink(missing_ok=True)
                (partial / file.name).symlink_to(file)
        refs = snapshot.parent.parent / "refs"
        refs.mkdir(exist_ok=True)
        (refs / "main").write_text(_REVISION)
        partial.rename(snapshot)


def make_assets(folder: Path) -> None:
    """Put a blank picture where vLLM's tests look for one that they download when they are imported."""
    picture = folder / "vllm_public_assets" / "stop_sign.jpg"
    picture.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (32, 32)).save(picture)


def _write_adapter(folder: Path, model: Path) -> None:
    """A LoRA adapter of random weights, for the query and value projections of all layers."""
    config = json.loads((model / "config.json").read_text())
    hidden = config["hidden_size"]
    head = config.get("head_dim") or hidden // config["num_attention_heads"]
    heads = (config["num_attention_heads"], config["num_key_value_heads"])
    widths = {name: number * head for name, number in zip(_ADAPTED, heads, strict=True)}
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for layer in range(config["num_hidden_layers"]):
        for name, width in widths.items():
            stem = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            tensors[f"{stem}.lora_A.weight"] = torch.randn(_RANK, hidden, generator=generator) / hidden**0.5
            tensors[f"{stem}.lora_B.weight"] = torch.randn(width, _RANK, generator=generator) * 0.01
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(_ADAPTER))

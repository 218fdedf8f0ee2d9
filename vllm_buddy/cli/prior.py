"""`vllm-buddy prior`: measure layer importance and write an artifact."""

import argparse
import sys

from vllm_buddy.artifact import CONFIG_FILE
from vllm_buddy.errors import CalibrationError
from vllm_buddy.importance.settings import PriorSettings

_POSITIONAL = ("model_dir", "out")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One option for each field of PriorSettings."""
    for name, field in PriorSettings.model_fields.items():
        help_text = field.description or ""
        if field.default not in (None, False) and not field.is_required():
            help_text += f" (default: {field.default})"
        if name in _POSITIONAL:
            parser.add_argument(name, metavar=name.upper(), help=help_text)
        elif field.annotation is bool:
            parser.add_argument(f"--{name}", action="store_true", help=help_text)
        else:
            value_type = int if field.annotation is int else str
            metavar = "N" if value_type is int else name.upper().replace("_", "-")
            parser.add_argument(
                f"--{name.replace('_', '-')}",
                type=value_type,
                required=field.is_required(),
                default=None if field.is_required() else field.default,
                metavar=metavar,
                help=help_text,
            )


def run(args: argparse.Namespace) -> int:
    """Write the artifact; returns 0.

    Raises:
        BuddyError: a setting, the model or the text cannot be used, or OUT holds something already.
    """
    settings = _settings(args)
    out = settings.out
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CalibrationError(f"{out} is not an empty folder; name a new one, so that no artifact is lost")
    from vllm_buddy.importance.build import build_prior
    from vllm_buddy.importance.record import CARD_FILE, RUN_FILE, model_card, run_record, source_commit

    commit = source_commit()
    result = build_prior(settings, _print_progress)
    result.artifact.save(out)
    (out / CARD_FILE).write_text(model_card(result, settings))
    (out / RUN_FILE).write_text(run_record(result, settings, commit))
    for name, row in result.perplexity.items():
        figures = ", ".join(f"{value:,.1f} at {budget:g}" for budget, value in row.items())
        print(f"perplexity by budget, {name}: {figures}")
    print(f"wrote {out / CONFIG_FILE} and the rest of artifact '{result.artifact.config.name}'")
    return 0


def _settings(args: argparse.Namespace) -> PriorSettings:
    from pydantic import ValidationError

    try:
        return PriorSettings(**{name: getattr(args, name) for name in PriorSettings.model_fields})
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise CalibrationError(f"not a valid setting: {problems}") from None


def _print_progress(what: str, done: int, total: int) -> None:
    end = "\n" if done == total else "\r"
    if sys.stderr.isatty() or done == total:
        print(f"{what}: window {done} of {total}", end=end, file=sys.stderr, flush=True)

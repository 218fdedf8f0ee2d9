"""Stores measured pruning orders on disk, one file per base model.

The folder `orders/` holds the orders that are installed with the package.
"""

import errno
import json
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from vllm_buddy.artifact.fingerprint import BaseModelIdentity
from vllm_buddy.baselines.base import MEASURED, POSITIONAL, check_static_method
from vllm_buddy.baselines.static_settings import MeasuringSettings
from vllm_buddy.errors import BaselineError
from vllm_buddy.importance import CalibrationText
from vllm_buddy.models.folder import load_model, load_tokenizer
from vllm_buddy.models.torch_device import find_device, torch_dtype

SHIPPED_DIR = Path(__file__).parent / "orders"
NAME_THE_FILE = "name FILE as `orders`"
_USUAL = MeasuringSettings()

Report = Callable[[str, int, int], None]


class LayerOrder(BaseModel):
    """The order in which one method removes the middle layers."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: str = Field(description="one of vllm_buddy.baselines.MEASURED")
    calibration: str = Field(description="name of the calibration text")
    calibration_sha256: str = Field(description="SHA-256 of the text's bytes")
    num_tokens: int = Field(description="number of calibration tokens, from the start of the text")
    window: int = Field(description="tokens per window")
    candidates: int | None = Field(default=None, description="layers that each round of a search tried; null: all")
    layers: list[int] = Field(description="middle layers in order of removal")


class OrderFile(BaseModel):
    """All measured orders of one base model."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    base_model: BaseModelIdentity
    orders: list[LayerOrder] = []

    @model_validator(mode="after")
    def _orders_are_complete(self) -> Self:
        middle = list(range(1, self.base_model.num_layers - 1))
        for order in self.orders:
            if sorted(order.layers) != middle:
                raise ValueError(f"the order of '{order.method}' does not hold each of layers 1 to {middle[-1]} once")
        return self

    @classmethod
    def load(cls, path: Path) -> "OrderFile":
        """Read a file of orders.

        Raises:
            BaselineError: the file cannot be read or does not fit the schema.
        """
        try:
            return cls.model_validate_json(path.read_bytes())
        except OSError as error:
            raise BaselineError(f"cannot read the layer orders {path}: {error.strerror or error}") from None
        except ValidationError as error:
            raise BaselineError(f"{path} is not a file of layer orders: {error}") from None

    def with_order(self, order: LayerOrder) -> "OrderFile":
        """Return a copy in which `order` replaces the order of the same method, if there is one."""
        others = [other for other in self.orders if other.method != order.method]
        return OrderFile(base_model=self.base_model, orders=[*others, order])

    def save(self, path: Path) -> None:
        """Write the file with one order per line, as a whole or not at all.

        Raises:
            BaselineError: it cannot be written; a file that is there stays as it is.
        """
        body = ",\n    ".join(json.dumps(order.model_dump()) for order in self.orders)
        base = json.dumps(self.base_model.model_dump())
        _write(path, f'{{\n  "base_model": {base},\n  "orders": [\n    {body}\n  ]\n}}\n')


def check_writable(path: Path) -> None:
    """Raise a BaselineError if no file can be written in the place of `path`, before a measurement of hours."""
    _write(path, None)


def _write(path: Path, text: str | None) -> None:
    """Put `text` into the place of `path`; None: see whether that can be done."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(text or "")
        if text is not None:
            os.replace(partial, path)
    except OSError as error:
        raise BaselineError(f"cannot write the layer orders {path}: {error.strerror or error}") from None
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def shipped_orders() -> list[OrderFile]:
    """Load the files of orders that are installed with the package."""
    return [OrderFile.load(path) for path in sorted(SHIPPED_DIR.glob("*.json"))]


def layer_order(
    name: str,
    base: BaseModelIdentity,
    *,
    seed: int = 0,
    files: Sequence[OrderFile] | None = None,
    advice: str = NAME_THE_FILE,
) -> list[int]:
    """Return the order in which static method `name` removes the middle layers of `base`.

    seed: seed of the method `random`. files: where to look for a measured order; None: the shipped orders. advice: what
        to do with an order that had to be measured first.

    Raises:
        BaselineError: the method is unknown, or its order has not been measured for this model.
    """
    check_static_method(name)
    if name in POSITIONAL:
        return POSITIONAL[name](base.num_layers, seed)
    return find_order(name, base, files, advice).layers


def find_order(
    name: str, base: BaseModelIdentity, files: Sequence[OrderFile] | None = None, advice: str = NAME_THE_FILE
) -> LayerOrder:
    """Return the order of measured method `name` for `base` from `files`; None: from the shipped orders.

    advice: see layer_order.

    Raises:
        BaselineError: the order has not been measured for this model.
    """
    for file in shipped_orders() if files is None else files:
        for order in file.orders:
            if order.method == name and file.base_model.same_model(base):
                return order
    raise BaselineError(
        f"the layer order of '{name}' has not been measured for {base.summary()}; measure it with `vllm-buddy orders "
        f"FILE --methods {name} --model MODEL --text TEXT` and {advice}"
    )


def measure_order(
    name: str,
    model_dir: Path,
    text: CalibrationText,
    settings: MeasuringSettings = _USUAL,
    report: Report = lambda *_: None,
    note: Callable[[str], None] = lambda _: None,
) -> LayerOrder:
    """Measure the order of method `name` on the start of `text`.

    settings: how; their model is not looked at. report: called as report(name, done, total). note: called with lines of
    text about the work.

    Raises:
        BaselineError: the method is unknown, or its order is not measured but follows from positions.
        CalibrationError: the text is too short.
        ModelError, UnsupportedError: the model in `model_dir` or the device cannot be used.
    """
    check_static_method(name)
    if name not in MEASURED:
        raise BaselineError(f"the order of '{name}' is not measured; measured are {', '.join(MEASURED)}")
    method = MEASURED[name]
    windows, _ = text.windows(load_tokenizer(model_dir), settings.window, settings.tokens or method.tokens)
    candidates = settings.candidates if method.searches else None
    dtype = method.dtype if settings.dtype is None else torch_dtype(settings.dtype)
    model = load_model(model_dir, dtype, find_device(settings.device))
    search = {"candidates": candidates, "note": lambda line: note(f"{name}: {line}")} if method.searches else {}
    layers = method.order(model, windows, partial(report, name), **search)
    return LayerOrder(
        method=name,
        calibration=text.name,
        calibration_sha256=text.sha256,
        num_tokens=windows.numel(),
        window=settings.window,
        candidates=candidates,
        layers=layers,
    )

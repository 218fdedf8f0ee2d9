"""Reads a text file and cuts it into windows of tokens, for calibration and for evaluation on the following part."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vllm_buddy.errors import CalibrationError


@dataclass(frozen=True)
class CalibrationText:
    """The content of a text file. sha256: hash of its bytes, for run.yaml."""

    name: str
    text: str
    sha256: str

    @classmethod
    def read(cls, path: Path) -> "CalibrationText":
        """Read a UTF-8 text file.

        Raises:
            CalibrationError: the file is missing, unreadable, empty or not text.
        """
        try:
            data = path.read_bytes()
        except OSError as error:
            raise CalibrationError(f"cannot read the text file {path}: {error.strerror or error}") from None
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise CalibrationError(f"{path} is not UTF-8 text (byte {error.start}); give a plain text file") from None
        if "\0" in text:
            raise CalibrationError(f"{path} holds NUL bytes, so it is not text; give a plain text file")
        if not text.strip():
            raise CalibrationError(f"{path} is empty; give a text of some thousands of words")
        return cls(path.name, text, hashlib.sha256(data).hexdigest())

    def windows(
        self, tokenizer: Any, window: int, num_tokens: int, heldout_tokens: int = 0, skip: int = 0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Cut the first `num_tokens` tokens and the following `heldout_tokens` into whole windows.

        tokenizer: a Hugging Face tokenizer; no special tokens are added. skip: tokens before the first one.

        Returns:
            ([num_tokens // window, window], [heldout_tokens // window, window]), int64.

        Raises:
            CalibrationError: there is not one whole window, or the text is too short.
        """
        if window < 2:
            raise CalibrationError(f"a window is {window} tokens; at least 2 are needed to predict one from another")
        for name, asked in (("calibration", num_tokens), ("held-out", heldout_tokens)):
            if asked < window and not (asked == 0 and name == "held-out"):
                raise CalibrationError(f"{asked} {name} tokens are less than one window of {window}; ask for more")
        # verbose=False: the warning about too long inputs does not apply, because the tokens are cut into windows.
        ids = tokenizer(self.text, add_special_tokens=False, verbose=False)["input_ids"][skip:]
        wanted = num_tokens + heldout_tokens
        if len(ids) < wanted:
            after = f" after the first {skip}" if skip else ""
            raise CalibrationError(
                f"{self.name} holds {len(ids)} tokens{after}, but {num_tokens} for calibration and {heldout_tokens} "
                "held out were asked for; give a longer text or ask for fewer tokens"
            )
        return _cut(ids[:num_tokens], window), _cut(ids[num_tokens:wanted], window)


def _cut(ids: list[int], window: int) -> torch.Tensor:
    num_windows = len(ids) // window
    return torch.tensor(ids[: num_windows * window], dtype=torch.int64).reshape(num_windows, window)

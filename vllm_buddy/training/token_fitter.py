"""When the router of single tokens is fitted in a run of stage 1, and to which observations."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from vllm_buddy.errors import TrainingError
from vllm_buddy.method import LayerPath, full_path, path_of
from vllm_buddy.method.bypass import Bypass
from vllm_buddy.method.decision import value_table
from vllm_buddy.training.corpus import Corpus
from vllm_buddy.training.observations import Observations
from vllm_buddy.training.routing import TokenRouting
from vllm_buddy.training.stage1_settings import FEWEST_WINDOWS, Stage1Settings
from vllm_buddy.training.start import Note
from vllm_buddy.training.teacher import Teacher
from vllm_buddy.training.token_fit import TokenFit, fit_tokens, measure_tokens

MEASURED_FILE = "measured.npz"


class TokenFitter:
    """Fits the router of single tokens: to a measurement before training, to what training observes after that."""

    def __init__(
        self,
        settings: Stage1Settings,
        model: Any,
        corpus: Corpus,
        library: Mapping[int, list[list[int]]],
        observations: Observations,
        note: Note,
        origin: str,
    ) -> None:
        self._settings, self._model, self._note = settings, model, note
        self._corpus, self._observations, self._origin = corpus, observations, origin
        self._num_layers = model.config.num_hidden_layers
        self._values = value_table(model).cpu()
        self._paths = _nested_paths(settings, library, self._num_layers)

    def measured(self, bypass: Bypass | None, teacher: Teacher, windows: np.ndarray) -> TokenFit:
        """Run every path over the sequences `windows`, [n]; a run that goes on takes what it measured before."""
        digest = f"{self._settings.digest}-{self._corpus.digest}-{self._origin}"
        file = self._settings.out / MEASURED_FILE
        if (known := Observations.load(file, digest)) is not None:
            return self._fit(known)
        self._note(f"measuring the divergence of each token on {len(self._paths) - 1} paths, {len(windows)} sequences")
        windows = np.random.default_rng(self._settings.seed).permutation(windows)
        found = measure_tokens(self._model, bypass, teacher, self._corpus.sequences, windows, self._paths)
        found.save(file, digest)
        return self._fit(found)

    def num_observed(self, num_steps: int) -> int:
        """The number of sequences that `observed` would take."""
        return len(np.unique(self._observed(num_steps).sequences))

    def _observed(self, num_steps: int) -> Observations:
        rows = slice(num_steps // 2 * self._settings.batch, num_steps * self._settings.batch)
        return self._observations.routed(rows)

    def observed(self, num_steps: int) -> TokenFit:
        """Take what was observed in the second half of the first `num_steps` steps."""
        observed = self._observed(num_steps)
        self._note(f"fitting the router to {observed.choices.size} tokens that were observed in training")
        return self._fit(observed)

    def _fit(self, observed: Observations) -> TokenFit:
        settings = self._settings
        found = fit_tokens(observed, self._corpus.sequences, self._values, self._paths, self._num_layers, settings.seed)
        for number, (depth, explained) in enumerate(zip(settings.token_depths, found.explained)):
            mean = float(observed.divergences[observed.choices == number].mean(dtype=np.float64))
            self._note(f"  {depth} layers: {mean:.4f} nats per token, {explained:.0%} of the variance explained")
        return found


def refit_router(fit: TokenFitter, routing: TokenRouting, num_steps: int) -> None:
    """Fit the router again, to what the first num_steps steps observed; none before there are enough sequences."""
    if num_steps and fit.num_observed(num_steps) >= FEWEST_WINDOWS:
        routing.router = fit.observed(num_steps).router


def _nested_paths(
    settings: Stage1Settings, library: Mapping[int, list[list[int]]], num_layers: int
) -> tuple[LayerPath, ...]:
    """The paths of schedule token: the first of each of `token_depths`, and the whole model."""
    if missing := sorted(set(settings.token_depths) - set(library)):
        raise TrainingError(f"there is no path of {missing} layers; known depths are {sorted(library)}")
    return (*(path_of(library[depth][0]) for depth in settings.token_depths), full_path(num_layers))

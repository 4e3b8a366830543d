"""The lengths of an ordinal's first attempt depend on the seed and the ordinal alone, not on the schedule.

So two schedules are compared on the same draws. A later attempt draws anew, with what the prompt itself contributes
(`group_correlation`) kept. Legend: N = groups drawn at a time, G = completions of a group.
"""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from algorithms.simulation.config import GeometricLengths, LengthsConfig, LognormalLengths, TraceLengths

_CHUNK = 4096  # N

Trace = Sequence[Sequence[int]]
"""For each group of a run the lengths of its completions."""

_normal_cdf = np.frompyfunc(lambda z: 0.5 * math.erfc(-z / math.sqrt(2.0)), 1, 1)


class Lengths:
    """Draws the completion lengths of groups; integers from 1 to `max_length`."""

    def __init__(
        self, config: LengthsConfig, num_generations: int, max_length: int, seed: int, trace: Trace = ()
    ) -> None:
        """`trace`: the groups that a `trace` config draws from."""
        if isinstance(config, TraceLengths) and not trace:
            raise ValueError(f"simulation.lengths.path: {config.path} holds no groups to draw lengths from")
        self._config = config
        self._num_generations = num_generations
        self._max_length = max_length
        self._seed = seed
        self._trace = trace
        self._rng = np.random.default_rng([seed, 1])
        self._prompts: list[NDArray[np.float64]] = []
        """What each prompt contributes: a standard normal, or for a trace its group's index; N at a time."""
        self._lengths: list[list[int]] = []
        self._first = 0
        """Ordinal of `_lengths[0]`."""

    def draw(self, ordinal: int, attempt: int) -> list[int]:
        """G lengths; first attempts must be asked for in the order of their ordinals."""
        if attempt:
            rng = np.random.default_rng([self._seed, 2, ordinal, attempt])
            prompt_N = self._prompts[ordinal // _CHUNK][ordinal % _CHUNK :][:1]
            return self._sample(prompt_N, rng, again=True)[0]
        if ordinal >= self._first + len(self._lengths):
            assert ordinal == len(self._prompts) * _CHUNK, "first attempts come in the order of their ordinals"
            self._prompts.append(self._draw_prompts())
            self._lengths, self._first = self._sample(self._prompts[-1], self._rng, again=False), ordinal
        return self._lengths[ordinal - self._first]

    def _draw_prompts(self) -> NDArray[np.float64]:
        if isinstance(self._config, TraceLengths):
            return self._rng.integers(len(self._trace), size=_CHUNK).astype(np.float64)
        return self._rng.standard_normal(_CHUNK)

    def _sample(self, prompt_N: NDArray[np.float64], rng: np.random.Generator, again: bool) -> list[list[int]]:
        match self._config:
            case TraceLengths():
                return [self._from_trace(self._trace[int(index)], rng, again) for index in prompt_N]
            case LognormalLengths() as config:
                normal_NG = self._normal(prompt_N, config.group_correlation, rng)
                median = config.median or self._max_length / 4
                lengths_NG = np.rint(median * np.exp(config.sigma * normal_NG))
                return self._cut(lengths_NG, config.max)
            case GeometricLengths() as config:
                # 1 - u is drawn, not u: the long tail is where precision is wanted.
                above_NG = _normal_cdf(-self._normal(prompt_N, config.group_correlation, rng)).astype(np.float64)
                lengths_NG = np.ceil(np.log(above_NG) / math.log1p(-1.0 / config.mean))
                return self._cut(lengths_NG, config.max)

    def _normal(
        self, prompt_N: NDArray[np.float64], correlation: float, rng: np.random.Generator
    ) -> NDArray[np.float64]:
        """Standard normals, `correlation` between those of one prompt."""
        own_NG = rng.standard_normal((len(prompt_N), self._num_generations))
        return math.sqrt(correlation) * prompt_N[:, None] + math.sqrt(1.0 - correlation) * own_NG

    def _cut(self, lengths_NG: NDArray[np.float64], longest: int | None) -> list[list[int]]:
        longest = min(longest or self._max_length, self._max_length)
        cut: list[list[int]] = np.clip(lengths_NG, 1, longest).astype(np.int64).tolist()
        return cut

    def _from_trace(self, group: Sequence[int], rng: np.random.Generator, again: bool) -> list[int]:
        """The group as it was; for another attempt or another group size, its completions drawn with replacement."""
        if again or len(group) != self._num_generations:
            group = [group[index] for index in rng.integers(len(group), size=self._num_generations)]
        return [min(max(length, 1), self._max_length) for length in group]

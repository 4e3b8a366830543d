"""Each sequence's log-probability under the weights that the run began with is computed by the policy itself.

The ranks hold those weights until the first step, so no other model is needed, and every sequence is asked for once,
before it. What was computed stays in the run folder: a run that goes on compares with the same numbers, to the bit.
Below an adapter they hold those weights all the time, so each step asks for its own sequences, and nothing is kept.
"""

import asyncio
import os
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import msgspec
import xxhash

from actors.errors import RunError
from actors.policy_group import PolicyGroup
from actors.run.batches import batch_of, group_of
from algorithms.types import Group, Rollout

FILE = "reference_logprobs.msgpack"
_WRITE_EVERY_S = 60.0
_SAY_EVERY_S = 15.0


class _Known(msgspec.Struct):
    """What the file holds."""

    num_steps: int = 0
    """Steps from the first on of which every sequence is known."""
    sums: dict[bytes, float] = {}
    """Log-probability of the loss tokens, summed, by the sequence's tokens."""


class References:
    """What the policy's ranks said of sequences before the first step, or say without their adapter (`below`)."""

    def __init__(
        self, policy: PolicyGroup, folder: Path, max_tokens: int, say: Callable[[str], None], below: bool = False
    ) -> None:
        self._below = below
        self._policy = policy
        self._path = folder / FILE
        self._max_tokens = max_tokens
        self._say = say
        self._known = _Known()

    async def compute(
        self, steps: range, sequences: Callable[[int], Iterable[Rollout]], stopped: Callable[[], bool]
    ) -> None:
        """Of all sequences of these steps, or of as many as there is time for; a run that goes on computes the others.

        The policy holds the weights that the run began with.
        """
        if self._below:
            return
        self._known = self._read()
        written = said = time.monotonic()
        for step in range(max(steps.start, self._known.num_steps), steps.stop):
            if stopped():
                break
            missing = {key: rollout for rollout in sequences(step) if (key := _key(rollout)) not in self._known.sums}
            if missing:
                await self._ask(missing)
            self._known.num_steps = step + 1
            await asyncio.sleep(0)  # rows are tokenized here: whoever watches the ranks has its turn
            now = time.monotonic()
            if now - written > _WRITE_EVERY_S:
                self._write()
                written = time.monotonic()
            if now - said > _SAY_EVERY_S:
                self._say(f"log-probabilities of the reference: {step + 1} of {steps.stop} steps")
                said = now
        self._write()

    async def numbers(self, groups: Sequence[Group], step: int) -> dict[tuple[int, int], float]:
        """Of every sequence of the groups, by group and rollout; `step` is the policy's version."""
        if not self._below:
            places = ((g, r) for g, group in enumerate(groups) for r in range(len(group.rollouts)))
            return {(g, r): self.of(groups[g].rollouts[r]) for g, r in places}
        nothing = [(0.0,) * len(group.rollouts) for group in groups]
        batch = batch_of(groups, nothing, step, self._policy, self._max_tokens)
        return {place: sums.logprob for place, sums in (await self._policy.references(batch, groups)).items()}

    def of(self, rollout: Rollout) -> float:
        """Log-probability of the sequence's loss tokens, summed; RunError when they are others than they were."""
        try:
            return self._known.sums[_key(rollout)]
        except KeyError:
            raise RunError(
                f"{self._path} does not know a sequence of this run, so since it began the data have changed, or which "
                "tokens of a conversation are learned, as another version of Paceline may tell them otherwise; put the "
                "data back, or go on with the version that began the run, or begin anew with --overwrite"
            ) from None

    async def _ask(self, missing: dict[bytes, Rollout]) -> None:
        groups = [group_of(place, (rollout,)) for place, rollout in enumerate(missing.values())]
        batch = batch_of(groups, [(0.0,)] * len(groups), 0, self._policy, self._max_tokens)
        numbers = await self._policy.numbers(batch, groups)
        self._known.sums |= {key: numbers[place, 0] for place, key in enumerate(missing)}

    def _read(self) -> _Known:
        if not self._path.exists():
            return _Known()
        try:
            return msgspec.msgpack.decode(self._path.read_bytes(), type=_Known)
        except ValueError as error:
            raise RunError(f"{self._path}: {error}; the file is damaged: begin anew with --overwrite") from error

    def _write(self) -> None:
        staged = self._path.with_suffix(".staged")
        staged.write_bytes(msgspec.msgpack.encode(self._known))
        with staged.open("rb") as file:
            os.fsync(file.fileno())  # a file that is empty after a power cut would cost the whole run
        staged.rename(self._path)


def _key(rollout: Rollout) -> bytes:
    """The tokens, and which of them count."""
    return xxhash.xxh3_128(rollout.token_ids_T.tobytes() + rollout.loss_mask_T.tobytes()).digest()

"""Where a schedule can be worked out by hand the simulator agrees to the last bit; elsewhere its books balance."""

from dataclasses import replace
from typing import Any

import pytest

from algorithms.simulation.config import (
    CriticTimes,
    DecodeConfig,
    FailuresConfig,
    LognormalLengths,
    PublishConfig,
    RewardLatency,
    SimulationConfig,
    TrainConfig,
)
from algorithms.simulation.result import Amount, SimulationResult
from algorithms.simulation.setup import Setup
from algorithms.simulation.simulator import simulate

# All seconds are sums of powers of two, so that nothing is rounded.
LENGTH = 128
DECODE_S = 2.0
TRAIN_S = 1.5
CONSTANT = SimulationConfig(
    lengths=LognormalLengths(kind="lognormal", median=LENGTH, sigma=0.0),
    decode=DecodeConfig(base_s=DECODE_S / LENGTH, per_sequence_s=0.0),
    train=TrainConfig(per_step_s=TRAIN_S, per_token_s=0.0),
    reward=RewardLatency(kind="constant", mean_s=0.0),
    sync=PublishConfig(pause_s=0.0, total_s=0.0),
)
# One batch fills the slots.
SETUP = Setup(
    steps=6, groups_per_batch=4, num_generations=4, max_completion_length=1024, num_replicas=2, max_num_seqs=8,
    max_groups_per_replica=8, max_staleness=0,
)  # fmt: skip
TAIL = CONSTANT.model_copy(update={"lengths": LognormalLengths(kind="lognormal", median=32, sigma=1.2)})


def changed(config: SimulationConfig = CONSTANT, **sections: Any) -> SimulationConfig:
    return config.model_copy(update=sections)


# Closed forms ----------------------------------------------------------------------------------------------------


def test_synchronous_steps_are_the_sum_of_their_parts() -> None:
    config = changed(
        decode=DecodeConfig(base_s=1 / 128, per_sequence_s=1 / 1024),  # 8 run on each replica: 1 / 64 an iteration
        train=TrainConfig(per_step_s=1.0, per_token_s=1 / 1024),
        reward=RewardLatency(kind="constant", mean_s=0.25),
        sync=PublishConfig(pause_s=0.125, total_s=0.5),
        prompt_length=128,
    )
    result = simulate(config, replace(SETUP, num_policy_workers=2))
    train_s = 1.0 + 16 * (128 + 128) / 1024 / 2
    assert result.time_s == 6 * (2.0 + 0.25 + train_s + 0.5)
    assert result.policy_s == {"groups": 6 * 2.25, "training": 6 * train_s, "publishing": 6 * 0.5}
    assert result.staleness == (1.0,)
    assert result.trained == Amount(tokens=6 * 16 * 128, slot_s=6 * 16 * 2.0)
    assert result.bound.rollout == 16 / (4 * 2.0)
    assert result.bound.policy == 4 / train_s


@pytest.mark.parametrize(("critic_s", "waited_s"), [(1.0, 0.0), (1.75, 0.0), (4.0, 2.25)])
def test_the_policy_waits_for_the_critic_before_its_step_and_after_it(critic_s: float, waited_s: float) -> None:
    """Of two critic workers each has half of the tokens; replicas sample while the policy waits after a step; and the
    last step counts to the critic's end."""
    values = TrainConfig(per_step_s=0.25, per_token_s=1 / 1024)
    critic = CriticTimes(values=values, train=TrainConfig(per_step_s=critic_s, per_token_s=0.0))
    config = changed(critic=critic, sync=PublishConfig(pause_s=0.0, total_s=0.25), prompt_length=0)
    result = simulate(config, replace(SETUP, num_critic_workers=2))
    values_s = 0.25 + 16 * LENGTH / 1024 / 2
    assert result.policy_s["training"] == 6 * TRAIN_S
    assert result.policy_s["critic"] == 6 * (values_s + waited_s)
    decoding_s = DECODE_S if waited_s > DECODE_S else 6 * DECODE_S
    assert result.time_s == decoding_s + 6 * (values_s + TRAIN_S + 0.25 + waited_s)
    assert result.bound.policy == 4 / (values_s + max(TRAIN_S, critic_s))
    assert simulate(config, SETUP).time_s == 6 * (DECODE_S + TRAIN_S + 0.25), "who has no critic waits for none"


def test_half_the_slots_take_two_waves() -> None:
    result = simulate(CONSTANT, replace(SETUP, num_replicas=1))
    assert result.time_s == 6 * (2 * DECODE_S + TRAIN_S)


def test_when_the_policy_is_slower_only_the_first_batch_is_waited_for() -> None:
    config = changed(train=TrainConfig(per_step_s=8.0, per_token_s=0.0))
    result = simulate(config, replace(SETUP, max_staleness=1))
    assert result.time_s == DECODE_S + 6 * 8.0
    assert result.policy_s == {"groups": DECODE_S, "training": 6 * 8.0}
    assert result.max_staleness == 1


def test_when_the_rollouts_are_slower_no_slot_is_ever_idle() -> None:
    result = simulate(CONSTANT, replace(SETUP, max_staleness=1))
    assert result.time_s == 6 * DECODE_S + TRAIN_S
    assert result.slot_idle_s == {"done": 16 * TRAIN_S}
    assert result.trained.slot_s == 16 * 6 * DECODE_S


def test_a_pause_stops_every_replica_under_its_requests() -> None:
    config = changed(sync=PublishConfig(pause_s=0.25, total_s=0.5))
    result = simulate(config, replace(SETUP, max_staleness=1))
    # Each batch but the first decodes while the version before it is published.
    assert result.time_s == 6 * DECODE_S + 5 * 0.25 + TRAIN_S + 0.5
    assert result.slot_idle_s["publishing"] == 16 * 6 * 0.25
    assert result.staleness[1] > 0.5, "most of a batch is sampled before the version that is published meanwhile"


def test_on_shared_gpus_nothing_overlaps() -> None:
    config = changed(sync=PublishConfig(pause_s=0.25, total_s=0.5))
    result = simulate(config, replace(SETUP, max_staleness=1, takes_turns=True))
    assert result.time_s == 6 * (DECODE_S + TRAIN_S + 0.5)
    assert result.slot_idle_s == {"turns": 16 * 6 * (TRAIN_S + 0.25), "publishing": 16 * 6 * 0.25}
    assert result.policy_s == {"groups": 6 * DECODE_S, "training": 6 * TRAIN_S, "publishing": 6 * 0.5}
    assert result.bound.groups_per_s == pytest.approx(4 / (DECODE_S + TRAIN_S))


def test_without_in_flight_updates_the_running_requests_finish_first() -> None:
    config = changed(sync=PublishConfig(pause_s=0.25, total_s=0.25))
    result = simulate(config, replace(SETUP, max_staleness=1, in_flight_updates=False))
    assert result.time_s == 6 * DECODE_S + 5 * 0.25 + TRAIN_S + 0.25
    # A batch starts under the version that the batch before it is trained at.
    assert result.staleness == (1 / 6, 5 / 6)


def test_draining_holds_back_what_is_queued() -> None:
    config = changed(train=TrainConfig(per_step_s=0.5, per_token_s=0.0))
    one_at_a_time = Setup(
        steps=3, groups_per_batch=1, num_generations=2, max_completion_length=1024, num_replicas=1, max_num_seqs=2,
        max_groups_per_replica=4, max_staleness=2, in_flight_updates=False,
    )  # fmt: skip
    assert simulate(config, one_at_a_time).staleness == (1 / 3, 2 / 3)


# The books -------------------------------------------------------------------------------------------------------

WORLDS = {
    "pace": (TAIL, {}),
    "shallow": (TAIL, {"pipeline_depth": 6}),
    "requeue": (TAIL, {"when_stale": "requeue"}),
    "mask": (TAIL, {"when_stale": "mask"}),
    "drain": (TAIL, {"in_flight_updates": False}),
    "requeue and drain": (TAIL, {"when_stale": "requeue", "in_flight_updates": False}),
    "filtered": (changed(TAIL, filtered_share=0.4), {"over_sampling": 2.0}),
    "failures": (changed(TAIL, failures=FailuresConfig(mean_between_s=20.0, recovery_s=3.0)), {}),
    "all at once": (
        changed(
            TAIL,
            lengths=LognormalLengths(kind="lognormal", median=32, sigma=1.2, group_correlation=0.5),
            decode=DecodeConfig(base_s=0.01, per_sequence_s=0.002),
            reward=RewardLatency(kind="exponential", mean_s=0.3),
            sync=PublishConfig(pause_s=0.1, total_s=0.3),
            failures=FailuresConfig(mean_between_s=20.0, recovery_s=3.0),
            filtered_share=0.2,
        ),
        {"when_stale": "requeue", "over_sampling": 1.5},
    ),
    "failures and drain": (
        changed(
            TAIL,
            sync=PublishConfig(pause_s=0.2, total_s=0.3),
            failures=FailuresConfig(mean_between_s=10.0, recovery_s=0.1),
        ),
        {"in_flight_updates": False},
    ),
}


@pytest.fixture(params=WORLDS)
def world(request: pytest.FixtureRequest) -> tuple[Setup, SimulationResult]:
    config, settings = WORLDS[request.param]
    setup = replace(SETUP, steps=60, max_staleness=2, **settings)
    return setup, simulate(config, setup)


def test_every_ordinal_has_one_fate(world: tuple[Setup, SimulationResult]) -> None:
    setup, result = world
    assert result.num_trained == setup.steps * setup.groups_per_batch
    assert result.num_dispatched == result.num_trained + sum(result.num_left_out.values()) + result.num_unfinished


def test_every_slot_second_is_in_one_place(world: tuple[Setup, SimulationResult]) -> None:
    _, result = world
    amounts = [result.trained, result.masked, result.unfinished, *result.wasted.values()]
    booked_s = sum(amount.slot_s for amount in amounts) + sum(result.slot_idle_s.values())
    assert booked_s == pytest.approx(result.num_slots * result.time_s)
    assert sum(result.policy_s.values()) == pytest.approx(result.time_s)


def test_no_token_is_trained_beyond_the_bound(world: tuple[Setup, SimulationResult]) -> None:
    setup, result = world
    assert result.max_staleness <= setup.max_staleness
    assert sum(result.staleness) == pytest.approx(1.0)


def test_every_token_of_a_trained_group_is_trained_or_masked(world: tuple[Setup, SimulationResult]) -> None:
    setup, result = world
    lengths = result.lengths_trained
    assert result.trained.tokens + result.masked.tokens == round(lengths.mean * lengths.count)
    assert (result.masked.tokens > 0) == (setup.when_stale == "mask")


# Pacing ----------------------------------------------------------------------------------------------------------


def test_requeueing_trains_shorter_completions_than_are_sampled_and_pacing_does_not() -> None:
    setup = replace(SETUP, steps=200, max_staleness=2)
    paced, requeued = simulate(TAIL, setup), simulate(TAIL, replace(setup, when_stale="requeue"))
    assert paced.lengths_trained.mean == paced.lengths_dispatched.mean
    assert requeued.lengths_trained.mean < 0.95 * requeued.lengths_dispatched.mean
    assert requeued.lengths_left_out.mean > 1.5 * requeued.lengths_dispatched.mean
    assert requeued.wasted["requeued"].tokens > 0


def test_a_looser_bound_and_in_flight_masks_raise_the_efficiency() -> None:
    setup = replace(SETUP, steps=200)
    rising = [simulate(TAIL, replace(setup, max_staleness=bound)).efficiency for bound in (0, 1, 4)]
    rising.append(simulate(TAIL, replace(setup, max_staleness=4, when_stale="mask")).efficiency)
    assert rising == sorted(rising)
    assert rising[-1] > 2 * rising[0]


def test_groups_of_dead_replicas_are_dispatched_again_from_the_first_token() -> None:
    config = changed(failures=FailuresConfig(mean_between_s=8.0, recovery_s=1.0))
    result = simulate(config, replace(SETUP, steps=40, max_staleness=1))
    assert result.num_failures > 0
    assert result.num_redispatched > 0
    assert result.wasted["failed"].tokens > 0
    assert result.slot_idle_s["failed"] > 0
    assert result.num_dispatched == result.num_trained == 160


def test_replicas_that_die_too_soon_are_an_error_and_no_endless_run() -> None:
    config = changed(failures=FailuresConfig(mean_between_s=0.01, recovery_s=0.0))
    with pytest.raises(ValueError, match=r"simulation\.failures\.mean_between_s: 0\.01 s is too short"):
        simulate(config, SETUP)


def test_filtered_groups_are_replaced() -> None:
    result = simulate(changed(filtered_share=0.5), replace(SETUP, steps=50))
    assert result.num_left_out["filtered"] == pytest.approx(200, rel=0.3)
    assert result.wasted["filtered"].tokens == result.num_left_out["filtered"] * 4 * LENGTH


def test_one_seed_gives_one_result() -> None:
    config, settings = WORLDS["all at once"]
    setup = replace(SETUP, steps=30, max_staleness=2, **settings)
    assert simulate(config, setup) == simulate(config, setup)
    assert simulate(config, setup) != simulate(changed(config, seed=1), setup)


def test_progress_is_told_step_by_step() -> None:
    steps: list[int] = []
    result = simulate(CONSTANT, SETUP, on_step=steps.append)
    assert steps == [1, 2, 3, 4, 5, 6]
    assert [record.time_s for record in result.timeline] == [step * (DECODE_S + TRAIN_S) for step in steps]
    assert result.timeline[0].training_share == TRAIN_S / (DECODE_S + TRAIN_S)


def test_samples_of_lengths_are_bounded_and_their_means_exact() -> None:
    setup = replace(SETUP, groups_per_batch=100, steps=60, max_groups_per_replica=100, max_num_seqs=400)
    lengths = simulate(TAIL, setup).lengths_trained
    assert lengths.count == 60 * 100 * 4
    assert 10_000 <= len(lengths.lengths) <= 20_000
    assert sum(lengths.lengths) / len(lengths.lengths) == pytest.approx(lengths.mean, rel=0.05)

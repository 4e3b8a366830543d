"""One picture of a run: is it learning, and how stale is what it learns from."""

from collections.abc import Sequence
from pathlib import Path

_LARGEST = 1e100


def plot_run(metrics: Sequence[dict[str, float]], max_staleness: int, path: Path) -> None:
    """Reward with its spread above, mean and highest staleness with the bound below, over the steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    steps = [row["step"] for row in metrics]
    reward = [_drawable(row.get("reward", float("nan"))) for row in metrics]
    figure, (above, below) = pyplot.subplots(2, 1, sharex=True, figsize=(8, 6), height_ratios=(2, 1))
    above.plot(steps, reward, color="tab:blue", alpha=0.35, label="reward")
    above.plot(steps, _smooth(reward), color="tab:blue", label="smoothed")
    above.set_ylabel("mean reward of the batch")
    above.legend(loc="lower right", frameon=False)
    below.step(steps, [row.get("staleness/max", 0.0) for row in metrics], color="tab:orange", label="highest")
    below.plot(steps, [row.get("staleness/mean", 0.0) for row in metrics], color="tab:green", label="mean")
    below.axhline(max_staleness, color="black", linestyle=":", label="max_staleness")
    below.set_ylabel("staleness (versions)")
    below.set_xlabel("step")
    below.set_ylim(-0.1, max_staleness + 0.5)
    below.legend(loc="upper right", frameon=False, ncols=3)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def plot_loss(metrics: Sequence[dict[str, float]], path: Path) -> None:
    """Loss over the steps of a run that samples nothing."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4))
    axes.plot([row["step"] for row in metrics], [row["loss"] for row in metrics])
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _drawable(value: float) -> float:
    """NaN, which leaves a gap, for what no axis holds: a finished run must not fail for its picture."""
    return value if abs(value) < _LARGEST else float("nan")


def _smooth(values: Sequence[float], window: int = 10) -> list[float]:
    """Mean over the last `window` values."""
    means = []
    for index in range(len(values)):
        recent = values[max(0, index + 1 - window) : index + 1]
        means.append(sum(recent) / len(recent))
    return means

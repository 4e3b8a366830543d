"""One picture of a simulation: who is busy when, how stale is what is trained, and which split is fastest."""

from pathlib import Path

from algorithms.simulation.result import SimulationResult
from deploy.simulate.options import Comparison

_FORMATS = (".png", ".pdf", ".svg", ".jpg")


def check_plot(path: Path) -> None:
    """ValueError, before anything is simulated, when the picture could not be written."""
    if path.suffix.lower() not in _FORMATS:
        raise ValueError(f"--plot {path}: the name must end in {', '.join(_FORMATS)}")
    if not path.absolute().parent.is_dir():
        raise ValueError(f"--plot {path}: there is no folder {path.parent}")


def plot_simulation(result: SimulationResult, comparison: Comparison, path: Path) -> None:
    """Utilisation over time above; staleness and splits below."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplot_mosaic([["timeline", "timeline"], ["staleness", "splits"]], figsize=(9, 7))
    timeline, staleness, splits = axes["timeline"], axes["staleness"], axes["splits"]

    times = [record.time_s for record in result.timeline]
    timeline.step(times, [r.busy_share for r in result.timeline], where="pre", label="rollout slots decode")
    timeline.step(times, [r.training_share for r in result.timeline], where="pre", label="policy trains")
    timeline.set_xlabel("virtual time (s)")
    timeline.set_ylabel("share of each step")
    timeline.set_ylim(0, 1.05)
    timeline.legend(loc="lower right", frameon=False, ncols=2)

    staleness.bar(range(len(result.staleness)), result.staleness, color="tab:green")
    staleness.set_xticks(range(len(result.staleness)))
    staleness.set_xlabel("staleness (versions)")
    staleness.set_ylabel("share of the trained tokens")

    names = [f"{o.recipe.pools.policy.num_workers} + {o.recipe.pools.rollout.num_workers}" for o in comparison.splits]
    colors = ["tab:gray" if option.overrides else "tab:blue" for option in comparison.splits]
    splits.bar(range(len(names)), [option.result.groups_per_s for option in comparison.splits], color=colors)
    splits.set_xticks(range(len(names)), names, rotation=30)
    splits.set_xlabel("policy + rollout workers (blue: as it is)")
    splits.set_ylabel("groups/s")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)

"""The benchmark's figures, from the results file alone."""

import statistics
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter

from benchmarks.summary import ROWS, TITLES, alpha_costs, ceilings, lines, number, scaling, screens, timings
from refusal import figures
from refusal.files import atomic


def draw(result: dict, path: Path) -> list[Path]:
    """Writes the figures that the results allow, next to the results file."""
    figures.use_style()
    made = []
    pictures = {"throughput": draw_throughput, "prompts": draw_prompts, "scaling": draw_scaling}
    for name, picture in pictures.items():
        figure = picture(result)
        target = path.with_name(f"{path.stem}-{name}.png")
        if figure is None:
            target.unlink(missing_ok=True)  # of an earlier run
            continue
        with atomic(target) as temporary:
            figure.savefig(temporary, dpi=160)
        plt.close(figure)
        made.append(target)
    return made


def draw_throughput(result: dict) -> Figure | None:
    table = lines(result)
    if not table:
        return None
    names = [name for name in reversed(TITLES) if name in table]
    most = ceilings(result).get(ROWS)
    figure, axes = plt.subplots(1, 2, figsize=(6.3, 2.4), sharex=True, sharey=True)
    for axis, kind, title in zip(axes, ("rates", "forced"), ("own stops", "48 forced tokens"), strict=True):
        for place, name in enumerate(names):
            values = getattr(table[name], kind)
            if not values:
                continue
            middle = statistics.median(values)
            error = [[middle - min(values)], [max(values) - middle]]
            colour, marker = ("#D55E00", "D") if name == "engine" else ("#0072B2", "o")
            axis.errorbar(middle, place, xerr=error, fmt=marker, color=colour)
            axis.annotate(number(middle), (middle, place), (0, 5), textcoords="offset points", ha="center", fontsize=7)
        if most:
            axis.axvline(most, color="#7F7F7F", linestyle="--")
            axis.annotate("ceiling", (most, -0.6), (-3, 0), textcoords="offset points", ha="right", fontsize=7)
        axis.set(xscale="log", xlabel="generated tokens per second", title=title, ylim=(-0.8, len(names) - 0.3))
    axes[0].xaxis.set_major_formatter(ScalarFormatter())  # 100, not 10 to the power of 2
    axes[0].set_yticks(range(len(names)), [TITLES[name] for name in names])
    return figure


def draw_prompts(result: dict) -> Figure | None:
    costs, screen = alpha_costs(result), screens(result)
    if not costs:
        return None
    figure, (left, right) = plt.subplots(1, 2, figsize=(6.3, 2.4), width_ratios=(3, 2))
    middle = {count: statistics.median(seconds) for count, seconds in costs.items()}
    low, high = ([abs(end(costs[c]) - middle[c]) for c in costs] for end in (min, max))
    left.errorbar(list(costs), list(middle.values()), yerr=[low, high], fmt="-D", color="#D55E00", label="engine")
    if 1 in middle:
        left.plot(
            list(costs), [count * middle[1] for count in costs], "--", color="#7F7F7F", label="each like the first"
        )
    left.set(xlabel="alphas (96 prompts each)", ylabel="time to the first token (s)", ylim=0, title="prompt part")
    left.legend()
    if screen:
        own, cells, count = screen
        each = [one["seconds"] * count for one in timings(result, "screen", "transformers")]
        right.bar(["engine", "a pass a cell,\nscaled"], [own, cells], color=["#D55E00", "#0072B2"], width=0.6)
        right.errorbar(1, cells, yerr=[[cells - min(each)], [max(each) - cells]], fmt="none", color="black")
        right.set(ylabel="time (s)", title=f"screen, {count} cells")
    else:
        right.set_axis_off()
    return figure


def draw_scaling(result: dict) -> Figure | None:
    table = scaling(result)
    if not table:
        return None
    figure, axes = plt.subplots(1, 2, figsize=(6.3, 2.6))
    groups = sorted({(row["model"], row["prompts"]) for row in table})
    looks = zip(("#0072B2", "#E69F00", "#D55E00", "#009E73", "#CC79A7"), "os^Dv", strict=True)
    for (model, prompts), (colour, marker) in zip(groups, looks, strict=False):
        rows = [row for row in table if (row["model"], row["prompts"]) == (model, prompts)]
        x, label = [row["conditions"] for row in rows], f"{model.split('-')[-1]}, {prompts} prompts"
        axes[0].plot(x, [row["rate"] for row in rows], marker=marker, color=colour, label=label)
        known = [row for row in rows if row["peer"]]
        ratios = [row["peer"] / row["seconds"] for row in known]
        axes[1].plot([row["conditions"] for row in known], ratios, marker=marker, color=colour, label=label)
    axes[0].set(xscale="log", xlabel="conditions", ylabel="engine, generated tokens per second", ylim=0)
    axes[1].set(xscale="log", xlabel="conditions", ylabel="times faster than (b)", ylim=0)
    axes[1].axhline(1, color="#7F7F7F", linestyle="--")
    for axis in axes:
        ticks = sorted({row["conditions"] for row in table})
        axis.set_xticks(ticks, [str(tick) for tick in ticks])
        axis.minorticks_off()
    axes[0].legend()
    return figure

"""Pictures: dots and whiskers per system, and the curves of a training."""

import io
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxsearch.metrics import HEADLINE
from train.report import GroupResult, short


def plot(path: str | Path, title: str, groups: Sequence[GroupResult], *, baseline: str, footer: str) -> None:
    """Dot and whisker per system: NDCG@10 with its 95 % interval, a row per group, a panel per column."""
    from matplotlib.figure import Figure

    columns = list(groups[0].columns)
    heights = [len(group.systems) + 1.0 for group in groups]
    width = 3.6 * len(columns) + 1.6
    figure = Figure(figsize=(width, 0.4 * sum(heights) + 0.8 * len(groups) + 0.8), layout="constrained")
    rows = figure.subfigures(len(groups), 1, squeeze=False, height_ratios=heights)[:, 0]
    values = [
        interval
        for group in groups
        for result in group.columns.values()
        for interval in result.headline.values()
    ]
    low, high = min(value.low for value in values), max(value.high for value in values)
    for part, group in zip(rows, groups, strict=True):
        part.suptitle(f"{group.name} · {group.num_queries}", x=0.01, ha="left", fontsize=10, color="0.2")
        panels = part.subplots(1, len(columns), squeeze=False, sharex=True)[0]
        for axis, column in zip(panels, columns, strict=True):
            _draw_panel(axis, group, column, baseline=baseline, has_names=column == columns[0])
            axis.set_xlim(low - 0.06 * (high - low) - 0.01, high + 0.06 * (high - low) + 0.01)
            axis.set_xlabel("NDCG@10", color="0.35", fontsize=9)
    figure.suptitle(title, x=0.01, ha="left", fontsize=14, fontweight="bold")
    wrapped = "\n".join(textwrap.wrap(footer, round(width * 17)))
    figure.text(0.01, -0.01, wrapped, ha="left", va="top", fontsize=7.5, color="0.4", linespacing=1.4)
    figure.savefig(path, dpi=160, bbox_inches="tight", facecolor="white", pad_inches=0.15)


def _draw_panel(axis: Any, group: GroupResult, column: str, *, baseline: str, has_names: bool) -> None:
    result = group.columns[column]
    systems = group.systems
    best = max(systems, key=lambda system: result.headline[system].value)
    for place, system in enumerate(systems):
        value, low, high = result.headline[system]
        color = "#0b6e4f" if system == best else "#3b6ea5" if system != baseline else "0.45"
        axis.plot([low, high], [place, place], color=color, linewidth=2.2, solid_capstyle="round", alpha=0.55)
        axis.plot(value, place, "o", color=color, markersize=7)
        weight = "bold" if system == best else "normal"
        axis.annotate(
            short(value), (value, place), (0, 5), textcoords="offset points", ha="center", va="bottom",
            fontsize=8, color=color, fontweight=weight,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6, "alpha": 0.85},
        )  # fmt: skip
    axis.axvline(result.headline[baseline].value, color="0.6", linewidth=0.9, linestyle=(0, (4, 3)), zorder=0)
    axis.set_yticks(range(len(systems)), systems if has_names else [""] * len(systems))
    axis.set_ylim(len(systems) - 0.4, -0.8)
    axis.margins(x=0.12)
    axis.grid(axis="x", color="0.92", linewidth=0.8)
    axis.set_axisbelow(True)
    axis.tick_params(length=0, labelsize=9)
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.spines["bottom"].set_color("0.8")
    count = result.num_queries[HEADLINE]
    axis.set_title(f"{column} documents, {count} queries with grades", loc="left", fontsize=8.5, color="0.4")


def curves(records: Sequence[Mapping[str, float]]) -> str:
    """SVG of a training: its loss, and beside it what was evaluated on the way."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    names = sorted({name for record in records for name in record if name.startswith("evaluate/")})
    panels = ["loss", *names]
    figure = Figure(figsize=(3.8 * len(panels), 2.6), layout="constrained")
    for axis, name in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        points = [(record["step"], record[name]) for record in records if name in record]
        axis.plot(
            *zip(*points, strict=True), color="#1d4ed8", marker="o" if len(points) < 20 else "", markersize=4
        )
        axis.set_title(name.removeprefix("evaluate/"), loc="left", fontsize=9)
        axis.set_xlabel("step", fontsize=8, color="0.35")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.grid(color="0.92", linewidth=0.8)
        axis.tick_params(length=0, labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    out = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none"}):  # text stays text
        figure.savefig(out, format="svg", metadata={"Date": None})
    text = out.getvalue()
    return text[text.index("<svg") :]


def plot_tradeoff(path: str | Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Speed against NDCG@10 with both spreads; what no other row beats in both is joined by a line.

    Where a cut was healed for several numbers of steps, beside it the difference that is left after each.
    """
    from matplotlib.figure import Figure

    curve = _longest_curve(rows)
    named = max(curve, key=lambda row: row["ndcg@10"][0], default=None)
    figure = Figure(figsize=(12 if curve else 8, 5), layout="constrained")
    axes = figure.subplots(1, 2, squeeze=False, width_ratios=(3, 2))[0] if curve else [figure.subplots()]
    axis = axes[0]
    best, front = float("-inf"), []
    for row in sorted(rows, key=lambda row: -row["speed"]["median"]):
        if row["ndcg@10"][0] > best:
            best = row["ndcg@10"][0]
            front.append((row["speed"]["median"], best))
    axis.plot(*zip(*front, strict=True), color="0.75", zorder=1)
    for row in rows:
        (value, low, high), speed = row["ndcg@10"], row["speed"]
        x, color = speed["median"], _healed_color(row)
        axis.errorbar(
            x,
            value,
            xerr=[[x - speed["minimum"]], [speed["maximum"] - x]],
            yerr=[[value - low], [high - value]],
            fmt="o",
            color=color,
            markerfacecolor=color if row["heal_steps"] else "white",
            ecolor="0.8",
            zorder=2,
        )
        if row not in curve[1:] or row is named:  # the curve beside it has the others' steps
            axis.annotate(
                row["name"], (x, value), xytext=(6, 5), textcoords="offset points", fontsize=8, color="0.2"
            )
    axis.set_xlabel("speed, the whole ranker = 1", color="0.35", fontsize=9)
    axis.set_ylabel("NDCG@10, 95 % interval over queries", color="0.35", fontsize=9)
    axis.set_title("Pruned rankers; filled: healed", loc="left", fontweight="bold")
    if curve:
        _plot_healing(axes[1], curve)
    for each in axes:
        each.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=160, facecolor="white")


CUT = ("layers", "mlp_dim", "heads", "kv_heads", "method", "hidden_weight")
"""What makes two rows the same cut, healed in the same way."""


def _healed_color(row: Mapping[str, Any]) -> str:
    return "#0b6e4f" if row["heal_steps"] else "#3b6ea5"


def _longest_curve(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The rows of the cut that was healed in most ways, by their steps; empty where none was healed twice."""
    cuts: dict[tuple, list[Mapping[str, Any]]] = {}
    for row in rows:
        cuts.setdefault(tuple(row[name] for name in CUT), []).append(row)

    def times_healed(cut: Sequence[Mapping[str, Any]]) -> int:
        return sum(row["heal_steps"] > 0 for row in cut)

    curve = max(cuts.values(), key=times_healed)
    return sorted(curve, key=lambda row: row["heal_steps"]) if times_healed(curve) > 1 else []


def _plot_healing(axis: Any, curve: Sequence[Mapping[str, Any]]) -> None:
    """Each number of steps at a place of its own: they grow by factors, and 0 is one of them."""
    for place, row in enumerate(curve):
        value, low, high = row["difference"]
        color = _healed_color(row)
        axis.errorbar(
            place, value, yerr=[[value - low], [high - value]], fmt="o", color=color, ecolor="0.8",
            markerfacecolor=color if row["heal_steps"] else "white", zorder=2,
        )  # fmt: skip
    axis.plot([row["difference"][0] for row in curve], color="0.75", zorder=1)
    axis.axhline(0, color="0.4", linewidth=0.9, linestyle=(0, (4, 3)))
    axis.set_xticks(range(len(curve)), [str(row["heal_steps"]) for row in curve])
    axis.set_xlabel("steps of healing", color="0.35", fontsize=9)
    axis.set_ylabel("NDCG@10, difference from the whole ranker", color="0.35", fontsize=9)
    shape = curve[0]
    axis.set_title(
        f"{shape['layers']} layers of {shape['mlp_dim']} neurons", loc="left", fontweight="bold", fontsize=10
    )


KIND_COLORS = {
    "torch": "0.45",
    "ours": "#3b6ea5",
    "pruned": "#0b6e4f",
    "bfloat16": "#7a4fa3",
    "neighbour": "#b36a1d",
}
WIDE = 20
"""Rates that differ by more than this are drawn on a logarithmic axis."""


def plot_ladder(path: str | Path, report: Mapping[str, Any]) -> None:
    """A row per rung: speed back to back (light) and at the SLO (full) as bars, beside them NDCG@10."""
    from matplotlib.figure import Figure

    rows, reference = report["rows"], report["reference"]
    figure = Figure(figsize=(11, 0.62 * len(rows) + 2.0), layout="constrained")
    speeds, quality = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    for place, row in enumerate(rows):
        _draw_rates(speeds, row, place)
        value, low, high = row["ndcg@10"]
        color = KIND_COLORS[row["kind"]]
        quality.plot(
            [low, high], [place, place], color=color, linewidth=2.2, alpha=0.5, solid_capstyle="round"
        )
        quality.plot(value, place, "o", color=color, markersize=7)
        kept = f" · {row['retained']:.0%}" if "retained" in row and row["name"] != reference else ""
        quality.annotate(
            f"{short(value)}{kept}", (value, place), (0, 6), textcoords="offset points", ha="center",
            va="bottom", fontsize=8, color=color, bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6},
        )  # fmt: skip
    _scale_rates(speeds, rows)
    middle = next(row["ndcg@10"][0] for row in rows if row["name"] == reference)
    quality.axvline(middle, color="0.6", linewidth=0.9, linestyle=(0, (4, 3)), zorder=0)
    speeds.set_yticks(range(len(rows)), [row["name"] for row in rows])
    speeds.set_ylim(len(rows) - 0.45, -0.65)
    speeds.set_xlabel(
        f"items a second over {rows[0]['name']}; light: back to back, full: at the SLO",
        color="0.35",
        fontsize=9,
    )
    quality.set_xlabel("NDCG@10, 95 % interval over queries", color="0.35", fontsize=9)
    for axis in (speeds, quality):
        axis.grid(axis="x", color="0.92", linewidth=0.8)
        axis.set_axisbelow(True)
        axis.tick_params(length=0, labelsize=9)
        axis.spines[["top", "right", "left"]].set_visible(False)
        axis.spines["bottom"].set_color("0.8")
    figure.suptitle("One ranker, every way to run it", x=0.01, ha="left", fontsize=14, fontweight="bold")
    footer = (
        f"{report['device']}, {report['cores']} cores, {report['dtype']}; {report['depth']} documents a request. SLO: "
        f"p99 ≤ {report['slo_factor']:g} times the median of a request alone on the slowest rung. "
        f"Back to back: median of {report['repeats']} passes, their range as a line. "
        "At the SLO: simulated from measured times, then tried for real; * marks a rate that did not hold. "
        f"Dashed, and what the percentages are of: {reference}."
    )
    wrapped = "\n".join(textwrap.wrap(footer, 150))
    figure.text(0.01, -0.01, wrapped, ha="left", va="top", fontsize=7.5, color="0.4", linespacing=1.4)
    figure.savefig(path, dpi=160, bbox_inches="tight", facecolor="white", pad_inches=0.15)


def _draw_rates(axis: Any, row: Mapping[str, Any], place: int) -> None:
    color, free = KIND_COLORS[row["kind"]], row["items_per_second"]
    held = row["simulated"]["items_per_second"]
    axis.barh(place - 0.2, free["median"], height=0.36, color="white")  # no grid shines through
    axis.barh(place - 0.2, free["median"], height=0.36, color=color, alpha=0.35)
    axis.plot([free["minimum"], free["maximum"]], [place - 0.2] * 2, color=color, linewidth=1.4)
    axis.barh(place + 0.2, held, height=0.36, color=color)
    mark = "" if row["holds"] else " *"
    for offset, end, text in (
        (-0.2, max(free["median"], free["maximum"]), _rate(free["median"])),
        (0.2, held, _rate(held) + mark),
    ):
        axis.annotate(
            text,
            (end, place + offset),
            (4, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
            color=color,
        )


def _scale_rates(axis: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    rates = [row["items_per_second"]["median"] for row in rows]
    rates += [
        row["simulated"]["items_per_second"] for row in rows if row["simulated"]["items_per_second"] > 0
    ]
    low, high = min(rates), max(rates)
    if high > WIDE * low:
        axis.set_xscale("log")
        axis.xaxis.set_major_formatter(lambda value, _: f"{value:,.3g}" if value < 1000 else f"{value:,.0f}")
        axis.set_xlim(low / 3, high * 3)
    else:
        axis.set_xlim(0, high * 1.15)


def _rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"

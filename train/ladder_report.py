"""What the ladder of scoring reports: ratios that carry over to another machine, as Markdown. Measured by `ladder`."""

from typing import Any


def in_ratios(report: dict[str, Any]) -> dict[str, Any]:
    """The report with rates over the first rung's, back to back, and latencies in service levels: what carries over."""
    base, slo_ms = report["rows"][0]["items_per_second"]["median"], report["slo_ms"]
    rows = []
    for row in report["rows"]:
        simulated, measured = row["simulated"], row.get("measured")
        rate = {name: value / base for name, value in row["items_per_second"].items()}
        changed: dict[str, Any] = {
            "items_per_second": rate,
            "simulated": simulated | {"items_per_second": simulated["items_per_second"] / base},
            "alone_ms": {"p50": row["alone_ms"]["p50"] / slo_ms},
        }
        if measured:
            names = ("p50_ms", "p95_ms", "p99_ms")
            taken = {name: None if measured[name] is None else measured[name] / slo_ms for name in names}
            changed["measured"] = measured | taken
        rows.append(row | changed)
    return report | {"rows": rows}


def markdown(report: dict[str, Any]) -> str:
    """Of a report `in_ratios`."""
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    lines = [
        f"# The ladder of scoring, {report['date']}",
        "",
        f"{report['device']}, {report['cores']} cores; {versions}; commit {report['commit']}. Ranker "
        f"{report['ranker']} in {report['dtype']}, {report['depth']} documents a request, from texts to scores.",
        *(["", report["left_out"]] if report["left_out"] else []),
        "",
        f"Quality: {report['num_queries']} test queries, 95 % intervals over queries; *retained* and *difference* are "
        f"of {report['reference']!r}. *computed*: token places computed for each item, *padding* the share of them "
        "without a token. *memory*: MiB that a process scoring like this holds at most, above what it held before it "
        f"read the weights. *speed*: items a second of {report['timed_queries']} requests back to back over the first "
        f"rung's median, {report['repeats']} passes, the rungs taking turns, median [minimum, maximum].",
        "",
        "| rung | NDCG@10 | retained | difference | computed | padding | memory | speed |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in report["rows"]:
        value = "{:.3f} [{:.3f}, {:.3f}]".format(*row["ndcg@10"])
        retained = f"{row['retained']:.1%}" if "retained" in row else "–"
        difference = "{:+.3f} [{:+.3f}, {:+.3f}]".format(*row["difference"])
        difference = "–" if row["name"] == report["reference"] else difference
        cost = "– | –"
        if "padding" in row:
            cost = f"{row['computed_tokens']:.0f} | {row['padding']:.0%}"
        items = "{median:.3g} [{minimum:.3g}, {maximum:.3g}]".format(**row["items_per_second"])
        memory = "–" if row["memory_bytes"] is None else f"{row['memory_bytes'] / 2**20:,.0f}"
        lines.append(f"| {row['name']} | {value} | {retained} | {difference} | {cost} | {memory} | {items} |")
    lines += [
        "",
        f"Under load: the SLO is p99 ≤ {report['slo_factor']:g} times the median of a request alone on the slowest "
        "rung, one for all rungs; latencies are shares of it. *alone*: measured, no queue. *simulated*: the highest "
        "rate of Poisson arrivals that meets the SLO when one server is fed with the measured times, busy for at most "
        f"{report['most_load']:.0%} of the time (*load*); speed as above. *measured*: that rate for real, open loop, "
        f"for {report['window_seconds']:g} s or {report['least_requests']} requests if that is longer, latency from "
        "when a request was due; with fewer than 100 requests p99 is the slowest one.",
        "",
        "| rung | measured alone: p50 | simulated: speed at the SLO | load | measured there: requests "
        "| p50 | p95 | p99 | SLO met |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    for row in report["rows"]:
        simulated, shown = row["simulated"], "– | – | – | –"
        if found := row.get("measured"):
            latencies = (found[f"p{percent}_ms"] for percent in (50, 95, 99))
            told = ("failed" if value is None else f"{value:.3g}" for value in latencies)
            shown = " | ".join([str(found["num_requests"]), *told])
        load_shown = f"{simulated['items_per_second']:.3g} | {simulated['load']:.0%}"
        met = "yes" if row["holds"] else "**no**"
        lines.append(f"| {row['name']} | {row['alone_ms']['p50']:.3g} | {load_shown} | {shown} | {met} |")
    return "\n".join([*lines, "", "![Speed and NDCG@10 of each rung](report.png)"]) + "\n"

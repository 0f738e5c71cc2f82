"""The results as a person reads them: lines while it runs, a table at the end, and the same in the documentation."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

FLOORS = {
    "ceiling": "wrk against a trivial uvloop server (the generator's ceiling)",
    "asgi": "uvicorn, raw ASGI and HMAC, nothing stored",
    "insert-1": "asyncpg, one row a commit",
    "insert-100": "asyncpg, 100 rows a commit",
    "insert-100x2": "asyncpg, 100 rows a commit, 2 connections",
}

#: Cores that others may use (the kernel's own work among them) before the figures are doubted.
_DISTURBED_CORES = 0.3

_FIELDS = (
    *("rate", "p50", "p90", "p99", "longest", "processed", "end_to_end", "backlog", "drain_seconds"),
    *("delay_p50", "delay_p99", "cpu_ms", "others", "rss", "pss", "wal", "commits", "disk"),
)


def medians(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One entry for each peer and number of connections: each field's median, and the rates of all rounds."""
    cells: dict[tuple[str, int], list[Mapping[str, Any]]] = {}
    for run in runs:
        cells.setdefault((run["peer"], run["connections"]), []).append(run)
    entries = []
    for (peer, connections), group in cells.items():
        entry: dict[str, Any] = {"peer": peer, "connections": connections, "rounds": len(group)}
        for name in _FIELDS:
            values = [run[name] for run in group if run.get(name) is not None]
            if values:
                entry[name] = round(median(values), 4)
        entry["rates"] = [round(run["rate"], 1) for run in group]
        if any(run.get("cpu") and not isinstance(run["cpu"], float) for run in group):
            names = {name for run in group for name in run["cpu"]}
            entry["cpu"] = {
                name: round(median(run["cpu"].get(name, 0.0) for run in group), 2) for name in sorted(names)
            }
        entries.append(entry)
    return entries


def line(label: str, run: Mapping[str, Any]) -> str:
    """One run, while the benchmark goes on."""
    parts = [f"{FLOORS.get(label, label)[:58]:<58} c={run['connections']:<3}{run['rate']:>9.0f}/s"]
    parts.append(f"p50 {run['p50']:.2f} p99 {run['p99']:.2f} ms")
    if run.get("end_to_end") is not None:
        parts.append(f"done {run['end_to_end']:.0f}/s")
    if run.get("backlog"):
        parts.append(f"backlog {run['backlog']} drained in {run['drain_seconds']:.1f} s")
    if run.get("rss"):
        parts.append(f"RSS {run['rss']:.0f} MiB")
    parts += [f"WRONG: {problem}" for problem in run.get("problems", ())]
    return "  ".join(parts)


class Table:
    def __init__(self, head: Sequence[str]) -> None:
        self._rows = [list(head)]

    def add(self, *cells: str) -> None:
        self._rows.append(list(cells))

    def text(self) -> str:
        """In columns, for a terminal."""
        widths = [max(len(row[at]) for row in self._rows) for at in range(len(self._rows[0]))]
        return "\n".join(
            "  ".join(
                cell.ljust(width) if at == 0 else cell.rjust(width)
                for at, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in self._rows
        )

    def markdown(self) -> str:
        """As Markdown."""
        head, *rows = self._rows
        rule = ["---", *["--:"] * (len(head) - 1)]
        return "\n".join(f"| {' | '.join(row)} |" for row in [head, rule, *rows])


def number(value: float | None) -> str:
    if value is None:
        return "–"
    if value >= 1000:
        return f"{value:,.0f}".replace(",", "\u202f")
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _tables(results: Mapping[str, Any]) -> list[tuple[str, Table]]:
    labels: Mapping[str, str] = results["labels"]
    entries = {(entry["peer"], entry["connections"]): entry for entry in results["medians"]}
    widths = sorted({width for peer, width in entries if peer not in FLOORS}, reverse=True) or [64]
    peers = list(dict.fromkeys(peer for peer, _ in entries if peer not in FLOORS))

    speed = Table(
        [
            "Events per second, median",
            *[f"acknowledged, {width} conn." for width in widths],
            f"processed end to end, {widths[0]} conn.",
            "[lowest–highest] of acknowledged",
        ]
    )
    latency = Table(["p50 / p99, ms", *[f"{width} conn." for width in widths], "commit to processed, p50"])
    cost = Table(
        [
            f"Per event, {widths[0]} conn.",
            "CPU ms",
            "server / PostgreSQL / wrk, cores",
            "RSS, MiB",
            "PSS, MiB",
            "WAL, bytes",
            "commits",
            "disk, bytes",
        ]
    )
    for peer in peers:
        cells = [entries.get((peer, width), {}) for width in widths]
        first = cells[0]
        rates = first.get("rates", [0.0])
        spread = f"[{number(min(rates))}–{number(max(rates))}]"
        speed.add(
            labels[peer],
            *[number(cell.get("rate")) for cell in cells],
            number(first.get("end_to_end")),
            spread,
        )
        latency.add(
            labels[peer],
            *[f"{number(cell.get('p50'))} / {number(cell.get('p99'))}" for cell in cells],
            number(first.get("delay_p50")),
        )
        cpu = first.get("cpu", {})
        cores = " / ".join(f"{cpu.get(name, 0):.2f}" for name in ("server", "postgres", "wrk"))
        figures = [number(first.get(name)) for name in ("rss", "pss", "wal", "commits", "disk")]
        cost.add(labels[peer], number(first.get("cpu_ms")), cores, *figures)

    floors = Table(["Floors", "connections", "per second", "p50 / p99, ms"])
    for (peer, width), entry in entries.items():
        if peer in FLOORS:
            times = f"{number(entry.get('p50'))} / {number(entry.get('p99'))}"
            floors.add(FLOORS[peer], str(width), number(entry.get("rate")), times)

    promises = Table(["Bar", "wanted", "measured", "[worst–best] round", "verdict"])
    for bar in results["bars"]:
        sign = "≤" if bar["at_most"] else "≥"
        spread = "" if bar["worst"] is None else f"[{number(bar['worst'])}–{number(bar['best'])}]"
        measured = "" if bar["figure"] is None else f"{number(bar['figure'])} {bar['unit']}"
        wanted = f"{sign} {number(bar['limit'])} {bar['unit']}"
        promises.add(bar["promise"], wanted, measured, spread, bar["verdict"])
    return [("speed", speed), ("latency", latency), ("cost", cost), ("floors", floors), ("bars", promises)]


def about(results: Mapping[str, Any]) -> str:
    machine, postgres, options = results["machine"], results["postgres"], results["options"]
    words = [
        f"{machine['cores']} cores ({machine['processor']}), {machine['memory_gib']} GiB, {machine['system']};",
        f"Python {machine['python']}, PostgreSQL {postgres['server_version']} (fsync {postgres['fsync']},",
        f"synchronous_commit {postgres['synchronous_commit']}); {options['repeats']} rounds of",
        f"{options['seconds']:g} s each, interleaved; {results['when']}.",
    ]
    return " ".join(words)


def disturbance(runs: Sequence[Mapping[str, Any]]) -> str:
    """A sentence when something else ran on this machine meanwhile; empty otherwise."""
    most = max((run.get("others", 0.0) for run in runs), default=0.0)
    if most < _DISTURBED_CORES:
        return ""
    return f"Something else used up to {most:.1f} cores while this was measured: the figures are not to be relied on."


def text(results: Mapping[str, Any]) -> str:
    """For the terminal."""
    parts = [about(results), *[table.text() for _, table in _tables(results)]]
    for peer, reason in results["left_out"].items():
        parts.append(f"LEFT OUT: {peer}: {reason}")
    for peer, profile in results.get("profiles", {}).items():
        lines = [f"  {share:5.1f} %  {name}" for name, share in profile["own"][:15]]
        parts.append("\n".join([f"Where the time goes, {results['labels'][peer]} (own samples):", *lines]))
    if noise := disturbance(results["medians"]):
        parts.append(noise)
    problems = results["problems"]
    checked = "Checked: what was acknowledged is stored, once; what was processed is in its table."
    parts.append("\n".join(f"WRONG: {problem}" for problem in problems) if problems else checked)
    return "\n\n".join(parts)


def markdown(results: Mapping[str, Any], picture: str = "") -> str:
    """For the documentation; `picture` is the file of the picture, beside the document."""
    parts = [about(results), *[table.markdown() for _, table in _tables(results)]]
    if picture:
        parts.insert(1, f"![Acknowledged per second, and the 99th percentile]({picture})")
    if noise := disturbance(results["medians"]):
        parts.append(noise)
    parts += [f"Not measured: {peer}: {reason}" for peer, reason in results["left_out"].items()]
    return "\n\n".join(parts)


def into_document(file: Path, name: str, content: str) -> None:
    """Put `content` between the document's two markers of `name`. Raises ValueError where they are missing."""
    before = file.read_text(encoding="utf-8")
    marked = re.compile(f"(<!-- {name}:begin[^>]*-->\n).*?(<!-- {name}:end -->)", re.DOTALL)
    if not marked.search(before):
        raise ValueError(f"{file} has no place marked {name}:begin … {name}:end")
    after = marked.sub(lambda match: f"{match[1]}\n{content}\n\n{match[2]}", before)
    file.write_text(after, encoding="utf-8")

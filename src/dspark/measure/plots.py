"""The plots of a report, as SVG that takes its colours from the page, so that one drawing serves light and dark."""

import io
from collections.abc import Callable

from dspark.errors import SettingError

# name -> (light, dark); a drawing uses a stand-in for each, which becomes var(--name)
COLOURS = {
    "ink": ("#1f2328", "#e6e9ec"),
    "faint": ("#c9cfd6", "#464d55"),
    "paper": ("#ffffff", "#14171a"),
    "s0": ("#2463c4", "#79aefc"),
    "s1": ("#c2500a", "#f2984f"),
    "s2": ("#14784a", "#5fcb8e"),
    "s3": ("#7a45d6", "#bb94f7"),
    "s4": ("#c4314b", "#f5788c"),
    "s5": ("#0b7583", "#4fc6d3"),
    "s6": ("#6b6f00", "#c9cd4f"),
}
STAND_IN = {name: f"#01020{n:x}" for n, name in enumerate(COLOURS)}
SERIES = [STAND_IN[f"s{n}"] for n in range(7)]
DASHES, HATCHES = ["-", "--", ":"], ["", "////", "...."]  # of the second and third series of a colour
INK, FAINT = STAND_IN["ink"], STAND_IN["faint"]
RC: dict = {
    "svg.fonttype": "none", "text.parse_math": False, "font.size": 10, "axes.spines.top": False, "axes.spines.right": False,
    "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": INK, "xtick.color": INK, "ytick.color": INK,
    "axes.grid": True, "grid.color": FAINT, "axes.axisbelow": True, "legend.frameon": False, "axes.titlesize": 10,
}  # fmt: skip
STYLE = (
    ":root{" + "".join(f"--{name}:{light};" for name, (light, _) in COLOURS.items()) + "}"
    "@media(prefers-color-scheme:dark){:root{" + "".join(f"--{name}:{dark};" for name, (_, dark) in COLOURS.items()) + "}}"
    "body{max-width:62rem;margin:2rem auto;padding:0 1rem;font:16px/1.5 sans-serif;color:var(--ink);background:var(--paper)}"
    "pre{overflow-x:auto;font-size:12px;line-height:1.3}svg{width:100%;height:auto}"
)


def need_matplotlib() -> None:
    """Raises `SettingError` where it is not installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise SettingError(
            "--report draws with matplotlib, which is not installed", "pip install 'dspark[report]', in a checkout '.[report]'"
        ) from error


def draw(plot: Callable, data: dict, title: str) -> str:
    """One plot as an inline SVG element."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({**RC, "svg.hashsalt": title}):
        figure = Figure(layout="constrained")
        plot(figure, data)
        file = io.StringIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(file, format="svg", transparent=True, metadata=nothing)
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :].replace("<svg", f'<svg role="img" aria-label="{title}"', 1)
    for name, colour in STAND_IN.items():
        svg = svg.replace(colour, f"var(--{name})")
    return svg


def look(n: int) -> dict:
    """Of the n-th series: narrower lines and other marks than those before, so that equal ones show."""
    dashes, marker = DASHES[n // len(SERIES) % len(DASHES)], "osD^vPX"[n % 7]
    return {
        "color": SERIES[n % len(SERIES)],
        "linestyle": dashes,
        "linewidth": max(1.2, 3 - 0.45 * n),
        "marker": marker,
        "markersize": max(4, 8 - n),
    }


def acceptance(figure, data: dict) -> None:
    figure.set_size_inches(8, 3.6)
    axes = figure.subplots()
    for n, (mode, rates) in enumerate(data["acceptance"].items()):
        axes.plot(range(1, len(rates) + 1), [float("nan") if r is None else r for r in rates], label=mode, **look(n))
    axes.set(xlabel="position in the draft", ylabel="accepted, given that\nall before were (share)", ylim=(0, 1.03))
    axes.xaxis.get_major_locator().set_params(integer=True)
    legend_beside(figure, axes)


def legend_beside(figure, axes) -> None:
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper")


def bars(axes, data: dict, value: Callable[[dict], float], quartiles: Callable[[dict], list] | None) -> None:
    """One group of bars a set, one bar a mode; whiskers are quartiles over prompts."""
    modes = data["speed"]
    for n, (mode, found) in enumerate(modes.items()):
        width = 0.8 / len(modes)
        places = [place - 0.4 + width * (n + 0.5) for place in range(len(found))]
        values = [value(f) for f in found.values()]
        hatch = HATCHES[n // len(SERIES) % len(HATCHES)]
        axes.bar(
            places, values, 0.9 * width, color=SERIES[n % len(SERIES)], label=mode, hatch=hatch, edgecolor=STAND_IN["paper"], linewidth=0
        )
        if quartiles is not None:
            low, high = zip(*(quartiles(f) for f in found.values()), strict=True)
            if len(modes) < 4:  # so that it shows on any bar that is wide enough
                axes.vlines(places, low, high, color=STAND_IN["paper"], linewidth=4)
            axes.vlines(places, low, high, color=INK, linewidth=1.5)
    names = list(next(iter(modes.values())))
    axes.set_xticks(range(len(names)), names, rotation=0 if len(names) < 6 else 25, ha="center" if len(names) < 6 else "right")
    axes.grid(False, axis="x")


def speed(figure, data: dict) -> None:
    figure.set_size_inches(8, 6)
    upper, lower = figure.subplots(2, 1)
    bars(upper, data, lambda f: f["tau"], None)
    upper.set(ylabel="tau (tokens a round)")
    bars(lower, data, lambda f: f["ratio"]["median"], lambda f: f["ratio"]["quartiles"])
    lower.axhline(1, color=INK, linewidth=1, linestyle="--")
    lower.set(ylabel="speed (times plain)")
    legend_beside(figure, upper)


def saved(figure, data: dict) -> None:
    figure.set_size_inches(8, 3.4)
    axes = figure.subplots()
    bars(axes, data, lambda f: 100 * f["saved"]["median"], lambda f: [100 * each for each in f["saved"]["quartiles"]])
    axes.axhline(0, color=INK, linewidth=1)
    axes.set(ylabel="time saved (% of plain)")
    legend_beside(figure, axes)


def thresholds(figure, data: dict) -> None:
    figure.set_size_inches(8, 3.6)
    left, right = figure.subplots(1, 2)
    for n, (name, points) in enumerate(data["thresholds"].items()):
        cuts = [p["cut"] for p in points]
        rates = [float("nan") if p["acceptance"] is None else 100 * p["acceptance"] for p in points]
        left.plot(cuts, rates, label=name, **look(n))
        right.plot(cuts, [p["tau"] for p in points], **look(n))
    left.set(xlabel="least survival verified", ylabel="accepted (% of verified)", ylim=(0, 103))
    right.set(xlabel="least survival verified", ylabel="tau (tokens a round)")
    legend_beside(figure, left)


def lengths(figure, data: dict) -> None:
    figure.set_size_inches(8, 3.6)
    left, right = figure.subplots(1, 2)
    for n, (name, points) in enumerate(data["lengths"].items()):
        left.plot([p["length"] for p in points], [p["tau"] for p in points], label=name, **look(n))
        right.plot([p["length"] for p in points], [p["ratio"] for p in points], **look(n))
    right.axhline(1, color=INK, linewidth=1, linestyle="--")
    left.set(xlabel="tokens drafted and verified", ylabel="tau (tokens a round)")
    right.set(xlabel="tokens drafted and verified", ylabel="speed (times plain)")
    for axes in (left, right):
        axes.xaxis.get_major_locator().set_params(integer=True)
    legend_beside(figure, left)


def heads(figure, data: dict) -> None:
    figure.set_size_inches(8, 0.8 + 0.35 * len(data["heads"]))
    axes = figure.subplots()
    for n, head in enumerate(reversed(data["heads"].values())):
        axes.barh(n, head["tau"], color=SERIES[0])
        axes.text(head["tau"], n, f" {head['tau']:.2f}", va="center")
    names = [f"{mode}: {h['layers']} layers, block {h['block_size']}, rank {h['rank']}" for mode, h in reversed(data["heads"].items())]
    axes.set_yticks(range(len(names)), names)
    axes.set(xlabel="tau (tokens a round)")
    axes.grid(False, axis="y")


def reliability(figure, data: dict) -> None:
    found = data["reliability"]
    lines = -(-len(found) // 5)
    columns = -(-len(found) // lines)
    figure.set_size_inches(8, 0.9 + 2.1 * lines)
    grid = figure.subplots(lines, columns, squeeze=False)
    most = max((b["rounds"] for f in found for b in f["bins"]), default=1)
    for axes, f in zip(grid.flat, found, strict=False):
        axes.plot([0, 1], [0, 1], color=INK, linewidth=1, linestyle="--")
        for n, (name, each) in enumerate({"calibrated": f, **({"before": f["before"]} if "before" in f else {})}.items()):
            estimates, frequencies = [b["estimate"] for b in each["bins"]], [b["frequency"] for b in each["bins"]]
            axes.plot(estimates, frequencies, linewidth=1, color=SERIES[n], linestyle=DASHES[n], label=name)
            axes.scatter(estimates, frequencies, s=[(8 + 80 * b["rounds"] / most) / (1 + n) for b in each["bins"]], color=SERIES[n])
        errors = [f"{each['ece']:.1%}" for each in (f.get("before"), f) if each and each["ece"] is not None]
        error = f"\nECE {' -> '.join(errors)}" if errors else ""
        axes.set(title=f"position {f['position']}\n{f['rounds']} rounds{error}", xlim=(0, 1.03), ylim=(0, 1.03), aspect="equal")
        axes.set_xticks([0, 0.5, 1]), axes.set_yticks([0, 0.5, 1])
    for axes in list(grid.flat)[len(found) :]:
        axes.remove()
    figure.supxlabel("estimated chance that the first tokens all stand", fontsize=10)
    figure.supylabel("how often they did (share)", fontsize=10)
    if any("before" in f for f in found):
        legend_beside(figure, grid.flat[0])


def concurrency(figure, data: dict) -> None:
    figure.set_size_inches(8, 6.6)
    for part, (title, found) in zip(figure.subfigures(2, 1), data["concurrency"].items(), strict=True):
        part.suptitle(title, fontsize=10)
        left, right = part.subplots(1, 2)
        plain = {f["requests"]: f["tokens_per_second"] for f in found if f["plan"] == "plain"}
        for n, plan in enumerate(dict.fromkeys(f["plan"] for f in found)):
            mine = [f for f in found if f["plan"] == plan]
            counts = [f["requests"] for f in mine]
            left.plot(counts, [f["budget"] for f in mine], label=plan, **look(n))
            right.plot(counts, [f["tokens_per_second"] / plain[f["requests"]] for f in mine], **look(n))
        left.set(ylabel="budget (verified drafts\na request and step)")
        right.set(ylabel="throughput (times plain)", ylim=(0, None))
        for axes in (left, right):
            axes.set(xlabel="requests that share a step", xscale="log")
            axes.set_xticks(sorted(plain), [str(n) for n in sorted(plain)])
            axes.minorticks_off()
        part.legend(*left.get_legend_handles_labels(), loc="outside right upper")


PLOTS = [
    ("Acceptance by position", "Measured; the paper's figure 2. A plan that cuts drafts chooses which positions are judged: compare modes @fixed.", acceptance),
    ("Tau and speed by set", "Measured, modes taking turns prompt by prompt. Bars of speed are medians over prompts, whiskers quartiles.", speed),
    ("Net time saved by set", "Measured: 1 - 1 / speed. Below zero speculation costs time.", saved),
    ("Verifying only what is likely to stand", "Replayed from recorded rounds; the paper's figure 5. Survival is the product of confidences.", thresholds),
    ("Drafting fewer tokens", "Replayed from recorded rounds with this machine's costs; the paper's figure 4. Every draft is cut at this length.", lengths),
    ("Heads", "Measured, the modes that draft with a head alone; the paper's figures 3 and 4 are such rows: heads of other depths and blocks take part by --other.", heads),
    ("Reliability of confidences", "Recorded rounds, calibrated and as the head gave them; the paper's figure 6. By how many tokens: the product of confidences, and how often all stood. Dots grow with rounds; right estimates lie on the dashed line.", reliability),
    ("Requests that share a step", "Replayed from recorded rounds, with costs from tables; the paper's figure 8. The default planner is auto, Algorithm 1 is early-stop. How it is done: docs/replay.md.", concurrency),
]  # fmt: skip

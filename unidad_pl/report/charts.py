"""The plots of the page, each with a line that says what a healthy one looks like."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from unidad_pl.report.curves import Curve
from unidad_pl.report.folder import HIGHER, LOWER, Run

POINTS, HEIGHT = 1000, 340
DASHES = ("solid", "dot", "dash", "longdash", "dashdot", "longdashdot")
SYMBOLS = ("circle", "square", "diamond", "cross", "x", "triangle-up")
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#6a3d9a", "#8c564b")
UNKNOWN = "No rule is known for this one: compare it between runs."


@dataclass(frozen=True)
class Topic:
    """What belongs into one plot.

    >>> Topic("loss", r"loss/.*", "falls").matches("loss/denoising")
    True

    Attributes:
        title: heading.
        pattern: of the names of its curves, whole.
        healthy: what it looks like where nothing is wrong.
        direction: of a metric: whether lower or higher values are better; None: neither.
    """

    title: str
    pattern: str
    healthy: str
    direction: str | None = None

    def matches(self, name: str) -> bool:
        """Whether a curve belongs here."""
        return re.fullmatch(self.pattern, name) is not None


TRAINING = (
    Topic("Losses of the student G", r"loss/(dmd_\w+|student_adversarial)",
          "The losses of G and D do not fall: that is how it should be. Each is measured by networks that move too: a "
          "healthy curve soon finds its level and wobbles around it. Not healthy: one that grows without end."),
    Topic("Losses of the fake score F and the discriminator D", r"loss/(fake|critic)",
          "F has to follow G: its loss stays level while G changes. With bce the loss of D is 1.39 where it cannot "
          "tell real from fake; healthy is somewhat below that. Not healthy: D near 0 for long, it has won."),
    Topic("How often D is right", r"critic/accuracy",
          "Between 0.55 and 0.95. At 0.5 D sees no difference and G learns nothing from it; at 1 for long it knows the "
          "shots by heart, and pulls G onto them: lower gan.student_weight, or judge at more noise."),
    Topic("Loss of the target teacher T", r"loss/target",
          "An ordinary denoising loss: it falls fast, then slowly, and ends where the adaptation does. One that is "
          "still falling steeply there stopped too early; one that falls for very long learns the shots by heart."),
    Topic("Denoising loss", r"loss/denoising",
          "Falls fast, then slowly, and noisy throughout: each batch has other noise levels."),
    Topic("Gradient of each term on G's images", r"balance/(?!.*_share$).*",
          "All of one order of magnitude, level or slowly falling. A term that is a hundred times smaller than the "
          "others has no say, whatever its loss; one that outgrows the others decides alone."),
    Topic("Share of each term in the gradient", r"balance/.*_share",
          "No term near 0, none near 1. The adversarial one should not lead: matching draws the picture, D corrects."),
    Topic("Gradient norms of the networks, before clipping", r"grad_norm/.*",
          "Level, with peaks of a few times that. A steady climb over hundreds of iterations comes before divergence: "
          "lower that network's learning rate."),
    Topic("Skipped updates", r"skipped_in_all/.*",
          "None, or a few at the start in 16-mixed. More of them: a loss or gradient was not finite, train in 32-true "
          "or bf16-mixed, or at a lower learning rate."),
    Topic("Cost of training", r"cost/tflops", "A straight line, with a bend where a network begins or ends to train."),
)  # fmt: skip
"""What is logged in training."""

METRICS = (
    Topic("Frechet distance", r"(?!.*_(kid|swd|precision|recall|density|coverage)$)fid\w*",
          "Falls fast, then slowly. One that rises again for several evaluations has passed its best: take the "
          "checkpoint at the star. Compare only with equal numbers of samples and references.", LOWER),
    Topic("Kernel distance", r"(\w+_)?kid",
          "As the Frechet distance, and unbiased: it may end slightly below 0.", LOWER),
    Topic("Sliced Wasserstein distance", r"(\w+_)?swd",
          "Falls with the Frechet distance; sees more of the tails.", LOWER),
    Topic("Precision and recall", r"(\w+_)?(precision|recall)",
          "Both rise. Precision up while recall falls: samples are good and alike, diversity is being lost.", HIGHER),
    Topic("Density and coverage", r"(\w+_)?(density|coverage)",
          "Both rise. Density above 1 with low coverage: samples crowd around few references.", HIGHER),
    Topic("Diversity within clusters", r"intra\w*(?<!_relative)(?<!_memorised)(?<!_empty_clusters)",
          "Falls at first, as samples leave the source domain, then stays level. One that falls to the end becomes "
          "copies of the shots.", HIGHER),
    Topic("Diversity and distance to the shots, relative to the reference", r"(\w+_)?(intra\w*|nearest)_relative",
          "Towards 1: as diverse, and as far from the shots, as other images of the domain. Well below it: copies."),
    Topic("Memorised share", r"(\w+_)?memorised", "0, or what the reference images have themselves.", LOWER),
    Topic("Clusters without a sample", r"(\w+_)?empty_clusters",
          "Falls to 0, or stays at a few: shots that nothing is like are modes that were lost.", LOWER),
    Topic("Share of samples with the attribute", r"share/.*", "Rises to what the domain has.", HIGHER),
    Topic("Distance of each factor's distribution", r"distance/.*", "Each falls towards what two halves of the "
          "reference are apart. One that stays high is a factor the samples do not vary as they should.", LOWER),
    Topic("Likeness to the subject and to the prompts", r"(clip_i|clip_t|dino)\w*",
          "CLIP-I and DINO rise; CLIP-T may fall a little. CLIP-T that goes on falling: prompts are no longer heard."),
)  # fmt: skip
"""What evaluations measure."""


@dataclass
class Chart:
    """A plot and what to look for in it.

    >>> Chart("loss", "falls", "<div></div>").title
    'loss'
    """

    title: str
    healthy: str
    html: str


def training_charts(runs: Sequence[Run]) -> list[Chart]:
    """Everything that was logged while the runs trained; what no topic claims has its own plot."""
    names = {name for run in runs for name in run.logged.curves if not name.startswith(("val/", "test/", "skipped/"))}
    return _charts(sorted(names - {"epoch", "hp_metric"}), TRAINING, lambda name: [
        (run, run.logged.curves[name]) for run in runs if name in run.logged.curves], runs)  # fmt: skip


def metric_charts(runs: Sequence[Run]) -> list[Chart]:
    """Metrics of the evaluations in training over iterations, or TFLOPs where they were counted; the best is a star."""
    found = [(run, run.metrics()) for run in runs]
    names = list(dict.fromkeys(name for _, metrics in found for name in metrics))
    return _charts(names, METRICS, lambda name: [
        (run, metrics[name]) for run, metrics in found if name in metrics], runs, evaluations=True)  # fmt: skip


def _charts(
    names: Sequence[str], topics: Sequence[Topic], of: Callable[[str], list[tuple[Run, Curve]]], runs: Sequence[Run],
    evaluations: bool = False,
) -> list[Chart]:  # fmt: skip
    charts, left = [], list(names)
    for topic in topics:
        if own := [name for name in left if topic.matches(name)]:
            left = [name for name in left if name not in own]
            charts.append(_chart(topic, own, of, runs, evaluations))
    return charts + [_chart(Topic(name, "", UNKNOWN), [name], of, runs, evaluations) for name in left]


def _chart(
    topic: Topic, names: Sequence[str], of: Callable[[str], list[tuple[Run, Curve]]], runs: Sequence[Run],
    evaluations: bool,
) -> Chart:  # fmt: skip
    import plotly.graph_objects as go

    figure, costs = go.Figure(), []
    for number, name in enumerate(names):
        for run, whole in of(name):
            curve, place = whole.thinned(max(100, POINTS // len(runs))), runs.index(run)
            label = escape(name.partition("/")[2] or name) + (f", {escape(run.name)}" if len(runs) > 1 else "")
            colour = COLOURS[(number if len(names) > 1 else place) % len(COLOURS)]
            look: dict[str, Any] = {"color": colour, "dash": DASHES[place % len(DASHES)]}
            extra: dict[str, Any] = {"mode": "lines"}
            if evaluations:
                extra = {"mode": "lines+markers", "marker": _markers(run, curve, place)}
            figure.add_scatter(x=curve.steps, y=curve.values, name=label, line=look | {"width": 1.5}, **extra)
            tflops = run.tflops()
            costs.append([tflops.get(step) for step in curve.steps])
    whether = evaluations and any(cost is not None for of_curve in costs for cost in of_curve)
    figure.update_layout(
        template="plotly_white", height=HEIGHT, margin={"l": 50, "r": 12, "t": 40 if whether else 12, "b": 40},
        legend={"orientation": "h", "y": -0.3, "x": 0}, hovermode="x unified", showlegend=True,
        xaxis={"title": {"text": "iterations", "standoff": 4}, "automargin": True}, yaxis={"automargin": True},
        updatemenus=[_axis_buttons(figure, costs)] if whether else [],
    )  # fmt: skip
    html = figure.to_html(full_html=False, include_plotlyjs=False, default_width="100%", default_height=f"{HEIGHT}px",
                          config={"responsive": True, "displaylogo": False, "displayModeBar": False})  # fmt: skip
    better = f" ({'lower' if topic.direction == LOWER else 'higher'} is better)" if topic.direction else ""
    return Chart(topic.title + better, topic.healthy, html)


def _markers(run: Run, curve: Curve, place: int) -> dict[str, Any]:
    best = run.best()
    starred = [best is not None and step == best[1] for step in curve.steps]
    symbol = SYMBOLS[place % len(SYMBOLS)]
    return {"symbol": ["star" if one else symbol for one in starred], "size": [15 if one else 6 for one in starred]}


def _axis_buttons(figure: Any, costs: list[list[float | None]]) -> dict[str, Any]:
    axes = {"iterations": [list(trace.x) for trace in figure.data], "TFLOPs": costs}
    buttons = [
        {"label": label, "method": "update", "args": [{"x": xs}, {"xaxis.title.text": label}]}
        for label, xs in axes.items()
    ]
    return {"type": "buttons", "direction": "right", "buttons": buttons, "x": 0, "y": 1.02, "xanchor": "left",
            "yanchor": "bottom", "pad": {"t": 0, "b": 2}}  # fmt: skip

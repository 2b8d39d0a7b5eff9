"""HTML pages that open from disk: what the reports share.

A page loads nothing from outside and runs no script but those named by their hash in its content security policy,
so that a title or a completion, escaped by the template besides, can never run.
"""

import base64
import hashlib
import json
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from rerank.launch.files import write_text

Chart = dict[str, Any]  # title, data and layout, as the page's script draws them
MAX_POINTS = 500  # of a line
COLOURS = ("#3f8fd6", "#e07b2c", "#2f9e6b", "#c4569b", "#8b78d8", "#a08a3c")  # legible on light and on dark
STEPS = {"title": {"text": "step"}}  # an axis
FROM_ZERO = {"rangemode": "tozero"}


def write(
    path: str | Path, template: str, charts: Sequence[Chart], extra_scripts: Sequence[str] = (), **values: object
) -> None:
    """Fill a template and write it, whole or not at all; every value that is not a script of ours is escaped.

    Args:
        path: The page's.
        template: File of this folder.
        charts: Drawn by charts.js.
        extra_scripts: Further files of this folder, in order.
        **values: Of the template.
    """
    environment = Environment(loader=PackageLoader("rerank.report", "."), autoescape=True, undefined=StrictUndefined)
    own = [files("rerank.report").joinpath(name).read_text(encoding="utf-8") for name in ("charts.js", *extra_scripts)]
    scripts = [get_plotlyjs(), *own]
    hashes = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    policy = " ".join(f"'sha256-{digest}'" for digest in hashes)
    text = environment.get_template(template).render(
        charts=json_text(charts), scripts=[Markup(script) for script in scripts], policy=policy, **values
    )
    write_text(path, text)


def json_text(value: object) -> Markup:
    """Compact JSON for a `<script type="application/json">`, which nothing in it can end."""
    return Markup(json.dumps(value, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c"))


def chart(figure: go.Figure, title: str, **axes: object) -> Chart:
    """A figure as the page's script draws it; colours of text and grid are the page's.

    MAX_POINTS of a longer line remain, the last one among them, so that a long run's page stays small.
    """
    for line in figure.data:
        if len(line.x) > MAX_POINTS:
            places = [round(place * (len(line.x) - 1) / (MAX_POINTS - 1)) for place in range(MAX_POINTS)]
            line.update(x=[line.x[place] for place in places], y=[line.y[place] for place in places])
    legend = {"orientation": "h", "yref": "container", "y": 0, "yanchor": "bottom"}  # below the title of the axis
    figure.update_layout(template="none", height=360, margin={"l": 50, "r": 20, "t": 20, "b": 40}, legend=legend)
    figure.update_layout(showlegend=len(figure.data) > 1, colorway=COLOURS, **axes)
    return {"title": title, **json.loads(figure.to_json())}

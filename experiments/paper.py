"""What the paper published, for laying measured and simulated points beside it.

``paper_results.csv`` holds one point a row, from P. Moritz et al., "Ray: A Distributed Framework for Emerging AI
Applications", OSDI 2018. Its last column tells figures stated in the text from figures read off a plot, which are good
to about 3 %.
"""

import csv
from importlib.resources import files

from trio_ray.experiments.results import Point


def published(experiment: str, scale: float = 1.0) -> list[Point]:
    """The paper's points of one experiment, each ``y`` times ``scale`` (to change units)."""
    text = (files(__package__) / "paper_results.csv").read_text(encoding="utf-8")
    return [
        Point(series=row["series"], world="paper", x=float(row["x"]), y=float(row["y"]) * scale)
        for row in csv.DictReader(text.splitlines())
        if row["experiment"] == experiment
    ]

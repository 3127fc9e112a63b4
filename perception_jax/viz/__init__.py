"""Pictures by Pillow, charts by matplotlib, and the self-contained HTML report.

The contact sheet is `viz.grid.grid`.
"""

from perception_jax.viz import colormap, grid
from perception_jax.viz.blocks import ImageCard, Metric, heat_table
from perception_jax.viz.charts import Bar, bar_chart, line_chart
from perception_jax.viz.html_report import Report
from perception_jax.viz.overlay import draw_boxes, draw_masks, heatmap

__all__ = [
    "Bar",
    "ImageCard",
    "Metric",
    "Report",
    "bar_chart",
    "colormap",
    "draw_boxes",
    "draw_masks",
    "grid",
    "heat_table",
    "heatmap",
    "line_chart",
]

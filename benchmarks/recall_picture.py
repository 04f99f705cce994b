"""The recall benchmark as a table of colours: a row per model, a column per test."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib.pyplot as plt

CHANCE = {"parity_256": 0.5}  # elsewhere near 0
TITLES = {
    "mqar_easy": "MQAR\n4 pairs",
    "mqar_hard": "MQAR\n16 pairs",
    "parity_256": "parity, 256 bits\n(trained on 40)",
}


def draw(
    found: Mapping[str, Mapping[str, tuple[float, float, float]]], tests: Sequence[str], heading: str, path: Path
) -> None:
    """found: model to test to accuracy and its interval. Colours run from chance to 1."""
    names = sorted(found, key=lambda name: (-found[name].get(tests[1], (0.0,))[0], name))
    figure, axes = plt.subplots(figsize=(6.5, 0.32 * len(names) + 1.6))
    colours = plt.get_cmap("Blues")
    for row, name in enumerate(names):
        for column, test in enumerate(tests):
            if test not in found[name]:
                continue
            value, low, high = found[name][test]
            chance = CHANCE.get(test, 0.0)
            strength = max(0.0, (value - chance) / (1 - chance))
            axes.add_patch(plt.Rectangle((column, row), 1, 1, facecolor=colours(0.9 * strength), edgecolor="white"))
            ink = "white" if strength > 0.6 else "black"
            axes.text(column + 0.46, row + 0.5, f"{value:.2f}", ha="right", va="center", color=ink, fontsize=9)
            axes.text(column + 0.54, row + 0.5, f"[{low:.2f}, {high:.2f}]", va="center", color=ink, fontsize=6)
    axes.set_xlim(0, len(tests))
    axes.set_ylim(len(names), 0)
    axes.set_xticks([column + 0.5 for column in range(len(tests))], [TITLES[test] for test in tests])
    axes.set_yticks([row + 0.5 for row in range(len(names))], names, fontsize=9)
    axes.tick_params(length=0, top=True, labeltop=True, bottom=False, labelbottom=False)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.set_xlabel(f"Accuracy and its 95 % interval. {heading}", fontsize=6, labelpad=8)
    figure.savefig(path, dpi=130, bbox_inches="tight")
    plt.close(figure)

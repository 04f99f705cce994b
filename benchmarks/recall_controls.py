"""What the recall benchmark must show, or something is wrong with a mixer or with the benchmark itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

SOLVES, BEHIND, TRACKS, CHANCE = 0.98, 0.1, 0.95, 0.6


class Control(NamedTuple):
    """A claim, whether it held over all seeds measured, and the figures."""

    claim: str
    verdict: Literal["holds", "FAILS", "not measured"]
    told: str


def controls(rows: Mapping[tuple[str, str, int], dict[str, Any]]) -> list[Control]:
    """rows: (model, task, seed) to a row of ``recall_training.measure``."""

    def of(model: str, test: str) -> list[float]:
        """Accuracies, one per seed."""
        found = [row["results"] for (name, _, _), row in rows.items() if name == model]
        return [results[test]["accuracy"] for results in found if test in results]

    def verdict(held: bool, *figures: list[float]) -> Literal["holds", "FAILS", "not measured"]:
        return "not measured" if not all(figures) else "holds" if held else "FAILS"

    def told(**figures: list[float]) -> str:
        return "; ".join(f"{name} {' '.join(f'{value:.3f}' for value in values)}" for name, values in figures.items())

    easy, hard = of("attention", "mqar_easy"), of("attention", "mqar_hard")
    retnet, gated = of("retnet", "mqar_hard"), of("gated_deltanet", "mqar_hard")
    signed = {name: of(name, "parity_256") for name in ("deltanet_signed", "lrnn")}
    positive = {name: of(name, "parity_256") for name in ("gla", "mamba2")}
    highest = max((max(values) for values in positive.values() if values), default=1.0)
    best = max((min(values) for values in signed.values() if values), default=0.0)
    return [
        Control(
            f"attention solves MQAR, at least {SOLVES}",
            verdict(min(easy + hard, default=0.0) >= SOLVES, easy, hard),
            told(easy=easy, hard=hard),
        ),
        Control(
            f"RetNet is at least {BEHIND} behind Gated DeltaNet on the harder MQAR, at equal state",
            verdict(max(retnet, default=0.0) + BEHIND <= min(gated, default=0.0), retnet, gated),
            told(retnet=retnet, gated_deltanet=gated),
        ),
        Control(
            f"a signed recurrence follows parity, at least {TRACKS} at 256 bits after 40",
            verdict(best >= TRACKS, *signed.values()),
            told(**signed),
        ),
        Control(
            f"transitions in (0, 1) do not, at most {CHANCE}",
            verdict(highest <= CHANCE, *positive.values()),
            told(**positive),
        ),
    ]

"""The section on the mixture: counts are those of the order of data, and nothing in a log becomes markup."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmtrain.data.order.sampler import Sampler
from lmtrain.data.order.schedule import AddedSource, Event, ScheduleLog, event_line
from lmtrain.report.mixture import Mixture, bins, blocks_read, mixture, mixture_figure
from lmtrain.report.page import write_report
from lmtrain.report.record import read_record
from tests.report.test_page import HOSTILE, Page

BEGUN = Event(0, "recipe", "data.sources.*.weight", {"code": 3, "prose": 1})
EVEN = Event(16, "user", "less code [control/mix.yaml 0123456789abcdef]", {"code": 1, "prose": 1}, step=7)
SKIP = Event(32, "user", "bad pages", skip=8, step=14)


@st.composite
def logs(draw: st.DrawFn) -> tuple[list[Event], int]:
    """Events that change weights, skip and add sources, in any order of blocks, and how many blocks are read."""
    end = draw(st.integers(1, 400))
    weight = st.integers(1, 7)
    events = [Event(0, "recipe", "", {"a": draw(weight), "b": draw(weight)})]
    for number in range(draw(st.integers(0, 5))):
        weights = draw(st.dictionaries(st.sampled_from("ab"), weight, max_size=2))
        added = {f"new{number}": AddedSource("x", "0")} if draw(st.booleans()) else {}
        skip = draw(st.integers(0, 20)) or (0 if weights or added else 1)
        weights |= {name: draw(weight) for name in added if weights}
        events.append(Event(draw(st.integers(0, end + 20)), "user", "", weights, skip, added))
    return events, end


def sampler_of(events: list[Event]) -> Sampler:
    names = ["a", "b", *(name for event in events for name in event.sources)]
    return Sampler(3, ScheduleLog(events), dict.fromkeys(names, 1))


@settings(max_examples=150, deadline=None)
@given(logs())
def test_counts_are_those_of_every_block(case: tuple[list[Event], int]) -> None:
    events, end = case
    sampler, edges = sampler_of(events), bins(events, end)
    assert edges[0] == 0 and edges[-1] == end and (np.diff(edges) > 0).all()
    source = sampler.get(np.arange(end))[0]
    expected = [np.bincount(source[a:b], minlength=len(sampler.names)) for a, b in itertools.pairwise(edges)]
    np.testing.assert_array_equal(blocks_read(sampler, events, edges), expected)


def test_bins_begin_where_events_do() -> None:
    events = [BEGUN, Event(1003, "user", "", {"code": 1}), Event(5, "user", "", {"prose": 1})]
    edges = bins(events, 4800)
    assert len(edges) == 121 and {1003} <= set(edges.tolist()) and 5 not in edges
    assert list(bins(events, 1)) == [0, 1]


def told(run_dir: Path, *events: Event) -> Mixture | None:
    """The section of the stored run (24 steps of two blocks of 64 tokens) with these events."""
    (run_dir / "schedule.jsonl").write_bytes(b"".join(map(event_line, events)))
    return mixture(read_record(run_dir))


def add_to_last_row(run_dir: Path, **values: float) -> None:
    lines = (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    place = max(number for number, line in enumerate(lines) if '"kind":"step"' in line)
    lines[place] = json.dumps(json.loads(lines[place]) | values)
    (run_dir / "metrics.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def test_the_table_of_sources_by_hand(run_dir: Path) -> None:
    # read: 12 + 4 blocks, then 8 + 8, then 8 + 8; skipped: 4 + 4
    consumed = {"source_tokens.code": 32 * 64, "source_tokens.prose": 24 * 64}
    add_to_last_row(run_dir, **consumed, **{"source_epochs.code": 2.0, "source_epochs.prose": 0.5})
    made = told(run_dir, BEGUN, EVEN, SKIP)
    assert made is not None
    worth = 1024 + 1024 * 15.39 * (1 - math.exp(-0.75 / 15.39))
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = {row["step"]: row for row in rows if row["kind"] == "step"}
    last = {name: np.mean([steps[step][f"source_loss.{name}"] for step in range(15, 25)]) for name in ("code", "prose")}
    assert made.sources.rows == [
        ["code", "1,792", "58.3%", "2.00", f"{worth:,.0f}", f"{last['code']:.3f}", "unknown"],
        ["prose", "1,280", "41.7%", "0.500", "1,280", f"{last['prose']:.3f}", "unknown"],
    ]
    assert worth == pytest.approx(1773.6, abs=0.1)
    assert made.figure.caption.startswith("Of 3,072 tokens code had the most, 58%: 75% at the start, 50% at the end")
    assert [(name, value) for _, name, value in made.figure.legend] == [
        ("code", "58.3%"), ("prose", "41.7%"), ("a person", "1"), ("blocks skipped", "1"),
    ]  # fmt: skip
    assert [row[0] + ": " + row[-1] for row in made.events.rows] == [
        "1\N{NO-BREAK SPACE}recipe: data.sources.*.weight",
        "2\N{NO-BREAK SPACE}user: less code (control/mix.yaml)",
        "3\N{NO-BREAK SPACE}user: bad pages",
    ]
    assert "from token 1,024 on: code 0.5, prose 0.5" in made.events.rows[1][1]
    assert "Bits per byte need the text behind a token: none is here for code and prose." in made.notes


def test_an_old_run_has_its_figure(run_dir: Path) -> None:
    old = event_line(BEGUN).replace(b'"format_version": 2', b'"format_version": 1')
    (run_dir / "schedule.jsonl").write_bytes(old)
    text = Page(write_report(run_dir)).text
    assert "Realised mixture" in text and "unknown" in text and "made after step" not in text


def test_a_run_of_one_source_shows_nothing_new(run_dir: Path) -> None:
    assert told(run_dir, Event(0, "recipe", "", {"code": 1})) is None
    made = told(run_dir, Event(0, "recipe", "", {"code": 1}), SKIP)
    assert made is not None and [row[1] for row in made.sources.rows] == ["3,072", "0"]


def test_a_policy_that_failed_is_told(run_dir: Path) -> None:
    path = run_dir / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    failed = next(row for row in rows if row["kind"] == "step")
    failed["policy_error"] = "policy ado failed: KeyError"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    made = told(run_dir, BEGUN, EVEN)
    assert made is not None and made.notes[-1] == f"Step {failed['step']}: policy ado failed: KeyError."


@pytest.mark.parametrize(
    ("log", "remark"),
    [
        (b"not an event\n", "The mixture is left out: {run}/schedule.jsonl:1: not a schedule event"),
        (
            event_line(Event(0, "recipe", "", {"coda": 1, "prose": 1})),
            "schedule.jsonl does not fit recipe.yaml: schedule: unknown source coda; did you mean code?",
        ),
    ],
)
def test_damage_is_told(run_dir: Path, log: bytes, remark: str) -> None:
    (run_dir / "schedule.jsonl").write_bytes(log)
    text = Page(write_report(run_dir)).text
    assert remark.format(run=run_dir) in text and "Realised mixture" not in text


def test_events_are_marked_by_kind_and_those_ahead_are_told(run_dir: Path) -> None:
    added = {"news": AddedSource("s3://me:sesame@bucket/news", "0")}
    events = [BEGUN, Event(8, "policy", "", {"code": 2, "prose": 1}), SKIP, Event(20, "user", "", {}, 0, added)]
    made = told(run_dir, *events, Event(48, "user", "later", {"news": 1}))
    assert made is not None
    assert [(style, told) for style, told, _ in made.figure.legend[3:]] == [
        ("event policy", "the policy"), ("event added", "a new source"), ("event skip", "blocks skipped"),
    ]  # fmt: skip
    assert made.figure.svg.count('class="event ') == 3 and "Ahead of what has been read: event 5." in made.notes
    assert "sesame" not in Page(write_report(run_dir)).source


def test_a_policy_of_many_events_has_ticks(run_dir: Path) -> None:
    proposals = [Event(20 + k, "policy", "", {"code": 1 + k % 2, "prose": 1}) for k in range(20)]
    made = told(run_dir, BEGUN, EVEN, *proposals, SKIP)
    assert made is not None
    assert [row[0][2:] for row in made.events.rows] == ["recipe", "user", "user"]
    assert "Not listed, and ticks in the figure: 20 by the policy." in made.notes
    assert made.figure.svg.count('class="event policy"') == 20 and made.figure.svg.count('class="note') == 2


def test_hostile_events_are_inert(run_dir: Path) -> None:
    source = {HOSTILE: AddedSource(HOSTILE, HOSTILE)}
    first = Event(16, HOSTILE, HOSTILE, {HOSTILE: 1, "code": 1}, 0, source)
    assert told(run_dir, BEGUN, first) is not None
    page = Page(write_report(run_dir))
    assert not {"script", "img"} & set(page.tags) and not [name for name, _ in page.attributes if name.startswith("on")]
    assert page.text.count("<script>alert(1)</script>") > 5


def test_the_figure_serves_a_plan_too() -> None:
    figure = mixture_figure([BEGUN], Sampler(0, ScheduleLog([BEGUN]), {"code": 1, "prose": 1}), 64, 10**9)
    assert "64.0 billion tokens code had the most, 75%" in figure.caption and figure.svg.count("<polygon") == 2

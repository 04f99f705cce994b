"""The command line of launch/schedule.py: shows the mixture of a run over its tokens, and changes it."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import yaml

from lmtrain.checkpoint.lock import RunLock, holder
from lmtrain.config.load import load
from lmtrain.config.recipe import Recipe
from lmtrain.data.loader import Loader
from lmtrain.data.order.mix_request import MixRequest, located
from lmtrain.data.order.runs import block_order
from lmtrain.data.order.sampler import Sampler
from lmtrain.data.order.schedule import Event, ScheduleLog
from lmtrain.errors import EXIT_DONE, LmtrainError, StorageError, UsageError, nearest
from lmtrain.pretrain.log import METRICS, SCHEDULE, last_step
from lmtrain.pretrain.plan import policy_of
from lmtrain.train.mixture import admit_to_end, after_proposals, describe, first_unrecorded
from lmtrain.train.request_file import REQUEST

BAR, ROWS = 60, 24
HOLDER = "schedule"
"""Who has the lock of a run that does not train while its log is changed."""
ARGUMENT = "arguments."
LETTERS = "abcdefghijklmnopqrstuvwxyz"


@dataclass(frozen=True)
class Run:
    """A run folder: its recipe and its log."""

    path: Path
    recipe: Recipe
    log: ScheduleLog

    @classmethod
    def open(cls, path: Path) -> Run:
        if not (path / "recipe.yaml").exists() or not (path / SCHEDULE).exists():
            runs = [found.parent.name for found in path.parent.glob(f"*/{SCHEDULE}")]
            raise UsageError(f"{path}: no run here{nearest(path.name, runs)}")
        return cls(path, load([f"recipe={path / 'recipe.yaml'}"]).recipe, ScheduleLog.read(path / SCHEDULE))

    @property
    def block_tokens(self) -> int:
        return self.recipe.data.block_length

    @property
    def total_tokens(self) -> int:
        return self.recipe.train.schedule_of(self.recipe.data).tokens(self.recipe.train.num_steps(self.recipe.data))

    def sampler(self) -> Sampler:
        """Of the log alone: shares and counts, without the data."""
        data = self.recipe.data
        names = [*data.sources, *(name for event in self.log.events for name in event.sources)]
        sizes = dict.fromkeys(names, data.run_blocks)  # shares and counts do not depend on them
        return block_order(0, self.log, sizes, self.recipe.train.schedule_of(data))

    def loader(self) -> Loader:
        """Of the run's data, which it opens and checks."""
        data, train = self.recipe.data, self.recipe.train
        return Loader(
            data,
            seed=self.recipe.seed,
            batch_tokens=train.batch_tokens,
            batch_ramp=train.batch_ramp,
            microbatch=data.block_length // data.seq_len,
            dp_rank=0,
            dp_size=1,
            log=self.log,
        )


def main(argv: list[str], doc: str) -> int:
    """Run the command line ``argv``; the exit code. ``doc``: what --help prints."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    try:
        if not argv or {"--help", "-h", "help"} & set(argv):
            print(doc.rstrip())
            return EXIT_DONE
        verb, *words = argv
        if verb not in VERBS:
            raise UsageError(f"{verb}: unknown verb{nearest(verb, VERBS)}")
        folders = [word for word in words if "=" not in word or Path(word).is_dir()]
        if len(folders) != 1:
            raise UsageError(f"expected one run folder, got {len(folders)}: {', '.join(folders) or 'none'}")
        given = dict(word.split("=", 1) for word in words if word not in folders)
        if len(given) != len(words) - 1:
            raise UsageError("a key is given twice")
        print(VERBS[verb](Run.open(Path(folders[0])), given))
    except LmtrainError as error:
        print(f"schedule: {error}", file=sys.stderr)
        return error.exit_code
    return EXIT_DONE


def _show(run: Run, given: dict[str, str]) -> str:
    _only(given)
    lines = []
    for event in run.log.events:
        made = "" if event.origin == "recipe" else f" (made after step {event.step})"
        reason = f": {event.reason}" if event.reason else ""
        lines.append(f"{event.origin:6}  {describe(event, run.block_tokens)}{made}{reason}")
    return "\n".join(lines)


def _plot(run: Run, given: dict[str, str]) -> str:
    """The share of every source over the run's tokens, as bars of letters."""
    _only(given)
    sampler, total = run.sampler(), run.total_tokens
    letters = {name: LETTERS[i % len(LETTERS)] for i, name in enumerate(sampler.names)}
    bars: dict[int, str] = {}
    for token in (total * row // ROWS for row in range(ROWS)):
        ends, filled = 0.0, ""
        for name, share in sampler.shares(token // run.block_tokens).items():
            ends += share
            filled += letters[name] * (round(ends * BAR) - len(filled))
        bars[token] = filled
    lines = ["  ".join(f"{letter}: {name}" for name, letter in letters.items())]
    for bar, rows in groupby(bars.items(), key=lambda row: row[1]):
        first, *same = (token for token, _ in rows)
        lines.append(f"{first:16,}  {bar}")
        lines += [f"{'':16}  the same up to {same[-1]:,}"] if same else []
    return "\n".join(lines)


def _set(run: Run, given: dict[str, str]) -> str:
    weights = _sources(given, "weights", "at", "reason")
    if not weights:
        raise UsageError("set: expected SOURCE=SHARE, got none")
    return _request(run, {"weights": weights}, given)


def _skip(run: Run, given: dict[str, str]) -> str:
    _only(given, "tokens", "at", "reason")
    if "tokens" not in given:
        raise UsageError("skip: how much? give tokens=2e6")
    return _request(run, {"skip": given["tokens"]}, given)


def _add(run: Run, given: dict[str, str]) -> str:
    arguments = {key.removeprefix(ARGUMENT): value for key, value in given.items() if key.startswith(ARGUMENT)}
    places = _sources(given, "add", "share", "at", "reason", *(f"{ARGUMENT}{name}" for name in arguments))
    if len(places) != 1:
        raise UsageError(f"add: expected one SOURCE=PATH or SOURCE=package.module:function, got {len(places)}")
    # the run may have another working folder
    wanted: dict[str, object] = {"add": {name: located(where) for name, where in places.items()}}
    if arguments:
        wanted["arguments"] = {f"{name}.{argument}": arguments[argument] for name in places for argument in arguments}
    if "share" in given:
        wanted["weights"] = dict.fromkeys(places, given["share"])
    return _request(run, wanted, given)


VERBS: dict[str, Callable[[Run, dict[str, str]], str]] = {
    "show": _show,
    "plot": _plot,
    "set": _set,
    "skip": _skip,
    "add": _add,
}


def _sources(given: dict[str, str], key: str, *words: str) -> dict[str, str]:
    """What is given by source: all but ``words``. A source of such a name is called ``key.NAME``, as any may be."""
    named = [(name.removeprefix(f"{key}."), value) for name, value in given.items() if name not in words]
    if len(dict(named)) != len(named):
        raise UsageError("a source is given twice")
    return dict(named)


def _only(given: dict[str, str], *known: str) -> None:
    for key in given:
        if key not in known:
            raise UsageError(f"{key}: unknown key{nearest(key, known)}")


def _request(run: Run, wanted: dict[str, object], given: dict[str, str]) -> str:
    """Ask a run that trains; change the log of one that does not."""
    wanted |= {key: given[key] for key in ("at", "reason") if key in given}
    text = yaml.safe_dump(wanted, sort_keys=False)
    request = MixRequest.parse(text)
    try:
        lock = RunLock(run.path, HOLDER)
    except StorageError as error:
        if not isinstance(error.__cause__, BlockingIOError):
            raise  # nobody has it, but we cannot
        if (holder(run.path) or {}).get("start_id") == HOLDER:
            raise UsageError(f"{run.path}: another launch/schedule.py changes it; try again") from error
        return _ask(run, request, text)
    try:
        return _append(Run.open(run.path), request)  # as it is now that nobody else writes
    finally:
        lock.release()


def _ask(run: Run, request: MixRequest, text: str) -> str:
    """Drop the request into the folder of a live run, which answers after its next step."""
    _, warnings = _admitted(run, request)  # the run checks it too, but here the person is told at once
    target = run.path / "control" / REQUEST
    partial = target.with_name(f".{REQUEST}.{os.getpid()}")
    try:
        target.parent.mkdir(exist_ok=True)
        with partial.open("x", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.link(partial, target)  # whole at once, and unlike a rename never over another request
    except FileExistsError:
        raise UsageError(f"{target} is there already: the run has not answered it yet; try again later") from None
    except OSError as error:
        raise StorageError(f"{target}: {error.strerror}; nothing was asked") from error
    finally:
        with contextlib.suppress(OSError):  # not made, or no longer reachable
            partial.unlink()
    return "\n".join([*warnings, f"{target}: written; the run answers after its next step, and renames the file"])


def _append(run: Run, request: MixRequest) -> str:
    event, warnings = _admitted(run, request)
    run.log.append(event)
    return "\n".join([*warnings, f"{run.path / SCHEDULE}: {describe(event, run.block_tokens)}"])


def _admitted(run: Run, request: MixRequest) -> tuple[Event, list[str]]:
    """The event of the request, from the first step on that no attempt recorded, and warnings.

    UsageError if the run cannot do it.
    """
    loader = run.loader()
    step, stop = last_step(run.path / METRICS), run.recipe.train.num_steps(run.recipe.data)
    if step >= stop:
        raise UsageError(f"{run.path}: the run is finished, {step:,} of {stop:,} steps; branch_from={run.path} goes on")
    earliest = first_unrecorded(loader, step)
    if request.weights:
        earliest = after_proposals(run.log.events, earliest)
    event = request.event(
        loader.sampler,
        block_tokens=loader.block_tokens,
        earliest=earliest,
        end=loader.schedule.first_block(stop),
        now=loader.schedule.tokens(step),
        step=step,
    )
    warnings = admit_to_end(loader, event, policy_of(run.recipe, loader), step, stop)
    return event, [f"WARNING: {warning}" for warning in warnings]

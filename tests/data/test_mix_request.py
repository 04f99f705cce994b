"""What a person may ask of a mixture, what becomes of it, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from lmtrain.data.blocks.function import DocumentFunction
from lmtrain.data.order.mix_request import MixRequest, mixed, tokens_of
from lmtrain.data.order.sampler import Sampler
from lmtrain.data.order.schedule import AddedSource, ScheduleLog
from lmtrain.data.store.store import StoreWriter
from lmtrain.errors import DataError, LmtrainError, UsageError

SAMPLER = Sampler(0, ScheduleLog.fixed({"code": 0.5, "docs": 0.25, "rare": 0.25}), {"code": 9, "docs": 9, "rare": 9})
WHERE = {"block_tokens": 100, "earliest": 40, "end": 90, "now": 2000, "step": 7}


def test_shares_of_the_named_and_of_the_rest() -> None:
    shares = {"code": 0.5, "docs": 0.3, "rare": 0.2, "idle": 0.0}
    assert mixed(shares, {"code": 0.2}) == pytest.approx({"code": 0.2, "docs": 0.48, "rare": 0.32})
    assert mixed(shares, {"idle": 0.5}) == pytest.approx({"idle": 0.5, "code": 0.25, "docs": 0.15, "rare": 0.1})
    assert mixed(shares, {"code": 0}) == pytest.approx({"code": 0, "docs": 0.6, "rare": 0.4})
    assert mixed(shares, {"code": 3, "docs": 1, "rare": 0}) == {"code": 3, "docs": 1, "rare": 0}  # all: relative
    assert mixed(shares, {"code": 1}) == pytest.approx({"code": 1, "docs": 0, "rare": 0})


def test_a_whole_request() -> None:
    request = MixRequest.parse("weights: {code: 0.2}\nskip: 1e3\nat: '+3_050'\nreason: why\n")
    assert request == MixRequest({"code": 0.2}, 1000, {}, (3050, True), "why")
    event = request.event(SAMPLER, **WHERE)
    assert (event.first_block, event.origin, event.reason, event.skip, event.step) == (51, "user", "why", 10, 7)
    total = sum(event.weights.values())
    assert {name: round(weight / total, 4) for name, weight in event.weights.items()} == {
        "code": 0.2, "docs": 0.4, "rare": 0.4,
    }  # fmt: skip
    assert MixRequest.parse("skip: 1\n").event(SAMPLER, **WHERE).first_block == 40
    assert MixRequest.parse("skip: 101\nat: 4000").event(SAMPLER, **WHERE).skip == 2


def test_a_new_source_is_named_by_its_content(tmp_path: Path) -> None:
    with StoreWriter(tmp_path / "news", 50) as writer:
        writer.add(SAMPLER.get(range(20))[1])  # type: ignore[arg-type]
    text = f"add: {{news: {tmp_path / 'news'}}}\nweights: {{news: 0.2}}\n"
    event = MixRequest.parse(text).event(SAMPLER, **WHERE)
    assert event.sources["news"].path == str(tmp_path / "news") and len(event.sources["news"].digest) == 32
    assert set(event.weights) == {"code", "docs", "rare", "news"}


def test_a_new_source_may_be_a_function() -> None:
    text = (
        "add: {recall: lmtrain.eval.probes.mqar:mqar, odd: lmtrain.eval.probes.parity:parity}\n"
        "arguments: {recall.pairs: 4, recall.length: 64, recall.num_keys: 9, recall.num_values: 9, odd.bits: 7}"
    )
    request = MixRequest.parse(text)
    assert request.arguments["odd"] == {"bits": 7} and request.add["odd"] == "lmtrain.eval.probes.parity:parity"
    sources = request.event(SAMPLER, **WHERE).sources
    for name in ("recall", "odd"):
        function = DocumentFunction("any", request.add[name], request.arguments[name])
        assert sources[name] == AddedSource(None, function.digest(), request.add[name], request.arguments[name])


def test_arguments_are_numbers_where_they_can_be() -> None:
    given = {"4": 4, "-0.5": -0.5, "1e3": 1000.0, "true": True, "True": "True", "2026-01-02": "2026-01-02"}
    given |= {"NaN": "NaN", "null": "null", "[1]": "[1]", "": "", "9" * 5000: "9" * 5000, "[" * 5000: "[" * 5000}
    arguments = {f"f.a{n}": text for n, text in enumerate(given)}
    read = MixRequest.parse(yaml.safe_dump({"add": {"f": "a.b:c"}, "arguments": arguments}, sort_keys=False)).arguments[
        "f"
    ]
    assert list(read.values()) == list(given.values())
    assert [type(value) for value in read.values()] == [type(value) for value in given.values()]


def test_paths_are_of_the_folder_where_the_request_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    given = {"news": "data/news", "a": "./a:b", "f": "a.b:c"}
    assert MixRequest.parse(yaml.safe_dump({"add": given})).add == {
        "news": str(tmp_path / "data" / "news"), "a": str(tmp_path / "a:b"), "f": "a.b:c",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected keys (weights, skip, add, arguments, at, reason) and values"),
        ("- 1", "expected keys"),
        ("weights: {", "not YAML"),
        ("weights: " + "[" * 5000, "line 1: expected KEY: TEXT or KEY: {NAME: TEXT}, got a list or deeper levels"),
        ("skip: 1\nadd: {a: {b: c}}", "line 2: expected KEY: TEXT or KEY: {NAME: TEXT}"),
        ("[a]: 1", "line 1: expected KEY: TEXT"),
        ("? {a: 1}\n: 1", "line 1: expected KEY: TEXT"),
        ("skip: 1\n---\nskip: 2", "expected one YAML document, got more"),
        ("skip: 1\n" + " " * 70_000, "expected at most 65,536 characters, got 70,008"),
        ("skip: 1\nskip: 2", "line 2: skip is given twice"),
        ("weights: {code: 0.1, code: 0.9}", "line 1: code is given twice"),
        ("!!python/object/apply:os.system ['true']", "line 1: YAML tags, anchors and aliases are not read here"),
        ("reason: &a x\nskip: *a", "line 1: YAML tags, anchors and aliases"),
        ("skip: !!binary aaa", "line 1: YAML tags"),
        ('skip: "\\UFFFFFFFF"', "not YAML"),
        (f"%YAML 1.{'9' * 5000}\n---\nskip: 1", "not YAML"),
        ("wieghts: {code: 1}", "wieghts: unknown key; did you mean weights?"),
        ("reason: x", "nothing to do: give weights, skip or add"),
        ("weights: {}", "weights: expected {source: value}, got {}"),
        ("weights: 1", "weights: expected {source: value}, got '1'"),
        ("skip: {a: 1}", "skip: expected text, got {'a': '1'}"),
        ("weights: {code: much}", "weights.code: expected a share, got 'much'"),
        ("weights: {cod: 0.1}", "weights.cod: no source of this run; did you mean code?"),
        ("weights: {code: -0.1}", "weights.code: expected a share from 0 to 1e+09, got -0.1"),
        ("weights: {code: nan}", "got nan"),
        ("weights: {code: .nan}", "expected a share, got '.nan'"),
        ("weights: {code: true}", "expected a share, got 'true'"),
        ("weights: {code: 1e308, docs: 1e308, rare: 1}", "weights.code: expected a share from 0 to 1e+09, got 1e+308"),
        (f"weights: {{code: {'9' * 5000}}}", "got inf"),
        (f"weights: {{code: 0x{'f' * 400}}}", "expected a share, got '0xfff"),
        ('weights: {"a\\nb": 1}', "weights.'a\\nb': no source of this run"),
        ('"a\\nb": 1', "'a\\nb': unknown key"),
        ("weights: {code: 0.7, docs: 0.7}", "shares of code, docs sum to 1.4, more than the whole; rare are read too"),
        ("weights: {code: 0, docs: 0, rare: 0}", "nothing would be read: code, docs, rare get 0"),
        ("skip: 1.5", "skip: expected a number of tokens (2000000, 2e6, 2M), got '1.5'"),
        ("skip: -3", "skip: expected a number of tokens"),
        (f"skip: {'9' * 5000}", "skip: expected a number of tokens (2000000, 2e6, 2M), got '999"),
        ("skip: 9001", "skip: 9,100 tokens are more than the run reads in all, 9,000"),
        ("skip: 1e30", "tokens are more than the run reads in all, 9,000"),
        ("skip: 1\nat: 2026-13-01", "at: expected a number of tokens"),
        ("skip: true", "skip: expected a number of tokens"),
        ("skip: 5\nat: 3900", "at: 3,900 tokens is too early; the first that can still change are at 4,000"),
        ("skip: 5\nat: 9000", "it would take effect at 9,000 tokens, the run ends at 9,000"),
        ("add: {code: x}", "add.code: there is a source of that name"),
        ("add: {a-b: x}", "add: 'a-b' is no name"),
        ("add: {news: }", "add.news: expected a path or package.module:function, got ''"),
        ('add: {news: "a\\nb"}', "add.news: expected a path or package.module:function, got 'a\\nb'"),
        ("skip: 1\narguments: {f.x: 1}", "arguments.f: add names no function of that name"),
        (
            "add: {func: a.b:c}\narguments: {funk.x: 1}",
            "arguments.funk: add names no function of that name; did",
        ),
        ("add: {f: ./f}\narguments: {f.x: 1}", "arguments.f: add names no function of that name"),
        ("add: {f: a.b:c}\narguments: {x: 1}", "arguments: expected {SOURCE.ARGUMENT: value}, got 'x'"),
        ("add: {f: a.b:c}\narguments: {f.x: {y: 1}}", "line 2: expected KEY: TEXT or KEY: {NAME: TEXT}"),
        ("add: {f: no_such.module:f}", "data.sources.f.synthetic: no_such.module:f: No module named 'no_such'"),
        ("add: {f: lmtrain.eval.probes.mqar:mqa}", "lmtrain.eval.probes.mqar has no function mqa; did you mean mqar?"),
        (
            "add: {f: lmtrain.eval.probes.parity:parity}",
            "data.sources.f.arguments: lmtrain.eval.probes.parity:par",
        ),
        ("add: {news: gone/by}", "gone/by.idx: No such file or directory; a source is a folder made by"),
    ],
)
def test_what_is_refused(text: str, message: str) -> None:
    with pytest.raises((UsageError, DataError)) as error:
        MixRequest.parse(text).event(SAMPLER, **WHERE)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_numbers_of_tokens() -> None:
    given = ["2000000", "2e6", "2.0e+6", "2M", "2_000_000", "2,000k", "0.002G"]
    assert [tokens_of("k", value) for value in given] == [2_000_000] * len(given)


def test_a_plus_is_from_now_with_and_without_quotes() -> None:
    assert [MixRequest.parse(f"skip: 1\nat: {at}").at for at in ("+3000", "'+3000'", "+3e3", "3e3")] == [
        (3000, True), (3000, True), (3000, True), (3000, False),
    ]  # fmt: skip


def test_words_of_yaml_are_text() -> None:
    request = MixRequest.parse("weights: {no: 0.5, on: 0.1}\nreason: 2026-99-99")
    assert request == MixRequest({"no": 0.5, "on": 0.1}, reason="2026-99-99")


@given(
    st.one_of(
        st.text(),
        st.text(alphabet="{}[]:,-?&*!%\"'\\ \nUx09aweights+"),
        st.recursive(st.text(max_size=9), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)).map(
            yaml.safe_dump
        ),
    )
)
def test_any_text_is_a_request_or_one_error(text: str) -> None:
    try:
        MixRequest.parse(text)
    except LmtrainError as error:
        assert "\n" not in str(error)

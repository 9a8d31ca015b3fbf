"""``vlm-fast profile``: measured points, output files, the HTML page and errors."""

import csv
import itertools
import json
import re
import signal
import sys
import time
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
import torch
from typer.testing import CliRunner

from tests.support.tiny_profile import NAME, NAMES, TINY, groups, make_tiny, setting
from tests.support.tiny_profile import tiny as tiny  # an autouse fixture
from vlm_fast import advisor
from vlm_fast.advisor import (
    connectors,
    html_report,
    measure_points,
    plots,
    profile_points,
    report_data,
)
from vlm_fast.advisor.connector_modules import DesignPoint
from vlm_fast.advisor.connectors import CONNECTORS
from vlm_fast.advisor.model_shapes import MODELS
from vlm_fast.cli import main, profile
from vlm_fast.devtools.timing import Ceilings

HOSTILE = "<script>alert('&')</script>"


def call(folder, *arguments):
    """Run `vlm-fast profile`; comma-separated values are split and the option is repeated."""
    given = ["--model", NAME, "--out", str(folder), "--text", "8", "--budget", "30", *arguments]
    if "--connector" not in arguments:
        given += ["--connector", ",".join(NAMES)]
    words = []
    for option, value in itertools.pairwise([*given, ""]):
        if option.startswith("--"):
            values = [None] if value.startswith("--") or not value else value.split(",")
            words += [word for one in values for word in (option, one) if word is not None]
    return CliRunner().invoke(main.app, ["profile", *words])


@pytest.fixture(scope="module")
def training(tmp_path_factory):
    folder = tmp_path_factory.mktemp("training")
    with pytest.MonkeyPatch.context() as patch:
        make_tiny(patch)
        found = call(
            folder, "--tokens", "36,9,180", "--batch", "2", "--mode", "training", "--trace",
            "--memory-snapshot",
        )  # fmt: skip
    assert found.exit_code == 0, found.output
    return folder, json.loads((folder / "profile.json").read_text()), found


# ---- measured points ----


def test_all_points_are_measured(training):
    _, found, _ = training
    points = [(r["connector"], r["tokens"], r["batch"], r["saved"]) for r in found["rows"]]
    assert len(points) == len(set(points))
    # linear 36; mlp 36 x 3; pool 9; merge 9 x 3; gated 36, 9; anyres 180 x 3
    assert len(points) == 1 + 3 + 1 + 3 + 2 + 3
    for row in found["rows"]:
        assert row["not_measured"] is None and row["times"]["median"] > 0
        assert row["times"]["lower"] <= row["times"]["median"] <= row["times"]["upper"]
        assert row["language"]["basis"] == "measured"


def test_saved_bytes_match_cost_model(training):
    for row in training[1]["rows"]:
        counted = row["counted_saved_bytes"]
        assert row["saved_bytes"] == counted.get(row["saved"], counted.get("")), row["title"]
    kept = {r["saved"]: r["saved_bytes"] for r in training[1]["rows"]
            if r["connector"] == "mlp"}  # fmt: skip
    assert kept["all"] > kept["preactivation"] > kept["input"] == 0


def test_flops_and_bytes_match_cost_models(training):
    for row in training[1]["rows"]:
        point = DesignPoint(TINY, row["connector"], row["tokens"], prompts=row["batch"], text=8,
                      saved=row["saved"])  # fmt: skip
        work = connectors.connector_cost(point, torch.float32)
        assert row["forward_flops"] == work.cost.forward_flops
        assert row["backward_bytes"] == work.cost.backward_bytes
        assert row["parameters"] == work.parameters
        in_sequence = 0 if row["connector"] == "gated" else row["tokens"]
        assert row["visual_tokens"] == in_sequence
        assert row["language"]["tokens"] == in_sequence + 8
        blocks_of_media = 0 if in_sequence else 2 * 1 * row["tokens"] * 32 * 4
        cached = in_sequence * 2 * 2 * 2 * 8 * 4 + blocks_of_media
        assert row["key_value_bytes"] == row["batch"] * cached


def test_totals_and_pareto_front(training):
    rows = training[1]["rows"]
    for row in rows:
        share = row["language"]
        assert share["seconds"] == pytest.approx(2 * share["layer"]["median"])
        assert row["seconds"] == pytest.approx(row["times"]["median"] + share["seconds"])
        assert row["memory_bytes"] == (
            4 * row["parameters"] + row["peak_bytes"] + row["key_value_bytes"]
        )
        better = [
            other
            for other in rows
            if other["batch"] == row["batch"]
            and other["seconds"] <= row["seconds"]
            and other["memory_bytes"] <= row["memory_bytes"]
            and other["tokens"] >= row["tokens"]
            and (other["seconds"], other["memory_bytes"], other["tokens"])
            != (row["seconds"], row["memory_bytes"], row["tokens"])
        ]
        assert row["on_pareto_front"] == (not better), row["title"]


# ---- the files ----


def test_csv_has_one_line_per_point_and_no_formulas(training, tmp_path):
    with (training[0] / "profile.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(training[1]["rows"])
    assert float(rows[0]["times.median"]) == training[1]["rows"][0]["times"]["median"]
    path = tmp_path / "hostile.csv"
    report_data.write_csv(path, [{"=a": "=1+1", "b": "@SUM", "c": -1, "d": "+x", "e": "-x"}])
    with path.open() as file:
        assert list(csv.reader(file)) == [["'=a", "b", "c", "d", "e"],
                                          ["'=1+1", "'@SUM", "-1", "'+x", "'-x"]]  # fmt: skip


def test_traces_name_the_connector(training):
    folder, found, printed = training
    traces = sorted(folder.glob("trace_*.json"))
    assert len(traces) == len(found["rows"])
    events = json.loads((folder / "trace_gated_36_batch_2.json").read_text())["traceEvents"]
    names = {event.get("name") for event in events}
    assert {"vlm_fast::gated[0]", "vlm_fast::gated[1]"} <= names
    if not torch.cuda.is_available():
        assert "no memory snapshot: torch takes them on CUDA alone" in printed.stderr


def test_png_is_written_or_reason_given(training, tmp_path, monkeypatch):
    assert (training[0] / "profile.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    lack = plots.write_png(tmp_path / "profile.png", training[1])
    assert "pip install 'vlm_fast[bench]'" in lack and not list(tmp_path.iterdir())


def test_stdout_holds_table_or_json_and_stderr_progress(tmp_path):
    found = call(tmp_path, "--tokens", "36", "--batch", "2,1", "--connector", "mlp", "--json")
    content = json.loads(found.stdout)
    assert content == json.loads((tmp_path / "profile.json").read_text())
    assert "profile: 1 of 4" in found.stderr
    assert [r["batch"] for r in content["rows"] if r["on_pareto_front"]] == [
        2,
        1,
    ]  # one trace per point
    html = (tmp_path / "profile.html").read_text()
    assert html.index("<h2>Batch 2</h2>") < html.index("<h2>Batch 1</h2>")


# ---- the page ----


class Reader(HTMLParser):
    """Check that tags are balanced; collect texts and the URLs that a browser would fetch."""

    VOID = frozenset({"meta", "link", "br", "img"})

    def __init__(self):
        super().__init__()
        self.open, self.fetched, self.tags, self.text = [], [], [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.fetched += [v for k, v in attributes if k in ("src", "href", "srcset", "action")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, tag

    def handle_data(self, data):
        self.text.append(data)


def read(html):
    reader = Reader()
    reader.feed(html)
    reader.close()
    assert reader.open == []
    return reader


def test_html_page_is_complete_and_names_pareto_front(training):
    html = (training[0] / "profile.html").read_text()
    reader = read(html)
    assert reader.fetched == ["data:,"]  # the icon, which a browser would request otherwise
    assert "script" not in reader.tags and "@import" not in html
    assert set(re.findall(r"url\((.)", html)) <= {"#"}  # clip paths of charts
    assert 'name="viewport" content="width=device-width' in html
    assert "prefers-color-scheme: dark" in html and "overflow-x: auto" in html
    text = "".join(reader.text)
    for row in training[1]["rows"]:
        assert row["title"] in text
    for batch, rows in plots.batches_of(training[1]).items():
        listed = re.findall(r"<li><strong>(.*?)</strong>", html.split(f"<h2>Batch {batch}</h2>")[1])
        fronts = [row["title"] for row in plots.pareto_points(rows)]
        assert listed[: len(fronts)] == fronts and fronts
    for word in ("Tiny", "float32", training[1]["conditions"]["machine"], *report_data.NOTES):
        assert word.split("'")[0] in text


def texts(chart):
    """All texts of an SVG chart, which must be well-formed."""
    picture = ElementTree.fromstring(chart)
    assert not any("nan" in value for e in picture.iter() for value in e.attrib.values())
    return [e.text for e in picture.iter("{http://www.w3.org/2000/svg}text")]


def test_charts_mark_all_points_and_number_pareto_points(training):
    for rows in plots.batches_of(training[1]).values():
        chart = plots.trade_off(rows)
        count = sum(row["on_pareto_front"] for row in rows)
        assert count > 0 and chart.count("<use") >= len(rows)
        assert {str(number) for number in range(1, count + 1)} <= set(texts(chart))
        said = texts(plots.shares(rows))
        assert {plots.duration(row["seconds"]) for row in rows} <= set(said)
        assert {row["title"] for row in rows} <= set(said)


def test_charts_of_a_single_point(training):
    (row,) = [r for r in training[1]["rows"] if r["connector"] == "linear"]
    assert texts(plots.trade_off([row])) and texts(plots.shares([row]))


def test_charts_are_deterministic(training):
    (rows,) = plots.batches_of(training[1]).values()
    assert plots.trade_off(rows) == plots.trade_off(rows)


def test_page_without_matplotlib_explains_how_to_get_charts(training, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    html = html_report.html_page(training[1])
    assert "<svg" not in html and html.count("matplotlib is not installed") == 2
    assert "pip install" in "".join(read(html).text)


def test_page_strings_are_escaped(training):
    def hostile(value):
        if isinstance(value, str):
            return f"{HOSTILE}{value}"
        if isinstance(value, list):
            return [hostile(v) for v in value]
        return {k: hostile(v) for k, v in value.items()} if isinstance(value, dict) else value

    found = hostile(training[1])
    found["conditions"]["device"], found["request"]["mode"] = "cpu", "training"
    found["unfinished"] = HOSTILE
    html = html_report.html_page(found)
    reader = read(html)
    assert "script" not in reader.tags and "<script" not in html
    assert HOSTILE in "".join(reader.text)


def test_figures_are_formatted_with_units():
    assert [plots.duration(s) for s in (0, 2e-6, 0.0123456, 1.5, 123.4)] == [
        "0 us", "2 us", "12.3 ms", "1.5 s", "123 s",
    ]  # fmt: skip
    assert [plots.size(b) for b in (0, 999, 1234, 5.5e6, 123e9)] == [
        "0 B", "999 B", "1.23 kB", "5.5 MB", "123 GB",
    ]  # fmt: skip


# ---- errors ----


@pytest.mark.usefixtures("inherited_sigint")
def test_interrupt_keeps_measured_points(tmp_path, monkeypatch):
    real = measure_points._measure
    done = []

    def twice(group, given):
        if len(done) == 2:
            signal.raise_signal(signal.SIGINT)
        done.append(group)
        real(group, given)

    monkeypatch.setattr(measure_points, "_measure", twice)
    found = call(tmp_path, "--tokens", "36,9,5", "--batch", "1")
    assert found.exit_code == main.Exit.INTERRUPTED
    content = json.loads((tmp_path / "profile.json").read_text())
    assert content["unfinished"].startswith("interrupted after")
    measured = [r for r in content["rows"] if r["times"]]
    assert len(measured) == sum(len(group.rows) for group in done)
    assert any(r["on_pareto_front"] for r in measured)
    assert {r["not_measured"] for r in content["rows"] if not r["times"]} == {"not begun"}
    html = (tmp_path / "profile.html").read_text()
    assert "Unfinished:" in html and ": not begun<" in html
    read(html)


def test_page_without_measurements(tmp_path):
    order = groups()
    measure_points.complete_rows(order, setting())
    where = report_data.conditions("cpu", torch.float32, Ceilings(1.0, 1.0))
    request = dict(mode="forward", text=8, tokens=[36], batches=[1], levels=["all"],
                 connectors=["mlp"], budget=1.0)  # fmt: skip
    found = report_data.document(NAME, TINY, order, request, where, time.monotonic(), None)
    assert "No point was measured" in html_report.html_page(found)
    assert plots.write_png(tmp_path / "x.png", found) == "nothing was measured"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--model", "x"), "'x' is not one of 'llava-1.5-7b'"),
        (("--connector", "mlp,glue"), "'glue' is not one of 'linear'"),
        (("--tokens", "37"), "nothing gives 37 tokens: Linear gives 36 tokens, not 37;"),
        (("--tokens", "12,x"), "should be a valid integer"),
        (("--batch", "0"), "greater than or equal to 1"),
        (("--saved", "most"), "'most' is not one of 'all'"),
        (("--mode", "backward"), "'backward' is not one of 'forward'"),
        (("--budget", "0"), "greater than or equal to 1"),
    ],
)
def test_invalid_arguments_are_usage_errors_before_measuring(
    tmp_path, monkeypatch, arguments, message
):
    monkeypatch.setattr(profile.timing, "ceilings", None)
    found = call(tmp_path / "out", *arguments)
    assert found.exit_code == main.Exit.USAGE
    assert message in found.output
    assert not (tmp_path / "out").exists()


def test_unwritable_folder_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(profile.timing, "ceilings", None)
    (tmp_path / "file").write_text("")
    found = call(tmp_path / "file", "--connector", "mlp", "--tokens", "36")
    assert found.exit_code == main.Exit.USAGE
    assert "--out" in found.output and "cannot be written" in found.output
    assert "name another" in found.output


def test_default_token_counts_cover_named_models():
    for name, shape in MODELS.items():
        tokens = list(profile._default_tokens(name, list(CONNECTORS)))
        for connector in CONNECTORS.values():
            if connector.token_counts(shape):
                assert connector.token_counts(shape)[0] in tokens
    assert set(profile_points.TOKENS) <= set(
        profile._default_tokens("llava-1.5-7b", list(CONNECTORS))
    )
    assert advisor.CONNECTORS is CONNECTORS

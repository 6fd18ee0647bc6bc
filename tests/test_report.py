"""Summary tables, progress lines and the HTML report, from hand-made run files."""

from __future__ import annotations

import io
import re
from html.parser import HTMLParser

import pytest

from padkern.errors import CheckpointError
from padkern.pad import plots, progress
from padkern.pad.folder import RunFolder
from padkern.pad.report import render_report, write_report
from padkern.pad.summary import comparison_table, interval_table, interval_text, ordered_rows

GROUPS = ("all", "freq_0", "freq_1_5", "freq_6_50", "freq_gt_50")


def metrics() -> dict:
    def part(scale: float) -> dict:
        groups = {
            group: {"count": 100 * place, "hit@10": 0.1 * scale, "ndcg@10": 0.05 * scale}
            for place, group in enumerate(GROUPS, start=1)
        }
        groups["freq_0"] = {"count": 0, "hit@10": None, "ndcg@10": None}
        return groups | {"counters": {"ties": 0}}

    models = {
        row: {"valid": part(scale), "test": part(scale)}
        for row, scale in (("pad", 1.2), ("pretrain", 1.0), ("mine", 0.5), ("id_plus_text", 1.1))
    }
    return {
        "dataset": "<b>shop</b>",
        "seed": 7,
        "seconds": {"pretrain": 1.5, "pad": 2.25, "pad/evaluation": 0.5},
        "models": models,
    }


def entry(difference: float, half: float) -> dict:
    low, high = difference - half, difference + half
    return {"difference": difference, "low": low, "high": high, "p": 0.04}


COMPARISON = {
    "test": {
        f"pad - {rival}": {
            group: {"ndcg@10": entry(difference, 0.01), "hit@10": entry(difference, 0.02)}
            for group in GROUPS
            if group != "freq_0"
        }
        for rival, difference in (("pretrain", 0.03), ("id_plus_text", -0.002), ("aligned", -0.05))
    }
}
GATE = {
    "experts": ["rec", "aligned", "language"],
    "labels": ["padding", "9-20", "1-8", "0"],
    "weights": [[1.0, 0.5, 0.2], [0.4, 0.5, 0.6], [0.0, 0.3, 1.1]],
    "items_per_bin": [3, 10, 4],
    "method": "heldout",
}


@pytest.fixture
def folder(tmp_path):
    with RunFolder(tmp_path) as opened:
        opened.write_json("metrics.json", metrics())
        yield opened


class Balanced(HTMLParser):
    """Fails on elements closed in another order than they were opened."""

    VOID = frozenset(("meta", "br", "link", "img", "hr"))

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag, attrs):
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def full(folder: RunFolder) -> str:
    folder.write_json("comparison.json", COMPARISON)
    folder.write_json("gate.json", GATE)
    folder.write_text("config.yaml", "seed: 7\n")
    folder.write_json(
        "run.json",
        {
            "command": "padkern run --data 'a&b'",
            "request": {"shuffle_text": True},
            "environment": {"torch": "2.13"},
        },
    )
    for phase in ("pretrain", "pad"):
        for epoch in (1, 2, 3):
            folder.append_jsonl(
                "metrics.jsonl",
                {"phase": phase, "epoch": epoch, "loss": 1 / epoch, "ndcg@10": 0.01 * epoch,
                 "best": epoch == 2},
            )  # fmt: skip
    return render_report(folder)


def test_full_report_is_one_well_formed_file(folder):
    html = full(folder)
    parser = Balanced()
    parser.feed(html)
    parser.close()
    assert parser.open == []
    assert html.count("<svg") == 4
    outside = re.findall(r'(?:src|href)="(?!#)([^"]*)"', html)
    assert outside == []
    assert "url(http" not in html
    for part in (
        "seed 7", "Control run", "a&amp;b", "&lt;b&gt;shop&lt;/b&gt;", "heldout", "together 4.2",
        "PAD is better than pretrain", "PAD cannot be told apart from id_plus_text",
        "PAD is worse than aligned", "12.00 / 6.00",
    ):  # fmt: skip
        assert part in html, part
    assert "<b>shop</b>" not in html


def test_report_is_deterministic(folder):
    assert full(folder) == render_report(folder)


def test_report_of_metrics_alone_leaves_sections_out(folder):
    html = render_report(folder)
    assert "<h2>Comparison</h2>" in html
    for section in ("Gate", "Training", "Data", "Are the differences real?"):
        assert f"<h2>{section}</h2>" not in html


def test_write_report_from_a_reader_and_without_metrics(folder, tmp_path_factory):
    folder.close()
    path = write_report(RunFolder(folder.path, create=False))
    assert path.read_text().startswith("<!DOCTYPE html>")
    with pytest.raises(CheckpointError, match=r"metrics\.json: no such file"):
        write_report(RunFolder(tmp_path_factory.mktemp("empty"), create=False))


def test_no_matplotlib_setting_leaks(folder):
    import matplotlib

    before = dict(matplotlib.rcParams)
    plots.gate_weights(GATE | {"labels": GATE["labels"][1:]})
    assert dict(matplotlib.rcParams) == before


def test_plots_of_nothing_are_none():
    assert plots.training_curves([]) is None
    assert plots.frequency_bars({}) is None
    assert plots.interval_plot({}) is None
    assert plots.gate_weights({}) is None


def test_comparison_table_rows_and_cells():
    columns, rows = comparison_table(metrics())
    assert columns == ["row", "all", "cold (0)", "1-5", "6-50", ">50"]
    assert [row[0] for row in rows] == ["users", "pretrain", "id_plus_text", "pad", "mine"]
    assert rows[0] == ["users", "100", "0", "300", "400", "500"]
    assert rows[3] == ["pad", "12.00 / 6.00", "-", *["12.00 / 6.00"] * 3]
    assert comparison_table({}) == (["row"], [])
    assert ordered_rows(["z", "pad", "most_pop"]) == ["most_pop", "pad", "z"]


def test_interval_table_cells():
    columns, rows = interval_table(COMPARISON, names=["pad - pretrain"])
    assert len(columns) == 6
    assert len(rows) == 4
    assert rows[0] == [
        "pad - pretrain", "all", "+3.00 [2.00, 4.00]", "0.0400", "+3.00 [1.00, 5.00]", "0.0400",
    ]  # fmt: skip
    assert interval_text({"difference": None}) == "-"
    assert interval_text({"difference": -0.005, "low": -0.01, "high": 0.0}) == "-0.50 [-1.00, 0.00]"


RECORD = {
    "phase": "pad", "epoch": 2, "loss": 1.25, "ndcg@10": 0.0456, "hit@10": 0.08, "seconds": 3.21,
    "users_per_s": 1234.5, "tokens_per_s": 98765.4, "best": True,
}  # fmt: skip


def drive(reporter: progress.Reporter) -> None:
    reporter.message("audit [red]")
    reporter.start_phase("pad", 3, 2)
    reporter.step(1.5, 10, 50)
    reporter.step(1.25, 10, 50)
    reporter.end_epoch(RECORD)
    reporter.end_phase("pad", {"best_epoch": 2, "best": 0.0456})
    reporter.table("result", ["row", "all"], [["pad", "1.00"], ["pretrain", "10.00"]])
    reporter.close()


def test_plain_reporter_says_one_line_an_epoch():
    stream = io.StringIO()
    drive(progress.PlainReporter(stream))
    assert stream.getvalue().splitlines() == [
        "audit [red]",
        "pad: at most 3 epochs of 2 steps",
        "pad epoch 2  loss 1.2500  ndcg@10 0.0456  hit@10 0.0800  1,234 users/s  98,765 tokens/s"
        "  3.2 s  *",
        "pad: done (best_epoch 2, best 0.0456)",
        "result",
        "row         all",
        "--------  -----",
        "pad        1.00",
        "pretrain  10.00",
    ]


def test_rich_reporter_shows_rates_loss_and_metric(monkeypatch):
    from rich.console import Console

    monkeypatch.setattr(progress, "_REFRESH_S", 0.0)
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=160, color_system=None)
    drive(progress.RichReporter(console))
    said = stream.getvalue()
    for part in (
        "audit [red]", "users/s", "tokens/s", "loss 1.25", "best ndcg@10 0.0456", "pretrain",
    ):  # fmt: skip
        assert part in said, part


def test_the_reporter_fits_the_output(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr("sys.stdout", Terminal())
    monkeypatch.setenv("TERM", "xterm-256color")
    assert isinstance(progress.make_reporter(), progress.RichReporter)
    assert type(progress.make_reporter(quiet=True)) is progress.Reporter
    monkeypatch.setenv("NO_COLOR", "1")
    reporter = progress.make_reporter()
    assert isinstance(reporter, progress.RichReporter)
    assert reporter.console.no_color
    monkeypatch.setenv("TERM", "dumb")
    assert isinstance(progress.make_reporter(), progress.PlainReporter)
    monkeypatch.setattr("sys.stdout", io.StringIO())
    monkeypatch.setenv("TERM", "xterm")
    assert isinstance(progress.make_reporter(), progress.PlainReporter)
    drive(progress.Reporter())

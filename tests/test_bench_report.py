"""The report of the benchmarks: ratios, shares, warnings and the files it writes."""

from __future__ import annotations

import json
import re

import pytest
import report
import report_data
import report_growth


def _entry(name, ms, *, n=672, dim=128, mode="fwd_bwd", **info):
    kind = {"native": "padkern", "triton": "padkern", "strips": "hand"}.get(name, "peer")
    gflop = (12 if mode == "fwd_bwd" else 4) * n * n * dim / 1e9
    extra = {
        "op": "mkmmd",
        "implementation": name,
        "kind": kind,
        "mode": mode,
        "n": n,
        "m": n,
        "D": dim,
        "dtype": "float32",
        "malloc": "default",
        "threads": 2,
        "cpu": "Example",
        "cores": 2,
        "torch": "2.13.0",
        "padkern_isa": "avx2",
        "load_average": 0.1,
        "gflop": gflop,
        "inputs_mib": 2 * n * dim * 4 / 2**20,
        "peak_extra_mib": 2.0,
    } | info
    stats = {"median": ms / 1e3}
    return {"group": "mkmmd x", "name": name, "params": {}, "extra_info": extra, "stats": stats}


def _write(folder, benchmarks, name="bench_mkmmd.json", **content):
    content = {
        "benchmarks": benchmarks,
        "commit_info": {"id": "0123456789abcdef"},
        "datetime": "2026-01-02T03:04:05",
        **content,
    }
    (folder / name).write_text(json.dumps(content))
    return folder / name


LIMITS = {
    "2": {
        "sgemm_gflops": {"128": 300.0},
        "coefficient_gflops": {"128": 345.0},
        "exp_gelems": 4.0,
    }
}


def _rows(text, heading):
    """The cells of the first table under a heading, by the first cell."""
    part = text.split(f"\n## {heading}\n", 1)[1].split("\n## ", 1)[0]
    lines = [line for line in part.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    header = cells[0]
    return header, {row[0]: row for row in cells[2:]}


def test_table_has_ratio_share_and_memory(tmp_path):
    entries = [
        _entry("native", 2.0),
        _entry("compile_gemm", 8.0),
        _entry("eager_gemm", 20.0),
        _entry("strips", 6.0),
        _entry("broadcast", 5000.0),
    ]
    _write(tmp_path, entries, machine_limits=LIMITS)
    out = report.write_report(tmp_path)
    header, rows = _rows(out.read_text(), "Forward + backward")
    row = dict(zip(header, rows["672 × 128"], strict=True))
    assert row["best published peer, ms"] == "compile_gemm 8"
    assert row["best torch by hand, ms"] == "strips 6"
    assert row["TLlib / padkern"] == "2,500×"
    assert rows["672 × 128"][header.index("ratio")] == "4×"
    gflops = 12 * 672**2 * 128 / 2e-3 / 1e9
    assert float(row["GFLOP/s"]) == pytest.approx(gflops, rel=5e-3)
    # The better of the two product rates: 345, not 300.
    assert row["of sgemm"] == f"{100 * gflops / 345:.0f} %"
    floor = 12 * 672**2 * 128 / 345e6 + 1344 * 1343 / 2 / 4e6
    assert row["of limit"] == f"{100 * floor / 2.0:.0f} %"
    assert row["extra MiB"] == "2"
    assert row["/ inputs"] == f"{2.0 / (2 * 672 * 128 * 4 / 2**20):.2g}×"
    assert (tmp_path / "report.png").read_bytes()[:4] == b"\x89PNG"


def test_conditions_are_not_mixed(tmp_path):
    entries = [
        _entry("native", 100.0, n=4096),
        _entry("compile_gemm", 900.0, n=4096),
        _entry("native", 90.0, n=4096, malloc="kept"),
        _entry("compile_gemm", 360.0, n=4096, malloc="kept"),
        _entry("eager_ladder", 9.0, mode="fwd"),
    ]
    _write(tmp_path, entries)
    text = report.write_report(tmp_path).read_text()
    header, rows = _rows(text, "Forward + backward")
    place = header.index("ratio")
    assert rows["4096 × 128"][place] == "9×"
    assert rows["4096 × 128, memory kept"][place] == "4×"
    assert "\n## Forward\n\nNone.\n" in text  # a peer alone makes no row


def test_losses_are_named(tmp_path):
    _write(tmp_path, [_entry("native", 10.0), _entry("compile_ladder", 4.0), _entry("keops", 50.0)])
    text = report.write_report(tmp_path).read_text()
    part = text.split("## Where padkern is slower\n")[1].split("\n## ")[0]
    assert part.strip() == (
        "- 672 × 128, fwd_bwd: compile_ladder takes 4 ms, native 10 ms (2.5× slower)"
    )


def test_what_was_left_out_and_what_the_machine_does(tmp_path):
    skipped = [
        {
            "name": "x",
            "op": "mkmmd",
            "implementation": "keops",
            "n": 4096,
            "D": 128,
            "mode": "fwd_bwd",
            "dtype": "float32",
            "reason": "4 calls would take about 100 s, more than 60 s (25.0 s each)",
        },
        {"name": "bench_other", "reason": "no data"},
    ]
    _write(tmp_path, [_entry("native", 1.0)], skipped=skipped, machine_limits=LIMITS)
    text = report.write_report(tmp_path).read_text()
    assert "- keops at n = 4096, D = 128, fwd_bwd, float32: 4 calls would take about 100 s" in text
    assert "- bench_other: no data" in text
    assert "| product 4096 × D × 4096, D = 128 | 2 | 300 GFLOP/s |" in text


def test_a_slow_peer_warns_and_a_fair_one_does_not(tmp_path, capsys):
    # The known figure: 77.8 ms at 75 GFLOP/s. At 300 GFLOP/s the like is 19.45 ms.
    fair = [_entry("compile_gemm", 1.4 * 77.8 / 4, n=1024), _entry("native", 1.0, n=1024)]
    path = _write(tmp_path, fair, machine_limits=LIMITS)
    suite, _ = report_data.load(path)
    assert report_data.peer_warnings(suite) == []
    slow = [_entry("compile_gemm", 1.6 * 77.8 / 4, n=1024), _entry("native", 1.0, n=1024)]
    _write(tmp_path, slow, machine_limits=LIMITS)
    assert report.main([str(tmp_path)]) == 0
    assert "compile_gemm at n = 1024, D = 128 takes 31.1 ms, 1.6 times" in capsys.readouterr().err
    assert "> **Warning:** compile_gemm" in (tmp_path / "report.md").read_text()
    # The better of the two allocator conditions counts.
    kept = _entry("compile_gemm", 77.8 / 4, n=1024, malloc="kept")
    suite, _ = report_data.load(_write(tmp_path, [*slow, kept], machine_limits=LIMITS))
    assert report_data.peer_warnings(suite) == []


def test_gpu_figures_use_events_and_the_roofline(tmp_path):
    info = {"gpu": "Example GPU", "event_median_ms": 0.5, "roofline_ms": 0.2, "dtype": "bfloat16"}
    entries = [
        _entry("triton", 3.0, graph_median_ms=0.4, **info),
        _entry("flash", 9.0, **info | {"event_median_ms": 2.0}),
    ]
    _write(tmp_path, entries, name="bench_mkmmd_gpu.json")
    text = report.write_report(tmp_path).read_text()
    header, rows = _rows(text, "Forward + backward")
    row = dict(zip(header, rows["672 × 128 bfloat16"], strict=True))
    assert row["ms"] == "0.5"
    assert row["of limit"] == "40 %"
    assert rows["672 × 128 bfloat16"][header.index("ratio")] == "4×"
    assert re.search(r"\| 672 × 128 bfloat16 fwd_bwd \| triton \| 0.5 \| 0.4 \|", text)
    assert (tmp_path / "report_gpu.png").exists()


def test_other_ops_and_older_files_are_listed(tmp_path):
    old = _entry("native", 4.0)
    for key in ("op", "implementation", "kind", "mode", "malloc", "inputs_mib"):
        del old["extra_info"][key]
    old |= {"group": "mkmmd fwd_bwd n=m=672 D=128", "params": {"name": "native", "mode": "fwd_bwd"}}
    other = {
        "group": "gated_bce k=8",
        "name": "bench_gated_bce[native]",
        "param": "native",
        "extra_info": {"contender": "native"},
        "stats": {"median": 0.25},
    }
    _write(tmp_path, [old], name="old.json")
    _write(tmp_path, [other], name="other.json")
    text = report.write_report(tmp_path).read_text()
    assert "| 672 × 128 | native | 4 |" in text
    assert "| gated_bce k=8 | native | 250 |" in text


def test_an_empty_folder_is_an_error(tmp_path, capsys):
    assert report.main([str(tmp_path)]) == 1
    assert "no benchmark JSON" in capsys.readouterr().out
    assert not (tmp_path / "report.md").exists()


def _other(name, ms, group="g", **info):
    return {
        "group": group,
        "name": f"bench[{name}]",
        "param": name,
        "extra_info": {"contender": name} | info,
        "stats": {"median": ms / 1e3},
    }


def test_a_sample_is_scaled_before_it_is_compared(tmp_path):
    entries = [
        _other("padkern", 2000.0, users_timed=100, users_per_s=50.0),
        _other("authors", 1000.0, users_timed=10, whole_s=12.0, users_per_s=10.0),
        _other("sort", 100.0, factor=30.0),
        _other("large-native", 5.0, group="h"),
        _other("large-mm", 20.0, group="h"),
    ]
    _write(tmp_path, entries, name="bench_epoch.json")
    text = report.write_report(tmp_path).read_text()
    assert "| g | padkern | 2,000 | – | – | 100 | 50 |" in text
    assert "| g | authors | 1,000 | 12 | 6× | 10 | 10 |" in text
    assert "| g | sort | 100 | 3 | 1.5× | – | – |" in text
    assert "| h | large-mm | 20 | – | 4× | – | – |" in text
    assert "tiny sizes" not in text


def test_tiny_sizes_are_no_figures_and_what_was_left_out_is_named(tmp_path):
    skipped = [{"name": "bench_catalogue_loss[100000-x]", "reason": "a call takes about 150 s"}]
    _write(tmp_path, [_other("padkern", 1.0, small=True)], name="b.json", skipped=skipped)
    text = report.write_report(tmp_path).read_text()
    assert "> **Warning:** tiny sizes (`PADKERN_BENCH_SMALL=1`), no figures." in text
    assert "- bench_catalogue_loss[100000-x]: a call takes about 150 s" in text


def test_growth_has_a_table_and_a_plot(tmp_path):
    machine = {"cpu": "Example", "threads": 2, "torch": "2.13.0"}
    growth = {"growth": "training epoch", "size_unit": "users"} | machine
    entries = [
        _other("native", 4000.0, size=400, resident_mib=3.0, total_mib=1500.0, **growth),
        _other("native", 1000.0, size=100, **growth),
        _other("native", 2000.0, size=200, **growth),
    ]
    _write(tmp_path, entries, name="bench_scaling.json")
    text = report.write_report(tmp_path).read_text()
    assert "| training epoch | 100 users | 1 | 1× | 1× | – | – | 1.00 |" in text
    assert "| training epoch | 400 users | 4 | 4× | 4× | 3 | 1,500 | 1.00 |" in text
    assert "](scaling.png)" in text
    assert "/ padkern" not in text  # one size is no peer of another
    assert (tmp_path / "scaling.png").read_bytes()[:4] == b"\x89PNG"


def test_the_exponent_is_the_slope_of_logarithms():
    sizes = [10, 100, 1000]
    assert report_growth.exponent(sizes, [s**1.5 for s in sizes]) == pytest.approx(1.5)
    # Least squares: of three points the middle one does not tilt the line.
    assert report_growth.exponent(sizes, [1, 50, 100]) == pytest.approx(1.0)
    assert report_growth.exponent([10, 10], [1.0, 2.0]) is None
    assert report_growth.exponent([10], [1.0]) is None
    assert report_growth.exponent(sizes, [1.0, float("nan"), 2.0]) is None

"""The HTML page: complete, self-contained, well-formed, and safe with whatever names a model has."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import matplotlib
import pytest
import torch

from sparse_engine.errors import SparseEngineError
from sparse_engine.report import plots, sparsity_of_state
from sparse_engine.report.measure import Ceilings, LayerTime
from sparse_engine.report.page import PageData, render_page

HOSTILE = '<script>alert("x")</script>&\'"'


def _layer(
    name: str, ms: float = 0.5, structure: str | None = "unstructured", sparsity: float | None = 0.9
) -> LayerTime:
    return LayerTime(name, "conv2d", (1, 8, 4, 4), ms, 4 * ms, structure, sparsity, 1e6, 1e7, 1e5)


def _timing(p50: float) -> dict[str, float]:
    return {"p10": 0.9 * p50, "p50": p50, "p90": 1.2 * p50, "p99": 3 * p50, "runs": 10}


def _data(name: str = "layer1.0.conv1") -> PageData:
    benchmark = {
        "executable": _timing(2.0),
        "dense": _timing(10.0),
        "batch": 1,
        "dense_name": "dense (PyTorch model)",
        "threads": None,
        "dense_threads": 2,
        "speedup": 5.0,
        "samples_per_second": {"executable": 500.0, "dense": 100.0},
    }
    row = {
        "name": name,
        "op": "conv2d",
        "shape": [1, 8, 4, 4],
        "structure": "unstructured",
        "sparsity": 0.9,
        "flops": 10**7,
        "kernel": "sparse",
        "ms": None,
        "dense_ms": None,
        "reason": f"because {name}",
    }
    report = {
        "layers": [row],
        "native_share": 0.75,
        "fallbacks": {name: "no native kernel"},
        "sparsity": 0.9,
        "bytes_before": 1_000_000,
        "bytes_after": 200_000,
        "max_error": 1.5e-6,
        "bound": 1e-4,
        "batch": 1,
        "batch_sizes": "any",
        "threads": None,
        "native": True,
        "removed_channels": 3,
        "notes": [f"note on {name}"],
    }
    return PageData(
        title=name,
        machine="a machine",
        command=f"sparse-engine report {name}",
        report=report,
        sparsity=sparsity_of_state({name: torch.eye(8)}),
        benchmarks=[benchmark, {**benchmark, "batch": 16}],
        layers=[
            _layer(name),
            _layer("fc", structure="dense", sparsity=0.0),
            _layer("relu", structure=None, sparsity=None),
        ],
        ceilings=Ceilings(200.0, 20.0, 2, 230.0, 60.0),
        training=[
            {"phase": "prune", "loss": 2.0, "train_accuracy": 0.3},
            {"phase": "train", "loss": 1.0, "test_accuracy": 0.6, "gradient_norm": 0.5, "mask_overlap": 0.9},
        ],
        summary={"test_accuracy": 0.6, "data": "digits"},
        diagnostics={
            "mean_jsv": {"before": 0.0123, "after": 0.4567},
            "loss_surface": {"axis": [-1.0, 0.0, 1.0], "losses": [[3.0, 2.0, None], [2.0, 1.0, 2.0], [3.0, 2.0, 3.0]]},
            "gradient_flow": {name: 0.5, "total": 0.5},
            "mask_overlap": {name: 0.625, "total": 0.625},
            "density": {name: 0.1, "empty": 0.0},
            "samples": 128,
        },
    )


class _Reader(HTMLParser):
    VOID = ("meta", "br", "link", "img")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.references: list[str] = []
        self.text = ""

    def handle_starttag(self, tag, attrs):
        if tag not in self.VOID:
            self.open.append(tag)
        for key, value in attrs:
            if key == "id":
                self.ids.append(value)
            if key in ("src", "href", "xlink:href"):
                self.references.append(value)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        # The p elements of the page are closed, so every end tag must match the last open one.
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def _read(page: str) -> _Reader:
    reader = _Reader()
    reader.feed(page)
    reader.close()
    assert reader.open == []
    return reader


def test_the_page_shows_everything():
    page = render_page(_data())
    text = _read(page).text
    for part in (
        "5.00×",
        "90.0%",
        "75.0%",
        "1.5e-06",
        "200.0 KB",
        "60.00 %",
        "because layer1.0.conv1",
        "no native kernel",
        "0.0123",
        "0.4567",
        "overlap 0.62",
        "empty",
        "128 training samples",
    ):
        assert part in text, part
    titles = ("Latency", "Where the time goes", "Roofline", "Sparsity by layer", "Layers", "Notes", "Training")
    for title in (*titles, "Gradient flow", "Density by layer", "Loss surface", "Conditioning"):
        assert f"<h2>{title}</h2>" in page
    assert page.count("<svg") == 8


def test_the_page_is_self_contained():
    page = render_page(_data())
    reader = _read(page)
    assert all(reference.startswith("#") for reference in reader.references)
    assert len(reader.ids) == len(set(reader.ids))
    assert {reference[1:] for reference in reader.references} <= set(reader.ids)
    assert set(re.findall(r"url\(#([^)]+)\)", page)) <= set(reader.ids)
    assert not re.search(r"@import|url\((?!#)|<link|<img|<iframe", page)
    # Namespaces are names, not addresses that anything is loaded from.
    assert set(re.findall(r"https?://[^\"' <]+", page)) <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }


def test_names_cannot_break_out():
    page = render_page(_data(HOSTILE))
    assert page.count("<script>") == 1
    assert "alert(&quot;x&quot;)" in page
    _read(page)


def test_every_part_may_be_missing():
    _read(render_page(PageData(title="nothing")))
    only_weights = render_page(PageData(title="weights", sparsity=sparsity_of_state({"w": torch.eye(4)})))
    assert "<h2>Weights</h2>" in only_weights
    assert "Latency" not in only_weights


@pytest.mark.parametrize(
    "name", ["conv", HOSTILE, "$x_1$ and \\alpha", "é" * 200], ids=["plain", "html", "tex", "long"]
)
def test_plots_are_well_formed_and_deterministic(name):
    layers = [_layer(f"{name}{index}", ms=0.1 * index + 0.01) for index in range(45)]
    made = [
        plots.plot_times(layers),
        plots.plot_sparsity([layer.name for layer in layers], [0.5] * 45, list(range(45))),
        plots.plot_roofline(layers, Ceilings(100.0, 10.0, 1)),
        plots.plot_density({layer.name: 0.5 for layer in layers}, {}),
    ]
    for text in made:
        ElementTree.fromstring(text)
        assert re.match(r'<svg role="img" aria-label="[a-z ]+"', text)
        assert not re.match(r"<svg[^>]* (width|height)=", text)
    assert made[0] == plots.plot_times(layers)


def test_plots_leave_matplotlib_as_it_was():
    before = dict(matplotlib.rcParams), matplotlib.get_backend(auto_select=False)
    render_page(_data())
    assert (dict(matplotlib.rcParams), matplotlib.get_backend(auto_select=False)) == before


def test_without_matplotlib_the_message_says_what_to_install(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SparseEngineError, match=r"pip install 'sparse-engine\[report\]'"):
        render_page(_data())


def test_a_roofline_without_weights_or_work():
    for layers in ([], [_layer("a", ms=0.0)]):
        drawn = ElementTree.fromstring(plots.plot_roofline(layers, Ceilings(100.0, 10.0, 1)))
        assert drawn.tag.endswith("svg")
        assert len(drawn) > 0, "the roof is drawn all the same"


def test_a_warning_stands_at_the_top():
    page = render_page(PageData(title="t", warning="the machine was busy"))
    assert page.index("the machine was busy") < page.index("<footer>")
    assert "class=warning>" not in render_page(PageData(title="t"))


def test_the_slowest_layers_are_shown():
    layers = [_layer(f"layer{index}", ms=0.1 + index) for index in range(50)]
    plot = plots.plot_times(layers)
    assert "layer49<" in plot
    assert "layer9<" not in plot
    assert f"the {plots.BARS} slowest of 50 layers" in render_page(PageData(title="t", layers=layers))

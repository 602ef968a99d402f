"""One self-contained HTML page: what was converted, where the time goes, how sparse each layer is."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sparse_engine.report import plots
from sparse_engine.report.measure import Ceilings, LayerTime
from sparse_engine.report.sparsity import SparsityReport


@dataclass
class PageData:
    """Everything a page can show; each part may be missing.

    Attributes:
        title: what the page is about, usually a file name.
        machine: one line: processor, threads, versions.
        warning: what makes the figures doubtful, if anything.
        command: what makes the page again.
        date: when it was made.
        report: `sparse_engine.convert.Report.to_json()`.
        sparsity: of the weights in the file.
        benchmarks: `Benchmark.to_json()` by batch size.
        layers: measured times by layer.
        layers_batch: the batch size they were measured at.
        ceilings: what the machine allows.
        training: the rows of a training run's log.
        summary: the summary of a training run.
        diagnostics: `diagnostics.json` of a training run.
        file_bytes: size of the file.
    """

    title: str
    machine: str = ""
    warning: str = ""
    command: str = ""
    date: str = ""
    report: Mapping[str, Any] | None = None
    sparsity: SparsityReport | None = None
    benchmarks: Sequence[Mapping[str, Any]] = ()
    layers: Sequence[LayerTime] = ()
    layers_batch: int = 1
    ceilings: Ceilings | None = None
    training: Sequence[Mapping[str, Any]] = ()
    summary: Mapping[str, Any] = field(default_factory=dict)
    diagnostics: Mapping[str, Any] = field(default_factory=dict)
    file_bytes: int | None = None


def render_page(data: PageData) -> str:
    """The page as HTML text that refers to nothing outside itself.

    Example:
        >>> page = render_page(PageData(title="model.spx"))
        >>> page.startswith("<!doctype html>")
        True

    Args:
        data: what to show.

    Returns:
        HTML.

    Raises:
        SparseEngineError: matplotlib is not installed.
    """
    sections = [
        _cards(data),
        _training(data),
        _diagnostics(data),
        _latency(data),
        _times(data),
        _roofline(data),
        _sparsity(data),
        _layer_table(data),
        _weight_table(data),
        _notes(data),
    ]
    body = "\n".join(section for section in sections if section)
    busy = f"<p class=warning>{_escape(data.warning)}</p>" if data.warning else ""
    facts = " · ".join(_escape(text) for text in (data.machine, data.date) if text)
    command = f"<p class=command>Made by <code>{_escape(data.command)}</code></p>" if data.command else ""
    return (
        "<!doctype html>\n"
        f'<html lang="en"><head><meta charset="utf-8"><title>{_escape(data.title)}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{_STYLE}</style></head>\n<body><main>"
        f"<header><h1>{_escape(data.title)}</h1><p class=facts>{facts}</p>{busy}</header>\n"
        f"{body}\n<footer>{command}</footer></main><script>{_SCRIPT}</script></body></html>\n"
    )


# -- sections ----------------------------------------------------------------------------------------------------------


def _cards(data: PageData) -> str:
    cards: list[tuple[str, str, str]] = []
    for result in data.benchmarks[:3]:
        middle = result["executable"]["p50"]
        dense = result["dense"]["p50"]
        cards.append(
            (
                f"{result['speedup']:.2f}×",
                f"speed-up, batch {result['batch']}",
                f"{_ms(middle)} against {_ms(dense)} ms",
            )
        )
    report, sparsity = data.report, data.sparsity
    if data.summary.get("test_accuracy") is not None:
        cards.append(
            (f"{100 * data.summary['test_accuracy']:.2f} %", "test accuracy", str(data.summary.get("data", "")))
        )
    if report:
        before, after = report["bytes_before"], data.file_bytes or report["bytes_after"]
        cards.append((_size(after), "size", f"{_size(before)} before, {before / after:.1f}× smaller" if after else ""))
        cards.append((f"{report['sparsity']:.1%}", "of the weights are zero", ""))
        cards.append(
            (
                f"{report['native_share']:.1%}",
                "of the work runs natively",
                _count(report["fallbacks"], "fallback") if report["fallbacks"] else "nothing through PyTorch",
            )
        )
        if report["max_error"] is not None:
            cards.append(
                (f"{report['max_error']:.1e}", "largest error", f"of the output's scale; bound {report['bound']:.0e}")
            )
    elif sparsity:
        cards.append(
            (f"{sparsity.sparsity:.1%}", "of the weights are zero", f"{sparsity.zeros:,} of {sparsity.weights:,}")
        )
        cards.append((_size(sparsity.packed_bytes), "size when packed", f"{_size(sparsity.dense_bytes)} dense"))
        cards.append((f"{sparsity.sparse_layers} of {len(sparsity.layers)}", "layers have zeros", ""))
    made = "".join(
        f"<div class=card><b>{_escape(value)}</b><span>{_escape(what)}</span><small>{_escape(more)}</small></div>"
        for value, what, more in cards
    )
    return f"<div class=cards>{made}</div>" if made else ""


def _training(data: PageData) -> str:
    if not data.training:
        return ""
    return _section("Training", plots.plot_training(data.training), "Vertical lines separate the stages of the recipe.")


def _diagnostics(data: PageData) -> str:
    sections = []
    flowing = [row for row in data.training if row.get("gradient_norm") is not None]
    if flowing:
        note = (
            "Norm of the loss gradient over kept weights, on the same training samples after every epoch; overlap: "
            "intersection over union with the mask that training began with."
        )
        sections.append(_section("Gradient flow", plots.plot_flow(flowing), note))
    found = data.diagnostics
    if found.get("density"):
        note = "Logarithmic. Overlap, where masks moved: intersection over union of the first and the last mask."
        overlaps = found.get("mask_overlap", {})
        if "total" in overlaps:
            note += f" Over all layers it is {overlaps['total']:.3f}."
        sections.append(_section("Density by layer", plots.plot_density(found["density"], overlaps), note))
    if found.get("loss_surface"):
        surface = found["loss_surface"]
        note = (
            f"Cross entropy of {found.get('samples', 'some')} training samples on a plane through the trained weights, "
            "along two random directions scaled to each filter's norm. Removed weights stay removed."
        )
        sections.append(_section("Loss surface", plots.plot_surface(surface["axis"], surface["losses"]), note))
    if found.get("mean_jsv"):
        rows = [
            [when, f"{found['mean_jsv'][key]:.4g}"]
            for key, when in (("before", "before training, masks chosen"), ("after", "after training"))
            if found["mean_jsv"].get(key) is not None
        ]
        note = "Mean singular value of the input-output Jacobian; near 1, signals and gradients keep their size."
        sections.append(_section("Conditioning", _table(["when", ">Mean-JSV"], rows), note))
    return "\n".join(sections)


def _latency(data: PageData) -> str:
    if not data.benchmarks:
        return ""
    rows = []
    for result in data.benchmarks:
        for key, name in (("executable", "executable"), ("dense", result["dense_name"])):
            timing, per_second = result[key], result["samples_per_second"][key]
            speed = f"{result['speedup']:.2f}×" if key == "executable" else ""
            quantiles = [_ms(timing[quantile]) for quantile in ("p10", "p50", "p90", "p99")]
            rows.append([str(result["batch"]), name, *quantiles, f"{per_second:,.1f}", str(timing["runs"]), speed])
    head = [">batch", "contender", ">p10 ms", ">p50 ms", ">p90 ms", ">p99 ms", ">samples/s", ">runs", ">speed-up"]
    threads = data.benchmarks[0]
    note = (
        f"Measured in turns in one run; executable threads: {threads['threads'] or 'all'}, "
        f"PyTorch threads: {threads['dense_threads']}. Whiskers: 10 to 90 % of the calls."
    )
    return _section("Latency", plots.plot_latency(data.benchmarks) + _table(head, rows), note)


def _times(data: PageData) -> str:
    if not data.layers:
        return ""
    total, dense = (sum(getattr(layer, key) for layer in data.layers) for key in ("ms", "dense_ms"))
    note = (
        f"Medians at batch {data.layers_batch}, measured in turns: {_ms(total)} ms in the executable, "
        f"{_ms(dense)} ms when PyTorch runs the same optimised graph node by node. "
        "Single nodes are timed, so the sums differ from the latency above."
    )
    if len(data.layers) > plots.BARS:
        note += f" Shown are the {plots.BARS} slowest of {len(data.layers)} layers."
    return _section("Where the time goes", plots.plot_times(data.layers), note)


def _roofline(data: PageData) -> str:
    if not data.layers or data.ceilings is None:
        return ""
    note = (
        "Each circle is a layer with a weight, its area the layer's share of the time. Only FLOPs on kept weights "
        "count, and each byte of weight, input and output once. The ceilings were measured in this run with "
        f"{_count(range(data.ceilings.threads), 'thread')}: fused multiply-adds on registers, and reading 64 MiB, "
        "part of which the last cache may serve. Dashed: reading 4 MiB, which is what bounds layers of up to that size "
        "(weight, input and output together), and the faster of a matrix product and a convolution by PyTorch."
    )
    return _section("Roofline", plots.plot_roofline(data.layers, data.ceilings), note)


def _sparsity(data: PageData) -> str:
    if data.sparsity is None or not data.sparsity.layers:
        return ""
    layers = sorted(data.sparsity.layers, key=lambda layer: -layer.weights)[:60]
    layers = [layer for layer in data.sparsity.layers if layer in layers]
    plot = plots.plot_sparsity(
        [layer.name for layer in layers], [layer.sparsity for layer in layers], [layer.weights for layer in layers]
    )
    hidden = len(data.sparsity.layers) - len(layers)
    return _section(
        "Sparsity by layer", plot, f"The {hidden} smallest weights are in the table only." if hidden else ""
    )


def _layer_table(data: PageData) -> str:
    if data.report is None:
        return ""
    times = {layer.name: layer for layer in data.layers}
    head = [
        "layer",
        "op",
        ">output",
        "structure",
        ">sparsity",
        "kernel",
        ">ms",
        ">dense ms",
        ">speed-up",
        ">GFLOP/s",
        ">of peak",
        ">of limit",
        "why",
    ]
    rows = []
    for layer in data.report["layers"]:
        time = times.get(layer["name"])
        ms, dense = (time.ms, time.dense_ms) if time else (layer["ms"], layer["dense_ms"])
        limit = peak = ""
        if time and data.ceilings and layer["sparsity"] is not None:
            bound, share = time.bound(data.ceilings)
            limit, peak = f"{share:.0%} ({bound})", f"{time.share_of_peak(data.ceilings):.0%}"
        rows.append(
            [
                layer["name"],
                layer["op"],
                "×".join(map(str, layer["shape"])),
                layer["structure"] or "",
                "" if layer["sparsity"] is None else f"{layer['sparsity']:.1%}",
                layer["kernel"],
                _ms(ms),
                _ms(dense),
                f"{dense / ms:.2f}×" if ms and dense else "",
                f"{time.gflops:.0f}" if time and layer["sparsity"] is not None else "",
                peak,
                limit,
                layer["reason"],
            ]
        )
    if data.layers:
        note = (
            "ms and dense ms were measured for this page, the latter with PyTorch; the reasons are from the conversion "
            "and compare with the native dense kernel."
        )
    else:
        note = "ms and dense ms are from the conversion: the chosen kernel and the native dense kernel, timed in turns."
    if data.ceilings:
        note += (
            f" GFLOP/s count kept weights only; the peak is {data.ceilings.peak:.0f} GFLOP/s. The limit is what bounds "
            "the layer: that peak (compute), or its least traffic from the last cache (cache) or from memory (memory)."
        )
    return _section("Layers", _table(head, rows), note)


def _weight_table(data: PageData) -> str:
    if data.sparsity is None or data.report is not None:
        return ""
    head = ["weight", "shape", ">sparsity", "structure", ">empty outputs", ">empty inputs", ">dense", ">packed"]
    rows = [
        [
            layer.name,
            "×".join(map(str, layer.shape)),
            f"{layer.sparsity:.2%}",
            layer.structure,
            str(layer.empty_rows or ""),
            str(layer.empty_inputs or ""),
            _size(layer.dense_bytes),
            _size(layer.packed_bytes),
        ]
        for layer in data.sparsity.layers
    ]
    return _section("Weights", _table(head, rows))


def _notes(data: PageData) -> str:
    if data.report is None:
        return ""
    lines = [f"Batch sizes: {data.report['batch_sizes']}."]
    if data.report["removed_channels"]:
        lines.append(f"{data.report['removed_channels']} channels were constant and have been removed.")
    lines += [f"{name} runs through PyTorch: {reason}" for name, reason in data.report["fallbacks"].items()]
    lines += list(data.report["notes"])
    return _section("Notes", "<ul>" + "".join(f"<li>{_escape(line)}</li>" for line in lines) + "</ul>")


# -- pieces ------------------------------------------------------------------------------------------------------------


def _section(title: str, content: str, note: str = "") -> str:
    below = f"<p class=note>{_escape(note)}</p>" if note else ""
    return f"<section><h2>{_escape(title)}</h2>{content}{below}</section>"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose columns sort on a click; ">" before a name marks numbers, columns without content are left out."""
    kept = [index for index in range(len(head)) if any(row[index] for row in rows)]
    kinds = [" class=number" if head[index].startswith(">") else "" for index in kept]
    titles = "".join(
        f"<th{kind}>{_escape(head[index].removeprefix('>'))}</th>" for index, kind in zip(kept, kinds, strict=True)
    )
    lines = "".join(
        "<tr>"
        + "".join(f"<td{kind}>{_escape(row[index])}</td>" for index, kind in zip(kept, kinds, strict=True))
        + "</tr>"
        for row in rows
    )
    return f"<div class=scroll><table><thead><tr>{titles}</tr></thead><tbody>{lines}</tbody></table></div>"


def _escape(text: Any) -> str:
    return html.escape(str(text))


def _ms(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.4f}" if value < 0.1 else f"{value:.3f}" if value < 10 else f"{value:.1f}"


def _size(count: float) -> str:
    for unit in ("B", "KB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


def _count(items: Any, name: str) -> str:
    return f"{len(items)} {name}{'' if len(items) == 1 else 's'}"


_STYLE = """
:root{color-scheme:light;--ink:#1f2933;--soft:#5f6b76;--line:#e3e7eb;--accent:#0b6e99}
*{box-sizing:border-box}
body{margin:0;background:#f5f6f8;color:var(--ink);
 font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif}
main{max-width:1240px;margin:0 auto;padding:28px 20px 48px}
h1{font-size:26px;margin:0;overflow-wrap:anywhere}
h2{font-size:17px;margin:0 0 12px}
.facts{color:var(--soft);margin:4px 0 20px;font-size:13px}
.warning{background:#fdf3e3;border:1px solid #ecd3a7;border-radius:8px;padding:8px 14px;margin:0 0 16px;font-size:14px}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:12px;margin-bottom:16px}
.card,section{background:#fff;border:1px solid var(--line);border-radius:8px}
.card{padding:14px 16px}
.card b{display:block;font-size:23px;line-height:1.2;color:var(--accent)}
.card span,.card small{display:block}
.card small{color:var(--soft)}
section{padding:18px 20px;margin-bottom:16px}
section svg{display:block;width:100%;max-width:940px;height:auto;margin:0 auto}
.note{color:var(--soft);font-size:13px;margin:10px 0 0}
.scroll{overflow-x:auto;margin-top:8px}
table{border-collapse:collapse;width:100%;font-size:13px}
th{text-align:left;cursor:pointer;white-space:nowrap;border-bottom:2px solid var(--line);padding:5px 10px 5px 0;
 user-select:none}
th:hover{color:var(--accent)}
td{border-bottom:1px solid var(--line);padding:4px 10px 4px 0;vertical-align:top}
td:last-child{min-width:130px}
.number{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
td.number:last-child{min-width:0}
tbody tr:hover{background:#f2f7fa}
footer{color:var(--soft);font-size:13px}
code{background:#e9edf0;border-radius:4px;padding:1px 5px}
@media print{body{background:#fff}section,.card{break-inside:avoid}}
"""

_SCRIPT = """
document.querySelectorAll('th').forEach(function (cell) {
  cell.title = 'sort';
  cell.addEventListener('click', function () {
    var column = cell.cellIndex, body = cell.closest('table').tBodies[0], rows = Array.from(body.rows);
    var up = cell.dataset.up = cell.dataset.up === '1' ? '0' : '1';
    var number = cell.className === 'number';
    function key(row) {
      var text = row.cells[column].textContent;
      return number ? parseFloat(text.replace(/,/g, '')) || 0 : text;
    }
    rows.sort(function (a, b) {
      var x = key(a), y = key(b);
      return (x < y ? -1 : x > y ? 1 : 0) * (up === '1' ? 1 : -1);
    });
    rows.forEach(function (row) { body.appendChild(row); });
  });
});
"""

"""`sparse-engine doctor`: what this machine offers and what will run where."""

from __future__ import annotations

from typing import Any

from rich.markup import escape

from sparse_engine.cli._common import DebugOption, JsonOption, command, console, size, table
from sparse_engine.report.environment import Environment, environment


@command("doctor", "doctor", "doctor --json")
def doctor(as_json: JsonOption = False, debug: DebugOption = False) -> dict[str, Any]:
    """Show processor, threads, compilers, GPU and versions, and what will run where and why."""
    found = environment()
    if not as_json:
        _print(found)
    return found.to_json()


def _print(found: Environment) -> None:
    screen = console()
    machine = table("Machine", "", "")
    cpu = found.cpu
    machine.add_row("processor", escape(cpu["model"]))
    machine.add_row("cores", f"{cpu['physical_cores']} physical, {cpu['logical_cpus']} logical")
    machine.add_row("threads here", f"{found.threads['available']} ({', '.join(found.threads['limits'])})")
    machine.add_row("instruction sets", ", ".join(cpu["instruction_sets"]) or "none known")
    caches = ", ".join(f"{name} {size_in_powers(count)}" for name, count in cpu["caches"].items())
    machine.add_row("caches", caches or "unknown")
    machine.add_row("memory", size(cpu["memory_bytes"]) if cpu["memory_bytes"] else "unknown")
    for gpu in found.gpus:
        machine.add_row("GPU", f"{escape(gpu['name'])}, {gpu['compute_capability']}, {size(gpu['memory_bytes'])}")
    if not found.gpus:
        machine.add_row("GPU", f"none: {escape(found.gpu_reason)}")
    machine.add_row("system", f"{escape(found.system)}, {found.python}")
    screen.print(machine)

    versions = table("Versions", "", "")
    for name, version in {**found.packages, **found.compilers}.items():
        versions.add_row(name, escape(version) if version else "[dim]not found[/dim]")
    screen.print(versions)

    if found.variables:
        variables = table("Environment variables that matter", "", "")
        for name, value in found.variables.items():
            variables.add_row(name, escape(value))
        screen.print(variables)

    verdicts = table("What runs where", "work", "where", "why")
    for verdict in found.verdicts:
        where = escape(verdict.where)
        verdicts.add_row(verdict.work, where if verdict.works else f"[yellow]{where}[/yellow]", escape(verdict.why))
    screen.print(verdicts)


def size_in_powers(count: int) -> str:
    """Cache sizes are powers of two: `32 KiB`, `1 MiB`."""
    return f"{count // 1024**2} MiB" if count >= 1024**2 and count % 1024**2 == 0 else f"{count / 1024:.0f} KiB"

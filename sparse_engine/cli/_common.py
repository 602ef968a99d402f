"""What every command shares: error messages without tracebacks, JSON output, progress bars, tables."""

from __future__ import annotations

import functools
import inspect
import json
import math
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from typer.core import TyperGroup

from sparse_engine.errors import SparseEngineError

INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells use it: 128 + SIGINT."""

JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")]
ThreadsOption = Annotated[
    int | None, typer.Option(min=1, help="Threads of the kernels; all cores by default.", show_default=False)
]
DebugOption = Annotated[bool, typer.Option("--debug", help="On an error show the full traceback too.")]

_ORDER = ("doctor", "inspect", "prune", "train", "convert", "run", "bench", "report")


class _InOrderOfUse(TyperGroup):
    """Lists the commands as one comes to need them, not as their modules happen to be imported."""

    def list_commands(self, context: Any) -> list[str]:
        return sorted(super().list_commands(context), key=_ORDER.index)


app = typer.Typer(
    cls=_InOrderOfUse,
    name="sparse-engine",
    help="Prune, train sparse, convert, and run measurably faster.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


class UsageError(SparseEngineError):
    """Arguments that are well-formed but make no sense together; the message says what to write instead."""


def _print_version(wanted: bool) -> None:
    if wanted:
        import sparse_engine

        typer.echo(f"sparse-engine {sparse_engine.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    """Prune, train sparse, convert, and run measurably faster."""


def command(name: str, *examples: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a function as a command whose `--help` ends with examples and whose errors are single messages.

    The function returns what `--json` prints; with `--json` it must print nothing itself.
    """

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> None:
            as_json = bool(kwargs.get("as_json"))
            with _reporting_errors(debug=bool(kwargs.get("debug")), as_json=as_json):
                result = function(*args, **kwargs)
                if as_json:
                    typer.echo(json.dumps(plain(result), indent=2, ensure_ascii=False))

        # Annotations are strings in the command's own module; typer must see the types.
        run.__signature__ = inspect.signature(function, eval_str=True)  # type: ignore[attr-defined]
        run.__annotations__ = {key: value.annotation for key, value in run.__signature__.parameters.items()}  # type: ignore[attr-defined]
        lines = "\n\n".join(f"  [bold]sparse-engine {escape(example)}[/bold]" for example in examples)
        app.command(name, epilog=f"Example{'s' if len(examples) > 1 else ''}:\n\n{lines}")(run)
        return function

    return register


def console() -> Console:
    """Where tables go. Made anew on each use: tests and pipes replace the stream."""
    # A pipe has no width: leave room for whole names there instead of the 80 columns of a terminal of unknown size.
    return Console(file=sys.stdout, highlight=False, width=None if sys.stdout.isatty() else 160)


def messages() -> Console:
    """Where progress and errors go, so that they never mix with results."""
    return Console(file=sys.stderr, highlight=False)


@contextmanager
def progress(text: str, as_json: bool = False) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on a terminal, nothing elsewhere; gives a function to call with (done, total).

    ```python
    with progress("reading weights") as advance:
        advance(3, 10)
    ```
    """
    screen = messages()
    if as_json or not screen.is_terminal:
        yield lambda done, total: None
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=screen, transient=True) as bar:
        task = bar.add_task(text, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@contextmanager
def steps(as_json: bool = False) -> Iterator[Callable[[str], None]]:
    """A spinner with the name of the step that is under way; gives a function to call as each step begins."""
    screen = messages()
    if as_json or not screen.is_terminal:
        yield lambda name: None
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=screen, transient=True) as bar:
        task = bar.add_task("starting", total=None)
        yield lambda name: bar.update(task, description=name)


def check_writable(path: Path) -> None:
    """Find out before the long work that its result could not be written.

    Raises:
        OSError: the folder does not exist, or cannot be written to, or `path` is itself a folder.
    """
    if path.is_dir():
        raise IsADirectoryError(21, "Is a directory", str(path))
    folder = path.parent
    if not folder.is_dir():
        raise FileNotFoundError(2, "No such file or directory", str(folder))
    if not os.access(folder, os.W_OK):
        raise PermissionError(13, "Permission denied: the folder cannot be written to", str(folder))


def table(title: str, *columns: str) -> Table:
    """An empty table; a column whose name starts with ">" is right-aligned."""
    made = Table(title=title, title_justify="left", title_style="bold", header_style="bold", box=box.SIMPLE_HEAD)
    for column in columns:
        justify: Any = "right" if column.startswith(">") else "left"
        made.add_column(column.removeprefix(">"), justify=justify, overflow="fold", no_wrap=column.startswith(">"))
    made.show_header = any(columns)
    return made


def size(count: float) -> str:
    """Bytes for people: `12.3 MB`."""
    for unit in ("B", "KB", "MB", "GB"):
        if abs(count) < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError("unreachable")


def plain(value: Any) -> Any:
    """Plain JSON: numbers that JSON has no word for become null, tuples lists."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


@contextmanager
def _reporting_errors(*, debug: bool, as_json: bool) -> Iterator[None]:
    previous = _end_on_sigterm()
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            yield
    except (typer.Exit, typer.Abort):
        raise
    except KeyboardInterrupt:
        messages().print("Interrupted; no file was left half-written.")
        raise typer.Exit(INTERRUPTED) from None
    except BrokenPipeError:
        # The reader of our output (head, less) is gone: no one is left to tell.
        sys.stderr.close()
        raise typer.Exit(1) from None
    except Exception as error:
        if debug:
            traceback.print_exc()
        _print_error(error, as_json)
        raise typer.Exit(2 if isinstance(error, UsageError) else 1) from None
    finally:
        if previous is not None:
            signal.signal(signal.SIGTERM, previous)


def _show_warning(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
    """A warning as one line without the source code that Python shows; deprecations are for programmers."""
    if not issubclass(category, DeprecationWarning | PendingDeprecationWarning | FutureWarning):
        messages().print(f"[yellow]note:[/yellow] {escape(str(message))}", soft_wrap=True)


def _print_error(error: Exception, as_json: bool) -> None:
    expected = isinstance(error, SparseEngineError | OSError | MemoryError)
    message = _describe(error)
    if not expected:
        message += "\nThis is not a message sparse-engine meant to give; --debug shows where it comes from."
    if as_json:
        typer.echo(json.dumps({"error": {"type": type(error).__name__, "message": message}}, indent=2))
    messages().print(f"[bold red]error:[/bold red] {escape(message)}", soft_wrap=True)


def _describe(error: Exception) -> str:
    if isinstance(error, FileNotFoundError) and error.filename:
        return f"{error.filename}: there is no such file or folder"
    if isinstance(error, IsADirectoryError) and error.filename:
        return f"{error.filename}: is a folder, a file is needed"
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, MemoryError):
        return f"not enough memory {error}".strip()
    text = str(error).strip()
    return text if isinstance(error, SparseEngineError) else f"{type(error).__name__}: {text}"


def _end_on_sigterm() -> Any:
    """Let SIGTERM unwind like Ctrl-C, so that temporary files are removed; returns the handler to restore."""

    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    try:
        return signal.signal(signal.SIGTERM, interrupt)
    except ValueError:  # not in the main thread
        return None

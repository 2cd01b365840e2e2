"""What the command line prints, and how it fails: shared by all commands."""

from __future__ import annotations

import functools
import json
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Annotated, Literal, ParamSpec

import typer
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from topiarist.errors import MissingRecordsError, TopiaristError, TuningLogError

FAILED, ERROR, MISSING, BROKEN_LOG, INTERRUPTED = 1, 2, 3, 4, 130  # exit codes

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]

ProgressCall = Callable[[str, int, int], None]
_PIPE_WIDTH = 200  # columns of a table that goes to a file or a pipe
_Args = ParamSpec("_Args")


class Settings:
    """Options given before the command's name, and whether Ctrl-C was pressed."""

    debug = False
    interrupted = False


def watch_interrupts() -> None:
    """Remember Ctrl-C: TVM makes an error of its own of an exception in the middle of its work."""

    def interrupt(*_: object) -> None:
        Settings.interrupted = True
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, interrupt)


def command(function: Callable[_Args, None]) -> Callable[_Args, None]:
    """A command whose errors become one paragraph and an exit code."""

    @functools.wraps(function)
    def run(*args: _Args.args, **kwargs: _Args.kwargs) -> None:
        try:
            function(*args, **kwargs)
        except KeyboardInterrupt:
            complain("interrupted")
            raise typer.Exit(INTERRUPTED) from None
        except (typer.Exit, BrokenPipeError):
            raise  # without its reader, Typer ends the program quietly
        except Exception as error:
            if Settings.interrupted:
                complain("interrupted")
                raise typer.Exit(INTERRUPTED) from None
            if Settings.debug or kwargs.get("debug"):
                raise
            complain(f"error: {_message(error)}")
            raise typer.Exit(_exit_code(error)) from None

    return run


def _exit_code(error: Exception) -> int:
    if isinstance(error, MissingRecordsError):
        return MISSING
    return BROKEN_LOG if isinstance(error, TuningLogError) else ERROR


def complain(text: str) -> None:
    """One paragraph on stderr."""
    Console(stderr=True).print(text, markup=False, highlight=False, soft_wrap=True)


def say(text: str) -> None:
    """One line on stdout."""
    Console().print(text, markup=False, highlight=False, soft_wrap=True)


def print_json(document: object) -> None:
    """The one JSON document of a command."""
    sys.stdout.write(json.dumps(document, indent=2) + "\n")


def print_table(headers: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """A table; columns of numbers are aligned to the right. Nothing is cut off."""
    console = Console()
    if not console.is_terminal:
        console.width = _PIPE_WIDTH
    table = Table(box=box.SIMPLE_HEAD)
    last = len(headers) - 1
    for index, header in enumerate(headers):
        numeric = bool(rows) and all(_is_numeric(row[index]) for row in rows)
        justify: Literal["left", "right"] = "right" if numeric else "left"
        whole = index < last and not console.is_terminal  # a narrow terminal would cut it off
        table.add_column(header, justify=justify, overflow="fold", no_wrap=whole)
    for row in rows:
        table.add_row(*(_cell(value) for value in row))
    console.print(table)


def print_explanations(layers: Mapping[str, Sequence[str]]) -> None:
    """The sentences about each layer; layers of the same sentences share a line."""
    names: dict[tuple[str, ...], list[str]] = {}
    for name, sentences in layers.items():
        if sentences:
            names.setdefault(tuple(sentences), []).append(name)
    for sentences, alike in names.items():
        say(f"{', '.join(alike)}: {' '.join(sentences)}")


@contextmanager
def progress_bar(shown: bool) -> Iterator[ProgressCall]:
    """A callback `(stage, done, total)` that draws on stderr where somebody sees it.

    It raises KeyboardInterrupt if an earlier one was lost.
    """
    console = Console(stderr=True)
    if not shown or not console.is_terminal:
        yield lambda stage, done, total: _stop_if_interrupted()
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), console=console, transient=True) as bar:
        task = bar.add_task("", total=None)

        def update(stage: str, done: int, total: int) -> None:
            _stop_if_interrupted()
            bar.update(task, description=stage, completed=done, total=total)

        yield update


def _stop_if_interrupted() -> None:
    if Settings.interrupted:
        raise KeyboardInterrupt


def percent(share: float | None) -> str:
    """0.125 -> `12.5 %`."""
    return "-" if share is None else f"{100 * share:.1f} %"


def _message(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    if isinstance(error, TopiaristError | ValueError | OSError):
        return str(error) or type(error).__name__
    what = " ".join(f"{type(error).__name__}: {error}".split())[:500]
    return f"{what}. This is a bug in topiarist: please report it with what --debug shows"


def _is_numeric(value: object) -> bool:
    if isinstance(value, str):
        number = value.removesuffix(" %")
        return number == "-" or number.replace(".", "", 1).isdigit()
    return value is None or isinstance(value, int | float)


def _cell(value: object) -> Text:
    """Plain text: names of layers may look like Rich's markup."""
    if value is None:
        return Text("-")
    return Text(f"{value:.3f}" if isinstance(value, float) else str(value))

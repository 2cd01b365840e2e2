"""The command line: `topiarist COMMAND`. Heavy imports happen inside the commands."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from topiarist.compiler import (
    cli_board,
    cli_bundles,
    cli_latency,
    cli_logs,
    cli_models,
    cli_prune,
    cli_report,
    cli_runtime,
    cli_targets,
    cli_train,
    cli_tune,
)
from topiarist.compiler.cli_output import (
    INTERRUPTED,
    Debug,
    Settings,
    complain,
    say,
    watch_interrupts,
)

app = typer.Typer(
    name="topiarist",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
cli_targets.app.command("runtime")(cli_runtime.runtime)
app.add_typer(cli_targets.app, name="targets")
app.add_typer(cli_logs.app, name="log")
app.add_typer(cli_latency.app, name="model")
app.add_typer(cli_board.app, name="board")
app.command("inspect")(cli_models.inspect)
app.command("prune")(cli_prune.prune)
app.command("train-prune")(cli_train.train_prune)
app.command("tune")(cli_tune.tune)
app.command("compile")(cli_models.compile_)
app.command("verify")(cli_bundles.verify)
app.command("bench")(cli_bundles.bench)
app.command("run")(cli_bundles.run)
app.command("report")(cli_report.report)


def _print_version(wanted: bool) -> None:
    if wanted:
        from topiarist.compiler.runtime import versions

        say("\n".join(f"{package} {version}" for package, version in versions().items()))
        raise typer.Exit


@app.callback()
def options(
    debug: Debug = False,
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Show the versions and exit."
        ),
    ] = False,
) -> None:
    """A compiler for pruned convolutional networks: it makes them really faster."""
    Settings.debug = debug


def main() -> None:
    """The entry point of the command `topiarist`."""
    watch_interrupts()
    try:
        app()
    except KeyboardInterrupt:
        complain("interrupted")
        sys.exit(INTERRUPTED)


if __name__ == "__main__":
    main()

"""Writing a result to a file: whole or not at all."""

from __future__ import annotations

from pathlib import Path
from uuid import uuid4

from topiarist.errors import OutputError


def check_output(output: Path) -> Path:
    """The path, or OutputError when no file can be written there: for before long work."""
    if output.is_dir():
        raise OutputError(f"{output} is a folder; name a file to write")
    if not output.absolute().parent.is_dir():
        raise OutputError(f"the folder {output.parent} of the output doesn't exist")
    return output


def write_file(output: Path, data: bytes) -> None:
    """Write aside and rename: never half a file under its name. Raises OutputError."""
    aside = output.with_name(f".{output.name}.{uuid4().hex[:8]}")
    try:
        aside.write_bytes(data)
        aside.replace(output)
    except OSError as error:
        raise OutputError(f"can't write {output}: {error.strerror}") from error
    finally:
        aside.unlink(missing_ok=True)

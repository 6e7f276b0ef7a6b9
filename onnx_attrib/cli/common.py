"""What the commands share: how errors end, how arguments are read, how results are shown."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from onnx_attrib.compiler import checked_reduce, chosen, resolved
from onnx_attrib.errors import CompileError, OptionError, suggest
from onnx_attrib.job import Choice, Request
from onnx_attrib.methods import Method
from onnx_attrib.methods import get as method_named
from onnx_attrib.recipe import Recipe

DEBUG = "ONNX_ATTRIB_DEBUG"
"""Set in the environment, it shows the traceback of an internal error."""

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
picture_option = click.option(
    "--plot",
    "picture",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Draw input and attribution (.png, .pdf, .svg): red for, blue against.",
)
output_option = click.option(
    "--output", metavar="TENSOR", help="Explain this float tensor. [default: the first output]"
)
compared_methods = click.option(
    "--methods",
    "methods",
    multiple=True,
    required=True,
    metavar="[LABEL=]NAME,…",
    help="The methods, with commas between; a LABEL lets one stand there twice, with different "
    "options (--option LABEL.KEY=VALUE).",
)
words_option = click.option(
    "--words",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="The words of token ids: a line each, or a JSON list or object.",
)
method_options = click.option(
    "--option",
    "options",
    multiple=True,
    metavar="[METHOD.]KEY=VALUE",
    help="An option of the methods that have it, or of one METHOD; may be repeated.",
)


class Commands(click.Group):
    """A group whose expected failures are one clear message and exit code 1."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """As usual, naming the nearest command for an unknown one."""
        if args and self.get_command(ctx, args[0]) is None and not args[0].startswith("-"):
            advice = suggest(args[0], self.list_commands(ctx))
            raise click.UsageError(f"No such command '{args[0]}': {advice}", ctx)
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; nothing ends in a traceback."""
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort, BrokenPipeError):
            raise
        except CompileError as error:
            raise click.ClickException(str(error)) from None
        except MemoryError:
            raise click.ClickException("not enough memory") from None
        except OSError as error:
            place = f"'{error.filename}': " if error.filename else ""
            raise click.ClickException(f"{place}{error.strerror or error}") from None
        except Exception as error:
            if os.environ.get(DEBUG):
                raise
            raise click.ClickException(
                f"internal error: {type(error).__name__}: {' '.join(str(error).split())[:300]}\n"
                f"This is a bug in onnx-attrib. {DEBUG}=1 shows where it happened."
            ) from None


def forgiving_streams() -> None:
    """Let a terminal that lacks a character show a '?' for it."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="replace")


# -- arguments -------------------------------------------------------------------------------------


# click's stubs make this class generic from 8.4 on; in 8.2 it takes no argument at run time.
class Parameter(click.ParamType):  # type: ignore[type-arg]
    """What the kinds of arguments here derive from."""


class TargetType(Parameter):
    """``input``, ``argmax``, ``seed``, an index, or indices with commas between them."""

    name = "target"

    def __init__(self, *modes: str) -> None:
        self.modes = modes

    def get_metavar(self, param: click.Parameter, ctx: click.Context | None = None) -> str:
        """How the help shows it."""
        return "|".join((*self.modes, "INT", "INT,INT"))

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> str | int | tuple[int, ...]:
        """Read the text of a target."""
        if not isinstance(value, str) or value in self.modes:
            return value
        try:
            indices = tuple(int(part) for part in value.replace("−", "-").split(","))
        except ValueError:
            advice = suggest(value, self.modes) if self.modes else "give whole numbers"
            self.fail(f"'{value}' is not a target: {advice}", param, ctx)
        return indices[0] if len(indices) == 1 else indices


class Numbers(Parameter):
    """Numbers with commas between them."""

    name = "numbers"

    def get_metavar(self, param: click.Parameter, ctx: click.Context | None = None) -> str:
        """How the help shows it."""
        return "NUMBER[,NUMBER…]"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[float, ...]:
        """Read the text of the numbers; a fraction such as 1/255 is one."""
        if not isinstance(value, str):
            return value
        try:
            return tuple(_number(part) for part in value.replace("−", "-").split(","))
        except (ValueError, ZeroDivisionError):
            self.fail(f"'{value}' is not a number, or numbers with commas between", param, ctx)


def _number(text: str) -> float:
    above, _, below = text.partition("/")
    return float(above) / float(below or 1)


def number_or_text(text: str) -> float | str:
    """A number if the text is one."""
    try:
        return float(text.replace("−", "-"))
    except ValueError:
        return text


class TargetsType(Parameter):
    """``topK``, or classes with commas between them."""

    name = "targets"

    def get_metavar(self, param: click.Parameter, ctx: click.Context | None = None) -> str:
        """How the help shows it."""
        return "topK|INT,INT…"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> str | tuple[int, ...]:
        """Read the text of several targets."""
        if not isinstance(value, str):
            return value
        if value.startswith("top") and value[3:].isdecimal() and int(value[3:]):
            return value
        try:
            return tuple(int(part) for part in value.replace("−", "-").split(","))
        except ValueError:
            self.fail(f"'{value}' is neither topK, like top3, nor classes, like 3,5", param, ctx)


def chosen_methods(names: Sequence[str], pairs: Sequence[str] = ()) -> tuple[Choice, ...]:
    """Methods and their options from KEY=VALUE and METHOD.KEY=VALUE texts.

    UsageError with the nearest spelling. KEY is of the methods that have it, METHOD.KEY of one.
    """
    with as_usage_error():
        methods = [method_named(name).name for name in names]
        if len(set(methods)) < len(methods):
            raise OptionError("a method is named twice")
        common, own = _options(pairs, methods)
        return chosen(own, common)


def labelled_methods(texts: Sequence[str], pairs: Sequence[str] = ()) -> dict[str, Choice]:
    """Methods by label from texts ``METHOD,LABEL=METHOD,…``, and options as for chosen_methods.

    A label lets one method stand there twice, with different options (LABEL.KEY=VALUE).
    """
    with as_usage_error():
        methods: dict[str, Method] = {}
        for part in (part.strip() for text in texts for part in text.split(",")):
            label, _, name = part.rpartition("=")
            method = method_named(name.strip())
            label = label.strip() or method.name
            if label in methods:
                raise OptionError(f"'{label}' is named twice: call one of them OTHER={method.name}")
            methods[label] = method
        common, own = _options(pairs, list(methods))
        return resolved({label: (one, own[label]) for label, one in methods.items()}, common)


def _options(
    pairs: Sequence[str], labels: Sequence[str]
) -> tuple[dict[str, str], dict[str, dict[str, str]]]:
    """Options for all that have them, and those of each label."""
    common: dict[str, str] = {}
    own: dict[str, dict[str, str]] = {label: {} for label in labels}
    for pair in pairs:
        key, separator, value = pair.partition("=")
        label, dot, name = key.strip().rpartition(".")
        if not separator or not name or (dot and not label):
            raise OptionError(f"option '{pair}' is not of the form [METHOD.]KEY=VALUE")
        if dot and label not in own:
            spelled = label.lower().replace("_", "-")
            if spelled not in own:
                raise OptionError(
                    f"option '{key}' is of a method that is not asked for: "
                    f"{suggest(spelled, labels)}"
                )
            label = spelled
        options, name = own[label] if dot else common, name.replace("-", "_")
        if name in options:
            raise OptionError(f"option '{key.strip()}' is given twice")
        options[name] = value.strip()
    return common, own


def as_mapping(choices: Sequence[Choice]) -> dict[str, dict[str, Any]]:
    """The options of each method by name, as :func:`onnx_attrib.compile` takes them."""
    return {choice.method.name: dict(choice.options) for choice in choices}


def reductions(texts: Sequence[str]) -> dict[str | int, str]:
    """How axes are reduced, from AXIS=HOW texts."""
    found: dict[str | int, str] = {}
    with as_usage_error():
        for text in texts:
            for axis, how in checked_reduce(text).items():
                if axis in found:
                    raise OptionError(f"axis '{axis}' is reduced twice")
                found[axis] = how
    return found


@contextmanager
def as_usage_error() -> Iterator[None]:
    """Turn OptionError into a usage error, which ends with exit code 2."""
    try:
        yield
    except OptionError as error:
        raise click.UsageError(str(error), click.get_current_context(silent=True)) from None


# -- results ---------------------------------------------------------------------------------------


def print_json(value: Any) -> None:
    """Print a value as JSON; what is not finite becomes null."""
    click.echo(json.dumps(_finite(value), indent=2, ensure_ascii=False, allow_nan=False))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not abs(value) < float("inf"):
        return None
    return value


def note(text: str) -> None:
    """Say something that is not the result."""
    click.echo(f"Note: {text}", err=True)


@contextmanager
def progress(text: str) -> Iterator[None]:
    """Show what is going on while it does, on a terminal only."""
    shown = sys.stderr.isatty()
    if shown:
        click.echo(f"{text} …", err=True, nl=False)
    try:
        yield
    finally:
        if shown:
            click.echo("\r\x1b[K", err=True, nl=False)


def show_bytes(count: int) -> str:
    """A file size for people."""
    size = float(count)
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"


def show_targets(targets: int | Sequence[int]) -> str:
    """Several targets for people."""
    if isinstance(targets, int):
        return f"top {targets}: the largest classes of each sample, in falling order"
    return ", ".join(map(str, targets))


def show_processing(made: Request | Recipe) -> str:
    """What was made of the attributions, for people."""
    parts = [
        f"{axis if isinstance(axis, str) else f'axis {axis}'} reduced by {how}"
        for axis, how in made.reduce.items()
    ]
    return ", ".join([*parts, *(["normalized"] if made.normalize else [])])


def rows(pairs: Sequence[tuple[str, str]], indent: str = "  ") -> str:
    """Lines of labels and texts in two columns."""
    width = max((len(label) for label, _ in pairs), default=0)
    return "\n".join(f"{indent}{label:<{width}}  {text}".rstrip() for label, text in pairs)

"""``onnx-attrib methods``."""

from __future__ import annotations

import click

from onnx_attrib.catalog import MethodInfo, describe, methods
from onnx_attrib.cli.common import as_usage_error, json_option, print_json, rows
from onnx_attrib.methods import get as method_named


@click.command(
    "methods",
    epilog="""\b
Examples:
  onnx-attrib methods
  onnx-attrib methods integrated-gradients
""",
)
@click.argument("name", required=False)
@json_option
def methods_command(name: str | None, as_json: bool) -> None:
    """List the attribution methods, or show the options of NAME.

    g(z) is what takes the place of the derivative f'(z) of each nonlinearity f in the chain rule.
    """
    if name is None:
        found = methods()
        if as_json:
            print_json([method.to_dict() for method in found])
        else:
            click.echo("\n\n".join(_brief(method) for method in found))
        return
    with as_usage_error():
        method = describe(method_named(name))
    if as_json:
        print_json(method.to_dict())
    else:
        click.echo(_full(method))


def _brief(method: MethodInfo) -> str:
    return f"{method.name}\n" + rows(
        [("", method.summary), ("g(z)", method.formula), ("paper", method.paper)]
    )


def _full(method: MethodInfo) -> str:
    facts = [
        ("g(z)", method.formula),
        ("paper", method.paper),
        ("baseline", "zeros (--baseline)" if method.needs_reference else "none"),
        ("sums to S(x) − S(x̄)", "yes" if method.complete else "not promised"),
    ]
    lines = [method.name, f"  {method.summary}", rows(facts)]
    lines.append("Options (--option KEY=VALUE):" if method.options else "Options: none")
    for option in method.options:
        what = option.name if option.required else f"{option.name}={option.default}"
        extra = ""
        if option.choices:
            extra = f" [{', '.join(option.choices)}]"
        elif option.minimum is not None:
            extra = f" [at least {option.minimum:g}]"
        lines.append(rows([(what, option.help + extra)]))
    return "\n".join(lines)

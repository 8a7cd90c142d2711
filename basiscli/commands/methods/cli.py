"""The commands `basis methods` and `basis methods show`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from basiscli.cli.command import Command, OwnMethod, command_points, load_command
from basiscli.cli.fields import argument
from basiscli.cli.options import Plugins
from basiscli.cli.output import Output
from basiscli.cli.session import Session
from basiscli.cli.signature import NO_HELP, terminal_function

if TYPE_CHECKING:
    from basiscli.registry import Registry
    from basiscli.transforms import Method


class ShowOptions(Plugins):
    """Options of `basis methods show`."""

    name: Annotated[str, argument("A method.", complete=lambda given: _names(given))]


def list_methods(options: Plugins, session: Session) -> None:
    """Print a line for each method; one that does not load is a warning."""
    from basiscli.registry import Registry

    out = session.out
    found, broken = _load_all(Registry.with_files(options.plugins))
    for message in broken:
        out.note(f"warning: {message}", warning=True)
    own = _own_methods()
    rows = [[method.family, method.name, method.summary] for method in found]
    rows += [[command, method.name, method.summary] for command, method in own]
    documents = [_document(method) for method in found]
    out.result(
        [*documents, *(method.as_dict(command) for command, method in own)],
        lambda: out.table(["command", "method", "what it does"], rows),
    )


def show(options: ShowOptions, session: Session) -> None:
    """Print what a method does, its parameters and its source."""
    from basiscli.errors import UsageError, did_you_mean
    from basiscli.registry import FAMILIES, Registry

    name, registry = options.name, Registry.with_files(options.plugins)
    families = [family for family in FAMILIES if name in registry.names(family)]
    own = [(command, method) for command, method in _own_methods() if method.name == name]
    if not families and not own:
        raise UsageError(f"no method '{name}'", remedy=did_you_mean(name, _names({"plugins": options.plugins})))
    found = [registry.find(family, name) for family in families]

    def text() -> None:
        _show(session.out, found)
        for command, method in own:
            session.out.line(f"basis {command}\n\n{method.doc}\n\nsource: {method.source}")

    documents = [_document(method) for method in found]
    session.out.result([*documents, *(method.as_dict(command) for command, method in own)], text)


def group() -> typer.Typer:
    """Return the Typer application of `basis methods` and `basis methods show`."""
    listing = Command(
        "methods", "List the installed methods.", __name__, options=Plugins, main=list_methods, terminal=("as_json",)
    )
    showing = Command(
        "show", "Show a method: what it does, its parameters and its source.", __name__, options=ShowOptions, main=show,
        terminal=("as_json",),
    )  # fmt: skip
    app = typer.Typer(
        help="List the installed methods, or show one.", invoke_without_command=True, context_settings=NO_HELP
    )
    app.callback()(terminal_function(listing))
    app.command("show", context_settings=NO_HELP)(terminal_function(showing))
    return app


def _names(given: Any) -> list[str]:
    from basiscli.registry import FAMILIES, Registry

    registry = Registry.with_files(list(given.get("plugins") or ()))
    own = [method.name for _, method in _own_methods()]
    return sorted({*own, *(name for family in FAMILIES for name in registry.names(family))})


def _own_methods() -> list[tuple[str, OwnMethod]]:
    """Return the methods that commands have built in, each with the words that use it."""
    from basiscli.errors import UsageError

    found = []
    for point in command_points().values():
        try:
            command = load_command(point)
        except UsageError:  # a line of warning when the application was put together
            continue
        found += [(method.usage or command.name, method) for method in command.own_methods]
    return found


def range_in_words(limits: Iterable[Any]) -> str:
    """Return the range of a parameter in words: '0 to 1' or 'above 0, at most 1'."""
    words = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
    bounds = {name: getattr(limit, name) for limit in limits for name in words if hasattr(limit, name)}
    if "ge" in bounds and "le" in bounds:
        return f"{bounds['ge']:g} to {bounds['le']:g}"
    return ", ".join(f"{words[name]} {bound:g}" for name, bound in bounds.items())


def _load_all(registry: Registry) -> tuple[list[Method], list[str]]:
    """Load every method; one that does not load is a line of warning and no more."""
    from basiscli.errors import UsageError
    from basiscli.registry import FAMILIES

    found, broken = [], []
    for family in FAMILIES:
        for name in registry.names(family):
            try:
                found.append(registry.find(family, name))
            except UsageError as error:
                broken.append(error.what)
    return found, broken


def _document(method: Method) -> dict[str, Any]:
    return {
        "command": method.family,
        "name": method.name,
        "doc": method.doc,
        "source": method.source,
        "needs_base": method.needs_base,
        "takes_weights": "weights" in method.wants,
        "parameters": method.parameters.model_json_schema().get("properties", {}),
    }


def _show(out: Output, found: list[Method]) -> None:
    from basiscli.transforms.per_model import is_per_model, limits_of

    for method in found:
        out.line(f"basis {method.family} --method {method.name}")
        out.line()
        out.line(method.doc)
        out.line()
        rows = []
        for name, field in method.parameters.model_fields.items():
            one_each = is_per_model(field)
            kind = (
                "number, or a list with one a model"
                if one_each
                else getattr(field.annotation, "__name__", str(field.annotation))
            )
            limits = range_in_words(limits_of(field))
            rows.append(
                [
                    name,
                    kind,
                    "required" if field.is_required() else str(field.default),
                    limits,
                    field.description or "",
                ]
            )
        if rows:
            out.table(["parameter", "type", "default", "range", "meaning"], rows)
            out.line()
        if method.family == "merge":
            fewest, most = method.models
            out.line(f"models: {fewest}" + (" or more" if most is None else f" to {most}" if most > fewest else ""))
        takes = "base needed" if method.needs_base else "no base needed"
        out.line(f"{takes}; {'takes --weights' if 'weights' in method.wants else 'no weights'}")
        if method.source:
            out.line(f"source: {method.source}")

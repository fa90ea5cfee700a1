"""Commands of many options: one for each field of a dataclass, whose metadata are what `typer.Option` takes."""

import dataclasses
import inspect
from collections.abc import Callable
from typing import Annotated, Any

import typer

Command = Callable[..., None]


def an_option_for_each_field(of: type[Any]) -> Callable[[Command], Command]:
    """Spells out the `**options` of a command with one argument."""

    def spelled_out(command: Command) -> Command:
        first = next(iter(inspect.signature(command).parameters.values()))
        options = [
            first.replace(
                name=field.name,
                kind=first.KEYWORD_ONLY,
                annotation=Annotated[field.type, typer.Option(**field.metadata)],
                default=first.empty if field.default is dataclasses.MISSING else field.default,
            )
            for field in dataclasses.fields(of)
        ]
        vars(command)["__signature__"] = inspect.Signature([first, *options])
        command.__annotations__ |= {option.name: option.annotation for option in options}
        return command

    return spelled_out

"""The registry: every method's name, paper, promise and parts.

A method is a function from a target and options to a drafter and a rule.
To add one: write the drafter (and rule), then one `Method` line here.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from specref.draft.base import Drafter
from specref.lm.drafts import WEIGHTS
from specref.rules.base import Rule

Parts = tuple[Drafter, Rule]


@dataclass(frozen=True)
class Method:
    """One line of the registry.

    Attributes:
        name: what users type.
        build: ``build(target, **options) -> (drafter, rule)``.
        paper: first author, year and arXiv number.
        chapter: the book page that derives it.
        lossless: the output law equals the target's own.
        weights: trained weights that it uses by default, or None.
        summary: one line for people.
    """

    name: str
    build: Callable[..., Parts]
    paper: str
    chapter: str
    lossless: bool
    weights: str | None
    summary: str

    @property
    def options(self) -> list[str]:
        """Names of the options that `parts` takes."""
        names = list(inspect.signature(self.build).parameters)
        return names[1:]

    @property
    def ready(self) -> bool:
        """Whether it runs without options, its head or draft being shipped.

        Others are trained first, or given.
        """
        takes = inspect.signature(self.build).parameters
        head = getattr(takes.get("head"), "default", None)
        draft = getattr(takes.get("draft"), "default", None)
        needs = [f"head-{head}"] if isinstance(head, str) else []
        needs += [f"draft-{draft}"] if draft == "other" else []
        return all((WEIGHTS / f"{n}.safetensors").exists() for n in needs)

    def parts(self, target: Any, **options: Any) -> Parts:
        """Build drafter and rule.

        Raises:
            ValueError: an option that this method does not take.
        """
        for name in options:
            if name not in self.options:
                raise ValueError(
                    f"method {self.name!r} takes no option {name!r}; it "
                    f"takes {self.options}"
                )
        return self.build(target, **options)

    def row(self) -> dict[str, Any]:
        """What ``specref methods --json`` prints."""
        keys = ("name", "paper", "chapter", "lossless", "weights", "summary")
        return {key: getattr(self, key) for key in keys}


_METHODS: dict[str, Method] = {}


def register(method: Method) -> Method:
    """Add a method; a second one of the same name is an error."""
    if method.name in _METHODS:
        raise ValueError(f"method {method.name!r} is registered already")
    _METHODS[method.name] = method
    return method


def methods() -> list[Method]:
    """Every registered method, in the order of the book."""
    from specref import (  # noqa: F401  they fill the registry
        catalogue,
        catalogue_heads,
        catalogue_text,
    )

    return list(_METHODS.values())


def method(name: str) -> Method:
    """The method of that name.

    Raises:
        ValueError: unknown name; the message lists the known ones.
    """
    known = {m.name: m for m in methods()}
    if name not in known:
        raise ValueError(
            f"unknown method {name!r}: give one of {', '.join(known)}"
        )
    return known[name]

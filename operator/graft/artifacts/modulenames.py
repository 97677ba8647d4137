"""The names of one module in two classes of transformers (PURE).

For many multimodal models, transformers has a class of the language model alone and a class of the whole. The trainer and
the CPU engine load the language model alone. vLLM and peft look for an adapter's modules under their names in the whole.
"""

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Renaming:
    """Where the language model's blocks are: `inner` in the class that is tuned, `outer` in the whole model.

    Empty names stand for the model itself.
    """

    inner: str = ""
    outer: str = ""

    def outward(self, name: str) -> str:
        """Return the name in the whole model of a module of the language model."""
        return _moved(name, self.inner, self.outer)

    def inward(self, name: str) -> str:
        """Return the name in the language model of a module of the whole model."""
        return _moved(name, self.outer, self.inner)


def find_renaming(
    inner: Iterable[tuple[str, type[object]]], outer: Iterable[tuple[str, type[object]]]
) -> Renaming | None:
    """Return the renaming from (name, class) of the modules of both models, outermost first.

    The part that both share is the first module of the language model whose class the whole model has, too. None if they
    share no part.
    """
    classes: dict[type[object], str] = {}
    for name, kind in outer:
        classes.setdefault(kind, name)
    return next((Renaming(name, classes[kind]) for name, kind in inner if kind in classes), None)


def shortest_names(chosen: Iterable[str], everything: Iterable[str]) -> list[str]:
    """Return names for peft's target_modules that stand for exactly the `chosen` modules, sorted. `everything` are the
    names of all modules.

    peft matches the end of a name. The last part is used if it stands for chosen modules only, else the last two parts,
    else the whole name.
    """
    wanted = set(chosen)
    others = {end for name in everything if name not in wanted for end in (_end(name, 1), _end(name, 2))}
    return sorted({next((end for end in (_end(n, 1), _end(n, 2)) if end not in others), n) for n in wanted})


def _end(name: str, parts: int) -> str:
    return ".".join(name.split(".")[-parts:])


def _moved(name: str, old: str, new: str) -> str:
    if old and name != old and not name.startswith(f"{old}."):
        return name
    rest = name if not old else name[len(old) + 1 :]
    return ".".join(part for part in (new, rest) if part)

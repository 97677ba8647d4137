"""What the API server says to the values of a sample of fields. It is asked once a session, by dry runs."""

from typing import Any

import pytest
from worlds.cluster.api import Api
from worlds.fields.hints import NAMESPACE, fields_of
from worlds.fields.sample import ALL, CHOICE, VARIABLE, sample
from worlds.fields.tries import Tried, try_fields

MOST = 12  # fields of each kind, in a sample


def pytest_terminal_summary(terminalreporter: Any) -> None:
    what = (
        "all fields" if ALL else f"a sample of the fields; {VARIABLE}={CHOICE} repeats it, and {VARIABLE}=all tries all"
    )
    terminalreporter.write_line(f"tests/cluster/fields tried {what}")


@pytest.fixture(scope="session")
def namespaced(api: Api) -> Api:
    """Create the namespace of the dry runs. No operator is bound to it."""
    api.create({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE}})
    return api


class Answers(dict[str, Tried]):
    """What the API server said: kind -> answers. Each kind is asked for once."""

    def __init__(self, api: Api) -> None:
        super().__init__()
        self.api = api

    def __missing__(self, kind: str) -> Tried:
        self[kind] = try_fields(self.api, kind, sample(fields_of(kind), MOST, kind))
        return self[kind]


@pytest.fixture(scope="session")
def tried(namespaced: Api) -> dict[str, Tried]:
    return Answers(namespaced)

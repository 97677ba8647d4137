"""The root key of the embedded store: made once, whoever starts first."""

import base64

import pytest
from graft.kube import KubeError
from graft.reconcile.shared.storekey import root_key, root_key_secret
from worlds.reconciling import MemoryKube, Object

NAMESPACE, NAME = "graft-system", "graft-store-key"


async def test_the_key_is_made_once_and_stays() -> None:
    kube = MemoryKube()
    made = await root_key(kube, NAMESPACE, NAME)  # type: ignore[arg-type]
    assert made["access-key-id"] == "graft-root" and len(made["secret-access-key"]) == 40
    assert await root_key(kube, NAMESPACE, NAME) == made  # type: ignore[arg-type]
    assert root_key_secret(NAMESPACE, NAME) != root_key_secret(NAMESPACE, NAME)


async def test_of_two_operators_the_second_uses_the_key_of_the_first() -> None:
    first = root_key_secret(NAMESPACE, NAME)

    class Raced(MemoryKube):
        async def create(self, manifest: Object) -> None:
            self.objects[self._key(first)] = first
            raise KubeError(409, "AlreadyExists", "it exists")

    made = await root_key(Raced(), NAMESPACE, NAME)  # type: ignore[arg-type]
    assert base64.b64decode(first["data"]["secret-access-key"]).decode() == made["secret-access-key"]


async def test_an_incomplete_secret_says_what_to_do() -> None:
    broken = root_key_secret(NAMESPACE, NAME) | {"data": {"access-key-id": "eA=="}}
    with pytest.raises(ValueError, match=r"must have the entries .* Delete it, and restart the operator and the store"):
        await root_key(MemoryKube(broken), NAMESPACE, NAME)  # type: ignore[arg-type]

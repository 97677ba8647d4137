"""The objects of which the cache otherwise holds only the metadata: those that were used last, in a bounded memory."""

from collections import OrderedDict, defaultdict

from graft.cache.objects import Packing, Place
from graft.manifests.metadata import Manifest

MOST = 24 * 2**20  # bytes of all compressed objects
Key = tuple[str, Place]  # kind and place


class Bodies:
    """Whole objects, each with its version. If there are too many, those that were not used for the longest time go."""

    def __init__(self, most: int = MOST) -> None:
        self._most = most
        self._packing: defaultdict[str, Packing] = defaultdict(Packing)
        self._held: OrderedDict[Key, tuple[int, bytes]] = OrderedDict()
        self.size = 0  # bytes

    def get(self, kind: str, place: Place, version: int) -> Manifest | None:
        """Return the object in exactly this version, or None."""
        found = self._held.get((kind, place))
        if found is None or found[0] != version:
            return None
        self._held.move_to_end((kind, place))
        return self._packing[kind].unpack(found[1])

    def put(self, kind: str, place: Place, version: int, item: Manifest) -> None:
        """Hold an object instead of its other versions."""
        self.forget(kind, place)
        data = self._packing[kind].pack(item)
        self._held[kind, place] = (version, data)
        self.size += len(data)
        while self.size > self._most:
            _, (_, oldest) = self._held.popitem(last=False)
            self.size -= len(oldest)

    def forget(self, kind: str, place: Place) -> None:
        found = self._held.pop((kind, place), None)
        self.size -= len(found[1]) if found is not None else 0

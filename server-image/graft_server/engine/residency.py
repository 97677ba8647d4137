"""Which adapters are in the model's memory, and how a forward pass runs each row with its own one.

Only the engine's worker thread calls this. An adapter that is registered may be evicted when it is idle and more than
`max_cpu_loras` are resident; it is read again from its path when a request needs it.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from inspect import signature
from itertools import count
from typing import Any

import torch
from peft import PeftModel, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer

from graft_server.engine.adapters import AdapterInvalidError, AdapterNotFoundError, AdapterWeights, read_adapter
from graft_server.engine.model import BaseModel

log = logging.getLogger(__name__)

BASE_ROW = "__base__"  # peft's name for a row without an adapter
_slots = count()


def _new_slot() -> str:
    return f"slot{next(_slots)}"


@dataclass(eq=False)
class Adapter:
    """A registered adapter.

    `slot` is its name inside the model: clients' names have dots, which torch's module names may not, and a slot is
    never used twice, so no request can meet another adapter that took its name over. A `retired` adapter was unloaded
    or replaced; it leaves memory with its last request.
    """

    name: str
    path: str
    slot: str = field(default_factory=_new_slot)
    retired: bool = False


class Residency:
    """The base model with the resident adapters injected into it."""

    def __init__(self, base: BaseModel, max_cpu_loras: int, max_lora_rank: int) -> None:
        self._base = base
        self._max_resident = max_cpu_loras
        self._max_rank = max_lora_rank
        self._model: PeftModel | None = None  # None: no adapter is resident and the base model is as it was loaded
        self._takes = set(signature(base.network.forward).parameters)
        self._resident: OrderedDict[str, Adapter] = OrderedDict()  # by slot, the least recently used first

    def names(self) -> list[str]:
        """The names of the adapters in memory. Any thread may ask: the list is taken in one step."""
        return [adapter.name for adapter in list(self._resident.values())]

    def attach(self, adapter: Adapter, weights: AdapterWeights) -> None:
        """Puts an adapter into the model. Raises AdapterInvalidError, and leaves no trace, where peft refuses it."""
        try:
            if self._model is None:
                self._model = PeftModel(
                    self._base.network, weights.config, adapter_name=adapter.slot, low_cpu_mem_usage=True
                )
            else:
                self._model.add_adapter(adapter.slot, weights.config, low_cpu_mem_usage=True)
            result = set_peft_model_state_dict(
                self._model, dict(weights.tensors), adapter_name=adapter.slot, low_cpu_mem_usage=True
            )
            empty = [name for name, value in self._model.named_parameters() if value.is_meta]
            if result.unexpected_keys or empty:
                raise AdapterInvalidError(f"weights do not fit the model: {[*result.unexpected_keys, *empty][:3]}")
        except Exception as error:
            self._remove(adapter)
            if isinstance(error, AdapterInvalidError):
                raise
            raise AdapterInvalidError(f"peft refused the adapter: {error}") from error
        self._model.requires_grad_(False)
        self._model.eval()
        self._resident[adapter.slot] = adapter

    def ensure(self, adapter: Adapter) -> None:
        """Makes an adapter resident that may have been evicted, and marks it as used now.

        Raises AdapterNotFoundError or AdapterInvalidError where its files are not what they were.
        """
        if adapter.slot not in self._resident:
            try:
                weights = read_adapter(adapter.path, self._base.modules, self._max_rank)
            except AdapterNotFoundError as error:
                raise AdapterNotFoundError(f"the files of adapter {adapter.name!r} are gone") from error
            self.attach(adapter, weights)
            log.info("reloaded adapter %s from %s", adapter.name, adapter.path)
        self._resident.move_to_end(adapter.slot)

    def trim(self, running: Collection[Adapter], waiting: Collection[Adapter]) -> None:
        """Frees retired adapters that no request needs, then evicts idle ones beyond the limit, oldest first."""
        for adapter in list(self._resident.values()):
            if adapter in running:
                continue
            if adapter.retired:
                if adapter not in waiting:
                    self._remove(adapter)
            elif len(self._resident) > self._max_resident:
                self._remove(adapter)

    def forward(self, inputs: dict[str, Any], adapters: Sequence[Adapter | None]) -> Any:
        """Runs the model; row i goes through `adapters[i]`, or the bare base model. Returns the last logits [rows, vocab]."""
        inputs = {**inputs, "use_cache": True, "logits_to_keep": 1}
        inputs = {name: value for name, value in inputs.items() if name in self._takes}
        with torch.inference_mode():
            if self._model is None:
                return self._base.network(**inputs).logits[:, -1]
            names = [adapter.slot if adapter else BASE_ROW for adapter in adapters]
            try:
                return self._model(**inputs, adapter_names=names).logits[:, -1]
            except Exception:
                # peft leaves the hooks that carry the names in place when a forward pass fails.
                for _, layer in self._lora_layers():
                    layer._forward_pre_hooks.clear()
                    layer._forward_pre_hooks_with_kwargs.clear()
                raise

    def _remove(self, adapter: Adapter) -> None:
        self._resident.pop(adapter.slot, None)
        if self._model is None or not self._resident:
            self._restore_base()
            return
        # A survivor is made peft's "active" adapter first. Rows name theirs, so it changes no answer, but left alone
        # every layer would choose its own and peft would look one up that is gone.
        self._model.set_adapter(next(iter(self._resident)), inference_mode=True)
        if adapter.slot in self._model.peft_config:
            self._model.delete_adapter(adapter.slot)
        else:  # peft rolled its own bookkeeping back, but not the layers it had already made
            for _, layer in self._lora_layers():
                layer.delete_adapter(adapter.slot)

    def _restore_base(self) -> None:
        """Takes every LoRA layer out, so that the base model is again what was loaded."""
        for name, layer in self._lora_layers():
            self._base.network.set_submodule(name, layer.base_layer)
        if hasattr(self._base.network, "peft_config"):
            del self._base.network.peft_config
        self._model = None

    def _lora_layers(self) -> list[tuple[str, Any]]:
        modules = self._base.network.named_modules()
        return [(name, module) for name, module in modules if isinstance(module, LoraLayer)]

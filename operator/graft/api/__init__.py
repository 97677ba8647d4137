"""The custom resources as pydantic models, one file per kind. They are the only schema.

They know which values are valid. They do not know what the operator does with them.
"""

from graft.api.adapter import Adapter
from graft.api.adapterdeployment import AdapterDeployment
from graft.api.apikey import ApiKey
from graft.api.basemodel import BaseModel
from graft.api.finetunejob import FineTuneJob
from graft.api.meta import API_VERSION, GROUP, VERSION, Condition, Resource
from graft.api.tenant import Tenant

__all__ = [
    "API_VERSION",
    "GROUP",
    "VERSION",
    "Adapter",
    "AdapterDeployment",
    "ApiKey",
    "BaseModel",
    "Condition",
    "FineTuneJob",
    "Resource",
    "Tenant",
]

"""Locations in the bucket: which of them belong to a tenant, and which imports and datasets the operator refuses."""

import pytest
from graft.api import Adapter, FineTuneJob
from graft.artifacts.layout import in_tenants_part, outside_tenants_part
from graft.reconcile.adapter import adapterjob
from graft.reconcile.finetunejob import finetunejob

# URI -> (below the prefix of tenant "shop" in bucket "graft", in that bucket but outside the prefix)
PLACES = {
    "s3://graft/shop/adapters/a/1.0.0/": (True, False),
    "s3://graft/shop/train.jsonl": (True, False),
    "s3://graft/shop/": (True, False),  # the whole prefix
    "s3://graft/shop": (False, True),  # an object with the name of the prefix
    "s3://graft/shopping/a/": (False, True),
    "s3://graft/sho/p/": (False, True),
    "s3://graft/Shop/a/": (False, True),
    "s3://graft//shop/a/": (False, True),
    "s3://graft/x/shop/a/": (False, True),
    "s3://graft/models/tiny/": (False, True),
    "s3://graft/shop/../other/a/": (False, True),
    "s3://graft/shop/./a/": (False, True),
    "s3://graft/shop/a..b/": (True, False),
    "s3://graft/": (False, True),
    "s3://graft": (False, True),
    "s3://elsewhere/shop/a/": (False, False),
    "s3://graft-too/shop/a/": (False, False),
    "s3:///shop/a/": (False, False),
    "hf://graft/shop/a": (False, False),
    "hf://datasets/graft/shop/a.jsonl": (False, False),
    "pvc://graft/shop/a": (False, False),
    "": (False, False),
}


@pytest.mark.parametrize("uri", PLACES)
def test_a_uri_is_inside_or_outside_the_prefix_of_the_tenant(uri: str) -> None:
    assert (in_tenants_part(uri, "graft", "shop"), outside_tenants_part(uri, "graft", "shop")) == PLACES[uri]


@pytest.mark.parametrize("uri", ["s3://graft/a", "s3://graft//a/", "s3://graft//", "s3://graft/"])
def test_a_tenant_without_a_name_has_no_prefix(uri: str) -> None:
    assert not in_tenants_part(uri, "graft", "") and outside_tenants_part(uri, "graft", "")


@pytest.mark.parametrize("uri", PLACES)
def test_imports_and_datasets_outside_the_prefix_of_the_tenant_are_refused(uri: str) -> None:
    metadata = {"name": "a", "namespace": "shop", "uid": "u"}
    spec = {"adapter": "a", "version": "1.0.0", "baseModel": "tiny", "method": "lora", "import": {"uri": "hf://a/b"}}
    adapter = Adapter.model_validate({"metadata": metadata, "spec": spec})
    dataset = {"train": {"uri": "pvc://data/train.jsonl"}}
    spec = {"baseModel": "tiny", "dataset": dataset, "method": {"lora": {}}, "output": {"adapter": "a"}}
    job = FineTuneJob.model_validate({"metadata": metadata, "spec": spec})
    assert adapter.spec.import_ is not None
    # The schema forbids some of these URIs. The assignment bypasses it, so that the check itself is tested.
    adapter.spec.import_.uri = job.spec.dataset.train.uri = uri
    found = (adapterjob.outside_namespace(adapter, "graft"), finetunejob.outside_namespace(job, "graft"))
    assert [item is not None for item in found] == [PLACES[uri][1]] * 2
    for trouble in found:
        assert trouble is None or trouble.message.endswith("below s3://graft/shop/")

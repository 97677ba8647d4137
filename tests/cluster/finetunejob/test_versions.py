"""The version number that a job publishes."""

from worlds.cluster.tenant import Tenant


def test_the_next_version_follows_from_the_recipe(tenant: Tenant) -> None:
    assert tenant.trained("first") == "support-1.0.0"
    assert tenant.trained("again") == "support-1.0.1"
    assert tenant.trained("other-recipe", method={"lora": {"rank": 4}}) == "support-1.1.0"
    assert tenant.trained("elsewhere", adapter="sales") == "sales-1.0.0"


def test_jobs_at_the_same_time_get_different_versions(tenant: Tenant) -> None:
    names = [f"job-{number}" for number in range(4)]
    for name in names:
        tenant.job(name)
    for name in names:
        tenant.running_pod(name)
    versions = [tenant.job_file(name).output.version for name in names]
    assert sorted(versions) == ["1.0.0", "1.0.1", "1.0.2", "1.0.3"]


def test_an_explicit_version_is_used_and_cannot_be_used_again(tenant: Tenant) -> None:
    assert tenant.trained("first", output={"adapter": "support", "version": "2.3.4"}) == "support-2.3.4"
    tenant.job("second", output={"adapter": "support", "version": "2.3.4"})
    waiting = tenant.until("FineTuneJob", "second", "Accepted", "VersionExists")
    assert "output.version" in waiting["message"]
    tenant.job("third")
    tenant.running_pod("third")
    assert tenant.job_file("third").output.version == "2.3.5"


def test_files_that_exist_in_storage_are_never_overwritten(tenant: Tenant) -> None:
    tenant.store.put(f"{tenant.name}/adapters/support/1.4.0/manifest.json", b"{}")
    tenant.job("careful")
    tenant.running_pod("careful")
    assert tenant.job_file("careful").output.version == "1.5.0"

"""What the planner asks of a Kubernetes API, with the real client over real HTTP."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from kubernetes import client

from inferflux.clock import ManualClock
from inferflux.errors import InvalidRequest, NotFound, PermissionDenied, Unavailable
from inferflux.types import Role
from services.registry.planner.k8s import DELETION_COST, LEASE_NAME, KubernetesActuator, KubernetesLease
from services.registry.planner.pool import Member
from services.registry.planner.spec import PoolSpec
from tests.support.tiny_kube import TinyKube, tiny_kube
from tests.unit.registry.records import worker

APPS = "/apis/apps/v1/namespaces/ifx"
STATEFUL, DEPLOYED = f"{APPS}/statefulsets/decode/scale", f"{APPS}/deployments/prefill/scale"
PODS = "/api/v1/namespaces/ifx/pods"
LEASE = f"/apis/coordination.k8s.io/v1/namespaces/ifx/leases/{LEASE_NAME}"
DECODE = PoolSpec(model="tiny", role=Role.DECODE, target="statefulset/decode")
PREFILL = PoolSpec(model="tiny", role=Role.PREFILL, target="deployment/prefill")


@pytest.fixture
def kube() -> Iterator[TinyKube]:
    with tiny_kube() as kube:
        for path in (STATEFUL, DEPLOYED):
            kube.add(path, {"metadata": {"name": "x"}, "spec": {"replicas": 3}})
        yield kube


@pytest.fixture
def api(kube: TinyKube) -> Iterator[client.ApiClient]:
    with client.ApiClient(client.Configuration(host=kube.url)) as api:
        yield api
        api.rest_client.pool_manager.clear()


@pytest.fixture
def actuator(api: client.ApiClient) -> KubernetesActuator:
    return KubernetesActuator(api, "ifx")


def replicas(kube: TinyKube, path: str) -> int:
    return kube.objects[path]["spec"]["replicas"]


async def test_sizes_are_read_and_set_through_the_scale(kube: TinyKube, actuator: KubernetesActuator) -> None:
    assert await actuator.size(DECODE) == 3

    await actuator.grow(DECODE, 5)
    await actuator.grow(PREFILL, 4)

    assert (replicas(kube, STATEFUL), replicas(kube, DEPLOYED)) == (5, 4)


async def test_a_statefulset_says_who_goes(kube: TinyKube, actuator: KubernetesActuator) -> None:
    """Its highest ordinals."""
    assert list(await actuator.doomed(DECODE, 1) or ()) == ["decode-1", "decode-2"]
    assert await actuator.doomed(PREFILL, 1) is None


async def test_a_deployment_is_told_who_goes_first(kube: TinyKube, actuator: KubernetesActuator) -> None:
    """One victim is gone already, which is no reason to stop."""
    kube.add(f"{PODS}/prefill-x", {"metadata": {"name": "prefill-x", "annotations": {"kept": "yes"}}})
    victims = [Member(worker(name), None) for name in ("prefill-x", "prefill-gone")]

    await actuator.shrink(PREFILL, 1, victims)

    annotations = kube.objects[f"{PODS}/prefill-x"]["metadata"]["annotations"]
    assert int(annotations[DELETION_COST]) < 0
    assert annotations["kept"] == "yes"
    assert replicas(kube, DEPLOYED) == 1


async def test_failures_say_what_could_not_be_done(kube: TinyKube, actuator: KubernetesActuator) -> None:
    with pytest.raises(InvalidRequest, match="target is missing"):
        await actuator.size(PoolSpec(model="tiny", role=Role.DECODE))
    with pytest.raises(NotFound, match="deployment/other"):
        await actuator.size(PoolSpec(model="tiny", role=Role.DECODE, target="deployment/other"))
    kube.denied.add(STATEFUL)
    with pytest.raises(PermissionDenied, match="statefulset/decode"):
        await actuator.grow(DECODE, 4)
    kube.is_failing = True
    with pytest.raises(Unavailable, match="500"):
        await actuator.size(PREFILL)


async def test_the_lease_has_one_holder_and_passes_on(kube: TinyKube, api: client.ApiClient) -> None:
    """Renewed by its holder, refused to another, taken when it was not renewed for its time, or given back."""
    clock = ManualClock()
    one, other = (KubernetesLease(api, "ifx", name, clock, ttl_s=15.0) for name in ("one", "other"))

    assert (await one.hold(), await other.hold()) == (True, False)
    clock.advance(10)
    assert (await one.hold(), await other.hold()) == (True, False)
    clock.advance(14)
    assert not await other.hold()
    clock.advance(2)
    assert (await other.hold(), await one.hold()) == (True, False)
    assert kube.objects[LEASE]["spec"]["leaseTransitions"] == 1

    await one.drop()
    assert kube.objects[LEASE]["spec"]["holderIdentity"] == "other"
    await other.drop()
    assert await one.hold()


async def test_of_two_at_once_one_gets_the_lease(kube: TinyKube, api: client.ApiClient) -> None:
    """Who writes what he read before somebody else wrote is told so."""
    clock = ManualClock()
    one, other = (KubernetesLease(api, "ifx", name, clock, ttl_s=15.0) for name in ("one", "other"))
    await one.hold()
    await one.drop()
    stale = other._read()
    assert await one.hold()

    with pytest.raises(client.ApiException) as conflict:
        other._replace(other._ours(stale))

    assert conflict.value.status == 409
    assert not await other.hold()

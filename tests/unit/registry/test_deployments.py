"""What is wanted of models and adapters, as values."""

from __future__ import annotations

import pytest

from inferflux.errors import InvalidRequest
from services.registry.deployments.adapter import AdapterSpec
from services.registry.deployments.deployment import Deployment, ModelSpec, Stage

OLD, NEW = (ModelSpec(model="org/m", source="/models/m", revision=revision) for revision in (1, 2))


def test_a_deployment_survives_being_written():
    """With what serves and what is to come."""
    deployment = Deployment("org/m", NEW, OLD, "why")

    assert Deployment.from_json(deployment.to_json()) == deployment
    assert ModelSpec.from_json({"model": "m", "settings": {"max_num_seqs": 8, "expert_parallel": True}}).settings == {
        "max_num_seqs": "8",
        "expert_parallel": "true",
    }


def test_what_fails_leaves_what_serves_in_place():
    """And what is loaded next begins anew."""
    loading = Deployment("org/m", OLD).settled(1).load(NEW)
    failed = loading.failed(2, "no")

    assert (loading.stage, loading.kept) == (Stage.LOADING, OLD)
    assert (failed.stage, failed.kept, failed.error) == (Stage.FAILED, OLD, "no")
    assert failed.load(NEW).stage is Stage.LOADING
    assert loading.settled(2).stage is Stage.READY
    assert (loading.unload().stage, loading.unload().kept) == (Stage.UNLOADING, None)


def test_news_of_an_earlier_revision_changes_nothing():
    """Somebody has asked for another one meanwhile."""
    loading = Deployment("org/m", NEW, OLD)

    assert loading.failed(1, "no") == loading.settled(1) == loading


@pytest.mark.parametrize(
    ("document", "complaint"),
    [
        ({}, "model: missing"),
        ({"model": "m", "colour": 1}, "unknown key 'colour'"),
        ({"model": "m", "prefill": "1"}, "prefill: must be a whole number"),
        ({"model": "m", "decode": 0}, "decode 0 is not from 1 to 64"),
        ({"model": "m", "source": "../m"}, "neither an absolute path nor a name"),
        ({"model": "m", "settings": {"bind": "x"}}, "'bind'"),
        ({"model": "m", "settings": {"dtype": []}}, "settings: must be"),
        ({"model": "m", "drain_s": float("nan")}, "drain_s: must be a number"),
        ([], "must be an object"),
    ],
)
def test_a_spec_that_makes_no_sense_is_refused(document, complaint):
    """With what is wrong."""
    with pytest.raises(InvalidRequest, match=complaint):
        ModelSpec.from_json(document)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"source": "x"}, "no absolute path"),
        ({"name": "m"}, "the same"),
        ({"name": "a b"}, "no name"),
        ({"tenants": "acme"}, "tenants: must be a list"),
        ({"is_pinned": 1}, "is_pinned: must be true or false"),
    ],
)
def test_an_adapter_that_makes_no_sense_is_refused(change, complaint):
    """With what is wrong; a right one survives being written."""
    right = {"name": "a", "model": "m", "source": "/a", "tenants": ["acme"]}
    assert AdapterSpec.from_json(AdapterSpec.from_json(right).to_json()).tenants == ("acme",)

    with pytest.raises(InvalidRequest, match=complaint):
        AdapterSpec.from_json(right | change)

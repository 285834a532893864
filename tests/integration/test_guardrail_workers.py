"""A real guardrail worker, asked by a real gateway over gRPC with certificates. One small model: the rest is alike."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from typing import Any

import pytest

from inferflux.v1 import policy_service_pb2 as policy_pb
from tests.support.fake_cluster import SSE_HEAD, FakeClient, FakeCluster, Job, end, fake_cluster, running_gateway
from tests.support.service import Service, until

RUDE = "you stupid asshole, go to hell"
RULE = {"name": "rude", "kind": "profanity", "action": "block", "deadline_ms": 2000, "on_failure": "block"}


def enact(cluster: FakeCluster, revision: int, **fields: Any) -> None:
    document = json.dumps({"guardrails": {"rules": [RULE | fields]}}).encode()
    cluster.policy.policy = policy_pb.PolicyRevision(revision=revision, document=document)
    cluster.policy.publish(revision)


def event(text: str, finish: str | None = None) -> bytes:
    choice = {"index": 0, "delta": {"content": text}, "finish_reason": finish}
    return b"data: " + json.dumps({"object": "chat.completion.chunk", "choices": [choice]}).encode() + b"\n\n"


async def rude_in_the_end(job: Job) -> None:
    job.emit(head=SSE_HEAD, data=event("It is a fine day. " * 30))
    await asyncio.sleep(0.05)
    job.emit(data=event(RUDE))
    job.emit(data=event("", "stop") + b"data: [DONE]\n\n", end=end())


async def say(gateway: FakeClient, text: str) -> int:
    return (await gateway.chat(messages=[{"role": "user", "content": text}])).status_code


@pytest.mark.timeout(180)
async def test_a_worker_judges_and_may_be_away():
    """What it finds is blocked, in prompts and in streams; a worker that hangs costs its deadline at most."""
    async with fake_cluster() as cluster:
        decode = await cluster.add_decode()
        enact(cluster, 50)
        worker = Service("services.guardrails", "guardrails-0", cluster.root, {"guardrail_kinds": "profanity"}).start()
        try:
            await until(worker.is_ready, 120)
            async with running_gateway(cluster, guardrails_address=worker.address) as gateway:
                await gateway.ready()
                assert await say(gateway, "What a fine day it is.") == 200
                assert await say(gateway, RUDE) == 400

                decode.script = rude_in_the_end
                text = (await gateway.chat(stream=True)).text
                assert "fine day" in text
                assert "stupid" not in text
                assert '"finish_reason":"content_filter"' in text

                os.kill(worker.pid, signal.SIGSTOP)
                enact(cluster, 60, deadline_ms=100)
                await until(lambda: gateway_uses(gateway, 60))
                assert await say(gateway, "What a fine day it is.") == 503
                enact(cluster, 70, deadline_ms=100, on_failure="allow", scope=["input"])
                await until(lambda: gateway_uses(gateway, 70))
                assert await say(gateway, RUDE) == 200
                os.kill(worker.pid, signal.SIGCONT)
        finally:
            worker.kill()


def gateway_uses(gateway: FakeClient, revision: int) -> bool:
    from inferflux.telemetry import metrics  # the gateway runs in this process

    return metrics.SNAPSHOT_REVISION.labels("policy")._value.get() == revision

from __future__ import annotations

from tests.support.fake_cluster import fake_cluster, running_gateway


async def test_streamed_request_goes_through_prefill_and_decode():
    """A streamed request is prefilled, decoded, relayed byte for byte, and its ticket given back."""
    async with fake_cluster() as cluster:
        prefill, decode = await cluster.add_prefill(), await cluster.add_decode()
        async with running_gateway(cluster) as gateway:
            await gateway.ready()
            response = await gateway.chat(stream=True)
            print(response.status_code, response.headers, response.text)
            assert response.status_code == 200

"""An S3-compatible bucket: which objects are below a prefix, each as an address that is signed for an hour or a day.

Credentials and address come from where other tools look for them: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY,
AWS_SESSION_TOKEN, ~/.aws/credentials, AWS_REGION, AWS_ENDPOINT_URL.
"""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any
from urllib.parse import urlsplit

from inferflux.cli.models import ModelError
from inferflux.cli.pull.download import RemoteFile
from inferflux.cli.pull.source import Bucket

ENDPOINT = "https://s3.amazonaws.com"
LIFE = timedelta(hours=24)


def list_files(source: Bucket) -> list[RemoteFile]:
    """List the objects below the prefix, named relative to it. Raises ModelError."""
    client, errors = _connect()
    prefix = source.prefix if source.prefix.endswith("/") or not source.prefix else source.prefix + "/"
    try:
        objects = client.list_objects(source.bucket, prefix=prefix, recursive=True)
        return [_file(client, source.bucket, prefix, item) for item in objects if not item.is_dir]
    except errors as e:
        raise ModelError(f"{source}: {str(e)[:300]}") from e


def _connect() -> tuple[Any, tuple[type[Exception], ...]]:
    try:
        from minio import Minio  # noqa: PLC0415 - an extra
        from minio.credentials.providers import AWSConfigProvider, ChainedProvider, EnvAWSProvider  # noqa: PLC0415
        from minio.error import MinioException  # noqa: PLC0415
        from urllib3 import PoolManager, Retry  # noqa: PLC0415
        from urllib3.exceptions import HTTPError  # noqa: PLC0415
    except ImportError as e:
        raise ModelError("s3:// needs one more package: pip install 'inferflux[s3]'") from e
    endpoint = urlsplit(os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ENDPOINT)
    client = Minio(
        endpoint=endpoint.netloc,
        secure=endpoint.scheme == "https",
        region=os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1",
        credentials=ChainedProvider([EnvAWSProvider(), AWSConfigProvider()]),
        http_client=PoolManager(retries=Retry(total=2, backoff_factor=0.2), timeout=30),
    )
    return client, (MinioException, HTTPError, ValueError)


def _file(client: Any, bucket: str, prefix: str, item: Any) -> RemoteFile:
    """An object in one piece is named by its MD5; of others nobody says more than their size."""
    etag = (item.etag or "").strip('"')
    digest = etag if len(etag) == 32 and "-" not in etag else ""
    url = client.presigned_get_object(bucket, item.object_name, expires=LIFE)
    return RemoteFile(item.object_name.removeprefix(prefix), url, item.size, "md5" if digest else "", digest)

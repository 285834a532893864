"""An engine in a process of its own, so that the contract suite can drive real ones next to each other.

    python -m tests.support.engine_host CONFIG      CONFIG: JSON, see `Config`

Tests talk to it over a unix socket, one connection per call, closed to cancel; the messages are pickles between the
test run and its own child. Prefill engines come with an arena and its server.
"""

from __future__ import annotations

import asyncio
import json
import os
import pickle
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence
from contextlib import aclosing, asynccontextmanager, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from inferflux.engine import create
from inferflux.engine.base import ComputedPrompt, Engine, EngineInfo, EngineLoad, KvSource, Prefilled
from inferflux.engine.options import EngineOptions
from inferflux.kv.arena import Arena
from inferflux.kv.shm import ArenaServer
from inferflux.types import ChoiceTokens, Frame, HttpAnswer, HttpCall, RequestContext, Role

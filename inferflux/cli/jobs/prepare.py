"""Get a model ready to be served while a cluster runs; see inferflux.cli.models.

python -m inferflux.cli.jobs.prepare NAME_OR_FOLDER

Prints JSON lines: {"what": ..., "fraction": ...} as it goes, and at the end {"model": {...}} or {"error": ...}.
"""

from __future__ import annotations

import json
import os
import sys

from inferflux.cli import models, preflight
from inferflux.errors import InferfluxError
from inferflux.paths import models_dir


def prepare(source: str) -> dict[str, object]:
    """Describe the model as `quickstart` would. Raises InferfluxError."""
    model = models.prepare(
        source,
        models_dir(os.environ),
        lambda what, fraction: say(what=what, fraction=fraction),
        available_bytes=preflight.available_bytes(),
        is_verified_later=models.is_verified_later(os.environ),
    )
    return {
        "model_dir": str(model.folder),
        "model_digest": model.weights_digest,
        "numerics_reference": str(model.reference),
        "num_weight_bytes": model.num_weight_bytes,
    }


def say(**fields: object) -> None:
    """Tell the parent."""
    print(json.dumps(fields), flush=True)


if __name__ == "__main__":
    try:
        say(model=prepare(sys.argv[1]))
    except InferfluxError as error:
        say(error=error.message)

"""What the API server refuses, as Kubernetes says it."""

from __future__ import annotations

from typing import Any


class ApiError(Exception):
    """One refusal: HTTP code, machine-readable reason, message, and what it is about."""

    def __init__(self, code: int, reason: str, message: str, details: dict[str, Any] | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.reason = reason
        self.message = message
        self.details = details or {}

    def to_status(self) -> dict[str, Any]:
        return {
            "kind": "Status",
            "apiVersion": "v1",
            "metadata": {},
            "status": "Failure",
            "message": self.message,
            "reason": self.reason,
            "code": self.code,
            "details": self.details,
        }


def no_such_resource() -> ApiError:
    return ApiError(404, "NotFound", "the server could not find the requested resource")


def not_found(resource: str, name: str) -> ApiError:
    return ApiError(404, "NotFound", f'{resource} "{name}" not found', {"name": name, "kind": resource})


def conflict(resource: str, name: str) -> ApiError:
    message = (
        f'Operation cannot be fulfilled on {resource} "{name}": the object has been modified; '
        "please apply your changes to the latest version and try again"
    )
    return ApiError(409, "Conflict", message, {"name": name, "kind": resource})


def invalid(kind: str, name: str, problems: list[tuple[str, str]]) -> ApiError:
    """`problems`: pairs of field path and what is wrong with it."""
    causes = [{"reason": "FieldValueInvalid", "field": field, "message": text} for field, text in problems]
    listed = ", ".join(f"{field}: {text}" for field, text in problems)
    details = {"name": name, "kind": kind, "causes": causes}
    return ApiError(422, "Invalid", f'{kind} "{name}" is invalid: {listed}', details)

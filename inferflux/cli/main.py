"""inferctl. Commands are thin and import only what they need, so that any of them starts in a fraction of a second."""

from __future__ import annotations

import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Optional

import typer

from inferflux.cli.adapter_commands import app as adapters_app
from inferflux.cli.audit_commands import app as audit_app
from inferflux.cli.failure import CliError, Exit
from inferflux.cli.guardrails_commands import app as guardrails_app
from inferflux.cli.models_commands import app as models_app
from inferflux.cli.models_commands import pull
from inferflux.cli.output import Format, note
from inferflux.cli.policy_commands import app as policy_app
from inferflux.cli.policy_commands import view_app
from inferflux.cli.pool_commands import pools_app
from inferflux.cli.registry_commands import app as registry_app

HELP = """InferFlux: disaggregated LLM serving on this machine or elsewhere.

Clients read INFERCTL_API_KEY and INFERCTL_URL (default: the local cluster). State is in INFERFLUX_HOME (~/.inferflux),
models are in INFERFLUX_MODELS (~/.cache/inferflux/models).

Exit status: 0 fine, 1 failed, 2 wrong usage, 3 nothing is running, 4 key missing or not allowed to, 130 interrupted.
"""

app = typer.Typer(help=HELP, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
server_app = typer.Typer(help="The local cluster.", no_args_is_help=True)
admin_app = typer.Typer(help="Administration.", no_args_is_help=True)
keys_app = typer.Typer(help="API keys.", no_args_is_help=True)
app.add_typer(server_app, name="server")
app.add_typer(admin_app, name="admin")
app.add_typer(registry_app, name="registry")
app.add_typer(models_app, name="models")
app.command("pull")(pull)
app.add_typer(policy_app, name="policy")
app.add_typer(audit_app, name="audit")
app.add_typer(pools_app, name="pools")
app.add_typer(adapters_app, name="adapters")
admin_app.add_typer(keys_app, name="api-keys")
for view, title in (("rate_limit", "Rate limits"), ("budgets", "Budgets")):
    admin_app.add_typer(view_app(view, title), name=view.replace("_", "-"))
admin_app.add_typer(guardrails_app, name="guardrails")


class EngineName(StrEnum):
    """Value of --engine."""

    VLLM = "vllm"
    SIM = "sim"


class Dtype(StrEnum):
    """Value of --dtype. auto: bfloat16 where the CPU computes in it, else float32."""

    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


class FaultName(StrEnum):
    """What `inferctl chaos` can do."""

    KILL_DECODE = "kill-decode"
    KILL_PREFILL = "kill-prefill"
    HANG_DECODE = "hang-decode"
    HANG_PREFILL = "hang-prefill"
    KILL_GATEWAY = "kill-gateway"
    KILL_POLICY = "kill-policy"
    KILL_REGISTRY = "kill-registry"
    KILL_REDIS = "kill-redis"


class PartName(StrEnum):
    """Value of --only."""

    POLICY = "policy"
    REGISTRY = "registry"


class ScopeName(StrEnum):
    """Value of --scope."""

    GENERATE = "generate"
    READ = "read"
    ADMIN = "admin"


Output = Annotated[Format, typer.Option("-o", "--output", help="How to print the result.")]
Prompt = Annotated[Optional[str], typer.Argument(help="Text; read from stdin when missing.")]  # noqa: UP045 - typer
ModelName = Annotated[Optional[str], typer.Option("--model", help="Default: the first one served.")]  # noqa: UP045
MaxTokens = Annotated[Optional[int], typer.Option("--max-tokens", min=1)]  # noqa: UP045
Temperature = Annotated[float, typer.Option("--temperature", min=0.0, help="0: the likeliest answer each time.")]
NoStream = Annotated[bool, typer.Option("--no-stream", help="Print the answer when it is complete.")]
Local = Annotated[bool, typer.Option("--local", help="Use the operator's certificate of this home, not a key.")]


@app.command()
def quickstart(
    detach: Annotated[bool, typer.Option("--detach", "-d", help="Return when it is ready.")] = False,
    engine: Annotated[EngineName, typer.Option(help="sim simulates: it runs no model.")] = EngineName.VLLM,
    model: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="A name in INFERFLUX_MODELS or a Hugging Face folder. Default: smollm2-135m."),
    ] = None,
    prefill: Annotated[int, typer.Option(min=0, max=64, help="Prefill workers.")] = 1,
    decode: Annotated[int, typer.Option(min=1, max=64, help="Decode workers.")] = 1,
    embedding_model: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="A second model, for /v1/embeddings, /v1/score and /v1/rerank; named as --model is."),
    ] = None,
    pooling: Annotated[int, typer.Option(min=1, max=64, help="Pooling workers, if there is an --embedding-model.")] = 1,
    gateways: Annotated[int, typer.Option(min=1, max=16, help="Gateways, on ports one after the other.")] = 1,
    host: Annotated[str, typer.Option(help="Address the gateway listens on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 picks a free one.")] = 8080,
    dtype: Annotated[
        Dtype, typer.Option(help="auto: bfloat16 where the CPU computes in it, else float32.")
    ] = Dtype.AUTO,
    output: Output = Format.TABLE,
) -> None:
    """Start a cluster on this machine and say how to use it; Ctrl-C stops it."""
    from inferflux.cli.plan import ClusterOptions  # noqa: PLC0415
    from inferflux.cli.quickstart import quickstart  # noqa: PLC0415

    options = ClusterOptions(
        str(engine),
        "",
        prefill=prefill,
        decode=decode,
        pooling=pooling if embedding_model else 0,
        gateways=gateways,
        host=host,
        port=port,
        dtype=str(dtype),
    )
    quickstart(options, model, embedding_model, detach=detach, output=output)


@app.command()
def status(output: Output = Format.TABLE) -> None:
    """Show the processes of the local cluster."""
    from inferflux.cli.server import show_status  # noqa: PLC0415

    show_status(output)


@app.command()
@app.command()
def chat(
    prompt: Prompt = None,
    interactive: Annotated[bool, typer.Option("--interactive", "-i", help="Keep talking.")] = False,
    model: ModelName = None,
    max_tokens: MaxTokens = None,
    temperature: Temperature = 0.0,
    no_stream: NoStream = False,
    output: Output = Format.TABLE,
) -> None:
    """Ask a question."""
    from inferflux.cli import talk  # noqa: PLC0415

    sampling = talk.Sampling(model, max_tokens, temperature, not no_stream)
    if interactive:
        talk.converse(prompt, sampling)
    else:
        talk.chat(prompt, sampling, output)


@app.command()
def completion(
    prompt: Prompt = None,
    model: ModelName = None,
    max_tokens: MaxTokens = None,
    temperature: Temperature = 0.0,
    no_stream: NoStream = False,
    output: Output = Format.TABLE,
) -> None:
    """Continue a text."""
    from inferflux.cli import talk  # noqa: PLC0415

    talk.complete(prompt, talk.Sampling(model, max_tokens, temperature, not no_stream), output)


@app.command()
def tickets(
    live: Annotated[bool, typer.Option("--live", help="Only tickets that hold KV blocks now.")] = False,
    leaked: Annotated[
        bool, typer.Option("--leaked", help="Only those that should have ended; status 1 if any.")
    ] = False,
    output: Output = Format.TABLE,
) -> None:
    """Show the tickets of the prefill workers, and prove that they add up."""
    from inferflux.cli import tickets  # noqa: PLC0415

    tickets.show(output, live=live, leaked=leaked)


@app.command()
def drain(
    worker: Annotated[str, typer.Argument(help="Its id, e.g. decode-0.")],
    eta: Annotated[bool, typer.Option("--eta", help="Only say how long it would take.")] = False,
    wait: Annotated[bool, typer.Option("--wait", help="Return when the worker is gone.")] = False,
    within: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option("--within", min=0.0, help="Seconds for what runs; the rest moves. Default: the worker's own."),
    ] = None,
    output: Output = Format.TABLE,
) -> None:
    """Let a worker take nothing new, finish what runs, and exit."""
    from inferflux.cli import drain  # noqa: PLC0415

    if eta:
        drain.estimate(worker, output)
    else:
        drain.drain(worker, within, output, wait=wait)


@app.command()
def chaos(
    fault: Annotated[FaultName, typer.Argument(help="What to break.")],
    report: Annotated[bool, typer.Option("--report", help="Print everything that was measured.")] = False,
    output: Output = Format.TABLE,
) -> None:
    """Break one process of the local cluster in the middle of a stream, and say whether the stream survived."""
    from inferflux.cli import chaos  # noqa: PLC0415

    chaos.run(str(fault), output, is_full=report)


@server_app.command("start")
def server_start(output: Output = Format.TABLE) -> None:
    """Start the cluster again in the background, with the options of its last start."""
    from inferflux.cli import server  # noqa: PLC0415

    server.start(output)


@server_app.command("stop")
def server_stop(output: Output = Format.TABLE) -> None:
    """Drain and stop everything."""
    from inferflux.cli import server  # noqa: PLC0415

    server.stop(output)


@server_app.command("restart")
def server_restart(
    name: Annotated[Optional[str], typer.Argument(help="A role or a process; default: everything.")] = None,  # noqa: UP045
    output: Output = Format.TABLE,
) -> None:
    """Restart processes; those of a role one after the other."""
    from inferflux.cli import server  # noqa: PLC0415

    server.restart(name, output)


@server_app.command("status")
def server_status(output: Output = Format.TABLE) -> None:
    """Show the processes, as `inferctl status` does."""
    from inferflux.cli.server import show_status  # noqa: PLC0415

    show_status(output)


@server_app.command("logs")
def server_logs(
    name: Annotated[Optional[str], typer.Argument(help="A role or a process; default: all.")] = None,  # noqa: UP045
    lines: Annotated[int, typer.Option("-n", "--lines", min=1, help="Of each log.")] = 50,
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Go on printing.")] = False,
    output: Output = Format.TABLE,
) -> None:
    """Print logs."""
    from inferflux.cli import server  # noqa: PLC0415

    server.show_logs(name, lines, follow=follow, output=output)


@keys_app.command("list")
def keys_list(local: Local = False, output: Output = Format.TABLE) -> None:
    """List live keys, without secrets."""
    from inferflux.cli import keys  # noqa: PLC0415

    keys.show(keys.open_keys(is_local=local), output)


@keys_app.command("create")
def keys_create(
    name: Annotated[str, typer.Argument(help="What it is for.")],
    scope: Annotated[
        Optional[list[ScopeName]],  # noqa: UP045
        typer.Option(help="May be given several times; default: generate, or none with --role."),
    ] = None,
    role: Annotated[Optional[list[str]], typer.Option(help="A role of the policy; also several times.")] = None,  # noqa: UP045
    tenant: Annotated[str, typer.Option(help="Whom its use is counted for.")] = "",
    team: Annotated[str, typer.Option(help="Part of the tenant.")] = "",
    model: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(help="The only model or adapter it may use; also several times, and with * at the end."),
    ] = None,
    days: Annotated[Optional[float], typer.Option(min=0.0, help="Life; default: for ever.")] = None,  # noqa: UP045
    local: Local = False,
    output: Output = Format.TABLE,
) -> None:
    """Create a key and print it, this once."""
    from inferflux.cli import keys  # noqa: PLC0415

    scopes = [str(s) for s in scope or ([] if role else [ScopeName.GENERATE])]
    wanted = {"name": name, "scopes": scopes, "roles": role, "tenant": tenant, "team": team, "models": model}
    keys.create(keys.open_keys(is_local=local), wanted, days, output)


@keys_app.command("rotate")
def keys_rotate(
    key_id: Annotated[str, typer.Argument(help="As in `list`.")],
    grace: Annotated[
        float, typer.Option(min=0.0, metavar="SECONDS", help="How long the old secret works, too.")
    ] = 3600.0,
    local: Local = False,
    output: Output = Format.TABLE,
) -> None:
    """Give a key a new secret and print it, this once."""
    from inferflux.cli import keys  # noqa: PLC0415

    keys.rotate(keys.open_keys(is_local=local), key_id, grace, output)


@keys_app.command("revoke")
def keys_revoke(
    key_id: Annotated[str, typer.Argument(help="As in `list`.")], local: Local = False, output: Output = Format.TABLE
) -> None:
    """Revoke a key for ever."""
    from inferflux.cli import keys  # noqa: PLC0415

    keys.revoke(keys.open_keys(is_local=local), key_id, output)


@admin_app.command("cache")
def cache(
    status: Annotated[bool, typer.Option("--status", help="Show each prefill worker's cache; the default.")] = False,
    warm: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--warm", metavar="FILE_OR_TEXT", help="Compute a prefix: text, or a request in JSON."),
    ] = None,
    pin: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--pin", metavar="NAME", help="Keep the prefix of --warm, or of stdin, under a name."),
    ] = None,
    unpin: Annotated[Optional[str], typer.Option("--unpin", metavar="NAME", help="Let a pin go.")] = None,  # noqa: UP045
    model: ModelName = None,
    tenant: Annotated[Optional[str], typer.Option("--tenant", help="Whose prefix it is; default: your key's.")] = None,  # noqa: UP045
    output: Output = Format.TABLE,
) -> None:
    """Look at the prefix caches of prefill workers, fill and pin them."""
    from inferflux.cli import cache as command  # noqa: PLC0415

    if [status, unpin is not None, bool(pin or warm)].count(True) > 1:
        raise CliError("--status, --unpin and --warm or --pin exclude each other", Exit.USAGE)
    prefix = command.Prefix(warm, model, tenant)
    if unpin is not None:
        command.unpin(unpin, output)
    elif pin is not None:
        command.pin(pin, prefix, output)
    elif warm is not None:
        command.warm(prefix, output)
    else:
        command.show(output)


@admin_app.command("usage")
def usage(
    tenant: Annotated[Optional[str], typer.Option("--tenant", help="Only of this tenant.")] = None,  # noqa: UP045
    output: Output = Format.TABLE,
) -> None:
    """Show what keys, teams and tenants have used of their limits."""
    from inferflux.cli import usage as command  # noqa: PLC0415

    command.show(tenant, output)


@admin_app.command("backup")
def backup(
    file: Annotated[Path, typer.Argument(help="Where to write it; must not be there yet.")],
    only: Annotated[
        Optional[PartName],  # noqa: UP045
        typer.Option(help="A part: policy has keys and policies, registry models and pools."),
    ] = None,
    output: Output = Format.TABLE,
) -> None:
    """Write the control state (keys, policies, models, pools) to a file, from Redis itself."""
    from inferflux.cli import backup as command  # noqa: PLC0415

    command.backup(file, str(only or ""), output)


@admin_app.command("restore")
def restore(
    file: Annotated[Path, typer.Argument(help="What `backup` wrote.")],
    force: Annotated[bool, typer.Option("--force", help="Also over a state that is newer than the backup.")] = False,
    output: Output = Format.TABLE,
) -> None:
    """Put a backup in the place of the control state."""
    from inferflux.cli import backup as command  # noqa: PLC0415

    command.restore(file, output, force=force)


def main() -> int:
    """Run one command; returns the exit status that the help text documents."""
    try:
        app()
    except CliError as e:
        note(f"inferctl: {e.message}")
        if e.hint:
            note(f"  {e.hint}")
        return e.code
    except BrokenPipeError:  # `inferctl ... | head`: nobody reads on
        sys.stderr.close()
        return Exit.FAILED
    return Exit.OK

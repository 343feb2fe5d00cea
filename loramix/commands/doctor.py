"""The command ``loramix doctor``."""

from __future__ import annotations

import click


@click.command()
@click.option("--json", "as_json", is_flag=True, help="A JSON list instead of lines.")
def doctor(as_json: bool) -> None:
    """Check this machine, the build, the base and the pack, and show how to fix each problem."""
    from loramix.diagnose.doctor import report, to_json

    checks = report()
    if as_json:
        click.echo(to_json(checks))
    else:
        marks = {"ok": ("ok  ", "green"), "warn": ("note", "yellow"), "fail": ("FAIL", "red")}
        for check in checks:
            mark, colour = marks[check.status]
            click.echo(f"{click.style(mark, fg=colour)}  {check.name}: {check.detail}")
            if check.fix and check.status != "ok":
                click.echo(f"      → {check.fix}")
    if any(check.status == "fail" for check in checks):
        raise SystemExit(1)

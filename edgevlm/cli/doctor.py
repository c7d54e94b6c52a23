"""`edgevlm doctor`."""

from __future__ import annotations

import click

from edgevlm.cli.common import Output, short_output_options

SIGNS = {
    "ok": ("ok", "green"),
    "note": ("note", "yellow"),
    "missing": ("missing", "yellow"),
    "broken": ("BROKEN", "red"),
}


@click.command("doctor")
@short_output_options
def doctor_command(output: Output) -> int:
    """Check this installation and what this machine means for speed.

    \b
    Example:
      edgevlm doctor
    """
    from edgevlm.diagnosis import doctor, is_healthy

    checks = doctor()

    def text() -> str:
        width = max(len(check.name) for check in checks)
        lines = []
        for check in checks:
            sign, color = SIGNS[check.state]
            lines.append(f"{click.style(f'{sign:>7}', fg=color)}  {check.name:<{width}}  {check.finding}")
            if check.remedy:
                lines.append(f"{'':>7}  {'':<{width}}  → {check.remedy}")
        return "\n".join(lines)

    output.value(checks, text)
    return 0 if is_healthy(checks) else 1

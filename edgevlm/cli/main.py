"""`edgevlm`: the group of verbs, and what happens to their errors."""

from __future__ import annotations

import errno
import importlib
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Any, NoReturn

import click

import edgevlm
from edgevlm.errors import EdgeVLMError, did_you_mean

# Verb -> where its command stands. A verb is imported when it is used, so that `--help` and `run` start at once.
VERBS: dict[str, tuple[str, str]] = {
    "compile": ("edgevlm.cli.compile:compile_command", "Compile a model for a target: a measured, verified bundle."),
    "quantize": ("edgevlm.cli.quantize:quantize_command", "Fine-tune a model for int8 and prove what is exported."),
    "distill": ("edgevlm.cli.distill:distill_command", "Teach a small model what a large one knows."),
    "run": ("edgevlm.cli.run:run_command", "Answer for pictures with a bundle; needs no PyTorch."),
    "inspect": ("edgevlm.cli.inspect:inspect_command", "Say what is in a bundle."),
    "verify": ("edgevlm.cli.verify:verify_command", "Check a bundle's hashes and replay its golden vectors here."),
    "benchmark": ("edgevlm.cli.benchmark:benchmark_command", "Time bundles against each other, in turns."),
    "build": ("edgevlm.cli.build:build_command", "Build the TensorRT engines that a bundle needs, on the device."),
    "tune": ("edgevlm.cli.tune:tune_command", "Choose among a bundle's forms by timing them on the device."),
    "evaluate": ("edgevlm.cli.evaluate:evaluate_command", "Judge a bundle on a data set."),
    "targets": ("edgevlm.cli.targets:targets_group", "List, show, detect and validate targets."),
    "doctor": ("edgevlm.cli.doctor:doctor_command", "Check this installation and this machine."),
    "cache": ("edgevlm.cli.cache:cache_group", "List, explain and clear stored results."),
}

EXIT_INTERRUPTED = 130

# What these finished before they were stopped is looked up when they are started again.
_GO_ON = frozenset({"compile", "quantize", "distill"})

# What a disk says that takes no more; it can strike wherever something is written, standard output included.
_UNWRITABLE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG})

EXAMPLES = """\b
Examples:
  edgevlm compile demo --target cpu
  edgevlm compile ./mobilenet --target cpu --eval-data ./pictures
  edgevlm run mobilenet-cpu/ picture.jpg
"""


class Verbs(click.Group):
    """A group whose commands are imported when they are asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in VERBS:
            return None
        module, _, attribute = VERBS[cmd_name][0].partition(":")
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Verbs"):
            formatter.write_dl([(name, summary) for name, (_, summary) in VERBS.items()])

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in VERBS:
            raise click.UsageError(f"There is no verb '{args[0]}'. {did_you_mean(args[0], VERBS)}", ctx)
        return super().resolve_command(ctx, args)


@click.group(
    cls=Verbs, epilog=EXAMPLES, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}
)
@click.version_option(edgevlm.__version__, prog_name="edgevlm")
def cli() -> None:
    """edgevlm takes vision and vision-language models to edge hardware.

    A model goes in; a measured, verified, self-contained bundle for named hardware comes out, with a report of how
    fast, how accurate, how large, and why.
    """


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit with its code: 0 ok, 1 failed, 2 usage, 3 tool missing, 4 gate, 130 interrupted."""
    sys.exit(exit_code_of(list(sys.argv[1:] if arguments is None else arguments)))


def exit_code_of(arguments: list[str]) -> int:
    """Run the command line; every error that a user can cause ends as one sentence and its exit code."""
    is_debug = "--debug" in arguments
    if "--no-color" in arguments:
        os.environ["NO_COLOR"] = "1"
    try:
        result: Any = cli.main(arguments, standalone_mode=False)
    except EdgeVLMError as error:
        if is_debug:
            traceback.print_exc()
        _say(error.message, error.hint)
        return error.exit_code
    except click.ClickException as error:
        context = error.ctx if isinstance(error, click.UsageError) else None
        _say(error.format_message(), f"See: {context.command_path} --help" if context else "")
        return error.exit_code
    except (KeyboardInterrupt, click.Abort):
        goes_on = " What was finished is kept; the same command goes on from there."
        click.echo(f"\nStopped.{goes_on if arguments[:1] and arguments[0] in _GO_ON else ''}", err=True)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader of our output has gone: nothing can be said to it, and Python must not try at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except MemoryError:
        _say("The memory of this machine is full.", "Use a smaller --batch or --image-size, or a machine with more.")
        return 1
    except Exception as error:
        if is_debug:
            raise
        if isinstance(error, OSError) and error.errno in _UNWRITABLE:
            where = f"'{error.filename}'" if error.filename else "The output"
            _say(f"{where} cannot be written: {os.strerror(error.errno)}.", "Free some space, or use another disk.")
            return 1
        _say(
            f"Something went wrong that should not: {type(error).__name__}: {error}",
            "Run it again with --debug and report what it prints; `edgevlm doctor` checks the installation.",
        )
        return 1
    return result if isinstance(result, int) else 0


def _say(message: str, hint: str) -> None:
    color = False if os.environ.get("NO_COLOR") else None
    click.echo(click.style("error: ", fg="red", bold=True) + message, err=True, color=color)
    if hint:
        click.echo(click.style(" hint: ", fg="cyan") + hint, err=True, color=color)


if __name__ == "__main__":
    main()

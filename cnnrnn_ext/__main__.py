"""The command line: ``python -m cnnrnn_ext info``, ``demo``, and the recipes' four commands."""

import argparse
import json
import sys

from cnnrnn_ext import info
from cnnrnn_ext.demo import cli as demo
from cnnrnn_ext.recipes import cli as recipes


def parser(argv=()):
    """argv: the command line, whose recipe adds its own options."""
    top = argparse.ArgumentParser(
        prog="python -m cnnrnn_ext",
        description="Fast kernels for networks that join a CNN with an RNN.",
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="command")
    info_parser = commands.add_parser(
        "info", help="what is built, which kernels run here, why any is missing"
    )
    info_parser.add_argument("--json", action="store_true", help="for programs")
    info_parser.set_defaults(run=run_info)
    demo_parser = commands.add_parser("demo", help="train a CNN→LSTM on videos of moving digits")
    demo.add_arguments(demo_parser)
    demo_parser.set_defaults(run=demo.run)
    recipes.add_commands(commands, argv)
    return top


def run_info(arguments):
    found = info.collect()
    print(json.dumps(found, indent=2) if arguments.json else info.describe(found))
    return 0


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    arguments = parser(argv).parse_args(argv)
    return arguments.run(arguments)


if __name__ == "__main__":
    sys.exit(main())

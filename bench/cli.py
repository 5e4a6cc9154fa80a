"""`pdserve bench …`: mounted by the root command line."""

from __future__ import annotations

import argparse

from . import handoff, link_cost, page_runs, serve, turns


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds `bench` and its commands."""
    summary = "measure any OpenAI-compatible server"
    parser = subparsers.add_parser("bench", help=summary, description=summary)
    commands = parser.add_subparsers(dest="bench_command", required=True, metavar="COMMAND")
    serve_summary = "TTFT, ITL, throughput and goodput under an open or closed loop"
    serve_parser = commands.add_parser("serve", help=serve_summary, description=serve_summary)
    serve.add_arguments(serve_parser)
    serve_parser.set_defaults(run_bench=serve.main)
    handoff_summary = "what the hand-off costs: two nodes against one that does both, on this machine"
    handoff_parser = commands.add_parser("handoff", help=handoff_summary, description=handoff.__doc__)
    handoff.add_arguments(handoff_parser)
    handoff_parser.set_defaults(run_bench=handoff.main)
    turns_summary = "what decode's prefix cache saves a second turn, and what local prefill costs streams"
    turns_parser = commands.add_parser("turns", help=turns_summary, description=turns.__doc__)
    turns.add_arguments(turns_parser)
    turns_parser.set_defaults(run_bench=turns.main)
    runs_summary = "how many writes a hand-off takes when the pools are in use"
    runs_parser = commands.add_parser("page-runs", help=runs_summary, description=page_runs.__doc__)
    page_runs.add_arguments(runs_parser)
    runs_parser.set_defaults(run_bench=page_runs.main)
    links_summary = "what the cluster secret costs on the links between processes"
    links_parser = commands.add_parser("links", help=links_summary, description=link_cost.__doc__)
    link_cost.add_arguments(links_parser)
    links_parser.set_defaults(run_bench=link_cost.main)


def run(args: argparse.Namespace) -> int:
    """Runs the parsed command; raises StartupError where the arguments are unusable."""
    return int(args.run_bench(args))

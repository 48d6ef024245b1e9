"""The benchmarks' command line."""

from __future__ import annotations

import argparse
import json
import sys

from comfyui_tpu.bench import attention, run, tune
from comfyui_tpu.bench.compiling import BenchError, compile_all
from comfyui_tpu.bench.kernels import (
    JAX_SPLASH,
    OURS,
    TOKAMAX_SPLASH,
    Job,
    Shape,
    SplashBlocks,
    our_blocks,
    splash_candidates,
)
from comfyui_tpu.ops.splash_blocks import Blocks
from comfyui_tpu.plan import hardware
from comfyui_tpu.plan.bundles import BundleError
from comfyui_tpu.runtime.errors import TPUError
from comfyui_tpu.runtime.files import write_text

OK, FAILED = 0, 1


def main(arguments: list[str] | None = None) -> int:
    """Run a command; returns its exit code: 0, or 1 when it could not be done."""
    options = _parser().parse_args(arguments)
    try:
        return options.run(options)
    except (BenchError, BundleError, TPUError) as error:
        print(f"error: {error}", file=sys.stderr)
        return FAILED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m comfyui_tpu.bench",
        description="attention, tune: compile attention kernels for a TPU that need not be there, and count their "
        f"cycles. {attention.ESTIMATE} run: time a model on the TPU that is there.",
    )
    commands = parser.add_subparsers(required=True)
    compare = commands.add_parser(
        "attention", help="our kernel against JAX's splash attention, and tokamax's where installed"
    )
    compare.set_defaults(run=_attention)
    _common(compare)
    compare.add_argument(
        "--seq", type=_positive, required=True, help="queries, and keys unless --kv-seq says otherwise"
    )
    compare.add_argument("--kv-seq", type=_positive, help="keys")
    compare.add_argument("--blocks", type=_blocks, help="our tile instead of the table's: " + tune.FORMAT)
    compare.add_argument(
        "--splash-blocks",
        type=_splash_blocks,
        nargs="+",
        metavar="Q,KV,COMPUTE",
        help="tiles of the peers' kernels to choose the fastest from (default: a short list that suits the lengths)",
    )
    compare.add_argument("--online", action="store_true", help="count our kernel's fall-back, the online softmax")
    search = commands.add_parser("tune", help="rank tiles of our kernel")
    search.set_defaults(run=_tune)
    _common(search)
    search.add_argument("--seq", type=_positive, nargs="+", required=True, help="lengths to rank the tiles for")
    search.add_argument(
        "--candidates",
        type=_blocks,
        nargs="+",
        metavar=tune.FORMAT,
        help="tiles to try (default: variations of the table's choice for each length)",
    )
    measured = commands.add_parser(
        "run",
        help="time a model's pipeline on this machine (not an estimate)",
        description="Time a model's real pipeline on this machine's devices: load, compile, encode, denoise, decode.",
    )
    measured.set_defaults(run=_run)
    run.add_arguments(measured)
    return parser


def _common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--topology", default="v6e:1x1", help="generation and shape (default: %(default)s)")
    parser.add_argument("--heads", type=_positive, default=8, help="of one chip (default: %(default)s)")
    parser.add_argument("--head-dim", type=_positive, default=128, help="default: %(default)s")
    parser.add_argument("--jobs", type=_positive, default=2, help="compilations at once (default: %(default)s)")
    parser.add_argument("--json", metavar="PATH", help="write the result as JSON ('-': to the terminal instead)")


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1, got {text!r}")
    return int(text)


def _numbers(text: str, kind: type, least: int, most: int):
    parts = text.split(",")
    if not least <= len(parts) <= most or not all(part.isdigit() and int(part) for part in parts):
        raise argparse.ArgumentTypeError(f"expected {least} to {most} numbers with commas between them, got {text!r}")
    try:
        return kind(*map(int, parts))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _blocks(text: str) -> Blocks:
    return _numbers(text, Blocks, 4, 7)


def _splash_blocks(text: str) -> SplashBlocks:
    return _numbers(text, SplashBlocks, 3, 3)


def _attention(options: argparse.Namespace) -> int:
    topology = hardware.parse(options.topology)
    shape = Shape(options.heads, options.seq, options.kv_seq or options.seq, options.head_dim)
    ours = Job(OURS, topology.name, shape, options.blocks or our_blocks(topology, shape))
    tiles = options.splash_blocks or splash_candidates(shape)
    peers = [JAX_SPLASH, *([TOKAMAX_SPLASH] if attention.has_tokamax() else [])]
    jobs = [ours, *(Job(peer, topology.name, shape, each) for peer in peers for each in tiles)]
    report = attention.compare(compile_all(jobs, options.jobs, _progress), topology, shape, options.online)
    _write(options.json, report, attention.render(report))
    return OK if any(each["kernel"] == OURS for each in report["rows"]) else FAILED


def _tune(options: argparse.Namespace) -> int:
    topology = hardware.parse(options.topology)
    shapes = [Shape(options.heads, length, length, options.head_dim) for length in options.seq]
    jobs = tune.jobs(topology, shapes, options.candidates)
    report = tune.rank(compile_all(jobs, options.jobs, _progress), topology, options.head_dim)
    _write(options.json, report, tune.render(report))
    return OK if report["limits"] else FAILED


def _run(options: argparse.Namespace) -> int:
    report = run.run(options)
    _write(options.json, report, run.render(report))
    return OK


def _progress(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _write(path: str | None, report: dict, text: str) -> None:
    print(json.dumps(report, indent=2) if path == "-" else text)
    if path and path != "-":
        write_text(path, json.dumps(report, indent=2) + "\n")

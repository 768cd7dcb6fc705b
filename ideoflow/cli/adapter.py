"""``ideoflow adapter``: what is in an adapter file, and others made from it."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from ideoflow.model.quiet import hush_libraries

if TYPE_CHECKING:
    from ideoflow.artifacts.info import AdapterInfo

FORMS = ("comfyui", "diffusers", "peft", "kohya")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    adapter = "a .safetensors file, or PEFT's folder"

    command = actions.add_parser("info", help="form, kind, ranks, alphas, sizes, digest and metadata")
    command.add_argument("file", type=Path, help=adapter)
    command.add_argument("--json", action="store_true", help="the same as JSON")
    command.set_defaults(act=info)

    command = actions.add_parser("convert", help="the same adapter in another form, exactly")
    command.add_argument("file", type=Path, help=adapter)
    command.add_argument(
        "output", type=Path, help="what to write, a new .safetensors file; a folder for peft"
    )
    command.add_argument("--to", choices=FORMS, required=True, help="who is to read it (docs/adapters.md)")
    command.add_argument("--base", help="the base, which a DoRA needs: nano, a folder, a file or a hub id")
    command.set_defaults(act=convert)

    command = actions.add_parser("merge", help="a base with the adapter in its weights")
    command.add_argument("file", type=Path, help=adapter)
    command.add_argument("base", help="bf16 or FP8: nano, a folder, a single file or a hub id")
    command.add_argument("output", type=Path, help="a new folder, or of a single file a new file")
    command.set_defaults(act=merge)

    command = actions.add_parser("resize", help="the nearest LoRA of a lower rank, from any kind")
    command.add_argument("file", type=Path, help=adapter)
    command.add_argument("output", type=Path, help="a new file (of PEFT's form, a folder)")
    size = command.add_mutually_exclusive_group(required=True)
    size.add_argument("--rank", type=_rank, help="the rank of every module")
    size.add_argument("--energy", type=_share, metavar="SHARE", help="the least ranks that keep this share")
    command.set_defaults(act=resize)


def execute(args: argparse.Namespace) -> int:
    hush_libraries()
    args.act(args)
    return 0


def _rank(text: str) -> int:
    value = int(text)
    if not 1 <= value <= 4096:
        raise argparse.ArgumentTypeError("a rank is 1 to 4096")
    return value


def _share(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError("a share is above 0 and at most 1, such as 0.99")
    return value


def info(args: argparse.Namespace) -> None:
    from ideoflow.artifacts.info import describe

    found = describe(args.file)
    print(json.dumps(found.as_dict(), indent=1) if args.json else _page(found))


def _page(found: AdapterInfo) -> str:
    ranks = " ".join(f"{rank}x{count}" for rank, count in found.ranks.items())
    scales = " ".join(f"{scale:g}x{count}" for scale, count in found.scales.items())
    lines = [
        str(found.path),
        f"  {' and '.join(found.kinds)} in the form of {found.form}; loads in {found.readers}",
        *(f"  {remark}" for remark in found.remarks),
        f"  {found.modules} modules in {found.blocks} blocks: {', '.join(found.targets)}",
        f"  ranks {ranks}; alpha / rank {scales}",
        f"  {found.parameters / 1e6:.2f} M parameters, {found.dtype}, {found.bytes / 1e6:.1f} MB",
        f"  sha256 {found.digest}",
        *(f"  {name}: {value}" for name, value in sorted(found.metadata.items())),
    ]
    return "\n".join(lines)


def convert(args: argparse.Namespace) -> None:
    from ideoflow.artifacts.adapter_file import check_output, for_form, read_adapter, write_adapter
    from ideoflow.artifacts.merge import base_weights, find_base

    check_output(args.output, folder=args.to == "peft")
    adapter = read_adapter(args.file)
    weight = None if args.base is None else base_weights(find_base(args.base))
    updates = for_form(adapter.updates, args.to, weight)
    print(f"wrote {write_adapter(args.output, updates, args.to, adapter.dtype, adapter.metadata)}")


def merge(args: argparse.Namespace) -> None:
    from ideoflow.artifacts.adapter_file import read_adapter
    from ideoflow.artifacts.merge import find_base
    from ideoflow.artifacts.merge import merge as merge_into

    done = merge_into(read_adapter(args.file), find_base(args.base), args.output)
    change = f"{done.weights} weights changed, by {done.change:.2%} of their norm on average"
    print(f"wrote {done.place}: {change}")


def resize(args: argparse.Namespace) -> None:
    from ideoflow.artifacts.adapter_file import check_output, read_adapter, write_adapter
    from ideoflow.artifacts.resize import resize as resize_to

    adapter = read_adapter(args.file)
    check_output(args.output, folder=adapter.form == "peft")
    updates, report = resize_to(adapter.updates, rank=args.rank, energy=args.energy)
    write_adapter(args.output, updates, adapter.form, adapter.dtype, adapter.metadata)
    for one in report:
        before = "full" if one.before is None else one.before
        print(f"{one.module:<40} rank {before} -> {one.after}, {one.kept:.2%} kept")
    kept = sum(one.kept for one in report) / len(report)
    print(f"wrote {args.output}: {kept:.2%} of the squared norm kept on average")
